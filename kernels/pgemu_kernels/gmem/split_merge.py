"""Steps of a conversion that split folios, and that merge them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U511, U512
from pgemu_kernels.engine.charge import charge_one, result
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.engine.shareability import shared_in_2m, shared_in_block, shared_in_range
from pgemu_kernels.folios.guest_folios import start_waiting
from pgemu_kernels.folios.merging import merge_block
from pgemu_kernels.folios.splitting import split_block
from pgemu_kernels.gmem import piece_splits, pieces
from pgemu_kernels.gmem.conversion import (
    fail,
    in_pieces,
    leave,
    leave_split,
    lru_add_pieces,
    merge_lazy,
    merge_touched,
    note_touched,
    store_range,
)
from pgemu_kernels.gmem.spinning import blocked, is_stepped, note_block, went_on
from pgemu_kernels.words.enum_words import EVENT_FREEZE_SPIN
from pgemu_kernels.words.operations import GO, WOULD_SPIN
from pgemu_kernels.words.registers import (
    R_ORDER,
    R_SPLIT_FORM,
)
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_ZEROED,
    O_ACTOR,
    O_END,
    O_INODE,
    O_START,
    SPLIT_FORM_RFC2,
)


@kernel
def add_to_lru(m, op, head, pages):
    """Form rfc2: each page of a split folio joins the page cache by itself, and an LRU batch of its CPU."""
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        lru_add_pieces(m, head, pages, m.state[op + O_ACTOR])


@outlined
def split_pieces(m, op, node, block, first, start, end):
    """piece_splits.split_touched() piece by piece; the pages of those that it splits join the LRU batches."""
    index = start
    while index < end:
        last = min(end, (index | U511) + U1)
        before = pieces.is_split_at(m, block, index)
        status = piece_splits.split_touched(m, node, block, first, index, last)
        if status != 0:
            return status
        if not before:
            add_to_lru(m, op, pieces.piece_head(m, block, index), U512)
        index = last
    return np.int64(0)


@kernel
def whole_block(m, block, first, start):
    return first


@outlined
def first_unsplit_page(m, block, first, start):
    """The first page of the folio that a split failed at."""
    return piece_splits.first_unsplit_piece(m, block, first, start) if in_pieces(m) else first


split_any_pieces = full_only(split_pieces, np.int64(0))  # there are no pieces
first_unsplit = full_only(first_unsplit_page, whole_block)


@kernel
def needs_split(m, block, start, end):
    """Whether a block has a folio under pages [start, end) that is to be split. One of order 0 is none that could be.

    Of pieces only one is looked at here.
    """
    kind = m.state[block + B_STATE]
    if in_pieces(m) and kind == BLOCK_PARTLY:
        return start | U511 != end - U1 | U511 or not pieces.is_split_at(m, block, start)
    return kind == BLOCK_HUGE


@step
def split_one(m, op, node, block, first, start, end):
    """Split what is under pages [start, end) of a block that begins at `first`: 0, -ENOMEM or -WOULD_SPIN."""
    state = m.state
    if in_pieces(m):
        return split_any_pieces(m, op, node, block, first, start, end)
    status = split_block(m, block, first, state[node + I_ZEROED] + (first >> U6))
    if status == 0:
        add_to_lru(m, op, m.state[block + B_PFN], U1 << state[R_ORDER])
    return status


@kernel
def split_blocks(m, op, start, end):
    """Split what pages [start, end) touch: (0 or the error, first page of the folio it is about)."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    order = state[R_ORDER]
    first = start >> order << order
    while order != U0 and first < end:
        block = block_row(m, node, first)
        low = max(start, first)
        high = min(end, first + (U1 << order))
        if needs_split(m, block, low, high):
            status = split_one(m, op, node, block, first, low, high)
            if status != 0:
                return status, first_unsplit(m, block, first, start)
        first += U1 << order
    return np.int64(0), end


@kernel
def is_split(m, block):
    kind = m.state[block + B_STATE]
    return kind == BLOCK_SPLIT or kind == BLOCK_PARTLY


@kernel
def split(m, op):
    """To shared: split every huge folio that the unit touches, else -ENOMEM with the failing offset, or -WOULD_SPIN.

    Blocks split before the failing one stay split: no order but rfc2 unwinds.
    """
    state = m.state
    status, first = split_blocks(m, op, state[op + O_START], state[op + O_END])
    if status != 0:
        return split_failed(m, op, status, first)
    went_on(m, op)
    return GO


