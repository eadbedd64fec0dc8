"""Leaves of an IOMMU's domain: the size that a map chooses, rights, entries that make one leaf."""

from __future__ import annotations

from pgemu_kernels.engine.bits import ALL, U0, U1, U2, U9, U12, U63, U4095, leading_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.tables.edit_entries import is_valid, leaf_attributes, leaf_shift
from pgemu_kernels.tables.edit_tree import count_entry, release_table, store_entry, tear_down
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEARED,
    F_LEAF_4K,
    F_LEAF_BITS,
    F_PAGE_SIZES,
    F_READ,
    F_SIZED_LEAF,
    F_WRITE,
)


@kernel
def device_rights(state, f, read, write):
    """Attributes of a 4K leaf that a device may read or write: what E_SET takes."""
    bits = state[f + F_LEAF_4K] & ~(state[f + F_READ] | state[f + F_WRITE])
    if read:
        bits |= state[f + F_READ]
    if write:
        bits |= state[f + F_WRITE]
    return bits | state[f + F_LEAF_BITS]


@kernel
def highest_bit(value):
    """Number of the highest bit of a value that is not 0."""
    return U63 - leading_zeros(value)


@outlined
def page_size(sizes, address, physical, length):
    """Log 2 of the page that a map chooses, and how many of it follow one another: iommu.c:iommu_pgsize().

    sizes: bitmap of those there are. 4K is among them, and all three are multiples of it.
    """
    both = address | physical
    fitting = sizes & (U2 << highest_bit(length)) - U1
    if both != U0:
        fitting &= both ^ both - U1
    shift = highest_bit(fitting)
    larger = sizes & ~((U2 << shift) - U1)
    if larger != U0:
        following = larger & ~larger + U1
        if (address ^ physical) & following - U1 == U0:
            offset = following - (both & following - U1)
            if offset + following <= length:
                length = offset
    return shift, length >> shift


@kernel
def level_of_size(shift):
    """The level whose table has the entries of a page of that many bits."""
    return (shift - U12) // U9 + U1


@kernel
def sizes_up_to(state, f, level):
    """Bitmap of a format's sizes of leaves, without those above a level."""
    return state[f + F_PAGE_SIZES] & (size_of(level) << U9) - U1


@kernel
def domain_leaf(state, f, level, shift, physical, attributes):
    """An entry of a leaf: its size in its address where it is not the level's."""
    new = physical | leaf_attributes(state, f, level, attributes)
    if shift == shift_of(level):
        return new
    # Ones below half of the size, a zero there: drivers/iommu/amd/amd_iommu_types.h:PAGE_SIZE_PTE().
    return new | state[f + F_SIZED_LEAF] | (U1 << shift - U1) - U1 & ~U4095


@kernel
def clear_entry(e, slot, level):
    """Clear a present entry: IOMMUs' empty entries are 0."""
    store_entry(e, slot, level, U0)
    count_entry(e, slot, ALL)


@kernel
def first_of(slot, level, shift):
    """First slot and number of the entries of a leaf of 2 ** shift bytes, of which `slot` is one."""
    entries = U1 << shift - shift_of(level)
    return slot & ~(entries - U1), entries


@outlined
def clear_leaf(e, f, slot, level, value):
    """Clear all entries of a leaf: log 2 of its size."""
    shift = leaf_shift(e.state, f, level, value)
    first, entries = first_of(slot, level, shift)
    for at in range(first, first + entries):
        if is_valid(e.state, f, e.ram[at]):
            clear_entry(e, at, level)
            e.request[E_CLEARED] += U1
    e.request[E_CHANGED] += U1
    return shift


@outlined
def drop_table(e, f, slot, level, value):
    """Clear an entry that points to a table; that and all below it are freed after the flush."""
    table = table_of(e.state, f, value)
    clear_entry(e, slot, level)
    tear_down(e, f, table, level - U1, False)
    release_table(e, table)
