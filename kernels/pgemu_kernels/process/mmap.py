"""mmap() of every ordinary kind of mapping: mm/mmap.c:do_mmap(), mm/vma.c:mmap_region()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.process.fault import mm_populate
from pgemu_kernels.process.gmem_entries import next_vma
from pgemu_kernels.process.munmap import remove_vmas
from pgemu_kernels.process.pfn import remap_pfn_range
from pgemu_kernels.process.record import protection, rounded
from pgemu_kernels.process.tables import gather_begin, space_row
from pgemu_kernels.process.vma import merge, new_row, reserve
from pgemu_kernels.words.operations import EBADF, EEXIST, EINVAL, ENODEV, ENOMEM, EOPNOTSUPP, Flag
from pgemu_kernels.words.registers import R_INODES
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_CACHE_BITS,
    A_CLONED,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_PGOFF,
    A_PROT,
    A_READ_ONLY,
    A_RESERVED,
    A_SPACE,
    A_START,
    I_CACHE_BITS,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    I_REFERENCES,
    INODE_DEVICE,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    INODE_MMAP,
    INODE_REMAP,
    NO_INODE,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    S_ORDINARY,
    TASK_SIZE,
    VM_LOCKED,
    VM_NORESERVE,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD_4K,
    VMA_HUGETLB,
    VMA_PFN_FAULT,
    VMA_PFN_REMAP,
)

U = np.uint64
_WRITE = U(Flag.WRITE)
_PRIVATE = U(Flag.PRIVATE)
_SHARED = U(Flag.SHARED)
_POPULATE = U(Flag.POPULATE)
_NORESERVE = U(Flag.NORESERVE)
_LOCKED = U(Flag.LOCKED)


@kernel
def _kind_of(state, inode):
    """VMA_* of a mapping of an inode, or of anonymous memory; NONE where it cannot be mapped."""
    if inode == NO_INODE:
        return VMA_ANONYMOUS
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_HUGETLB:
        return VMA_HUGETLB
    if kind == INODE_GUEST_MEMFD_4K:
        return VMA_GUEST_MEMFD_4K
    if kind == INODE_DEVICE:
        return VMA_PFN_REMAP if state[node + I_FLAGS] & INODE_REMAP != U0 else VMA_PFN_FAULT
    return NONE


@outlined
def _check_file(state, op, kind, length):
    """What the file's own mmap refuses: 0, -EBADF, -EINVAL, -ENODEV."""
    inode = state[op + O_OBJECT]
    shared = state[op + O_FLAGS] & _SHARED != U0
    node = inode_row(inode)
    offset = state[op + O_OFFSET]
    if kind == VMA_HUGETLB:
        inside = (U1 << (U12 + state[node + I_ORDER])) - U1
        return np.int64(-EINVAL if (state[op + O_ADDRESS] | offset) & inside != U0 else 0)
    if kind == VMA_GUEST_MEMFD_4K:
        if state[node + I_FLAGS] & INODE_MMAP == U0:
            return np.int64(-ENODEV)
        return np.int64(0 if shared else -EINVAL)
    pages = state[node + I_PAGES]
    if not shared or (offset >> U12) + (length >> U12) > pages:
        return np.int64(-EINVAL)
    return np.int64(0)


@outlined
def _check_mmap(state, op, kind, length):
    """What mmap refuses whatever is mapped: 0, -EINVAL, -ENOMEM, -EEXIST."""
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    if state[op + O_LENGTH] == U0 or (start | state[op + O_OFFSET]) & U4095 != U0:
        return np.int64(-EINVAL)
    if state[op + O_FLAGS] & _SHARED != U0 and state[op + O_FLAGS] & _PRIVATE != U0:
        return np.int64(-EINVAL)
    if length == U0 or length > TASK_SIZE or start > TASK_SIZE - length:
        return np.int64(-ENOMEM)
    if kind == VMA_ANONYMOUS and state[op + O_FLAGS] & _SHARED != U0:
        return np.int64(-EOPNOTSUPP)  # shmem: not modelled
    if next_vma(state, space, start, start + length) != NONE:
        return np.int64(-EEXIST)
    return np.int64(0)


