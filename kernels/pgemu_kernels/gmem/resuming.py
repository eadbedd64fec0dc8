"""What is done when a reference is gone that a conversion spins for: see spinning.py."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U12
from pgemu_kernels.engine.charge import begin_operation, change, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.engine.shareability import shared_in_block
from pgemu_kernels.folios.folio import reference_count, struct_page
from pgemu_kernels.folios.merging import merge_block
from pgemu_kernels.gmem.conversion import merge_lazy, merge_pieces
from pgemu_kernels.gmem.orders import convert
from pgemu_kernels.gmem.spinning import is_spinning, note_block, row_before, spin_row
from pgemu_kernels.words.enum_words import (
    EVENT_SPIN_ENDED,
    EVENT_SPIN_FAILED,
    FLAG_PRIVATE,
    FLAG_SHARED,
    GAUGE_SPINNING,
    OP_CONVERT,
)
from pgemu_kernels.words.operations import WOULD_SPIN
from pgemu_kernels.words.registers import R_COUNTER_ROW, R_ORDER, R_RESUMING, R_SPINS
from pgemu_kernels.words.rows import (
    ACTORS,
    B_STATE,
    B_WAITS,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_LOCK,
    I_ZEROED,
    O_FLAGS,
    O_INODE,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    O_RANGE_END,
    O_STATUS,
    O_TO_PRIVATE,
    O_VM,
    O_WORDS,
    Q_END,
    Q_INODE,
    Q_LIVE,
    Q_PFN,
    Q_REFERENCES,
    Q_START,
    Q_TO_PRIVATE,
    Q_VM,
    STATE_OPS,
)

U = np.uint64
AGAIN = STATE_OPS + U((ACTORS + 2) * O_WORDS)  # the record of what is tried again


@outlined
def merge_what_waits(m, inode, start, end):
    """Merge the split blocks of pages [start, end) that are all private, and what waits of blocks in pieces: a page of
    the first one that cannot be, or NONE."""
    state = m.state
    node = inode_row(inode)
    order = state[R_ORDER]
    first = start >> order << order
    while first < end:
        block = block_row(m, node, first)
        if state[block + B_STATE] == BLOCK_SPLIT and shared_in_block(m, node, first) == U0:
            if merge_block(m, block, first, state[node + I_ZEROED] + (first >> U6)) != 0:
                return first
        elif state[block + B_STATE] == BLOCK_PARTLY and state[block + B_WAITS] != U0:
            held = merge_pieces(m, node, block, first, first, first)
            if held != NONE:
                return held
        first += U1 << order
    return NONE


@outlined
def try_again(m, i):
    """Do what is left of a noted conversion, as far as it comes."""
    state = m.state
    row = spin_row(i)
    inode = state[row + Q_INODE]
    start = state[row + Q_START]
    to_private = state[row + Q_TO_PRIVATE]
    state[AGAIN + O_OP] = OP_CONVERT
    state[AGAIN + O_FLAGS] = FLAG_PRIVATE if to_private != U0 else FLAG_SHARED
    state[AGAIN + O_VM] = state[row + Q_VM]
    state[AGAIN + O_OBJECT] = state[AGAIN + O_INODE] = inode
    state[AGAIN + O_OFFSET] = start << U12
    state[AGAIN + O_LENGTH] = (state[row + Q_END] - start) << U12
    state[AGAIN + O_RANGE_END] = state[row + Q_END]
    state[AGAIN + O_TO_PRIVATE] = to_private
    counted = state[R_COUNTER_ROW]
    begin_operation(m, AGAIN)
    state[R_RESUMING] = i + U1
    waiting = NONE
    if to_private != U0 and merge_lazy(m) == U0:
        waiting = merge_what_waits(m, inode, start, state[row + Q_END])
    if waiting != NONE:
        note_block(m, AGAIN, start, block_row(m, inode_row(inode), waiting), waiting)
    else:
        convert(m, AGAIN)
    if waiting == NONE and np.int64(state[AGAIN + O_STATUS]) != -WOULD_SPIN:
        state[row + Q_LIVE] = U0
        change(m.stats, GAUGE_SPINNING, -1)
        charge_one(m, EVENT_SPIN_ENDED)
        if np.int64(state[AGAIN + O_STATUS]) < 0:  # nobody waits for its result any more
            charge_one(m, EVENT_SPIN_FAILED)
    state[R_RESUMING] = U0
    state[R_COUNTER_ROW] = counted


@outlined
def try_all(m):
    """Go on with what the reference is gone for that it spun for, in the order in which it began."""
    state = m.state
    for i in range(state[R_SPINS]):
        row = spin_row(i)
        inode = state[row + Q_INODE]
        if state[row + Q_LIVE] == U0 or state[inode_row(inode) + I_LOCK] != U0:
            continue
        free = reference_count(m.ram, struct_page(m, state[row + Q_PFN])) <= state[row + Q_REFERENCES]
        if free and row_before(state, inode, state[row + Q_START], state[row + Q_END], i) == NONE:
            try_again(m, i)
    if not is_spinning(m):
        state[R_SPINS] = U0


@kernel
def try_what_spins(m):
    if is_spinning(m):
        try_all(m)


finish_spins = full_only(try_what_spins, None)  # a machine with something noted is none for the fast loops
