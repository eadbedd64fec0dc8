"""Steps of a conversion: what the orders of `orders` are made of.

A conversion has units, done one after the other: its whole range, or what of it lies in each huge page. O_START and
O_END of the record are those of the present unit. Each step does one thing, hands over through the record, and
returns GO or STOP; then the result is in the record and everything is unlocked.

The steps are compiled twice. For a default machine its parameters are constants, and what only others have
(`full_only`) is not compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U9, U12
from pgemu_kernels.engine.charge import charge, charge_one, result
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.handle import full_only, parameter
from pgemu_kernels.engine.properties import drains_lru, names_page, preallocates, rounds_ranges
from pgemu_kernels.engine.rows import block_row, inode_row, lock_exclusive, stop, unlock
from pgemu_kernels.engine.shareability import shared_in_block, shared_in_range, store_shareability
from pgemu_kernels.folios.counts import maybe_dma_pinned
from pgemu_kernels.folios.folio import COUNTS, ONE_CACHED, mappings, reference_count, struct_page
from pgemu_kernels.folios.guest_folios import start_waiting, stop_waiting
from pgemu_kernels.folios.vmemmap import flush_kernel_range
from pgemu_kernels.gmem import lru, piece_merges, pieces
from pgemu_kernels.gmem.arguments import arguments
from pgemu_kernels.gmem.busy import note_pins
from pgemu_kernels.gmem.poisoned_blocks import poisoned_block
from pgemu_kernels.gmem.revocation import return_converted, take_converted
from pgemu_kernels.gmem.spinning import is_spinning, is_stepped, waits_behind, went_on
from pgemu_kernels.gmem.vm_kinds import make_shared
from pgemu_kernels.gmem.zap_filter import split_before_zap, zap_kind
from pgemu_kernels.process.tables import flush_mm
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.invalidate import begin_range, end_range, flush_vms
from pgemu_kernels.stage2.regions import vms_with_leaves
from pgemu_kernels.words.enum_words import EVENT_ATTRIBUTES_STORED, EVENT_FOLIO_GATE_CHECKED, FLAG_PRIVATE
from pgemu_kernels.words.operations import (
    BLOCKED,
    EAGAIN,
    EBUSY,
    EHWPOISON,
    ENOMEM,
    GO,
    STOP,
)
from pgemu_kernels.words.registers import (
    R_CONVERT_BY_BLOCK,
    R_FLUSH_BATCHED,
    R_FLUSHES_HELD,
    R_KERNEL_UNFLUSHED,
    R_MERGE_LAZY,
    R_ORDER,
    R_SPACES,
    R_SPLIT_TO_2M,
    R_ZAP_ROUNDED,
)
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_PAGES,
    O_DETAIL,
    O_END,
    O_FLAGS,
    O_INODE,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_RANGE_END,
    O_RANGE_START,
    O_ROUND_END,
    O_ROUND_START,
    O_START,
    O_TO_PRIVATE,
)

# What a machine may have otherwise, and what it is by default.
merge_lazy = parameter(R_MERGE_LAZY, U0)
flush_batched = parameter(R_FLUSH_BATCHED, U0)
split_to_2m = parameter(R_SPLIT_TO_2M, U0)


@kernel
def zap_rounded(m):
    """Whether a zap is rounded out to huge pages; default machines know it, too: a comparison asks both ways."""
    return m.state[R_ZAP_ROUNDED] != U0


@kernel
def by_block(m):
    """Whether a conversion is done one huge page after the other. The designs' defaults differ, so no machine's type
    says it."""
    return m.state[R_CONVERT_BY_BLOCK] != U0


# --------------------------------------------------------------------------- what only other machines have


@kernel
def in_pieces(m):
    """Whether 1G folios are split to 2M first."""
    return split_to_2m(m) != U0 and m.state[R_ORDER] > U9


gate_pieces = full_only(pieces.gate_block, NONE)
note_waiting = full_only(piece_merges.note_waiting, None)  # there are no pieces
note_touched = full_only(piece_merges.note_touched, None)
merge_pieces = full_only(piece_merges.merge_pieces, NONE)
merge_touched = full_only(piece_merges.merge_touched, NONE)
lru_add_pieces = full_only(lru.lru_add_pieces, None)  # there are no LRU batches


# --------------------------------------------------------------------------- units, beginning and end


@kernel
def rounding(m):
    """Pages that ranges of the invalidate protocol are rounded out to: a huge page's, or 1 where they are exact."""
    if not rounds_ranges(m):
        return U1
    return U1 << (U9 if in_pieces(m) else m.state[R_ORDER])


