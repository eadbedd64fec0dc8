"""A process's memory as mainline Linux has it: mmap, faults, munmap, mprotect, MADV_DONTNEED, fork, exit.

mm/mmap.c, mm/vma.c, mm/mprotect.c, mm/madvise.c. Operations are records as in routing.py; what each reads of them
stands in its docstring. Where a length is in bytes, it is rounded up to pages as the system call does.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U2, U3, U12, U4095
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import SYSCALL, charge_one
from pgemu_kernels.forking import end_process, fork
from pgemu_kernels.gmem import inode_row, mapping_limits, vma_row
from pgemu_kernels.guest_memfd_4k import find_or_add_folio
from pgemu_kernels.host import next_vma, space_root
from pgemu_kernels.huge_pages import add_to_file, discard_huge, take_huge
from pgemu_kernels.kvm_notifier import notify_inode
from pgemu_kernels.layout import (
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
    EBADF,
    EEXIST,
    EINVAL,
    ENODEV,
    ENOMEM,
    ENOSPC,
    EOPNOTSUPP,
    I_CACHE,
    I_CACHE_BITS,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    I_REFERENCES,
    INODE_DEVICE,
    INODE_GUEST_MEMFD,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    INODE_MMAP,
    INODE_REMAP,
    INODE_REVOKED,
    NO_INODE,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    O_SPACE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    R_DONTNEED_FREES_TABLES,
    R_GUARDS,
    R_INODES,
    R_SPACES,
    R_VMAS,
    S_ORDINARY,
    S_ROOT,
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
    Flag,
    Operation,
)
from pgemu_kernels.mm_fault import access, madvise_populate, mm_populate
from pgemu_kernels.page_cache import cache_find, cache_store
from pgemu_kernels.pfn_mapping import remap_pfn_range
from pgemu_kernels.process_entries import E_ADDRESS, GUARD
from pgemu_kernels.process_tables import (
    free_tables,
    gather_begin,
    gather_flush,
    lookup,
    need_slot,
    reclaim_level1_tables,
    size_of,
    space_row,
)
from pgemu_kernels.steps import stop
from pgemu_kernels.vma import (
    RESERVED,
    close_vma,
    cut,
    drop_page,
    merge,
    new_row,
    prepare_anon_vma,
    release_inode,
    reserve,
)
from pgemu_kernels.zapping import change_protection, drop_large_pfn, unmap_file_range, zap_range

U = np.uint64
_WRITE = U(Flag.WRITE)
_EXEC = U(Flag.EXEC)
_READ = U(Flag.READ)
_SHARED = U(Flag.SHARED)
_MADVISE = U(Flag.MADVISE)
_POPULATE = U(Flag.POPULATE)
_NORESERVE = U(Flag.NORESERVE)
_LOCKED = U(Flag.LOCKED)
_HOST_FAULT = U(Operation.HOST_FAULT)
_MMAP = U(Operation.MMAP)
_MUNMAP = U(Operation.MUNMAP)
_ZAP = U(Operation.ZAP)
_PROTECT = U(Operation.PROTECT)
_OP_POPULATE = U(Operation.POPULATE)
_READ_SMAPS = U(Operation.READ_SMAPS)
_FORK = U(Operation.FORK)
_EXIT = U(Operation.EXIT)
_PUNCH_HOLE = U(Operation.PUNCH_HOLE)
_ALLOCATE = U(Operation.ALLOCATE)
_CLOSE = U(Operation.CLOSE)
_REVOKE = U(Operation.REVOKE)
_RESTORE = U(Operation.RESTORE)
_GUARD_INSTALL = U(Operation.GUARD_INSTALL)
_GUARD_REMOVE = U(Operation.GUARD_REMOVE)


@kernel
def _rounded(state, op, unit):
    """A length rounded up to `unit` bytes; 0 where that wraps."""
    return (state[op + O_LENGTH] + unit - U1) & ~(unit - U1)


@kernel
def _protection(flags):
    """PROT_* of a record's flags."""
    prot = U0
    if flags & _READ != U0:
        prot |= PROT_READ
    if flags & _WRITE != U0:
        prot |= PROT_WRITE
    if flags & _EXEC != U0:
        prot |= PROT_EXEC
    return prot


