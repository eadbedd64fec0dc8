"""mprotect(), madvise() and what reading smaps does: mm/mprotect.c, mm/madvise.c."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import inode_row, space_root, stop, vma_row
from pgemu_kernels.process.entries import GUARD
from pgemu_kernels.process.fault import madvise_populate, mm_populate
from pgemu_kernels.process.record import has_ended, protection, rounded
from pgemu_kernels.process.rights import change_protection
from pgemu_kernels.process.tables import gather_begin, gather_flush, lookup_address, need_slot, reclaim_level1_tables
from pgemu_kernels.process.vma import next_vma, prepare_anon_vma, vma_merge
from pgemu_kernels.process.zapping import KEEPS_GUARDS, cut_range, drop_large_pfn, zap_vma
from pgemu_kernels.words.enum_words import FLAG_LOCKED_TOO, FLAG_MADVISE, FLAG_WRITE, OP_GUARD_INSTALL
from pgemu_kernels.words.operations import EACCES, EINVAL, ENOMEM
from pgemu_kernels.words.registers import R_DONTNEED_FREES_TABLES, R_DONTNEED_PFNMAP, R_FULL, R_GUARDS, R_VMAS
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_PROT,
    A_READ_ONLY,
    A_SPACE,
    A_START,
    I_ORDER,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OP,
    O_SPACE,
    PROT_EXEC,
    PROT_WRITE,
    VM_ACCOUNT,
    VM_LOCKED,
    VM_NORESERVE,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64


@kernel
def _account(state, row, prot):
    """mprotect_fixup(): the flags of a VMA whose rights become `prot`.

    A private one counts from its first right to write on; one without an anon_vma only while it has that right.
    """
    flags = state[row + A_FLAGS]
    if prot & PROT_WRITE != U0:
        old = state[row + A_PROT] & PROT_WRITE
        uncounted = old == U0 and state[row + A_KIND] != VMA_HUGETLB and flags & (VM_SHARED | VM_NORESERVE) == U0
        return flags | VM_ACCOUNT if uncounted else flags
    untouched = state[row + A_KIND] == VMA_ANONYMOUS and state[row + A_ANON_VMA] == U0
    return flags & ~VM_ACCOUNT if untouched else flags


@outlined
def _protect_vma(m, row, start, end, prot):
    """mprotect_fixup(): cut the VMA to [start, end), change rights and entries, merge. 0, -EINVAL, -ENOMEM, -EACCES."""
    state = m.state
    old = state[row + A_PROT]
    if old == prot:
        return np.int64(0)
    if state[row + A_KIND] == VMA_GUEST_MEMFD:
        if prot & PROT_EXEC != U0:
            return np.int64(-EACCES)  # no VM_MAYEXEC: guest_memfd's mount is SB_I_NOEXEC
        state[R_FULL] = U1  # the fast loops know no entries without rights
    status, row = cut_range(m, row, start, end)
    if status != 0:
        return status
    state[row + A_FLAGS] = _account(state, row, prot)
    state[row + A_PROT] = prot
    state[row + A_READ_ONLY] = U1 if prot & PROT_WRITE == U0 else U0
    row = vma_merge(state, row)
    change_protection(m, row, start, end)
    private = state[row + A_FLAGS] & (VM_SHARED | VM_LOCKED) == VM_LOCKED
    if private and prot & PROT_WRITE != U0 and old & PROT_WRITE == U0:
        mm_populate(m, state[row + A_SPACE], start, end)
    return np.int64(0)


@outlined
def mprotect(m, op):
    """mprotect(): flags READ, WRITE, EXEC. 0, -EINVAL, or -ENOMEM at the first hole, what lies before it changed;
    -EACCES for EXEC of a mapping of the designs."""
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    length = rounded(state, op, U(4096))
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
        status = _protect_vma(m, row, address, last, protection(state[op + O_FLAGS]))
        address = last
    gather_flush(m, space)
    return stop(state, op, status)


# --------------------------------------------------------------------------- madvise


@kernel
def _dontneed_end(m, row, start, end, forbidden):
    """madvise_dontneed_free_valid_vma(): where MADV_DONTNEED of [start, end) of a VMA ends; NONE: it is refused.

    forbidden: VM_LOCKED, of MADV_DONTNEED_LOCKED nothing, and VM_PFNMAP.
    """
    if m.state[R_DONTNEED_PFNMAP] != U0:
        forbidden &= ~VM_PFNMAP
    return NONE if m.state[row + A_FLAGS] & forbidden != U0 else end


@outlined
def _dontneed_end_any(m, row, start, end, forbidden):
    if m.state[row + A_KIND] != VMA_HUGETLB:
        return _dontneed_end(m, row, start, end, forbidden)
    inside = (U1 << (U12 + m.state[inode_row(m.state[row + A_INODE]) + I_ORDER])) - U1
    return NONE if start & inside != U0 else end & ~inside


_valid_end = full_only(_dontneed_end_any, _dontneed_end)


@kernel
def _dontneed_vma(m, row, start, end, forbidden):
    """MADV_DONTNEED of [start, end) of one VMA: 0 or -EINVAL. mm/madvise.c:madvise_dontneed_single_vma().

    From 6.14 on it frees the last-level tables that it covers whole.
    """
    state = m.state
    end = _valid_end(m, row, start, end, forbidden)
    if end == NONE:
        return np.int64(-EINVAL)
    if start < end:
        gather_begin(m)
        zap_vma(m, row, start, end, KEEPS_GUARDS)
        if state[R_DONTNEED_FREES_TABLES] != U0 and end - start >= size_of(U2):
            if state[row + A_KIND] != VMA_HUGETLB:
                reclaim_level1_tables(m, state[row + A_SPACE], start, end)
        gather_flush(m, state[row + A_SPACE])
    return np.int64(0)


@kernel
def _zap_vma(m, op, row, start, end):
    """The same with flag MADVISE, else the kernel's own unmapping, which may do it to anything."""
    if m.state[op + O_FLAGS] & FLAG_MADVISE != U0:
        locked = m.state[op + O_FLAGS] & FLAG_LOCKED_TOO != U0
        return _dontneed_vma(m, row, start, end, VM_PFNMAP if locked else VM_PFNMAP | VM_LOCKED)
    gather_begin(m)
    zap_vma(m, row, start, end, KEEPS_GUARDS)
    gather_flush(m, m.state[row + A_SPACE])
    return np.int64(0)