@kernel
def set_rounded(m, op, start, end):
    """Let the record's rounded range be that of pages [start, end)."""
    state = m.state
    inside = rounding(m) - U1
    state[op + O_ROUND_START] = start & ~inside
    state[op + O_ROUND_END] = min((end + inside) & ~inside, state[inode_row(state[op + O_INODE]) + I_PAGES])


@outlined
def next_block(m, op):
    """Let the record's unit be the part of the next huge page in which something differs: whether there is one."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    inside = (U1 << state[R_ORDER]) - U1
    first = state[op + O_END]
    last = state[op + O_RANGE_END]
    while first < last:
        end = min(last, (first | inside) + U1)
        shared = shared_in_range(m, node, first, end)
        if shared != (U0 if state[op + O_TO_PRIVATE] != U0 else end - first):
            state[op + O_START] = first
            state[op + O_END] = end
            set_rounded(m, op, first, end)
            return True
        first = end
    return False


@kernel
def next_unit(m, op):
    """next_block(), which is not called where the range has ended: by range it has after one unit."""
    return m.state[op + O_END] < m.state[op + O_RANGE_END] and next_block(m, op)


@kernel
def first_unit(m, op):
    """Let the record's unit be the first one: by default the range, in which prepare() has seen a difference, and so
    it is by block where the range lies in one."""
    state = m.state
    order = state[R_ORDER]
    if state[op + O_START] >> order != state[op + O_RANGE_END] - U1 >> order and by_block(m):
        next_unit(m, op)
    else:
        state[op + O_END] = state[op + O_RANGE_END]
        set_rounded(m, op, state[op + O_START], state[op + O_END])


@kernel
def prepare(m, op):
    """Check the arguments, take the invalidate_lock for writing, see whether anything is to be done, preallocate, and
    choose the first unit. BLOCKED (-EBUSY) where the lock is held; -EHWPOISON as poisoned_blocks.py tells.

    virt/kvm/guest_memfd.c:kvm_gmem_set_attributes(). Linux preallocates the nodes of its attribute tree, and without
    a frame that fails, at the range's start (inference: they come from a slab page). A bit per page needs none.
    """
    state = m.state
    status = arguments(m, op)
    if status != 0:
        return stop(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    start = state[op + O_OFFSET] >> U12
    end = start + (state[op + O_LENGTH] >> U12)
    if not lock_exclusive(state, op, node):
        result(state, op, np.int64(-EBUSY))
        return BLOCKED
    to_private = state[op + O_FLAGS] & FLAG_PRIVATE != U0
    if is_spinning(m):
        state[op + O_TO_PRIVATE] = U1 if to_private else U0
        if waits_behind(m, op, inode, start, end):
            unlock(state, op, node)
            return BLOCKED if is_stepped(state, op) else STOP
    went_on(m, op)
    shared = shared_in_range(m, node, start, end)
    if shared == (U0 if to_private else end - start):
        unlock(state, op, node)
        return stop(state, op, 0)
    poisoned = poisoned_block(m, node, start, end, to_private)
    if poisoned != NONE:
        unlock(state, op, node)
        state[op + O_DETAIL] = poisoned << U12
        return stop(state, op, -EHWPOISON)
    if preallocates(m) and frames_left(m) == U0:
        unlock(state, op, node)
        state[op + O_DETAIL] = start << U12
        return stop(state, op, -ENOMEM)
    result(state, op, np.int64(0))
    state[op + O_INODE] = inode
    state[op + O_TO_PRIVATE] = U1 if to_private else U0
    state[op + O_START] = start
    state[op + O_END] = start
    state[op + O_RANGE_START] = start
    state[op + O_RANGE_END] = end
    first_unit(m, op)
    return GO


@outlined
def flush_owed(m):
    """The flushes that a conversion put off (R_FLUSH_BATCHED): of processes, VMs, and the kernel's vmemmap."""
    state = m.state
    for space in range(state[R_SPACES]):
        flush_mm(m, space)
    flush_vms(m)
    if state[R_KERNEL_UNFLUSHED] != U0:
        flush_kernel_range(m, state[R_KERNEL_UNFLUSHED])
        state[R_KERNEL_UNFLUSHED] = U0


