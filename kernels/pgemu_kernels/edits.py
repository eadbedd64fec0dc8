"""Edits of one page table of any format: map, unmap, protect, clear accessed and dirty, split, collapse, store.

Each edit is charged, notes what must be flushed, and can write down every entry it reads and writes. What Linux does
differently for processes, KVM on x86 and KVM on Arm follows from the format's data: its flush rule (F_FLUSH), its
frozen value and F_BREAK_BEFORE_MAKE. Within a tree `counts` holds the present entries of each table by its frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgemu_kernels import layout
from pgemu_kernels.bits import ALL, NONE, U0, U1, U2, U3, U8, U9, U12, U511, U512, U4095
from pgemu_kernels.compile import entry, kernel, outlined
from pgemu_kernels.events import (
    LEAF_CLEARED,
    LEAF_WRITTEN,
    SPTE_CLEARED,
    SPTE_WRITTEN,
    TABLE_PAGE_ALLOCATED,
    TABLE_PAGE_FREED,
    TLB_FLUSH_MM,
    TLB_FLUSH_PAGE,
    TLB_FLUSH_RANGE,
    TLB_FLUSH_VM,
    charge,
    charge_one,
)
from pgemu_kernels.handle import Words, open_machine
from pgemu_kernels.layout import (
    E_CHANGED,
    E_CLEAR,
    E_CLEARED,
    E_CURSOR,
    E_CURSOR_END,
    E_FLAGS,
    E_FLUSH_START,
    E_FORMAT,
    E_FOUND,
    E_FREED,
    E_FREED_LIST,
    E_LENGTH,
    E_LEVEL,
    E_OFFSET,
    E_OP,
    E_PENDING_END,
    E_PENDING_LEVEL,
    E_PENDING_START,
    E_RECORDS,
    E_ROOT,
    E_SET,
    E_WRITTEN,
    EDIT_EXACT,
    EDIT_FREE,
    EDIT_FREE_COVERED,
    EDIT_REPLACE,
    EDIT_SPLIT,
    F_ACCESSED,
    F_ADDRESS,
    F_BAD_LOW,
    F_BAD_MEMORY_TYPE,
    F_BREAK_BEFORE_MAKE,
    F_BREAK_BITS,
    F_DIRTY,
    F_EMPTY,
    F_FLUSH,
    F_FROZEN,
    F_INPUT_BITS,
    F_LARGEST_LEAF,
    F_LEAF_2M,
    F_LEAF_4K,
    F_LEAF_MASK,
    F_LEAF_VALUE,
    F_LEVELS,
    F_PAGE_MASK,
    F_PAGE_VALUE,
    F_PAT_LARGE,
    F_PAT_PAGE,
    F_PRESENT,
    F_RANGE_FLUSH,
    F_RESERVED_LEAF,
    F_ROOT_BITS,
    F_SIGN_EXTENDED,
    F_SOFTWARE,
    F_TABLE,
    F_TABLE_TOP,
    R_COUNTER_ROW,
    STATS_COUNTERS,
)
from pgemu_kernels.memory import fill_frame, frames_left, put_frame, put_run, take_frame, take_run
from pgemu_kernels.page_format import FlushRule
from pgemu_kernels.paging import format_row, is_present, table_of

U = np.uint64
U4 = U(4)
U7 = U(7)
LOG_WORDS = U(layout.LOG_WORDS)
FULL_FLUSH_PAGES = U(33)  # arch/x86/mm/tlb.c:tlb_single_page_flush_ceiling

CREATE = U(layout.Edit.CREATE)
DESTROY = U(layout.Edit.DESTROY)
MAP = U(layout.Edit.MAP)
UNMAP = U(layout.Edit.UNMAP)
PROTECT = U(layout.Edit.PROTECT)
CLEAR_ACCESSED = U(layout.Edit.CLEAR_ACCESSED)
CLEAR_DIRTY = U(layout.Edit.CLEAR_DIRTY)
SPLIT = U(layout.Edit.SPLIT)
COLLAPSE = U(layout.Edit.COLLAPSE)
FREE_TABLES = U(layout.Edit.FREE_TABLES)
STORE = U(layout.Edit.STORE)

READ = U(layout.LogKind.READ)
WRITE = U(layout.LogKind.WRITE)
FLUSH = U(layout.LogKind.FLUSH)
FLUSH_ALL = U(layout.LogKind.FLUSH_ALL)
FILL = U(layout.LogKind.FILL)
FREE = U(layout.LogKind.FREE)

PROCESS = U(FlushRule.PROCESS)
WHOLE_VM = U(FlushRule.WHOLE_VM)

DONE = np.int64(0)
NO_ENTRY = np.int64(-layout.ENOENT)
TRY_AGAIN = np.int64(-layout.EAGAIN)
NO_MEMORY = np.int64(-layout.ENOMEM)
BUSY = np.int64(-layout.EBUSY)
EXISTS = np.int64(-layout.EEXIST)
INVALID = np.int64(-layout.EINVAL)
OUT_OF_RANGE = np.int64(-layout.ERANGE)
NOT_SUPPORTED = np.int64(-layout.EOPNOTSUPP)


class Tree(NamedTuple):
    """The machine's arrays with the request and the log of an edit, so that functions take one argument."""

    ram: Words
    state: Words
    stats: Words
    counts: Words
    request: Words  # uint64[E_WORDS]
    log: Words  # uint64, LOG_WORDS a record; empty: nothing is written down


