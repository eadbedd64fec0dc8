"""A radix tree from an index to a 64-bit value, in frames of `ram`: page caches, memory attributes, dirty bitmaps.

Nodes hold 512 words; a node's frame counts its words in use in `counts`, so that an emptied one goes at once.
The root word holds the top node's physical address and, in its low bits, the height: 1 = one node; 0 is the
empty tree. Linux has an xarray with nodes of 64 slots there: same answers, other sizes, so the nodes are charged
nowhere and counted in a gauge of their own.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U9, U12, U63, U511
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import empty_frame, put_frame
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.words.enum_words import EVENT_PAGE_CACHE_STORED, EVENT_STRUCT_PAGE_BYTES, GAUGE_CACHE_NODES
from pgemu_kernels.words.operations import ENOMEM

U = np.uint64
_HEIGHT = U(7)
_MOST = U(7)  # 63 bits of index, more than any page number has


@kernel
def charge_added(m):
    """A folio joined a page cache: mm/filemap.c:__filemap_add_folio() writes its mapping, index, flags and count."""
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    charge(m, EVENT_STRUCT_PAGE_BYTES, 28)


@kernel
def charge_page_freed(m):
    """The last reference of a page went: mm/page_alloc.c:free_pages_prepare() and what led to it."""
    charge(m, EVENT_STRUCT_PAGE_BYTES, 36)


@kernel
def _fits(height, index):
    """Whether a tree of this height reaches an index."""
    return height >= _MOST or index >> (U9 * height) == U0


@kernel
def _slot(node, index, level):
    """Index in `ram` of the word of a node of `level` (1 = lowest) on the way to an index."""
    return (node >> U3) + index_at(index, level)


@kernel
def _find_slot(m, root, index):
    """Where the value at an index is or would be, NONE without a node for it; `root` is the root word."""
    height = root & _HEIGHT
    if height == U0 or not _fits(height, index):
        return NONE
    node = root & PTE_ADDRESS
    while height > U1:
        node = m.ram[_slot(node, index, height)]
        if node == U0:
            return NONE
        height -= U1
    return _slot(node, index, U1)


@kernel
def cache_find(m, root, index):
    """The value stored at `index` (uint64), or 0 for none."""
    slot = _find_slot(m, root, index)
    return U0 if slot == NONE else m.ram[slot]


@kernel
def _first_word(m, node, at):
    """Place of the first word that is not 0 in a node, from one on; 512 for none."""
    base = node >> U3
    while at <= U511 and m.ram[base + at] == U0:
        at += U1
    return at


@outlined
def cache_next(m, root, index):
    """The first index from `index` on that has a value, or NONE. Each node on the way is read once."""
    height = root & _HEIGHT
    while height != U0 and _fits(height, index) and index >> U63 == U0:
        node = root & PTE_ADDRESS
        level = height
        while True:
            at = index_at(index, level)
            found = _first_word(m, node, at)
            below = U9 * (level - U1)
            if found > U511:  # the next node beside this one
                index = ((index >> below >> U9) + U1) << U9 << below
                break
            if found != at:
                index = ((index >> below) - at + found) << below
            if level == U1:
                return index
            node = m.ram[(node >> U3) + found]
            level -= U1
    return NONE


@kernel
def _count(m, node, n):
    """Add `n` (int64) to a node's words in use: how many there are now."""
    frame = node >> U12
    used = np.int64(m.counts[frame]) + n
    m.counts[frame] = np.uint32(used)
    return used


@kernel
def _free_node(m, node):
    put_frame(m, node >> U12)
    change(m.stats, GAUGE_CACHE_NODES, -1)


@outlined
def _grow(m, at, index):
    """Make the tree high enough for an index: 0 or -ENOMEM."""
    root = m.state[at]
    height = root & _HEIGHT
    empty = height == U0
    while height == U0 or not _fits(height, index):
        height += U1
        if empty and not _fits(height, index):
            continue  # an empty tree gets its top node only
        frame = empty_frame(m, U0, GAUGE_CACHE_NODES)
        if frame == NONE:
            return np.int64(-ENOMEM)
        if not empty:
            m.ram[frame << U9] = root & PTE_ADDRESS
            _count(m, frame << U12, 1)
        root = frame << U12 | height
        m.state[at] = root
    return np.int64(0)


@outlined
def cache_store(m, at, index, value):
    """Store a value (0: none) at an index of the tree rooted at state[at]: 0, or -ENOMEM with nothing stored."""
    if value == U0:
        return _erase(m, at, index)
    if index >> U63 != U0:
        return np.int64(-ENOMEM)
    if _grow(m, at, index) != 0:
        _prune_top(m, at)
        return np.int64(-ENOMEM)
    root = m.state[at]
    node = root & PTE_ADDRESS
    level = root & _HEIGHT
    while level > U1:
        slot = _slot(node, index, level)
        if m.ram[slot] == U0:
            frame = empty_frame(m, U0, GAUGE_CACHE_NODES)
            if frame == NONE:
                _prune_path(m, at, index)
                return np.int64(-ENOMEM)
            m.ram[slot] = frame << U12
            _count(m, node, 1)
        node = m.ram[slot]
        level -= U1
    slot = _slot(node, index, U1)
    if m.ram[slot] == U0:
        _count(m, node, 1)
    m.ram[slot] = value
    return np.int64(0)


@outlined
def _prune_top(m, at):
    """Lower a tree whose top nodes hold nothing but the old top (a store that grew it found no memory)."""
    while True:
        root = m.state[at]
        height = root & _HEIGHT
        if height <= U1:
            return
        node = root & PTE_ADDRESS
        below = m.ram[node >> U3]
        if m.counts[node >> U12] != np.uint32(1) or below == U0:
            return
        _free_node(m, node)
        m.state[at] = below | (height - U1)


@outlined
def _prune_path(m, at, index):
    """Free the empty nodes that a store without memory left, from the lowest that exists up."""
    while True:
        root = m.state[at]
        height = root & _HEIGHT
        if height == U0:
            return
        above = NONE
        node = root & PTE_ADDRESS
        level = height
        while level > U1:
            slot = _slot(node, index, level)
            if m.ram[slot] == U0:
                break
            above = slot
            node = m.ram[slot]
            level -= U1
        if m.counts[node >> U12] != np.uint32(0):
            return
        _free_node(m, node)
        if above == NONE:
            m.state[at] = U0
            return
        m.ram[above] = U0
        _count(m, (above >> U9) << U12, -1)


@kernel
def _erase(m, at, index):
    """Take away the value at an index, if there is one: 0."""
    slot = _find_slot(m, m.state[at], index)
    if slot != NONE and m.ram[slot] != U0:
        m.ram[slot] = U0
        if _count(m, (slot >> U9) << U12, -1) == 0:
            _prune_path(m, at, index)
    return np.int64(0)


@outlined
def cache_free(m, at):
    """Free the whole tree whose root word is state[at]. What its values stand for is the caller's."""
    index = U0
    while m.state[at] != U0:
        index = cache_next(m, m.state[at], index)
        if index == NONE:
            return
        cache_store(m, at, index, U0)
