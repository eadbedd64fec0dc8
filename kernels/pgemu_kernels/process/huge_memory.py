"""Transparent huge pages of anonymous memory: first access, the huge zero page, copy on write, fork, other rights.

mm/huge_memory.c. Where a huge page cannot be had or its rules do not allow one the fault goes on with 4K.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12, U512
from pgemu_kernels.engine.charge import change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.anonymous_folios import (
    add_rmap_pmd,
    huge_zero_page,
    is_page_exclusive,
    put_large,
    set_anon_vma,
    set_page_exclusive,
    take_large_anonymous,
)
from pgemu_kernels.folios.folio import add_references, reference_count, struct_page
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_ADDRESS, PTE_DIRTY, PTE_LARGE, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.anonymous import UNSHARE, anonymous_fault, zero_page
from pgemu_kernels.process.entries import (
    is_protnone,
    leaf_pfn,
    make_writable,
    modify,
    points_to_table,
    protect_from_writes,
    pte_mkdirty,
    vm_page_prot,
)
from pgemu_kernels.process.huge_pmd import deposit_new_table, is_huge_zero, split_huge_pmd
from pgemu_kernels.process.tables import need_slot, space_row
from pgemu_kernels.process.vma import page_offset, prepare_anon_vma
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_WRITTEN,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_HOST_LEAVES_2M,
)
from pgemu_kernels.words.operations import ENOMEM, PAGE_2M, VM_FAULT_NOPAGE, VM_FAULT_OOM
from pgemu_kernels.words.registers import (
    R_HUGE_ANONYMOUS,
    R_HUGE_ZERO_REPLACED,
    R_SPECIAL_HUGE_ZERO,
    R_THP,
    R_THP_FAULT_ALLOC,
    R_THP_FAULT_FALLBACK,
    R_THP_LOSES_DIRTY,
    THP_ALWAYS,
    THP_MADVISE,
)
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_PROT,
    A_SPACE,
    A_START,
    PROT_WRITE,
    S_RSS,
    VM_HUGEPAGE,
    VM_NOHUGEPAGE,
)

U = np.uint64
_SIZE = U(PAGE_2M)
_INSIDE = _SIZE - U1
_FALLBACK = np.int64(0)  # VM_FAULT_FALLBACK; 0 stands for nothing else here
_DONE = np.int64(VM_FAULT_NOPAGE)


@kernel
def fits_huge(state, row, address):
    """thp_vma_suitable_order(): whether the 2M around an address lie in its VMA."""
    first = address & ~_INSIDE
    return first >= state[row + A_START] and first + _SIZE <= state[row + A_END]


@kernel
def _is_allowed(state, row):
    """thp_vma_allowable_order() of a fault: what /sys/kernel/mm/transparent_hugepage/enabled and madvise() say."""
    flags = state[row + A_FLAGS]
    if flags & VM_NOHUGEPAGE != U0:
        return False
    return state[R_THP] == THP_ALWAYS or (state[R_THP] == THP_MADVISE and flags & VM_HUGEPAGE != U0)


# --------------------------------------------------------------------------- first access


@outlined
def make_huge_leaf(m, row, slot, head):
    """map_anon_folio_pmd(): a 2M leaf for a new folio where nothing is, which may be written if the VMA may."""
    state = m.state
    bits = vm_page_prot(state, row)
    inverted = PTE_ADDRESS & ~_INSIDE if is_protnone(bits) else U0
    entry = pte_mkdirty(head << U12 ^ inverted | bits | PTE_LARGE)
    if state[row + A_PROT] & PROT_WRITE != U0:
        entry = make_writable(entry)
    m.ram[slot] = entry
    set_page_exclusive(m, head, True)
    add_rmap_pmd(m, head, state[row + A_SPACE])
    state[space_row(state[row + A_SPACE]) + S_RSS] += U512
    charge_one(m, EVENT_LEAF_WRITTEN)


@kernel
def _take(m, row, address):
    """vma_alloc_anon_folio_pmd(): the head, or NONE, which is counted."""
    state = m.state
    head = take_large_anonymous(m, state[row + A_ANON_VMA], page_offset(state, row, address & ~_INSIDE))
    if head == NONE:
        state[R_THP_FAULT_FALLBACK] += U1
    return head


@kernel
def _fill(m, row, address, slot):
    """__do_huge_pmd_anonymous_page()"""
    head = _take(m, row, address)
    if head == NONE:
        return _FALLBACK
    if not deposit_new_table(m, m.state[row + A_SPACE]):
        put_large(m, head, U1)
        return np.int64(VM_FAULT_OOM)
    make_huge_leaf(m, row, slot, head)
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, 1)
    m.state[R_THP_FAULT_ALLOC] += U1
    return _DONE


@kernel
def _map_zero(m, row, slot):
    """set_huge_zero_folio(). Special from 6.18 on, as captured."""
    state = m.state
    head = huge_zero_page(m)
    if head == NONE or zero_page(m) == NONE:  # the small one is what a split takes
        state[R_THP_FAULT_FALLBACK] += U1
        return _FALLBACK
    if not deposit_new_table(m, state[row + A_SPACE]):
        return np.int64(VM_FAULT_OOM)
    special = PTE_SPECIAL if state[R_SPECIAL_HUGE_ZERO] != U0 else U0
    m.ram[slot] = head << U12 | vm_page_prot(state, row) | PTE_LARGE | special
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, 1)
    charge_one(m, EVENT_LEAF_WRITTEN)
    return _DONE


# --------------------------------------------------------------------------- copy on write


@outlined
def split_and_notify(m, row, slot, address):
    """__split_huge_pmd(): VMs lose what lies over the 2M, then the leaf is split."""
    first = address & ~_INSIDE
    notify_range(m, m.state[row + A_SPACE], first, first + _SIZE)
    split_huge_pmd(m, row, slot)


@kernel
def _replace_zero(m, row, address, slot):
    """do_huge_zero_wp_pmd(), since 6.13: a huge page for the huge zero page, whose table stays deposited."""
    prepare_anon_vma(m.state, row)
    head = _take(m, row, address)
    if head == NONE:
        return _FALLBACK
    first = address & ~_INSIDE
    notify_range(m, m.state[row + A_SPACE], first, first + _SIZE)
    make_huge_leaf(m, row, slot, head)
    m.state[R_THP_FAULT_ALLOC] += U1
    charge_one(m, EVENT_TLB_FLUSH_MM)
    charge_one(m, EVENT_TLB_FLUSH_PAGE)
    return _DONE


@kernel
def _can_reuse(m, row, head):
    """Whether a huge page is this mapping's alone, or becomes so because there is no other reference."""
    if is_page_exclusive(m, head):
        return True
    if reference_count(m.ram, struct_page(m, head)) != U1:
        return False
    set_anon_vma(m, head, m.state[row + A_ANON_VMA])
    set_page_exclusive(m, head, True)
    return True


