"""The recount's part of blocks: how many there are of each state, and what the worker has to do."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.folios.folio import FLAGS, LOW_BYTE, MAPPING, PG_HEAD, reference_count, struct_page
from pgemu_kernels.folios.guest_folios import subpool_of
from pgemu_kernels.folios.hstate import first_page, page_after
from pgemu_kernels.rules.invariants import expect, expect_gauge
from pgemu_kernels.words.enum_words import (
    BROKEN_BLOCK_STATE,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_PARTLY,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
    GAUGE_WORK_PENDING,
)
from pgemu_kernels.words.registers import R_BLOCK_ROWS, R_BLOCKS, R_HSTATE, R_MERGE_LAZY, R_ORDER
from pgemu_kernels.words.rows import (
    B_OUTSTANDING,
    B_PENDING,
    B_PFN,
    B_STATE,
    B_WAITS,
    B_WORDS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    BLOCK_ZOMBIE,
    H_ACTIVE,
    H_PAGES,
)

U = np.uint64


@outlined
def _held_pages(m, head, pages):
    """Base pages of a zombie block's folios that somebody holds: 512 of a 2M folio."""
    held = U0
    i = U0
    while i < pages:
        page = struct_page(m, head + i)
        size = U1
        if m.ram[page + FLAGS] & PG_HEAD != U0:
            size = U1 << (m.ram[struct_page(m, head + i + U1) + FLAGS] & LOW_BYTE)
        if reference_count(m.ram, page) != U0:
            held += size
        i += size
    return held


@outlined
def _whole_outside(m):
    """Whole huge pages of the designs that are in no page cache and not free: somebody holds them."""
    h = m.state[R_HSTATE]
    outside = U0
    left = m.state[h + H_PAGES]
    head = first_page(m.state, h + H_ACTIVE)
    while head != U0 and left != U0:
        page = struct_page(m, head)
        if m.ram[page + FLAGS] & PG_HEAD != U0 and m.ram[page + MAPPING] == U0 and subpool_of(m, page) != U0:
            outside += U1
        head = page_after(m, head)
        left -= U1
    return outside


@outlined
def check_blocks(m):
    """Compare the gauges of blocks and of pending work with the rows, and a zombie's counts with its references."""
    state = m.state
    huge = split = partly = U0
    work = U0
    zombies = _whole_outside(m) if state[R_ORDER] != U0 else U0
    for i in range(state[R_BLOCKS]):
        row = state[R_BLOCK_ROWS] + i * U(B_WORDS)
        kind = state[row + B_STATE]
        if kind == BLOCK_HUGE:
            huge += U1
        elif kind == BLOCK_SPLIT:
            split += U1
        elif kind == BLOCK_PARTLY:
            partly += U1
        elif kind == BLOCK_ZOMBIE:
            zombies += U1
            held = _held_pages(m, state[row + B_PFN], U1 << state[R_ORDER])
            expect(m, state[row + B_OUTSTANDING] == held, BROKEN_BLOCK_STATE, i)
            expect(m, state[row + B_PENDING] + held == U1 << state[R_ORDER], BROKEN_BLOCK_STATE, i)
            if held == U0:
                work += U1
        if state[R_MERGE_LAZY] != U0 and state[row + B_WAITS] != U0:
            work += U1
    expect_gauge(m, GAUGE_BLOCKS_HUGE, huge)
    expect_gauge(m, GAUGE_BLOCKS_SPLIT, split)
    expect_gauge(m, GAUGE_BLOCKS_PARTLY, partly)
    if state[R_ORDER] != U0:
        expect_gauge(m, GAUGE_BLOCKS_ZOMBIE, zombies)
    expect_gauge(m, GAUGE_WORK_PENDING, work)
