"""Steps of a conversion item by item: the work list of rfc2.

A bit per page of the inode: it is to be converted. Items are runs of them, as they were before anything is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U6, U63, trailing_zeros
from pgemu_kernels.engine.charge import result
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.rows import block_row, inode_row, stop
from pgemu_kernels.engine.shareability import shared_in_block, store_shareability
from pgemu_kernels.gmem.busy import note_pins
from pgemu_kernels.gmem.conversion import (
    busy_folio,
    fail,
    leave,
    leave_split,
    merge_pieces,
    rounding,
    store_range,
    unmaps,
    zap_rounded,
)
from pgemu_kernels.gmem.revocation import take_converted
from pgemu_kernels.gmem.spinning import blocked, is_stepped, note_block, went_on
from pgemu_kernels.gmem.split_merge import merge_blocks, merge_now, split_blocks
from pgemu_kernels.gmem.zap_filter import split_before_zap, zap_kind
from pgemu_kernels.stage2.invalidate import begin_range, end_range, is_watched
from pgemu_kernels.stage2.regions import vms_with_leaves
from pgemu_kernels.words.enum_words import DEFECT_CONVERT_KEEPS_LEAVES, DEFECT_ROLLBACK_AT_ZERO
from pgemu_kernels.words.operations import (
    EAGAIN,
    ENOMEM,
    GO,
    NEVER,
    WOULD_SPIN,
)
from pgemu_kernels.words.registers import (
    R_DEFECTS,
    R_FLUSHES_HELD,
    R_ORDER,
    R_WORD_ROWS,
    R_WORK_LISTS,
)
from pgemu_kernels.words.rows import (
    B_STATE,
    B_WAITS,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_WORD,
    O_END,
    O_INODE,
    O_ITEM_END,
    O_ITEM_START,
    O_START,
    O_TO_PRIVATE,
)


@kernel
def find_bit(state, bits, index, end, flip):
    """The first page of [index, end) whose bit, flipped if `flip` is all ones, is set, else `end`."""
    while index < end:
        word = (state[bits + (index >> U6)] ^ flip) >> (index & U63)
        if word != U0:
            return min(end, index + trailing_zeros(word))
        index = (index | U63) + U1
    return end


@kernel
def work_list(state, node):
    """Where an inode's bits begin."""
    return state[R_WORK_LISTS] + state[node + I_WORD] - state[R_WORD_ROWS]


@kernel
def is_one_page(state, op):
    """Whether the unit is one page: then it is its only item, for prepare() has seen that it differs."""
    return state[op + O_END] - state[op + O_START] == U1


@outlined
def find_item(m, op, index):
    """The next item of the unit from page `index` on: (first, past the last), or the unit's end twice."""
    state = m.state
    if is_one_page(state, op):
        return index, state[op + O_END]
    bits = work_list(state, inode_row(state[op + O_INODE]))
    first = find_bit(state, bits, index, state[op + O_END], U0)
    return first, find_bit(state, bits, first, state[op + O_END], ALL)


@kernel
def set_item(m, op, index):
    """Let the record's item be the next one from page `index` on: whether there is one."""
    first, last = find_item(m, op, index)
    m.state[op + O_ITEM_START] = first
    m.state[op + O_ITEM_END] = last
    return first < last


@outlined
def find_next(m, op):
    """next_item() of several."""
    if set_item(m, op, m.state[op + O_ITEM_END]):
        return True
    set_item(m, op, m.state[op + O_START])
    return False


@kernel
def next_item(m, op):
    """Whether there is another item, which becomes the record's; behind the last comes the first."""
    state = m.state
    alone = state[op + O_ITEM_START] == state[op + O_START] and state[op + O_ITEM_END] == state[op + O_END]
    return not alone and find_next(m, op)


@kernel
def rounded_item(m, first, last):
    """An item rounded out to huge pages; the inode ends with one."""
    inside = rounding(m) - U1
    return first & ~inside, (last + inside) & ~inside


def of_each(visit: Any) -> Any:
    """What does `visit` (m, inode, start, end) to each item of the unit (m, op), rounded out."""

    @outlined
    def visit_items(m, op):
        state = m.state
        first, last = find_item(m, op, state[op + O_START])
        while first < last:
            start, end = rounded_item(m, first, last)
            visit(m, state[op + O_INODE], start, end)
            first, last = find_item(m, op, last)

    return visit_items


begin_each = of_each(begin_range)
end_each = of_each(end_range)


@outlined
def note_items(m, op):
    """Note the unit's work list; the first item is next."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    flip = U0 if state[op + O_TO_PRIVATE] != U0 else ALL
    bits = work_list(state, node)
    for word in range(state[op + O_START] >> U6, (state[op + O_END] + U63) >> U6):
        state[bits + word] = state[state[node + I_WORD] + word] ^ flip
    set_item(m, op, state[op + O_START])


@kernel
def begin_items(m, op):
    """Find the unit's items, and begin an invalidation for each; the first item is next."""
    state = m.state
    if is_one_page(state, op):
        state[op + O_ITEM_START] = state[op + O_START]
        state[op + O_ITEM_END] = state[op + O_END]
    else:
        note_items(m, op)
    if is_watched(state):
        begin_each(m, op)
    return GO


