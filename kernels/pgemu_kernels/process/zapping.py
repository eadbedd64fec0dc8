"""Entries of a process cleared: munmap, MADV_DONTNEED, truncation. Other rights are rights.py's.

What the designs' mappings have is all that the fast loops compile; other kinds are for a machine in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U12, U511
from pgemu_kernels.engine.charge import change_value, charge, charge_each, charge_one
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import inode_row, space_root, vma_overlap
from pgemu_kernels.folios.anonymous_folios import (
    compound_head,
    defer_split,
    is_large_anonymous,
    put_large,
    remove_rmap_ptes,
)
from pgemu_kernels.folios.folio import FLAGS, PG_DIRTY, remove_mapping, struct_page
from pgemu_kernels.folios.hstate import hstate_of_order
from pgemu_kernels.folios.huge_pages import is_anonymous, level_of_order, unmap_huge
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_DIRTY, PTE_LARGE, PTE_PRESENT, PTE_SAVED_DIRTY, PTE_SPECIAL
from pgemu_kernels.process.anonymous import unmap_page
from pgemu_kernels.process.entries import holds_page, is_hwpoison, pte_pfn
from pgemu_kernels.process.guest_memfd_4k import set_folio_dirty
from pgemu_kernels.process.huge_memory import split_and_notify
from pgemu_kernels.process.huge_pmd import is_huge_anonymous, zap_huge_pmd
from pgemu_kernels.process.tables import (
    gather,
    gather_begin,
    gather_flush,
    level1_table,
    level3_slot,
    lookup_address,
    note_unflushed,
    space_row,
)
from pgemu_kernels.process.vma import first_vma, huge_order, notify, split_vma, unshare_table
from pgemu_kernels.stage2.regions import vms_with_leaves
from pgemu_kernels.stage2.userspace import goes_by_address
from pgemu_kernels.tables.walker import count_host_leaf
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_CLEARED,
    EVENT_NOTIFIER_CALL,
    EVENT_RMAP_CHANGED,
    GAUGE_HOST_LEAVES_4K,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_GUEST_FAULTS, R_NOTIFIER, R_THP_SPLIT_PMD, R_UNMAPPING
from pgemu_kernels.words.rows import (
    A_END,
    A_FLAGS,
    A_KIND,
    A_NEXT,
    A_RESERVED,
    A_SPACE,
    A_START,
    H_RESERVED,
    H_SURPLUS,
    I_ALL_END,
    I_ALL_FROM,
    I_CALLS,
    I_KIND,
    I_PAGES,
    I_TOLD,
    INODE_GUEST_MEMFD,
    S_RSS,
    VM_PFNMAP,
    VM_RESERVATION_OWNER,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64
KEEPS_GUARDS, UNMAP, TRUNCATES = U0, U1, U2  # why entries go


# --------------------------------------------------------------------------- clearing


@kernel
def _present(m, entry):
    return entry & PTE_PRESENT != U0


@kernel
def _holds(m, entry):
    return holds_page(entry)


@kernel
def _forget_folio(m, row, entry):
    """A piece of a split huge page has one mapping and one reference less; both are counted by whoever counts these.

    It is dirty if the entry was: zap_present_folio_ptes().
    """
    page = struct_page(m, (entry & PTE_ADDRESS) >> U12)
    if entry & (PTE_DIRTY | PTE_SAVED_DIRTY) != U0:
        m.ram[page + FLAGS] |= PG_DIRTY
    remove_mapping(m.ram, page)
    return np.int64(1)


@kernel
def defer_unmapped(m):
    """What zap_present_folio_ptes() does per batch of pages of a large folio: it waits to be split if some are left."""
    if m.state[R_UNMAPPING] != U0:
        defer_split(m, m.state[R_UNMAPPING] - U1)
        m.state[R_UNMAPPING] = U0


@outlined
def forget_large(m, space, frame):
    """A 4K entry of a page of a large folio is gone, one of a batch that ends with defer_unmapped()."""
    head = compound_head(m, frame)
    if m.state[R_UNMAPPING] != head + U1:
        defer_unmapped(m)
    m.state[space_row(space) + S_RSS] -= U1
    if remove_rmap_ptes(m, head, frame, U1, space):
        m.state[R_UNMAPPING] = head + U1
    if put_large(m, head, U1):
        m.state[R_UNMAPPING] = U0


@kernel
def _forget_page(m, row, entry):
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        return _forget_folio(m, row, pte_pfn(entry) << U12)
    if is_large_anonymous(m.state, pte_pfn(entry)):
        forget_large(m, m.state[row + A_SPACE], pte_pfn(entry))
        return np.int64(0)
    if entry & (PTE_DIRTY | PTE_SAVED_DIRTY) != U0:
        set_folio_dirty(m, pte_pfn(entry))
    unmap_page(m, m.state[row + A_SPACE], pte_pfn(entry))
    return np.int64(0)


@kernel
def _gather_page(m, row, page):
    if m.state[row + A_KIND] != VMA_GUEST_MEMFD:
        gather(m, page << U12, U1)


@kernel
def _owe(m, row, cleared):
    note_unflushed(m.state, m.state[row + A_SPACE], U(cleared))


@kernel
def _owe_designs(m, row, cleared):
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        _owe(m, row, cleared)


@outlined
def _clear_large(m, row, page, end):
    """The entry of 2M or 1G over `page`, if there is one, goes whole. If only a part of it lies in [page, end) VMs are
    told of all of it: huge_memory.c:__split_huge_pmd(), __split_huge_pud(). Then one of anonymous memory is split; that
    is what is returned: 4K entries are there to be cleared.
    """
    slot, level = lookup_address(m, space_root(m.state, m.state[row + A_SPACE]), page << U12)
    if m.ram[slot] == U0:
        return False
    size = size_of(level) >> U12
    first = page & ~(size - U1)
    part = first < page or first + size > end
    if is_huge_anonymous(m.state, row, m.ram[slot], level):
        if part:
            split_and_notify(m, row, slot, page << U12)
        else:
            zap_huge_pmd(m, row, slot, page << U12)
        return part
    if part:
        notify(m, row, first << U12, (first + size) << U12)
        _count_split(m.state, level)
    _drop_large(m, row, slot, page << U12, level)
    return False


@kernel
def _count_split(state, level):
    """THP_SPLIT_PMD counts every kind of 2M leaf."""
    if level == U2:
        state[R_THP_SPLIT_PMD] += U1


@kernel
def _drop_large(m, row, slot, address, level):
    m.ram[slot] = U0
    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, -1)
    charge_one(m, EVENT_LEAF_CLEARED)
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        note_unflushed(m.state, m.state[row + A_SPACE], U1)
    else:
        gather(m, address, level)


_holds_page = full_only(_holds, _present)  # entries of the designs are present or empty
_forget = full_only(_forget_page, _forget_folio)
_gather = full_only(_gather_page, None)  # it is counted how many of the designs' entries went, not where
_owe_flush = full_only(_owe_designs, _owe)
_large_cleared = full_only(_clear_large, False)  # the fast loops know none
_batch_ended = full_only(defer_unmapped, None)


@kernel
def _drops_marker(m, entry, guards):
    """Whether an entry that holds no page goes: zap_nonpresent_ptes()."""
    if is_hwpoison(m.state, entry):
        return guards != TRUNCATES
    return guards != KEEPS_GUARDS


_is_dropped = full_only(_drops_marker, False)  # the fast loops meet none


@kernel
def _zap_small(m, row, start, end, guards):
    """zap_pte_range() and above: entries of [start, end) of a VMA that is not HugeTLB; a large one goes whole.

    An ordinary entry gives back its page's mapcount and reference; a special one has neither: vm_normal_page().
    `guards`: UNMAP drops guard markers, too, MADV_DONTNEED (KEEPS_GUARDS) does not; a file that is cut (TRUNCATES)
    leaves the entries of poisoned pages: should_zap_cows().
    """
    ram = m.ram
    root = space_root(m.state, m.state[row + A_SPACE])
    page = start >> U12
    last = end >> U12
    cleared = np.int64(0)
    counted = np.int64(0)
    while page < last:
        table, pages = level1_table(m, root, page)
        stop = min(last, (page & ~(pages - U1)) + pages)
        if table == NONE:
            if not _large_cleared(m, row, page, last):
                page = stop
            continue
        for index in range(page & U511, (stop - U1 & U511) + U1):
            entry = ram[table + index]
            if _holds_page(m, entry):
                ram[table + index] = U0
                cleared += 1
                if entry & PTE_SPECIAL == U0:
                    counted += _forget(m, row, entry)
                _gather(m, row, (page & ~U511) | index)
            elif entry != U0 and _is_dropped(m, entry, guards):
                ram[table + index] = U0
        page = stop
    _batch_ended(m)
    if cleared != 0:
        count_host_leaf(m, -cleared)
        charge(m, EVENT_LEAF_CLEARED, cleared)
        if counted != 0:
            m.state[space_row(m.state[row + A_SPACE]) + S_RSS] -= U(counted)
            charge(m, EVENT_RMAP_CHANGED, counted)
        _owe_flush(m, row, cleared)


@kernel
def _is_reserved_again(m, row, h, head):
    """Whether the owner of a private page will have one reserved again when it goes: not where pages are surplus.

    __unmap_hugepage_range()
    """
    owned = m.state[row + A_FLAGS] & VM_RESERVATION_OWNER != U0 and is_anonymous(m, head)
    return owned and m.state[h + H_SURPLUS] == U0


def over_huge_pages(visit: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """A walk (m, row, start, end) over the entries of a HugeTLB VMA that hold a page; a shared table is let go of.

    other: (m, slot) for entries of poisoned pages.
    """

    @outlined
    def walk_huge_pages(m, row, start, end):
        level = level_of_order(huge_order(m.state, row))
        root = space_root(m.state, m.state[row + A_SPACE])
        address = start
        while address < end:
            slot, at = lookup_address(m, root, address)
            if at == level == U2 and unshare_table(m, level3_slot(m, root, address)):
                at = U3
                gather(m, address, U3)
            elif at == level and holds_page(m.ram[slot]):
                visit(m, row, slot, level)
                gather(m, address, level)
            elif at == level and is_hwpoison(m.state, m.ram[slot]):
                other(m, slot)
            size = size_of(max(at, level))
            address = (address & ~(size - U1)) + size

    return walk_huge_pages


@kernel
def _zap_huge_entry(m, row, slot, level):
    entry = m.ram[slot]
    m.ram[slot] = U0
    h = hstate_of_order(huge_order(m.state, row))
    again = _is_reserved_again(m, row, h, pte_pfn(entry))
    if unmap_huge(m, pte_pfn(entry), entry) != U0 and again:
        m.state[h + H_RESERVED] += U1
        m.state[row + A_RESERVED] += U1
    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, -1)
    charge_one(m, EVENT_LEAF_CLEARED)


@kernel
def _clear_poison(m, slot):
    m.ram[slot] = U0


_zap_huge = over_huge_pages(_zap_huge_entry, _clear_poison)  # __unmap_hugepage_range()


@kernel
def _zap_any(m, row, start, end, guards):
    if m.state[row + A_KIND] == VMA_HUGETLB:
        _zap_huge(m, row, start, end)
    else:
        _zap_small(m, row, start, end, guards)


_zap = full_only(_zap_any, _zap_small)


@kernel
def zap_vma(m, row, start, end, guards):
    """Clear the entries of [start, end) of a VMA after its process's VMs were told; gather_flush() is for the caller.

    mm/memory.c:zap_page_range_single()
    """
    notify(m, row, start, end)
    _zap(m, row, start, end, guards)


@kernel
def clear_vma(m, row, start, end, guards):
    """The same where the VMs have been told: mm/memory.c:unmap_single_vma()"""
    _zap(m, row, start, end, guards)


@kernel
def _only_tells(m, inode, first, last):
    """Whether that pages [first, last) leave every process changes nothing: all VMAs show them, no process has an
    entry at all, no VM of theirs a leaf, and no guest's fault is under way."""
    state = m.state
    leaves = (
        m.stats[STATS_GAUGES + GAUGE_HOST_LEAVES_4K * U2] | m.stats[STATS_GAUGES + (GAUGE_HOST_LEAVES_4K + U1) * U2]
    )
    leaves |= m.stats[STATS_GAUGES + (GAUGE_HOST_LEAVES_4K + U2) * U2]
    node = inode_row(inode)
    if leaves != 0 or state[R_GUEST_FAULTS] != U0 or state[node + I_KIND] != INODE_GUEST_MEMFD:
        return False
    if goes_by_address(state, inode):
        return False
    if first < state[node + I_ALL_FROM] or last > min(state[node + I_ALL_END], state[node + I_PAGES]):
        return False
    return vms_with_leaves(state, node, first, last) & state[node + I_TOLD] == U0