# --------------------------------------------------------------------------- mmap


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
    state[row + A_PROT] = _protection(flags)
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
def _mmap(m, op):
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
    length = _rounded(state, op, unit)
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
        _remove_vmas(m, state[op + O_SPACE], state[op + O_ADDRESS], state[op + O_ADDRESS] + length)
        return stop(state, op, -ENOMEM)
    if kind == VMA_ANONYMOUS:
        merge(state, row)
    if state[op + O_FLAGS] & (_POPULATE | _LOCKED) != U0:
        mm_populate(m, state[op + O_SPACE], state[op + O_ADDRESS], state[op + O_ADDRESS] + length)
    return stop(state, op, 0)


# --------------------------------------------------------------------------- munmap


@outlined
def _remove_vmas(m, space, start, end):
    """Unmap every VMA of [start, end), which none crosses: entries, rows, tables that nobody needs; and flush."""
    state = m.state
    first = NONE
    last = U0
    address = start
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            break
        first = min(first, state[row + A_START])
        last = state[row + A_END]
        address = last
        zap_range(m, row, state[row + A_START], last, True)
        close_vma(m, row)
    if first != NONE:
        floor, ceiling = mapping_limits(state, space, first, last)
        free_tables(m, space, first, last, floor, ceiling)
    gather_flush(m)


@outlined
def _cut_ends(m, space, start, end):
    """Cut the VMAs that reach into [start, end) from outside: 0, -EINVAL, -ENOMEM. vms_gather_munmap_vmas()."""
    state = m.state
    row = next_vma(state, space, start, end)
    if row != NONE and state[row + A_START] < start:
        status, _ = cut(m, row, start)
        if status != 0:
            return status
    row = next_vma(state, space, end - U1, end)
    if row != NONE and state[row + A_END] > end:
        status, _upper = cut(m, row, end)
        if status != 0:
            return status
    return np.int64(0)


@kernel
def _drop_cut_leaves(m, space, start, end):
    """Large PFN entries across the ends of a range go whole, also the part outside: __split_huge_pmd_locked()."""
    state = m.state
    for address in (start, end):
        row = next_vma(state, space, address - U1, address + U1)
        if row != NONE and state[row + A_FLAGS] & VM_PFNMAP != U0 and address < state[row + A_END]:
            _slot, level = lookup(m, space_root(state, space), address)
            if level > U1 and address & (size_of(level) - U1) != U0:
                drop_large_pfn(m, row, address, U2)


@outlined
def _munmap(m, op):
    """munmap(): 0, -EINVAL for bad arguments or a cut through a HugeTLB page, -ENOMEM for one mapping too many."""
    state = m.state
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    length = _rounded(state, op, U(4096))
    if start & U4095 != U0 or length == U0 or start > TASK_SIZE or length > TASK_SIZE - start:
        return stop(state, op, -EINVAL)
    gather_begin(m)
    _drop_cut_leaves(m, space, start, start + length)
    status = _cut_ends(m, space, start, start + length)
    if status == 0:
        _remove_vmas(m, space, start, start + length)
    else:
        gather_flush(m)
    return stop(state, op, status)


# --------------------------------------------------------------------------- mprotect


@outlined
def _protect_vma(m, row, start, end, prot):
    """mprotect_fixup(): cut the VMA to [start, end), change rights and entries, merge. 0, -EINVAL, -ENOMEM."""
    state = m.state
    old = state[row + A_PROT]
    if old == prot:
        return np.int64(0)
    if state[row + A_START] < start:
        status, upper = cut(m, row, start)
        if status != 0:
            return status
        row = upper
    if state[row + A_END] > end:
        status, upper = cut(m, row, end)
        if status != 0:
            return status
    state[row + A_PROT] = prot
    state[row + A_READ_ONLY] = U1 if prot & PROT_WRITE == U0 else U0
    row = merge(state, row)
    change_protection(m, row, start, end)
    private = state[row + A_FLAGS] & (VM_SHARED | VM_LOCKED) == VM_LOCKED
    if private and prot & PROT_WRITE != U0 and old & PROT_WRITE == U0:
        mm_populate(m, state[row + A_SPACE], start, end)
    return np.int64(0)


