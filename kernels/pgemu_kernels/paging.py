"""Page tables: one walker for every format, over 512-entry tables in `ram`.

Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G. A "table" is the index in `ram` of a table's first
word; the "table of level n" holds entries of level n. Formats are data: nothing here knows a name.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U2, U3, U9, U12, U18, U27, U511, U512
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    HOST_LEAVES,
    HOST_TABLES,
    SPTE_CLEARED,
    SPTE_WRITTEN,
    STAGE2_LEAVES,
    STAGE2_TABLES,
    TABLE_PAGE_ALLOCATED,
    TABLE_PAGE_FREED,
    change,
    change_value,
    charge,
    charge_one,
)
from pgemu_kernels.layout import (
    F_ADDRESS,
    F_EMPTY,
    F_LARGE,
    F_LEAF_4K,
    F_MMU_PRESENT,
    F_TABLE,
    F_WORDS,
    R_HOST_FORMAT,
    R_STAGE2_FORMAT,
    STATE_FORMATS,
)
from pgemu_kernels.memory import fill_frame, put_frame, take_frame

U = np.uint64
_F_WORDS = U(F_WORDS)


@kernel
def format_row(state, index):
    """Where a format's fields begin in `state`."""
    return STATE_FORMATS + index * _F_WORDS


@kernel
def host_format(m):
    return format_row(m.state, m.state[R_HOST_FORMAT])


@kernel
def stage2_format(m):
    return format_row(m.state, m.state[R_STAGE2_FORMAT])


@kernel
def table_of(state, f, entry):
    """The table a table entry points to."""
    return (entry & state[f + F_ADDRESS]) >> U3


@kernel
def is_present(state, f, entry):
    """Whether an entry is present to Linux; to the hardware a cached MMIO entry of KVM is, too."""
    return entry & state[f + F_MMU_PRESENT] != U0


@kernel
def is_large(state, f, entry):
    """Whether a present entry above level 1 is a leaf."""
    return entry & state[f + F_LARGE] != U0


@kernel
def find_leaf(m, f, root, page):
    """Walk to the leaf that maps `page` (a page number): its slot and level, or (NONE, level of the hole).

    Four, three or two loads for a leaf of 4K, 2M or 1G.
    """
    ram = m.ram
    state = m.state
    entry = ram[(root >> U3) + (page >> U27 & U511)]
    if not is_present(state, f, entry):
        return NONE, U(4)
    slot = table_of(state, f, entry) + (page >> U18 & U511)
    entry = ram[slot]
    if not is_present(state, f, entry):
        return NONE, U3
    if is_large(state, f, entry):
        return slot, U3
    slot = table_of(state, f, entry) + (page >> U9 & U511)
    entry = ram[slot]
    if not is_present(state, f, entry):
        return NONE, U2
    if is_large(state, f, entry):
        return slot, U2
    slot = table_of(state, f, entry) + (page & U511)
    if not is_present(state, f, ram[slot]):
        return NONE, U1
    return slot, U1


@outlined
def new_table(m, f, slot, gauge):
    """Allocate an empty table page and link it at `slot`: its table, or NONE without memory.

    mm/memory.c:__pte_alloc() and arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_link_sp().
    """
    frame = take_frame(m)
    if frame == NONE:
        return NONE
    fill_frame(m.ram, frame, m.state[f + F_EMPTY])
    m.counts[frame] = np.uint32(0)
    m.ram[slot] = frame << U12 | m.state[f + F_TABLE]
    change(m.stats, gauge, 1)
    charge_one(m, TABLE_PAGE_ALLOCATED)
    return frame << U9


@kernel
def need_table(m, f, slot, gauge):
    """The table below `slot`, allocated if there is none; NONE without memory. The slot is no leaf."""
    entry = m.ram[slot]
    if is_present(m.state, f, entry):
        return table_of(m.state, f, entry)
    return new_table(m, f, slot, gauge)