# --------------------------------------------------------------------------- the log


@outlined
def record(e, kind, level, address, value):
    """Write down one record if there is room; the count goes on, so that the caller knows what was missing."""
    at = e.request[E_RECORDS] * LOG_WORDS
    if at + LOG_WORDS <= U(e.log.size):
        e.log[at] = kind | level << U8
        e.log[at + U1] = address
        e.log[at + U2] = value
    e.request[E_RECORDS] += U1


@kernel
def logged(e):
    return e.log.size != 0


@kernel
def load(e, slot, level):
    """The entry at `slot`, an index in `ram`."""
    value = e.ram[slot]
    if logged(e):
        record(e, READ, level, slot << U3, value)
    return value


@kernel
def store(e, slot, level, value):
    e.ram[slot] = value
    if logged(e):
        record(e, WRITE, level, slot << U3, value)


# --------------------------------------------------------------------------- addresses and entries


@kernel
def size_of(level):
    """Bytes that an entry of a level maps."""
    return U1 << (U12 + U9 * (level - U1))


@kernel
def is_leaf(state, f, level, value):
    """Whether a present entry is a leaf."""
    if level == U1:
        return True
    return level <= state[f + F_LARGEST_LEAF] and value & state[f + F_LEAF_MASK] == state[f + F_LEAF_VALUE]


@kernel
def is_frozen(state, f, value):
    """Whether somebody is changing this entry: KVM's frozen value, Arm's locked one."""
    return state[f + F_FROZEN] != U0 and value == state[f + F_FROZEN]


@kernel
def breaks(state, f):
    return state[f + F_BREAK_BEFORE_MAKE] != U0


@kernel
def is_process(state, f):
    return state[f + F_FLUSH] == PROCESS


@kernel
def sticky_bits(state, f):
    """Bits that the hardware sets by itself. Arm's dirty bit is the right to write, so it is none of them."""
    if breaks(state, f):
        return state[f + F_ACCESSED]
    return state[f + F_ACCESSED] | state[f + F_DIRTY]


@kernel
def leaf_address(state, f, level, value):
    return value & state[f + F_ADDRESS] & ~(size_of(level) - U1)


@kernel
def attributes(state, f, level, value):
    """A leaf without its address."""
    if level == U1:
        return value & ~state[f + F_ADDRESS]
    return value & ~(state[f + F_ADDRESS] & ~state[f + F_PAT_LARGE])


@kernel
def page_only(state, f):
    """Bits that a 4K leaf has and a larger one has not: Arm's page type, execute under the NX mitigation."""
    return state[f + F_LEAF_4K] & ~state[f + F_LEAF_2M]


@kernel
def large_only(state, f):
    return state[f + F_LEAF_2M] & ~state[f + F_LEAF_4K]


@kernel
def moved_mask(state, f, level, bits):
    """Bits of a 4K leaf as a leaf of `level` has them, without those that tell the two apart."""
    if level == U1:
        return bits
    pat = state[f + F_PAT_PAGE]
    moved = bits & ~(pat | page_only(state, f))
    if bits & pat != U0:
        moved |= state[f + F_PAT_LARGE]
    return moved


@kernel
def leaf_attributes(state, f, level, bits):
    """Attributes of a leaf of `level` from those of a 4K leaf.

    x86: pgprot_4k_2_large() moves PAT from bit 7 to 12; KVM: make_huge_spte(); Arm: a block's type.
    """
    if level == U1:
        return bits
    return moved_mask(state, f, level, bits) | large_only(state, f)


@kernel
def child_attributes(state, f, level, bits):
    """Attributes of a child of `level` from those of a larger leaf: make_small_spte(), pgprot_large_2_4k()."""
    if level != U1:
        return bits
    child = bits & ~(large_only(state, f) | state[f + F_PAT_LARGE]) | page_only(state, f)
    if bits & state[f + F_PAT_LARGE] != U0:
        child |= state[f + F_PAT_PAGE]
    return child


@kernel
def well_formed(state, f, level, value):
    """Whether a walk takes the value for a present leaf of this level that is neither reserved nor misconfigured."""
    if not is_present(state, f, value) or not is_leaf(state, f, level, value):
        return False
    if level == U1 and value & state[f + F_PAGE_MASK] != state[f + F_PAGE_VALUE]:
        return False
    return (
        value & state[f + F_RESERVED_LEAF + level] == U0
        and state[f + F_BAD_LOW] >> (value & U7) & U1 == U0
        and state[f + F_BAD_MEMORY_TYPE] >> (value >> U3 & U7) & U1 == U0
    )


@kernel
def needs_flush(state, f, old, new):
    """Whether a TLB may hold `old` to harm: not if only software bits changed or the hardware's bits were set.

    arch/x86/include/asm/tlbflush.h:pte_flags_need_flush().
    """
    return (old ^ new) & ~state[f + F_SOFTWARE] & ~(new & sticky_bits(state, f)) != U0


