"""pfnmap: entries of 2M and 1G in a process, where all of the block is shared (Config.host_huge).

vmf_insert_pfn_pmd() and _pud() from a huge_fault handler, as drivers/vfio/pci/vfio_pci_core.c has one; no guest_memfd
code does that (inference). mm/huge_memory.c
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9, U12
from pgemu_kernels.engine.charge import HOST_LEAVES, LEAF_WRITTEN, change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, space_root
from pgemu_kernels.engine.shareability import is_shared, is_uniform
from pgemu_kernels.formats.bits import LARGE
from pgemu_kernels.gmem.zeroing import zero_huge
from pgemu_kernels.process.tables import lookup, need_slot
from pgemu_kernels.tables.walker import host_format
from pgemu_kernels.words.operations import VM_FAULT_NOPAGE, VM_FAULT_OOM
from pgemu_kernels.words.registers import R_HOST_HUGE, R_ORDER
from pgemu_kernels.words.rows import (
    A_END,
    A_READ_ONLY,
    A_START,
    O_ADDRESS,
    O_DETAIL,
    O_INDEX,
    O_INODE,
    O_PFN,
    O_ROW,
    O_SPACE,
)
from pgemu_kernels.words.table_words import F_SPECIAL_4K, F_SPECIAL_4K_RO

U = np.uint64
_LARGE = U(LARGE)


@kernel
def pages_of(level):
    return U1 << (U9 * (level - U1))


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
    """The largest level that a host fault's entry may have, its tables not looked at: 1 without Config.host_huge."""
    state = m.state
    if state[R_HOST_HUGE] == U0 or state[R_ORDER] < U9:
        return U1
    level = U3 if state[R_ORDER] > U9 else U2
    while level > U1 and not fits(m, op, level):
        level -= U1
    return level


@outlined
def insert(m, op, level):
    """Enter a host fault's frame at `level`, or below where a table stands in the place: VM_FAULT_NOPAGE or _OOM.

    detail: the entry's level. An entry that is there is left alone: insert_pfn(), insert_pmd(), insert_pud(), with
    write = false. The pages that a large entry shows are zeroed first. The caller holds the invalidate_lock.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    while True:
        slot = need_slot(m, space, address, level)
        if slot == NONE:
            return np.int64(VM_FAULT_OOM)
        if level == U1 or m.ram[slot] == U0:
            break
        _, at = lookup(m, _root(m, op), address)
        if at >= level:
            break  # a large entry is there
        level -= U1
    if m.ram[slot] != U0:
        _, state[op + O_DETAIL] = lookup(m, _root(m, op), address)
        return np.int64(VM_FAULT_NOPAGE)
    inside = pages_of(level) - U1
    if level > U1:
        zero_huge(m, inode_row(state[op + O_INODE]), state[op + O_INDEX], state[op + O_PFN], level)
    m.ram[slot] = _entry(m, op, level, state[op + O_PFN] & ~inside)
    state[op + O_DETAIL] = level
    change_value(m.stats, HOST_LEAVES + level - U1, 1)
    charge_one(m, LEAF_WRITTEN)
    return np.int64(VM_FAULT_NOPAGE)


@kernel
def _root(m, op):
    """Physical address of the top table of the record's process."""
    return space_root(m.state, m.state[op + O_SPACE])


@kernel
def _entry(m, op, level, pfn):
    """The special entry of a frame: of a large one bit 7 is set."""
    state = m.state
    bits = F_SPECIAL_4K if state[state[op + O_ROW] + A_READ_ONLY] == U0 else F_SPECIAL_4K_RO
    entry = pfn << U12 | state[host_format(m) + bits]
    return entry | _LARGE if level > U1 else entry