@kernel
def host_slot(m, root, page):
    """Slot of the 4K entry of a process's page, tables allocated on the way; NONE without memory.

    include/linux/mm.h:get_locked_pte().
    """
    f = host_format(m)
    table = need_table(m, f, (root >> U3) + (page >> U27 & U511), HOST_TABLES)
    if table == NONE:
        return NONE
    table = need_table(m, f, table + (page >> U18 & U511), HOST_TABLES)
    if table == NONE:
        return NONE
    table = need_table(m, f, table + (page >> U9 & U511), HOST_TABLES)
    if table == NONE:
        return NONE
    return table + (page & U511)


@kernel
def free_table(m, frame, gauge):
    put_frame(m, frame)
    change(m.stats, gauge, -1)
    charge_one(m, TABLE_PAGE_FREED)


# --------------------------------------------------------------------------- stage 2

# Bit 31 of a table page's count of leaves: a table made for a fetch, below which no leaf grows (tdp_mmu.py).
COUNT_BELOW = U(0x7FFF_FFFF)


@kernel
def free_stage2_below(m, f, entry, level):
    """Free the table that `entry` of `level` (2 or 3) points to, and all below it, with their leaves.

    arch/x86/kvm/mmu/tdp_mmu.c:handle_removed_pt(). Linux also freezes every absent entry; that is in the
    price of a table freed. The leaves dropped are returned.
    """
    table = table_of(m.state, f, entry)
    dropped = np.int64(U(m.counts[table >> U9]) & COUNT_BELOW)
    small = dropped
    if level == U3:
        small = np.int64(0)
        for i in range(table, table + U512):
            below = m.ram[i]
            if is_present(m.state, f, below) and not is_large(m.state, f, below):
                frame = table_of(m.state, f, below) >> U9
                small += np.int64(U(m.counts[frame]) & COUNT_BELOW)
                free_table(m, frame, STAGE2_TABLES)
    change_value(m.stats, STAGE2_LEAVES, -small)
    change_value(m.stats, STAGE2_LEAVES + U1, small - dropped)
    free_table(m, table >> U9, STAGE2_TABLES)
    charge(m, SPTE_CLEARED, dropped)
    return dropped


@outlined
def drop_stage2_tree(m, root):
    """Drop every leaf and table below a stage-2 root: kvm_mmu_zap_all_fast(). Returns the leaves dropped."""
    f = stage2_format(m)
    ram = m.ram
    empty = m.state[f + F_EMPTY]
    dropped = np.int64(0)
    for top in range(root >> U3, (root >> U3) + U512):
        entry = ram[top]
        if not is_present(m.state, f, entry):
            continue
        table = table_of(m.state, f, entry)
        for slot in range(table, table + U512):
            below = ram[slot]
            if not is_present(m.state, f, below):
                continue
            if is_large(m.state, f, below):
                dropped += 1
                change_value(m.stats, STAGE2_LEAVES + U2, -1)
                charge_one(m, SPTE_CLEARED)
            else:
                dropped += free_stage2_below(m, f, below, U3)
        free_table(m, table >> U9, STAGE2_TABLES)
        ram[top] = empty
    return dropped


@outlined
def split_stage2_leaf(m, f, slot, level):
    """Replace a leaf of level 2 or 3 by a table of 512 leaves of the level below; the table, or NONE.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_split_huge_page(), make_small_spte(). No flush is needed.
    """
    leaf = m.ram[slot]
    table = new_table(m, f, slot, STAGE2_TABLES)
    if table == NONE:
        return NONE
    size = U1 << (U12 + U9 * (level - U2))
    address = leaf & m.state[f + F_ADDRESS] & ~(size * U512 - U1)
    child = m.state[f + F_LEAF_4K + level - U2]
    for i in range(U512):
        m.ram[table + i] = (address + i * size) | child
    m.counts[table >> U9] = np.uint32(512)
    if level == U2:
        # The 2M leaf was one below its level-2 table, which is not at hand: the table's page is.
        above = slot >> U9
        m.counts[above] = np.uint32(U(m.counts[above]) + U511)
    change_value(m.stats, STAGE2_LEAVES + level - U1, -1)
    change_value(m.stats, STAGE2_LEAVES + level - U2, 512)
    charge(m, SPTE_WRITTEN, 512)
    return table


