"""Steps of a conversion that split folios, and that merge them."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U6, U511, U512
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.engine.shareability import shared_in_2m, shared_in_block, shared_in_range
from pgemu_kernels.folios.hugetlb import start_waiting
from pgemu_kernels.folios.merging import merge_block
from pgemu_kernels.folios.splitting import split_block
from pgemu_kernels.gmem import piece_splits, pieces
from pgemu_kernels.gmem.conversion import (
    fail,
    in_pieces,
    leave_split,
    lru_add_pieces,
    merge_lazy,
    merge_touched,
    note_touched,
)
from pgemu_kernels.words.enum_words import EVENT_FREEZE_SPIN
from pgemu_kernels.words.operations import (
    GO,
)
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
    """Split what is to be split under pages [start, end) of a block that begins at `first`: 0, -ENOMEM or -EBUSY."""
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
    """To shared: split every huge folio that the unit touches, else -ENOMEM or -EBUSY with the failing offset.

    Blocks split before the failing one stay split: the plan knows no unwinding. A folio with a foreign
    reference cannot be frozen; the posted code spins until it can, here it is -EBUSY.
    """
    state = m.state
    status, first = split_blocks(m, op, state[op + O_START], state[op + O_END])
    if status != 0:
        leave_split(m, inode_row(state[op + O_INODE]), state[op + O_START], first)
        return fail(m, op, status, first)
    return GO


@outlined
def merge_now(m, node, block, first):
    """Merge a split block that is all private; one that somebody holds stays split and waits.

    The posted code spins in its freeze loop instead (inference: the next conversion that touches it tries again).
    """
    if merge_block(m, block, first, m.state[node + I_ZEROED] + (first >> U6)) != 0:
        charge_one(m, EVENT_FREEZE_SPIN)
        start_waiting(m, block)


@step
def merge_one(m, node, block, first, start, end):
    """Merge a block, which begins at page `first`, or what pages [start, end) touch of one in pieces; lazily, it only
    waits for the worker.
    """
    if m.state[block + B_STATE] == BLOCK_PARTLY:
        if merge_lazy(m) != U0:
            note_touched(m, node, block, first, start, end)
        else:
            merge_touched(m, node, block, first, start, end)
    elif merge_lazy(m) != U0:
        start_waiting(m, block)
    else:
        merge_now(m, node, block, first)


@kernel
def needs_merge(m, node, block, start, end):
    """Whether a block in pieces may be merged somewhere now that pages [start, end) of it are private: it waits for
    that, or they are of several pieces, or no other page of theirs is shared.
    """
    if m.state[block + B_WAITS] != U0 or start | U511 != end - U1 | U511:
        return True
    return shared_in_2m(m, node, start) == shared_in_range(m, node, start, end)


@kernel
def merge_blocks(m, op, start, end, besides):
    """Merge the split blocks that pages [start, end) touch and that have no shared page, but in [start, end) if
    `besides` (they are not stored as private yet). Of folios of order 0 there is nothing to merge.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    order = state[R_ORDER]
    first = start >> order << order
    while order != U0 and first < end:
        block = block_row(m, node, first)
        low = max(start, first)
        high = min(end, first + (U1 << order))
        kind = m.state[block + B_STATE]
        if in_pieces(m) and kind == BLOCK_PARTLY:
            if needs_merge(m, node, block, low, high):
                merge_one(m, node, block, first, low, high)
        elif kind == BLOCK_SPLIT:
            shared = shared_in_block(m, node, first)
            if besides:
                shared -= shared_in_range(m, node, low, high)
            if shared == U0:
                merge_one(m, node, block, first, low, high)
        first += U1 << order


@kernel
def merge(m, op):
    """To private, after the store: merge every touched block that holds no shared page any more."""
    merge_blocks(m, op, m.state[op + O_START], m.state[op + O_END], False)
    return GO


@kernel
def merge_early(m, op):
    """The same before the store (fixup)."""
    merge_blocks(m, op, m.state[op + O_START], m.state[op + O_END], True)
    return GO
