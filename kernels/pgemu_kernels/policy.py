"""Memory policies: of ranges of an inode (mbind() of its mappings, struct shared_policy) and of the faulting tasks.

mm/mempolicy.c. virt/kvm/guest_memfd.c asks the inode's policy by page (kvm_gmem_get_policy()); series rfc2 has the
faulting task's only, and ignores interleaving (a TODO there).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import U0, U1, U2, U8, U12, trailing_zeros
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.gmem import free_row
from pgemu_kernels.handle import full_only
from pgemu_kernels.layout import (
    EINVAL,
    ENOMEM,
    I_WORDS,
    MP_END,
    MP_INODE,
    MP_LIVE,
    MP_MODE,
    MP_NODES,
    MP_START,
    MP_WORDS,
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_INTERLEAVE,
    MPOL_PREFERRED,
    NO_INODE,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    POLICIES,
    R_FULL,
    R_NODES,
    R_ORDER,
    R_POLICIES,
    R_SERIES,
    R_TASK_POLICY,
    SERIES_RFC2,
    STATE_INODES,
    STATE_POLICIES,
)
from pgemu_kernels.steps import range_arguments, stop

U = np.uint64
_BYTE = U(0xFF)
_WORDS = U(MP_WORDS)
_DEFAULT = U(MPOL_DEFAULT)
_PREFERRED = U(MPOL_PREFERRED)
_BIND = U(MPOL_BIND)
_INTERLEAVE = U(MPOL_INTERLEAVE)
_INODE_WORDS = U(I_WORDS)


@kernel
def policy_row(i):
    return STATE_POLICIES + i * _WORDS


@kernel
def new_row(state):
    """A free row, which there must be."""
    return free_row(state, R_POLICIES, U(POLICIES), _WORDS, MP_LIVE, policy_row(U0))


@outlined
def policy_of(m, node, index):
    """What a fault on page `index` of the inode whose row is `node` goes by: mode << 8 | nodes, a bit each."""
    state = m.state
    task = state[R_TASK_POLICY]
    if state[R_SERIES] == SERIES_RFC2:
        return U0 if task >> U8 == _INTERLEAVE else task
    inode = (node - STATE_INODES) // _INODE_WORDS
    for i in range(state[R_POLICIES]):
        row = policy_row(i)
        if state[row + MP_LIVE] != U0 and state[row + MP_INODE] == inode:
            if state[row + MP_START] <= index < state[row + MP_END]:
                return state[row + MP_MODE] << U8 | state[row + MP_NODES]
    return task


@outlined
def node_of_fault(m, node, index):
    """The NUMA node to take memory from first: interleaving goes by the huge page's number, all else asks node 0 first.

    Interleaving by number is that of a shared policy with an index; inference for guest_memfd.
    """
    policy = policy_of(m, node, index)
    nodes = policy & _BYTE
    if policy >> U8 == _DEFAULT or nodes == U0:
        return U0
    if policy >> U8 == _INTERLEAVE and nodes & (nodes - U1) != U0:
        return index >> m.state[R_ORDER] & U1
    return trailing_zeros(nodes)


@outlined
def is_strict(m, node, index):
    """Whether memory of no other node will do: MPOL_BIND to one node."""
    policy = policy_of(m, node, index)
    nodes = policy & _BYTE
    return policy >> U8 == _BIND and nodes & (nodes - U1) == U0


@kernel
def first_node(m, node, index):
    """Where nobody has set a policy (the fast loops): node 0 first."""
    return U0


@kernel
def not_strict(m, node, index):
    return False


preferred_node = full_only(node_of_fault, first_node)
no_other_node = full_only(is_strict, not_strict)


# --------------------------------------------------------------------------- setting one


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
def is_refused(state, mode, nodes):
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
    if is_refused(state, mode, nodes):
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
