"""KVM's stage-2 tables as the TDP MMU keeps them: entries, mapping, splitting, write protection, collapse.

arch/x86/kvm/mmu/tdp_mmu.c and spte.c. Levels: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G. What the formats differ in (which
bit allows a write, which marks an entry writable, which lets it be fetched from) stands in the format's row.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12, U511, U512, index_at, pages_of
from pgemu_kernels.engine.charge import (
    SPTE_WRITTEN,
    STAGE2_LEAVES,
    STAGE2_TABLES,
    TLB_FLUSH_VM,
    change_value,
    charge,
    charge_one,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import broken
from pgemu_kernels.folios.folio import mark_accessed
from pgemu_kernels.stage2.leaves import count_below, free_stage2_below
from pgemu_kernels.tables.walker import is_large, is_present, new_table, stage2_format, table_of
from pgemu_kernels.words.operations import ENOMEM, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_SPURIOUS, Broken, Flag
from pgemu_kernels.words.registers import R_MARKS_ZAPPED, R_RECOVER_HUGE
from pgemu_kernels.words.table_words import (
    F_ACCESSED,
    F_ADDRESS,
    F_DIRTY,
    F_EMPTY,
    F_EXECUTE,
    F_LARGE,
    F_LEAF_2M,
    F_LEAF_4K,
    F_MEMORY_TYPE,
    F_MMIO_GUARD,
    F_MMIO_VALUE,
    F_WRITABLE_MARKS,
    F_WRITE,
)

U = np.uint64
WRITE = U(Flag.WRITE)
EXEC = U(Flag.EXEC)
_WRONG_PFN = U(Broken.WRONG_PFN)
_TOP = U4
_LARGEST = U3

# Bit 31 of a table page's count of leaves: made for a fetch under the NX-hugepage mitigation
# (kvm_mmu_page.nx_huge_page_disallowed), so that no later fault puts a leaf in its place.
NX_DISALLOWED = U(1 << 31)

_GENERATION_LOW = U(0xFF << 3)  # MMIO_SPTE_GEN_LOW_MASK
_GENERATION_HIGH = U(0x7FF << 52)


# --------------------------------------------------------------------------- entries


@kernel
def is_leaf(state, f, entry, level):
    """Whether a present entry is a leaf."""
    return level == U1 or (level <= _LARGEST and is_large(state, f, entry))


@kernel
def is_table(state, f, entry, level):
    return is_present(state, f, entry) and not is_leaf(state, f, entry, level)


@kernel
def nx_huge_pages(state, f):
    """Whether the iTLB-multihit mitigation is on: large leaves are not executable, small ones are."""
    need = state[f + F_EXECUTE]
    return state[f + F_LEAF_2M] & need != need


@kernel
def is_access_allowed(state, f, entry, access):
    """spte.h:is_access_allowed() of a present leaf; `access` has Flag.WRITE and Flag.EXEC, reads always are."""
    if access & WRITE != U0:
        return entry & state[f + F_WRITE] != U0
    need = state[f + F_EXECUTE]
    return access & EXEC == U0 or entry & need == need


@kernel
def make_spte(state, f, level, pfn, writable, prefetch, device):
    """spte.c:make_spte(): a leaf; dirty goes with writable, accessed is clear if nobody has used it yet."""
    value = state[f + F_LEAF_4K + level - U1]
    if not writable:
        value &= ~(state[f + F_WRITE] | state[f + F_WRITABLE_MARKS] | state[f + F_DIRTY])
    if prefetch:
        value &= ~state[f + F_ACCESSED]
    if device:
        value &= ~state[f + F_MEMORY_TYPE]
    return value | (pfn & ~(pages_of(level) - U1)) << U12


@kernel
def make_mmio_spte(state, f, gfn, generation):
    """spte.c:make_mmio_spte(): guest frame and generation of the slots, in an entry that no hardware accepts."""
    address = gfn << U12
    guard = state[f + F_MMIO_GUARD]
    low = generation << U3 & _GENERATION_LOW
    high = generation << U(44) & _GENERATION_HIGH
    return state[f + F_MMIO_VALUE] | low | high | address | guard | (address & guard) << U(5)


@kernel
def last_spte(m, f, root, gfn):
    """Walk to the last entry on the way to a guest frame: (its slot, its level, the entry), present or not."""
    slot = (root >> U3) + index_at(gfn, _TOP)
    level = _TOP
    entry = m.ram[slot]
    while is_table(m.state, f, entry, level):
        level -= U1
        slot = table_of(m.state, f, entry) + index_at(gfn, level)
        entry = m.ram[slot]
    return slot, level, entry


@kernel
def mark_dropped(m, f, entry):
    """6.12's tdp_mmu.c:handle_changed_spte(): the page of an accessed leaf that goes or is split counts as accessed."""
    state = m.state
    if state[R_MARKS_ZAPPED] != U0 and entry & state[f + F_ACCESSED] != U0:
        mark_accessed(m, (entry & state[f + F_ADDRESS]) >> U12)


