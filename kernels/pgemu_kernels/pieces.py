"""1G pages split to 2M folios, some of these to 4K: stand-in, nothing is split so."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U1
from pgemu_kernels.compile import kernel


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
