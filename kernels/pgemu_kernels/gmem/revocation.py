"""What a conversion takes from devices that map a guest_memfd without holding its pages, and gives them."""

from __future__ import annotations

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.telling import return_to_devices, take_from_devices
from pgemu_kernels.words.rows import O_INODE, O_TO_PRIVATE


@kernel
def take_converted(m, op, start, end):
    """A conversion to private takes pages [start, end)."""
    if m.state[op + O_TO_PRIVATE] != U0:
        take_from_devices(m, op, m.state[op + O_INODE], start, end)


@kernel
def return_converted(m, op, start, end):
    """A unit of a conversion is done: what it took besides, and pages [start, end) where they are shared now."""
    return_to_devices(m, op, m.state[op + O_INODE], start, start if m.state[op + O_TO_PRIVATE] != U0 else end)
