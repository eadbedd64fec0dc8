"""Special entries of a process: of 4K, and of 2M and 1G where all of the block is shared (Config.host_huge).

vmf_insert_pfn_pmd() and _pud() from a huge_fault handler, as drivers/vfio/pci/vfio_pci_core.c has one; no guest_memfd
code does that (inference). mm/huge_memory.c
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U32
from pgemu_kernels.engine.charge import change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.engine.handle import full_only, parameter
from pgemu_kernels.engine.properties import entries_are_special
from pgemu_kernels.engine.rows import block_row, inode_row, space_root
from pgemu_kernels.engine.shareability import is_shared, is_uniform
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_DIRTY, PTE_LARGE, PTE_SOFT_DIRTY
from pgemu_kernels.gmem.levels import folio_order_at, most_level
from pgemu_kernels.gmem.zeroing import zero_folio
from pgemu_kernels.process.tables import level1_table, lookup_address, need_slot
from pgemu_kernels.tables.walker import host_format
from pgemu_kernels.words.enum_words import EVENT_LEAF_WRITTEN, FLAG_WRITE, GAUGE_HOST_LEAVES_4K
from pgemu_kernels.words.operations import VM_FAULT_NOPAGE, VM_FAULT_OOM
from pgemu_kernels.words.registers import R_HOST_HUGE
from pgemu_kernels.words.rows import (
    A_END,
    A_FLAGS,
    A_READ_ONLY,
    A_START,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_INDEX,
    O_INODE,
    O_PFN,
    O_ROW,
    O_SPACE,
    VM_COUNTED,
)
from pgemu_kernels.words.table_words import F_SPECIAL_4K, F_SPECIAL_4K_RO

host_huge = parameter(R_HOST_HUGE, U0)
NO_ACCESS = U1 << U32  # in O_FLAGS of a fault inside another operation: nobody accesses the page now


@kernel
def has_counted_view(m, row):
    """Whether a VMA has entries of folios though the design's are special."""
    return m.state[row + A_FLAGS] & VM_COUNTED != U0


counted_view = full_only(has_counted_view, False)


@kernel
def is_special(m, row):
    """Whether a VMA has special entries, without mapcount and reference."""
    return entries_are_special(m) and not counted_view(m, row)


@kernel
def marks_of(state, op):
    """What the processor sets in the entry of an access: accessed, and on a write dirty."""
    if state[op + O_FLAGS] & NO_ACCESS != U0:
        return U0
    return PTE_ACCESSED | PTE_DIRTY if state[op + O_FLAGS] & FLAG_WRITE != U0 else PTE_ACCESSED


@kernel
def page_slot(m, space, address):
    """Slot of the 4K entry of an address, tables allocated on the way; NONE without memory. get_locked_pte()"""
    page = address >> U12
    table, _ = level1_table(m, space_root(m.state, space), page)
    return need_slot(m, space, address, U1) if table == NONE else table + index_at(page, U1)


@kernel
def enter(m, op, slot, level):
    """Write the special entry of a host fault's frame at a slot that is empty. detail: its level.

    Of 4K it is clean, and the processor marks it; a large one is dirty after a write, insert_pmd() with the fault's
    `write` (as captured: 8..ae7, after a read 8..2a7).
    """
    state = m.state
    bits = F_SPECIAL_4K if state[state[op + O_ROW] + A_READ_ONLY] == U0 else F_SPECIAL_4K_RO
    entry = (state[op + O_PFN] & ~(pages_of(level) - U1)) << U12 | state[host_format(m) + bits] | marks_of(state, op)
    if level > U1:
        written = state[op + O_FLAGS] & FLAG_WRITE != U0
        entry |= PTE_LARGE | PTE_DIRTY | PTE_SOFT_DIRTY if written else PTE_LARGE
    m.ram[slot] = entry
    state[op + O_DETAIL] = level
    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, 1)
    charge_one(m, EVENT_LEAF_WRITTEN)


@kernel
def fits(m, op, level):
    """Whether an entry of `level` 2 or 3 may hold the fault's address.

    The whole block lies in the VMA, address and frame agree modulo its size, and all of its pages are shared: what
    vfio_pci_mmap_huge_fault() asks of address and frame, and what the slides ask of a host entry.
    """
    state = m.state
    row = state[op + O_ROW]
    inside = pages_of(level) - U1
    page = state[op + O_ADDRESS] >> U12
    if (page ^ state[op + O_PFN]) & inside != U0:
        return False
    first = (page & ~inside) << U12
    if first < state[row + A_START] or first + ((inside + U1) << U12) > state[row + A_END]:
        return False
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    return is_shared(m, node, index) != U0 and is_uniform(m, node, index, level)


@outlined
def host_level(m, op):
    """The largest level that a host fault's entry may have, its tables not looked at."""
    level = most_level(m, inode_row(m.state[op + O_INODE]), m.state[op + O_INDEX])
    while level > U1 and not fits(m, op, level):
        level -= U1
    return level


@outlined
def insert_large(m, op):
    """insert_pfn() of the largest entry that fits, or of a lower one where a table stands in the place.

    The pages that a large entry shows are zeroed first.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    level = host_level(m, op)
    while True:
        slot = need_slot(m, space, address, level)
        if slot == NONE:
            return np.int64(VM_FAULT_OOM)
        if m.ram[slot] == U0:
            break
        _, at = lookup_address(m, space_root(state, space), address)
        if at >= level:
            state[op + O_DETAIL] = at
            return np.int64(VM_FAULT_NOPAGE)
        level -= U1
    if level > U1:
        node = inode_row(state[op + O_INODE])
        index = state[op + O_INDEX]
        zero_folio(m, node, index, state[op + O_PFN], level, folio_order_at(m, block_row(m, node, index), index))
    enter(m, op, slot, level)
    return np.int64(VM_FAULT_NOPAGE)


large_inserted = full_only(insert_large, np.int64(VM_FAULT_NOPAGE))  # the fast loops know no large entries of processes


@kernel
def insert_pfn(m, op):
    """Enter a host fault's frame: VM_FAULT_NOPAGE or _OOM. mm/memory.c:vmf_insert_pfn(), no reference, no mapcount.

    detail: the entry's level. An entry that is there is left alone: insert_pfn(), insert_pmd(), insert_pud(), with
    write = false. The caller holds the invalidate_lock.
    """
    state = m.state
    if host_huge(m) != U0:
        return large_inserted(m, op)
    slot = page_slot(m, state[op + O_SPACE], state[op + O_ADDRESS])
    if slot == NONE:
        return np.int64(VM_FAULT_OOM)
    if m.ram[slot] == U0:
        enter(m, op, slot, U1)
    state[op + O_DETAIL] = U1
    return np.int64(VM_FAULT_NOPAGE)
