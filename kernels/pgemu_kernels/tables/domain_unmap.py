"""Unmaps of an IOMMU's domain, as drivers/iommu/iommu.c:iommu_unmap() does them, by the format's UnmapRule."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.formats.entry_format import UnmapRule
from pgemu_kernels.tables.domain_entries import clear_entry, clear_leaf, drop_table, page_size
from pgemu_kernels.tables.edit_entries import input_mask, is_any_leaf, is_valid, leaf_shift
from pgemu_kernels.tables.edit_tree import (
    descend,
    find,
    flush_pending,
    give_back,
    has_sized,
    load_entry,
    owe_flush,
    release_table,
)
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEARED,
    E_GATHERED,
    E_PENDING_END,
    E_PENDING_START,
    F_GATHER,
    F_LEVELS,
    F_PAGE_SIZES,
    F_UNMAP_RULE,
)

U = np.uint64
RULE_STOPS = U(UnmapRule.STOPS)
RULE_COVERED = U(UnmapRule.COVERED)


@outlined
def domain_unmap(e, f, address, length):
    """Unmap [address, address + length): how many bytes went, which may be more or less; the flush is owed.

    iommu.c:__iommu_unmap(). NONE for what would make 6.12's and 6.18's VT-d take a page for a table: a large leaf that
    the range covers in part.
    """
    state = e.state
    rule = state[f + F_UNMAP_RULE]
    done = U0
    sizes = state[f + F_PAGE_SIZES]
    while done < length:
        at = address + done
        shift, count = page_size(sizes, at, at, length - done)
        size = count << shift
        if (at + size - U1) & ~input_mask(state, f) != U0:
            return done
        if rule == RULE_STOPS:
            went = unmap_until_hole(e, f, at, size)
        elif rule == RULE_COVERED:
            went = unmap_covered(e, f, at, size)
            if went == NONE:
                return NONE
        else:
            went = unmap_whole_leaves(e, f, at, size)
        if went == U0:
            return done
        done += went
    return done


@kernel
def gather_range(e, f, address, length):
    """Leave a range to the flush at the end, or flush first what does not wait together with it: formats.Gather."""
    request = e.request
    rule = e.state[f + F_GATHER]
    if rule != U0 and request[E_PENDING_END] != U0:
        apart = address > request[E_PENDING_END] or address + length < request[E_PENDING_START]
        if apart or (rule != U1 and request[E_GATHERED] != length):
            flush_pending(e, f)
            give_back(e)
    request[E_GATHERED] = length
    owe_flush(e, address, address + length, U1)


@outlined
def unmap_until_hole(e, f, address, length):
    """Leaves one by one, up to a hole or one that begins before; tables covered whole: iommu_pt.h:__unmap_range().

    The flush is of what was asked for, whatever went.
    """
    state = e.state
    went = U0
    stopped = False
    while went < length and not stopped:
        slot, level, value = find(e, f, address + went, U1)
        while True:
            shift = leaf_shift(state, f, level, value)
            if not is_valid(state, f, value) or not is_any_leaf(state, f, level, value):
                # A table beside what was cleared so far is walked down to; a hole ends it.
                stopped = not is_valid(state, f, value)
                break
            if address + went & (U1 << shift) - U1 != U0:
                stopped = True
                break
            entries = U1 << shift - shift_of(level)
            if entries == U1:
                clear_entry(e, slot, level)
                e.request[E_CLEARED] += U1
                e.request[E_CHANGED] += U1
            else:
                clear_leaf(e, f, slot, level, value)
            went += U1 << shift
            slot += entries
            if went >= length or slot & U511 == U0:
                break
            value = load_entry(e, slot, level)
        if not stopped:
            free_covered(e, f, address, went, length, level + U1)
    gather_range(e, f, address, length)
    return went


@kernel
def free_covered(e, f, address, went, length, level):
    """Free the tables that end where an unmap has come to and that its range covers; `level`: of the lowest's entry."""
    state = e.state
    at = address + went
    while (
        level <= state[f + F_LEVELS] and went >= size_of(level) and went <= length and at & (size_of(level) - U1) == U0
    ):
        slot, _, value = find(e, f, at - size_of(level), level)
        clear_entry(e, slot, level)
        release_table(e, table_of(state, f, value))
        level += U1


@outlined
def unmap_covered(e, f, address, length):
    """All entries that the range covers, with the tables below: intel/iommu.c:intel_iommu_unmap(), domain_unmap().

    The range is at least the leaf, or the hole, that it begins in. Returns its length, or NONE: see domain_unmap().
    """
    state = e.state
    _, level, value = descend(e, f, address, U1, False, has_sized(state, f))
    length = max(length, size_of(level))
    last = address + length - U1
    if last & ~input_mask(state, f) != U0 or last < address:
        return length  # a warning, and nothing is cleared
    if level > U1 and is_valid(state, f, value) and address & (size_of(level) - U1) != U0:
        return NONE
    _, level, value = descend(e, f, last, U1, False, has_sized(state, f))
    if level > U1 and is_valid(state, f, value):
        if last & (size_of(level) - U1) != size_of(level) - U1:
            return NONE
    went = U0
    while went < length:
        at = address + went
        slot, level, value = find(e, f, at, widest_level(state, f, at, length - went))
        while True:
            # An entry that is not covered is a table to walk down into, or a hole.
            covered = (address + went) & (size_of(level) - U1) == U0 and length - went >= size_of(level)
            if is_valid(state, f, value):
                if not covered:
                    break
                if is_any_leaf(state, f, level, value):
                    clear_leaf(e, f, slot, level, value)
                else:
                    drop_table(e, f, slot, level, value)
            went = min(length, ((address + went | size_of(level) - U1) + U1) - address)
            slot += U1
            if went == length or slot & U511 == U0:
                break
            value = load_entry(e, slot, level)
    gather_range(e, f, address, length)
    return length


@kernel
def widest_level(state, f, address, length):
    """The highest level of an entry that begins at an address and that so many bytes cover."""
    level = state[f + F_LEVELS]
    while level > U1 and (address & (size_of(level) - U1) != U0 or length < size_of(level)):
        level -= U1
    return level


@outlined
def unmap_whole_leaves(e, f, address, length):
    """Every leaf that the range touches, whole: amd/io_pgtable.c:iommu_v1_unmap_pages(). No table goes.

    A hole ends it; in a last-level table it counts as a page. What is returned counts every leaf whole.
    """
    state = e.state
    went = U0
    at = address
    while went < length:
        slot, level, value = find(e, f, at, U1)
        if not is_valid(state, f, value) and level > U1:
            break
        shift = shift_of(level)
        if is_valid(state, f, value):
            shift = clear_leaf(e, f, slot, level, value)
        went += U1 << shift
        at = (at | (U1 << shift) - U1) + U1
        if at & ~input_mask(state, f) != U0:
            break
    if went != U0:
        gather_range(e, f, address, went)
    return went
