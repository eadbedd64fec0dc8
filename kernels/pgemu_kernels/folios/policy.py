"""Memory policies: of ranges of an inode (mbind() of its mappings, struct shared_policy) and of the faulting tasks.

mm/mempolicy.c. virt/kvm/guest_memfd.c asks the inode's policy by page (kvm_gmem_get_policy()); form rfc2 has the
faulting task's only, and ignores interleaving (a TODO there).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW8, U0, U1, U8, trailing_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.words.registers import R_ORDER, R_POLICIES, R_SPLIT_FORM, R_TASK_POLICY
from pgemu_kernels.words.rows import (
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
    SPLIT_FORM_RFC2,
    STATE_INODES,
    STATE_POLICIES,
)

U = np.uint64
_WORDS = U(MP_WORDS)
_DEFAULT = U(MPOL_DEFAULT)
_PREFERRED = U(MPOL_PREFERRED)
_BIND = U(MPOL_BIND)
_INTERLEAVE = U(MPOL_INTERLEAVE)
_INODE_WORDS = U(I_WORDS)


@kernel
def policy_row(i):
    return STATE_POLICIES + i * _WORDS


@outlined
def policy_of(m, node, index):
    """What a fault on page `index` of the inode whose row is `node` goes by: mode << 8 | nodes, a bit each."""
    state = m.state
    task = state[R_TASK_POLICY]
    if state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
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
    nodes = policy & LOW8
    if policy >> U8 == _DEFAULT or nodes == U0:
        return U0
    if policy >> U8 == _INTERLEAVE and nodes & (nodes - U1) != U0:
        return index >> m.state[R_ORDER] & U1
    return trailing_zeros(nodes)


@outlined
def is_strict(m, node, index):
    """Whether memory of no other node will do: MPOL_BIND to one node."""
    policy = policy_of(m, node, index)
    nodes = policy & LOW8
    return policy >> U8 == _BIND and nodes & (nodes - U1) == U0


# Where nobody has set a policy: node 0 first, then the next.
preferred_node = full_only(node_of_fault, U0)
no_other_node = full_only(is_strict, False)


# --------------------------------------------------------------------------- setting one
