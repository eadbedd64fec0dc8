"""The I/O page table of an address space: mapped, unmapped, read. Its edits are those of tables/domain.py."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9, U12, U511
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import put_frame
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.tables.domain import map_frames, open_domain, sync_domain, unmap_frames
from pgemu_kernels.tables.edit_entries import input_mask, is_any_leaf, is_valid, leaf_shift
from pgemu_kernels.tables.edit_tree import empty_table, tear_down
from pgemu_kernels.tables.walker import format_row, table_of
from pgemu_kernels.words.enum_words import EVENT_TABLE_PAGE_FREED, GAUGE_FRAMES_USED
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import R_EDIT_FRAMES
from pgemu_kernels.words.rows import (
    AREA_READ,
    AREA_WRITE,
    D_EMPTY_FORMAT,
    D_FORMAT,
    D_ROOT,
    D_WORDS,
    STATE_DOMAINS,
    STATE_IO_REQUEST,
)
from pgemu_kernels.words.table_words import E_FORMAT, E_ROOT, E_WORDS, F_ADDRESS, F_LEVELS, F_READ, F_WRITE

U = np.uint64


@kernel
def domain_row(number):
    return STATE_DOMAINS + number * U(D_WORDS)


@kernel
def begin_edit(m, row):
    """The tree of an address space's I/O page table."""
    request = m.state[STATE_IO_REQUEST : STATE_IO_REQUEST + U(E_WORDS)]
    return open_domain(m, request, m.state[row + D_FORMAT], m.state[row + D_ROOT])


@kernel
def frames_used(m):
    return m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2]


@kernel
def end_edit(m, e, row, used):
    """iommu_iotlb_sync(), and the root that there is now. `used`: frames_used() before."""
    sync_domain(e)
    m.state[row + D_FORMAT] = e.request[E_FORMAT]
    m.state[row + D_ROOT] = e.request[E_ROOT]
    m.state[R_EDIT_FRAMES] += U(frames_used(m) - used)


@outlined
def make_table(m, row):
    """An empty root for an address space that has none: 0 or -ENOMEM."""
    m.state[row + D_FORMAT] = m.state[row + D_EMPTY_FORMAT]
    used = frames_used(m)
    e = begin_edit(m, row)
    table = empty_table(e, format_row(m.state, m.state[row + D_FORMAT]))
    if table == NONE:
        return np.int64(-ENOMEM)
    e.request[E_ROOT] = table << U3
    end_edit(m, e, row, used)
    return np.int64(0)


@outlined
def free_table_of(m, row):
    """Free the table of an address space, whatever it maps."""
    state = m.state
    used = frames_used(m)
    e = begin_edit(m, row)
    f = format_row(state, state[row + D_FORMAT])
    frame = e.request[E_ROOT] >> U12
    tear_down(e, f, frame << U9, state[f + F_LEVELS], False)
    end_edit(m, e, row, used)
    m.counts[frame] = np.uint32(0)
    put_frame(m, frame)
    charge(m, EVENT_TABLE_PAGE_FREED, np.int64(1))
    state[R_EDIT_FRAMES] -= U1
    state[row + D_ROOT] = U0


@outlined
def map_run(m, row, iova, physical, length, rights):
    """iommu_map() of memory that follows one another: 0 or -errno with nothing mapped. rights: AREA_READ, _WRITE."""
    used = frames_used(m)
    e = begin_edit(m, row)
    status = map_frames(e, iova, physical, length, rights & AREA_READ != U0, rights & AREA_WRITE != U0)
    end_edit(m, e, row, used)
    return status


@outlined
def unmap_run(m, row, iova, length):
    """iommu_unmap(): how many bytes went."""
    used = frames_used(m)
    e = begin_edit(m, row)
    went = unmap_frames(e, iova, length)
    end_edit(m, e, row, used)
    return U0 if went == NONE else went


@kernel
def walk_domain(m, root, f, iova):
    """Entry over an I/O address: (entry, log 2 of what it covers); 0 where no leaf is."""
    state = m.state
    ram = m.ram
    if iova & ~input_mask(state, f) != U0:
        return U0, U12
    level = state[f + F_LEVELS]
    value = ram[(root >> U3) + (iova >> shift_of(level))]
    while is_valid(state, f, value) and not is_any_leaf(state, f, level, value):
        level -= U1
        value = ram[table_of(state, f, value) + (iova >> shift_of(level) & U511)]
    if not is_valid(state, f, value):
        return U0, shift_of(level)
    return value, leaf_shift(state, f, level, value)


@kernel
def physical_of(state, f, entry, shift, iova):
    """Physical address that a leaf gives an I/O address."""
    inside = (U1 << shift) - U1
    return (entry & state[f + F_ADDRESS] & ~inside) | (iova & inside)


@outlined
def iova_to_phys(m, row, iova):
    """iommu_iova_to_phys(): (physical address, bytes from there to the end of the leaf); 0 bytes where none is."""
    f = format_row(m.state, m.state[row + D_FORMAT])
    entry, shift = walk_domain(m, m.state[row + D_ROOT], f, iova)
    if entry == U0:
        return U0, U0
    return physical_of(m.state, f, entry, shift, iova), (U1 << shift) - (iova & (U1 << shift) - U1)


@kernel
def allows(state, f, entry, write):
    """Whether a leaf lets a device read or write. Linux's tables allow both."""
    return entry & state[f + (F_WRITE if write else F_READ)] != U0