@outlined
def find(e, f, address, target):
    """Walk to the entry over `address` at level `target`, or to the leaf or hole above it: slot, level, entry."""
    state = e.state
    level = state[f + F_LEVELS]
    slot = (e.request[E_ROOT] >> U3) + (address >> (U3 + U9 * level))
    value = load(e, slot, level)
    while level > target and is_present(state, f, value) and not is_leaf(state, f, level, value):
        level -= U1
        slot = table_of(state, f, value) + (address >> (U3 + U9 * level) & U511)
        value = load(e, slot, level)
    return slot, level, value


@kernel
def count_entry(e, slot, n):
    """Add `n` (uint64) to the present entries of the table that `slot` is in."""
    frame = slot >> U9
    e.counts[frame] = np.uint32(U(e.counts[frame]) + n)


# --------------------------------------------------------------------------- flushes


@kernel
def sign_extended(state, f, address):
    bits = state[f + F_INPUT_BITS]
    if state[f + F_SIGN_EXTENDED] != U0 and address >> (bits - U1) & U1 != U0:
        return address | ALL << bits
    return address


@kernel
def note(e, word, start, end, level):
    """Widen the range kept in three words of the request from `word` on."""
    request = e.request
    if request[word + U1] == U0:
        request[word] = start
        request[word + U1] = end
        request[word + U2] = level
        return
    request[word] = min(request[word], start)
    request[word + U1] = max(request[word + U1], end)
    request[word + U2] = min(request[word + U2], level)


@kernel
def owe_flush(e, start, end, level):
    """Leave a range to the flush at the end of the edit."""
    note(e, E_PENDING_START, start, end, level)


@outlined
def flush(e, f, start, end, level):
    """Flush a range at once by the format's rule, charge it, and add it to what the edit reports.

    arch/x86/mm/tlb.c:get_flush_tlb_info(); virt/kvm/kvm_main.c:kvm_flush_remote_tlbs_range(), which x86 has not;
    arch/arm64/kvm/hyp/vhe/tlb.c.
    """
    state = e.state
    note(e, E_FLUSH_START, start, end, level)
    kind = FLUSH
    rule = state[f + F_FLUSH]
    if rule == PROCESS:
        pages = (end - start) >> (U12 + U9 * (level - U1))
        charge_one(e, TLB_FLUSH_MM)
        if pages > FULL_FLUSH_PAGES:
            kind = FLUSH_ALL
        else:
            charge(e, TLB_FLUSH_PAGE, np.int64(pages))
    elif rule == WHOLE_VM or (end - start > size_of(level) and state[f + F_RANGE_FLUSH] & U1 == U0):
        charge_one(e, TLB_FLUSH_VM)
        kind = FLUSH_ALL
    else:
        charge_one(e, TLB_FLUSH_RANGE)
    if logged(e):
        record(e, kind, level, sign_extended(state, f, start), end - start)


@kernel
def flush_pending(e, f):
    """Flush what the edit left to its end."""
    request = e.request
    if request[E_PENDING_END] != U0:
        flush(e, f, request[E_PENDING_START], request[E_PENDING_END], request[E_PENDING_LEVEL])
        request[E_PENDING_END] = U0


# --------------------------------------------------------------------------- tables


@kernel
def new_table(e):
    """A frame for a table, with whatever it held: its first slot, or NONE."""
    frame = take_frame(e)
    if frame == NONE:
        return NONE
    charge_one(e, TABLE_PAGE_ALLOCATED)
    e.counts[frame] = np.uint32(0)
    return frame << U9


@kernel
def empty_table(e, f):
    """A table of empty entries, or NONE."""
    table = new_table(e)
    if table != NONE:
        value = e.state[f + F_EMPTY]
        fill_frame(e.ram, table >> U9, value)
        if logged(e):
            record(e, FILL, U0, table << U3, value)
    return table


@kernel
def table_entry(state, f, level, table):
    """The entry of `level` that points to a table."""
    bits = state[f + F_TABLE_TOP] if level == state[f + F_LEVELS] else state[f + F_TABLE]
    return table << U3 | bits


@kernel
def release(e, table):
    """Free a table once the flush is done: mmu_gather's table batch, KVM's call_rcu()."""
    frame = table >> U9
    e.counts[frame] = np.uint32(e.request[E_FREED_LIST])
    e.request[E_FREED_LIST] = frame
    e.request[E_FREED] = U1


@outlined
def give_back(e):
    """Give the frames of freed tables back."""
    frame = e.request[E_FREED_LIST]
    while frame != U0:
        following = U(e.counts[frame])
        e.counts[frame] = np.uint32(0)
        if logged(e):
            record(e, FREE, U0, frame << U12, U0)
        put_frame(e, frame)
        charge_one(e, TABLE_PAGE_FREED)
        frame = following
    e.request[E_FREED_LIST] = U0


@outlined
def holds_leaf(e, f, table, level):
    """Whether a table of `level` (1 or 2) or one below it has a leaf."""
    if level == U1 or e.counts[table >> U9] == np.uint32(0):
        return e.counts[table >> U9] != np.uint32(0)
    for slot in range(table, table + U512):
        value = load(e, slot, level)
        if is_present(e.state, f, value):
            if is_leaf(e.state, f, level, value) or e.counts[table_of(e.state, f, value) >> U9] != np.uint32(0):
                return True
    return False


