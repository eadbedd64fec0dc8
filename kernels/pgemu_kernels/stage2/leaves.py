"""Leaves and tables of stage 2: map, split, zap, drop. arch/x86/kvm/mmu/tdp_mmu.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9, U12, U18, U27, U511, U512
from pgemu_kernels.engine.charge import (
    SPTE_CLEARED,
    SPTE_WRITTEN,
    STAGE2_LEAVES,
    STAGE2_TABLES,
    change_value,
    charge,
    charge_one,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.tables.walker import free_table, is_large, is_present, new_table, stage2_format, table_of
from pgemu_kernels.words.table_words import F_ADDRESS, F_EMPTY, F_LEAF_4K, F_MMU_PRESENT

U = np.uint64
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