@kernel
def _write_protected(m, row, address, slot, unshare):
    """do_huge_pmd_wp_page(): made writable where the huge page is this mapping's alone, else split; pages of it are
    copied one by one."""
    entry = m.ram[slot]
    if is_huge_zero(m.state, entry):
        if m.state[R_HUGE_ZERO_REPLACED] != U0:
            status = _replace_zero(m, row, address, slot)
            if status != _FALLBACK:
                return status
    elif _can_reuse(m, row, leaf_pfn(entry, U2)):
        if unshare:
            return _DONE
        m.ram[slot] = make_writable(pte_mkdirty(entry | PTE_ACCESSED))
        charge_one(m, EVENT_LEAF_WRITTEN)
        return _DONE
    split_and_notify(m, row, slot, address)
    return _FALLBACK


@outlined
def _huge_fault(m, row, address, write):
    """The part of __handle_mm_fault() that is about 2M: VM_FAULT_NOPAGE, VM_FAULT_OOM, or 0 where 4K follow."""
    slot = need_slot(m, m.state[row + A_SPACE], address, U2)
    if slot == NONE:
        return np.int64(VM_FAULT_OOM)
    entry = m.ram[slot]
    if points_to_table(entry):
        return _FALLBACK
    if entry != U0:
        if write != U0 and entry & PTE_WRITE == U0:
            return _write_protected(m, row, address, slot, write == UNSHARE)
        return _DONE
    if not _is_allowed(m.state, row) or not fits_huge(m.state, row, address):
        return _FALLBACK
    prepare_anon_vma(m.state, row)
    if write != U1:
        return _map_zero(m, row, slot)
    return _fill(m, row, address, slot)


@outlined
def private_fault(m, row, address, write):
    """__handle_mm_fault() of a private anonymous VMA: as anonymous_fault(), by a huge page where one may be had."""
    if m.state[R_HUGE_ANONYMOUS] != U0:
        status = _huge_fault(m, row, address, write)
        if status != _FALLBACK:
            return status
    return np.int64(anonymous_fault(m, row, address, write))


# --------------------------------------------------------------------------- fork, mprotect


@outlined
def copy_huge_pmd(m, row, child, slot, target):
    """copy_huge_pmd(): the child maps the huge page too, and both lose write access. 0 or -ENOMEM.

    `row`, `child`: the VMAs; the slots are those of parent and child. One that must be copied is split before.
    """
    state = m.state
    entry = m.ram[slot]
    space = state[child + A_SPACE]
    if not deposit_new_table(m, space):
        return np.int64(-ENOMEM)
    if not is_huge_zero(state, entry):
        head = leaf_pfn(entry, U2)
        add_references(m.ram, struct_page(m, head), U1)
        set_page_exclusive(m, head, False)
        add_rmap_pmd(m, head, space)
        state[space_row(space) + S_RSS] += U512
    if entry & PTE_WRITE != U0 and entry & U1 != U0:
        entry = protect_from_writes(entry)
        m.ram[slot] = entry
        charge_one(m, EVENT_LEAF_WRITTEN)
    m.ram[target] = entry & ~PTE_ACCESSED
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, 1)
    charge_one(m, EVENT_LEAF_WRITTEN)
    return np.int64(0)


@outlined
def change_huge_pmd(m, row, slot):
    """change_huge_pmd(): the VMA's rights for a 2M leaf that lies whole in what is changed."""
    state = m.state
    entry = m.ram[slot]
    if state[R_THP_LOSES_DIRTY] != U0:
        entry &= ~PTE_DIRTY
    value = modify(entry, vm_page_prot(state, row), PTE_LARGE, PTE_ADDRESS & ~_INSIDE)
    if state[row + A_PROT] & PROT_WRITE != U0 and not is_huge_zero(state, value):
        if is_page_exclusive(m, leaf_pfn(value, U2)):
            value = make_writable(value)
    m.ram[slot] = value
    charge_one(m, EVENT_LEAF_WRITTEN)
