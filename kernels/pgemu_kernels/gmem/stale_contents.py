"""Pages that a new leaf shows guest or host though nobody has zeroed them since they are the inode's.

They are counted when it happens, a page once until it leaves the inode, whatever becomes of the leaf: the rule about
stale contents (rules/invariants.py) looks at the leaves that are there when it is checked.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U6, U63, population
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.rows import block_row
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.folios.zeroed import flags_lie, shown_bits, word_mask
from pgemu_kernels.gmem.levels import folio_order_at, frame_of
from pgemu_kernels.words.enum_words import EVENT_STALE_PAGE_SHOWN
from pgemu_kernels.words.rows import B_BITS, I_ZEROED

U = np.uint64


@outlined
def zeroed_of_folio(m, node, index):
    """(what is known to be zeroed in the word of page `index`, as far as its folio goes; past the folio's last page).

    Where flags lie a bit says it of every page, whatever its folio is.
    """
    word = m.state[m.state[node + I_ZEROED] + (index >> U6)]
    end = (index | U63) + U1
    if flags_lie(m):
        return word, end
    block = block_row(m, node, index)
    inside = (U1 << folio_order_at(m, block, index)) - U1
    page = struct_page(m, frame_of(m, block, index) & ~inside)
    if m.ram[page + FLAGS] & PG_UPTODATE != U0:
        word = ALL
    elif m.state[block + B_BITS] == U0:
        word = U0
    return word, min(end, (index | inside) + U1)


@outlined
def count_stale(m, node, index, level):
    """A new leaf of `level` shows the pages around page `index`, all of them allocated. Only where keeps_shown()."""
    state = m.state
    shown = shown_bits(state, node)
    at = index & ~(pages_of(level) - U1)
    end = at + pages_of(level)
    stale = U0
    while at < end:
        zeroed, last = zeroed_of_folio(m, node, at)
        last = min(last, end)
        new = word_mask(at, last) & ~state[shown + (at >> U6)]
        state[shown + (at >> U6)] |= new
        stale += population(new & ~zeroed)
        at = last
    if stale != U0:
        charge(m, EVENT_STALE_PAGE_SHOWN, np.int64(stale))
