"""Split of a huge folio to 4K folios, and merge of these: design restructure."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U3, U6, U8, U32, U64
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    BLOCKS_HUGE,
    BLOCKS_SPLIT,
    BLOCKS_ZOMBIE,
    DEFERRED_MERGE,
    FOLIO_GATE_CHECKED,
    FOLIO_MERGED,
    FOLIO_SPLIT,
    PAGE_CACHE_STORED,
    PAGE_ZEROED,
    STRUCT_PAGE_BYTES,
    STRUCT_PAGE_WRITTEN,
    change,
    charge,
    charge_one,
)
from pgemu_kernels.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    FLAGS_KEPT,
    HUGETLB_VMEMMAP_OPTIMIZED,
    INDEX,
    MAPPING,
    MEMCG,
    NO_MAPCOUNT,
    ONE_CACHED,
    PG_HEAD,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    TAIL_MAPPING,
    struct_page,
)
from pgemu_kernels.hstate import list_add, list_del
from pgemu_kernels.hugetlb import free_block, own_merged, write_order
from pgemu_kernels.layout import (
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_SPLIT,
    EBUSY,
    H_ACTIVE,
    R_HSTATE,
    R_HVO,
    R_ORDER,
    R_ZERO_PAGE,
)
from pgemu_kernels.memory import zero_contents
from pgemu_kernels.vmemmap import compound_info, optimize, restore

U = np.uint64

# Bytes stored in each tail. Split: flags, mapping, index, compound_info, memcg_data and refcount
# (mm/huge_memory.c:__split_folio_to_order()). Merge: mapping, compound_info, private
# (prep_compound_tail()), the refcount that freezing takes, and the flags (inference: a tail that kept
# PG_uptodate would be copied into every page of the next restore).
SPLIT_BYTES = 44
MERGE_BYTES = 36


@outlined
def split_block(m, block, index, zeroed_word):
    """Split the huge folio of a block into order-0 folios: 0, or -ENOMEM with nothing changed.

    `index` is the block's first page, `zeroed_word` where its bits in `zeroed` begin (they tell which
    pages are up to date where zeroing goes by page). The vmemmap is restored first, then every tail
    becomes a folio of its own with the page cache's reference: mm/hugetlb_restructuring.c of the posted
    branch, mm/huge_memory.c:__split_folio_to_order().
    """
    ram = m.ram
    state = m.state
    head = m.state[block + B_PFN]
    order = state[R_ORDER]
    first = struct_page(m, head)
    if ram[first + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED != U0:
        status = restore(m, head, order)
        if status != 0:
            return status
    list_del(m, head)
    flags = ram[first + FLAGS] & ~PG_HEAD
    whole = flags & PG_UPTODATE != U0
    mapping = ram[first + MAPPING]
    memcg = ram[first + MEMCG]
    pages = U1 << order
    for base in range(U0, pages, U64):
        page = struct_page(m, head + base)
        bits = U0 if whole else m.state[zeroed_word + (base >> U6)]
        for i in range(U64):
            ram[page + FLAGS] = flags | ((bits >> i & U1) << U3)
            ram[page + COMPOUND] = U0
            ram[page + MAPPING] = mapping
            ram[page + INDEX] = index + base + i
            ram[page + COUNTS] = ONE_CACHED
            ram[page + MEMCG] = memcg
            page += U8
    ram[first + COMPOUND] = U0
    ram[first + PRIVATE] = U0
    m.state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, BLOCKS_HUGE, -1)
    change(m.stats, BLOCKS_SPLIT, 1)
    charge_one(m, FOLIO_SPLIT)
    charge(m, STRUCT_PAGE_WRITTEN, np.int64(pages) - 1)
    charge(m, STRUCT_PAGE_BYTES, SPLIT_BYTES * (np.int64(pages) - 1))
    charge(m, PAGE_CACHE_STORED, np.int64(pages))
    return np.int64(0)


@kernel
def survey(m, head, pages):
    """Look over a block's 4K folios: (first one held by more than the page cache, or NONE; how many are up to date)."""
    ram = m.ram
    uptodate = U0
    for base in range(U0, pages, U64):
        page = struct_page(m, head + base)
        for i in range(U64):
            if ram[page + COUNTS] != ONE_CACHED:
                return base + i, uptodate
            uptodate += ram[page + FLAGS] >> U3 & U1
            page += U8
    return NONE, uptodate


