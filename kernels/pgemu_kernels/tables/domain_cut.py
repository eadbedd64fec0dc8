"""Large leaves of an IOMMU's domain cut and put together while devices use them: no address is without its entry.

No Linux does either yet: iommu_unmap() of a part takes the whole leaf, or is refused. As
arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_split_huge_page() does it, a table is filled first and then entered by one write; the
flush is that of the unmap which follows. A leaf takes the place of a table by one write, too, and the table goes after
the flush.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import NONE, U0, U1, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.tables.domain_entries import domain_leaf, first_of, level_of_size
from pgemu_kernels.tables.edit_entries import is_any_leaf, is_valid, leaf_shift
from pgemu_kernels.tables.edit_tree import (
    count_in_table,
    empty_table,
    find,
    load_entry,
    owe_flush,
    release_table,
    store_entry,
    table_entry,
    tear_down,
)
from pgemu_kernels.tables.walker import table_of
from pgemu_kernels.words.table_words import E_CHANGED, E_WRITTEN, F_ADDRESS, F_LEAF_MASK, F_PAGE_SIZES

U = np.uint64
NO_MEMORY = np.int64(-words.ENOMEM)
NO_SUCH_SIZE = np.int64(-words.EOPNOTSUPP)


@kernel
def page_attributes(state, f, value):
    """What a leaf says but for its address and its size, as a 4K leaf has it."""
    return value & ~(state[f + F_ADDRESS] | state[f + F_LEAF_MASK])


@kernel
def leaf_start(state, f, value, shift):
    """Physical address that a leaf of 2 ** shift bytes begins with."""
    return value & state[f + F_ADDRESS] & ~((U1 << shift) - U1)


@outlined
def _fill(e, f, slot, count, level, physical, attributes):
    """`count` leaves of a level, of its size, that follow one another."""
    shift = shift_of(level)
    for i in range(count):
        store_entry(e, slot + i, level, domain_leaf(e.state, f, level, shift, physical + (i << shift), attributes))
    e.request[E_WRITTEN] += count
    e.request[E_CHANGED] += U1


@outlined
def cut_at(e, f, address):
    """Let no leaf cross an address: (0, -ENOMEM, or -EOPNOTSUPP where the unit has no smaller size; how many were cut).

    What is cut before a failure stays cut: it maps what it mapped.
    """
    state = e.state
    cut = U0
    while True:
        slot, level, value = find(e, f, address, U1)
        if not is_valid(state, f, value):
            return np.int64(0), cut
        shift = leaf_shift(state, f, level, value)
        if address & (U1 << shift) - U1 == U0:
            return np.int64(0), cut
        physical = leaf_start(state, f, value, shift)
        attributes = page_attributes(state, f, value)
        of_size = shift == shift_of(level)
        below = level - U1 if of_size else level
        if state[f + F_PAGE_SIZES] >> shift_of(below) & U1 == U0:
            return NO_SUCH_SIZE, cut
        if of_size:
            table = empty_table(e, f)
            if table == NONE:
                return NO_MEMORY, cut
            _fill(e, f, table, U512, below, physical, attributes)
            count_in_table(e, table >> U(9), U512)
            store_entry(e, slot, level, table_entry(state, f, level, table))
        else:
            first, entries = first_of(slot, level, shift)
            _fill(e, f, first, entries, level, physical, attributes)
        cut += U1


@outlined
def put_together(e, f, address, shift):
    """One leaf of 2 ** shift bytes in the place of those that map its addresses already, one after the other."""
    state = e.state
    _, level, value = find(e, f, address, U1)
    old_shift = leaf_shift(state, f, level, value)
    physical = leaf_start(state, f, value, old_shift)
    attributes = page_attributes(state, f, value)
    target = level_of_size(shift)
    slot, _, _ = find(e, f, address, target)
    new = domain_leaf(state, f, target, shift, physical, attributes)
    entries = U1 << shift - shift_of(target)
    for at in range(slot, slot + entries):
        old = load_entry(e, at, target)
        store_entry(e, at, target, new)
        if not is_any_leaf(state, f, target, old):
            table = table_of(state, f, old)
            tear_down(e, f, table, target - U1, False)
            release_table(e, table)
    e.request[E_WRITTEN] += entries
    e.request[E_CHANGED] += U1
    owe_flush(e, address, address + (U1 << shift), U1)
