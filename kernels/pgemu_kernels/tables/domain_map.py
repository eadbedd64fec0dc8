"""Maps and unmaps of an IOMMU's domain, as drivers/iommu/iommu.c:iommu_map() and iommu_unmap() do them.

What is in the way of a map and what an unmap does at holes, inside leaves and with tables differs from driver to
driver and kernel to kernel: formats.MapRule and UnmapRule of the format's row. A leaf whose size is in its address
stands in several entries that are equal; each counts as an entry. The root changes as a domain grows: E_ROOT and
E_FORMAT are the new ones then.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U9, U511, U512, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.formats.entry_format import MapRule
from pgemu_kernels.tables.domain_entries import (
    clear_entry,
    clear_leaf,
    domain_leaf,
    drop_table,
    level_of_size,
    page_size,
    sizes_up_to,
)
from pgemu_kernels.tables.domain_unmap import domain_unmap
from pgemu_kernels.tables.edit_entries import input_mask, is_any_leaf, is_sized, is_valid
from pgemu_kernels.tables.edit_tree import (
    count_entry,
    count_in_table,
    empty_table,
    find,
    flush,
    flush_pending,
    load_entry,
    owe_flush,
    store_entry,
    table_entry,
)
from pgemu_kernels.tables.walker import format_row, table_of
from pgemu_kernels.words.enum_words import EVENT_DEVICE_TABLE_UPDATED
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEARED,
    E_FORMAT,
    E_FREED_LIST,
    E_LEVEL,
    E_OFFSET,
    E_ROOT,
    E_SCAN,
    E_SCAN_END,
    E_SET,
    E_WRITTEN,
    F_ADDRESS,
    F_LEVELS,
    F_MAP_FLUSHES,
    F_MAP_RULE,
    F_PRESENT,
    F_RESERVED_LEAF,
    F_TALLER,
)

U = np.uint64
DONE = np.int64(0)
NO_MEMORY = np.int64(-words.ENOMEM)
FAULT = np.int64(-words.EFAULT)
INVALID = np.int64(-words.EINVAL)
OUT_OF_RANGE = np.int64(-words.ERANGE)
IN_USE = np.int64(-words.EADDRINUSE)
RULE_IN_USE = U(MapRule.IN_USE)
RULE_CLEAR_LARGE = U(MapRule.CLEAR_LARGE)
RULE_REPLACE = U(MapRule.REPLACE)


@outlined
def any_leaf(e, f, table, level):
    """Whether a table or one below it has a leaf: iommu_pt.h:__collect_tables()."""
    request = e.request
    state = e.state
    top = level
    request[E_SCAN + level] = table
    request[E_SCAN_END + level] = table + U512
    while True:
        slot = request[E_SCAN + level]
        if slot == request[E_SCAN_END + level]:
            if level == top:
                return False
            level += U1
            continue
        request[E_SCAN + level] = slot + U1
        value = load_entry(e, slot, level)
        if is_valid(state, f, value):
            if is_any_leaf(state, f, level, value):
                return True
            level -= U1
            below = table_of(state, f, value)
            request[E_SCAN + level] = below
            request[E_SCAN_END + level] = below + U512


@outlined
def grow(e, last):
    """Put tables on top until `last`, an address, is one that the domain takes: 0, -ERANGE or -ENOMEM.

    iommu_pt.h:increase_top(), amd/io_pgtable.c:increase_address_space(). Devices get the new root once; their caches
    stay right, so nothing is flushed but the device table.
    """
    state = e.state
    request = e.request
    f = format_row(state, request[E_FORMAT])
    missing = U0
    row = request[E_FORMAT]
    while last & ~input_mask(state, format_row(state, row)) != U0:
        row = state[format_row(state, row) + F_TALLER]
        if row == U0:
            return OUT_OF_RANGE
        missing += U1
    if missing == U0:
        return DONE
    if frames_left(e) < missing:
        return NO_MEMORY
    while last & ~input_mask(state, f) != U0:
        table = empty_table(e, f)
        request[E_FORMAT] = state[f + F_TALLER]
        f = format_row(state, request[E_FORMAT])
        level = state[f + F_LEVELS]
        store_entry(e, table, level, table_entry(state, f, level, request[E_ROOT] >> U3))
        count_entry(e, table, U1)
        request[E_ROOT] = table << U3
    charge_one(e, EVENT_DEVICE_TABLE_UPDATED)
    return DONE


@outlined
def pass_leaf(e, f, slot, level, value):
    """Go below a leaf on the way down of a map: 0 if the entry is empty now.

    intel/iommu.c:pfn_to_dma_pte() would take the page for a table and write into it: here -EINVAL.
    """
    rule = e.state[f + F_MAP_RULE]
    if rule == RULE_IN_USE:
        return IN_USE
    if rule != RULE_REPLACE:
        return INVALID
    if is_sized(e.state, f, value):
        clear_leaf(e, f, slot, level, value)
    else:
        clear_entry(e, slot, level)
        e.request[E_CLEARED] += U1
    return DONE


@outlined
def link_path(e, f, address, target):
    """Walk down to `target`, with tables made where there are none: status, slot, and whether a leaf gave way."""
    state = e.state
    slot, level, value = find(e, f, address, target)
    replaced = False
    while level > target:
        if is_valid(state, f, value) and is_any_leaf(state, f, level, value):
            status = pass_leaf(e, f, slot, level, value)
            if status != DONE:
                return status, slot, replaced
            replaced = True
            value = e.ram[slot]
        if not is_valid(state, f, value):
            table = empty_table(e, f)
            if table == NONE:
                return NO_MEMORY, slot, replaced
            store_entry(e, slot, level, table_entry(state, f, level, table))
            count_entry(e, slot, U1)
        level -= U1
        slot = table_of(state, f, e.ram[slot]) + (address >> shift_of(level) & U511)
        value = load_entry(e, slot, level)
    return DONE, slot, replaced


@outlined
def make_way(e, f, slot, level, value, address):
    """Deal with a present entry where a leaf is to be: status, and whether the entry is empty now."""
    state = e.state
    rule = state[f + F_MAP_RULE]
    size = size_of(level)
    base = address & ~(size - U1)
    if is_any_leaf(state, f, level, value):
        if rule == RULE_IN_USE:
            return IN_USE, False
        if rule == RULE_CLEAR_LARGE and level == U1:
            return DONE, False  # __domain_mapping(): the old entry stays, with a warning
        clear_entry(e, slot, level)
        e.request[E_CLEARED] += U1
        if rule == RULE_CLEAR_LARGE:
            flush(e, f, base, base + size, level)
        return DONE, True
    if rule == RULE_IN_USE and any_leaf(e, f, table_of(state, f, value), level - U1):
        return IN_USE, False
    drop_table(e, f, slot, level, value)
    if rule == RULE_CLEAR_LARGE:
        flush(e, f, base, base + size, level)
    elif rule == RULE_IN_USE:
        owe_flush(e, base, base + size, level)
    return DONE, True


@outlined
def clear_way(e, f, slot, level, entries, address):
    """Deal with what is where a leaf is to be: 0 or -errno, whether its entries are empty now, whether tables went."""
    room = True
    freed = e.request[E_FREED_LIST]
    for at in range(slot, slot + entries):
        value = load_entry(e, at, level)
        if is_valid(e.state, f, value):
            status, room = make_way(e, f, at, level, value, address + ((at - slot) << shift_of(level)))
            if status != DONE:
                return status, False, freed != e.request[E_FREED_LIST]
    return DONE, room, freed != e.request[E_FREED_LIST]


@kernel
def fill_pages(e, f, slot, behind, level, new, size):
    """Write leaves of one entry each into what is empty, up to the first entry that is not: the slot it came to."""
    first = slot
    while slot != behind and not is_valid(e.state, f, load_entry(e, slot, level)):
        store_entry(e, slot, level, new)
        new += size
        slot += U1
    count_in_table(e, first >> U9, slot - first)
    e.request[E_WRITTEN] += slot - first
    e.request[E_CHANGED] += slot - first
    return slot


@outlined
def fill_table(e, f, address, slot, level, shift, here, new):
    """Write `here` leaves in a row of one table: 0 or -errno, how many are done, whether tables went for them."""
    entries = U1 << shift - shift_of(level)
    size = U1 << shift
    request = e.request
    replaced = False
    done = U0
    while done < here:
        if entries == U1:
            done += fill_pages(e, f, slot + done, slot + here, level, new + done * size, size) - slot - done
            if done == here:
                break
        at = slot + done * entries
        status, room, went = clear_way(e, f, at, level, entries, address + done * size)
        replaced |= went
        if status != DONE:
            return status, done, replaced
        if room:
            for one in range(at, at + entries):
                store_entry(e, one, level, new + done * size)
            count_in_table(e, at >> U9, entries)
            request[E_WRITTEN] += entries
            request[E_CHANGED] += U1
        done += U1
    return DONE, done, replaced


@outlined
def map_pages(e, f, address, physical, shift, count):
    """Map `count` pages of 2 ** shift bytes: iommu_domain_ops.map_pages(). 0 or -errno; E_OFFSET is how far it came."""
    state = e.state
    level = level_of_size(shift)
    entries = U1 << shift - shift_of(level)
    new = domain_leaf(state, f, level, shift, physical, e.request[E_SET])
    start = address
    end = address + (count << shift)
    replaced = False
    status = DONE
    while address != end and status == DONE:
        status, slot, gave_way = link_path(e, f, address, level)
        replaced |= gave_way
        if status == DONE:
            here = min((end - address) >> shift, (U512 - (slot & U511)) // entries)
            status, done, gave_way = fill_table(e, f, address, slot, level, shift, here, new)
            replaced |= gave_way
            new += done << shift
            address += done << shift
        e.request[E_OFFSET] = address
    if replaced and state[f + F_MAP_RULE] == RULE_REPLACE:
        owe_flush(e, start, end, U1)
    flush_pending(e, f)
    return status


@outlined
def domain_map(e, f, address, physical, length):
    """Map [address, address + length) with the largest pages there are: 0, or -errno and nothing is left mapped.

    All three are multiples of 4096; E_SET has the attributes, E_LEVEL the highest level of a leaf. -ERANGE (-EFAULT
    of 6.12's VT-d) beyond the addresses of the format; the domain grows before: `grow`. Tables made stay.
    """
    state = e.state
    request = e.request
    last = address + length - U1
    request[E_OFFSET] = address
    if last & ~input_mask(state, f) != U0 or last < address:
        return FAULT if state[f + F_MAP_RULE] == RULE_CLEAR_LARGE else OUT_OF_RANGE
    highest = physical + length - U1
    if highest < physical or highest & (~(state[f + F_ADDRESS] | U4095) | state[f + F_RESERVED_LEAF + U1]) != U0:
        return OUT_OF_RANGE if state[f + F_MAP_RULE] == RULE_IN_USE else INVALID
    if request[E_SET] & state[f + F_ADDRESS] != U0 or request[E_SET] & state[f + F_PRESENT] == U0:
        return INVALID
    start = address
    end = address + length
    sizes = sizes_up_to(state, f, request[E_LEVEL])
    while address != end:
        shift, count = page_size(sizes, address, physical, end - address)
        status = map_pages(e, f, address, physical, shift, count)
        if status != DONE:
            came = request[E_OFFSET]
            domain_unmap(e, f, start, came - start)
            request[E_OFFSET] = came
            return status
        address += count << shift
        physical += count << shift
    if state[f + F_MAP_FLUSHES] != U0:
        flush(e, f, start, end, U1)
    return DONE
