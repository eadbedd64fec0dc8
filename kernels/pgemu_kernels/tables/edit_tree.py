"""What every edit of a page table does: read and write entries, note them, owe flushes, take and free tables.

A format's data tells Linux's ways apart: its flush rule (F_FLUSH), frozen value and F_BREAK_BEFORE_MAKE. Within a
tree `counts` holds the present entries of each table, by its frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U8, U9, U12, U64, U511, U512, leading_zeros
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import fill_frame, put_frame, take_frame
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.engine.handle import Words
from pgemu_kernels.formats.page_format import FlushRule
from pgemu_kernels.tables.edit_entries import (
    breaks,
    is_any_leaf,
    is_leaf,
    is_process,
    is_valid,
    needs_flush,
    sign_extended,
)
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.enum_words import (
    EVENT_IOTLB_FLUSH_DOMAIN,
    EVENT_IOTLB_FLUSH_PAGES,
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
    F_ADDRESS,
    F_BREAK_BITS,
    F_EMPTY,
    F_FLUSH,
    F_FROZEN,
    F_LARGEST_FLUSH,
    F_LEVELS,
    F_RANGE_FLUSH,
    F_SIZED_MASK,
    F_TABLE,
    F_TABLE_LEVEL,
    F_TABLE_TOP,
)

U = np.uint64
LOG_WORDS = U(words.LOG_WORDS)
FULL_FLUSH_PAGES = U(33)  # arch/x86/mm/tlb.c:tlb_single_page_flush_ceiling
PROCESS = U(FlushRule.PROCESS)
WHOLE_VM = U(FlushRule.WHOLE_VM)
IOTLB = U(FlushRule.IOTLB)


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


# --------------------------------------------------------------------------- entries in their tables


@kernel
def has_sized(state, f):
    """Whether leaves of the format can have their size in their address."""
    return state[f + F_SIZED_MASK] != U0


@kernel
def descend(e, f, address, target, watched, sized):
    """Walk to the entry over `address` at level `target`, or to the leaf or hole above it: slot, level, entry.

    sized: has_sized() of the format, known to those who walk often.
    """
    state = e.state
    level = state[f + F_LEVELS]
    slot = (e.request[E_ROOT] >> U3) + (address >> shift_of(level))
    value = load_entry(e, slot, level) if watched else e.ram[slot]
    while level > target and is_valid(state, f, value) and not is_leaf(state, f, level, value):
        if sized and is_any_leaf(state, f, level, value):
            break
        level -= U1
        slot = table_of(state, f, value) + (address >> shift_of(level) & U511)
        value = load_entry(e, slot, level) if watched else e.ram[slot]
    return slot, level, value


@outlined
def find(e, f, address, target):
    """The same, with each read in the log."""
    return descend(e, f, address, target, True, has_sized(e.state, f))


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


@kernel
def flush_order(start, end):
    """Log 2 of the pages of the smallest block, of a power of two and aligned, that [start, end) lies in.

    drivers/iommu/intel/cache.c:calculate_psi_aligned_address(), drivers/iommu/amd/iommu.c:build_inv_address().
    """
    return U64 - leading_zeros((start ^ end - U1) >> U12)


@outlined
def flush(e, f, start, end, level):
    """Flush a range at once by the format's rule, charge it, and add it to what the edit reports.

    arch/x86/mm/tlb.c:get_flush_tlb_info(); virt/kvm/kvm_main.c:kvm_flush_remote_tlbs_range(), which x86 has not;
    arch/arm64/kvm/hyp/vhe/tlb.c; an IOMMU's domain: flush_order().
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
    elif rule == IOTLB:
        if flush_order(start, end) > state[f + F_LARGEST_FLUSH]:
            charge_one(e, EVENT_IOTLB_FLUSH_DOMAIN)
            kind = LOG_FLUSH_ALL
        else:
            charge_one(e, EVENT_IOTLB_FLUSH_PAGES)
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
    where = state[f + F_TABLE_LEVEL]
    if where != U0:
        bits |= level - U1 << where
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
            if is_any_leaf(state, f, level, value):
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