@kernel
def _fill_row(state, op, row, kind, length):
    """A VMA as the record asks for it."""
    flags = state[op + O_FLAGS]
    bits = U0
    if flags & _SHARED != U0:
        bits |= VM_SHARED
    if flags & _LOCKED != U0:
        bits |= VM_LOCKED
    if flags & _NORESERVE != U0:
        bits |= VM_NORESERVE
    if kind == VMA_PFN_REMAP or kind == VMA_PFN_FAULT:
        bits |= VM_PFNMAP
    start = state[op + O_ADDRESS]
    state[row + A_START] = start
    state[row + A_END] = start + length
    state[row + A_SPACE] = state[op + O_SPACE]
    state[row + A_INODE] = state[op + O_OBJECT]
    state[row + A_PGOFF] = (start if kind == VMA_ANONYMOUS else state[op + O_OFFSET]) >> U12
    state[row + A_KIND] = kind
    state[row + A_PROT] = protection(flags)
    state[row + A_READ_ONLY] = U1 if flags & _WRITE == U0 else U0
    state[row + A_FLAGS] = bits
    state[row + A_CACHE_BITS] = U0
    state[row + A_ANON_VMA] = U0
    state[row + A_CLONED] = U0
    state[row + A_RESERVED] = U0
    state[row + A_LIVE] = U1


@kernel
def _enter(m, row, kind):
    """What a file does when a mapping of it is made: 0 or -ENOMEM with the mapping's entries as far as they came."""
    state = m.state
    if kind == VMA_HUGETLB:
        if state[row + A_FLAGS] & VM_NORESERVE == U0:
            return reserve(m, row)
    elif kind == VMA_PFN_REMAP or kind == VMA_PFN_FAULT:
        state[row + A_CACHE_BITS] = state[inode_row(state[row + A_INODE]) + I_CACHE_BITS]
        if kind == VMA_PFN_REMAP:
            return remap_pfn_range(m, row)
    return np.int64(0)


@outlined
def mmap(m, op):
    """mmap(MAP_FIXED_NOREPLACE) of anonymous memory (object NO_INODE) or of a file of an ordinary kind.

    flags: READ, WRITE, EXEC; PRIVATE or SHARED; POPULATE, LOCKED, NORESERVE. 0, -EBADF, -EINVAL, -ENODEV,
    -EEXIST, -ENOMEM, -EOPNOTSUPP.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    if inode != NO_INODE and (inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0):
        return stop(state, op, -EBADF)
    kind = _kind_of(state, inode)
    if kind == NONE:
        return stop(state, op, -EINVAL)
    unit = U(4096)
    if kind == VMA_HUGETLB:
        unit = U1 << (U12 + state[inode_row(inode) + I_ORDER])
    length = rounded(state, op, unit)
    status = _check_mmap(state, op, kind, length)
    if status == 0 and inode != NO_INODE:
        status = _check_file(state, op, kind, length)
    if status != 0:
        return stop(state, op, status)
    row = new_row(state)
    if row == NONE:
        return stop(state, op, -ENOMEM)
    _fill_row(state, op, row, kind, length)
    state[space_row(state[op + O_SPACE]) + S_ORDINARY] = U1
    if inode != NO_INODE:
        state[inode_row(inode) + I_REFERENCES] += U1
    if _enter(m, row, kind) != 0:
        gather_begin(m)
        remove_vmas(m, state[op + O_SPACE], state[op + O_ADDRESS], state[op + O_ADDRESS] + length)
        return stop(state, op, -ENOMEM)
    if kind == VMA_ANONYMOUS:
        merge(state, row)
    if state[op + O_FLAGS] & (_POPULATE | _LOCKED) != U0:
        mm_populate(m, state[op + O_SPACE], state[op + O_ADDRESS], state[op + O_ADDRESS] + length)
    return stop(state, op, 0)