@outlined
def _mprotect(m, op):
    """mprotect(): flags READ, WRITE, EXEC. 0, -EINVAL, or -ENOMEM at the first hole, what lies before it changed."""
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    length = _rounded(state, op, U(4096))
    end = address + length
    if address & U4095 != U0:
        return stop(state, op, -EINVAL)
    if state[op + O_LENGTH] == U0:
        return stop(state, op, 0)
    if end <= address:
        return stop(state, op, -ENOMEM)
    gather_begin(m)
    status = np.int64(0)
    while address < end and status == 0:
        row = next_vma(state, space, address, end)
        if row == NONE or state[row + A_START] > address:
            status = np.int64(-ENOMEM)
            break
        last = min(end, state[row + A_END])
        status = _protect_vma(m, row, address, last, _protection(state[op + O_FLAGS]))
        address = last
    gather_flush(m)
    return stop(state, op, status)


# --------------------------------------------------------------------------- madvise


@outlined
def _dontneed_vma(m, row, start, end, reclaim):
    """MADV_DONTNEED of [start, end) of one VMA: 0 or -EINVAL. mm/madvise.c:madvise_dontneed_single_vma()."""
    state = m.state
    kind = state[row + A_KIND]
    if kind == VMA_HUGETLB:
        size = U1 << (U12 + state[inode_row(state[row + A_INODE]) + I_ORDER])
        if start & (size - U1) != U0:
            return np.int64(-EINVAL)
        end &= ~(size - U1)
    elif state[row + A_FLAGS] & (VM_PFNMAP | VM_LOCKED) != U0:
        return np.int64(-EINVAL)
    if start < end:
        gather_begin(m)
        zap_range(m, row, start, end, False)
        if reclaim and kind != VMA_HUGETLB and state[R_DONTNEED_FREES_TABLES] != U0 and end - start >= size_of(U2):
            reclaim_level1_tables(m, space_root(state, state[row + A_SPACE]), start, end)
        gather_flush(m)
    return np.int64(0)


