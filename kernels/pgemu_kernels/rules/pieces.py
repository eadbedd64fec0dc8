"""The recount's part of 1G pages that are split to 2M pieces: their folios, vmemmap, references and nodes.

Run with what pins, LRU batches and faults hold taken off the references (full.run_designs).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U8, U12, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.engine.shareability import shared_in_2m
from pgemu_kernels.folios.folio import (
    HUGETLB_VMEMMAP_OPTIMIZED,
    INDEX,
    MAPPING,
    PRIVATE,
    is_huge_page,
    order_of,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.vmemmap import vmemmap_directory, vmemmap_pte
from pgemu_kernels.folios.xarray import has_pieces, nodes_of
from pgemu_kernels.formats.bits import PTE_LARGE, PTE_WRITE
from pgemu_kernels.gmem.pieces import BLOCK_PAGES, PIECE_NODES, PIECE_ORDER
from pgemu_kernels.rules.invariants import expect, order_at
from pgemu_kernels.rules.references import check_folio, check_pieces
from pgemu_kernels.words.enum_words import (
    BROKEN_BLOCK_STATE,
    BROKEN_COUNTS,
    BROKEN_VMEMMAP,
    BROKEN_WRONG_PFN,
    GAUGE_XARRAY_NODES,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_BLOCK_ROWS, R_BLOCKS, R_INODES
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    B_WAITS,
    B_WORDS,
    BLOCK_PARTLY,
    BLOCK_ZOMBIE,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_GUEST_MEMFD,
)

U = np.uint64


@kernel
def _own_vmemmap(m, head):
    """How many of the eight vmemmap pages of a 2M folio are mapped read-write: its own ones."""
    start = vmemmap_address(m.state, head)
    if m.ram[vmemmap_directory(m, start)] & PTE_LARGE != U0:
        return U8
    own = U0
    for i in range(U8):
        own += U1 if m.ram[vmemmap_pte(m, start + (i << U12))] & PTE_WRITE != U0 else U0
    return own


@outlined
def _check_vmemmap(m, piece, whole, index):
    """I6: an optimised piece has one vmemmap page of its own, any other all eight."""
    page = struct_page(m, piece)
    optimized = whole and m.ram[page + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED != U0
    expect(m, _own_vmemmap(m, piece) == (U1 if optimized else U8), BROKEN_VMEMMAP, index)


@outlined
def _check_references(m, piece, whole, cached):
    """References of a piece's folio or folios; `cached`: whether it is in the page cache."""
    if whole:
        check_folio(m, piece, U512 if cached else U0)
    else:
        check_pieces(m, piece, U512, U1 if cached else U0)


@outlined
def _check_block(m, node, block, first):
    """A block in pieces. A piece is split where one of its pages is shared, and else only while the block waits.

    A whole piece is a HugeTLB folio of order 9; every folio has the block's mapping. How many nodes they take.
    """
    head = m.state[block + B_PFN]
    mapping = m.ram[struct_page(m, head) + MAPPING]
    waits = m.state[block + B_WAITS] != U0
    nodes = PIECE_NODES
    for index in range(first, first + BLOCK_PAGES, U512):
        piece = head + index - first
        page = struct_page(m, piece)
        whole = order_at(m, node, index) != U0
        shared = shared_in_2m(m, node, index) != U0
        expect(m, shared != whole or (waits and not whole), BROKEN_BLOCK_STATE, index)
        expect(m, is_huge_page(m, piece) == whole, BROKEN_BLOCK_STATE, index)
        expect(m, not whole or order_of(m, piece) == PIECE_ORDER, BROKEN_BLOCK_STATE, index)
        expect(m, m.ram[page + MAPPING] == mapping and m.ram[page + INDEX] == index, BROKEN_WRONG_PFN, index)
        _check_references(m, piece, whole, True)
        _check_vmemmap(m, piece, whole, index)
        nodes += U0 if whole else nodes_of(m.state, PIECE_ORDER)
    return nodes


@kernel
def _nodes_of_inode(m, node):
    """Check the blocks in pieces of an inode: the nodes that they take in the page cache."""
    nodes = U0
    for first in range(U0, m.state[node + I_PAGES], BLOCK_PAGES):
        block = block_row(m, node, first)
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            nodes += _check_block(m, node, block, first)
    return nodes


@outlined
def check_in_pieces(m):
    """Check all blocks in pieces, in inodes and (zombies) outside, on a machine that has such."""
    state = m.state
    if not has_pieces(state):
        return
    nodes = U0
    for inode in range(state[R_INODES]):
        node = inode_row(inode)
        if state[node + I_OPEN] != U0 and state[node + I_KIND] == INODE_GUEST_MEMFD:
            nodes += _nodes_of_inode(m, node)
    expect(m, m.stats[STATS_GAUGES + GAUGE_XARRAY_NODES * U2] == np.int64(nodes), BROKEN_COUNTS, nodes)
    for i in range(state[R_BLOCKS]):
        row = state[R_BLOCK_ROWS] + i * U(B_WORDS)
        if state[row + B_STATE] == BLOCK_ZOMBIE:
            head = state[row + B_PFN]
            for piece in range(head, head + BLOCK_PAGES, U512):
                _check_references(m, piece, is_huge_page(m, piece), False)
