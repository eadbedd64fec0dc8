"""Design "pfnmap": the VMA is VM_PFNMAP, entries are inserted by PFN, folios stay whole for ever.

The slides of 2025-08-07 define it (VM_PFNMAP, vmf_insert_pfn(), level from shareability, conversion only
unmaps); the order of steps beside that is inference: begin, zap and end over the exact range, attributes
stored between zap and end, the entry inserted under the invalidate_lock because no reference protects a
fault in flight.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.folios.hugetlb import release_block
from pgemu_kernels.gmem.steps import (
    convert_finish,
    convert_invalidate_begin,
    convert_invalidate_end,
    convert_prepare,
    convert_zap,
    store_attributes,
    unmap_host,
)
from pgemu_kernels.gmem.zeroing import clear_zeroed
from pgemu_kernels.words.operations import GO
from pgemu_kernels.words.rows import (
    B_STATE,
    BLOCK_HUGE,
    O_TO_PRIVATE,
)

U = np.uint64
ROUNDED = False


# --------------------------------------------------------------------------- conversion


@kernel
def convert(m, op):
    """The slides' order: a conversion only unmaps."""
    if convert_prepare(m, op, ROUNDED, True) != GO:
        return
    if m.state[op + O_TO_PRIVATE] != U0:
        unmap_host(m, op)
    convert_invalidate_begin(m, op)
    convert_zap(m, op)
    store_attributes(m, op)
    convert_invalidate_end(m, op)
    convert_finish(m, op)


# --------------------------------------------------------------------------- truncation


@outlined
def truncate_block(m, inode, index):
    """Free the whole huge page that begins at page `index`: 0, it is never refused.

    With a transient reference the folio leaves the page cache, and goes to the pool with the last `put`.
    """
    node = inode_row(inode)
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
    return np.int64(0)


@outlined
def evict_block(m, inode, index):
    """Inode eviction: like truncation, for there is nothing to merge."""
    truncate_block(m, inode, index)
