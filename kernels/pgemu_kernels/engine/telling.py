"""Devices that map a file without holding its pages: what takes pages from them, and gives some back.

I/O page tables stand above this, in an entry of their own (run/revocations.py), so that whoever has no such devices
compiles none of it: a machine that has them carries the entry's address in its descriptor.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import TELL_DEVICES, descriptor_of, full_only
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.words.requests import RETURN_PAGES, REVOKE_PAGES, TAKE_PAGES
from pgemu_kernels.words.rows import I_DMA_END, I_DMA_FIRST, I_DOMAINS, I_PAGES, O_WIDE_END

U = np.uint64
_TAKE, _RETURN, _REVOKE = U(TAKE_PAGES), U(RETURN_PAGES), U(REVOKE_PAGES)


@outlined
def _tell(m, what, op, inode, start, end):
    descriptor = descriptor_of(m)
    call_address(U(descriptor[TELL_DEVICES]), (descriptor, what, op, inode, start, end))


@kernel
def _may_have(m, inode, start, end):
    """Whether devices may have some of pages [start, end)."""
    node = inode_row(inode)
    if m.state[node + I_DOMAINS] == U0:
        return False
    return max(start, m.state[node + I_DMA_FIRST]) < min(end, m.state[node + I_DMA_END])


@kernel
def _take(m, op, inode, start, end):
    if _may_have(m, inode, start, end):
        _tell(m, _TAKE, op, inode, start, end)


@kernel
def _give_back(m, op, inode, start, end):
    if _may_have(m, inode, start, end) or m.state[op + O_WIDE_END] != U0:
        _tell(m, _RETURN, op, inode, start, end)


# take_from_devices(m, op, inode, start, end): pages [start, end) are about to be private, or their inode's no more.
# return_to_devices(m, op, inode, start, end): that is over; pages [start, end) may be entered, too.
take_from_devices = full_only(_take, None)
return_to_devices = full_only(_give_back, None)


@kernel
def invalidate_mappings(m, op, inode):
    """dma_buf_invalidate_mappings(): whoever has imported a device's memory lets go of it, for good."""
    node = inode_row(inode)
    if m.state[node + I_DOMAINS] != U0:
        _tell(m, _REVOKE, op, inode, U0, m.state[node + I_PAGES])
