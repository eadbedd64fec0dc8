"""Memory of the HugeTLB zone that is in no pool: the page allocator's, in blocks of 2M.

What of mm/page_alloc.c the pools need: huge pages come from it and go back to it. Its free lists are not modelled:
a bit per 2M block says that the block is free, the lowest free one is given out, and a free block is marked as one
buddy of order 9 (inference: Linux would coalesce two of them, and link them in lists whose neighbours nobody knows).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import (
    ALL,
    LOW32,
    NONE,
    U0,
    U1,
    U3,
    U6,
    U8,
    U9,
    U18,
    U63,
    U64,
    U511,
    U512,
    trailing_zeros,
)
from pgemu_kernels.engine.charge import change, charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    FLAGS_KEPT,
    NR_PAGES,
    NR_PAGES_6_12,
    PRIVATE,
    struct_page,
)
from pgemu_kernels.folios.hstate import ORDER_1G, node_of, node_row
from pgemu_kernels.folios.vmemmap import rewrite_pages
from pgemu_kernels.words.enum_words import (
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    GAUGE_BUDDY_BLOCKS,
    GAUGE_POOL_FREE,
)
from pgemu_kernels.words.registers import R_FOLIO_6_12, R_HWPOISON, R_ORDER
from pgemu_kernels.words.rows import H_FREE, H_PAGES, N_BASE, N_BLOCKS, N_HINT, N_PAGES, STATE_SMALL

U = np.uint64
PGTY_BUDDY = U(0xF0000000)
FREE_BYTES = 24  # mapping, compound_info, flags of each tail: mm/page_alloc.c:free_tail_page_prepare()


@kernel
def _bits(state, node, block):
    """Word with the bit of a block of a node."""
    return state[node_row(node) + N_BLOCKS] + (block >> U6)


@kernel
def is_free_block(state, node, block):
    return state[_bits(state, node, block)] >> (block & U63) & U1 != U0


@kernel
def _split_bits(state, node, block, order):
    """Word with the bit of a block whose huge page of order 9 or 18 is split: behind the bits of free blocks."""
    words = ((state[node_row(node) + N_PAGES] + U((1 << 18) - 1)) >> U18) << U3
    return _bits(state, node, block) + (words if order == U9 else words << U1)


@kernel
def note_split(state, head, order, split):
    """FOLIO_SPLIT made 4K folios of a huge page, or FOLIO_MERGE a huge page of them."""
    node = node_of(state, head)
    block = (head - state[node_row(node) + N_BASE]) >> U9
    word = _split_bits(state, node, block, order)
    bit = U1 << (block & U63)
    state[word] = state[word] | bit if split else state[word] & ~bit


@kernel
def is_noted_split(state, head, order):
    """Whether FOLIO_SPLIT split the huge page of this order that began at `head`, and nobody has merged it since."""
    node = node_of(state, head)
    block = (head - state[node_row(node) + N_BASE]) >> U9
    return state[_split_bits(state, node, block, order)] >> (block & U63) & U1 != U0


@kernel
def _blocks(state, node):
    return state[node_row(node) + N_PAGES] >> U9


@kernel
def count_small(m, pages, free):
    """`pages` more 4K pages are guest memory of the page allocator, `free` more of it are free (int64)."""
    m.state[STATE_SMALL + H_PAGES] += U(pages)
    m.state[STATE_SMALL + H_FREE] += U(free)
    change(m.stats, GAUGE_POOL_FREE, free)


@kernel
def count_blocks(m, n):
    """`n` (int64) more 2M blocks are free; where guests get 4K pages, these blocks are where they come from."""
    change(m.stats, GAUGE_BUDDY_BLOCKS, n)
    if m.state[R_ORDER] == U0:
        count_small(m, n * 512, n * 512)


@outlined
def take_block(m, node):
    """First frame of the lowest free 2M block of a node, taken; NONE if there is none."""
    state = m.state
    row = node_row(node)
    blocks = _blocks(state, node)
    block = state[row + N_HINT]
    while block < blocks:
        word = state[_bits(state, node, block)] & (ALL << (block & U63))
        if word != U0:
            block = (block & ~U63) + trailing_zeros(word)
            state[_bits(state, node, block)] &= ~(U1 << (block & U63))
            state[row + N_HINT] = block + U1
            count_blocks(m, np.int64(-1))
            return state[row + N_BASE] + (block << U9)
        block = (block | U63) + U1
    state[row + N_HINT] = blocks
    return NONE


@outlined
def take_block_at(m, pfn):
    """The free 2M block of a frame is taken. Its first page is no buddy any more."""
    state = m.state
    node = node_of(state, pfn)
    block = (pfn - state[node_row(node) + N_BASE]) >> U9
    state[_bits(state, node, block)] &= ~(U1 << (block & U63))
    page = struct_page(m, pfn & ~U511)
    m.ram[page + PRIVATE] = U0
    m.ram[page + COUNTS] |= LOW32
    count_blocks(m, np.int64(-1))


@outlined
def take_gigantic(m, node):
    """First frame of the lowest 1G of a node that is free throughout, taken; NONE. alloc_contig_pages()."""
    state = m.state
    blocks = _blocks(state, node)
    for first in range(U0, blocks & ~U511, U512):
        word = _bits(state, node, first)
        free = ALL
        for i in range(U8):
            free &= state[word + i]
        if free == ALL:
            for i in range(U8):
                state[word + i] = U0
            count_blocks(m, np.int64(-512))
            return state[node_row(node) + N_BASE] + (first << U9)
    return NONE


@kernel
def is_block_free(state, pfn):
    """Whether the 2M block of a frame is with the page allocator."""
    node = node_of(state, pfn)
    return is_free_block(state, node, (pfn - state[node_row(node) + N_BASE]) >> U9)


@outlined
def mark_free(m, pfn):
    """The 2M block at `pfn` is a free buddy: PageBuddy and its order in its first struct page, and its bit."""
    state = m.state
    page = struct_page(m, pfn)
    m.ram[page + PRIVATE] = U9
    m.ram[page + COUNTS] = (m.ram[page + COUNTS] & ~LOW32) | PGTY_BUDDY
    node = node_of(state, pfn)
    row = node_row(node)
    block = (pfn - state[row + N_BASE]) >> U9
    state[_bits(state, node, block)] |= U1 << (block & U63)
    if block < state[row + N_HINT]:
        state[row + N_HINT] = block
    count_blocks(m, np.int64(1))


@outlined
def has_poison(m, block):
    """Whether a page of a 2M block is poisoned."""
    found = False
    for base in range(block, block + U512, U64):
        page = struct_page(m, base)
        for _ in range(U64):
            found = found or m.ram[page + FLAGS] & m.state[R_HWPOISON] != U0
            page += U8
    return found


@kernel
def charge_tails(m, order, size):
    """`size` bytes were stored in each tail of a page that joins or leaves a pool.

    The published prices of a 2M page that does (HUGE_FOLIO_ALLOCATED, HUGE_FOLIO_FREED) hold its tails.
    """
    tails = np.int64(U1 << order) - 1
    if order == ORDER_1G:
        charge(m, EVENT_STRUCT_PAGE_WRITTEN, tails)
    charge(m, EVENT_STRUCT_PAGE_BYTES, size * tails)


@outlined
def free_pages(m, head, order, poisoned):
    """Free a folio of order 9 or 18 whose struct pages are all there; `poisoned`: 2M blocks with poison stay out.

    mm/page_alloc.c:__free_pages_prepare(): mapping, compound_info and flags of every tail, the order of the second
    page, PG_head of the first. Reference counts stay as they are: they are 0, but for those that a boot 1G page of
    7.3 inherited (captured: "Bad page state").
    """
    ram = m.ram
    pages = U1 << order
    kept = (FLAGS_KEPT | m.state[R_HWPOISON], U0, NONE, U0), (NONE, NONE, NONE, NONE)
    rewrite_pages(m, head, head + pages, kept, ((U0, U0, U0, U0), (U0, U0, U0, U0)))
    first = struct_page(m, head)
    ram[first + PRIVATE] = U0
    ram[first + COUNTS] |= LOW32
    ram[first + U8 + (NR_PAGES_6_12 if m.state[R_FOLIO_6_12] != U0 else NR_PAGES)] = U0
    charge_tails(m, order, FREE_BYTES)
    for block in range(head, head + pages, U512):
        if not poisoned or not has_poison(m, block):
            mark_free(m, block)


@kernel
def take_pages(m, order, node):
    """A free block of order 9 or 18 on a node, no longer a buddy: its first frame, or NONE."""
    pfn = take_gigantic(m, node) if order == ORDER_1G else take_block(m, node)
    if pfn != NONE:
        for block in range(pfn, pfn + (U1 << order), U512):
            page = struct_page(m, block)
            m.ram[page + PRIVATE] = U0
            m.ram[page + COUNTS] |= LOW32
    return pfn
