"""mmap() of anonymous memory and of every kind of file: mm/mmap.c:do_mmap(), mm/vma.c:mmap_region()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.properties import vma_is_pfnmap
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.process.close import reserve
from pgemu_kernels.process.fault import mm_populate
from pgemu_kernels.process.munmap import remove_vmas
from pgemu_kernels.process.pfn import remap_pfn_range
from pgemu_kernels.process.record import has_ended, protection, rounded
from pgemu_kernels.process.tables import gather_begin, space_row
from pgemu_kernels.process.vma import link_vma, new_vma, next_vma, vma_merge
from pgemu_kernels.stage2.userspace import give_places
from pgemu_kernels.words.enum_words import (
    FLAG_COUNTED,
    FLAG_LOCKED,
    FLAG_NORESERVE,
    FLAG_POPULATE,
    FLAG_PRIVATE,
    FLAG_READ_ONLY,
    FLAG_SHARED,
    FLAG_WRITE,
)
from pgemu_kernels.words.operations import EBADF, EEXIST, EINVAL, ENODEV, ENOMEM, EOPNOTSUPP, EOVERFLOW
from pgemu_kernels.words.registers import R_FULL, R_INODES, R_ORDER
from pgemu_kernels.words.rows import (
    A_CACHE_BITS,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_PGOFF,
    A_PROT,
    A_READ_ONLY,
    A_SPACE,
    A_START,
    I_CACHE_BITS,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    I_REFERENCES,
    INODE_GUEST_MEMFD,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    INODE_MMAP,
    INODE_REMAP,
    INODE_WHOLE_MAPPINGS,
    NO_INODE,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    PROT_READ,
    PROT_WRITE,
    S_ORDINARY,
    TASK_SIZE,
    VM_ACCOUNT,
    VM_COUNTED,
    VM_LOCKED,
    VM_NORESERVE,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_GUEST_MEMFD_4K,
    VMA_HUGETLB,
    VMA_PFN_FAULT,
    VMA_PFN_REMAP,
)

U = np.uint64
_MAX_LFS_FILESIZE = U((1 << 63) - 1)


@kernel
def _kind_of(state, inode):
    """VMA_* of a mapping of an inode, or of anonymous memory."""
    if inode == NO_INODE:
        return VMA_ANONYMOUS
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_GUEST_MEMFD:
        return VMA_GUEST_MEMFD
    if kind == INODE_HUGETLB:
        return VMA_HUGETLB
    if kind == INODE_GUEST_MEMFD_4K:
        return VMA_GUEST_MEMFD_4K
    return VMA_PFN_REMAP if state[node + I_FLAGS] & INODE_REMAP != U0 else VMA_PFN_FAULT


@kernel
def _check_guest_memfd(state, op, kind, length):
    """virt/kvm/guest_memfd.c:kvm_gmem_mmap(): -ENODEV without GUEST_MEMFD_FLAG_MMAP, -EINVAL for MAP_PRIVATE.

    RFC v2 with HugeTLB: -EINVAL for an address or length that is not aligned to huge pages.
    """
    flags = state[inode_row(state[op + O_OBJECT]) + I_FLAGS]
    if flags & INODE_MMAP == U0:
        return np.int64(-ENODEV)
    # A record that says neither asks for a shared mapping of the designs' inodes, for none of others.
    shared = (
        state[op + O_FLAGS] & FLAG_PRIVATE == U0 if kind == VMA_GUEST_MEMFD else state[op + O_FLAGS] & FLAG_SHARED != U0
    )
    if not shared:
        return np.int64(-EINVAL)
    inside = (U1 << (state[R_ORDER] + U12)) - U1
    if flags & INODE_WHOLE_MAPPINGS != U0 and (state[op + O_ADDRESS] | length) & inside != U0:
        return np.int64(-EINVAL)
    return np.int64(0)


@outlined
def _check_file(state, op, kind, length):
    """What the file's own mmap refuses: 0, -EINVAL, -ENODEV."""
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    offset = state[op + O_OFFSET]
    if kind == VMA_HUGETLB:
        inside = (U1 << (U12 + state[node + I_ORDER])) - U1
        return np.int64(-EINVAL if (state[op + O_ADDRESS] | offset) & inside != U0 else 0)
    if kind == VMA_GUEST_MEMFD or kind == VMA_GUEST_MEMFD_4K:
        return _check_guest_memfd(state, op, kind, length)
    if state[op + O_FLAGS] & FLAG_SHARED == U0 or (offset >> U12) + (length >> U12) > state[node + I_PAGES]:
        return np.int64(-EINVAL)
    return np.int64(0)


@kernel
def _too_far(kind, offset, length):
    """mm/mmap.c:file_mmap_ok(): whether a range of a file reaches past MAX_LFS_FILESIZE; a device has no such limit."""
    if kind == VMA_ANONYMOUS or kind == VMA_PFN_REMAP or kind == VMA_PFN_FAULT:
        return False
    return offset >> U12 > (_MAX_LFS_FILESIZE - length) >> U12


@outlined
def _check_mmap(state, op, kind, length):
    """What mmap refuses whatever is mapped: 0, -EINVAL, -ENOMEM, -EEXIST, -EOVERFLOW, in do_mmap()'s order."""
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    if state[op + O_LENGTH] == U0:
        return np.int64(-EINVAL)
    if state[op + O_FLAGS] & FLAG_SHARED != U0 and state[op + O_FLAGS] & FLAG_PRIVATE != U0:
        return np.int64(-EINVAL)
    if length == U0 or length > TASK_SIZE or start > TASK_SIZE - length:
        return np.int64(-ENOMEM)
    if start & U4095 != U0:
        return np.int64(-EINVAL)  # __get_unmapped_area(), after the other
    if kind == VMA_ANONYMOUS and state[op + O_FLAGS] & FLAG_SHARED != U0:
        return np.int64(-EOPNOTSUPP)  # shmem: not modelled
    if next_vma(state, space, start, start + length) != NONE:
        return np.int64(-EEXIST)
    return np.int64(-EOVERFLOW if _too_far(kind, state[op + O_OFFSET], length) else 0)


