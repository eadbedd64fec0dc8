"""Who maps a poisoned page: found, told, and left with an entry that says so. mm/memory-failure.c, mm/rmap.c.

There is no rmap here, so mappings are found by walking: of a file in its VMAs, of anonymous memory in all of them.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U12, U21, U30
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import space_root, vma_overlap, vma_row
from pgemu_kernels.folios.folio import FLAGS, PG_DIRTY, remove_mapping, struct_page
from pgemu_kernels.folios.huge_pages import unmap_huge
from pgemu_kernels.folios.poison import note_signal
from pgemu_kernels.formats.bits import PTE_DIRTY, PTE_SAVED_DIRTY, PTE_SPECIAL
from pgemu_kernels.process.entries import holds_page, hwpoison_entry, leaf_pfn, pte_pfn
from pgemu_kernels.process.tables import level3_slot, lookup_address, space_row
from pgemu_kernels.process.vma import first_vma, notify, unshare_table
from pgemu_kernels.tables.walker import count_host_leaf
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_CLEARED,
    EVENT_LEAF_WRITTEN,
    EVENT_RMAP_CHANGED,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_HOST_LEAVES_4K,
    GAUGE_STAGE2_LEAVES_4K,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.failures import BUS_MCEERR_AO, BUS_MCEERR_AR
from pgemu_kernels.words.registers import R_VMAS
from pgemu_kernels.words.rows import (
    A_END,
    A_KIND,
    A_LIVE,
    A_NEXT,
    A_SPACE,
    A_START,
    MF_DROPPED,
    MF_REPLACED,
    MF_STAGE2,
    PAGE_CACHED,
    PAGE_DIRTY,
    S_RSS,
    STATE_FAILURE,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64
_DIRTY = PTE_DIRTY | PTE_SAVED_DIRTY


@kernel
def stage2_leaves(stats):
    """Leaves of all sizes that stage 2 has, of all VMs."""
    gauge = STATS_GAUGES + GAUGE_STAGE2_LEAVES_4K * U2
    return stats[gauge] + stats[gauge + U2] + stats[gauge + U(4)]


@kernel
def count_failure(state, word, n):
    """The record of what this memory failure did: `n` (uint64) more of something."""
    state[STATE_FAILURE + word] += n


@kernel
def tell(m, space, address, shift, required, early):
    """add_to_kill() and kill_proc(): the process `required` met the error itself, others are told with `early` only."""
    if space == required:
        note_signal(m.state, space, address, U(BUS_MCEERR_AR), shift)
    elif early:
        note_signal(m.state, space, address, U(BUS_MCEERR_AO), shift)


@outlined
def replace_entry(m, row, slot, address, pfn, shift):
    """try_to_unmap_one() with TTU_HWPOISON: VMs are told, then the entry of a page becomes a hwpoison entry."""
    before = stage2_leaves(m.stats)
    notify(m, row, address, address + (U1 << shift))
    count_failure(m.state, MF_STAGE2, U(before - stage2_leaves(m.stats)))
    count_failure(m.state, MF_REPLACED, U1)
    m.ram[slot] = hwpoison_entry(m.state, pfn)
    charge_one(m, EVENT_LEAF_CLEARED)
    charge_one(m, EVENT_LEAF_WRITTEN)
    charge_one(m, EVENT_TLB_FLUSH_MM)
    charge_one(m, EVENT_TLB_FLUSH_PAGE)


@kernel
def _forget(m, row, entry, pfn):
    """The entry's mapping and reference go, and its dirty bit is the page's: folio_remove_rmap_pte(), folio_put()."""
    state = m.state
    if state[row + A_KIND] == VMA_GUEST_MEMFD:
        page = struct_page(m, pfn)
        if entry & _DIRTY != U0:
            m.ram[page + FLAGS] |= PG_DIRTY
        remove_mapping(m.ram, page)
    else:
        word = U(m.counts[pfn])
        dirty = word & PAGE_CACHED != U0 and entry & _DIRTY != U0
        m.counts[pfn] = np.uint32((word | (PAGE_DIRTY if dirty else U0)) - U1)
    state[space_row(state[row + A_SPACE]) + S_RSS] -= U1
    charge_one(m, EVENT_RMAP_CHANGED)
    count_host_leaf(m, -1)


@kernel
def _unmap_small(m, row, slot, address, pfn):
    """One 4K entry of a page, if this is one that its folio counts."""
    entry = m.ram[slot]
    if holds_page(entry) and entry & PTE_SPECIAL == U0 and pte_pfn(entry) == pfn:
        replace_entry(m, row, slot, address, pfn, U12)
        _forget(m, row, entry, pfn)


@outlined
def unmap_file_page(m, inode, index, pfn):
    """try_to_unmap() of a 4K folio of a file."""
    state = m.state
    row = first_vma(state, inode)
    while row != U0:
        address, end = vma_overlap(state, row, inode, index, index + U1)
        if address < end:
            slot, level = lookup_address(m, space_root(state, state[row + A_SPACE]), address)
            if level == U1:
                _unmap_small(m, row, slot, address, pfn)
        row = state[row + A_NEXT]


@outlined
def try_to_migrate(m, inode, index, pfn):
    """A 4K folio of a file that cannot be migrated after all: VMs are told of each entry, which comes back as it was.

    mm/rmap.c:try_to_migrate(), mm/migrate.c:remove_migration_ptes()
    """
    state = m.state
    row = first_vma(state, inode)
    while row != U0:
        address, end = vma_overlap(state, row, inode, index, index + U1)
        slot, level = lookup_address(m, space_root(state, state[row + A_SPACE]), address)
        entry = m.ram[slot]
        counted = address < end and level == U1 and holds_page(entry) and entry & PTE_SPECIAL == U0
        if counted and pte_pfn(entry) == pfn:
            notify(m, row, address, end)
            charge_one(m, EVENT_LEAF_CLEARED)
            charge(m, EVENT_LEAF_WRITTEN, 2)
            charge(m, EVENT_RMAP_CHANGED, 2)
            charge_one(m, EVENT_TLB_FLUSH_MM)
            charge_one(m, EVENT_TLB_FLUSH_PAGE)
        row = state[row + A_NEXT]


@outlined
def kill_procs_of_file(m, inode, index, shift, required, early):
    """collect_procs_file(): every process that has a VMA over the page, whether or not it mapped it."""
    state = m.state
    row = first_vma(state, inode)
    while row != U0:
        address, end = vma_overlap(state, row, inode, index, index + U1)
        if address < end:
            tell(m, state[row + A_SPACE], address, shift, required, early)
        row = state[row + A_NEXT]


@outlined
def unmap_anonymous_page(m, pfn, required, early):
    """The same of a page of anonymous memory, whose processes are told: its entries are dirty. How many there were."""
    state = m.state
    found = U0
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] == U0 or state[row + A_KIND] != VMA_ANONYMOUS:
            continue
        root = space_root(state, state[row + A_SPACE])
        address = state[row + A_START]
        while address < state[row + A_END]:
            slot, level = lookup_address(m, root, address)
            entry = m.ram[slot]
            here = level == U1 and holds_page(entry) and entry & PTE_SPECIAL == U0 and pte_pfn(entry) == pfn
            if here:
                _unmap_small(m, row, slot, address, pfn)
                tell(m, state[row + A_SPACE], address, U12, required, early)
                found += U1
            address = (address & ~(size_of(level) - U1)) + size_of(level)
    return found


@outlined
def unmap_huge_page(m, head, level, required, early):
    """The same of a HugeTLB page, shared or private. A table that processes share is let go of in its place, but by the
    last one: huge_pmd_unshare(). How many entries there were."""
    state = m.state
    found = U0
    shift = U21 if level == U2 else U30
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] == U0 or state[row + A_KIND] != VMA_HUGETLB:
            continue
        root = space_root(state, state[row + A_SPACE])
        address = state[row + A_START]
        while address < state[row + A_END]:
            slot, at = lookup_address(m, root, address)
            entry = m.ram[slot]
            if at == level and holds_page(entry) and leaf_pfn(entry, level) == head:
                found += U1
                tell(m, state[row + A_SPACE], address, shift, required, early)
                if level == U2 and unshare_table(m, level3_slot(m, root, address)):
                    notify(m, row, address, address + size_of(level))
                    count_failure(state, MF_DROPPED, U1)
                    charge_one(m, EVENT_TLB_FLUSH_MM)
                else:
                    replace_entry(m, row, slot, address, head, shift)
                    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, -1)
                    unmap_huge(m, head, entry)
            address = (address & ~(size_of(at) - U1)) + size_of(at)
    return found


@outlined
def maps_page(m, space, pfn):
    """kill_accessing_process(): whether a process has an entry of a poisoned page, be it the one that says so, and
    where (0: it has none)."""
    state = m.state
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] == U0 or state[row + A_SPACE] != space:
            continue
        address = state[row + A_START]
        while address < state[row + A_END]:
            slot, level = lookup_address(m, space_root(state, space), address)
            entry = m.ram[slot]
            size = size_of(level)
            inside = (size >> U12) - U1
            if holds_page(entry) and leaf_pfn(entry, level) == pfn & ~inside:
                return (address & ~(size - U1)) + ((pfn & inside) << U12)
            if entry == hwpoison_entry(state, pfn & ~inside):
                return (address & ~(size - U1)) + ((pfn & inside) << U12)
            address = (address & ~(size - U1)) + size
    return U0
