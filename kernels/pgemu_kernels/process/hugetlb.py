"""HugeTLB memory of a process, shared and private: faults, copy on write, shared level-2 tables. mm/hugetlb.c."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U12, U30
from pgemu_kernels.engine.charge import change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import inode_row, space_root, vma_row
from pgemu_kernels.folios.huge_pages import (
    add_to_file,
    copy_huge,
    give_back_huge,
    huge_mapcount,
    is_anonymous,
    is_exclusive,
    level_of_order,
    map_huge,
    move_anonymous,
    set_anonymous,
    take_huge,
    unmap_huge,
)
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.folios.poison import is_folio_poisoned
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_WRITE
from pgemu_kernels.process.anonymous import UNSHARE
from pgemu_kernels.process.entries import is_hwpoison, mk_pte, pte_mkdirty, pte_pfn, vm_page_prot
from pgemu_kernels.process.tables import level3_slot, lookup_address, need_slot
from pgemu_kernels.process.vma import RESERVED, huge_order, is_shared_mapping, page_offset, prepare_anon_vma
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_WRITTEN,
    EVENT_PAGE_CACHE_STORED,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_HOST_LEAVES_4K,
)
from pgemu_kernels.words.operations import VM_FAULT_HWPOISON_LARGE, VM_FAULT_NOPAGE, VM_FAULT_OOM, VM_FAULT_SIGBUS
from pgemu_kernels.words.registers import R_VIRTUAL_INDEX, R_VMAS
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_PGOFF,
    A_PROT,
    A_RESERVED,
    A_SPACE,
    A_START,
    I_CACHE,
    I_PAGES,
    PROT_WRITE,
    VM_LOCKED,
    VMA_HUGETLB,
)

U = np.uint64


# --------------------------------------------------------------------------- tables


@kernel
def _covers_region(state, row, address):
    """Whether a VMA covers the whole aligned 1G around an address, so that its table may be shared."""
    region = address >> U30 << U30
    return region >= state[row + A_START] and region + size_of(U3) <= state[row + A_END]


@outlined
def _table_to_share(m, row, address):
    """The level-3 entry of another mapping of the same pages, in the same place of an aligned 1G; 0 if there is none.

    mm/hugetlb.c:huge_pmd_share(), page_table_shareable().
    """
    state = m.state
    page = page_offset(state, row, address >> U30 << U30)
    for i in range(state[R_VMAS]):
        other = vma_row(i)
        if other == row or state[other + A_LIVE] == U0 or state[other + A_KIND] != VMA_HUGETLB:
            continue
        if state[other + A_INODE] != state[row + A_INODE] or state[other + A_PROT] != state[row + A_PROT]:
            continue
        if (state[other + A_FLAGS] ^ state[row + A_FLAGS]) & ~VM_LOCKED != U0 or page < state[other + A_PGOFF]:
            continue
        there = state[other + A_START] + ((page - state[other + A_PGOFF]) << U12)
        if there & (size_of(U3) - U1) != U0 or there + size_of(U3) > state[other + A_END]:
            continue
        root = space_root(state, state[other + A_SPACE])
        _slot, level = lookup_address(m, root, there)
        if level <= U2:
            return m.ram[level3_slot(m, root, there)]
    return U0


@outlined
def huge_slot(m, row, address):
    """huge_pte_alloc(): the slot for a huge page of a VMA, in a table that other processes may share; NONE."""
    state = m.state
    space = state[row + A_SPACE]
    level = level_of_order(huge_order(state, row))
    if level == U2 and is_shared_mapping(state, row) and _covers_region(state, row, address):
        slot = need_slot(m, space, address, U3)
        if slot == NONE:
            return NONE
        if m.ram[slot] == U0:
            entry = _table_to_share(m, row, address)
            if entry != U0:
                frame = (entry & PTE_ADDRESS) >> U12
                m.counts[frame] = np.uint32(U(m.counts[frame]) + U1)
                m.ram[slot] = entry
    return need_slot(m, space, address, level)


# --------------------------------------------------------------------------- faults


@kernel
def new_entry(state, row, head, writable):
    """make_huge_pte(): a writable entry is dirty from the start."""
    entry = mk_pte(head, vm_page_prot(state, row) | PTE_LARGE)
    if writable:
        return pte_mkdirty(entry) | PTE_WRITE  # huge_pte_mkwrite() leaves the saved dirty bit where it is
    return entry & ~PTE_WRITE


@kernel
def _set_huge(m, row, slot, entry):
    level = level_of_order(huge_order(m.state, row))
    m.ram[slot] = entry
    change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, 1)
    charge_one(m, EVENT_LEAF_WRITTEN)


@kernel
def _take_for(m, row, order, word):
    """A page for a VMA, from what it or its file has reserved if anything; NONE."""
    state = m.state
    if is_shared_mapping(state, row):
        return take_huge(m, order, word & RESERVED)
    mine = U1 if state[row + A_RESERVED] != U0 else U0
    head = take_huge(m, order, mine)
    if head != NONE:
        state[row + A_RESERVED] -= mine
    return head


@kernel
def vma_index(state, row, address):
    """linear_page_index() of a private mapping, 4K pages: of the file, in 7.3 of the address space (captured)."""
    return address >> U12 if state[R_VIRTUAL_INDEX] != U0 else page_offset(state, row, address)


@outlined
def _first_access(m, row, address, slot):
    """hugetlb_no_page(): the file's page if it has one, else a new one, the file's or this mapping's own."""
    state = m.state
    order = huge_order(state, row)
    inode = state[row + A_INODE]
    node = inode_row(inode)
    page = page_offset(state, row, address)
    if page >= state[node + I_PAGES]:
        return np.int64(VM_FAULT_SIGBUS)
    index = page >> order
    word = cache_find(m, state[node + I_CACHE], index)
    head = (word & PTE_ADDRESS) >> U12
    if head != U0 and is_folio_poisoned(m, head):
        return np.int64(VM_FAULT_HWPOISON_LARGE)
    if head == U0:
        if not is_shared_mapping(state, row):
            prepare_anon_vma(state, row)
        head = _take_for(m, row, order, word)
        if head == NONE:
            return np.int64(VM_FAULT_SIGBUS)
        if is_shared_mapping(state, row):
            if cache_store(m, node + I_CACHE, index, head << U12 | RESERVED) != 0:
                give_back_huge(m, head)
                return np.int64(VM_FAULT_OOM)
            add_to_file(m, head, inode, index << order, order)
            charge_one(m, EVENT_PAGE_CACHE_STORED)
        else:
            set_anonymous(m, head, state[row + A_ANON_VMA], vma_index(state, row, address))
    map_huge(m, head)
    writable = is_shared_mapping(state, row) and state[row + A_PROT] & PROT_WRITE != U0
    _set_huge(m, row, slot, new_entry(state, row, head, writable))
    return np.int64(VM_FAULT_NOPAGE)