def over_vmas(decorator: Callable[..., Any], visit: Callable[..., Any]) -> Callable[..., Any]:
    """An operation (m, op) that visits every VMA of a range, up to the first that refuses: 0, what it said, -EINVAL.

    -ENOMEM if there was a hole, after all else was done. Lengths are rounded up to pages:
    mm/madvise.c:is_madvise_valid(), madvise_walk_vmas().
    """

    @decorator
    def walk_vmas(m, op):
        state = m.state
        space = state[op + O_SPACE]
        address = state[op + O_ADDRESS]
        length = rounded(state, op, U(4096))
        end = address + length
        if has_ended(state, space) or address & U4095 != U0 or end < address:
            return stop(state, op, -EINVAL)
        if length == U0 and state[op + O_LENGTH] != U0:
            return stop(state, op, -EINVAL)
        status = np.int64(0)
        while address < end:
            row = next_vma(state, space, address, end)
            if row == NONE:
                return stop(state, op, -ENOMEM)
            if state[row + A_START] > address:
                status = np.int64(-ENOMEM)
                address = state[row + A_START]
            last = min(end, state[row + A_END])
            refused = visit(m, op, row, address, last)
            if refused != 0:
                return stop(state, op, refused)
            address = last
        return stop(state, op, status)

    return walk_vmas


zap_mappings = over_vmas(step, _zap_vma)


@outlined
def populate(m, op):
    """MADV_POPULATE_READ, with flag WRITE MADV_POPULATE_WRITE."""
    state = m.state
    start = state[op + O_ADDRESS]
    length = rounded(state, op, U(4096))
    if start & U4095 != U0 or start + length < start:
        return stop(state, op, -EINVAL)
    write = U1 if state[op + O_FLAGS] & FLAG_WRITE != U0 else U0
    return madvise_populate(m, op, start, start + length, write)


@outlined
def _guard_vma(m, op, row, start, end):
    """MADV_GUARD_INSTALL or _REMOVE of [start, end) of one VMA: 0, -ENOMEM, or -EINVAL for VM_PFNMAP and HugeTLB.

    Install: pages go, markers stand in their place, with tables for them; files may have them since 6.15.
    mm/madvise.c:madvise_guard_install(), madvise_guard_remove(), is_valid_guard_vma().
    """
    state = m.state
    space = state[row + A_SPACE]
    install = state[op + O_OP] == OP_GUARD_INSTALL
    if state[R_GUARDS] == U0 or state[row + A_KIND] == VMA_HUGETLB or state[row + A_FLAGS] & VM_PFNMAP != U0:
        return np.int64(-EINVAL)
    if install and state[row + A_FLAGS] & VM_LOCKED != U0:
        return np.int64(-EINVAL)
    if install:
        if state[row + A_KIND] == VMA_GUEST_MEMFD:
            state[R_FULL] = U1  # the fast loops know no markers
        prepare_anon_vma(state, row)
        gather_begin(m)
        zap_vma(m, row, start, end, KEEPS_GUARDS)
        gather_flush(m, space)
    address = start
    while address < end:
        slot, level = lookup_address(m, space_root(state, space), address)
        if install:
            slot = need_slot(m, space, address, U1)
            if slot == NONE:
                return np.int64(-ENOMEM)
            m.ram[slot] = GUARD
        elif level == U1 and m.ram[slot] == GUARD:
            m.ram[slot] = U0
        address += U(4096)
    return np.int64(0)


guard = over_vmas(outlined, _guard_vma)


@outlined
def read_smaps(m, op):
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
            _slot, level = lookup_address(m, space_root(state, space), address)
            step = size_of(max(level, U3))
            address = (address & ~(step - U1)) + step
    gather_flush(m, space)
    return stop(state, op, 0)
