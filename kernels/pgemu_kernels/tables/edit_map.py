"""Mapping in a table of any format: leaves, ranges, and the splitting and collapsing that it takes."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9, U511, U512, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.tables.edit_entries import (
    attributes,
    breaks,
    child_attributes,
    is_frozen,
    is_leaf,
    is_valid,
    leaf_address,
    leaf_attributes,
    sticky_bits,
    well_formed,
)
from pgemu_kernels.tables.edit_tree import (
    WHOLE_VM,
    count_entry,
    count_in_table,
    empty_table,
    find,
    holds_leaf,
    load_entry,
    release_table,
    store_entry,
    swap,
    table_entry,
    take_table,
    tear_down,
)
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEARED,
    E_FLAGS,
    E_LENGTH,
    E_LEVEL,
    E_OFFSET,
    E_SET,
    E_WRITTEN,
    EDIT_EXACT,
    EDIT_REPLACE,
    F_ADDRESS,
    F_EMPTY,
    F_FLUSH,
    F_PRESENT,
    F_RESERVED_LEAF,
)

DONE = np.int64(0)
NO_ENTRY = np.int64(-words.ENOENT)
TRY_AGAIN = np.int64(-words.EAGAIN)
NO_MEMORY = np.int64(-words.ENOMEM)
EXISTS = np.int64(-words.EEXIST)
INVALID = np.int64(-words.EINVAL)


# --------------------------------------------------------------------------- split and collapse


@kernel
def fill_children(e, table, level, first):
    """Fill a table of `level` with leaves that follow one another from `first` on."""
    size = size_of(level)
    for i in range(U512):
        store_entry(e, table + i, level, first + i * size)
    e.counts[table >> U9] = np.uint32(512)
    e.request[E_WRITTEN] += U512


@outlined
def build_pages(e, f, table, value):
    """Fill a level-2 table with tables of 4K leaves, off line; 512 frames are at hand. `value`: the 1G leaf."""
    state = e.state
    page = leaf_address(state, f, U3, value) | child_attributes(state, f, U1, attributes(state, f, U3, value))
    for i in range(U512):
        below = take_table(e)
        fill_children(e, below, U1, page + i * size_of(U2))
        store_entry(e, table + i, U2, table_entry(state, f, U2, below))
    e.counts[table >> U9] = np.uint32(512)


@outlined
def split_entry(e, f, slot, level, value, base, target):
    """Put a table of 512 smaller leaves in the place of a leaf: 0 or -ENOMEM.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_split_huge_page(): no flush. mm/huge_memory.c:__split_huge_pmd_locked(): the
    leaf becomes not present and is flushed first. Arm's stage2_split_walker() builds the children off line, down to
    `target` where the memory suffices.
    """
    state = e.state
    deep = breaks(state, f) and level == U3 and target == U1 and frames_left(e) >= U512 + U1
    table = take_table(e)
    if table == NONE:
        return NO_MEMORY
    if deep:
        build_pages(e, f, table, value)
    else:
        child = child_attributes(state, f, level - U1, attributes(state, f, level, value))
        fill_children(e, table, level - U1, leaf_address(state, f, level, value) | child)
    new = table_entry(state, f, level, table)
    if state[f + F_FLUSH] == WHOLE_VM:
        store_entry(e, slot, level, new)
    else:
        swap(e, f, slot, level, new, value & ~state[f + F_PRESENT], base, True)
    return DONE


@kernel
def uniform_children(e, f, table, level):
    """The leaf that 512 leaves of `level` add up to, as an entry of theirs, or NONE.

    They must lie one after the other, aligned, and be alike but for the bits that the hardware sets, which are
    OR-ed so that none is lost. (KVM's make_huge_spte() takes those of the first child.)
    """
    state = e.state
    sticky = sticky_bits(state, f)
    first = load_entry(e, table, level)
    merged = first
    if leaf_address(state, f, level, first) & (size_of(level + U1) - U1) != U0:
        return NONE
    for i in range(U512):
        value = first if i == U0 else load_entry(e, table + i, level)
        if not is_valid(state, f, value) or not is_leaf(state, f, level, value):
            return NONE
        if (value ^ (first + i * size_of(level))) & ~sticky != U0:
            return NONE
        merged |= value & sticky
    return merged


@outlined
def collapse_table(e, f, address, level):
    """Put one leaf in the place of the table of 512 at `address`: 0, -ENOENT (no table), or -EINVAL (not alike)."""
    state = e.state
    slot, at, old = find(e, f, address, level)
    if not is_valid(state, f, old):
        return NO_ENTRY
    if at != level or is_leaf(state, f, at, old):
        return INVALID
    table = table_of(state, f, old)
    if e.counts[table >> U9] != np.uint32(512):
        return INVALID
    merged = uniform_children(e, f, table, level - U1)
    if merged == NONE:
        return INVALID
    bits = attributes(state, f, level - U1, merged)
    if level == U2:
        bits = leaf_attributes(state, f, level, bits)
    new = leaf_address(state, f, level - U1, merged) | bits
    if not well_formed(state, f, level, new):
        return INVALID
    replace_table(e, f, slot, level, old, new, address)
    e.request[E_CHANGED] += U1
    return DONE


@outlined
def replace_table(e, f, slot, level, old, new, base):
    """Put a leaf in the place of a table: kvm_tdp_mmu_map(), stage2_map_walk_table_pre(). The old tables are freed."""
    swap(e, f, slot, level, new, e.state[f + F_EMPTY], base, True)
    table = table_of(e.state, f, old)
    tear_down(e, f, table, level - U1, True)
    release_table(e, table)
    e.request[E_WRITTEN] += U1


# --------------------------------------------------------------------------- map


@outlined
def displace(e, f, slot, level, new, base):
    """Write the leaf `new` where an entry is: 0, -EEXIST, or -EAGAIN for a frozen one.

    Tables without leaves are no obstacle: drivers/iommu/generic_pt/iommu_pt.h drops them, too; for processes and
    Arm that is inference.
    """
    state = e.state
    old = e.ram[slot]
    if is_frozen(state, f, old):
        return TRY_AGAIN
    if is_leaf(state, f, level, old):
        if e.request[E_FLAGS] & EDIT_REPLACE == U0:
            return EXISTS
        if old != new:
            swap(e, f, slot, level, new, state[f + F_EMPTY], base, False)
            e.request[E_WRITTEN] += U1
        return DONE
    if e.request[E_FLAGS] & EDIT_REPLACE == U0 and holds_leaf(e, f, table_of(state, f, old), level - U1):
        return EXISTS
    replace_table(e, f, slot, level, old, new, base)
    return DONE


@outlined
def open_leaf(e, f, slot, level, value, base):
    """Make room for smaller leaves where a larger one is: 0 or -ENOMEM.

    Arm puts an empty table there and lets the rest be faulted in again (stage2_map_walk_leaf()).
    """
    if not breaks(e.state, f):
        return split_entry(e, f, slot, level, value, base, level - U1)
    table = empty_table(e, f)
    if table == NONE:
        return NO_MEMORY
    swap(e, f, slot, level, table_entry(e.state, f, level, table), U0, base, True)
    e.request[E_CLEARED] += U1
    return DONE


@outlined
def link_down(e, f, address, slot, level, value, target):
    """Make the tables from the entry at `slot` down to those of level `target`: status and slot there."""
    state = e.state
    while level > target:
        if is_valid(state, f, value):
            if is_leaf(state, f, level, value):
                if e.request[E_FLAGS] & EDIT_REPLACE == U0:
                    return EXISTS, slot
                status = open_leaf(e, f, slot, level, value, address & ~(size_of(level) - U1))
                if status != DONE:
                    return status, slot
        elif is_frozen(state, f, value):
            return TRY_AGAIN, slot
        else:
            table = empty_table(e, f)
            if table == NONE:
                return NO_MEMORY, slot
            store_entry(e, slot, level, table_entry(state, f, level, table))
            count_entry(e, slot, U1)
        table = table_of(state, f, e.ram[slot])
        level -= U1
        slot = table + (address >> shift_of(level) & U511)
        value = load_entry(e, slot, level)
    return DONE, slot


@kernel
def level_that_fits(e, address, physical, length):
    """The largest level that both addresses' alignment and the length allow, up to the request's."""
    level = e.request[E_LEVEL]
    while level > U1 and ((address | physical) & (size_of(level) - U1) != U0 or length < size_of(level)):
        level -= U1
    return level


@outlined
def displace_in_run(e, f, slot, level, new, first, address):
    """displace() of an entry in a run that began at slot `first` for `address`; where it fails is noted."""
    at = address + (slot - first) * size_of(level)
    status = displace(e, f, slot, level, new, at)
    if status != DONE:
        e.request[E_OFFSET] = at
    return status


@outlined
def map_range(e, f, address, end, physical):
    """Map [address, end) to `physical` with the largest leaves: 0 or the first failure."""
    state = e.state
    request = e.request
    while address < end:
        request[E_OFFSET] = address
        level = level_that_fits(e, address, physical, end - address)
        size = size_of(level)
        new = physical | leaf_attributes(state, f, level, request[E_SET])
        if not well_formed(state, f, level, new):
            return INVALID
        slot, at, value = find(e, f, address, level)
        if at != level:
            status, slot = link_down(e, f, address, slot, at, value, level)
            if status != DONE:
                return status
            value = e.ram[slot]
        first = slot
        behind = first + min((end - address) >> shift_of(level), U512 - (slot & U511))
        table = slot >> U9  # its frame
        while True:
            if is_valid(state, f, value) or is_frozen(state, f, value):
                status = displace_in_run(e, f, slot, level, new, first, address)
                if status != DONE:
                    return status
            else:
                store_entry(e, slot, level, new)
                count_in_table(e, table, U1)
                request[E_WRITTEN] += U1
            request[E_CHANGED] += U1
            slot += U1
            if slot == behind:
                break
            new += size
            value = load_entry(e, slot, level)
        address += (behind - first) * size
        physical += (behind - first) * size
        request[E_OFFSET] = address
    return DONE


@kernel
def map_one(e, f, address, physical):
    """Check a request to map, and map: 0 or -errno."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    level = request[E_LEVEL]
    if request[E_FLAGS] & EDIT_EXACT != U0 and (address | physical) & (size_of(level) - U1) != U0:
        return INVALID
    last = physical + length - U1
    # Bits that a leaf may not have end where the physical addresses of this machine end.
    if (physical | last) & (~(state[f + F_ADDRESS] | U4095) | state[f + F_RESERVED_LEAF + U1]) != U0:
        return INVALID
    if physical & U4095 != U0 or last < physical or request[E_SET] & state[f + F_ADDRESS] != U0:
        return INVALID
    return map_range(e, f, address, address + length, physical)
