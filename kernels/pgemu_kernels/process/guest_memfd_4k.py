"""guest_memfd as merged, and shmem: a page cache of 4K folios, whose frames are ordinary ones, and its faults."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2
from pgemu_kernels.engine.charge import change, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import fill_frame, put_frame, take_frame
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.folios.page_cache import cache_find, cache_store, charge_added
from pgemu_kernels.formats.bits import PTE_WRITE
from pgemu_kernels.process.anonymous import set_pte_at
from pgemu_kernels.process.close import drop_page
from pgemu_kernels.process.entries import mk_pte, pte_mkdirty, vm_page_prot
from pgemu_kernels.process.tables import marker_fault, need_slot, space_row
from pgemu_kernels.process.vma import page_offset
from pgemu_kernels.words.enum_words import EVENT_PAGE_ZEROED, EVENT_RMAP_CHANGED, GAUGE_PAGE_CACHE_PAGES
from pgemu_kernels.words.operations import (
    EFAULT,
    ENOMEM,
    VM_FAULT_HWPOISON,
    VM_FAULT_LOCKED,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
)
from pgemu_kernels.words.registers import R_DIRTY_ENTRIES
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_SPACE,
    A_START,
    I_CACHE,
    I_FLAGS,
    I_PAGES,
    I_REFERENCES,
    INODE_INIT_SHARED,
    INODE_SHMEM,
    PAGE_CACHED,
    PAGE_DIRTY,
    PAGE_POISONED,
    S_RSS,
)

U = np.uint64
_AROUND = U(64 << 10)


@outlined
def find_or_add_folio(m, node, index):
    """virt/kvm/guest_memfd.c:kvm_gmem_get_folio(): (0, -EFAULT past the end, -ENOMEM; pfn), zeroed at its first use."""
    state = m.state
    if state[node + I_REFERENCES] == U0 or index >= state[node + I_PAGES]:
        return np.int64(-EFAULT), U0
    pfn = cache_find(m, state[node + I_CACHE], index)
    if pfn != U0:
        return np.int64(0), pfn
    pfn = take_frame(m)
    if pfn == NONE:
        return np.int64(-ENOMEM), U0
    if cache_store(m, node + I_CACHE, index, pfn) != 0:
        put_frame(m, pfn)
        return np.int64(-ENOMEM), U0
    fill_frame(m.ram, pfn, U0)
    m.counts[pfn] = np.uint32(PAGE_CACHED)
    change(m.stats, GAUGE_PAGE_CACHE_PAGES, 1)
    charge_added(m)
    charge_one(m, EVENT_PAGE_ZEROED)
    return np.int64(0), pfn


@kernel
def set_folio_dirty(m, pfn):
    """folio_mark_dirty() of a page of guest_memfd; nothing for other ordinary frames."""
    word = U(m.counts[pfn])
    if word & PAGE_CACHED != U0:
        m.counts[pfn] = np.uint32(word | PAGE_DIRTY)


@kernel
def map_file_page(m, space, slot, entry):
    """mm/memory.c:finish_fault(), set_pte_range(): a file's folio is mapped at an empty slot by a 4K entry.

    It is one page more of the process's RssFile: add_mm_counter(mm_counter_file()), which special entries have not.
    The folio's own mapcount is where its memory has it: the caller's.
    """
    set_pte_at(m, slot, entry)
    m.state[space_row(space) + S_RSS] += U1
    charge_one(m, EVENT_RMAP_CHANGED)


@kernel
def _entry_of(m, row, pfn, write):
    """set_pte_range(): the entry of a file's folio, dirty after a write, and where the folio is dirty already."""
    entry = mk_pte(pfn, vm_page_prot(m.state, row))
    dirty = entry & PTE_WRITE != U0 and U(m.counts[pfn]) & PAGE_DIRTY != U0
    dirty &= write == U1 or m.state[R_DIRTY_ENTRIES] != U0
    return pte_mkdirty(entry) if dirty else entry


@outlined
def fault_around(m, row, address):
    """do_fault_around(): a read fault maps what the page cache has of the 16 pages around, in the VMA and under one
    last-level table. 0, VM_FAULT_OOM, or VM_FAULT_NOPAGE where the page itself was among it.

    mm/memory.c, mm/filemap.c:filemap_map_pages(); fault_around_bytes is 64K unless somebody changes it.
    """
    state = m.state
    space = state[row + A_SPACE]
    node = inode_row(state[row + A_INODE])
    begin = max(address & ~(_AROUND - U1), state[row + A_START])
    end = min(min(begin + _AROUND, state[row + A_END]), (address & ~(size_of(U2) - U1)) + size_of(U2))
    found = np.int64(0)
    while begin < end:
        index = page_offset(state, row, begin)
        pfn = cache_find(m, state[node + I_CACHE], index) if index < state[node + I_PAGES] else U0
        if pfn != U0 and U(m.counts[pfn]) & PAGE_POISONED == U0:
            slot = need_slot(m, space, begin, U1)
            if slot == NONE:
                return np.int64(VM_FAULT_OOM)
            if m.ram[slot] == U0:
                m.counts[pfn] = np.uint32(U(m.counts[pfn]) + U1)
                map_file_page(m, space, slot, _entry_of(m, row, pfn, U0))
            if begin == address:
                found = np.int64(VM_FAULT_NOPAGE)
        begin += U(4096)
    return found


@outlined
def guest_memfd_fault(m, row, address, write):
    """kvm_gmem_fault_user_mapping(): VM_FAULT_LOCKED, SIGBUS past the end or where memory starts out private, OOM;
    SIGSEGV at a guard page, HWPOISON of a poisoned page (mm/memory.c:__do_fault(), shmem_fault()) or at its entry.

    The entry is dirty after a write, or where the folio is dirty already: set_pte_range(). A fault that fails leaves no
    last-level table behind: Linux links the one it has ready at the very end.
    """
    state = m.state
    space = state[row + A_SPACE]
    inode = state[row + A_INODE]
    node = inode_row(inode)
    index = page_offset(state, row, address)
    if need_slot(m, space, address, U2) == NONE:
        return np.int64(VM_FAULT_OOM)
    marker = marker_fault(m, space, address)
    if marker != 0:
        return marker
    if index >= state[node + I_PAGES] or state[node + I_FLAGS] & INODE_INIT_SHARED == U0:
        return np.int64(VM_FAULT_SIGBUS)
    if state[node + I_FLAGS] & INODE_SHMEM != U0 and write == U0:
        around = fault_around(m, row, address)
        if around != 0:
            return around
    known = cache_find(m, state[node + I_CACHE], index) != U0
    status, pfn = find_or_add_folio(m, node, index)
    if status != 0:
        return np.int64(VM_FAULT_OOM)
    if U(m.counts[pfn]) & PAGE_POISONED != U0:
        return np.int64(VM_FAULT_HWPOISON)
    slot = need_slot(m, space, address, U1)
    if slot == NONE:
        if not known:
            drop_page(m, inode, index, pfn)  # Linux would not have come to allocate it
        return np.int64(VM_FAULT_OOM)
    word = U(m.counts[pfn]) | (PAGE_DIRTY if write == U1 else U0)  # fault_dirty_shared_page()
    m.counts[pfn] = np.uint32(word + U1)
    map_file_page(m, space, slot, _entry_of(m, row, pfn, write))
    return np.int64(VM_FAULT_LOCKED)
