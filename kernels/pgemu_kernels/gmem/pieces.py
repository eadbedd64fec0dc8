"""Pieces: the what-if policy 1G -> 2M -> 4K, which splits only the 2M parts of a 1G page that hold shared pages.

All of this is inference: RFC v1 and v2 list it as future work, and the late 2025 branch warns when it is asked for
another target than order 0. Each part follows the nearest code that exists:

- 1G -> 2M: mm/hugetlb.c:demote_free_hugetlb_folios(), which restores the vmemmap of the whole page, makes 512 folios of
  order 9 of it and optimises each again; here of a folio in use and in the page cache, whose references, mapping,
  index and state of zeroing the pieces inherit. Its entry becomes 512 entries of order 9, eight to a node:
  lib/xarray.c:xas_split_alloc() makes 1 + 64 nodes.
- 2M -> 4K: the split of a 2M folio (splitting.py), 7 vmemmap pages and 8 nodes.
- 4K -> 2M: its merge. 2M -> 1G: demotion backwards: every piece's vmemmap restored, prep_compound_page(), optimised.
- Truncation must not fail for want of memory: then the pieces' vmemmap is redirected without restoring it.

The pieces belong to the 1G pool (nr_huge_pages of the 2M pool does not change), are in no list (the later series leaves
the first one in the active list, as it does the first page of a split folio), and name no subpool and no cgroup: the
block's row remembers the subpool. A block in pieces is BLOCK_PARTLY; a bit per piece tells which are split (B_PIECES).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U6, U8, U9, U32, U63, U64, U512
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.folios.folio import (
    COUNTS,
    ONE_CACHED,
    PGTY_HUGETLB,
    reference_count,
    struct_page,
)
from pgemu_kernels.words.enum_words import (
    EVENT_FOLIO_GATE_CHECKED,
)
from pgemu_kernels.words.rows import (
    B_PFN,
    B_PIECES,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    I_ZEROED,
)

U = np.uint64

PIECE_ORDER = U9  # of a piece
WHOLE = U(18)  # order of the block's huge page
PAGES = U512  # in a piece
PIECES = U512  # in a block
BLOCK_PAGES = U(1 << 18)
CACHED = PGTY_HUGETLB | PAGES << U32  # _refcount and page type of an idle piece
PIECE_NODES = U(1 + 64)  # of the page cache, for the entries of 512 pieces
OWN_WORDS = U(4)  # struct pages of a folio that are more than plain tails


@kernel
def piece_of(index):
    """Number of the piece that holds a page, in its block."""
    return index_at(index, U2)


@kernel
def is_piece_split(m, block, index):
    """1 if the piece that holds a page is split to 4K folios, else 0. The block is in pieces."""
    piece = piece_of(index)
    return m.state[block + B_PIECES + (piece >> U6)] >> (piece & U63) & U1


@kernel
def level_of(m, block, index):
    """Level of the folio that holds a page of a block in pieces: 1 or 2."""
    return U1 if is_piece_split(m, block, index) != U0 else U2


@kernel
def is_split_at(m, block, index):
    """Whether the folio that holds a page is of 4K. The block is whole or in pieces."""
    return m.state[block + B_STATE] == BLOCK_PARTLY and is_piece_split(m, block, index) != U0


@kernel
def mark_piece(m, block, index, split):
    """Note that a piece is split (1) or whole (0)."""
    piece = piece_of(index)
    bit = U1 << (piece & U63)
    word = block + B_PIECES + (piece >> U6)
    m.state[word] = m.state[word] | bit if split != U0 else m.state[word] & ~bit


@kernel
def any_piece_split(m, block):
    """Whether any piece of a block is split to 4K folios."""
    found = U0
    for word in range(block + B_PIECES, block + B_PIECES + PIECES // U64):
        found |= m.state[word]
    return found != U0


@kernel
def piece_head(m, block, index):
    """First frame of the piece that holds a page."""
    return m.state[block + B_PFN] + (piece_of(index) << U9)


@kernel
def zeroed_bits(m, node, index):
    """Where the bits of zeroed pages begin for the piece or block that begins at a page."""
    return m.state[node + I_ZEROED] + (index >> U6)


# --------------------------------------------------------------------------- the gate


@outlined
def held_in_pieces(m, block, start, end):
    """Of a block in pieces (the first page of the first folio under [start, end) that somebody holds, or NONE; how many
    folios were looked at)."""
    index = start
    checked = np.int64(0)
    failing = NONE
    while index < end and failing == NONE:
        head = piece_head(m, block, index)
        inside = index & (PAGES - U1)
        checked += 1
        if is_piece_split(m, block, index) == U0:
            if reference_count(m.ram, struct_page(m, head)) != PAGES:
                failing = index - inside
            index += PAGES - inside
        else:
            if m.ram[struct_page(m, head + inside) + COUNTS] != ONE_CACHED:
                failing = index
            index += U1
    return failing, checked


@outlined
def gate_block(m, node, block, first, start, end):
    """The first page of the first folio under [start, end) that somebody holds, or NONE: the gate, folio by folio.

    The block is whole or in pieces.
    """
    if m.state[block + B_STATE] == BLOCK_HUGE:
        charge_one(m, EVENT_FOLIO_GATE_CHECKED)
        return NONE if reference_count(m.ram, struct_page(m, m.state[block + B_PFN])) == BLOCK_PAGES else first
    failing, checked = held_in_pieces(m, block, max(start, first), min(end, first + BLOCK_PAGES))
    charge(m, EVENT_FOLIO_GATE_CHECKED, checked)
    return failing


@outlined
def is_idle_block(m, block):
    """Whether nobody but the page cache holds any folio of a block in pieces."""
    different = U0
    for index in range(U0, BLOCK_PAGES, PAGES):
        head = piece_head(m, block, index)
        if is_piece_split(m, block, index) == U0:
            different |= reference_count(m.ram, struct_page(m, head)) ^ PAGES
        else:
            for base in range(U0, PAGES, U64):
                page = struct_page(m, head + base)
                for at in range(page, page + PAGES, U8):
                    different |= m.ram[at + COUNTS] ^ ONE_CACHED
    return different == U0