@outlined
def _write_protected(m, row, address, slot, unshare):
    """hugetlb_wp(): make a page writable that is this mapping's alone or shared on purpose, copy any other.

    Without a page left the fault ends in SIGBUS. Linux would first take the page from the children of the
    process that reserved it (unmap_ref_private()); that is not modelled.
    """
    state = m.state
    entry = m.ram[slot]
    old = pte_pfn(entry)
    if is_shared_mapping(state, row) or (is_anonymous(m, old) and huge_mapcount(m, old) == U1):
        if not is_shared_mapping(state, row) and not is_exclusive(m, old):
            move_anonymous(m, old, state[row + A_ANON_VMA])
        if unshare:
            return np.int64(VM_FAULT_NOPAGE)
        m.ram[slot] = pte_mkdirty(entry) | PTE_WRITE
        charge_one(m, EVENT_LEAF_WRITTEN)
        return np.int64(VM_FAULT_NOPAGE)
    order = huge_order(state, row)
    prepare_anon_vma(state, row)
    head = _take_for(m, row, order, U0)
    if head == NONE:
        return np.int64(VM_FAULT_SIGBUS)
    if copy_huge(m, head, old, order) != 0:
        give_back_huge(m, head)
        return np.int64(VM_FAULT_OOM)
    size = size_of(level_of_order(order))
    notify_range(m, state[row + A_SPACE], address, address + size)
    set_anonymous(m, head, state[row + A_ANON_VMA], vma_index(state, row, address))
    map_huge(m, head)
    m.ram[slot] = new_entry(state, row, head, not unshare)
    unmap_huge(m, old, U0)
    charge_one(m, EVENT_LEAF_WRITTEN)
    charge_one(m, EVENT_TLB_FLUSH_MM)
    charge_one(m, EVENT_TLB_FLUSH_PAGE)
    return np.int64(VM_FAULT_NOPAGE)


@outlined
def hugetlb_fault(m, row, address, write):
    """A fault in HugeTLB memory: VM_FAULT_NOPAGE, SIGBUS without a page or past the file's end, OOM, HWPOISON_LARGE.

    That names the hstate, too (VM_FAULT_SET_HINDEX()), which is left out here."""
    size = size_of(level_of_order(huge_order(m.state, row)))
    address = address & ~(size - U1)
    slot = huge_slot(m, row, address)
    if slot == NONE:
        return np.int64(VM_FAULT_OOM)
    status = np.int64(VM_FAULT_NOPAGE)
    if m.ram[slot] == U0:
        status = _first_access(m, row, address, slot)
    elif is_hwpoison(m.state, m.ram[slot]):
        return np.int64(VM_FAULT_HWPOISON_LARGE)
    if status == VM_FAULT_NOPAGE and write != U0 and m.ram[slot] & PTE_WRITE == U0:
        status = _write_protected(m, row, address, slot, write == UNSHARE)
    return status