@kernel
def zero_the_rest(m, head, pages):
    """Zero the 4K folios of a block that are not up to date."""
    for i in range(pages):
        if m.ram[struct_page(m, head + i) + FLAGS] & PG_UPTODATE == U0:
            zero_contents(m, head + i, U1)


@kernel
def finish_merge(m, head, first, head_flags, uptodate):
    """The head of a merged folio, referenced once per base page."""
    ram = m.ram
    state = m.state
    order = state[R_ORDER]
    head_flags = (head_flags & ~PG_UPTODATE) | PG_HEAD
    ram[first + FLAGS] = head_flags | PG_UPTODATE if uptodate else head_flags
    ram[first + COMPOUND] = U0
    ram[first + COUNTS] = PGTY_HUGETLB | U1 << (order + U32)
    write_order(ram, state, head, first, order)


@outlined
def merge_block(m, block, index, zeroed_word):
    """Merge a block's order-0 folios into one huge folio and optimise its vmemmap: 0, or -EBUSY.

    -EBUSY: a folio has a reference besides the page cache's; the posted code spins in its freeze loop
    until that is gone, a caller here has to come again. No memory is needed: without a frame for the
    new head page the folio merely stays unoptimised.

    Inference: where the folio's flag must speak for all pages and only some were zeroed, the others are
    zeroed here; where zeroing goes by page, their bits go to `zeroed` from `zeroed_word` on (NONE: the
    folio is about to be freed). No posted version says.
    """
    ram = m.ram
    state = m.state
    head = m.state[block + B_PFN]
    order = state[R_ORDER]
    pages = U1 << order
    busy, uptodate = survey(m, head, pages)
    if busy != NONE:
        return np.int64(-EBUSY)
    by_page = state[R_ZERO_PAGE] != U0
    if zeroed_word == NONE:
        uptodate = U0  # the folio is on its way to the pool
    elif not by_page and U0 < uptodate < pages:
        zero_the_rest(m, head, pages)
        charge(m, PAGE_ZEROED, np.int64(pages - uptodate))
        uptodate = pages
    compound = compound_info(state, head, order)
    first = struct_page(m, head)
    flags = ram[first + FLAGS]
    head_flags = ram[first + FLAGS]
    mapping = ram[first + MAPPING]
    for base in range(U0, pages, U64):
        page = struct_page(m, head + base)
        bits = U0
        for i in range(U64):
            bits |= (ram[page + FLAGS] >> U3 & U1) << i
            ram[page + FLAGS] = flags & FLAGS_KEPT
            ram[page + COMPOUND] = compound
            ram[page + MAPPING] = TAIL_MAPPING
            ram[page + PRIVATE] = U0
            ram[page + COUNTS] = NO_MAPCOUNT
            page += U8
        if by_page and zeroed_word != NONE:
            m.state[zeroed_word + (base >> U6)] = bits
    finish_merge(m, head, first, head_flags, uptodate == pages)
    own_merged(m, block, first)
    list_add(m, state[R_HSTATE] + H_ACTIVE, head)
    ram[first + MAPPING] = mapping
    ram[first + INDEX] = index
    m.state[block + B_STATE] = BLOCK_HUGE
    m.state[block + B_WAITS] = U0
    change(m.stats, BLOCKS_SPLIT, -1)
    change(m.stats, BLOCKS_HUGE, 1)
    charge_one(m, FOLIO_MERGED)
    charge(m, FOLIO_GATE_CHECKED, np.int64(pages))  # each is frozen
    charge(m, STRUCT_PAGE_WRITTEN, np.int64(pages) - 1)
    charge(m, STRUCT_PAGE_BYTES, MERGE_BYTES * (np.int64(pages) - 1))
    charge_one(m, PAGE_CACHE_STORED)
    if state[R_HVO] != U0:
        optimize(m, head, order)
    return np.int64(0)


@outlined
def revive(m, block):
    """The last piece of a zombie block was put: the worker merges it and gives it back to the pool."""
    head = m.state[block + B_PFN]
    for i in range(U1 << m.state[R_ORDER]):
        m.ram[struct_page(m, head + i) + COUNTS] = ONE_CACHED  # as merge_block() expects them
    m.state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, BLOCKS_ZOMBIE, -1)
    change(m.stats, BLOCKS_SPLIT, 1)
    charge_one(m, DEFERRED_MERGE)
    merge_block(m, block, U0, NONE)
    free_block(m, block)
