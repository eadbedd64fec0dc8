"""A 1G folio is split to 2M folios, some of these to 4K."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.engine.shareability import shared_in_2m
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    INDEX,
    MAPPING,
    MEMCG,
    PG_HEAD,
    PG_UPTODATE,
    PRIVATE,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hugetlb import inode_at, prep_compound
from pgemu_kernels.folios.hvo import optimize_batch, restore
from pgemu_kernels.folios.merging import poison_settled
from pgemu_kernels.folios.split_pages import (
    HELD,
    INHERITED,
    NO_MEMORY,
    PAGE_FLAGS,
    leave_list,
)
from pgemu_kernels.folios.splitting import known_bits, split_folio_from
from pgemu_kernels.folios.xarray import put_nodes, stash, take_nodes, unstash
from pgemu_kernels.folios.zeroed import all_zeroed
from pgemu_kernels.gmem.piece_merges import note_waiting
from pgemu_kernels.gmem.pieces import (
    BLOCK_PAGES,
    CACHED,
    PAGES,
    PIECE_NODES,
    PIECE_ORDER,
    PIECES,
    WHOLE,
    is_piece_split,
    mark_piece,
    piece_head,
    zeroed_bits,
)
from pgemu_kernels.words.enum_words import (
    EVENT_FOLIO_FROZEN,
    EVENT_FOLIO_SPLIT,
    EVENT_FREEZE_SPIN,
    EVENT_PAGE_CACHE_STORED,
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_PARTLY,
)
from pgemu_kernels.words.registers import R_SPLIT_FORM
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    I_ZEROED,
    SPLIT_FORM_RFC2,
)

U = np.uint64


@outlined
def make_pieces(m, head, index):
    """The struct pages of 512 folios of 2M where a 1G folio was, whose vmemmap is whole.

    hugetlb.c:init_new_hugetlb_folio(); and as __split_folio_to_order() does it: mapping, index, references and flags.
    """
    ram = m.ram
    first = struct_page(m, head)
    flags = ram[first + FLAGS] & INHERITED
    mapping = ram[first + MAPPING]
    memcg = ram[first + MEMCG]
    link = ram[first + COMPOUND]
    private = ram[first + PRIVATE]
    for piece in range(head, head + BLOCK_PAGES, PAGES):
        prep_compound(m, piece, PIECE_ORDER)
        page = struct_page(m, piece)
        ram[page + FLAGS] = (ram[page + FLAGS] & ~PAGE_FLAGS) | flags | PG_HEAD
        ram[page + MAPPING] = mapping
        ram[page + INDEX] = index + piece - head
        ram[page + COUNTS] = CACHED
        ram[page + MEMCG] = memcg
    ram[first + COMPOUND] = link
    ram[first + PRIVATE] = private
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, np.int64(BLOCK_PAGES))
    charge(m, EVENT_STRUCT_PAGE_BYTES, 24 * np.int64(BLOCK_PAGES))
    charge(m, EVENT_PAGE_CACHE_STORED, np.int64(PIECES))


@outlined
def mark_pieces(m, block, head, first):
    """Of a 1G folio without PG_uptodate those pieces have it all of whose pages are zeroed: as split_folio_from()."""
    if known_bits(m, block, U0) == NONE or m.ram[struct_page(m, head) + FLAGS] & PG_UPTODATE != U0:
        return
    word = m.state[inode_row(inode_at(m, head)) + I_ZEROED]
    for index in range(first, first + BLOCK_PAGES, PAGES):
        if all_zeroed(m, word, index, index + PAGES):
            m.ram[struct_page(m, head + index - first) + FLAGS] |= PG_UPTODATE


@outlined
def split_whole(m, block, first):
    """Split the 1G folio of a block to 512 folios of 2M: 0, -WOULD_SPIN or -ENOMEM with nothing changed.

    Without memory to optimise a piece again it stays as it is, as after a demotion.
    """
    head = m.state[block + B_PFN]
    if reference_count(m.ram, struct_page(m, head)) != BLOCK_PAGES:
        charge_one(m, EVENT_FREEZE_SPIN)
        return HELD
    rfc2 = m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2
    if rfc2:
        charge_one(m, EVENT_PAGE_CACHE_STORED)
    taken = take_nodes(m, PIECE_NODES)
    stashed = rfc2 and taken == PIECE_NODES and stash(m)
    if taken < PIECE_NODES or stashed != rfc2 or restore(m, head, WHOLE) != 0:
        if stashed:
            unstash(m)
        put_nodes(m, taken)
        charge_one(m, EVENT_PAGE_CACHE_STORED)
        return NO_MEMORY
    leave_list(m, head)
    make_pieces(m, head, first)
    mark_pieces(m, block, head, first)
    optimize_batch(m, head, head + BLOCK_PAGES)
    poison_settled(m, head, BLOCK_PAGES, True)
    m.state[block + B_STATE] = BLOCK_PARTLY
    change(m.stats, GAUGE_BLOCKS_HUGE, -1)
    change(m.stats, GAUGE_BLOCKS_PARTLY, 1)
    charge_one(m, EVENT_FOLIO_FROZEN)
    charge_one(m, EVENT_FOLIO_SPLIT)
    return np.int64(0)


@outlined
def split_touched(m, node, block, first, start, end):
    """Split a block so that no page of [start, end) shares its folio with one outside its 2M piece: 0, -ENOMEM,
    or -WOULD_SPIN.

    `first`: the block's first page. A 1G folio is split to pieces, then the pieces that the range touches to 4K, in
    ascending order. Those done before a failure stay split, and the block waits for a merge.
    """
    if m.state[block + B_STATE] == BLOCK_HUGE:
        status = split_whole(m, block, first)
        if status != 0:
            return status
    index = max(start, first) & ~(PAGES - U1)
    while index < min(end, first + BLOCK_PAGES):
        if is_piece_split(m, block, index) == U0:
            head = piece_head(m, block, index)
            status = split_folio_from(
                m, head, PIECE_ORDER, index, PAGES, known_bits(m, block, zeroed_bits(m, node, index))
            )
            if status != 0:
                note_waiting(m, node, block, first, first, first)
                return status
            mark_piece(m, block, index, U1)
        index += PAGES
    return np.int64(0)


@kernel
def first_unsplit_piece(m, block, first, start):
    """Where split_touched() from page `start` on failed: the first page of the folio that it could not split."""
    index = max(start, first) & ~(PAGES - U1)
    if m.state[block + B_STATE] == BLOCK_HUGE:
        return first
    while is_piece_split(m, block, index) != U0:
        index += PAGES
    return index


@outlined
def split_shared(m, node, block, first):
    """Split a newly allocated block down to what its shared pages need: 0 or -ENOMEM."""
    for index in range(first, first + BLOCK_PAGES, PAGES):
        if shared_in_2m(m, node, index) != U0:
            status = split_touched(m, node, block, first, index, index + PAGES)
            if status != 0:
                return status
    return np.int64(0)
