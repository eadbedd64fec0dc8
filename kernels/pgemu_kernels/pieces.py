"""1G pages split to 2M folios, some of these to 4K: stand-in, nothing is split so."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.compile import kernel
from pgemu_kernels.layout import EAGAIN


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
