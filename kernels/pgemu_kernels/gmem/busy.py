"""Whether pins are why a folio keeps memory from becoming private."""

from __future__ import annotations

from pgemu_kernels.engine.bits import U1
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.folios.pinning import maybe_pinned
from pgemu_kernels.words.enum_words import EVENT_CONVERT_PINNED
from pgemu_kernels.words.registers import R_ORDER
from pgemu_kernels.words.rows import B_PFN, O_INODE


@outlined
def note_pins(m, op, index):
    """Count a conversion that fails at a page whose folio may be pinned: by a device, or for direct I/O."""
    block = block_row(m, inode_row(m.state[op + O_INODE]), index)
    if maybe_pinned(m, m.state[block + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))):
        charge_one(m, EVENT_CONVERT_PINNED)