@kernel
def stage2_table(m, f, slot, level):
    """The table below `slot` (an entry of `level`), allocated or made by splitting a leaf; NONE without memory."""
    entry = m.ram[slot]
    if not is_present(m.state, f, entry):
        return new_table(m, f, slot, STAGE2_TABLES)
    if level < U(4) and is_large(m.state, f, entry):
        return split_stage2_leaf(m, f, slot, level)
    return table_of(m.state, f, entry)


MAP_FIXED = 0
MAP_SPURIOUS = 1
MAP_NO_MEMORY = 2
MAP_OTHER_PFN = 3


@kernel
def set_stage2_leaf(m, f, slot, level, pfn):
    """Install a leaf at `slot`: (MAP_*, whether a table stood there, leaves dropped with that)."""
    old = m.ram[slot]
    value = pfn << U12 | m.state[f + F_LEAF_4K + level - U1]
    dropped = np.int64(0)
    was_table = False
    if is_present(m.state, f, old):
        if level == U1 or is_large(m.state, f, old):
            if (old ^ value) & m.state[f + F_ADDRESS] == U0:
                return MAP_SPURIOUS, was_table, dropped
            return MAP_OTHER_PFN, was_table, dropped
        dropped = free_stage2_below(m, f, old, level)
        was_table = True
    m.ram[slot] = value
    change_value(m.stats, STAGE2_LEAVES + level - U1, 1)
    return MAP_FIXED, was_table, dropped


@kernel
def count_below(leaves, table, n):
    """Add `n` (int64) to the leaves counted below a table page."""
    frame = table >> U9
    leaves[frame] = np.uint32(np.int64(leaves[frame]) + n)


@kernel
def map_stage2(m, root, gfn, level, pfn):
    """Map `gfn` (aligned to `level`) to `pfn` by one leaf of `level` 1..3: (MAP_*, whether a table was replaced).

    arch/x86/kvm/mmu/tdp_mmu.c:kvm_tdp_mmu_map(): tables are linked on the way down, a leaf above the
    level is split, a table at the level is torn down.
    """
    f = stage2_format(m)
    table = stage2_table(m, f, (root >> U3) + (gfn >> U27 & U511), U(4))
    if table == NONE:
        return MAP_NO_MEMORY, False
    slot = table + (gfn >> U18 & U511)
    if level == U3:
        outcome, was_table, dropped = set_stage2_leaf(m, f, slot, U3, pfn)
        return outcome, was_table
    table2 = stage2_table(m, f, slot, U3)
    if table2 == NONE:
        return MAP_NO_MEMORY, False
    slot = table2 + (gfn >> U9 & U511)
    if level == U2:
        outcome, was_table, dropped = set_stage2_leaf(m, f, slot, U2, pfn)
        if outcome == MAP_FIXED:
            count_below(m.counts, table2, 1 - dropped)
        return outcome, was_table
    table1 = stage2_table(m, f, slot, U2)
    if table1 == NONE:
        return MAP_NO_MEMORY, False
    outcome, was_table, dropped = set_stage2_leaf(m, f, table1 + (gfn & U511), U1, pfn)
    if outcome == MAP_FIXED:
        count_below(m.counts, table1, 1)
        count_below(m.counts, table2, 1)
    return outcome, was_table


@kernel
def zap_4k_leaves(m, f, table, first, last):
    """Clear present entries [first, last) of a level-1 table; how many there were."""
    ram = m.ram
    empty = m.state[f + F_EMPTY]
    present = m.state[f + F_MMU_PRESENT]
    cleared = np.int64(0)
    for slot in range(table + first, table + last):
        if ram[slot] & present != U0:
            ram[slot] = empty
            cleared += 1
    if cleared != 0:
        count_below(m.counts, table, -cleared)
        change_value(m.stats, STAGE2_LEAVES, -cleared)
    return cleared


