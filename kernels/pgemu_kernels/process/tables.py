"""Page tables of a process, found and made and freed as mm/memory.c does it."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12, U18, U21, U27, U511, U512
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, shift_of, size_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import space_root
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.process.entries import GUARD, is_hwpoison, points_to_table
from pgemu_kernels.tables.walker import free_table, host_format, new_table
from pgemu_kernels.words.enum_words import EVENT_TLB_FLUSH_MM, EVENT_TLB_FLUSH_PAGE, GAUGE_HOST_TABLES
from pgemu_kernels.words.operations import VM_FAULT_HWPOISON, VM_FAULT_SIGSEGV
from pgemu_kernels.words.registers import R_FLUSHES_HELD, R_GATHER_END, R_GATHER_SHIFT, R_GATHER_START, R_PTI
from pgemu_kernels.words.rows import S_UNFLUSHED, S_USER_ROOT, S_WORDS, STATE_SPACES
from pgemu_kernels.words.table_words import F_TABLE, F_TABLE_TOP

U = np.uint64
_S_WORDS = U(S_WORDS)
_CEILING = U(33)  # tlb_single_page_flush_ceiling


@kernel
def space_row(space):
    return STATE_SPACES + space * _S_WORDS


@kernel
def below(m, slot):
    """First word of the table that the entry at `slot` points to."""
    return (m.ram[slot] & PTE_ADDRESS) >> U3


@kernel
def level3_slot(m, root, address):
    """Slot of level 3 for an address whose table of that level exists."""
    return below(m, (root >> U3) + index_at(address >> U12, U4)) + index_at(address >> U12, U3)


@outlined
def lookup_address(m, root, address):
    """Walk as far as there are tables: slot and level of the first entry that points to none."""
    slot = (root >> U3) + index_at(address >> U12, U4)
    if not points_to_table(m.ram[slot]):
        return slot, U4
    slot = below(m, slot) + index_at(address >> U12, U3)
    if not points_to_table(m.ram[slot]):
        return slot, U3
    slot = below(m, slot) + index_at(address >> U12, U2)
    if not points_to_table(m.ram[slot]):
        return slot, U2
    return below(m, slot) + index_at(address >> U12, U1), U1


@outlined
def marker_fault(m, space, address):
    """What a fault ends in where an entry stands that is no page: VM_FAULT_SIGSEGV of a guard, VM_FAULT_HWPOISON of a
    poisoned page, 0 of none. mm/memory.c:handle_pte_marker(), do_swap_page()"""
    slot, _level = lookup_address(m, space_root(m.state, space), address)
    if m.ram[slot] == GUARD:
        return np.int64(VM_FAULT_SIGSEGV)
    return np.int64(VM_FAULT_HWPOISON if is_hwpoison(m.state, m.ram[slot]) else 0)


@kernel
def slot_of_level(m, root, address, level):
    """Slot of a level for an address, or NONE where the tables do not reach that far down."""
    slot = (root >> U3) + index_at(address >> U12, U4)
    at = U4
    while at > level:
        if not points_to_table(m.ram[slot]):
            return NONE
        at -= U1
        slot = below(m, slot) + (address >> shift_of(at) & U511)
    return slot


@kernel
def level1_table(m, root, page):
    """The last-level table that covers `page` and 512, or NONE and how many pages an entry of the level covers that
    points to no table."""
    entry = m.ram[(root >> U3) + index_at(page, U4)]
    if not points_to_table(entry):
        return NONE, U1 << U27
    entry = m.ram[((entry & PTE_ADDRESS) >> U3) + index_at(page, U3)]
    if not points_to_table(entry):
        return NONE, U1 << U18
    entry = m.ram[((entry & PTE_ADDRESS) >> U3) + index_at(page, U2)]
    if not points_to_table(entry):
        return NONE, U512
    return (entry & PTE_ADDRESS) >> U3, U512


@kernel
def _set_top(m, space, slot, entry):
    """Write an entry of the top table; with page-table isolation the user's copy too, without no-execute.

    arch/x86/mm/pti.c:__pti_set_user_pgtbl().
    """
    f = host_format(m)
    m.ram[slot] = entry
    if m.state[R_PTI] != U0:
        user = (m.state[space_row(space) + S_USER_ROOT] >> U3) + (slot & U511)
        m.ram[user] = entry & ~m.state[f + F_TABLE_TOP] | m.state[f + F_TABLE] if entry != U0 else U0


@outlined
def need_slot(m, space, address, level):
    """Slot of `level` for an address, tables allocated on the way; NONE without memory.

    The tables made before memory ran out stay, as __handle_mm_fault() leaves them. An entry of a higher
    level that is no table is returned as it stands.
    """
    f = host_format(m)
    slot = (space_root(m.state, space) >> U3) + index_at(address >> U12, U4)
    at = U4
    while at > level:
        if m.ram[slot] == U0:
            if new_table(m, f, slot, GAUGE_HOST_TABLES) == NONE:
                return NONE
            if at == U4:
                _set_top(m, space, slot, (m.ram[slot] & PTE_ADDRESS) | m.state[f + F_TABLE_TOP])
        elif not points_to_table(m.ram[slot]):
            return slot
        at -= U1
        slot = below(m, slot) + (address >> shift_of(at) & U511)
    return slot


# --------------------------------------------------------------------------- freeing


@kernel
def _free_below(m, slot):
    """Free the table that the entry at `slot` points to, and clear the entry."""
    free_table(m, below(m, slot) >> U9, GAUGE_HOST_TABLES)
    m.ram[slot] = U0


def _freeing(lower: Any, level: np.uint64) -> Any:
    """Free the tables below the entries of `level` over [start, end), all in one table: how many. `lower`: those below.

    (m, space, table, start, end, floor, ceiling); `table`: its first word.
    """

    @kernel
    def free_tables_below(m, space, table, start, end, floor, ceiling):
        freed = U0
        while start < end:
            slot = table + index_at(start >> U12, level)
            first = start & ~(size_of(level) - U1)
            stop = min(end, first + size_of(level))
            if points_to_table(m.ram[slot]):
                freed += lower(m, space, below(m, slot), start, stop, floor, ceiling)
                if first >= floor and first + size_of(level) <= ceiling:
                    _free_below(m, slot)
                    if level == U4:
                        _set_top(m, space, slot, U0)
                    freed += U1
            start = stop
        return freed

    return free_tables_below


@kernel
def _none_below(m, space, table, start, end, floor, ceiling):
    """Tables of level 1 have none."""
    return U0


_free_tables = reduce(_freeing, (U2, U3, U4), _none_below)


@outlined
def free_pgtables(m, space, start, end, floor, ceiling):
    """Free the tables that addresses [start, end) used and nothing outside [floor, ceiling) needs, to be flushed.

    A table goes only if all that it covers lies within floor and ceiling, the end of the mapping below
    and the start of the one above. mm/memory.c:free_pgd_range().
    """
    freed = _free_tables(m, space, space_root(m.state, space) >> U3, start, end, floor, ceiling)
    note_unflushed(m.state, space, freed)


@outlined
def reclaim_level1_tables(m, space, start, end):
    """Free the last-level tables that [start, end) covers whole and that are empty: CONFIG_PT_RECLAIM.

    mm/pt_reclaim.c:try_to_free_pte(), on the ranges that one MADV_DONTNEED of one VMA has just cleared: two halves, one
    after the other, free nothing (captured).
    """
    root = space_root(m.state, space)
    page = (start + size_of(U2) - U1) >> U21 << U21
    while page + size_of(U2) <= end:
        slot1, level = lookup_address(m, root, page)
        if level == U1:
            empty = True
            for i in range(slot1, slot1 + U512):
                empty = empty and m.ram[i] == U0
            if empty:
                _free_below(m, below(m, level3_slot(m, root, page)) + index_at(page >> U12, U2))
                note_unflushed(m.state, space, U1)
        page += size_of(U2)


# --------------------------------------------------------------------------- what is to be flushed


@kernel
def note_unflushed(state, space, n):
    """Note that `n` (uint64) entries of the designs' mappings or tables of a process went and no flush followed yet."""
    state[space_row(space) + S_UNFLUSHED] += n