@kernel
def _is_accountable(kind, flags, bits):
    """mm/vma.c:accountable_mapping(): private and writable; HugeTLB pages have reservations of their own."""
    return kind != VMA_HUGETLB and flags & FLAG_WRITE != U0 and bits & (VM_SHARED | VM_NORESERVE) == U0


@kernel
def _flags_of(m, kind, flags):
    """VM_* that a record's flags and the kind of the mapping ask for."""
    bits = U0
    if flags & FLAG_SHARED != U0 or kind == VMA_GUEST_MEMFD:
        bits |= VM_SHARED
    if flags & FLAG_LOCKED != U0:
        bits |= VM_LOCKED
    if flags & FLAG_NORESERVE != U0 and kind != VMA_GUEST_MEMFD:
        bits |= VM_NORESERVE
    if kind == VMA_PFN_REMAP or kind == VMA_PFN_FAULT:
        bits |= VM_PFNMAP
    if kind == VMA_GUEST_MEMFD and vma_is_pfnmap(m):
        bits |= VM_PFNMAP if flags & FLAG_COUNTED == U0 else VM_COUNTED
    if _is_accountable(kind, flags, bits):
        bits |= VM_ACCOUNT
    return bits & ~VM_LOCKED if bits & VM_PFNMAP != U0 else bits  # __mmap_complete(): VM_SPECIAL is never locked


@kernel
def _fill_row(m, op, row, kind, length):
    """A VMA as the record asks for it, in a row that is empty."""
    state = m.state
    flags = state[op + O_FLAGS]
    designs = kind == VMA_GUEST_MEMFD
    start = state[op + O_ADDRESS]
    read_only = flags & FLAG_READ_ONLY != U0 if designs else flags & FLAG_WRITE == U0
    state[row + A_START] = start
    state[row + A_END] = start + length
    state[row + A_SPACE] = state[op + O_SPACE]
    state[row + A_INODE] = state[op + O_OBJECT]
    state[row + A_PGOFF] = (start if kind == VMA_ANONYMOUS else state[op + O_OFFSET]) >> U12
    state[row + A_KIND] = kind
    state[row + A_PROT] = protection(flags)
    if designs:
        state[row + A_PROT] = PROT_READ if read_only else PROT_READ | PROT_WRITE
    state[row + A_READ_ONLY] = U1 if read_only else U0
    state[row + A_FLAGS] = _flags_of(m, kind, flags)
    state[row + A_LIVE] = U1
    if kind != VMA_ANONYMOUS:
        link_vma(state, row)
    if designs:
        give_places(state, row)


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
def _complete_any(m, op, row):
    """The rest of mmap() of an ordinary kind: 0 or -ENOMEM."""
    state = m.state
    kind = state[row + A_KIND]
    space = state[row + A_SPACE]
    start = state[row + A_START]
    end = state[row + A_END]
    if kind != VMA_GUEST_MEMFD:
        state[space_row(space) + S_ORDINARY] = U1
        if kind != VMA_ANONYMOUS:
            state[inode_row(state[row + A_INODE]) + I_REFERENCES] += U1
        if _enter(m, row, kind) != 0:
            gather_begin(m)
            remove_vmas(m, space, start, end)
            return np.int64(-ENOMEM)
    if kind != VMA_GUEST_MEMFD:  # in Linux those merge, too; the fast loops keep each as it was mapped
        vma_merge(state, row)
    if state[op + O_FLAGS] & (FLAG_POPULATE | FLAG_LOCKED) != U0:
        mm_populate(m, space, start, end)
    return np.int64(0)


_rest_of_mmap = full_only(_complete_any, np.int64(0))  # a mapping of the designs is made with its row


@outlined
def mmap(m, op):
    """mmap(MAP_FIXED_NOREPLACE) of a file, or of anonymous memory (object NO_INODE, PRIVATE or SHARED said).

    flags: READ, WRITE, EXEC; PRIVATE or SHARED; POPULATE, LOCKED, NORESERVE. Of the designs' inodes READ_ONLY, PRIVATE,
    COUNTED, POPULATE, LOCKED. 0, -EBADF, -EINVAL, -ENODEV, -EEXIST, -ENOMEM, -EOVERFLOW,
    -EOPNOTSUPP; -EINVAL for a process that has ended.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    anonymous = inode == NO_INODE and state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED) != U0
    if has_ended(state, state[op + O_SPACE]) or state[op + O_OFFSET] & U4095 != U0:
        return stop(state, op, -EINVAL)
    if not anonymous and (inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0):
        return stop(state, op, -EBADF)
    kind = _kind_of(state, inode)
    unit = U(4096)
    if kind == VMA_HUGETLB:
        unit = U1 << (U12 + state[inode_row(inode) + I_ORDER])
    length = rounded(state, op, unit)
    status = _check_mmap(state, op, kind, length)
    if status == 0 and not anonymous:
        status = _check_file(state, op, kind, length)
    if status != 0:
        return stop(state, op, status)
    row = new_vma(state)
    if row == NONE:
        return stop(state, op, -ENOMEM)
    _fill_row(m, op, row, kind, length)
    if state[row + A_FLAGS] & VM_COUNTED != U0:
        state[R_FULL] = U1  # the fast loops know one kind of entry
    return stop(state, op, _rest_of_mmap(m, op, row))
