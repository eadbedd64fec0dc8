"""What every edit of a page table does: read and write entries, note them, owe flushes, take and free tables.

A format's data tells Linux's ways apart: its flush rule (F_FLUSH), frozen value and F_BREAK_BEFORE_MAKE. Within a
tree `counts` holds the present entries of each table, by its frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U3, U7, U8, U9, U12, U511, U512
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import fill_frame, put_frame, take_frame
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.engine.handle import Words
from pgemu_kernels.formats.page_format import FlushRule
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.enum_words import (
    EVENT_TABLE_PAGE_ALLOCATED,
    EVENT_TABLE_PAGE_FREED,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    EVENT_TLB_FLUSH_RANGE,
    EVENT_TLB_FLUSH_VM,
    LOG_FILL,
    LOG_FLUSH,
    LOG_FLUSH_ALL,
    LOG_FREE,
    LOG_READ,
    LOG_WRITE,
)
from pgemu_kernels.words.table_words import (
    E_CLEARED,
    E_CURSOR,
    E_CURSOR_END,
    E_FLUSH_START,
    E_FREED,
    E_FREED_LIST,
    E_PENDING_END,
    E_PENDING_LEVEL,
    E_PENDING_START,
    E_RECORDS,
    E_ROOT,
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
    F_SIGN_EXTENDED,
    F_SOFTWARE,
    F_TABLE,
    F_TABLE_TOP,
)

U = np.uint64
LOG_WORDS = U(words.LOG_WORDS)
FULL_FLUSH_PAGES = U(33)  # arch/x86/mm/tlb.c:tlb_single_page_flush_ceiling


PROCESS = U(FlushRule.PROCESS)
WHOLE_VM = U(FlushRule.WHOLE_VM)


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
def log_record(e, kind, level, address, value):
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
def load_entry(e, slot, level):
    """The entry at `slot`, an index in `ram`."""
    value = e.ram[slot]
    if logged(e):
        log_record(e, LOG_READ, level, slot << U3, value)
    return value


@kernel
def store_entry(e, slot, level, value):
    e.ram[slot] = value
    if logged(e):
        log_record(e, LOG_WRITE, level, slot << U3, value)


# --------------------------------------------------------------------------- addresses and entries


@kernel
def is_valid(state, f, value):
    """Whether an entry is present to the hardware: what a table of any format is edited by."""
    return value & state[f + F_PRESENT] != U0


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
    if not is_valid(state, f, value) or not is_leaf(state, f, level, value):
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


@kernel
def descend(e, f, address, target, watched):
    """Walk to the entry over `address` at level `target`, or to the leaf or hole above it: slot, level, entry."""
    state = e.state
    level = state[f + F_LEVELS]
    slot = (e.request[E_ROOT] >> U3) + (address >> shift_of(level))
    value = load_entry(e, slot, level) if watched else e.ram[slot]
    while level > target and is_valid(state, f, value) and not is_leaf(state, f, level, value):
        level -= U1
        slot = table_of(state, f, value) + (address >> shift_of(level) & U511)
        value = load_entry(e, slot, level) if watched else e.ram[slot]
    return slot, level, value


@outlined
def find(e, f, address, target):
    """The same, with each read in the log."""
    return descend(e, f, address, target, True)


@kernel
def count_entry(e, slot, n):
    """Add `n` (uint64) to the present entries of the table that `slot` is in."""
    count_in_table(e, slot >> U9, n)


@kernel
def count_in_table(e, frame, n):
    """The same of the table in a frame."""
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
    kind = LOG_FLUSH
    rule = state[f + F_FLUSH]
    if rule == PROCESS:
        pages = (end - start) >> shift_of(level)
        charge_one(e, EVENT_TLB_FLUSH_MM)
        if pages > FULL_FLUSH_PAGES:
            kind = LOG_FLUSH_ALL
        else:
            charge(e, EVENT_TLB_FLUSH_PAGE, np.int64(pages))
    elif rule == WHOLE_VM or (end - start > size_of(level) and state[f + F_RANGE_FLUSH] & U1 == U0):
        charge_one(e, EVENT_TLB_FLUSH_VM)
        kind = LOG_FLUSH_ALL
    else:
        charge_one(e, EVENT_TLB_FLUSH_RANGE)
    if logged(e):
        log_record(e, kind, level, sign_extended(state, f, start), end - start)


@kernel
def flush_pending(e, f):
    """Flush what the edit left to its end."""
    request = e.request
    if request[E_PENDING_END] != U0:
        flush(e, f, request[E_PENDING_START], request[E_PENDING_END], request[E_PENDING_LEVEL])
        request[E_PENDING_END] = U0


# --------------------------------------------------------------------------- tables


@kernel
def take_table(e):
    """A frame for a table, with whatever it held: its first slot, or NONE."""
    frame = take_frame(e)
    if frame == NONE:
        return NONE
    charge_one(e, EVENT_TABLE_PAGE_ALLOCATED)
    e.counts[frame] = np.uint32(0)
    return frame << U9


@kernel
def empty_table(e, f):
    """A table of empty entries, or NONE."""
    table = take_table(e)
    if table != NONE:
        value = e.state[f + F_EMPTY]
        fill_frame(e.ram, table >> U9, value)
        if logged(e):
            log_record(e, LOG_FILL, U0, table << U3, value)
    return table


@kernel
def table_entry(state, f, level, table):
    """The entry of `level` that points to a table."""
    bits = state[f + F_TABLE_TOP] if level == state[f + F_LEVELS] else state[f + F_TABLE]
    return table << U3 | bits


@kernel
def release_table(e, table):
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
            log_record(e, LOG_FREE, U0, frame << U12, U0)
        put_frame(e, frame)
        charge_one(e, EVENT_TABLE_PAGE_FREED)
        frame = following
    e.request[E_FREED_LIST] = U0


@outlined
def holds_leaf(e, f, table, level):
    """Whether a table of `level` (1 or 2) or one below it has a leaf."""
    if level == U1 or e.counts[table >> U9] == np.uint32(0):
        return e.counts[table >> U9] != np.uint32(0)
    for slot in range(table, table + U512):
        value = load_entry(e, slot, level)
        if is_valid(e.state, f, value):
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
            release_table(e, slot - U512)
            level += U1
            continue
        request[E_CURSOR + level] = slot + U1
        value = load_entry(e, slot, level)
        if is_valid(state, f, value):
            if freezes:
                store_entry(e, slot, level, frozen)
            if is_leaf(state, f, level, value):
                request[E_CLEARED] += U1
            else:
                level -= U1
                below = table_of(state, f, value)
                request[E_CURSOR + level] = below
                request[E_CURSOR_END + level] = below + U512
        elif freezes and shared:
            store_entry(e, slot, level, frozen)


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
            store_entry(e, slot, level, state[f + F_FROZEN])
            flush(e, f, base, end, stride)
            store_entry(e, slot, level, new)
            return
    elif is_process(state, f):
        store_entry(e, slot, level, interim)
        if reshaped or (old ^ new) & state[f + F_ADDRESS] != U0:
            flush(e, f, base, end, stride)
            store_entry(e, slot, level, new)
            return
    store_entry(e, slot, level, new)
    if needs_flush(state, f, old, new):
        owe_flush(e, base, end, stride)
