"""The I/O page table of an address space: mapped, unmapped, read. Its edits are those of tables/domain_*.py."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U511
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import put_frame
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.engine.rows import clear_words
from pgemu_kernels.tables.domain_entries import device_rights
from pgemu_kernels.tables.domain_map import DONE, domain_map, grow
from pgemu_kernels.tables.domain_unmap import domain_unmap
from pgemu_kernels.tables.edit_entries import input_mask, is_leaf, is_valid, leaf_shift
from pgemu_kernels.tables.edit_tree import Tree, empty_table, flush_pending, give_back, tear_down
from pgemu_kernels.tables.walker import format_row, table_of
from pgemu_kernels.words.enum_words import (
    EVENT_IOPTE_CLEARED,
    EVENT_IOPTE_WRITTEN,
    EVENT_TABLE_PAGE_FREED,
    GAUGE_FRAMES_USED,
)
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
from pgemu_kernels.words.table_words import (
    E_CLEARED,
    E_FORMAT,
    E_LENGTH,
    E_LEVEL,
    E_ROOT,
    E_SET,
    E_WORDS,
    E_WRITTEN,
    F_ADDRESS,
    F_LARGEST_LEAF,
    F_LEVELS,
    F_READ,
    F_WRITE,
)

U = np.uint64
_WORDS = U(E_WORDS)


@kernel
def domain_row(number):
    return STATE_DOMAINS + number * U(D_WORDS)


@kernel
def begin_edit(m, row):
    """The machine with an empty request for the table of an address space, and where its format begins."""
    state = m.state
    clear_words(state, STATE_IO_REQUEST, _WORDS)
    request = state[STATE_IO_REQUEST : STATE_IO_REQUEST + _WORDS]
    request[E_FORMAT] = state[row + D_FORMAT]
    request[E_ROOT] = state[row + D_ROOT]
    return Tree(m.ram, state, m.stats, m.counts, request, state[U0:U0]), format_row(state, state[row + D_FORMAT])


@kernel
def frames_used(m):
    return m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2]


@kernel
def end_edit(m, e, row, f, used):
    """The flush that is owed, the frames of freed tables, the price of the leaves; the root that there is now."""
    flush_pending(e, f)
    give_back(e)
    charge(e, EVENT_IOPTE_WRITTEN, np.int64(e.request[E_WRITTEN]))
    charge(e, EVENT_IOPTE_CLEARED, np.int64(e.request[E_CLEARED]))
    m.state[row + D_FORMAT] = e.request[E_FORMAT]
    m.state[row + D_ROOT] = e.request[E_ROOT]
    m.state[R_EDIT_FRAMES] += U(frames_used(m) - used)


@outlined
def make_table(m, row):
    """An empty root for an address space that has none: 0 or -ENOMEM."""
    state = m.state
    state[row + D_FORMAT] = state[row + D_EMPTY_FORMAT]
    used = frames_used(m)
    e, f = begin_edit(m, row)
    table = empty_table(e, f)
    if table == NONE:
        return np.int64(-ENOMEM)
    e.request[E_ROOT] = table << U(3)
    end_edit(m, e, row, f, used)
    return np.int64(0)


@outlined
def free_table_of(m, row):
    """Free the table of an address space, whatever it maps."""
    state = m.state
    used = frames_used(m)
    e, f = begin_edit(m, row)
    frame = e.request[E_ROOT] >> U(12)
    tear_down(e, f, frame << U(9), state[f + F_LEVELS], False)
    end_edit(m, e, row, f, used)
    m.counts[frame] = np.uint32(0)
    put_frame(m, frame)
    charge(m, EVENT_TABLE_PAGE_FREED, np.int64(1))
    state[R_EDIT_FRAMES] -= U1
    state[row + D_ROOT] = U0


@outlined
def map_run(m, row, iova, physical, length, rights):
    """iommu_map() of memory that follows one another: 0 or -errno with nothing mapped. rights: AREA_READ, _WRITE."""
    state = m.state
    used = frames_used(m)
    e, f = begin_edit(m, row)
    status = DONE
    last = iova + length - U1
    if last & ~input_mask(state, f) != U0:
        grow(e, last)  # the map says what is wrong if it cannot
        f = format_row(state, e.request[E_FORMAT])
    e.request[E_LENGTH] = length
    e.request[E_LEVEL] = state[f + F_LARGEST_LEAF]
    e.request[E_SET] = device_rights(state, f, rights & AREA_READ != U0, rights & AREA_WRITE != U0)
    status = domain_map(e, f, iova, physical, length)
    end_edit(m, e, row, f, used)
    return status


@outlined
def unmap_run(m, row, iova, length):
    """iommu_unmap(): how many bytes went."""
    used = frames_used(m)
    e, f = begin_edit(m, row)
    went = domain_unmap(e, f, iova, length)
    end_edit(m, e, row, f, used)
    return U0 if went == NONE else went


@kernel
def walk_domain(m, root, f, iova):
    """Entry over an I/O address: (entry, log 2 of what it covers); 0 where no leaf is."""
    state = m.state
    ram = m.ram
    if iova & ~input_mask(state, f) != U0:
        return U0, U(12)
    level = state[f + F_LEVELS]
    value = ram[(root >> U(3)) + (iova >> shift_of(level))]
    while is_valid(state, f, value) and not is_leaf(state, f, level, value):
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
