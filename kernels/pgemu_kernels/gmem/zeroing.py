"""Zeroing at the first use: the whole folio, or 4K at a time (`--zero`), or as the branch of December 2025 has it."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U6, U63
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.rows import block_row, broken
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.folios.zeroed import (
    all_zeroed,
    bits_in,
    charge_unreached,
    flags_lie,
    keeps_shown,
    knows_flags_only,
    note_zeroed,
    shown_bits,
    zero_pages,
)
from pgemu_kernels.words.enum_words import (
    BROKEN_LOST_CONTENTS,
    DEFECT_UPTODATE_UNZEROED,
    EVENT_FOLIO_ZEROED_PAGES,
    EVENT_PAGE_ZEROED,
)
from pgemu_kernels.words.registers import R_DEFECTS, R_ORDER, R_ZERO_PAGE
from pgemu_kernels.words.rows import B_BITS, I_WORDS, I_ZEROED, STATE_INODES

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
    if m.state[block_row(m, node, first) + B_BITS] == U0 or bits_in(m, word, first, first + pages) == U0:
        charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(pages))
        zero_contents(m, pfn, pages)
    else:
        zero_pages(m, word, first, first + pages, pfn)


@outlined
def zero_by_flag(m, node, index, pfn, order, page):
    """zero_now() of code that knows PG_uptodate only.

    RFC v2 zeroes all of a folio without the flag. Where a merge lost it (MERGE_KEEPS_FLAG), so are pages that are in
    use. Defect.UPTODATE_UNZEROED clears the folio's first 4K, whatever page is asked for.
    """
    inside = (U1 << order) - U1
    pages = U1 if m.state[R_DEFECTS] & DEFECT_UPTODATE_UNZEROED != U0 else inside + U1
    word = m.state[node + I_ZEROED]
    first = index & ~inside
    if pages == U1:
        charge_one(m, EVENT_PAGE_ZEROED)
    else:
        charge_unreached(m, inode_of(node), word, first, first + pages)
        charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(pages))
    if bits_in(m, shown_bits(m.state, node), first, first + pages) != U0:
        broken(m.state, BROKEN_LOST_CONTENTS, first)
    zero_contents(m, pfn & ~inside, pages)
    note_zeroed(m, word, first, first + pages)
    m.state[block_row(m, node, index) + B_BITS] = U1
    m.ram[page + FLAGS] |= PG_UPTODATE


@outlined
def note_small(m, node, index):
    """A 4K folio of a huge page was zeroed, where flags lie."""
    note_zeroed(m, m.state[node + I_ZEROED], index, index + U1)
    m.state[block_row(m, node, index) + B_BITS] = U1


@outlined
def mark_whole(m, node, index, order, page):
    """A folio that is zeroed by page is up to date when all of it is zeroed."""
    inside = (U1 << order) - U1
    if all_zeroed(m, m.state[node + I_ZEROED], index & ~inside, (index | inside) + U1):
        m.ram[page + FLAGS] |= PG_UPTODATE


@outlined
def zero_large(m, node, index, pfn, level, order, page):
    """zero_now() of a huge folio: of all of it, or of the pages that a leaf of `level` shows."""
    state = m.state
    inside = (U1 << order) - U1
    shown = min(pages_of(level) - U1, inside)
    block = block_row(m, node, index)
    if state[R_ZERO_PAGE] == U0:
        zero_whole(m, node, index & ~inside, inside + U1, pfn & ~inside)
        m.ram[page + FLAGS] |= PG_UPTODATE
    elif shown == inside and state[block + B_BITS] == U0 and not flags_lie(m):  # all at once: no bit is needed
        charge(m, EVENT_PAGE_ZEROED, np.int64(inside + U1))
        zero_contents(m, pfn & ~inside, inside + U1)
        m.ram[page + FLAGS] |= PG_UPTODATE
    else:
        state[block + B_BITS] = U1
        zero_pages(m, state[node + I_ZEROED], index & ~shown, (index | shown) + U1, pfn & ~shown)
        mark_whole(m, node, index, order, page)


@kernel
def zero_one(m, node, index, pfn, order, page):
    """zero_now() of one page of a huge folio, where zeroing goes by page."""
    state = m.state
    at = state[node + I_ZEROED] + (index >> U6)
    bit = U1 << (index & U63)
    if state[at] & bit == U0:
        state[at] |= bit
        state[block_row(m, node, index) + B_BITS] = U1
        charge_one(m, EVENT_PAGE_ZEROED)
        zero_contents(m, pfn, U1)
        if state[at] == ALL:
            mark_whole(m, node, index, order, page)


@outlined
def zero_now(m, node, index, pfn, level, order, page):
    """zero_folio() of a folio, with its struct page at `page`, that is not up to date."""
    if knows_flags_only(m):
        zero_by_flag(m, node, index, pfn, order, page)
    elif order == U0:
        m.ram[page + FLAGS] |= PG_UPTODATE
        charge_one(m, EVENT_PAGE_ZEROED)
        zero_contents(m, pfn, U1)
        if flags_lie(m):
            note_small(m, node, index)
    elif level == U1 and m.state[R_ZERO_PAGE] != U0:
        zero_one(m, node, index, pfn, order, page)
    else:
        zero_large(m, node, index, pfn, level, order, page)


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
def clear_bits(m, bits, index):
    """Clear the bits, of an inode's that begin at `bits`, of the huge page that begins at page `index`."""
    word = bits + (index >> U6)
    for i in range(word, word + (U1 << (m.state[R_ORDER] - U6))):
        m.state[i] = U0


@outlined
def clear_zeroed(m, node, index):
    """A huge page left the inode: none of its pages counts as zeroed, or shown. 4K folios have their flag."""
    block = block_row(m, node, index)
    if keeps_shown(m):
        clear_bits(m, shown_bits(m.state, node), index)
    if m.state[block + B_BITS] != U0:
        m.state[block + B_BITS] = U0
        clear_bits(m, m.state[node + I_ZEROED], index)
