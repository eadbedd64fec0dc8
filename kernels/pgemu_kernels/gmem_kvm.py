"""KVM's side of guest_memfd: levels. Stand-in: those of the designs as at first."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import U0, U1
from pgemu_kernels.compile import kernel
from pgemu_kernels.gmem import block_row, inode_row
from pgemu_kernels.layout import B_STATE, BLOCK_HUGE, O_INDEX, O_INODE, R_ORDER
from pgemu_kernels.pfnmap import shareability_level
from pgemu_kernels.restructure import folio_level

U = np.uint64


@kernel
def folio_level_full(m, op):
    """Restructure: the level of the folio, as far as the slot permits."""
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), state[op + O_INDEX])
    if m.state[block + B_STATE] != BLOCK_HUGE or state[R_ORDER] == U0:
        return U1
    return folio_level(state, op)


@kernel
def shareability_level_full(m, op):
    """Pfnmap: the largest level whose block the slot permits and is all of one kind."""
    return U1 if m.state[R_ORDER] == U0 else shareability_level(m, op)