@step
def unmap_mapping_range(m, inode, first, last):
    """Pages [first, last) of a file leave every process, its VMAs one by one, each with a flush of its own.

    mm/memory.c:unmap_mapping_pages(), unmap_mapping_range_vma(); fs/hugetlbfs/inode.c:hugetlb_vmdelete_list(). Where
    nothing is mapped that is a notifier call for each VM of each VMA's mm, however many they are.
    """
    state = m.state
    if _only_tells(m, inode, first, last):
        if state[R_NOTIFIER] != U0:
            charge_each(m, EVENT_NOTIFIER_CALL, np.int64(state[inode_row(inode) + I_CALLS]))
        return
    row = first_vma(state, inode)
    while row != U0:
        start, end = vma_overlap(state, row, inode, first, last)
        if start < end:
            gather_begin(m)
            zap_vma(m, row, start, end, TRUNCATES)
            gather_flush(m, state[row + A_SPACE])
        row = state[row + A_NEXT]


@outlined
def drop_large_pfn(m, row, address, level):
    """Drop a large PFN entry over an address, if its level is at least `level`: how __split_huge_pud() "splits" it."""
    slot, at = lookup_address(m, space_root(m.state, m.state[row + A_SPACE]), address)
    if at >= level and m.ram[slot] & PTE_LARGE != U0 and holds_page(m.ram[slot]):
        notify(m, row, address & ~(size_of(at) - U1), (address | (size_of(at) - U1)) + U1)
        _count_split(m.state, at)
        _drop_large(m, row, slot, address, at)


