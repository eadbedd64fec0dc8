"""Zeroing of huge folios: the whole folio at its first use, or 4K at a time (`--zero`)."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U6, U9, U63
from pgemu_kernels.engine.charge import FOLIO_ZEROED_PAGES, PAGE_ZEROED, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.words.registers import R_ORDER, R_ZERO_PAGE
from pgemu_kernels.words.rows import I_ZEROED

U = np.uint64


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
        charge(m, PAGE_ZEROED, zeroed)


@kernel
def zero_huge(m, node, index, pfn, level):
    """Zero what an access to page `index` (frame `pfn`) of an unsplit folio will show through a leaf of `level`."""
    zero_folio(m, node, index, pfn, level, m.state[R_ORDER])


@kernel
def zero_folio(m, node, index, pfn, level, order):
    """The same of a folio of any order.

    By folio, PG_uptodate of the head speaks for all pages and the first use zeroes all of them. By
    page, a bit per page is kept beside (inference: no posted code has it), and a huge leaf needs every
    page below it zeroed.
    """
    state = m.state
    inside = (U1 << order) - U1
    page = struct_page(m, pfn & ~inside)
    flags = m.ram[page + FLAGS]
    if flags & PG_UPTODATE != U0:
        return
    if state[R_ZERO_PAGE] == U0:
        m.ram[page + FLAGS] = flags | PG_UPTODATE
        if inside == U0:
            charge_one(m, PAGE_ZEROED)
        else:
            charge(m, FOLIO_ZEROED_PAGES, np.int64(inside + U1))
        zero_contents(m, pfn & ~inside, inside + U1)
        return
    pages = U1 << (U9 * (level - U1))
    first = index & ~(pages - U1)
    zero_pages(m, state[node + I_ZEROED], first, first + pages, pfn & ~(pages - U1))


@outlined
def clear_zeroed(m, node, index):
    """A huge page left the inode: none of its pages counts as zeroed. 4K folios have their flag."""
    if m.state[R_ORDER] == U0:
        return
    word = m.state[node + I_ZEROED] + (index >> U6)
    for i in range(word, word + (U1 << (m.state[R_ORDER] - U6))):
        m.state[i] = U0
