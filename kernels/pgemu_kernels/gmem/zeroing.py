"""Zeroing of huge folios: the whole folio at its first use, or 4K at a time (`--zero`)."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U6, U63
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.words.enum_words import EVENT_FOLIO_ZEROED_PAGES, EVENT_PAGE_ZEROED
from pgemu_kernels.words.registers import R_ORDER, R_ZERO_PAGE
from pgemu_kernels.words.rows import I_ZEROED


@outlined
def zero_pages(m, word, first, last, pfn):
    """Zero those of pages [first, last) of an inode that never were; `word`: its bits, `pfn`: frame of `first`."""
    state = m.state
    zeroed = np.int64(0)
    for index in range(first, last):
        at = word + (index >> U6)
        bit = U1 << (index & U63)
        if state[at] & bit == U0:
            state[at] |= bit
            zeroed += 1
            zero_contents(m, pfn + index - first, U1)
    if zeroed != 0:
        charge(m, EVENT_PAGE_ZEROED, zeroed)


@outlined
def zero_now(m, node, index, pfn, level, order, page):
    """zero_folio() of a folio, with its struct page at `page`, that is not up to date."""
    inside = (U1 << order) - U1
    if inside == U0:
        m.ram[page + FLAGS] |= PG_UPTODATE
        charge_one(m, EVENT_PAGE_ZEROED)
        zero_contents(m, pfn, U1)
    elif m.state[R_ZERO_PAGE] == U0:
        m.ram[page + FLAGS] |= PG_UPTODATE
        charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(inside + U1))
        zero_contents(m, pfn & ~inside, inside + U1)
    else:
        shown = pages_of(level) - U1
        first = index & ~shown
        zero_pages(m, m.state[node + I_ZEROED], first, first + shown + U1, pfn & ~shown)


@kernel
def zero_folio(m, node, index, pfn, level, order):
    """Zero what an access to page `index` (frame `pfn`), in a folio of `order`, will show through a leaf of `level`.

    A folio of order 0 has its own PG_uptodate. By folio that of the head speaks for all pages of a larger one, and the
    first use zeroes all of them. By page a bit per page is kept beside (inference: no posted code has it), and a huge
    leaf needs every page below it zeroed. Where the folio's struct page lies in `ram` is returned.
    """
    page = struct_page(m, pfn & ~((U1 << order) - U1))
    if m.ram[page + FLAGS] & PG_UPTODATE == U0:
        zero_now(m, node, index, pfn, level, order, page)
    return page


@outlined
def clear_zeroed(m, node, index):
    """A huge page left the inode: none of its pages counts as zeroed. 4K folios have their flag."""
    if m.state[R_ORDER] == U0:
        return
    word = m.state[node + I_ZEROED] + (index >> U6)
    for i in range(word, word + (U1 << (m.state[R_ORDER] - U6))):
        m.state[i] = U0
