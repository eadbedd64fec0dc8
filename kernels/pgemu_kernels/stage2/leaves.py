"""Leaves and tables of stage 2: map, split, zap, drop. arch/x86/kvm/mmu/tdp_mmu.c"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12, U18, U27, U511, U512
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import broken
from pgemu_kernels.folios.anonymous_folios import is_large_anonymous, is_of_anonymous_folio, set_large_dirty
from pgemu_kernels.folios.folio import mark_accessed
from pgemu_kernels.stage2.entries import (
    TOP,
    is_access_allowed,
    is_last_spte,
    is_table,
    last_spte,
    make_mmio_spte,
    make_spte,
    nx_huge_pages,
)
from pgemu_kernels.tables.edit_entries import child_attributes
from pgemu_kernels.tables.walker import free_table, is_large, is_present, new_table, stage2_format, table_of
from pgemu_kernels.words.enum_words import (
    BROKEN_WRONG_PFN,
    EVENT_SPTE_CLEARED,
    EVENT_SPTE_PAGES_BEYOND,
    EVENT_SPTE_SPLIT,
    EVENT_SPTE_WRITTEN,
    EVENT_TLB_FLUSH_VM,
    FLAG_EXEC,
    GAUGE_STAGE2_LEAVES_4K,
    GAUGE_STAGE2_TABLES,
)
from pgemu_kernels.words.operations import ENOMEM, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_SPURIOUS
from pgemu_kernels.words.registers import R_MARKS_ZAPPED
from pgemu_kernels.words.rows import (
    FILTER_PRIVATE,
    FILTER_SHARED,
    TABLE_LEAVES,
    TABLE_MIRROR,
    TABLE_NX_DISALLOWED,
    V_PRIVATE_ROOT,
    V_ROOT,
)
from pgemu_kernels.words.table_words import F_ACCESSED, F_ADDRESS, F_DIRTY, F_EMPTY, F_MMU_PRESENT

U = np.uint64


@kernel
def count_below(leaves, table, n):
    """Add `n` (int64) to the leaves counted below a table page."""
    frame = table >> U9
    leaves[frame] = np.uint32(np.int64(leaves[frame]) + n)


@kernel
def leaves_below(m, table):
    """How many leaves are below a table page."""
    return U(m.counts[table >> U9]) & TABLE_LEAVES


@kernel
def mark_table(m, table, bits):
    """Set bits TABLE_* of a table page."""
    m.counts[table >> U9] = np.uint32(U(m.counts[table >> U9]) | bits)


@kernel
def free_stage2_below(m, f, entry, level):
    """Free the table that `entry` of `level` (2 or 3) points to, and all below it, with their leaves.

    arch/x86/kvm/mmu/tdp_mmu.c:handle_removed_pt(). Linux also freezes every absent entry; that is in the
    price of a table freed. The leaves dropped are returned.
    """
    table = table_of(m.state, f, entry)
    dropped = np.int64(leaves_below(m, table))
    small = dropped
    if level == U3:
        small = np.int64(0)
        for i in range(table, table + U512):
            below = m.ram[i]
            if is_present(m.state, f, below) and not is_large(m.state, f, below):
                lowest = table_of(m.state, f, below)
                small += np.int64(leaves_below(m, lowest))
                free_table(m, lowest >> U9, GAUGE_STAGE2_TABLES)
    change_value(m.stats, GAUGE_STAGE2_LEAVES_4K, -small)
    change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + U1, small - dropped)
    free_table(m, table >> U9, GAUGE_STAGE2_TABLES)
    charge(m, EVENT_SPTE_CLEARED, dropped)
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
                change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + U2, -1)
                charge_one(m, EVENT_SPTE_CLEARED)
            else:
                dropped += free_stage2_below(m, f, below, U3)
        free_table(m, table >> U9, GAUGE_STAGE2_TABLES)
        ram[top] = empty
    return dropped


# --------------------------------------------------------------------------- splitting


@kernel
def _set_dirty(m, pfn):
    if is_large_anonymous(m.state, pfn) and is_of_anonymous_folio(m, pfn):
        set_large_dirty(m, pfn)


_mark_dirty = full_only(_set_dirty, None)  # the fast loops know no transparent huge pages


@kernel
def mark_dropped(m, f, entry):
    """6.12's tdp_mmu.c:handle_changed_spte(): the page of an accessed leaf that goes or is split counts as accessed, a
    transparent huge page of a dirty one as dirty."""
    state = m.state
    if state[R_MARKS_ZAPPED] == U0:
        return
    pfn = (entry & state[f + F_ADDRESS]) >> U12
    if entry & state[f + F_ACCESSED] != U0:
        mark_accessed(m, pfn)
    if entry & state[f + F_DIRTY] != U0:
        _mark_dirty(m, pfn)


@kernel
def inherit_mirror(m, slot, table):
    """A table below an entry of the mirror is of the mirror: tdp_mmu.c:tdp_mmu_init_child_sp()."""
    mark_table(m, table, U(m.counts[slot >> U9]) & TABLE_MIRROR)


inherit = full_only(inherit_mirror, None)  # the fast loops know no mirror


@outlined
def split_leaf(m, f, slot, level):
    """Replace a leaf of level 2 or 3 by a table of 512 leaves with its flags: the table, or NONE without memory.

    tdp_mmu.c:tdp_mmu_split_huge_page(). No flush: the translations stay the same. A 4K leaf may be fetched from even
    where the mitigation forbade it for the large one.
    """
    state = m.state
    leaf = m.ram[slot]
    table = new_table(m, f, slot, GAUGE_STAGE2_TABLES)
    if table == NONE:
        return NONE
    mark_dropped(m, f, leaf)
    child = child_attributes(state, f, level - U1, leaf)
    if level == U2:
        count_below(m.counts, slot & ~U511, 511)  # the leaf was one of those below its level-2 table
    size = pages_of(level - U1) << U12
    for i in range(U512):
        m.ram[table + i] = child + i * size
    m.counts[table >> U9] = np.uint32(512)
    inherit(m, slot, table)
    change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + level - U1, -1)
    change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + level - U2, 512)
    charge_one(m, EVENT_SPTE_SPLIT)
    charge(m, EVENT_SPTE_WRITTEN, 512)
    return table


@outlined
def split_boundary(m, root, gfn):
    """Split the leaf that begins before guest frame `gfn` and ends behind it, until none does: 0 or -ENOMEM.

    mmu.c:kvm_split_cross_boundary_leafs() of the TDX huge page series, one border of a range.
    """
    f = stage2_format(m)
    slot, level, entry = last_spte(m, f, root, gfn)
    while level > U1 and is_present(m.state, f, entry) and gfn & (pages_of(level) - U1) != U0:
        if split_leaf(m, f, slot, level) == NONE:
            return np.int64(-ENOMEM)
        slot, level, entry = last_spte(m, f, root, gfn)
    return np.int64(0)


@kernel
def split_cross_boundary_leafs(m, root, gfn, end):
    """The same at both borders of guest frames [gfn, end)."""
    status = split_boundary(m, root, gfn)
    return status if status != 0 else split_boundary(m, root, end)


# --------------------------------------------------------------------------- mapping


@kernel
def table_or_split(m, f, slot, level, disallowed):
    """The table below a present entry, made by splitting if it is a leaf; NONE without memory."""
    entry = m.ram[slot]
    if not is_last_spte(m.state, f, entry, level):
        return table_of(m.state, f, entry)
    table = split_leaf(m, f, slot, level)
    if disallowed and table != NONE:
        mark_table(m, table, TABLE_NX_DISALLOWED)
    return table


@kernel
def table_there(m, f, slot, level, disallowed):
    """The fast loops map where they found a hole: what is present on the way is a table."""
    return table_of(m.state, f, m.ram[slot])


present_table = full_only(table_or_split, table_there)


@kernel
def table_below(m, f, slot, level, disallowed):
    """The table below `slot`, an entry of `level`: there, linked, or made by splitting a leaf; NONE without memory."""
    if is_present(m.state, f, m.ram[slot]):
        return present_table(m, f, slot, level, disallowed)
    table = new_table(m, f, slot, GAUGE_STAGE2_TABLES)
    if table != NONE:
        inherit(m, slot, table)
        if disallowed:
            mark_table(m, table, TABLE_NX_DISALLOWED)
    return table


@kernel
def must_step_down(m, slot, level):
    """mmu.c:disallowed_hugepage_adjust(): a fetch made the table here, or it is of the mirror, where nothing is ever
    promoted (posted: TDX huge pages v3), and no large leaf may replace it."""
    f = stage2_format(m)
    entry = m.ram[slot]
    if not is_table(m.state, f, entry, level):
        return False
    return U(m.counts[table_of(m.state, f, entry) >> U9]) & (TABLE_NX_DISALLOWED | TABLE_MIRROR) != U0


steps_down = full_only(must_step_down, False)  # the fast loops know neither mitigation nor mirror


@kernel
def slot_for(m, f, root, gfn, goal, disallowed):
    """Go down to the entry of level `goal` (or below, where a fetch wants it so), tables linked and leaves split on
    the way: (slot, level, slot of the level-2 entry above or on it); the slot is NONE without memory."""
    table = table_below(m, f, (root >> U3) + index_at(gfn, U4), TOP, disallowed)
    if table == NONE:
        return NONE, TOP, NONE
    slot = table + index_at(gfn, U3)
    if goal == U3 and not steps_down(m, slot, U3):
        return slot, U3, NONE
    table = table_below(m, f, slot, U3, disallowed)
    if table == NONE:
        return NONE, U3, NONE
    middle = table + index_at(gfn, U2)
    if goal != U1 and not steps_down(m, middle, U2):
        return middle, U2, middle
    table = table_below(m, f, middle, U2, disallowed)
    if table == NONE:
        return NONE, U2, NONE
    return table + index_at(gfn, U1), U1, middle


@kernel
def count_leaf(m, slot, level, middle, n):
    """Add `n` (int64) to the leaves counted below the tables over an entry: its own of level 1 and that of level 2."""
    if level == U1:
        count_below(m.counts, slot & ~U511, n)
    if level <= U2:
        count_below(m.counts, middle & ~U511, n)


@kernel
def change_leaf(m, slot, gfn, value, access):
    """A leaf is there already: RET_PF_SPURIOUS, or RET_PF_FIXED where it did not allow the access."""
    f = stage2_format(m)
    old = m.ram[slot]
    if (old ^ value) & m.state[f + F_ADDRESS] != U0:
        broken(
            m.state, BROKEN_WRONG_PFN, gfn
        )  # a WARN in Linux, up to 6.13 a BUG: nobody told KVM that the frame changed
    if value == old or is_access_allowed(m.state, f, old, access):
        return np.int64(RET_PF_SPURIOUS)
    m.ram[slot] = value
    charge_one(m, EVENT_SPTE_WRITTEN)
    return np.int64(RET_PF_FIXED)


changed_leaf = full_only(change_leaf, np.int64(RET_PF_SPURIOUS))  # the fast loops map where they found a hole


@kernel
def map_leaf(m, root, gfn, goal, pfn, writable, access, prefetch, device):
    """tdp_mmu.c:kvm_tdp_mmu_map(): (RET_PF_FIXED, RET_PF_SPURIOUS or -ENOMEM; level of the leaf).

    gfn, pfn: of the 4K page accessed. goal: level wanted, 1 to 3; a table there is torn down, a leaf above is split.
    writable: of host and slot. access: Flag.WRITE, Flag.EXEC; none if nobody waits for the page (`prefetch`). device:
    no RAM.
    """
    f = stage2_format(m)
    disallowed = access & FLAG_EXEC != U0 and nx_huge_pages(m.state, f)
    slot, level, middle = slot_for(m, f, root, gfn, goal, disallowed)
    if slot == NONE:
        return np.int64(-ENOMEM), level
    return map_target_level(m, slot, level, middle, gfn, pfn, writable, access, prefetch, device), level


@kernel
def map_target_level(m, slot, level, middle, gfn, pfn, writable, access, prefetch, device):
    """Write the leaf of map_leaf() at an entry that slot_for() found: RET_PF_FIXED or RET_PF_SPURIOUS."""
    f = stage2_format(m)
    state = m.state
    old = m.ram[slot]
    value = make_spte(state, f, level, pfn, writable, prefetch, device)
    gained = np.int64(1)
    if is_present(state, f, old):
        if is_last_spte(state, f, old, level):
            return changed_leaf(m, slot, gfn, value, access)
        gained -= free_stage2_below(m, f, old, level)
        charge_one(m, EVENT_TLB_FLUSH_VM)
    m.ram[slot] = value
    count_leaf(m, slot, level, middle, gained)
    change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + level - U1, 1)
    charge_one(m, EVENT_SPTE_WRITTEN)
    return np.int64(RET_PF_FIXED)


@outlined
def map_mmio(m, root, gfn, generation):
    """Cache that a guest frame has no slot, in a 4K entry: RET_PF_EMULATE, or -ENOMEM for want of a table."""
    f = stage2_format(m)
    slot, _, _ = slot_for(m, f, root, gfn, U1, False)
    if slot == NONE:
        return np.int64(-ENOMEM)
    if not is_present(m.state, f, m.ram[slot]):
        m.ram[slot] = make_mmio_spte(m.state, f, gfn, generation)
        charge_one(m, EVENT_SPTE_WRITTEN)
    return np.int64(RET_PF_EMULATE)


# --------------------------------------------------------------------------- zapping


@kernel
def zap_4k_leaves(m, f, table, gfn, end):
    """Clear the entries of [gfn, end), all within a level-1 table; how many were present."""
    ram = m.ram
    empty = m.state[f + F_EMPTY]
    present = m.state[f + F_MMU_PRESENT]
    cleared = np.int64(0)
    for slot in range(table + (gfn & U511), table + (end - U1 & U511) + U1):
        if ram[slot] & present != U0:
            ram[slot] = empty
            cleared += 1
    if cleared != 0:
        count_below(m.counts, table, -cleared)
        change_value(m.stats, GAUGE_STAGE2_LEAVES_4K, -cleared)
    return cleared


@kernel
def count_beyond(m, level, gfn, end):
    """A large leaf goes whole for the sake of pages [gfn, end): count the others that it mapped."""
    charge(m, EVENT_SPTE_PAGES_BEYOND, np.int64(pages_of(level) - (end - gfn)))


def zap_region(level: np.uint64, zap_below: Any) -> Any:
    """Drop leaves of [gfn, end), all within the entry of `level` at `slot`: how many. A leaf in it goes whole.

    zap_below(m, f, table, gfn, end): drops those of the table below the entry.
    """

    @kernel
    def zap_entry(m, f, slot, gfn, end):
        entry = m.ram[slot]
        if not is_present(m.state, f, entry):
            return np.int64(0)
        if is_large(m.state, f, entry):
            m.ram[slot] = m.state[f + F_EMPTY]
            change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + level - U1, -1)
            count_beyond(m, level, gfn, end)
            return np.int64(1)
        table = table_of(m.state, f, entry)
        # The count below the table spares a rounded zap the walk over 512 empty tables.
        if leaves_below(m, table) == U0:
            return np.int64(0)
        return zap_below(m, f, table, gfn, end)

    return zap_entry


zap_2m_region = zap_region(U2, zap_4k_leaves)


@kernel
def zap_2m_regions(m, f, table, gfn, end):
    """Drop leaves of [gfn, end), all within a level-2 table: how many."""
    cleared = np.int64(0)
    while gfn < end:
        stop = min(end, (gfn | U511) + U1)
        cleared += zap_2m_region(m, f, table + index_at(gfn, U2), gfn, stop)
        gfn = stop
    count_below(m.counts, table, -cleared)
    return cleared


zap_1g_region = zap_region(U3, zap_2m_regions)


@kernel
def zap_stage2(m, root, gfn, end):
    """Drop every stage-2 leaf that overlaps [gfn, end): how many. Tables stay, a huge leaf goes whole.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_zap_leafs(). The caller flushes if any was dropped.
    """
    f = stage2_format(m)
    ram = m.ram
    cleared = np.int64(0)
    while gfn < end:
        entry = ram[(root >> U3) + index_at(gfn, U4)]
        if not is_present(m.state, f, entry):
            gfn = min(end, ((gfn >> U27) + U1) << U27)
            continue
        stop = min(end, ((gfn >> U18) + U1) << U18)
        cleared += zap_1g_region(m, f, table_of(m.state, f, entry) + index_at(gfn, U3), gfn, stop)
        gfn = stop
    return cleared


@outlined
def zap_mirror(m, root, gfn, end):
    """The same below a mirror root: no leaf may cross the border, split_cross_boundary_leafs() was there."""
    return np.int64(zap_stage2(m, root, gfn, end))


@kernel
def zap_chosen_roots(m, row, gfn, end, kinds):
    """zap_roots() of any VM: with one root the filter says nothing."""
    root = m.state[row + V_ROOT]
    private = m.state[row + V_PRIVATE_ROOT]
    if private == root:
        return zap_stage2(m, root, gfn, end)
    dropped = np.int64(0)
    if kinds & FILTER_SHARED != U0:
        dropped += zap_stage2(m, root, gfn, end)
    if kinds & FILTER_PRIVATE != U0:
        dropped += zap_mirror(m, private, gfn, end)
    return dropped


@kernel
def zap_only_root(m, row, gfn, end, kinds):
    """The same in the fast loops, which know no VM with two."""
    return zap_stage2(m, m.state[row + V_ROOT], gfn, end)


# Drop the leaves of a VM (`row` of V_*) over guest frames [gfn, end) from the roots that the filter names: how many.
# arch/x86/kvm/mmu/tdp_mmu.c:kvm_tdp_mmu_unmap_gfn_range(), tdp_mmu.h:kvm_gfn_range_filter_to_root_types()
zap_roots = full_only(zap_chosen_roots, zap_only_root)