pay_flushes = full_only(flush_owed, None)  # no flush is put off


@kernel
def leave(m, op):
    """Unlock, with what the record says as the result; the checked range is all of the conversion's."""
    state = m.state
    return_converted(m, op, U0, U0)  # what a failure left
    if flush_batched(m) != U0:
        state[R_FLUSHES_HELD] = U0
        pay_flushes(m)
    if state[op + O_START] != state[op + O_RANGE_START] or state[op + O_END] != state[op + O_RANGE_END]:
        set_rounded(m, op, state[op + O_RANGE_START], state[op + O_RANGE_END])
    unlock(state, op, inode_row(state[op + O_INODE]))
    return STOP


@step
def fail(m, op, status, index):
    """End a conversion with an error at a page: its offset is max(start of the unit, page), or the page's."""
    state = m.state
    state[op + O_DETAIL] = (index if names_page(m) else max(index, state[op + O_START])) << U12
    result(state, op, np.int64(status))
    return leave(m, op)


@outlined
def drop_block(m, node, block, first):
    """A block that waits for its merge became shared: it needs none, but for pieces that are still private."""
    if m.state[block + B_STATE] != BLOCK_PARTLY:
        stop_waiting(m, block)
    else:
        note_waiting(m, node, block, first, first, first)


@kernel
def drop_waiting(m, op):
    """Blocks of the unit that became shared need no merge any more. Folios of order 0 never do."""
    state = m.state
    order = state[R_ORDER]
    node = inode_row(state[op + O_INODE])
    first = state[op + O_START] >> order << order
    while order != U0 and first < state[op + O_END]:
        block = block_row(m, node, first)
        if m.state[block + B_WAITS] != U0:
            drop_block(m, node, block, first)
        first += U1 << order


stop_waiting_for_unit = full_only(drop_waiting, None)  # no merge is put off


@kernel
def finish(m, op):
    """The unit is done: GO with the next one, or unlock and STOP."""
    if merge_lazy(m) != U0 and m.state[op + O_TO_PRIVATE] == U0:
        stop_waiting_for_unit(m, op)
    return_converted(m, op, m.state[op + O_START], m.state[op + O_END])
    if next_unit(m, op):
        return GO
    return leave(m, op)


# --------------------------------------------------------------------------- host and references


def unmaps(first: np.uint64, last: np.uint64) -> Any:
    """To private: a step that unmaps the pages which two words of the record name from every process.

    mm/memory.c:unmap_mapping_pages(). They leave stage 2 with that where an MMU notifier hears of it.
    """

    @kernel
    def unmap(m, op):
        unmap_mapping_range(m, m.state[op + O_INODE], m.state[op + first], m.state[op + last])
        return GO

    return unmap


unmap_host = unmaps(O_START, O_END)


@kernel
def is_idle(m, page, references):
    """Whether a folio has the page cache's references only."""
    return reference_count(m.ram, page) == references


@outlined
def is_idle_4k(m, page):
    """The gate of next4k: not pinned, not mapped, no other reference; the last after LRU caches were drained once.

    virt/kvm/guest_memfd.c of the in-place series: folio_maybe_dma_pinned(), folio_mapped(), lru_add_drain_all()
    """
    if maybe_dma_pinned(m.ram, page) or mappings(m.ram, page) != U0:
        return False
    if is_idle(m, page, U1):
        return True
    lru.lru_drain_all(m)
    return is_idle(m, page, U1)


idle_4k = full_only(is_idle_4k, False)  # no order has that gate


@kernel
def busy_4k(m, head, start, end):
    """The first of the 4K folios [start, end) of a split block that is not idle, else `end`."""
    ram = m.ram
    for i in range(start, end):
        if ram[struct_page(m, head + i) + COUNTS] != ONE_CACHED:
            return i
    return end