@outlined
def _zap(m, op):
    """With flag MADVISE madvise(MADV_DONTNEED), else the kernel's own unmapping, which may do it to anything.

    0, -EINVAL, or -ENOMEM if there was a hole, after all else was done.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    length = _rounded(state, op, U(4096))
    end = address + length
    if address & U4095 != U0 or (length == U0 and state[op + O_LENGTH] != U0) or end < address:
        return stop(state, op, -EINVAL)
    madvise = state[op + O_FLAGS] & _MADVISE != U0
    status = np.int64(0)
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            return stop(state, op, -ENOMEM)
        if state[row + A_START] > address:
            status = np.int64(-ENOMEM)
            address = state[row + A_START]
        last = min(end, state[row + A_END])
        if madvise:
            refused = _dontneed_vma(m, row, address, last, True)
            if refused != 0:
                return stop(state, op, refused)
        else:
            gather_begin(m)
            zap_range(m, row, address, last, False)
            gather_flush(m)
        address = last
    return stop(state, op, status)


@outlined
def _populate(m, op):
    """MADV_POPULATE_READ, with flag WRITE MADV_POPULATE_WRITE."""
    state = m.state
    start = state[op + O_ADDRESS]
    length = _rounded(state, op, U(4096))
    if start & U4095 != U0 or start + length < start:
        return stop(state, op, -EINVAL)
    write = U1 if state[op + O_FLAGS] & _WRITE != U0 else U0
    return madvise_populate(m, op, start, start + length, write)


@outlined
def _guard_vma(m, row, start, end, install):
    """MADV_GUARD_INSTALL or _REMOVE of [start, end) of one VMA: 0, -ENOMEM, or -EINVAL for all but anonymous memory.

    Install: pages go, markers stand in their place, with tables for them. Files may have guards since 6.15; that is
    not modelled. mm/madvise.c:madvise_guard_install(), madvise_guard_remove().
    """
    state = m.state
    space = state[row + A_SPACE]
    if state[R_GUARDS] == U0 or state[row + A_KIND] != VMA_ANONYMOUS:
        return np.int64(-EINVAL)
    if install and state[row + A_FLAGS] & VM_LOCKED != U0:
        return np.int64(-EINVAL)
    if install:
        prepare_anon_vma(state, row)
        gather_begin(m)
        zap_range(m, row, start, end, False)
        gather_flush(m)
    address = start
    while address < end:
        slot, level = lookup(m, space_root(state, space), address)
        if install:
            slot = need_slot(m, space, address, U1)
            if slot == NONE:
                return np.int64(-ENOMEM)
            m.ram[slot] = GUARD
        elif level == U1 and m.ram[slot] == GUARD:
            m.ram[slot] = U0
        address += U(4096)
    return np.int64(0)


@outlined
def _guard(m, op, install):
    """madvise(MADV_GUARD_INSTALL) or _REMOVE: 0, -EINVAL, -ENOMEM over a hole, after all else was done."""
    state = m.state
    address = state[op + O_ADDRESS]
    end = address + _rounded(state, op, U(4096))
    if address & U4095 != U0 or end < address:
        return stop(state, op, -EINVAL)
    status = np.int64(0)
    while address < end:
        row = next_vma(state, state[op + O_SPACE], address, end)
        if row == NONE:
            return stop(state, op, -ENOMEM)
        if state[row + A_START] > address:
            status = np.int64(-ENOMEM)
            address = state[row + A_START]
        last = min(end, state[row + A_END])
        refused = _guard_vma(m, row, address, last, install)
        if refused != 0:
            return stop(state, op, refused)
        address = last
    return stop(state, op, status)


@outlined
def _read_smaps(m, op):
    """Reading /proc/PID/smaps walks PMDs, which "splits" 1G entries of PFN mappings: they are dropped. As captured."""
    state = m.state
    space = state[op + O_SPACE]
    gather_begin(m)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] == U0 or state[row + A_SPACE] != space or state[row + A_FLAGS] & VM_PFNMAP == U0:
            continue
        address = state[row + A_START]
        while address < state[row + A_END]:
            drop_large_pfn(m, row, address, U3)
            _slot, level = lookup(m, space_root(state, space), address)
            step = size_of(max(level, U3))
            address = (address & ~(step - U1)) + step
    gather_flush(m)
    return stop(state, op, 0)


# --------------------------------------------------------------------------- files


@kernel
def _pages_of(state, node, op, inner):
    """Pages [first, last) of a byte range of a file in units of its pages, rounded inwards (`inner`) or outwards."""
    offset = state[op + O_OFFSET]
    end = offset + state[op + O_LENGTH]
    unit = U1 << (U12 + state[node + I_ORDER])
    if inner:
        first = (offset + unit - U1) & ~(unit - U1)
        last = end & ~(unit - U1)
    else:
        first = offset & ~(unit - U1)
        last = (end + unit - U1) & ~(unit - U1)
    return first >> U12, max(first, last) >> U12


@outlined
def _punch_hole(m, op):
    """fallocate(FALLOC_FL_PUNCH_HOLE): 0, -EBADF, -EINVAL, -EOPNOTSUPP for a device.

    Pages that lie whole in the range leave every process and the file. fs/hugetlbfs/inode.c:hugetlbfs_punch_hole(),
    virt/kvm/guest_memfd.c:kvm_gmem_punch_hole().
    """
    state = m.state
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_DEVICE:
        return stop(state, op, -EOPNOTSUPP)
    if kind == INODE_GUEST_MEMFD_4K and (state[op + O_OFFSET] | state[op + O_LENGTH]) & U4095 != U0:
        return stop(state, op, -EINVAL)
    first, last = _pages_of(state, node, op, True)
    last = min(last, state[node + I_PAGES])
    if first >= last:
        return stop(state, op, 0)
    unmap_file_range(m, inode, first, last)
    if kind == INODE_GUEST_MEMFD_4K:
        notify_inode(m, inode, first, last)
    order = state[node + I_ORDER]
    for index in range(first >> order, last >> order):
        word = cache_find(m, state[node + I_CACHE], index)
        if word & ~RESERVED != U0:
            drop_page(m, inode, index, word)
    return stop(state, op, 0)


@outlined
def _allocate(m, op):
    """fallocate(): pages of the range now, zeroed. 0, -EINVAL, -ENOSPC or -ENOMEM with what was done until then."""
    state = m.state
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_DEVICE:
        return stop(state, op, -EOPNOTSUPP)
    first, last = _pages_of(state, node, op, False)
    if kind == INODE_GUEST_MEMFD_4K:
        if (state[op + O_OFFSET] | state[op + O_LENGTH]) & U4095 != U0 or last > state[node + I_PAGES]:
            return stop(state, op, -EINVAL)
        for index in range(first, last):
            status, _ = find_or_add_folio(m, node, index)
            if status != 0:
                return stop(state, op, status)
        return stop(state, op, 0)
    order = state[node + I_ORDER]
    if last > state[node + I_PAGES]:
        return stop(state, op, -EINVAL)  # this file does not grow
    for index in range(first >> order, last >> order):
        word = cache_find(m, state[node + I_CACHE], index)
        if word & E_ADDRESS != U0:
            continue
        head = take_huge(m, order, word & RESERVED)
        if head == NONE:
            return stop(state, op, -ENOSPC)
        if cache_store(m, node + I_CACHE, index, head << U12 | RESERVED) != 0:
            discard_huge(m, head)
            return stop(state, op, -ENOMEM)
        add_to_file(m, head, inode, index, order)
    return stop(state, op, 0)


@outlined
def _close(m, op):
    """close() of the last descriptor: the file lives on while it is mapped. 0."""
    state = m.state
    inode = state[op + O_OBJECT]
    state[inode_row(inode) + I_OPEN] = U0
    release_inode(m, inode)
    return stop(state, op, 0)


@kernel
def _set_revoked(m, op, revoked):
    """A device's memory goes off, and its entries from every process, or comes back on. 0 or -EINVAL.

    drivers/vfio/pci/vfio_pci_core.c:vfio_pci_zap_and_down_write_memory_lock().
    """
    state = m.state
    node = inode_row(state[op + O_OBJECT])
    if state[node + I_KIND] != INODE_DEVICE:
        return stop(state, op, -EINVAL)
    if revoked:
        state[node + I_FLAGS] |= INODE_REVOKED
        unmap_file_range(m, state[op + O_OBJECT], U0, state[node + I_PAGES])
    else:
        state[node + I_FLAGS] &= ~INODE_REVOKED
    return stop(state, op, 0)


@outlined
def _operate_on_file(m, op, kind):
    """Operations on a file of an ordinary kind."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    if state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
        return stop(state, op, -EINVAL)
    if kind == _PUNCH_HOLE:
        return _punch_hole(m, op)
    if kind == _ALLOCATE:
        return _allocate(m, op)
    if kind == _CLOSE:
        return _close(m, op)
    return _set_revoked(m, op, kind == _REVOKE)


