"""Mappings of an address space, found by any address of theirs; what they may lie on. A tree by last page of each."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.page_cache import cache_find, cache_next, cache_store
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.rows import D_AREAS, D_COUNT, D_HOLES, D_LAST, D_MEMORY, D_TOP

U = np.uint64


@kernel
def area_from(m, row, iova):
    """Key of the first mapping that ends at or behind an address, or NONE."""
    if iova >> U12 > m.state[row + D_TOP]:  # as of each map behind all others
        return NONE
    return cache_next(m, m.state[row + D_AREAS], iova >> U12)


@kernel
def area_start(m, row, key):
    return cache_find(m, m.state[row + D_AREAS], key) & ~U4095


@kernel
def area_flags(m, row, key):
    return cache_find(m, m.state[row + D_AREAS], key) & U4095


@kernel
def area_memory(m, row, key):
    """Where its memory lies: D_MEMORY."""
    return cache_find(m, m.state[row + D_MEMORY], key)


@kernel
def area_end(key):
    """Address behind a mapping; 0 behind the last one there is."""
    return (key + U1) << U12


@kernel
def area_after(m, row, key):
    """Key of the next mapping, or NONE."""
    end = area_end(key)
    return NONE if end == U0 else area_from(m, row, end)


@outlined
def area_overlapping(m, row, iova, last):
    """Key of the first mapping that has an address of [iova, last], or NONE."""
    key = area_from(m, row, iova)
    if key == NONE or area_start(m, row, key) > last:
        return NONE
    return key


@outlined
def add_area(m, row, iova, length, flags, memory):
    """Enter a mapping: 0 or -ENOMEM with nothing entered. Its word is never 0: it has rights."""
    key = (iova + length - U1) >> U12
    if cache_store(m, row + D_AREAS, key, iova | flags) != 0:
        return np.int64(-ENOMEM)
    if cache_store(m, row + D_MEMORY, key, memory) != 0:
        cache_store(m, row + D_AREAS, key, U0)
        return np.int64(-ENOMEM)
    m.state[row + D_COUNT] += U1
    m.state[row + D_TOP] = max(m.state[row + D_TOP], key)
    return np.int64(0)


@outlined
def remove_area(m, row, key):
    cache_store(m, row + D_AREAS, key, U0)
    cache_store(m, row + D_MEMORY, key, U0)
    m.state[row + D_COUNT] -= U1
    if m.state[row + D_COUNT] == U0:
        m.state[row + D_TOP] = U0


@kernel
def is_usable(state, row, iova, last):
    """vfio_iommu_iova_dma_valid(), iopt_check_iova(): whether the unit takes [iova, last], and no range is reserved."""
    usable = last <= state[row + D_LAST]
    for at in (row + D_HOLES, row + D_HOLES + U2):
        usable &= iova >= state[at + U1] or last < state[at]
    return usable
