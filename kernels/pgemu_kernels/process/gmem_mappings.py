"""mmap, munmap and zapping of a process's mappings of an inode. Each runs as one step."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import free_row, inode_row, mapping_limits, range_arguments, space_root, stop, vma_row
from pgemu_kernels.process.gmem_entries import flush_mm, next_vma, owe_flush, reclaim_tables, unmap_vma_range
from pgemu_kernels.tables.walker import free_host_tables
from pgemu_kernels.words.operations import EEXIST, EINVAL, ENODEV, ENOMEM, PFNMAP, Flag
from pgemu_kernels.words.registers import (
    R_DESIGN,
    R_DONTNEED_FREES_TABLES,
    R_DONTNEED_PFNMAP,
    R_ORDER,
    R_SPACES,
    R_VMAS,
)
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_LIVE,
    A_PGOFF,
    A_READ_ONLY,
    A_SPACE,
    A_START,
    A_WORDS,
    I_FLAGS,
    INODE_MMAP,
    INODE_WHOLE_MAPPINGS,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    VMAS,
)

U = np.uint64
MADVISE = U(Flag.MADVISE)
READ_ONLY = U(Flag.READ_ONLY)
PRIVATE = U(Flag.PRIVATE)
_TASK_SIZE = U(1 << 47)


@kernel
def file_allows(state, op):
    """What the inode says to being mapped: 0, -ENODEV or -EINVAL."""
    flags = state[inode_row(state[op + O_OBJECT]) + I_FLAGS]
    if flags & INODE_MMAP == U0:
        return np.int64(-ENODEV)
    if state[op + O_FLAGS] & PRIVATE != U0:
        return np.int64(-EINVAL)
    inside = (U1 << (state[R_ORDER] + U12)) - U1
    if flags & INODE_WHOLE_MAPPINGS != U0 and (state[op + O_ADDRESS] | state[op + O_LENGTH]) & inside != U0:
        return np.int64(-EINVAL)
    return np.int64(0)


@outlined
def mmap(m, op):
    """mmap(MAP_FIXED_NOREPLACE) of an inode's range: 0, -EBADF, -EINVAL, -ENODEV, -EEXIST, -ENOMEM.

    -ENODEV without GUEST_MEMFD_FLAG_MMAP, -EINVAL for MAP_PRIVATE: virt/kvm/guest_memfd.c:kvm_gmem_mmap(). RFC v2 with
    HugeTLB: -EINVAL for an address or length that is not aligned to huge pages. As do_mmap() has it, before the file
    is asked: -EEXIST.
    """
    state = m.state
    status = range_arguments(state, op)
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    end = start + state[op + O_LENGTH]
    if status != 0:
        return stop(state, op, status)
    if space >= state[R_SPACES] or start & U4095 != U0 or end <= start or end > _TASK_SIZE:
        return stop(state, op, -EINVAL)
    if space_root(state, space) == U0:
        return stop(state, op, -EINVAL)  # the process has ended
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] != U0 and state[row + A_SPACE] == space:
            if start < state[row + A_END] and state[row + A_START] < end:
                return stop(state, op, -EEXIST)
    status = file_allows(state, op)
    if status != 0:
        return stop(state, op, status)
    row = free_row(state, R_VMAS, U(VMAS), U(A_WORDS), A_LIVE, vma_row(U0))
    if row == NONE:
        return stop(state, op, -ENOMEM)
    state[row + A_START] = start
    state[row + A_END] = end
    state[row + A_SPACE] = space
    state[row + A_INODE] = state[op + O_OBJECT]
    state[row + A_PGOFF] = state[op + O_OFFSET] >> U12
    state[row + A_READ_ONLY] = U1 if state[op + O_FLAGS] & READ_ONLY != U0 else U0
    state[row + A_LIVE] = U1
    return stop(state, op, 0)


@kernel
def remove_vma(state, row):
    state[row + A_LIVE] = U0
    state[row + A_START] = U0
    state[row + A_END] = U0


@outlined
def split_vma(m, row, address):
    """Cut a VMA in two at `address`, which lies inside it: the row of the upper part, or NONE."""
    state = m.state
    upper = free_row(state, R_VMAS, U(VMAS), U(A_WORDS), A_LIVE, vma_row(U0))
    if upper == NONE:
        return NONE
    for word in range(U(A_WORDS)):
        state[upper + word] = state[row + word]
    state[upper + A_START] = address
    state[upper + A_PGOFF] = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
    state[row + A_END] = address
    return upper


@kernel
def unmap_vma(m, row):
    """Drop a whole VMA, to be flushed: its entries, its row, and the tables that no neighbour needs.

    VM_PFNMAP is flushed here, before its VMA goes: include/asm-generic/tlb.h:tlb_free_vmas().
    """
    state = m.state
    space = state[row + A_SPACE]
    start = state[row + A_START]
    end = state[row + A_END]
    unmap_vma_range(m, row, start, end)
    if state[R_DESIGN] == U(PFNMAP):
        flush_mm(m, space)
    remove_vma(state, row)
    floor, ceiling = mapping_limits(state, space, start, end)
    # A table goes only where its whole span is free of neighbours: floor rounds up, ceiling down.
    freed = free_host_tables(m, space_root(state, space), start >> U12, end >> U12, floor >> U12, ceiling >> U12)
    owe_flush(state, space, freed)


@outlined
def munmap(m, op):
    """munmap(): cut the mappings at the range's ends, drop what lies inside. 0, -EINVAL, -ENOMEM."""
    state = m.state
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    end = start + state[op + O_LENGTH]
    if (start | state[op + O_LENGTH]) & U4095 != U0 or end <= start or end > _TASK_SIZE:
        return stop(state, op, -EINVAL)
    row = next_vma(state, space, start, end)
    if row == NONE:
        return stop(state, op, 0)
    status = np.int64(0)
    while row != NONE and status == 0:
        if state[row + A_START] < start:
            row = split_vma(m, row, start)
        if row == NONE or (state[row + A_END] > end and split_vma(m, row, end) == NONE):
            status = np.int64(-ENOMEM)
        else:
            unmap_vma(m, row)
            row = next_vma(state, space, start, end)
    flush_mm(m, space)  # one mmu_gather for the whole call
    return stop(state, op, status)


@kernel
def zap(m, op):
    """Clear a process's entries of a range; the mapping stays. 0, -EINVAL, or -ENOMEM over a hole.

    With MADVISE it is madvise(MADV_DONTNEED): refused with -EINVAL on VM_PFNMAP
    (mm/madvise.c:madvise_dontneed_free_valid_vma(), every version), and from 6.14 on it frees the
    last-level tables it covers whole. Without, it is the kernel's own unmapping.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    end = address + state[op + O_LENGTH]
    if (address | state[op + O_LENGTH]) & U4095 != U0 or end < address:
        return stop(state, op, -EINVAL)
    madvise = state[op + O_FLAGS] & MADVISE != U0
    hole = False
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            hole = True
            break
        if state[row + A_START] > address:
            hole = True
            address = state[row + A_START]
        if madvise and state[R_DESIGN] == U(PFNMAP) and state[R_DONTNEED_PFNMAP] == U0:
            return stop(state, op, -EINVAL)
        last = min(end, state[row + A_END])
        unmap_vma_range(m, row, address, last)
        if madvise and state[R_DONTNEED_FREES_TABLES] != U0 and last - address >= U(2 << 20):
            owe_flush(state, space, reclaim_tables(m, space_root(state, space), address >> U12, last >> U12))
        flush_mm(m, space)
        address = last
    return stop(state, op, -ENOMEM if hole else 0)
