"""What KVM does to a whole range of stage-2 leaves: split, write-protect, collapse; and what the processor marks.

arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U511, U512
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.stage2.entries import is_last_spte, last_spte, make_huge_spte
from pgemu_kernels.stage2.leaves import count_below, free_stage2_below, mark_dropped, split_leaf
from pgemu_kernels.tables.walker import is_present, stage2_format, table_of
from pgemu_kernels.words.enum_words import EVENT_SPTE_WRITTEN, EVENT_TLB_FLUSH_VM, FLAG_WRITE, GAUGE_STAGE2_LEAVES_4K
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import R_MARKS_ZAPPED, R_RECOVER_HUGE
from pgemu_kernels.words.table_words import F_ACCESSED, F_DIRTY, F_EMPTY, F_WRITE


@outlined
def mark_range(m, root, gfn, end):
    """The leaves over guest frames [gfn, end) are about to go, with the host's mapping, a slot or the whole tree:
    mark_dropped() of each."""
    if m.state[R_MARKS_ZAPPED] == U0:
        return
    f = stage2_format(m)
    while gfn < end:
        _, level, entry = last_spte(m, f, root, gfn)
        if is_present(m.state, f, entry):
            mark_dropped(m, f, entry)
        gfn = (gfn & ~(pages_of(level) - U1)) + pages_of(level)


# --------------------------------------------------------------------------- splitting


@outlined
def split_range(m, root, gfn, end):
    """Split every large leaf over guest frames [gfn, end) down to 4K: 0, or -ENOMEM with the rest left large.

    tdp_mmu.c:kvm_tdp_mmu_try_split_huge_pages().
    """
    f = stage2_format(m)
    while gfn < end:
        slot, level, entry = last_spte(m, f, root, gfn)
        if level > U1 and is_present(m.state, f, entry):
            if split_leaf(m, f, slot, level) == NONE:
                return np.int64(-ENOMEM)
        else:
            gfn = (gfn & ~(pages_of(max(level, U2)) - U1)) + pages_of(max(level, U2))
    return np.int64(0)


# --------------------------------------------------------------------------- dirty logging


@outlined
def write_protect_range(m, root, gfn, end):
    """Take the write permission from every leaf over guest frames [gfn, end): how many had it.

    tdp_mmu.c:kvm_tdp_mmu_wrprot_slot(). The marks stay: the page can be made writable again without the host.
    """
    f = stage2_format(m)
    bit = m.state[f + F_WRITE]
    changed = np.int64(0)
    while gfn < end:
        slot, level, entry = last_spte(m, f, root, gfn)
        last = min(end, (gfn & ~(pages_of(max(level, U2)) - U1)) + pages_of(max(level, U2)))
        entries = last - gfn if level == U1 else U1
        for i in range(slot, slot + entries):
            entry = m.ram[i]
            if is_present(m.state, f, entry) and entry & bit != U0:
                m.ram[i] = entry & ~bit
                changed += 1
        gfn = last
    charge(m, EVENT_SPTE_WRITTEN, changed)
    return changed


@kernel
def write_protect_page(m, f, root, gfn):
    """tdp_mmu.c:clear_dirty_pt_masked() of one page: only a 4K leaf."""
    slot, level, entry = last_spte(m, f, root, gfn)
    if level == U1 and is_present(m.state, f, entry) and entry & m.state[f + F_WRITE] != U0:
        m.ram[slot] = entry & ~m.state[f + F_WRITE]
        charge_one(m, EVENT_SPTE_WRITTEN)


@kernel
def first_leaf(m, f, entry, level):
    """The first leaf below a table entry, level by level, or 0 if there is none."""
    table = table_of(m.state, f, entry)
    for i in range(table, table + U512):
        below = m.ram[i]
        if not is_present(m.state, f, below):
            continue
        if is_last_spte(m.state, f, below, level - U1):
            return below
        small = table_of(m.state, f, below)
        for k in range(small, small + U512):
            if is_present(m.state, f, m.ram[k]):
                return m.ram[k]
    return U0


@outlined
def collapse(m, f, slot, level):
    """Replace the table below `slot` by one leaf, or (R_RECOVER_HUGE = 0) drop it all: 1 if it went, else 0.

    Up to 6.12: tdp_mmu.c:zap_collapsible_spte_range(), the next access maps the large leaf. Later:
    recover_huge_pages_range(), the flags are those of the first leaf below; a table without any stays. Up to 6.12 each
    table that goes is flushed by itself, later all of a slot together: the caller's (KVM's counter in the captures).
    """
    state = m.state
    entry = m.ram[slot]
    value = state[f + F_EMPTY]
    recover = state[R_RECOVER_HUGE] != U0
    if recover:
        small = first_leaf(m, f, entry, level)
        if small == U0:
            return np.int64(0)
        value = make_huge_spte(state, f, small, level)
    dropped = free_stage2_below(m, f, entry, level)
    m.ram[slot] = value
    gained = np.int64(0)
    if recover:
        gained += 1
        change_value(m.stats, GAUGE_STAGE2_LEAVES_4K + level - U1, 1)
        charge_one(m, EVENT_SPTE_WRITTEN)
    else:
        charge_one(m, EVENT_TLB_FLUSH_VM)
    if level == U2:
        count_below(m.counts, slot & ~U511, gained - dropped)
    return np.int64(1)


# --------------------------------------------------------------------------- accesses of the hardware


@kernel
def set_accessed_dirty(m, f, slot, entry, access):
    """Store a leaf with what the processor sets in it when an access succeeds."""
    value = entry | m.state[f + F_ACCESSED]
    if access & FLAG_WRITE != U0:
        value |= m.state[f + F_DIRTY]
    if value != m.ram[slot]:
        m.ram[slot] = value