@outlined
def tear_down(e, f, table, level, shared):
    """Drop all entries of a table that nothing points to any more, and free the tables below it, not itself.

    arch/x86/kvm/mmu/tdp_mmu.c:handle_removed_pt(): each entry is frozen, the absent ones only if other CPUs may
    be at work (`shared`: mmu_lock is held for read). Other formats leave the entries as they are.
    """
    request = e.request
    state = e.state
    frozen = state[f + F_FROZEN]
    freezes = frozen != U0 and not breaks(state, f)
    top = level
    request[E_CURSOR + level] = table
    request[E_CURSOR_END + level] = table + U512
    while True:
        slot = request[E_CURSOR + level]
        if slot == request[E_CURSOR_END + level]:
            if level == top:
                return
            release(e, slot - U512)
            level += U1
            continue
        request[E_CURSOR + level] = slot + U1
        value = load(e, slot, level)
        if is_present(state, f, value):
            if freezes:
                store(e, slot, level, frozen)
            if is_leaf(state, f, level, value):
                request[E_CLEARED] += U1
            else:
                level -= U1
                below = table_of(state, f, value)
                request[E_CURSOR + level] = below
                request[E_CURSOR_END + level] = below + U512
        elif freezes and shared:
            store(e, slot, level, frozen)


@outlined
def swap(e, f, slot, level, new, interim, base, reshaped):
    """Replace the present entry at `slot`, which maps from `base` on, by the present entry `new`.

    `reshaped`: a leaf takes the place of a table or a table that of a leaf. Arm: break before make
    (arch/arm64/kvm/hyp/pgtable.c:stage2_try_break_pte(), stage2_make_pte()). A process: not present (`interim`),
    flush, then the new entry where the address or the shape changes (pmdp_invalidate(), ptep_clear_flush()); for
    permissions alone an exchange (ptep_modify_prot_start()) whose flush can wait. KVM on x86: one write.
    """
    state = e.state
    old = e.ram[slot]
    end = base + size_of(level)
    # Page by page where a table goes, as flush_tlb_range() and kvm_tlb_flush_vmid_range() are called for it.
    stride = level if is_leaf(state, f, level, old) else U1
    if breaks(state, f):
        if reshaped or (old ^ new) & state[f + F_BREAK_BITS] != U0:
            store(e, slot, level, state[f + F_FROZEN])
            flush(e, f, base, end, stride)
            store(e, slot, level, new)
            return
    elif is_process(state, f):
        store(e, slot, level, interim)
        if reshaped or (old ^ new) & state[f + F_ADDRESS] != U0:
            flush(e, f, base, end, stride)
            store(e, slot, level, new)
            return
    store(e, slot, level, new)
    if needs_flush(state, f, old, new):
        owe_flush(e, base, end, stride)


# --------------------------------------------------------------------------- split and collapse


@kernel
def fill_children(e, table, level, first):
    """Fill a table of `level` with leaves that follow one another from `first` on."""
    size = size_of(level)
    for i in range(U512):
        store(e, table + i, level, first + i * size)
    e.counts[table >> U9] = np.uint32(512)
    e.request[E_WRITTEN] += U512


@outlined
def build_pages(e, f, table, value):
    """Fill a level-2 table with tables of 4K leaves, off line; 512 frames are at hand. `value`: the 1G leaf."""
    state = e.state
    page = leaf_address(state, f, U3, value) | child_attributes(state, f, U1, attributes(state, f, U3, value))
    for i in range(U512):
        below = new_table(e)
        fill_children(e, below, U1, page + i * size_of(U2))
        store(e, table + i, U2, table_entry(state, f, U2, below))
    e.counts[table >> U9] = np.uint32(512)


@outlined
def split_leaf(e, f, slot, level, value, base, target):
    """Put a table of 512 smaller leaves in the place of a leaf: 0 or -ENOMEM.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_split_huge_page(): no flush. mm/huge_memory.c:__split_huge_pmd_locked(): the
    leaf becomes not present and is flushed first. Arm's stage2_split_walker() builds the children off line, down to
    `target` where the memory suffices.
    """
    state = e.state
    deep = breaks(state, f) and level == U3 and target == U1 and frames_left(e) >= U512 + U1
    table = new_table(e)
    if table == NONE:
        return NO_MEMORY
    if deep:
        build_pages(e, f, table, value)
    else:
        child = child_attributes(state, f, level - U1, attributes(state, f, level, value))
        fill_children(e, table, level - U1, leaf_address(state, f, level, value) | child)
    new = table_entry(state, f, level, table)
    if state[f + F_FLUSH] == WHOLE_VM:
        store(e, slot, level, new)
    else:
        swap(e, f, slot, level, new, value & ~state[f + F_PRESENT], base, True)
    return DONE


@kernel
def uniform_children(e, f, table, level):
    """The leaf that 512 leaves of `level` add up to, as an entry of theirs, or NONE.

    They must lie one after the other, aligned, and be alike but for the bits that the hardware sets, which are
    OR-ed so that none is lost. (KVM's make_huge_spte() takes those of the first child.)
    """
    state = e.state
    sticky = sticky_bits(state, f)
    first = load(e, table, level)
    merged = first
    if leaf_address(state, f, level, first) & (size_of(level + U1) - U1) != U0:
        return NONE
    for i in range(U512):
        value = first if i == U0 else load(e, table + i, level)
        if not is_present(state, f, value) or not is_leaf(state, f, level, value):
            return NONE
        if (value ^ (first + i * size_of(level))) & ~sticky != U0:
            return NONE
        merged |= value & sticky
    return merged


