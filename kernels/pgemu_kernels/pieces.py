"""1G pages split to 2M folios, some of these to 4K: stand-in, nothing is split so."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U1
from pgemu_kernels.compile import kernel
from pgemu_kernels.layout import EAGAIN


@kernel
def split_touched(m, node, block, first, start, end):
    """Split the block that begins at page `first` for pages [start, end): 0, -ENOMEM or -EBUSY."""
    return np.int64(0)


@kernel
def merge_pieces(m, node, block, first, start, end):
    """Merge what can be merged, quietly."""


@kernel
def gate_block(m, node, block, first, start, end):
    """The first page of the first folio of pages [start, end) that is not idle, or NONE."""
    return NONE


@kernel
def level_of(m, block, index):
    """1 where page `index` is in a 2M folio split to 4K, else 2."""
    return U1


@kernel
def dissolve_block(m, node, block, first, zeroed_word):
    """All pieces of the block that begins at page `first` into the 1G folio again: 0, or -EAGAIN where one is held.

    `zeroed_word` as for splitting.merge_block().
    """
    return np.int64(-EAGAIN)


@kernel
def make_zombie(m, block):
    """hugetlb.make_zombie() of such a block, its nodes freed; a held 2M folio is 512 pages in B_OUTSTANDING."""


@kernel
def revive_block(m, block):
    """splitting.revive() of such a block."""
