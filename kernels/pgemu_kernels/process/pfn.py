"""VM_PFNMAP: entries to frames without struct pages, all at mmap or one at each fault.

mm/memory.c, mm/huge_memory.c.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U12
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.formats.bits import PTE_LARGE, PTE_SPECIAL
from pgemu_kernels.process.entries import mk_pte, vm_page_prot
from pgemu_kernels.process.tables import need_slot
from pgemu_kernels.process.vma import page_offset
from pgemu_kernels.words.enum_words import EVENT_LEAF_WRITTEN, GAUGE_HOST_LEAVES_4K
from pgemu_kernels.words.operations import ENOMEM, VM_FAULT_NOPAGE, VM_FAULT_OOM, VM_FAULT_SIGBUS
from pgemu_kernels.words.rows import A_END, A_INODE, A_SPACE, A_START, I_BASE, I_FLAGS, I_PAGES, INODE_REVOKED

U = np.uint64


@kernel
def _set_pfn(m, row, slot, level, pfn):
    """insert_pfn(), insert_pmd(), insert_pud() with write = false: special, not dirty, whatever the access."""
    entry = mk_pte(pfn, vm_page_prot(m.state, row) | PTE_SPECIAL)
    if level > U1:
        entry |= PTE_LARGE
    m.ram[slot] = entry
    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, 1)


@kernel
def _fits(state, row, address, pfn, level):
    """Whether a page of a level may hold an address: the whole page in the VMA, its frame aligned.

    drivers/vfio/pci/vfio_pci_core.c:vfio_pci_mmap_huge_fault(); address and pfn are those of the 4K page.
    """
    size = size_of(level)
    first = address & ~(size - U1)
    inside = (address - first) >> U12
    if first < state[row + A_START] or first + size > state[row + A_END] or pfn < inside:
        return False
    return (pfn - inside) & ((size >> U12) - U1) == U0


@outlined
def pfn_fault(m, row, address):
    """A fault in a mapping of a device: VM_FAULT_NOPAGE, SIGBUS while its memory is off, OOM.

    The largest page that address, frame and the mapping's ends allow, where no table stands in its place.
    """
    state = m.state
    node = inode_row(state[row + A_INODE])
    index = page_offset(state, row, address)
    pfn = state[node + I_BASE] + index
    alive = index < state[node + I_PAGES] and state[node + I_FLAGS] & INODE_REVOKED == U0
    level = U3
    while True:
        if level == U1 and not alive:
            return np.int64(VM_FAULT_SIGBUS)
        slot = need_slot(m, state[row + A_SPACE], address, level)
        if slot == NONE:
            return np.int64(VM_FAULT_OOM)
        if m.ram[slot] == U0 and _fits(state, row, address, pfn, level):
            if not alive:
                return np.int64(VM_FAULT_SIGBUS)
            inside = (size_of(level) >> U12) - U1
            _set_pfn(m, row, slot, level, pfn & ~inside)
            charge_one(m, EVENT_LEAF_WRITTEN)
            return np.int64(VM_FAULT_NOPAGE)
        if level == U1:
            return np.int64(VM_FAULT_NOPAGE)
        level -= U1


@outlined
def remap_pfn_range(m, row):
    """Enter all frames of a new VMA, 4K each: 0 or -ENOMEM with what was entered so far."""
    state = m.state
    address = state[row + A_START]
    base = state[inode_row(state[row + A_INODE]) + I_BASE]
    entered = np.int64(0)
    status = np.int64(0)
    while address < state[row + A_END]:
        slot = need_slot(m, state[row + A_SPACE], address, U1)
        if slot == NONE:
            status = np.int64(-ENOMEM)
            break
        _set_pfn(m, row, slot, U1, base + page_offset(state, row, address))
        entered += 1
        address += U(4096)
    charge(m, EVENT_LEAF_WRITTEN, entered)
    return status
