"""Zeroing at the first use: the whole folio, or 4K at a time (`--zero`), or as the branch of December 2025 has it."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U6, U63
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.rows import broken
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.folios.zeroed import (
    all_zeroed,
    charge_unreached,
    knows_flags_only,
    note_zeroed,
    zero_pages,
    zeroed_in,
)
from pgemu_kernels.words.enum_words import (
    BROKEN_LOST_CONTENTS,
    DEFECT_UPTODATE_UNZEROED,
    EVENT_FOLIO_ZEROED_PAGES,
    EVENT_PAGE_ZEROED,
)
from pgemu_kernels.words.registers import R_DEFECTS, R_ORDER, R_ZERO_PAGE
from pgemu_kernels.words.rows import I_WORDS, I_ZEROED, STATE_INODES

U = np.uint64


@kernel
def inode_of(node):
    return (node - STATE_INODES) // U(I_WORDS)


@outlined
def zero_whole(m, node, first, pages, pfn):
    """Zero a folio of `pages` from page `first` of an inode, frame `pfn`, on: what never was zeroed of it.

    kvm_gmem_prepare_folio() of RFC v2. Only after a merge there is something that was.
    """
    word = m.state[node + I_ZEROED]
    charge_unreached(m, inode_of(node), word, first, first + pages)
    if zeroed_in(m, word, first, first + pages) != U0:
        zero_pages(m, word, first, first + pages, pfn)
        return
    charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(pages))
    zero_contents(m, pfn, pages)
    note_zeroed(m, word, first, first + pages)


@outlined
def zero_by_flag(m, node, index, pfn, order, page):
    """zero_now() of code that knows PG_uptodate only: whether the machine has such.

    RFC v2 zeroes all of a folio without the flag. Where a merge lost it (MERGE_KEEPS_FLAG), so are pages that are in
    use. Defect.UPTODATE_UNZEROED clears the folio's first 4K, whatever page is asked for.
    """
    if not knows_flags_only(m):
        return False
    inside = (U1 << order) - U1
    pages = U1 if m.state[R_DEFECTS] & DEFECT_UPTODATE_UNZEROED != U0 else inside + U1
    word = m.state[node + I_ZEROED]
    first = index & ~inside
    if pages == U1:
        charge_one(m, EVENT_PAGE_ZEROED)
    else:
        charge_unreached(m, inode_of(node), word, first, first + pages)
        charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(pages))
    if zeroed_in(m, word, first, first + pages) != U0:
        broken(m.state, BROKEN_LOST_CONTENTS, first)
    zero_contents(m, pfn & ~inside, pages)
    note_zeroed(m, word, first, first + pages)
    m.ram[page + FLAGS] |= PG_UPTODATE
    return True


@outlined
def zero_now(m, node, index, pfn, level, order, page):
    """zero_folio() of a folio, with its struct page at `page`, that is not up to date."""
    state = m.state
    inside = (U1 << order) - U1
    if zero_by_flag(m, node, index, pfn, order, page):
        return
    if inside == U0:
        charge_one(m, EVENT_PAGE_ZEROED)
        zero_contents(m, pfn, U1)
        if state[R_ORDER] != U0:
            state[state[node + I_ZEROED] + (index >> U6)] |= U1 << (index & U63)
    elif state[R_ZERO_PAGE] == U0:
        zero_whole(m, node, index & ~inside, inside + U1, pfn & ~inside)
    else:
        shown = min(pages_of(level) - U1, inside)
        word = state[node + I_ZEROED]
        first = index & ~shown
        zero_pages(m, word, first, first + shown + U1, pfn & ~shown)
        if not all_zeroed(m, word, index & ~inside, (index & ~inside) + inside + U1):
            return
    m.ram[page + FLAGS] |= PG_UPTODATE


@kernel
def zero_folio(m, node, index, pfn, level, order):
    """Zero what an access to page `index` (frame `pfn`), in a folio of `order`, will show through a leaf of `level`.

    By folio PG_uptodate of the head speaks for all pages of the folio, and the first use zeroes all of them. By page
    the bits of zeroed.py are what the code goes by (inference: no posted code has them), and a huge leaf needs every
    page below it zeroed; the flag is set when all are. Where the folio's struct page lies in `ram` is returned.
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