@outlined
def operate(m, op):
    """Run one operation of a process or on a file that is of neither design."""
    state = m.state
    kind = state[op + O_OP]
    space = state[op + O_SPACE]
    if kind == _PUNCH_HOLE or kind == _ALLOCATE or kind == _CLOSE or kind == _REVOKE or kind == _RESTORE:
        charge_one(m, SYSCALL)
        return _operate_on_file(m, op, kind)
    if space >= state[R_SPACES] or state[space_row(space) + S_ROOT] == U0:
        return stop(state, op, -EINVAL)
    if kind == _HOST_FAULT:
        return access(m, op)
    charge_one(m, SYSCALL)
    if kind == _MMAP:
        return _mmap(m, op)
    if kind == _MUNMAP:
        return _munmap(m, op)
    if kind == _ZAP:
        return _zap(m, op)
    if kind == _PROTECT:
        return _mprotect(m, op)
    if kind == _OP_POPULATE:
        return _populate(m, op)
    if kind == _READ_SMAPS:
        return _read_smaps(m, op)
    if kind == _GUARD_INSTALL or kind == _GUARD_REMOVE:
        return _guard(m, op, kind == _GUARD_INSTALL)
    if kind == _FORK:
        return fork(m, op)
    if kind == _EXIT:
        end_process(m, space)
        return stop(state, op, 0)
    return stop(state, op, np.int64(-EOPNOTSUPP))