@outlined
def collapse(e, f, address, level):
    """Put one leaf in the place of the table of 512 at `address`: 0, -ENOENT (no table), or -EINVAL (not alike)."""
    state = e.state
    slot, at, old = find(e, f, address, level)
    if not is_present(state, f, old):
        return NO_ENTRY
    if at != level or is_leaf(state, f, at, old):
        return INVALID
    table = table_of(state, f, old)
    if e.counts[table >> U9] != np.uint32(512):
        return INVALID
    merged = uniform_children(e, f, table, level - U1)
    if merged == NONE:
        return INVALID
    bits = attributes(state, f, level - U1, merged)
    if level == U2:
        bits = leaf_attributes(state, f, level, bits)
    new = leaf_address(state, f, level - U1, merged) | bits
    if not well_formed(state, f, level, new):
        return INVALID
    replace_table(e, f, slot, level, old, new, address)
    return DONE


@outlined
def replace_table(e, f, slot, level, old, new, base):
    """Put a leaf in the place of a table: kvm_tdp_mmu_map(), stage2_map_walk_table_pre(). The old tables are freed."""
    swap(e, f, slot, level, new, e.state[f + F_EMPTY], base, True)
    table = table_of(e.state, f, old)
    tear_down(e, f, table, level - U1, True)
    release(e, table)
    e.request[E_WRITTEN] += U1


# --------------------------------------------------------------------------- map


@outlined
def displace(e, f, slot, level, new, base):
    """Write the leaf `new` where an entry is: 0, -EEXIST, or -EAGAIN for a frozen one.

    Tables without leaves are no obstacle: drivers/iommu/generic_pt/iommu_pt.h drops them, too; for processes and
    Arm that is inference.
    """
    state = e.state
    old = e.ram[slot]
    if is_frozen(state, f, old):
        return TRY_AGAIN
    if is_leaf(state, f, level, old):
        if e.request[E_FLAGS] & EDIT_REPLACE == U0:
            return EXISTS
        if old != new:
            swap(e, f, slot, level, new, state[f + F_EMPTY], base, False)
            e.request[E_WRITTEN] += U1
        return DONE
    if e.request[E_FLAGS] & EDIT_REPLACE == U0 and holds_leaf(e, f, table_of(state, f, old), level - U1):
        return EXISTS
    replace_table(e, f, slot, level, old, new, base)
    return DONE


@outlined
def open_leaf(e, f, slot, level, value, base):
    """Make room for smaller leaves where a larger one is: 0 or -ENOMEM.

    Arm puts an empty table there and lets the rest be faulted in again (stage2_map_walk_leaf()).
    """
    if not breaks(e.state, f):
        return split_leaf(e, f, slot, level, value, base, level - U1)
    table = empty_table(e, f)
    if table == NONE:
        return NO_MEMORY
    swap(e, f, slot, level, table_entry(e.state, f, level, table), U0, base, True)
    e.request[E_CLEARED] += U1
    return DONE


@outlined
def link_down(e, f, address, slot, level, value, target):
    """Make the tables from the entry at `slot` down to those of level `target`: status and slot there."""
    state = e.state
    while level > target:
        if is_present(state, f, value):
            if is_leaf(state, f, level, value):
                if e.request[E_FLAGS] & EDIT_REPLACE == U0:
                    return EXISTS, slot
                status = open_leaf(e, f, slot, level, value, address & ~(size_of(level) - U1))
                if status != DONE:
                    return status, slot
        elif is_frozen(state, f, value):
            return TRY_AGAIN, slot
        else:
            table = empty_table(e, f)
            if table == NONE:
                return NO_MEMORY, slot
            store(e, slot, level, table_entry(state, f, level, table))
            count_entry(e, slot, U1)
        table = table_of(state, f, e.ram[slot])
        level -= U1
        slot = table + (address >> (U3 + U9 * level) & U511)
        value = load(e, slot, level)
    return DONE, slot


@kernel
def leaf_level(e, address, physical, length):
    """The largest level that both addresses' alignment and the length allow, up to the request's."""
    level = e.request[E_LEVEL]
    while level > U1 and ((address | physical) & (size_of(level) - U1) != U0 or length < size_of(level)):
        level -= U1
    return level


@outlined
def map_range(e, f, address, end, physical):
    """Map [address, end) to `physical` with the largest leaves: 0 or the first failure."""
    state = e.state
    request = e.request
    while address < end:
        request[E_OFFSET] = address
        level = leaf_level(e, address, physical, end - address)
        size = size_of(level)
        new = physical | leaf_attributes(state, f, level, request[E_SET])
        if not well_formed(state, f, level, new):
            return INVALID
        slot, at, value = find(e, f, address, level)
        if at != level:
            status, slot = link_down(e, f, address, slot, at, value, level)
            if status != DONE:
                return status
            value = e.ram[slot]
        run = min((end - address) >> (U3 + U9 * level), U512 - (slot & U511))
        while True:
            if is_present(state, f, value) or is_frozen(state, f, value):
                status = displace(e, f, slot, level, new, address)
                if status != DONE:
                    return status
            else:
                store(e, slot, level, new)
                count_entry(e, slot, U1)
                request[E_WRITTEN] += U1
            request[E_CHANGED] += U1
            address += size
            request[E_OFFSET] = address
            physical += size
            run -= U1
            if run == U0:
                break
            new += size
            slot += U1
            value = load(e, slot, level)
    return DONE


