"""The worker: blocks to be merged later, and zombie blocks on their way back to the pool.

Two lists in one. A zombie block whose last piece was put is the posted series' work item: the worker merges it and
gives it back to HugeTLB, at once, or (R_WORK_QUEUED) when the operation WORK lets it run. A block that is split though
all private is on the list where merging is lazy (R_MERGE_LAZY), which no posted series does; otherwise it merely waits
for the next conversion. Gauge WORK_PENDING counts both.
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import U0, U1, U2, U6
from pgemu_kernels.engine.charge import change, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import block_row, inode_row, stop
from pgemu_kernels.engine.shareability import shared_in_block
from pgemu_kernels.folios.splitting import merge_block, revive
from pgemu_kernels.folios.xarray import has_pieces
from pgemu_kernels.gmem import pieces
from pgemu_kernels.words.enum_words import EVENT_FREEZE_SPIN, EVENT_WORK_DONE, GAUGE_WORK_PENDING
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_INODES, R_MERGE_LAZY, R_ORDER, R_WORK_QUEUED
from pgemu_kernels.words.rows import (
    B_OUTSTANDING,
    B_STATE,
    B_WAITS,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    BLOCK_ZOMBIE,
    I_BLOCKS,
    I_KIND,
    I_LOCK,
    I_OPEN,
    I_ZEROED,
    INODE_GUEST_MEMFD,
    O_DETAIL,
)

# --------------------------------------------------------------------------- the list


@outlined
def note_return(m, block):
    """Nobody holds a piece of a zombie block any more: for the worker, now or when it runs."""
    if m.state[R_WORK_QUEUED] != U0:
        change(m.stats, GAUGE_WORK_PENDING, 1)
    else:
        return_zombie(m, block)


@outlined
def revive_any(m, block):
    """splitting.revive(), also of a block in pieces."""
    if has_pieces(m.state):
        pieces.revive_block(m, block)
    else:
        revive(m, block)


# Merge a zombie block that nobody holds and give it back: the posted worker's last step.
return_zombie = full_only(revive_any, revive)


# --------------------------------------------------------------------------- running it


@kernel
def merge_waiting(m, node, first):
    """Merge what waits of the block that begins at page `first`, if it is private and idle: whether all of it was.

    A block waits when it is split though all private; one in 2M pieces also when a piece is.
    """
    state = m.state
    block = block_row(m, node, first)
    kind = state[block + B_STATE]
    shared = kind == BLOCK_SPLIT and shared_in_block(m, node, first) != U0
    if shared or state[block + B_WAITS] == U0:
        return False
    done = False
    if kind == BLOCK_SPLIT:
        done = merge_block(m, block, first, state[node + I_ZEROED] + (first >> U6)) == 0
    elif kind == BLOCK_PARTLY:
        pieces.merge_pieces(m, node, block, first, first, first)
        done = state[block + B_WAITS] == U0
    charge_one(m, EVENT_WORK_DONE if done else EVENT_FREEZE_SPIN)
    return done


@kernel
def work_on_inode(m, node, zombies, waiting):
    """Do what is to be done for an inode's blocks, of zombies and of blocks that wait: how many blocks."""
    state = m.state
    done = U0
    for i in range(state[node + I_BLOCKS]):
        first = i << state[R_ORDER]
        block = block_row(m, node, first)
        if state[block + B_STATE] == BLOCK_ZOMBIE:
            if zombies and state[block + B_OUTSTANDING] == U0:
                change(m.stats, GAUGE_WORK_PENDING, -1)
                return_zombie(m, block)
                done += U1
        elif waiting and merge_waiting(m, node, first):
            done += U1
    return done


@outlined
def operate_work(m, op):
    """WORK: run everything that is queued: 0 with how many blocks were merged or given back.

    Blocks that are not idle stay on the list, those of an inode whose invalidate_lock is held too: the worker of lazy
    merges needs it (inference). Zombies have no inode to lock.
    """
    state = m.state
    done = U0
    if m.stats[STATS_GAUGES + GAUGE_WORK_PENDING * U2] != 0:
        for inode in range(state[R_INODES]):
            node = inode_row(inode)
            if state[node + I_KIND] == INODE_GUEST_MEMFD:
                free = state[node + I_OPEN] != U0 and state[node + I_LOCK] == U0
                waiting = free and state[R_MERGE_LAZY] != U0
                done += work_on_inode(m, node, state[R_WORK_QUEUED] != U0, waiting)
    state[op + O_DETAIL] = done
    return stop(state, op, 0)
