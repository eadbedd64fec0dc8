"""Folios of 2M that the page allocator gives to guest_memfd of 4K pages (Config.large_folios), and their pieces.

As captured with the smallest change of pfnmap: a fault takes one where nothing smaller is in the way, and a hole in a
part of it splits it. Every page has its row, with its frame; which pages are one folio is told by their struct pages,
as everywhere else. mm/huge_memory.c, mm/page_alloc.c
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U9, U32, U511, U512
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.handle import full_only, parameter
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.folios.buddy import free_page
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    FLAGS_KEPT,
    INDEX,
    MAPPING,
    NO_MAPCOUNT,
    ONE_CACHED,
    PG_HEAD,
    TAIL_MAPPING,
    folio_order,
    reference_count,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.guest_folios import forget_block, return_to_pool
from pgemu_kernels.folios.hugetlb import mapping_address, prep_compound_head
from pgemu_kernels.folios.page_allocator import count_small, take_pages
from pgemu_kernels.folios.page_cache import charge_added
from pgemu_kernels.folios.policy import preferred_node
from pgemu_kernels.folios.split_pages import INHERITED
from pgemu_kernels.folios.vmemmap import compound_info, rewrite_pages
from pgemu_kernels.words.enum_words import (
    EVENT_PAGE_CACHE_STORED,
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_ZOMBIE,
)
from pgemu_kernels.words.registers import R_HWPOISON, R_INIT_ON_ALLOC, R_LARGE_FOLIOS, R_MASK_TAILS, R_NODES
from pgemu_kernels.words.rows import B_PFN, B_STATE, BLOCK_ABSENT, BLOCK_HUGE, I_PAGES

U = np.uint64
_BYTES = np.int64(48)  # of each struct page of a folio that is made: all words but two

large_folios = parameter(R_LARGE_FOLIOS, U0)


@outlined
def head_and_order(m, pfn):
    """(first frame, order) of the folio that a frame is a page of: include/linux/page-flags.h:compound_head()."""
    page = struct_page(m, pfn)
    link = m.ram[page + COMPOUND]
    if m.ram[page + FLAGS] & PG_HEAD == U0:
        if link & U1 == U0:
            return pfn, U0
        at = vmemmap_address(m.state, pfn) & link if m.state[R_MASK_TAILS] != U0 else link - U1
        pfn = (at - vmemmap_address(m.state, U0)) >> U6
        page = struct_page(m, pfn)
    return pfn, folio_order(m.ram, page)


@kernel
def order_of_row(m, block):
    """Order of the folio that has the page of a block row."""
    _, order = head_and_order(m, m.state[block + B_PFN])
    return order


order_in_row = full_only(order_of_row, U0)


@outlined
def make_folio(m, head, order, flags, mapping, index):
    """Make 2^order pages one folio, of which the page cache has all references: prep_compound_page(), and as
    __split_folio_to_order() leaves a piece.
    """
    ram = m.ram
    kept = (FLAGS_KEPT | m.state[R_HWPOISON], U0, NONE, U0), (U0, U0, U0, U0)
    tail = (U0, compound_info(m.state, head, order), U0, TAIL_MAPPING), (U0, U0, NO_MAPCOUNT, U0)
    rewrite_pages(m, head, head + (U1 << order), kept, tail)
    first = struct_page(m, head)
    ram[first + FLAGS] |= flags | PG_HEAD if order != U0 else flags
    ram[first + COMPOUND] = U0
    ram[first + MAPPING] = mapping
    ram[first + INDEX] = index
    ram[first + COUNTS] = NO_MAPCOUNT | U1 << (order + U32)
    if order != U0:
        prep_compound_head(ram, m.state, head, first, order)
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, np.int64(U1 << order))
    charge(m, EVENT_STRUCT_PAGE_BYTES, _BYTES << np.int64(order))


# --------------------------------------------------------------------------- allocation


@kernel
def is_free_range(m, node, first):
    """Whether nothing is allocated under 512 pages of an inode."""
    index = first
    while index < first + U512 and m.state[block_row(m, node, index) + B_STATE] == BLOCK_ABSENT:
        index += U1
    return index == first + U512


@outlined
def take_large(m, inode, index):
    """A folio of 2M for the block around a page, with one reference: its first frame, or NONE.

    As captured: where the block's first page is there nothing is tried; else one is allocated, and freed again where
    the page cache has something else in the block (-EEXIST), so that what a stale entry shows of it is zero by then.
    """
    state = m.state
    node = inode_row(inode)
    first = index & ~U511
    if first + U512 > state[node + I_PAGES] or state[block_row(m, node, first) + B_STATE] != BLOCK_ABSENT:
        return NONE
    head = take_pages(m, U9, preferred_node(m, node, index) if state[R_NODES] > U1 else U0)
    if head == NONE:
        return NONE
    count_small(m, np.int64(512), np.int64(0))  # it left the free blocks, not the guests' memory
    if state[R_INIT_ON_ALLOC] != U0:
        zero_contents(m, head, U512)
    make_folio(m, head, U9, U0, U0, first)
    m.ram[struct_page(m, head) + COUNTS] = ONE_CACHED
    if not is_free_range(m, node, first):
        free_page(m, head)
        return NONE
    return head


@outlined
def add_large(m, inode, index, head):
    """Put what take_large() gave in the page cache: False where somebody was faster in its block, and it goes back."""
    state = m.state
    node = inode_row(inode)
    first = index & ~U511
    if not is_free_range(m, node, first):
        free_page(m, head)
        return False
    page = struct_page(m, head)
    m.ram[page + MAPPING] = mapping_address(inode)
    m.ram[page + COUNTS] = NO_MAPCOUNT | U512 << U32
    for i in range(U512):
        block = block_row(m, node, first + i)
        state[block + B_PFN] = head + i
        state[block + B_STATE] = BLOCK_HUGE
    change(m.stats, GAUGE_BLOCKS_HUGE, 512)
    charge_added(m)
    return True


# --------------------------------------------------------------------------- the end


@outlined
def release_large(m, node, head, order):
    """Truncate a folio: out of the page cache, and to the page allocator now or with its last reference."""
    ram = m.ram
    page = struct_page(m, head)
    first = ram[page + INDEX]
    pages = U1 << order
    for index in range(first, first + pages):
        forget_block(m, block_row(m, node, index))
    change(m.stats, GAUGE_BLOCKS_HUGE, -np.int64(pages))
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    extra = reference_count(ram, page) - pages
    if extra == U0:
        return_to_pool(m, head)
        return
    ram[page + COUNTS] = NO_MAPCOUNT | extra << U32
    ram[page + MAPPING] = U0
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, np.int64(pages))


@outlined
def split_to_pages(m, head, order):
    """Split a folio to 4K ones: mm/huge_memory.c:split_huge_page(); nobody but the page cache refers to it."""
    page = struct_page(m, head)
    flags = m.ram[page + FLAGS] & INHERITED
    mapping = m.ram[page + MAPPING]
    index = m.ram[page + INDEX]
    for i in range(U1 << order):
        make_folio(m, head + i, U0, flags, mapping, index + i)


@outlined
def split_by_halves(m, head, order, at):
    """Split a folio so that page `at` of it is one of order 0, the others as large as can be: pieces by halves.

    mm/huge_memory.c:try_folio_split_to_order(), __split_unmapped_folio(); nobody but the page cache refers to it.
    """
    page = struct_page(m, head)
    flags = m.ram[page + FLAGS] & INHERITED
    mapping = m.ram[page + MAPPING]
    index = m.ram[page + INDEX]
    start = U0
    while order != U0:
        order -= U1
        half = U1 << order
        other = start + half if at < start + half else start
        make_folio(m, head + other, order, flags, mapping, index + other)
        start = start + half - (other - start)
    make_folio(m, head + start, U0, flags, mapping, index + start)
