"""Page tables are trees of 512: index, size and pages of an entry, by level (1 = 4K, 2 = 2M, 3 = 1G, ...)."""

from __future__ import annotations

from pgemu_kernels.engine.bits import U1, U9, U12, U511
from pgemu_kernels.engine.compile import kernel


@kernel
def index_at(page, level):
    """Index of the entry of a 4K page number in its table of a level."""
    return page >> (U9 * (level - U1)) & U511


@kernel
def pages_of(level):
    """4K pages under one entry of a level."""
    return U1 << (U9 * (level - U1))


@kernel
def shift_of(level):
    """Bits of an address below its index at a level."""
    return U12 + U9 * (level - U1)


@kernel
def size_of(level):
    """Bytes that an entry of a level covers."""
    return U1 << shift_of(level)
