"""Dirty logging of memory slots over a process's memory.

arch/x86/kvm/x86.c:kvm_mmu_slot_apply_flags(), virt/kvm/kvm_main.c:kvm_get_dirty_log_protect().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U6, U12, U64, population
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.engine.memslots import find_slot_id
from pgemu_kernels.engine.rows import space_root, vm_row
from pgemu_kernels.folios.page_cache import cache_find, cache_free, cache_next, cache_store
from pgemu_kernels.kvm.attributes import is_private
from pgemu_kernels.kvm.fault import from_guest_memfd, max_level
from pgemu_kernels.stage2.entries import is_table
from pgemu_kernels.stage2.tdp_mmu import collapse, split_range, write_protect_page, write_protect_range
from pgemu_kernels.tables.walker import find_leaf, host_format, stage2_format, table_of
from pgemu_kernels.words.enum_words import EVENT_TLB_FLUSH_VM
from pgemu_kernels.words.operations import EINVAL, ENOENT
from pgemu_kernels.words.registers import R_RECOVER_HUGE
from pgemu_kernels.words.rows import (
    M_BASE_GFN,
    M_DIRTY,
    M_FLAGS,
    M_HVA,
    M_PAGES,
    M_VM,
    O_DETAIL,
    O_OBJECT,
    O_VM,
    SLOT_IDS,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_READ_ONLY,
    V_ROOT,
    V_SPACE,
)

U = np.uint64


@kernel
def table_over(m, f, root, gfn, most):
    """The highest table over a guest frame that a leaf of up to level `most` could replace: its slot, and its level.

    Else NONE and the level at which the walk ended. tdp_mmu.c:recover_huge_pages_range()
    """
    state = m.state
    level = U4
    spte = (root >> U3) + index_at(gfn, level)
    entry = m.ram[spte]
    while level > U2 and is_table(state, f, entry, level):
        level -= U1
        spte = table_of(state, f, entry) + index_at(gfn, level)
        entry = m.ram[spte]
        if level <= most and gfn & (pages_of(level) - U1) == U0 and is_table(state, f, entry, level):
            return spte, level
    return NONE, min(level, U3)


def recover_huge_pages(level_allowed: Callable[..., Any], replace: Callable[..., Any]) -> Callable[..., Any]:
    """What follows (m, slot) when dirty logging is off: `replace` tables by leaves up to the level allowed there.

    replace: (m, f, slot, gfn, spte, level), 1 if the table went, else 0. Leaves in place of tables are flushed once, at
    the end; Linux flushes before, too, whenever it lets others run. mmu.c:kvm_mmu_recover_huge_pages() (6.12:
    kvm_mmu_zap_collapsible_sptes()), tdp_mmu.c:recover_huge_pages_range(), tdp_mmu_iter_cond_resched().
    """

    @outlined
    def recover(m, slot):
        state = m.state
        f = stage2_format(m)
        root = state[vm_row(state[slot + M_VM]) + V_ROOT]
        gfn = state[slot + M_BASE_GFN]
        end = gfn + state[slot + M_PAGES]
        went = np.int64(0)
        while gfn < end:
            spte, level = table_over(m, f, root, gfn, U3)
            if spte != NONE:
                spte, level = table_over(m, f, root, gfn, level_allowed(m, slot, gfn))
            if spte != NONE:
                went += replace(m, f, slot, gfn, spte, level)
            step = pages_of(max(level, U2))
            gfn = (gfn & ~(step - U1)) + step
        if went != 0 and state[R_RECOVER_HUGE] != U0:
            charge_one(m, EVENT_TLB_FLUSH_VM)

    return recover


@kernel
def recoverable_level(m, slot, gfn):
    """mmu.c:kvm_mmu_max_mapping_level() for a page that is mapped: the host's leaf as it stands."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    if from_guest_memfd(state, slot, is_private(m, row, gfn)):
        return U1
    address = state[slot + M_HVA] + ((gfn - state[slot + M_BASE_GFN]) << U12)
    host, level = host_leaf(m, state[row + V_SPACE], address >> U12)
    return max_level(m, row, slot, gfn, level) if host != NONE else U1


@kernel
def host_leaf(m, space, page):
    """A process's leaf of a page: its slot or NONE, and its level."""
    return find_leaf(m, host_format(m), space_root(m.state, space), page)


@kernel
def recover_table(m, f, slot, gfn, spte, level):
    return collapse(m, f, spte, level)


recover_user_slot = recover_huge_pages(recoverable_level, recover_table)  # nothing is faulted in


@outlined
def apply_flags(m, slot, flags):
    """x86.c:kvm_mmu_slot_apply_flags(): only dirty logging can change, and a read-only slot cannot get dirty."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    root = state[row + V_ROOT]
    gfn = state[slot + M_BASE_GFN]
    end = gfn + state[slot + M_PAGES]
    state[slot + M_FLAGS] = flags
    if flags & SLOT_LOG_DIRTY_PAGES == U0:
        cache_free(m, slot + M_DIRTY)
    if flags & SLOT_READ_ONLY != U0:
        return
    if flags & SLOT_LOG_DIRTY_PAGES != U0:
        split_range(m, root, gfn, end)  # without memory the rest stays large, and write-protected
        write_protect_range(m, root, gfn, end)
        charge_one(m, EVENT_TLB_FLUSH_VM)  # whether anything changed or not
    else:
        recover_user_slot(m, slot)


@outlined
def get_dirty_log(m, op):
    """KVM_GET_DIRTY_LOG: 0, -EINVAL or -ENOENT; detail is how many pages were dirty.

    The bitmap is cleared, and the pages are write-protected again, with one flush.
    kvm_main.c:kvm_get_dirty_log_protect().
    """
    state = m.state
    if state[op + O_OBJECT] >= U(SLOT_IDS):
        return np.int64(-EINVAL)
    slot = find_slot_id(state, state[op + O_VM], state[op + O_OBJECT])
    if slot == NONE or state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES == U0:
        return np.int64(-ENOENT)
    f = stage2_format(m)
    root = state[vm_row(state[op + O_VM]) + V_ROOT]
    index = cache_next(m, state[slot + M_DIRTY], U0)
    while index != NONE:
        word = cache_find(m, state[slot + M_DIRTY], index)
        state[op + O_DETAIL] += population(word)
        for bit in range(U64):
            if word >> bit & U1 != U0:
                write_protect_page(m, f, root, state[slot + M_BASE_GFN] + (index << U6) + bit)
        cache_store(m, slot + M_DIRTY, index, U0)
        index = cache_next(m, state[slot + M_DIRTY], index + U1)
    if state[op + O_DETAIL] != U0:
        charge_one(m, EVENT_TLB_FLUSH_VM)
    return np.int64(0)