@outlined
def mark_range(m, root, gfn, end):
    """The leaves over guest frames [gfn, end) are about to go because the host's mapping does: mark_dropped() of each.

    Leaves that go with a slot or a whole tree are not marked here, which 6.12 does, too.
    """
    f = stage2_format(m)
    while m.state[R_MARKS_ZAPPED] != U0 and gfn < end:
        _, level, entry = last_spte(m, f, root, gfn)
        if is_present(m.state, f, entry):
            mark_dropped(m, f, entry)
        gfn = (gfn & ~(pages_of(level) - U1)) + pages_of(level)


# --------------------------------------------------------------------------- splitting


@outlined
def split_leaf(m, f, slot, level):
    """Replace a leaf of level 2 or 3 by a table of 512 leaves with its flags: the table, or NONE without memory.

    tdp_mmu.c:tdp_mmu_split_huge_page(), spte.c:make_small_spte(). No flush: the translations stay the same. A 4K
    leaf may be fetched from even where the mitigation forbade it for the large one.
    """
    state = m.state
    child = m.ram[slot]
    table = new_table(m, f, slot, STAGE2_TABLES)
    if table == NONE:
        return NONE
    mark_dropped(m, f, child)
    if level == U2:
        child &= ~state[f + F_LARGE]
        if nx_huge_pages(state, f):
            child |= state[f + F_EXECUTE]
        count_below(m.counts, slot & ~U511, 511)  # the leaf was one of those below its level-2 table
    size = pages_of(level - U1) << U12
    for i in range(U512):
        m.ram[table + i] = child + i * size
    m.counts[table >> U9] = np.uint32(512)
    change_value(m.stats, STAGE2_LEAVES + level - U1, -1)
    change_value(m.stats, STAGE2_LEAVES + level - U2, 512)
    charge(m, SPTE_WRITTEN, 512)
    return table


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


# --------------------------------------------------------------------------- mapping


@kernel
def table_below(m, f, slot, level, disallowed):
    """The table below `slot`, an entry of `level`: there, linked, or made by splitting a leaf; NONE without memory."""
    entry = m.ram[slot]
    if is_table(m.state, f, entry, level):
        return table_of(m.state, f, entry)
    if is_present(m.state, f, entry):
        table = split_leaf(m, f, slot, level)
    else:
        table = new_table(m, f, slot, STAGE2_TABLES)
    if disallowed and table != NONE:
        m.counts[table >> U9] = np.uint32(U(m.counts[table >> U9]) | NX_DISALLOWED)
    return table


@kernel
def must_step_down(m, f, entry, level):
    """mmu.c:disallowed_hugepage_adjust(): a fetch made the table here, and no large leaf may replace it."""
    if level == U1 or not is_table(m.state, f, entry, level):
        return False
    return U(m.counts[table_of(m.state, f, entry) >> U9]) & NX_DISALLOWED != U0


@outlined
def slot_for(m, f, root, gfn, goal, disallowed):
    """Go down to the entry of level `goal` (or below, where a fetch wants it so), tables linked and leaves split on
    the way: (slot, level, slot of the level-2 entry above or on it); the slot is NONE without memory."""
    restricted = nx_huge_pages(m.state, f)
    table = root >> U3
    level = _TOP
    middle = NONE
    while True:
        slot = table + index_at(gfn, level)
        if level == U2:
            middle = slot
        if level == goal and restricted and must_step_down(m, f, m.ram[slot], level):
            goal -= U1
        if level == goal:
            return slot, level, middle
        table = table_below(m, f, slot, level, disallowed)
        if table == NONE:
            return NONE, level, middle
        level -= U1


@kernel
def count_leaf(m, slot, level, middle, n):
    """Add `n` (int64) to the leaves counted below the tables over an entry: its own of level 1 and that of level 2."""
    if level == U1:
        count_below(m.counts, slot & ~U511, n)
    if level <= U2:
        count_below(m.counts, middle & ~U511, n)