@kernel
def zap_2m_region(m, f, slot, gfn, end):
    """Drop leaves of [gfn, end), all within the level-2 entry at `slot`; a 2M leaf goes whole."""
    entry = m.ram[slot]
    if not is_present(m.state, f, entry):
        return np.int64(0)
    if is_large(m.state, f, entry):
        m.ram[slot] = m.state[f + F_EMPTY]
        change_value(m.stats, STAGE2_LEAVES + U1, -1)
        return np.int64(1)
    table = table_of(m.state, f, entry)
    if m.counts[table >> U9] == np.uint32(0):
        return np.int64(0)
    return zap_4k_leaves(m, f, table, gfn & U511, (end - U1 & U511) + U1)


@kernel
def zap_1g_region(m, f, slot, gfn, end):
    """Drop leaves of [gfn, end), all within the level-3 entry at `slot`; a 1G leaf goes whole."""
    entry = m.ram[slot]
    if not is_present(m.state, f, entry):
        return np.int64(0)
    if is_large(m.state, f, entry):
        m.ram[slot] = m.state[f + F_EMPTY]
        change_value(m.stats, STAGE2_LEAVES + U2, -1)
        return np.int64(1)
    table = table_of(m.state, f, entry)
    # The count below the table spares a rounded zap the walk over 512 empty tables.
    if m.counts[table >> U9] == np.uint32(0):
        return np.int64(0)
    cleared = np.int64(0)
    while gfn < end:
        stop = min(end, (gfn | U511) + U1)
        cleared += zap_2m_region(m, f, table + (gfn >> U9 & U511), gfn, stop)
        gfn = stop
    count_below(m.counts, table, -cleared)
    return cleared


@kernel
def zap_stage2(m, root, gfn, end):
    """Drop every stage-2 leaf that overlaps [gfn, end): how many. Tables stay, a huge leaf goes whole.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_zap_leafs(). The caller flushes if any was dropped.
    """
    f = stage2_format(m)
    ram = m.ram
    cleared = np.int64(0)
    while gfn < end:
        entry = ram[(root >> U3) + (gfn >> U27 & U511)]
        if not is_present(m.state, f, entry):
            gfn = min(end, ((gfn >> U27) + U1) << U27)
            continue
        stop = min(end, ((gfn >> U18) + U1) << U18)
        cleared += zap_1g_region(m, f, table_of(m.state, f, entry) + (gfn >> U18 & U511), gfn, stop)
        gfn = stop
    return cleared


# --------------------------------------------------------------------------- process page tables


@outlined
def free_host_tables(m, root, start, end, floor, ceiling):
    """Free the tables below `root` that [start, end) used and that no mapping outside [floor, ceiling) needs: how many.

    Page numbers; a table goes only if all that it covers lies within [floor, ceiling). The entries are
    cleared already. mm/memory.c:free_pgd_range() and what it calls.
    """
    f = host_format(m)
    ram = m.ram
    state = m.state
    level = U1
    freed = np.int64(0)
    while level < U(4):
        span = U1 << (U9 * level)  # pages that one table of this level covers
        page = start & ~(span - U1)
        while page < end:
            if page >= floor and page + span <= ceiling:
                slot = (root >> U3) + (page >> U27 & U511)
                entry = ram[slot]
                above = U(4)
                while above > level + U1 and is_present(state, f, entry):
                    above -= U1
                    slot = table_of(state, f, entry) + (page >> (U9 * (above - U1)) & U511)
                    entry = ram[slot]
                if is_present(state, f, entry):
                    free_table(m, table_of(state, f, entry) >> U9, HOST_TABLES)
                    ram[slot] = U0
                    freed += 1
            page += span
        level += U1
    return freed


@kernel
def next_host_table(m, f, root, page):
    """Table of level 1 that covers `page` and U0, or NONE and the number of pages to skip."""
    entry = m.ram[(root >> U3) + (page >> U27 & U511)]
    if not is_present(m.state, f, entry):
        return NONE, U1 << U27
    entry = m.ram[table_of(m.state, f, entry) + (page >> U18 & U511)]
    if not is_present(m.state, f, entry):
        return NONE, U1 << U18
    entry = m.ram[table_of(m.state, f, entry) + (page >> U9 & U511)]
    if not is_present(m.state, f, entry):
        return NONE, U512
    return table_of(m.state, f, entry), U0


@kernel
def count_host_leaf(m, n):
    change_value(m.stats, HOST_LEAVES, n)