@kernel
def map_one(e, f, address, physical):
    """Check a request to map, and map: 0 or -errno."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    level = request[E_LEVEL]
    if request[E_FLAGS] & EDIT_EXACT != U0 and (address | physical) & (size_of(level) - U1) != U0:
        return INVALID
    last = physical + length - U1
    # Bits that a leaf may not have end where the physical addresses of this machine end.
    if (physical | last) & (~(state[f + F_ADDRESS] | U4095) | state[f + F_RESERVED_LEAF + U1]) != U0:
        return INVALID
    if physical & U4095 != U0 or last < physical or request[E_SET] & state[f + F_ADDRESS] != U0:
        return INVALID
    return map_range(e, f, address, address + length, physical)


# --------------------------------------------------------------------------- leaves of a range


@kernel
def unmap_leaf(e, f, slot, level, base):
    """Clear a leaf. Arm without deferred unmaps invalidates it at once: stage2_unmap_put_pte()."""
    state = e.state
    store(e, slot, level, state[f + F_EMPTY])
    count_entry(e, slot, ALL)
    e.request[E_CLEARED] += U1
    e.request[E_CHANGED] += U1
    if breaks(state, f) and state[f + F_RANGE_FLUSH] & U2 == U0:
        flush(e, f, base, base + size_of(level), level)
    else:
        owe_flush(e, base, base + size_of(level), level)


@outlined
def protect_leaf(e, f, slot, level, value, base):
    """Set and clear bits of a leaf: 0, or -EINVAL if that gives none that a walk would take."""
    state = e.state
    request = e.request
    new = value & ~moved_mask(state, f, level, request[E_CLEAR]) | moved_mask(state, f, level, request[E_SET])
    if new == value:
        return DONE
    if not well_formed(state, f, level, new):
        return INVALID
    interim = state[f + F_EMPTY] if level == U1 else value & ~state[f + F_PRESENT]
    swap(e, f, slot, level, new, interim, base, False)
    request[E_WRITTEN] += U1
    request[E_CHANGED] += U1
    return DONE


@kernel
def clear_bit(e, f, slot, level, value, base, bit, flushed):
    """Clear the accessed or the dirty bit of a leaf and count that it was set."""
    if value & bit != U0:
        store(e, slot, level, value & ~bit)
        e.request[E_WRITTEN] += U1
        e.request[E_CHANGED] += U1
        if flushed:
            owe_flush(e, base, base + size_of(level), level)


@kernel
def edit_leaf(e, f, op, slot, level, value, base):
    """Do an edit to one leaf that it covers, or may change whole: 0 or -errno."""
    if op == UNMAP:
        unmap_leaf(e, f, slot, level, base)
    elif op == PROTECT:
        return protect_leaf(e, f, slot, level, value, base)
    elif op == CLEAR_ACCESSED:
        # No flush: ptep_clear_flush_young() on x86, kvm_pgtable_stage2_test_clear_young().
        clear_bit(e, f, slot, level, value, base, e.state[f + F_ACCESSED], False)
    elif op == CLEAR_DIRTY:
        clear_bit(e, f, slot, level, value, base, e.state[f + F_DIRTY], True)
    return DONE


@kernel
def must_split(e, op, level, base, address, end):
    """Whether a leaf has to be split before the edit goes on."""
    if op == SPLIT:
        return level > e.request[E_LEVEL]
    partial = base < address or end - base < size_of(level)
    return partial and e.request[E_FLAGS] & EDIT_SPLIT != U0


@outlined
def edit_range(e, f, op, address, end):
    """Edit every leaf that overlaps [address, end): 0, or the first failure."""
    state = e.state
    request = e.request
    while address < end:
        slot, level, value = find(e, f, address, U1)
        size = size_of(level)
        while True:
            base = address & ~(size - U1)
            request[E_OFFSET] = address
            if is_present(state, f, value):
                if not is_leaf(state, f, level, value):
                    break  # a table beside what was edited so far: walk down to its entries
                request[E_FOUND] += U1
                if must_split(e, op, level, base, address, end):
                    status = split_leaf(e, f, slot, level, value, base, request[E_LEVEL] if op == SPLIT else level - U1)
                    if status != DONE:
                        return status
                    if op == SPLIT:
                        request[E_CHANGED] += U1
                    break
                status = edit_leaf(e, f, op, slot, level, value, base)
                if status != DONE:
                    return status
            address = base + size
            slot += U1
            if address >= end or slot & U511 == U0:
                break
            value = load(e, slot, level)
    return DONE


@kernel
def unlink_if_empty(e, f, slot, level, value, address, start):
    """Free the table below `slot`, whose entry is `value`, if it has no entries: whether it went."""
    state = e.state
    table = table_of(state, f, value)
    if e.counts[table >> U9] != np.uint32(0):
        return False
    store(e, slot, level, state[f + F_EMPTY])
    count_entry(e, slot, ALL)
    release(e, table)
    e.request[E_CHANGED] += U1
    # mm/mmu_gather.h:pte_free_tlb() notes one page, and the level above as the stride.
    first = max(address & ~(size_of(level) - U1), start)
    if breaks(state, f):
        flush(e, f, first, first + size_of(U1), U1)
    elif is_process(state, f):
        owe_flush(e, first, first + size_of(U1), min(level, U3))
    else:
        owe_flush(e, first, first + size_of(U1), U1)
    return True


@outlined
def free_tables(e, f, start, end, covered):
    """Free the tables of [start, end) that have become empty, from the last level up; the root stays.

    mm/memory.c:free_pgd_range(), arch/arm64/kvm/hyp/pgtable.c:stage2_unmap_walker(). `covered`: last-level tables
    that the range covers whole and no others, mm/pt_reclaim.c:try_to_free_pte().
    """
    state = e.state
    address = start
    while address < end:
        slot, level, value = find(e, f, address, U2)
        size = size_of(level)
        following = (address | (size - U1)) + U1
        whole = address & (size - U1) == U0 and following <= end
        if level == U2 and is_present(state, f, value) and not is_leaf(state, f, level, value):
            if whole or not covered:
                unlink_if_empty(e, f, slot, level, value, address, start)
        if not covered:
            free_above(e, f, address, following, end, level + U1, start)
        address = following


@kernel
def free_above(e, f, address, following, end, level, start):
    """Free the empty tables above `address` that the range has no more of behind `following`; `level`: of the entry."""
    while level <= e.state[f + F_LEVELS] and (following >= end or following & (size_of(level) - U1) == U0):
        slot, at, value = find(e, f, address, level)
        if at != level or not unlink_if_empty(e, f, slot, level, value, address, start):
            return
        level += U1


@outlined
def unmap_tail(e, f, address, end):
    """What follows the clearing of a range: tables, by the request's policy."""
    flags = e.request[E_FLAGS]
    if flags & (EDIT_FREE | EDIT_FREE_COVERED) != U0:
        changed = e.request[E_CHANGED]
        free_tables(e, f, address, end, flags & EDIT_FREE_COVERED != U0)
        e.request[E_CHANGED] = changed


