"""The worker: what waits for it, and the operation that lets it run."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import pieces
from pgemu_kernels.bits import U0, U1, U6
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import FREEZE_SPIN, WORK_DONE, WORK_PENDING, change, charge_one
from pgemu_kernels.gmem import block_row, inode_row, shared_in_block
from pgemu_kernels.hugetlb import stop_waiting
from pgemu_kernels.layout import (
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_BLOCKS,
    I_KIND,
    I_LOCK,
    I_OPEN,
    I_ZEROED,
    INODE_GUEST_MEMFD,
    O_DETAIL,
    R_INODES,
    R_MERGE_LAZY,
    R_ORDER,
)
from pgemu_kernels.splitting import merge_block
from pgemu_kernels.steps import stop

U = np.uint64


@kernel
def note_merge(m, block):
    """A block that is split though all private waits; where the worker merges them, it is on its list."""
    if m.state[block + B_WAITS] == U0:
        m.state[block + B_WAITS] = U1
        if m.state[R_MERGE_LAZY] != U0:
            change(m.stats, WORK_PENDING, 1)


@outlined
def merge_waiting(m, node):
    """Merge the blocks of an inode that wait, are still all private, and idle: how many."""
    state = m.state
    merged = U0
    for i in range(state[node + I_BLOCKS]):
        first = i << state[R_ORDER]
        block = block_row(m, node, first)
        if m.state[block + B_WAITS] == U0 or shared_in_block(m, node, first) != U0:
            continue
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            pieces.merge_pieces(m, node, block, first, first, first + (U1 << state[R_ORDER]))
        elif m.state[block + B_STATE] == BLOCK_SPLIT:
            merge_block(m, block, first, state[node + I_ZEROED] + (first >> U6))
        if m.state[block + B_STATE] == BLOCK_HUGE:
            stop_waiting(m, block)
            merged += U1
            charge_one(m, WORK_DONE)
        else:
            charge_one(m, FREEZE_SPIN)
    return merged


@outlined
def operate_work(m, op):
    """Let the worker run (merge "lazy"): 0 and how many blocks it merged. It passes by inodes whose lock is held."""
    state = m.state
    merged = U0
    if state[R_MERGE_LAZY] != U0:
        for inode in range(state[R_INODES]):
            node = inode_row(inode)
            ours = state[node + I_OPEN] != U0 and state[node + I_KIND] == INODE_GUEST_MEMFD
            if ours and state[node + I_LOCK] == U0:
                merged += merge_waiting(m, node)
    state[op + O_DETAIL] = merged
    return stop(state, op, 0)
