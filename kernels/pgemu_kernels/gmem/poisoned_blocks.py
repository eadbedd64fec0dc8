"""Conversions of huge pages that memory failure has hit, of which posted code says TODO.

What a reference does that memory failure keeps follows from the posted steps: the gate and the freeze meet it like any
other. What the flag does nobody has said (R_POISON_MOVES): a conversion that would split or merge such a huge page is
refused, or the poison goes with its page (folios/poison.py).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.rows import block_row
from pgemu_kernels.engine.shareability import shared_in_range
from pgemu_kernels.folios.poison import is_folio_poisoned
from pgemu_kernels.gmem.pieces import BLOCK_PAGES, PAGES, is_piece_split, piece_head
from pgemu_kernels.words.registers import R_ORDER, R_POISON_MOVES, R_POISONED_PAGES
from pgemu_kernels.words.rows import B_PFN, B_STATE, BLOCK_HUGE, BLOCK_PARTLY, BLOCK_SPLIT

U = np.uint64


@outlined
def poisoned_piece(m, head, first, last):
    """The first page of [first, last), the pages of a split block from frame `head` on, that is poisoned; NONE."""
    for index in range(first, last):
        if is_folio_poisoned(m, head + (index - first)):
            return index
    return NONE


@kernel
def shared_left(m, node, first, last, start, end):
    """Shared pages of [first, last), those in [start, end) left out."""
    low = max(first, start)
    high = min(last, end)
    return shared_in_range(m, node, first, last) - shared_in_range(m, node, low, high)


@outlined
def find_in_pieces(m, node, block, first, start, end, to_private):
    """The first poisoned page of a 2M piece of a block that converting pages [start, end) splits or merges, or NONE."""
    found = NONE
    index = max(first, start) & ~(PAGES - U1)
    last = min(first + BLOCK_PAGES, end)
    while index < last and found == NONE:
        split = is_piece_split(m, block, index) != U0
        head = piece_head(m, block, index)
        if not to_private and not split and is_folio_poisoned(m, head):
            found = max(index, start)
        if to_private and split and shared_left(m, node, index, index + PAGES, start, end) == U0:
            found = poisoned_piece(m, head, index, index + PAGES)
        index += PAGES
    return found


@outlined
def find_poisoned(m, node, start, end, to_private):
    """The first poisoned page of a huge page that converting pages [start, end) would split or merge, or NONE."""
    state = m.state
    order = state[R_ORDER]
    if state[R_POISONED_PAGES] == U0 or state[R_POISON_MOVES] != U0 or order == U0 or not splits_folios(m):
        return NONE
    first = start >> order << order
    found = NONE
    while first < end and found == NONE:
        block = block_row(m, node, first)
        last = first + (U1 << order)
        kind = state[block + B_STATE]
        head = state[block + B_PFN]
        if kind == BLOCK_HUGE and not to_private and is_folio_poisoned(m, head):
            found = max(first, start)
        if kind == BLOCK_PARTLY:
            found = find_in_pieces(m, node, block, first, start, end, to_private)
        whole = (kind == BLOCK_SPLIT or kind == BLOCK_PARTLY) and to_private and found == NONE
        if whole and shared_left(m, node, first, last, start, end) == U0:
            found = poisoned_piece(m, head, first, last)
        first = last
    return found


poisoned_block = full_only(find_poisoned, NONE)