# --------------------------------------------------------------------------- one entry


@outlined
def store_raw(e, f, address, level, new):
    """Store any value in the entry of `level` over `address`: status and what was there.

    -ENOENT without such an entry, -EBUSY over a table, -EINVAL for a table entry and for a change that the
    architecture forbids without an invalid entry and a flush in between.
    """
    state = e.state
    slot, at, old = find(e, f, address, level)
    if at != level:
        return NO_ENTRY, old
    was = is_present(state, f, old)
    present = is_present(state, f, new)
    linked = was and not is_leaf(state, f, level, old)
    if present and not is_leaf(state, f, level, new):
        return INVALID, old
    if breaks(state, f) and was and present and (linked or (old ^ new) & state[f + F_BREAK_BITS] != U0):
        return INVALID, old
    if linked:
        return BUSY, old
    store(e, slot, level, new)
    if present and not was:
        count_entry(e, slot, U1)
    elif was and not present:
        count_entry(e, slot, ALL)
    if present:
        e.request[E_WRITTEN] += U1
    elif was:
        e.request[E_CLEARED] += U1
    if was and needs_flush(state, f, old, new):
        base = address & ~(size_of(level) - U1)
        owe_flush(e, base, base + size_of(level), level)
    return DONE, old


# --------------------------------------------------------------------------- roots


@outlined
def create(e, f):
    """Make an empty root, its address into the request: 0 or -ENOMEM."""
    tables = U1 << (e.state[f + F_ROOT_BITS] - U9)
    frame = take_frame(e) if tables == U1 else take_run(e, tables)
    if frame == NONE:
        return NO_MEMORY
    value = e.state[f + F_EMPTY]
    for i in range(tables):
        fill_frame(e.ram, frame + i, value)
        if logged(e):
            record(e, FILL, U0, (frame + i) << U12, value)
        e.counts[frame + i] = np.uint32(0)
    charge(e, TABLE_PAGE_ALLOCATED, np.int64(tables))
    e.request[E_ROOT] = frame << U12
    return DONE


@outlined
def destroy(e, f):
    """Free a whole tree. A process's is flushed once (exit_mmap()); a VM's is not, its CPUs are gone."""
    frame = e.request[E_ROOT] >> U12
    tables = U1 << (e.state[f + F_ROOT_BITS] - U9)
    for i in range(tables):
        tear_down(e, f, (frame + i) << U9, e.state[f + F_LEVELS], False)
    if is_process(e.state, f):
        flush(e, f, U0, U1 << e.state[f + F_INPUT_BITS], U1)
        e.request[E_FREED] = U1
    give_back(e)
    for i in range(tables):
        e.counts[frame + i] = np.uint32(0)
        if logged(e):
            record(e, FREE, U0, (frame + i) << U12, U0)
    if tables == U1:
        put_frame(e, frame)
    else:
        put_run(e, frame, tables)
    charge(e, TABLE_PAGE_FREED, np.int64(tables))


