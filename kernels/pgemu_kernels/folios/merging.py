"""Merging the 4K folios of a huge page again, in either posted form."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U6
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    INDEX,
    MAPPING,
    ONE_CACHED,
    struct_page,
)
from pgemu_kernels.folios.guest_folios import free_block, own_merged, stop_waiting
from pgemu_kernels.folios.hugetlb import inode_at
from pgemu_kernels.folios.poison import collect_poison, forget_unnoted, settle_poison
from pgemu_kernels.folios.split_pages import (
    HELD,
    join_list,
    join_pages,
    note_uptodate,
    prepare_head,
    stored_at_once,
)
from pgemu_kernels.folios.xarray import nodes_of, put_nodes
from pgemu_kernels.folios.zeroed import charge_unreached, flags_lie, zero_pages
from pgemu_kernels.words.enum_words import (
    EVENT_DEFERRED_MERGE,
    EVENT_FOLIO_FROZEN,
    EVENT_FOLIO_MERGED,
    EVENT_FREEZE_SPIN,
    EVENT_PAGE_CACHE_STORED,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
)
from pgemu_kernels.words.registers import (
    R_MERGE_ZEROES,
    R_ORDER,
    R_SPLIT_FORM,
)
from pgemu_kernels.words.rows import B_BITS, B_PFN, B_STATE, BLOCK_HUGE, BLOCK_SPLIT, SPLIT_FORM_RFC2

U = np.uint64

# A machine that has had a memory failure is none for the fast loops.
poison_collected = full_only(collect_poison, U0)
unnoted_forgotten = full_only(forget_unnoted, None)
poison_settled = full_only(settle_poison, None)


@outlined
def merge_pages(m, head, first, order, index, references, uptodate):
    """merge_folio(), when the pages have been joined."""
    pages = np.int64(U1 << order)
    cached = m.ram[first + MAPPING] != U0
    rfc2 = m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2
    charge(m, EVENT_FOLIO_FROZEN, pages)
    if cached:
        charge(m, EVENT_PAGE_CACHE_STORED, pages + 1 if rfc2 else np.int64(1))
        put_nodes(m, nodes_of(m.state, order))
        stored_at_once(m, np.int64(1) if rfc2 else np.int64(nodes_of(m.state, order)) + 1)  # xas_store() frees them
        m.ram[first + INDEX] = index
    prepare_head(m, head, first, order, references, uptodate)
    poison_settled(m, head, U1 << order, True)
    charge_one(m, EVENT_FOLIO_MERGED)
    return np.int64(0)


@outlined
def merge_folio(m, head, order, index, references):
    """Merge the 4K folios of a huge page, one reference each, into one with `references`: 0, or -WOULD_SPIN.

    -WOULD_SPIN: a page is referenced by somebody else; the posted code spins in its freeze loop until that is gone, a
    caller here has to come again. No memory is needed: without a frame for the new head page the folio merely stays
    unoptimised. rfc2 inserts the folio in the page cache again, for which it may want nodes that the removal of the
    pages freed (inference: it gets them).
    """
    first = struct_page(m, head)
    lost = poison_collected(m, head, U1 << order)
    busy, _, _, _ = join_pages(m, head, first, order)
    if busy:
        charge_one(m, EVENT_FREEZE_SPIN)
        poison_settled(m, head, U1 << order, False)
        return HELD
    unnoted_forgotten(m, head, lost)
    uptodate = m.ram[first + FLAGS] >> U3 & U1
    return merge_pages(m, head, first, order, index, references, uptodate)


@outlined
def merge_block(m, block, index, zeroed_word):
    """Merge a block's order-0 folios into one huge folio and optimise its vmemmap: 0, or -WOULD_SPIN as merge_folio().

    `zeroed_word`: where its pages' bits in `zeroed` begin; NONE: the folio is about to be freed. See merged_flag().
    """
    state = m.state
    head = state[block + B_PFN]
    order = state[R_ORDER]
    if merge_zeroed(m, block, head, order, index, zeroed_word) != 0:
        return HELD
    join_list(m, head, order)
    if state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        own_merged(m, block, struct_page(m, head))  # from the stash
    state[block + B_STATE] = BLOCK_HUGE
    stop_waiting(m, block)
    change(m.stats, GAUGE_BLOCKS_SPLIT, -1)
    change(m.stats, GAUGE_BLOCKS_HUGE, 1)
    return np.int64(0)


@outlined
def merged_flag(m, block, head, order, index, zeroed_word, uptodate, start, end):
    """PG_uptodate (0 or 1) of a folio that is merged, of whose pages `uptodate` have it, all in [start, end) of it.

    It has it if all of them do: no posted version says what happens to zeroing at a merge, and the code of none looks
    (inference: what was never zeroed is zeroed at the next use; R_MERGE_ZEROES: here). What the code does is
    Defect.MERGE_KEEPS_FLAG: prep_compound_page() leaves the first page its flags, and that of the others is gone.
    """
    pages = U1 << order
    if flags_lie(m):
        return m.ram[struct_page(m, head) + FLAGS] >> U3 & U1
    if uptodate == U0 or uptodate == pages:
        return uptodate >> order
    note_uptodate(m, head, order, start, end, zeroed_word)
    m.state[block + B_BITS] = U1
    if m.state[R_MERGE_ZEROES] == U0:
        return U0
    word = zeroed_word - (index >> U6)
    charge_unreached(m, inode_at(m, head), word, index, index + pages)
    zero_pages(m, word, index, index + pages, head)
    return U1


@outlined
def merge_zeroed(m, block, head, order, index, zeroed_word):
    """merge_folio() with a reference per page, for a folio of which some pages may be zeroed: see merge_block()."""
    first = struct_page(m, head)
    lost = poison_collected(m, head, U1 << order)
    busy, uptodate, start, end = join_pages(m, head, first, order)
    if busy:
        poison_settled(m, head, U1 << order, False)
        return HELD
    unnoted_forgotten(m, head, lost)
    flag = U0  # of a folio on its way to the pool
    if zeroed_word != NONE:
        flag = merged_flag(m, block, head, order, index, zeroed_word, uptodate, start, end)
    return merge_pages(m, head, first, order, index, U1 << order, flag)


@kernel
def leave_cache(m, order):
    """The pages of a split folio have left the page cache: their nodes are free."""
    put_nodes(m, nodes_of(m.state, order))


@outlined
def revive(m, block):
    """The last piece of a zombie block was put: the worker merges it and gives it back to the pool."""
    head = m.state[block + B_PFN]
    for i in range(U1 << m.state[R_ORDER]):
        m.ram[struct_page(m, head + i) + COUNTS] = ONE_CACHED  # as merge_block() expects them
    m.state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, -1)
    change(m.stats, GAUGE_BLOCKS_SPLIT, 1)
    charge_one(m, EVENT_DEFERRED_MERGE)
    merge_block(m, block, U0, NONE)
    free_block(m, block)