@kernel
def busy_folio(m, node, start, end):
    """The first page of the first folio of pages [start, end) that somebody uses, or NONE."""
    state = m.state
    order = state[R_ORDER]
    index = start
    while index < end:
        block = block_row(m, node, index)
        first = index >> order << order
        last = min(end, first + (U1 << order))
        kind = m.state[block + B_STATE]
        head = m.state[block + B_PFN]
        if kind == BLOCK_SPLIT:
            busy = first + busy_4k(m, head, index - first, last - first)
            charge(m, EVENT_FOLIO_GATE_CHECKED, np.int64(min(busy + U1, last) - index))
            if busy < last:
                return busy
        elif kind == BLOCK_PARTLY:
            busy = gate_pieces(m, node, block, first, index, last)
            if busy != NONE:
                return busy
        elif kind == BLOCK_HUGE:
            charge_one(m, EVENT_FOLIO_GATE_CHECKED)
            page = struct_page(m, head)
            by_4k = order == U0 and drains_lru(m)
            if not (idle_4k(m, page) if by_4k else is_idle(m, page, U1 << order)):
                return first
        index = last
    return NONE


@kernel
def gate(m, op):
    """To private: every folio of the unit must be idle, else -EAGAIN with the failing offset."""
    busy = busy_folio(m, inode_row(m.state[op + O_INODE]), m.state[op + O_START], m.state[op + O_END])
    if busy != NONE:
        note_pins(m, op, busy)
        return fail(m, op, -EAGAIN, busy)
    return GO


# --------------------------------------------------------------------------- stage 2


@kernel
def invalidate_begin(m, op):
    """Begin the invalidation of the rounded unit in every VM bound to it."""
    state = m.state
    begin_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    return GO


@outlined
def leave_split(m, node, first, end):
    """Note that a conversion failed and leaves the blocks of pages [first, end) split, some of them all private."""
    first = first >> m.state[R_ORDER] << m.state[R_ORDER]
    while m.state[R_ORDER] != U0 and first < end:
        block = block_row(m, node, first)
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            note_waiting(m, node, block, first, first, first)
        elif m.state[block + B_STATE] == BLOCK_SPLIT and shared_in_block(m, node, first) == U0:
            start_waiting(m, block)
        first += U1 << m.state[R_ORDER]


@outlined
def fail_zap(m, op, status):
    """The unit's zap cannot be done: its invalidation ends, what was split before stays split, nothing is stored."""
    state = m.state
    end_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    leave_split(m, inode_row(state[op + O_INODE]), state[op + O_START], state[op + O_END])
    return fail(m, op, status, state[op + O_START])


@kernel
def zap(m, op):
    """Drop the stage-2 leaves over the unit. The point of no return.

    virt/kvm/guest_memfd.c:kvm_gmem_zap(inode, start, end) in every posted version, whatever begin and end are of.
    R_ZAP_ROUNDED: over the rounded unit, a what-if.
    """
    state = m.state
    take_converted(m, op, state[op + O_START], state[op + O_END])
    rounded = zap_rounded(m)
    start = state[op + (O_ROUND_START if rounded else O_START)]
    end = state[op + (O_ROUND_END if rounded else O_END)]
    vms = vms_with_leaves(state, inode_row(state[op + O_INODE]), start, end)
    if vms != U0:
        status = split_before_zap(m, op, vms, start, end)
        if status != 0:
            return fail_zap(m, op, status)
        zap_kind(m, op, vms, start, end, state[op + O_START], state[op + O_END])
    return GO


@kernel
def invalidate_end(m, op):
    """End it."""
    state = m.state
    end_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    return GO


@kernel
def store_range(m, op, start, end, shared):
    """Record the shareability of pages [start, end)."""
    node = inode_row(m.state[op + O_INODE])
    store_shareability(m, node, start, end, shared)
    if shared != U0:
        make_shared(m, node, start, end)
    charge_one(m, EVENT_ATTRIBUTES_STORED)


@kernel
def store(m, op):
    """Record the unit's new shareability; cannot fail, for nodes were preallocated."""
    state = m.state
    store_range(m, op, state[op + O_START], state[op + O_END], U1 - state[op + O_TO_PRIVATE])
    return GO