# --------------------------------------------------------------------------- dispatch


@kernel
def check_range(state, f, address, length):
    """0; -EINVAL for what is not whole pages, -ERANGE beyond the input addresses or across the canonical hole."""
    if (address | length) & U4095 != U0 or length == U0:
        return INVALID
    last = address + length - U1
    bits = state[f + F_INPUT_BITS]
    if last < address:
        return OUT_OF_RANGE
    if state[f + F_SIGN_EXTENDED] != U0:
        high = ALL << (bits - U1)
        if address & high != last & high or (address & high != U0 and address & high != high):
            return OUT_OF_RANGE
    elif last >> bits != U0:
        return OUT_OF_RANGE
    return DONE


@kernel
def check_bits(state, f, request):
    """0, or -EINVAL for bits of a protect that are not for it: the address, the type, or no presence left."""
    fixed = state[f + F_ADDRESS] | state[f + F_PAGE_MASK] | state[f + F_LEAF_MASK] & ~state[f + F_PAT_PAGE]
    present = state[f + F_PRESENT]
    if (request[E_SET] | request[E_CLEAR]) & fixed != U0:
        return INVALID
    if request[E_CLEAR] & ~request[E_SET] & present == present:
        return INVALID
    return DONE


@kernel
def check_request(state, f, request):
    """What does not depend on the address: 0, -EINVAL, -EOPNOTSUPP."""
    op = request[E_OP]
    level = request[E_LEVEL]
    largest = state[f + F_LARGEST_LEAF]
    if op == MAP and (level == U0 or level > largest):
        return INVALID
    if op == SPLIT and (level == U0 or level >= largest):
        return INVALID
    if op == COLLAPSE and (level < U2 or level > largest):
        return INVALID
    if op == STORE and (level == U0 or level > state[f + F_LEVELS]):
        return INVALID
    if op == PROTECT:
        return check_bits(state, f, request)
    if (op == CLEAR_ACCESSED and state[f + F_ACCESSED] == U0) or (op == CLEAR_DIRTY and state[f + F_DIRTY] == U0):
        return NOT_SUPPORTED
    return DONE


@kernel
def edit_one(e, f, op, given, physical):
    """One edit at one address: status, and what is told beside it."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    status = check_range(state, f, given, length)
    if status != DONE:
        return status, U0
    address = given & ((U1 << state[f + F_INPUT_BITS]) - U1)
    end = address + length
    request[E_FOUND] = U0
    request[E_CHANGED] = U0
    request[E_OFFSET] = address
    if op == MAP:
        status = map_one(e, f, address, physical)
    elif op == COLLAPSE:
        status = INVALID if address & (length - U1) != U0 else collapse(e, f, address, request[E_LEVEL])
    elif op == STORE:
        return store_raw(e, f, address, request[E_LEVEL], request[E_SET])
    elif op == FREE_TABLES:
        free_tables(e, f, address, end, request[E_FLAGS] & EDIT_FREE_COVERED != U0)
    else:
        status = edit_range(e, f, op, address, end)
        if op == UNMAP:
            unmap_tail(e, f, address, request[E_OFFSET] if status != DONE else end)
        if status == DONE and request[E_FOUND] == U0:
            return NO_ENTRY, U0
    if status != DONE:
        return status, request[E_OFFSET] - address
    return status, request[E_CHANGED]


@kernel
def finish(e, f):
    """The flush that is owed, the frames of freed tables, and the price of the leaves."""
    flush_pending(e, f)
    give_back(e)
    request = e.request
    if is_process(e.state, f):
        charge(e, LEAF_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, LEAF_CLEARED, np.int64(request[E_CLEARED]))
    else:
        charge(e, SPTE_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, SPTE_CLEARED, np.int64(request[E_CLEARED]))


@entry
def edit(descriptor, request, addresses, physical, status, detail, log):
    """Do the edit that `request` (uint64[layout.E_WORDS]) tells at each of `addresses`, in order; one flush at the end.

    addresses uint64[n], bytes; physical uint64[n] or [1]; status int64[n]: 0 or -errno. detail uint64[n]: how many
    leaves or tables changed, the old entry (store), or, after a failure, the offset of the first byte not done.
    log: uint64, layout.LOG_WORDS a record, or empty. Charged to counter row 0, which no operation of a trace has.
    """
    m = open_machine(descriptor)
    e = Tree(m.ram, m.state, m.stats, m.counts, request, log)
    state = m.state
    f = format_row(state, request[E_FORMAT])
    op = request[E_OP]
    row = state[R_COUNTER_ROW]
    state[R_COUNTER_ROW] = STATS_COUNTERS
    failure = check_request(state, f, request)
    several = physical.size > 1
    for i in range(U(addresses.size)):
        if failure != DONE:
            status[i] = failure
            detail[i] = U0
        elif op == CREATE:
            status[i] = create(e, f)
        elif op == DESTROY:
            destroy(e, f)
            status[i] = DONE
        else:
            status[i], detail[i] = edit_one(e, f, op, addresses[i], physical[i if several else U0])
    finish(e, f)
    state[R_COUNTER_ROW] = row