@outlined
def _drop_cut_pfn(m, row, address):
    """A large PFN entry across an address goes whole, also the part outside: __split_huge_pmd_locked()."""
    if m.state[row + A_FLAGS] & VM_PFNMAP != U0:
        _slot, level = lookup_address(m, space_root(m.state, m.state[row + A_SPACE]), address)
        if level > U1 and address & (size_of(level) - U1) != U0:
            drop_large_pfn(m, row, address, U2)


_drop_cut = full_only(_drop_cut_pfn, None)  # the fast loops know no large entries of processes


@outlined
def cut_vma(m, row, address):
    """split_vma() of a mapping that may hold a large PFN entry across the address: mm/vma.c:__split_vma() with
    mm/huge_memory.c:vma_adjust_trans_huge(). The caller's gather_begin() and gather_flush() are around it."""
    status, upper = split_vma(m, row, address)
    if status == 0:
        _drop_cut(m, row, address)
    return status, upper


@outlined
def cut_range(m, row, start, end):
    """vma_modify(): [start, end) of a VMA becomes a VMA of its own, if it is none: 0 and its row, or -EINVAL, -ENOMEM
    and the row of what there is."""
    status = np.int64(0)
    gather_begin(m)
    if m.state[row + A_START] < start:
        status, upper = cut_vma(m, row, start)
        row = upper if status == 0 else row
    if status == 0 and m.state[row + A_END] > end:
        status, _upper = cut_vma(m, row, end)
    gather_flush(m, m.state[row + A_SPACE])
    return status, row
