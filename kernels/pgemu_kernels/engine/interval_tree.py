"""Ranges found by what they share: an interval tree in words that rows of `state` have for it.

include/linux/interval_tree_generic.h: a search tree by where ranges begin, each node with the farthest end below it.
Ranges may share addresses. Linux balances by colours, this one by chance: a node stands above those of lower priority,
and a priority is nothing but mixed bits of the node's place. Finding, linking and unlinking go down one path.

A tree is named by the word that holds its top node, a node by the index of its first word (T_*); 0 is no node.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.words.rows import T_END, T_LEFT, T_MOST, T_MOST_LEFT, T_PARENT, T_RIGHT, T_START

U = np.uint64
_MIX = U(0xD6E8_FEB8_6659_FD93)  # an odd number without a pattern
_HALF = U(32)


@kernel
def _priority(node):
    """A number of each node's own, whatever the order in which rows are taken and given back."""
    mixed = (node ^ node >> _HALF) * _MIX
    mixed = (mixed ^ mixed >> _HALF) * _MIX
    return mixed ^ mixed >> _HALF


@kernel
def _measure(state, node):
    """The farthest end below a node, from those of its children."""
    left = state[node + T_LEFT]
    right = state[node + T_RIGHT]
    below = state[left + T_MOST] if left != U0 else U0
    state[node + T_MOST_LEFT] = below
    most = max(state[node + T_END], below)
    if right != U0:
        most = max(most, state[right + T_MOST])
    state[node + T_MOST] = most


@kernel
def _place_of(state, root, node):
    """The word that leads to a node."""
    parent = state[node + T_PARENT]
    if parent == U0:
        return root
    return parent + (T_LEFT if state[parent + T_LEFT] == node else T_RIGHT)


@kernel
def _lift(state, root, node):
    """A node and its parent change places, and the order stays: a rotation."""
    parent = state[node + T_PARENT]
    place = _place_of(state, root, parent)
    is_left = state[parent + T_LEFT] == node
    inner = T_RIGHT if is_left else T_LEFT
    child = state[node + inner]
    state[parent + (T_LEFT if is_left else T_RIGHT)] = child
    if child != U0:
        state[child + T_PARENT] = parent
    state[node + inner] = parent
    state[node + T_PARENT] = state[parent + T_PARENT]
    state[parent + T_PARENT] = node
    state[place] = node
    _measure(state, parent)
    _measure(state, node)


@outlined
def link_range(state, root, node, start, end):
    """Enter a node for [start, end), which is not empty, and no node of the tree."""
    state[node + T_START] = start
    state[node + T_END] = end
    state[node + T_MOST] = end
    state[node + T_MOST_LEFT] = U0
    state[node + T_LEFT] = U0
    state[node + T_RIGHT] = U0
    place = root
    parent = U0
    while state[place] != U0:
        parent = state[place]
        state[parent + T_MOST] = max(state[parent + T_MOST], end)
        at = state[parent + T_START]
        place = parent + T_RIGHT
        if start < at or (start == at and node < parent):
            place = parent + T_LEFT
            state[parent + T_MOST_LEFT] = max(state[parent + T_MOST_LEFT], end)
    state[place] = node
    state[node + T_PARENT] = parent
    while state[node + T_PARENT] != U0 and _priority(state[node + T_PARENT]) < _priority(node):
        _lift(state, root, node)


@outlined
def unlink_range(state, root, node):
    """Take a node out of its tree; the others stay what they are, those that come next too."""
    left = state[node + T_LEFT]
    right = state[node + T_RIGHT]
    while left | right != U0:
        lifts_left = right == U0 or (left != U0 and _priority(left) > _priority(right))
        _lift(state, root, left if lifts_left else right)
        left = state[node + T_LEFT]
        right = state[node + T_RIGHT]
    state[_place_of(state, root, node)] = U0
    above = state[node + T_PARENT]
    state[node + T_PARENT] = U0
    while above != U0:
        _measure(state, above)
        above = state[above + T_PARENT]


@outlined
def first_below(state, node, start, end):
    """The first range at a node and below that shares something with [start, end), or 0. INTERVAL_TREE_DEFINE():
    subtree_search()"""
    while node != U0 and state[node + T_MOST] > start:
        if state[node + T_MOST_LEFT] > start:
            node = state[node + T_LEFT]
            continue
        if state[node + T_START] >= end:
            break
        if state[node + T_END] > start:
            return node
        node = state[node + T_RIGHT]
    return U0


@outlined
def _next_above(state, node, start, end):
    """next_range() of a node that is not alone."""
    following = first_below(state, state[node + T_RIGHT], start, end)
    while following == U0:
        parent = state[node + T_PARENT]
        while parent != U0 and state[parent + T_RIGHT] == node:
            node = parent
            parent = state[node + T_PARENT]
        if parent == U0 or state[parent + T_START] >= end:
            return U0
        if state[parent + T_END] > start:
            return parent
        following = first_below(state, state[parent + T_RIGHT], start, end)
        node = parent
    return following


@kernel
def first_range(state, root, start, end):
    """The node that begins first of those that share something with [start, end), or 0."""
    node = state[root]
    if node == U0 or start >= end:
        return U0
    if state[node + T_LEFT] | state[node + T_RIGHT] == U0:  # most trees have one node
        return node if state[node + T_START] < end and state[node + T_END] > start else U0
    return first_below(state, node, start, end)


@kernel
def next_range(state, node, start, end):
    """The one after a node that first_range() or this found, or 0."""
    if state[node + T_RIGHT] | state[node + T_PARENT] == U0:
        return U0
    return _next_above(state, node, start, end)
