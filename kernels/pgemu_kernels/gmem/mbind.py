"""mbind() of a guest_memfd mapping: the policies of ranges of an inode."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U8, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import free_row, range_arguments, stop
from pgemu_kernels.folios.policy import _DEFAULT, _INTERLEAVE, _PREFERRED, _WORDS, policy_row
from pgemu_kernels.words.operations import EINVAL, ENOMEM
from pgemu_kernels.words.registers import R_FULL, R_NODES, R_POLICIES, R_TASK_POLICY
from pgemu_kernels.words.rows import (
    MP_END,
    MP_INODE,
    MP_LIVE,
    MP_MODE,
    MP_NODES,
    MP_START,
    NO_INODE,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    POLICIES,
)

U = np.uint64


@kernel
def new_row(state):
    """A free row, which there must be."""
    return free_row(state, R_POLICIES, U(POLICIES), _WORDS, MP_LIVE, policy_row(U0))


@kernel
def rows_left(state):
    """How many rows of policies are free."""
    left = U(POLICIES) - state[R_POLICIES]
    for i in range(state[R_POLICIES]):
        if state[policy_row(i) + MP_LIVE] == U0:
            left += U1
    return left


@outlined
def cut(m, inode, start, end):
    """No policy covers pages [start, end) of an inode any more; a free row is there for what lies behind them.

    mm/mempolicy.c:shared_policy_replace()
    """
    state = m.state
    for i in range(state[R_POLICIES]):
        row = policy_row(i)
        low = state[row + MP_START]
        high = state[row + MP_END]
        if state[row + MP_LIVE] == U0 or state[row + MP_INODE] != inode or low >= end or high <= start:
            continue
        if low < start and high > end:
            rest = new_row(state)
            for word in range(_WORDS):
                state[rest + word] = state[row + word]
            state[rest + MP_START] = end
            state[row + MP_END] = start
        elif low < start:
            state[row + MP_END] = start
        elif high > end:
            state[row + MP_START] = end
        else:
            state[row + MP_LIVE] = U0


@kernel
def mpol_refuses(state, mode, nodes):
    """What mpol_new() and the check of the node mask refuse."""
    if mode > _INTERLEAVE or nodes >> state[R_NODES] != U0:
        return True
    if mode == _DEFAULT:
        return nodes != U0
    return mode != _PREFERRED and nodes == U0  # preferred without nodes is MPOL_LOCAL


@outlined
def operate_policy(m, op):
    """MEMORY_POLICY of pages of an inode, or of the faulting tasks (object NO_INODE): 0, -EINVAL, -EBADF, -ENOMEM.

    What is allocated already stays where it is.
    """
    state = m.state
    mode = state[op + O_FLAGS]
    nodes = state[op + O_ADDRESS]
    inode = state[op + O_OBJECT]
    if mpol_refuses(state, mode, nodes):
        return stop(state, op, -EINVAL)
    if inode == NO_INODE:
        state[R_FULL] = U1  # the fast loops know no policies
        state[R_TASK_POLICY] = mode << U8 | nodes
        return stop(state, op, 0)
    status = range_arguments(state, op)
    if status != 0:
        return stop(state, op, status)
    start = state[op + O_OFFSET] >> U12
    end = start + (state[op + O_LENGTH] >> U12)
    # For what lies behind a hole, and for the new one: looked at before anything changes.
    if rows_left(state) < (U1 if mode == _DEFAULT else U2):
        return stop(state, op, -ENOMEM)
    state[R_FULL] = U1
    cut(m, inode, start, end)
    if mode == _DEFAULT:
        return stop(state, op, 0)
    row = new_row(state)
    state[row + MP_LIVE] = U1
    state[row + MP_INODE] = inode
    state[row + MP_START] = start
    state[row + MP_END] = end
    state[row + MP_MODE] = mode
    state[row + MP_NODES] = nodes
    return stop(state, op, 0)