@outlined
def split_failed(m, op, status, first):
    """The unit's split failed at the folio that begins at page `first`."""
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), first)
    if status == -WOULD_SPIN and is_stepped(state, op):
        return np.int64(blocked(m, op, block, first))
    leave_split(m, inode_row(state[op + O_INODE]), state[op + O_START], first)
    if status != -WOULD_SPIN:
        return np.int64(fail(m, op, status, first))
    result(state, op, note_block(m, op, state[op + O_START], block, first))
    return np.int64(leave(m, op))


@outlined
def merge_now(m, node, block, first):
    """Merge a split block that is all private: whether somebody holds it, so that it stays split and waits."""
    if merge_block(m, block, first, m.state[node + I_ZEROED] + (first >> U6)) == 0:
        return False
    charge_one(m, EVENT_FREEZE_SPIN)
    start_waiting(m, block)
    return True


@outlined
def merge_failed(m, op, start, first):
    """The block that has page `first` cannot be merged, for somebody holds that page's folio or one behind it; pages
    from `start` on are left to do."""
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), first)
    if is_stepped(state, op):
        return np.int64(blocked(m, op, block, first))
    result(state, op, note_block(m, op, start, block, first))
    return np.int64(leave(m, op))


@step
def merge_one(m, node, block, first, start, end, stored):
    """Merge a block, which begins at page `first`, or what pages [start, end) touch of one in pieces; lazily, it only
    waits for the worker. The first page of what somebody holds, or NONE.
    """
    if m.state[block + B_STATE] == BLOCK_PARTLY:
        if merge_lazy(m) == U0:
            return merge_touched(m, node, block, first, start, end, stored)
        note_touched(m, node, block, first, start, end)
    elif merge_lazy(m) != U0:
        start_waiting(m, block)
    elif merge_now(m, node, block, first):
        return first
    return NONE


@kernel
def needs_merge(m, node, block, start, end):
    """Whether a block in pieces may be merged somewhere now that pages [start, end) of it are private: it waits for
    that, or they are of several pieces, or no other page of theirs is shared.
    """
    if m.state[block + B_WAITS] != U0 or start | U511 != end - U1 | U511:
        return True
    return shared_in_2m(m, node, start) == shared_in_range(m, node, start, end)


@kernel
def merge_blocks(m, op, start, end, stored):
    """Merge the split blocks that pages [start, end) touch and that have no shared page, but in [start, end) unless it
    is `stored` that they are private. Of folios of order 0 there is nothing to merge.

    A page of the first folio that somebody holds, or NONE. The blocks behind it are merged all the same, but for those
    whose pages are not stored as private yet.
    """
    held = NONE
    state = m.state
    node = inode_row(state[op + O_INODE])
    order = state[R_ORDER]
    first = start >> order << order
    while order != U0 and first < end and (stored or held == NONE):
        block = block_row(m, node, first)
        low = max(start, first)
        high = min(end, first + (U1 << order))
        kind = m.state[block + B_STATE]
        if in_pieces(m) and kind == BLOCK_PARTLY:
            if needs_merge(m, node, block, low, high):
                held = min(held, merge_one(m, node, block, first, low, high, stored))
        elif kind == BLOCK_SPLIT:
            shared = shared_in_block(m, node, first)
            if not stored:
                shared -= shared_in_range(m, node, low, high)
            if shared == U0:
                held = min(held, merge_one(m, node, block, first, low, high, stored))
        first += U1 << order
    return held


@kernel
def late_merge_failed(m, op, held):
    """merge_failed() after the store."""
    return merge_failed(m, op, m.state[op + O_START], held)


@outlined
def early_merge_failed(m, op, held):
    """merge_failed() before the store: blocks before the one that holds page `held` are merged, so their pages are
    stored as private."""
    state = m.state
    start = max(state[op + O_START], held >> state[R_ORDER] << state[R_ORDER])
    if start > state[op + O_START] and not is_stepped(state, op):
        store_range(m, op, state[op + O_START], start, U0)
    return np.int64(merge_failed(m, op, start, held))


def merges(stored: bool, failed: Any) -> Any:
    """To private: a step that merges every touched block which holds no shared page any more, or -WOULD_SPIN.

    stored: it comes after the store. failed: its end where somebody holds a page.
    """

    @kernel
    def merge_unit(m, op):
        held = merge_blocks(m, op, m.state[op + O_START], m.state[op + O_END], stored)
        if held != NONE:
            return failed(m, op, held)
        went_on(m, op)
        return GO

    return merge_unit


merge = merges(True, late_merge_failed)
merge_early = merges(False, early_merge_failed)  # fixup