@kernel
def flush_mm(m, space):
    """tlb_finish_mmu() of what a process is owed; a conversion that flushes once holds it back."""
    row = space_row(space)
    if m.state[row + S_UNFLUSHED] != U0 and m.state[R_FLUSHES_HELD] == U0:
        m.state[row + S_UNFLUSHED] = U0
        charge_one(m, EVENT_TLB_FLUSH_MM)


@kernel
def _begin(m):
    m.state[R_GATHER_START] = U0
    m.state[R_GATHER_END] = U0
    m.state[R_GATHER_SHIFT] = U0


# tlb_gather_mmu(): nothing cleared yet. The fast loops only clear the designs' entries, which note_unflushed() notes.
gather_begin = full_only(_begin, None)


@kernel
def gather(m, address, level):
    """tlb_remove_tlb_entry(): the entry of `level` for an address was cleared or lost rights."""
    state = m.state
    size = size_of(level)
    first = address & ~(size - U1)
    shift = shift_of(level)
    nothing = state[R_GATHER_END] == U0
    state[R_GATHER_START] = first if nothing else min(state[R_GATHER_START], first)
    state[R_GATHER_SHIFT] = shift if nothing else min(state[R_GATHER_SHIFT], shift)
    state[R_GATHER_END] = max(state[R_GATHER_END], first + size)


@outlined
def _flush(m, space):
    state = m.state
    if state[R_GATHER_END] == U0:
        flush_mm(m, space)
        return
    state[space_row(space) + S_UNFLUSHED] = U0
    charge_one(m, EVENT_TLB_FLUSH_MM)
    pages = (state[R_GATHER_END] - state[R_GATHER_START]) >> state[R_GATHER_SHIFT]
    if pages <= _CEILING:
        charge(m, EVENT_TLB_FLUSH_PAGE, np.int64(pages))
    _begin(m)


# tlb_finish_mmu(): page by page up to 33 pages of the smallest size cleared, else everything. Freed tables, and what a
# process is owed, are flushed with the range. arch/x86/mm/tlb.c:get_flush_tlb_info()
gather_flush = full_only(_flush, flush_mm)