@outlined
def fail_zap_item(m, op, status):
    """The item's zap cannot be done: nothing is stored (inference: rfc2 knows no leaves that have to be split)."""
    end_items(m, op)
    return fail(m, op, status, m.state[op + O_ITEM_START])


@kernel
def zap_item(m, op):
    """Drop the leaves of exactly the item, and flush. As zap()."""
    state = m.state
    start = state[op + O_ITEM_START]
    end = state[op + O_ITEM_END]
    take_converted(m, op, start, end)
    if zap_rounded(m):
        start, end = rounded_item(m, start, end)
    vms = vms_with_leaves(state, inode_row(state[op + O_INODE]), start, end)
    if vms != U0:
        status = split_before_zap(m, op, vms, start, end)
        if status != 0:
            return fail_zap_item(m, op, status)
        zap_kind(m, op, vms, start, end, state[op + O_ITEM_START], state[op + O_ITEM_END])
    return GO


unmap_item = unmaps(O_ITEM_START, O_ITEM_END)


@kernel
def zap_left_item(m, op):
    """To private: drop the leaves that no notifier has found, as no VMA maps them.

    Defect.CONVERT_KEEPS_LEAVES: posted code leaves it at the notifier. The zap, and its place, are inference.
    """
    state = m.state
    if state[R_DEFECTS] & DEFECT_CONVERT_KEEPS_LEAVES != U0:
        take_converted(m, op, state[op + O_ITEM_START], state[op + O_ITEM_END])  # devices' entries are not KVM's
        return GO
    return zap_item(m, op)


@kernel
def end_items(m, op):
    """End the invalidations that begin_items() began."""
    if is_watched(m.state):
        end_each(m, op)
    return GO


@kernel
def gate_item(m, op):
    """To private: the item's folios must be idle, else -EAGAIN; nothing has been stored."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    busy = busy_folio(m, node, state[op + O_ITEM_START], state[op + O_ITEM_END])
    if busy != NONE:
        note_pins(m, op, busy)
        end_items(m, op)
        return fail(m, op, -EAGAIN, busy)
    return GO


@kernel
def store_item(m, op):
    """Record the item's new shareability: the tree's nodes are allocated only now, after the zap."""
    state = m.state
    if frames_left(m) == U0:
        return fail_item(m, op, -ENOMEM, state[op + O_ITEM_START])
    store_range(m, op, state[op + O_ITEM_START], state[op + O_ITEM_END], U1 - state[op + O_TO_PRIVATE])
    return GO


@outlined
def item_spins(m, op, first):
    """A folio of the item, at page `first` or behind it in its block, cannot be frozen. A split is tried again from the
    store on."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    block = block_row(m, node, first)
    if is_stepped(state, op):
        return np.int64(blocked(m, op, block, first))
    start = state[op + O_ITEM_START]
    if state[op + O_TO_PRIVATE] == U0:
        store_shareability(m, node, start, state[op + O_ITEM_END], U0)
        leave_split(m, node, start, first)
    end_items(m, op)
    result(state, op, note_block(m, op, start, block, first))
    return np.int64(leave(m, op))


@kernel
def restructure_item(m, op):
    """Split or merge what the item touches, now that its shareability is stored. A split can fail."""
    state = m.state
    start = state[op + O_ITEM_START]
    if state[op + O_TO_PRIVATE] != U0:
        held = merge_blocks(m, op, start, state[op + O_ITEM_END], True)
        if held != NONE:
            return item_spins(m, op, held)
        went_on(m, op)
        return GO
    status, first = split_blocks(m, op, start, state[op + O_ITEM_END])
    if status == 0:
        went_on(m, op)
        return GO
    if status == -WOULD_SPIN:
        return item_spins(m, op, first)
    if state[R_DEFECTS] & DEFECT_ROLLBACK_AT_ZERO != U0 and start >> state[R_ORDER] == U0:
        merge_back(m, op, start, first)
        state[R_FLUSHES_HELD] = U0
        return stop(state, op, -NEVER)  # the index wraps around below 0: locks and invalidations stay
    return fail_item(m, op, status, first)


@step
def merge_back(m, op, start, end):
    """Merge the blocks of pages [start, end) that the conversion split: those that did not wait before."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    first = start >> state[R_ORDER] << state[R_ORDER]
    while first < end:
        block = block_row(m, node, first)
        private = shared_in_block(m, node, first) == U0
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            merge_pieces(m, node, block, first, first, first)
        elif m.state[block + B_STATE] == BLOCK_SPLIT and private and m.state[block + B_WAITS] == U0:
            merge_now(m, node, block, first)
        first += U1 << state[R_ORDER]


@step
def fail_item(m, op, status, index):
    """Roll back: items up to and with the failing one are converted the other way; then end with the error.

    A split back that fails is a WARN in the posted code, and leaves a huge folio with shared pages.
    """
    state = m.state
    failing = state[op + O_ITEM_END]
    first, last = find_item(m, op, state[op + O_START])
    while first < last and last <= failing:
        store_range(m, op, first, last, state[op + O_TO_PRIVATE])
        if state[op + O_TO_PRIVATE] == U0:
            merge_back(m, op, first, last)
        else:
            split_blocks(m, op, first, last)
        first, last = find_item(m, op, last)
    end_items(m, op)
    return fail(m, op, status, index)
