"""Memory of the page cache's xarray and of stashed metadata: slab objects in frames of the machine.

Nodes are 576 bytes (lib/radix-tree.c: radix_tree_node_cachep), stashes 64. What they hold is not kept, only where
they lie: seven nodes or 64 stashes to a frame, filled without gaps, and a frame goes back as soon as it is not needed.
Inference: the slabs of a running kernel are of order 2 with 28 nodes, have gaps, and get a freed node after an RCU
grace period only.
The frames form a chain through their first words, so that a recount finds their owner.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U6, U9, U12, U63, U64, U4095
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left, put_frame, take_frame
from pgemu_kernels.words.enum_words import (
    EVENT_METADATA_STASHED,
    EVENT_XARRAY_NODE_ALLOCATED,
    EVENT_XARRAY_NODE_FREED,
    GAUGE_XARRAY_NODES,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_NODE_FRAMES, R_NODE_SLOTS, R_ORDER, R_SPLIT_FORM, R_SPLIT_TO_2M, R_STASHED
from pgemu_kernels.words.rows import SPLIT_FORM_RFC2

U = np.uint64


FRAME_NODES = U(7)  # to a frame
STASH_BYTES = U64


@kernel
def has_pieces(state):
    """Whether 1G folios are split to 2M folios first (pieces.py)."""
    return state[R_SPLIT_TO_2M] != U0 and state[R_ORDER] > U9


@kernel
def nodes_of(state, order):
    """Nodes that a split folio of an order takes in the page cache: 8 or 9 for a 2M page, 4161 for 1G.

    The later form splits the folio's entry where it lies, in one slot of a node of 1G or in eight of a node of 2M:
    xas_split_alloc() makes the nodes below (1 + 64 + 4096, or 8). rfc2 takes the entry out first, and with it the
    node that held it; page by page they come back, that of a 2M page among them (inference: no neighbour keeps it; of
    the pieces of a 1G page seven neighbours do). The nodes above are not counted.
    """
    leaves = U1 << (order - U6)
    nodes = leaves + (leaves >> U6) + (leaves >> U12)
    if state[R_SPLIT_FORM] == SPLIT_FORM_RFC2 and leaves < U64 and not has_pieces(state):
        nodes += U1
    return nodes


@kernel
def page_without_node(state, order, nodes):
    """First page of a split folio that cannot be inserted when `nodes`, fewer than nodes_of(), can be had."""
    leaves = U1 << (order - U6)
    needed = U0 if leaves < U64 and has_pieces(state) else U1
    for leaf in range(leaves):
        needed += U1
        if leaf & U63 == U0 and leaves > U64:
            needed += U1
        if needed > nodes:
            return leaf << U6
    return leaves << U6


@kernel
def push_frame(m):
    """One more frame of objects: whether there was one."""
    frame = take_frame(m)
    if frame == NONE:
        return False
    m.ram[frame << U9] = m.state[R_NODE_FRAMES]
    m.state[R_NODE_FRAMES] = frame
    return True


@kernel
def pop_frame(m):
    frame = m.state[R_NODE_FRAMES]
    m.state[R_NODE_FRAMES] = m.ram[frame << U9]
    put_frame(m, frame)


@kernel
def object_frames(m):
    """How many frames nodes and stashes take."""
    nodes = U(m.stats[STATS_GAUGES + GAUGE_XARRAY_NODES * U2]) + m.state[R_NODE_SLOTS]
    return nodes // FRAME_NODES + ((m.state[R_STASHED] + U4095) >> U12)


@kernel
def obtainable(m, frames):
    """How many nodes there is memory for, if `frames` are left for others."""
    left = frames_left(m)
    return m.state[R_NODE_SLOTS] + (left - frames) * FRAME_NODES if left > frames else m.state[R_NODE_SLOTS]


@outlined
def take_nodes(m, nodes):
    """Allocate nodes: how many there was memory for."""
    state = m.state
    if nodes == U0:
        return U0
    free = state[R_NODE_SLOTS]
    while free < nodes and push_frame(m):
        free += FRAME_NODES
    taken = min(free, nodes)
    state[R_NODE_SLOTS] = free - taken
    if taken != U0:
        change(m.stats, GAUGE_XARRAY_NODES, np.int64(taken))
        charge(m, EVENT_XARRAY_NODE_ALLOCATED, np.int64(taken))
    return taken


@outlined
def put_nodes(m, nodes):
    """Free nodes; frames that no node needs go back."""
    if nodes == U0:
        return
    free = m.state[R_NODE_SLOTS] + nodes
    while free >= FRAME_NODES:
        pop_frame(m)
        free -= FRAME_NODES
    m.state[R_NODE_SLOTS] = free
    change(m.stats, GAUGE_XARRAY_NODES, -np.int64(nodes))
    charge(m, EVENT_XARRAY_NODE_FREED, np.int64(nodes))


@kernel
def stash(m):
    """Room for a folio's HugeTLB metadata while it is split (rfc2): whether there was any.

    mm/guestmem_hugetlb.c:guestmem_hugetlb_stash_metadata() of the posted series: an object of 48 bytes, and an entry
    of an xarray by PFN, whose nodes are not counted.
    """
    stashed = m.state[R_STASHED]
    if stashed & U4095 == U0 and not push_frame(m):
        return False
    m.state[R_STASHED] = stashed + STASH_BYTES
    charge_one(m, EVENT_METADATA_STASHED)
    return True


@kernel
def unstash(m):
    stashed = m.state[R_STASHED] - STASH_BYTES
    m.state[R_STASHED] = stashed
    if stashed & U4095 == U0:
        pop_frame(m)