@outlined
def map_leaf(m, root, gfn, goal, pfn, writable, access, prefetch, device):
    """tdp_mmu.c:kvm_tdp_mmu_map(): (RET_PF_FIXED, RET_PF_SPURIOUS or -ENOMEM; level of the leaf).

    gfn, pfn: of the 4K page accessed. goal: level wanted, 1 to 3; a table there is torn down, a leaf above is split.
    writable: of host and slot. access: Flag.WRITE, Flag.EXEC. prefetch: nobody waits for the page. device: no RAM.
    """
    f = stage2_format(m)
    state = m.state
    disallowed = access & EXEC != U0 and nx_huge_pages(state, f)
    slot, level, middle = slot_for(m, f, root, gfn, goal, disallowed)
    if slot == NONE:
        return np.int64(-ENOMEM), level
    old = m.ram[slot]
    value = make_spte(state, f, level, pfn, writable, prefetch, device)
    if is_table(state, f, old, level):
        dropped = free_stage2_below(m, f, old, level)
        if level == U2:
            count_below(m.counts, slot & ~U511, -dropped)
        charge_one(m, TLB_FLUSH_VM)
    elif is_present(state, f, old):
        if (old ^ value) & state[f + F_ADDRESS] != U0:
            broken(state, _WRONG_PFN, gfn)  # a BUG in Linux: nobody told KVM that the host's frame changed
        if prefetch or value == old or is_access_allowed(state, f, old, access):
            return np.int64(RET_PF_SPURIOUS), level
        m.ram[slot] = value
        charge_one(m, SPTE_WRITTEN)
        return np.int64(RET_PF_FIXED), level
    m.ram[slot] = value
    count_leaf(m, slot, level, middle, 1)
    change_value(m.stats, STAGE2_LEAVES + level - U1, 1)
    charge_one(m, SPTE_WRITTEN)
    return np.int64(RET_PF_FIXED), level


@outlined
def map_mmio(m, root, gfn, generation):
    """Cache that a guest frame has no slot, in a 4K entry: RET_PF_EMULATE, or -ENOMEM for want of a table."""
    f = stage2_format(m)
    slot, _, _ = slot_for(m, f, root, gfn, U1, False)
    if slot == NONE:
        return np.int64(-ENOMEM)
    if not is_present(m.state, f, m.ram[slot]):
        m.ram[slot] = make_mmio_spte(m.state, f, gfn, generation)
        charge_one(m, SPTE_WRITTEN)
    return np.int64(RET_PF_EMULATE)


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
    charge(m, SPTE_WRITTEN, changed)
    return changed


@kernel
def write_protect_page(m, f, root, gfn):
    """tdp_mmu.c:clear_dirty_pt_masked() of one page: only a 4K leaf."""
    slot, level, entry = last_spte(m, f, root, gfn)
    if level == U1 and is_present(m.state, f, entry) and entry & m.state[f + F_WRITE] != U0:
        m.ram[slot] = entry & ~m.state[f + F_WRITE]
        charge_one(m, SPTE_WRITTEN)


@kernel
def first_leaf(m, f, entry, level):
    """The first leaf below a table entry, level by level, or 0 if there is none."""
    table = table_of(m.state, f, entry)
    for i in range(table, table + U512):
        below = m.ram[i]
        if not is_present(m.state, f, below):
            continue
        if is_leaf(m.state, f, below, level - U1):
            return below
        small = table_of(m.state, f, below)
        for k in range(small, small + U512):
            if is_present(m.state, f, m.ram[k]):
                return m.ram[k]
    return U0


@kernel
def make_huge_spte(state, f, entry, level):
    """spte.c:make_huge_spte(): a leaf with the flags and the address of a small one; never executable if mitigated."""
    value = (entry | state[f + F_LARGE]) & ~((pages_of(level) - U1) << U12)
    if nx_huge_pages(state, f):
        value &= ~state[f + F_EXECUTE]
    return value


@outlined
def collapse(m, f, slot, level):
    """Replace the table below `slot` by one leaf, or (R_RECOVER_HUGE = 0) drop it all: 1 if it went, else 0.

    Up to 6.12: tdp_mmu.c:zap_collapsible_spte_range(), the next access maps the large leaf. Later:
    recover_huge_pages_range(), the flags are those of the first leaf below; a table without any stays. One flush for
    each table that goes, in either (KVM's counter in the captures).
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
        change_value(m.stats, STAGE2_LEAVES + level - U1, 1)
        charge_one(m, SPTE_WRITTEN)
    charge_one(m, TLB_FLUSH_VM)
    if level == U2:
        count_below(m.counts, slot & ~U511, gained - dropped)
    return np.int64(1)


# --------------------------------------------------------------------------- accesses of the hardware


@kernel
def set_accessed_dirty(m, f, slot, entry, access):
    """Store a leaf with what the processor sets in it when an access succeeds."""
    value = entry | m.state[f + F_ACCESSED]
    if access & WRITE != U0:
        value |= m.state[f + F_DIRTY]
    if value != m.ram[slot]:
        m.ram[slot] = value
