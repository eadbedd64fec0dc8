"""Flags of mappings that a process sets: mlock(), MADV_DONTFORK, MADV_HUGEPAGE, and their opposites.

mm/mlock.c, mm/madvise.c, mm/khugepaged.c
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import stop
from pgemu_kernels.process.fault import mm_populate
from pgemu_kernels.process.madvise import over_vmas
from pgemu_kernels.process.record import has_ended
from pgemu_kernels.process.vma import next_vma, vma_merge
from pgemu_kernels.process.zapping import cut_range
from pgemu_kernels.words.enum_words import FLAG_LOCKED, FLAG_POPULATE, FLAG_WRITE, OP_DONTFORK
from pgemu_kernels.words.operations import EAGAIN, EINVAL, ENOMEM, VM_FAULT_OOM
from pgemu_kernels.words.rows import (
    A_END,
    A_FLAGS,
    A_KIND,
    A_START,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OP,
    O_SPACE,
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VMA_HUGETLB,
)

U = np.uint64


@outlined
def set_flags(m, row, start, end, flags):
    """vma_modify_flags(): [start, end) of a VMA gets other flags, cut out of it if need be. 0, -EINVAL, -ENOMEM."""
    state = m.state
    if state[row + A_FLAGS] == flags:
        return np.int64(0)
    status, row = cut_range(m, row, start, end)
    if status != 0:
        return status
    state[row + A_FLAGS] = flags
    vma_merge(state, row)
    return np.int64(0)


@kernel
def _is_never_locked(state, row):
    """mlock_fixup(): VM_SPECIAL and HugeTLB mappings are left as they are, and that is success."""
    return state[row + A_FLAGS] & VM_PFNMAP != U0 or state[row + A_KIND] == VMA_HUGETLB


@outlined
def mlock(m, op):
    """mlock() with flags LOCKED and POPULATE, mlock2(MLOCK_ONFAULT) with LOCKED, munlock() with neither.

    0; -ENOMEM at the first hole, what lies before it done, or where a page cannot be faulted in; -EAGAIN without
    memory; -EINVAL. mm/mlock.c:do_mlock(), __mlock_posix_error_return()
    """
    state = m.state
    space = state[op + O_SPACE]
    first = state[op + O_ADDRESS] & ~U4095
    end = (state[op + O_ADDRESS] + state[op + O_LENGTH] + U4095) & ~U4095
    if has_ended(state, space) or end < first:
        return stop(state, op, -EINVAL)
    locked = state[op + O_FLAGS] & FLAG_LOCKED != U0
    address = first
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE or state[row + A_START] > address:
            return stop(state, op, -ENOMEM)
        last = min(end, state[row + A_END])
        if not _is_never_locked(state, row):
            flags = state[row + A_FLAGS]
            status = set_flags(m, row, address, last, flags | VM_LOCKED if locked else flags & ~VM_LOCKED)
            if status != 0:
                return stop(state, op, status)
        address = last
    if locked and state[op + O_FLAGS] & FLAG_POPULATE != U0:
        status = mm_populate(m, space, first, end)
        if status != 0:
            return stop(state, op, -EAGAIN if status == VM_FAULT_OOM else -ENOMEM)
    return stop(state, op, 0)


@outlined
def _advise_fork(m, op, row, start, end):
    """MADV_DONTFORK, or MADV_DOFORK, which VM_SPECIAL mappings refuse (-EINVAL)."""
    flags = m.state[row + A_FLAGS]
    if m.state[op + O_OP] == OP_DONTFORK:
        return np.int64(set_flags(m, row, start, end, flags | VM_DONTCOPY))
    if flags & VM_PFNMAP != U0:
        return np.int64(-EINVAL)
    return np.int64(set_flags(m, row, start, end, flags & ~VM_DONTCOPY))


advise_fork = over_vmas(outlined, _advise_fork)


@outlined
def _advise_huge(m, op, row, start, end):
    """MADV_HUGEPAGE with flag WRITE, else MADV_NOHUGEPAGE; of any mapping: mm/khugepaged.c:hugepage_madvise()."""
    flags = m.state[row + A_FLAGS] & ~(VM_HUGEPAGE | VM_NOHUGEPAGE)
    wanted = m.state[op + O_FLAGS] & FLAG_WRITE != U0
    return np.int64(set_flags(m, row, start, end, flags | (VM_HUGEPAGE if wanted else VM_NOHUGEPAGE)))


advise_huge = over_vmas(outlined, _advise_huge)
