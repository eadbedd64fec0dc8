"""Edits of what is mapped in a table of any format: unmap, protect, clear bits, free tables; raw entries."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import ALL, U0, U1, U2, U3, U9, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.tables.edit_entries import (
    breaks,
    is_any_leaf,
    is_leaf,
    is_process,
    is_valid,
    moved_mask,
    needs_flush,
    well_formed,
)
from pgemu_kernels.tables.edit_map import split_entry
from pgemu_kernels.tables.edit_tree import (
    count_entry,
    find,
    flush,
    load_entry,
    owe_flush,
    release_table,
    store_entry,
    swap,
)
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.enum_words import (
    EDIT_OP_CLEAR_ACCESSED,
    EDIT_OP_CLEAR_DIRTY,
    EDIT_OP_PROTECT,
    EDIT_OP_SPLIT,
    EDIT_OP_UNMAP,
)
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEAR,
    E_CLEARED,
    E_FLAGS,
    E_FOUND,
    E_LEVEL,
    E_OFFSET,
    E_SET,
    E_WRITTEN,
    EDIT_FREE,
    EDIT_FREE_COVERED,
    EDIT_SPLIT,
    F_ACCESSED,
    F_BREAK_BITS,
    F_DIRTY,
    F_EMPTY,
    F_LEVELS,
    F_PRESENT,
    F_RANGE_FLUSH,
)

DONE = np.int64(0)
NO_ENTRY = np.int64(-words.ENOENT)
BUSY = np.int64(-words.EBUSY)
INVALID = np.int64(-words.EINVAL)


# --------------------------------------------------------------------------- leaves of a range


@kernel
def unmap_leaf(e, f, slot, level, base):
    """Clear a leaf. Arm without deferred unmaps invalidates it at once: stage2_unmap_put_pte()."""
    state = e.state
    store_entry(e, slot, level, state[f + F_EMPTY])
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
        store_entry(e, slot, level, value & ~bit)
        e.request[E_WRITTEN] += U1
        e.request[E_CHANGED] += U1
        if flushed:
            owe_flush(e, base, base + size_of(level), level)


@kernel
def edit_leaf(e, f, op, slot, level, value, base):
    """Do an edit to one leaf that it covers, or may change whole: 0 or -errno."""
    if op == EDIT_OP_UNMAP:
        unmap_leaf(e, f, slot, level, base)
    elif op == EDIT_OP_PROTECT:
        return protect_leaf(e, f, slot, level, value, base)
    elif op == EDIT_OP_CLEAR_ACCESSED:
        # No flush: ptep_clear_flush_young() on x86, kvm_pgtable_stage2_test_clear_young().
        clear_bit(e, f, slot, level, value, base, e.state[f + F_ACCESSED], False)
    elif op == EDIT_OP_CLEAR_DIRTY:
        clear_bit(e, f, slot, level, value, base, e.state[f + F_DIRTY], True)
    return DONE


@kernel
def must_split(e, op, level, base, address, end):
    """Whether a leaf has to be split before the edit goes on."""
    if op == EDIT_OP_SPLIT:
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
            if is_valid(state, f, value):
                if not is_leaf(state, f, level, value):
                    break  # a table beside what was edited so far: walk down to its entries
                request[E_FOUND] += U1
                if must_split(e, op, level, base, address, end):
                    status = split_entry(
                        e, f, slot, level, value, base, request[E_LEVEL] if op == EDIT_OP_SPLIT else level - U1
                    )
                    if status != DONE:
                        return status
                    if op == EDIT_OP_SPLIT:
                        request[E_CHANGED] += U1
                    break
                status = edit_leaf(e, f, op, slot, level, value, base)
                if status != DONE:
                    return status
            address = base + size
            slot += U1
            if address >= end or slot & U511 == U0:
                break
            value = load_entry(e, slot, level)
    return DONE


@kernel
def unlink_if_empty(e, f, slot, level, value, address, start):
    """Free the table below `slot`, whose entry is `value`, if it has no entries: whether it went."""
    state = e.state
    table = table_of(state, f, value)
    if e.counts[table >> U9] != np.uint32(0):
        return False
    store_entry(e, slot, level, state[f + F_EMPTY])
    count_entry(e, slot, ALL)
    release_table(e, table)
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
        if level == U2 and is_valid(state, f, value) and not is_leaf(state, f, level, value):
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
    was = is_valid(state, f, old)
    present = is_valid(state, f, new)
    linked = was and not is_any_leaf(state, f, level, old)
    if present and not is_any_leaf(state, f, level, new):
        return INVALID, old
    if breaks(state, f) and was and present and (linked or (old ^ new) & state[f + F_BREAK_BITS] != U0):
        return INVALID, old
    if linked:
        return BUSY, old
    store_entry(e, slot, level, new)
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
