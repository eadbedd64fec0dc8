"""Entries of a process cleared or given other rights: munmap, MADV_DONTNEED, mprotect, truncation."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U3, U30
from pgemu_kernels.engine.charge import HOST_LEAVES, LEAF_CLEARED, LEAF_WRITTEN, change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import space_root, vma_overlap, vma_row
from pgemu_kernels.folios.huge_pages import is_anonymous, level_of_order, may_reserve, reserved_word, unmap_huge
from pgemu_kernels.process.anonymous import unmap_page
from pgemu_kernels.process.entries import (
    E_ADDRESS,
    E_LARGE,
    E_SPECIAL,
    frame_of,
    holds_page,
    make_writable,
    modify,
    protection,
)
from pgemu_kernels.process.gmem_entries import flush_mm, unmap_vma_range
from pgemu_kernels.process.tables import gather, gather_begin, gather_flush, lookup, size_of, space_row
from pgemu_kernels.process.vma import huge_order, unshare_table
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.words.operations import PFNMAP
from pgemu_kernels.words.registers import R_DESIGN, R_GATHER_TABLES, R_VMAS
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_KIND,
    A_PROT,
    A_RESERVED,
    A_SPACE,
    PAGE_EXCLUSIVE,
    PROT_WRITE,
    S_UNFLUSHED,
    VM_RESERVATION_OWNER,
    VM_SHARED,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64


# --------------------------------------------------------------------------- clearing


@kernel
def _clear_slot(m, space, slot, entry):
    """Clear a 4K entry that holds a page: 1."""
    m.ram[slot] = U0
    if entry & E_SPECIAL == U0:
        unmap_page(m, space, frame_of(entry))
    return np.int64(1)


@outlined
def _zap_small(m, row, start, end, guards):
    """zap_pte_range() and above: entries of [start, end) of a VMA that is not HugeTLB; a large one goes whole.

    `guards`: drop guard markers too (munmap does, MADV_DONTNEED does not).
    """
    space = m.state[row + A_SPACE]
    root = space_root(m.state, space)
    cleared = np.int64(0)
    address = start
    while address < end:
        slot, level = lookup(m, root, address)
        if level > U1:
            if m.ram[slot] != U0:
                m.ram[slot] = U0
                change_value(m.stats, HOST_LEAVES + level - U1, -1)
                charge_one(m, LEAF_CLEARED)
                gather(m, address, level)
            address = (address & ~(size_of(level) - U1)) + size_of(level)
            continue
        stop = min(end, (address & ~(size_of(U2) - U1)) + size_of(U2))
        while address < stop:
            entry = m.ram[slot]
            if entry != U0:
                if holds_page(entry):
                    cleared += _clear_slot(m, space, slot, entry)
                    gather(m, address, U1)
                elif guards:
                    m.ram[slot] = U0
            slot += U1
            address += U(4096)
    change_value(m.stats, HOST_LEAVES, -cleared)
    charge(m, LEAF_CLEARED, cleared)
    return cleared


@kernel
def _restore_reservation(m, row, order):
    """A private page went back to the pool: its owner has one reserved again. __unmap_hugepage_range()."""
    state = m.state
    if state[row + A_FLAGS] & VM_RESERVATION_OWNER != U0 and may_reserve(state, order, U1):
        state[reserved_word(order)] += U1
        state[row + A_RESERVED] += U1


@outlined
def _zap_huge(m, row, start, end):
    """__unmap_hugepage_range(): entries of [start, end) of a HugeTLB VMA; a shared table is let go of instead."""
    state = m.state
    order = huge_order(state, row)
    level = level_of_order(order)
    root = space_root(state, state[row + A_SPACE])
    address = start
    while address < end:
        slot, at = lookup(m, root, address)
        size = size_of(max(at, level))
        if at == level:
            above = _slot_above(m, root, address)
            if level == U2 and unshare_table(m, above):
                gather(m, address, U3)
                address = ((address >> U30) + U1) << U30
                continue
            entry = m.ram[slot]
            if entry != U0:
                m.ram[slot] = U0
                private = is_anonymous(m, frame_of(entry))
                if unmap_huge(m, frame_of(entry), entry) != U0 and private:
                    _restore_reservation(m, row, order)
                change_value(m.stats, HOST_LEAVES + level - U1, -1)
                charge_one(m, LEAF_CLEARED)
                gather(m, address, level)
        address = (address & ~(size - U1)) + size


@kernel
def _slot_above(m, root, address):
    """Level-3 slot of an address whose level-3 table exists."""
    slot = (root >> U3) + (address >> U(39) & U(511))
    return ((m.ram[slot] & E_ADDRESS) >> U3) + (address >> U30 & U(511))


@kernel
def gather_owed(m, space):
    """Have the flush that a process is owed done by gather_flush(), with what else the call gathers."""
    owed = space_row(space) + S_UNFLUSHED
    m.state[R_GATHER_TABLES] += m.state[owed]
    m.state[owed] = U0


@outlined
def zap_range(m, row, start, end, guards):
    """Clear the entries of [start, end) of a VMA, after KVM was told; what is to be flushed is gathered."""
    kind = m.state[row + A_KIND]
    if kind == VMA_GUEST_MEMFD:
        unmap_vma_range(m, row, start, end)
        if m.state[R_DESIGN] == U(PFNMAP):
            flush_mm(m, m.state[row + A_SPACE])  # before the VMA goes: tlb_free_vmas()
        else:
            gather_owed(m, m.state[row + A_SPACE])
        return
    notify_range(m, m.state[row + A_SPACE], start, end)
    if kind == VMA_HUGETLB:
        _zap_huge(m, row, start, end)
    else:
        _zap_small(m, row, start, end, guards)


@outlined
def unmap_file_range(m, inode, first, last):
    """unmap_mapping_pages(), hugetlb_vmdelete_list(): pages [first, last) of a file leave every process."""
    state = m.state
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        start, end = vma_overlap(state, row, inode, first, last)
        if start < end:
            gather_begin(m)
            zap_range(m, row, start, end, True)
            gather_flush(m)


@outlined
def drop_large_pfn(m, row, address, level):
    """Drop a large PFN entry over an address, if its level is at least `level`: how __split_huge_pud() "splits" it."""
    slot, at = lookup(m, space_root(m.state, m.state[row + A_SPACE]), address)
    if at >= level and m.ram[slot] & E_LARGE != U0 and holds_page(m.ram[slot]):
        notify_range(m, m.state[row + A_SPACE], address & ~(size_of(at) - U1), (address | (size_of(at) - U1)) + U1)
        m.ram[slot] = U0
        change_value(m.stats, HOST_LEAVES + at - U1, -1)
        charge_one(m, LEAF_CLEARED)
        gather(m, address, at)


# --------------------------------------------------------------------------- other rights


@kernel
def _changed(m, row, entry, bits, large):
    """An entry with the VMA's new rights; a private page of this mapping alone becomes writable at once.

    mm/mprotect.c:change_pte_range(), can_change_pte_writable().
    """
    value = modify(entry, bits, large)
    state = m.state
    if state[row + A_FLAGS] & VM_SHARED == U0 and state[row + A_PROT] & PROT_WRITE != U0 and large == U0:
        if value & E_SPECIAL == U0 and U(m.counts[frame_of(value)]) & PAGE_EXCLUSIVE != U0:
            return make_writable(value)
    return value


@outlined
def _protect_small(m, row, start, end):
    """change_protection_range() of a VMA that is not HugeTLB; a large entry of which only a part changes is dropped."""
    root = space_root(m.state, m.state[row + A_SPACE])
    bits = protection(m.state, row)
    changed = np.int64(0)
    address = start
    while address < end:
        slot, level = lookup(m, root, address)
        if level > U1:
            size = size_of(level)
            first = address & ~(size - U1)
            if holds_page(m.ram[slot]):
                if address != first or first + size > end:
                    drop_large_pfn(m, row, address, level)
                else:
                    m.ram[slot] = _changed(m, row, m.ram[slot], bits, E_LARGE)
                    changed += 1
                    gather(m, address, level)
            address = first + size
            continue
        stop = min(end, (address & ~(size_of(U2) - U1)) + size_of(U2))
        while address < stop:
            entry = m.ram[slot]
            if entry != U0 and holds_page(entry):
                m.ram[slot] = _changed(m, row, entry, bits, U0)
                changed += 1
                gather(m, address, U1)
            slot += U1
            address += U(4096)
    charge(m, LEAF_WRITTEN, changed)


@outlined
def _protect_huge(m, row, start, end):
    """hugetlb_change_protection(): a shared table is let go of, the next access builds one with the new rights."""
    state = m.state
    level = level_of_order(huge_order(state, row))
    root = space_root(state, state[row + A_SPACE])
    bits = protection(state, row)
    address = start
    while address < end:
        slot, at = lookup(m, root, address)
        size = size_of(max(at, level))
        if at == level:
            if level == U2 and unshare_table(m, _slot_above(m, root, address)):
                gather(m, address, U3)
                address = ((address >> U30) + U1) << U30
                continue
            if holds_page(m.ram[slot]):
                m.ram[slot] = modify(m.ram[slot], bits, E_LARGE)
                charge_one(m, LEAF_WRITTEN)
                gather(m, address, level)
        address = (address & ~(size - U1)) + size


@outlined
def change_protection(m, row, start, end):
    """Give the entries of [start, end) of a VMA the rights that its row has by now, after KVM was told."""
    notify_range(m, m.state[row + A_SPACE], start, end)
    if m.state[row + A_KIND] == VMA_HUGETLB:
        _protect_huge(m, row, start, end)
    else:
        _protect_small(m, row, start, end)
