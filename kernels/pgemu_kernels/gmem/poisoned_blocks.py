"""Conversions of huge pages that memory failure has hit, of which posted code says TODO.

What a reference does that memory failure keeps follows from the posted steps: the gate and the freeze meet it like any
other. What the flag does nobody has said (R_POISON_MOVES): a conversion that would split or merge such a huge page is
refused, or the poison goes with its page (folios/poison.py).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.rows import block_row
from pgemu_kernels.engine.shareability import shared_in_range
from pgemu_kernels.folios.poison import is_folio_poisoned
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


@outlined
def find_poisoned(m, node, start, end, to_private):
    """The first poisoned page of a huge page that converting pages [start, end) would split or merge, or NONE."""
    state = m.state
    order = state[R_ORDER]
    if state[R_POISONED_PAGES] == U0 or state[R_POISON_MOVES] != U0 or order == U0 or not splits_folios(m):
        return NONE
    first = start >> order << order
    while first < end:
        block = block_row(m, node, first)
        last = first + (U1 << order)
        kind = state[block + B_STATE]
        head = state[block + B_PFN]
        if kind == BLOCK_HUGE and not to_private and is_folio_poisoned(m, head):
            return max(first, start)
        if (kind == BLOCK_SPLIT or kind == BLOCK_PARTLY) and to_private:
            low = max(first, start)
            high = min(last, end)
            left = shared_in_range(m, node, first, last) - shared_in_range(m, node, low, high)
            found = poisoned_piece(m, head, first, last) if left == U0 else NONE
            if found != NONE:
                return found
        first = last
    return NONE


poisoned_block = full_only(find_poisoned, NONE)
