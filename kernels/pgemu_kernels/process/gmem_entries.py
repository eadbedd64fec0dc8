"""The process side: clearing page-table entries of a mapping, and what that sets off."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U9, U12, U511, U512
from pgemu_kernels.engine.charge import (
    HOST_LEAVES,
    LEAF_CLEARED,
    RMAP_CHANGED,
    TLB_FLUSH_MM,
    change_value,
    charge,
    charge_one,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import find_vma, space_root, vma_overlap, vma_row
from pgemu_kernels.folios.folio import remove_mapping, struct_page
from pgemu_kernels.formats.bits import ADDRESS, PRESENT, SPECIAL
from pgemu_kernels.stage2.invalidate import notify_unmap
from pgemu_kernels.tables.walker import count_host_leaf, find_leaf, free_host_tables, host_format, next_host_table
from pgemu_kernels.words.registers import R_FLUSHES_HELD, R_HOST_HUGE, R_VMAS
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_PGOFF,
    A_SPACE,
    A_START,
    S_RSS,
    S_UNFLUSHED,
    S_WORDS,
    STATE_SPACES,
)

U = np.uint64
_S_WORDS = U(S_WORDS)
_PRESENT = U(PRESENT)
_SPECIAL = U(SPECIAL)
_ADDRESS = U(ADDRESS)


@kernel
def clear_leaves(m, space, page, end):
    """Clear the entries of virtual pages [page, end): how many there were.

    An ordinary entry gives back its folio's mapcount and reference and is no more of the process's RSS; a special one
    has nothing of that: mm/memory.c:zap_present_ptes(), vm_normal_page().
    """
    f = host_format(m)
    ram = m.ram
    root = space_root(m.state, space)
    cleared = np.int64(0)
    ordinary = np.int64(0)
    while page < end:
        table, skip = next_host_table(m, f, root, page)
        if table == NONE:
            page = (page & ~(skip - U1)) + skip
            continue
        stop = min(end, (page | U511) + U1)
        for slot in range(table + (page & U511), table + (stop - U1 & U511) + U1):
            entry = ram[slot]
            if entry & _PRESENT != U0:
                ram[slot] = U0
                cleared += 1
                if entry & _SPECIAL == U0:
                    remove_mapping(ram, struct_page(m, (entry & _ADDRESS) >> U12))
                    ordinary += 1
        page = stop
    if cleared != 0:
        count_host_leaf(m, -cleared)
        charge(m, LEAF_CLEARED, cleared)
        if ordinary != 0:
            m.state[STATE_SPACES + space * _S_WORDS + S_RSS] -= U(ordinary)
            charge(m, RMAP_CHANGED, ordinary)
    return cleared


@outlined
def clear_large_leaves(m, row, root, first, last):
    """Drop the entries of 2M and 1G over virtual addresses [first, last) of a VMA: how many, to be flushed.

    One that is only partly covered goes whole, after the notifier was told of all of it: huge_memory.c:
    __split_huge_pmd(), __split_huge_pud() of an entry that is not anonymous memory's.
    """
    f = host_format(m)
    cleared = np.int64(0)
    page = first >> U12
    end = last >> U12
    while page < end:
        slot, level = find_leaf(m, f, root, page)
        size = U1 << (U9 * (max(level, U2) - U1))
        base = page & ~(size - U1)
        if slot != NONE and level > U1:
            if base < first >> U12 or base + size > end:
                index = m.state[row + A_PGOFF] + base - (m.state[row + A_START] >> U12)
                notify_unmap(m, m.state[row + A_SPACE], m.state[row + A_INODE], index, index + size)
            m.ram[slot] = U0
            change_value(m.stats, HOST_LEAVES + level - U1, -1)
            charge_one(m, LEAF_CLEARED)
            cleared += 1
        page = base + size
    return cleared


@kernel
def no_large_leaves(m, row, root, first, last):
    """The fast loops know no large entries of processes."""
    return np.int64(0)


large_leaves_cleared = full_only(clear_large_leaves, no_large_leaves)


@kernel
def owe_flush(state, space, n):
    """Note that `n` (int64) entries or tables of a process went and no flush has followed yet."""
    state[STATE_SPACES + space * _S_WORDS + S_UNFLUSHED] += U(n)


@kernel
def flush_mm(m, space):
    """tlb_finish_mmu(): flush the process if entries were cleared or tables freed since the last time."""
    row = STATE_SPACES + space * _S_WORDS
    if m.state[row + S_UNFLUSHED] != U0 and m.state[R_FLUSHES_HELD] == U0:
        m.state[row + S_UNFLUSHED] = U0
        charge_one(m, TLB_FLUSH_MM)


@kernel
def unmap_vma_range(m, row, first, last):
    """Unmap virtual addresses [first, last) of a VMA, to be flushed, after the MMU notifier: how many entries."""
    state = m.state
    space = state[row + A_SPACE]
    start = state[row + A_PGOFF] + ((first - state[row + A_START]) >> U12)
    notify_unmap(m, space, state[row + A_INODE], start, start + ((last - first) >> U12))
    root = space_root(state, space)
    cleared = np.int64(0)
    if state[R_HOST_HUGE] != U0:
        cleared += large_leaves_cleared(m, row, root, first, last)
    cleared += clear_leaves(m, space, first >> U12, last >> U12)
    owe_flush(state, space, cleared)
    return cleared


@kernel
def unmap_everywhere(m, inode, start, end):
    """unmap_mapping_pages(): clear pages [start, end) of an inode in every process that maps it."""
    state = m.state
    cleared = np.int64(0)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        first, last = vma_overlap(state, row, inode, start, end)
        if first < last:
            cleared += unmap_vma_range(m, row, first, last)
            flush_mm(m, state[row + A_SPACE])  # each VMA is zapped by itself
    return cleared


@outlined
def reclaim_tables(m, root, first, last):
    """Free the last-level tables that one MADV_DONTNEED of pages [first, last) covers whole: CONFIG_PT_RECLAIM.

    mm/pt_reclaim.c:try_to_free_pte(). Two halves, one after the other, free nothing, as captured.
    """
    page = (first + U511) & ~U511
    freed = np.int64(0)
    while page + U512 <= last:
        freed += free_host_tables(m, root, page, page + U1, page, page + U512)
        page += U512
    return freed


@kernel
def next_vma(state, space, address, end):
    """The first VMA of a process that ends after `address` and begins before `end`: its row, or NONE."""
    row = find_vma(state, space, address)
    if row != NONE:
        return row
    best = NONE
    begin = end
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_SPACE] == space and address < state[row + A_END] and state[row + A_START] < begin:
            best = row
            begin = state[row + A_START]
    return best
