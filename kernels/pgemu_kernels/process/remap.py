"""mremap(): entries and tables moved to another address. mm/mremap.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U12
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import find_vma, space_root
from pgemu_kernels.formats.bits import PTE_SOFT_DIRTY
from pgemu_kernels.process.entries import holds_page, points_to_table
from pgemu_kernels.process.huge_memory import split_and_notify
from pgemu_kernels.process.huge_pmd import is_huge_anonymous
from pgemu_kernels.process.tables import gather, lookup_address, need_slot, slot_of_level
from pgemu_kernels.process.zapping import drop_large_pfn
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.words.enum_words import EVENT_LEAF_CLEARED, EVENT_LEAF_WRITTEN
from pgemu_kernels.words.operations import ENOMEM


@kernel
def _extent(at, to, end, level):
    """get_extent(): bytes until the next boundary of a level at either side, or the end."""
    size = size_of(level)
    left = min(size - (at & (size - U1)), end - at)
    return min(left, size - (to & (size - U1)))


@kernel
def _move_table(m, source, target):
    """move_normal_pmd(), move_normal_pud(): the whole table under its new address, if there is none yet."""
    if not points_to_table(m.ram[source]) or m.ram[target] != U0:
        return False
    m.ram[target] = m.ram[source]
    m.ram[source] = U0
    charge_one(m, EVENT_LEAF_WRITTEN)
    return True


@kernel
def _move_entries(m, root, space, at, to, length):
    """move_ptes(): 4K entries, within one table at either side; soft-dirty is set. 0 or -ENOMEM."""
    target = need_slot(m, space, to, U1)
    if target == NONE:
        return np.int64(-ENOMEM)
    source, _ = lookup_address(m, root, at)
    for i in range(length >> U12):
        entry = m.ram[source + i]
        if entry != U0:
            m.ram[source + i] = U0
            m.ram[target + i] = entry | PTE_SOFT_DIRTY if holds_page(entry) else entry
            charge_one(m, EVENT_LEAF_CLEARED)
            charge_one(m, EVENT_LEAF_WRITTEN)
            gather(m, at + (i << U12), U1)
    return np.int64(0)


@kernel
def _move_large(m, space, source, target, at, level, step):
    """move_huge_pmd(): a large entry goes whole, soft-dirty set, if all of it moves to a place like its own; else it is
    dropped as __split_huge_pmd() drops one that is not anonymous memory's. A table deposited for it stays so."""
    if step != size_of(level) or m.ram[target] != U0:
        drop_large_pfn(m, find_vma(m.state, space, at), at, level)
        return
    m.ram[target] = m.ram[source] | PTE_SOFT_DIRTY
    m.ram[source] = U0
    charge_one(m, EVENT_LEAF_CLEARED)
    charge_one(m, EVENT_LEAF_WRITTEN)


@kernel
def _split_unaligned(m, space, source, target, at, level, step):
    """Whether a large entry that cannot move whole is a huge page of anonymous memory, which is split then."""
    row = find_vma(m.state, space, at)
    if (step == size_of(level) and m.ram[target] == U0) or not is_huge_anonymous(m.state, row, m.ram[source], level):
        return False
    split_and_notify(m, row, source, at)
    return True


@outlined
def move_page_tables(m, space, at, to, length):
    """Move what [at, at + length) maps to `to`: 0, or -ENOMEM with a part moved.

    Where both sides are aligned alike whole tables go, of 1G or of 2M; the bytes moved are the same.
    """
    root = space_root(m.state, space)
    end = at + length
    notify_range(m, space, at, end)
    while at < end:
        step = U0
        for level in (U3, U2):
            step = _extent(at, to, end, level)
            source = slot_of_level(m, root, at, level)
            if source == NONE or m.ram[source] == U0:
                break
            target = need_slot(m, space, to, level)
            if target == NONE:
                return np.int64(-ENOMEM)
            if not points_to_table(m.ram[source]) and not _split_unaligned(m, space, source, target, at, level, step):
                _move_large(m, space, source, target, at, level, step)
                gather(m, at, level)
                break
            if step == size_of(level) and _move_table(m, source, target):
                gather(m, at, level)
                break
            if level == U2 and _move_entries(m, root, space, at, to, step) != 0:
                return np.int64(-ENOMEM)
        at += step
        to += step
    return np.int64(0)
