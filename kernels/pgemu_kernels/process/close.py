"""The end of a mapping: its reservation, its file, its row. mm/vma.c:remove_vma(), hugetlb_vm_op_close()"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.charge import change, charge_one
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.folios.hstate import hstate_of_order
from pgemu_kernels.folios.huge_pages import remove_from_file
from pgemu_kernels.folios.page_cache import cache_find, cache_next, cache_store, charge_page_freed
from pgemu_kernels.folios.poison import free_unless_poisoned
from pgemu_kernels.folios.pools import reserve_pages, return_reserved
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.process.vma import RESERVED, holds_file, huge_order, is_shared_mapping, remove_row, unlink_vma
from pgemu_kernels.stage2.notifier import unbind_inode
from pgemu_kernels.stage2.release import release_unmapped
from pgemu_kernels.words.enum_words import EVENT_PAGE_CACHE_STORED, GAUGE_PAGE_CACHE_PAGES
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import R_PINNED_ALONE
from pgemu_kernels.words.rows import (
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_PGOFF,
    A_RESERVED,
    A_SPACE,
    A_START,
    I_CACHE,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_REFERENCES,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    PAGE_CACHED,
    PAGE_DIRTY,
    PAGE_HELD,
    PAGE_MAPPINGS,
    VM_RESERVATION_OWNER,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64


@outlined
def reserve(m, row):
    """hugetlb_reserve_pages(): what a mapping without MAP_NORESERVE may need is set aside. 0 or -ENOMEM.

    A shared mapping reserves pages of its file that nobody reserved yet, a private one its own.
    """
    state = m.state
    node = inode_row(state[row + A_INODE])
    order = state[node + I_ORDER]
    pages = (state[row + A_END] - state[row + A_START]) >> (U12 + order)
    h = hstate_of_order(order)
    if not is_shared_mapping(state, row):
        if reserve_pages(m, h, pages) != 0:
            return np.int64(-ENOMEM)
        state[row + A_RESERVED] = pages
        state[row + A_FLAGS] |= VM_RESERVATION_OWNER
        return np.int64(0)
    first = state[row + A_PGOFF] >> order
    missing = U0
    for index in range(first, first + pages):
        if cache_find(m, state[node + I_CACHE], index) & RESERVED == U0:
            missing += U1
    if reserve_pages(m, h, missing) != 0:
        return np.int64(-ENOMEM)
    for index in range(first, first + pages):
        word = cache_find(m, state[node + I_CACHE], index)
        if word & RESERVED == U0:
            if cache_store(m, node + I_CACHE, index, RESERVED) != 0:
                return_reserved(m, h, missing)
                return np.int64(-ENOMEM)
            missing -= U1
    return np.int64(0)


@outlined
def drop_page(m, inode, index, word):
    """Take one page out of a file's page cache and free it unless something maps it; `word` is its value there.

    Of a hugetlbfs file that is physical address and RESERVED, of a guest_memfd the frame number.
    """
    state = m.state
    node = inode_row(inode)
    cache_store(m, node + I_CACHE, index, U0)
    if state[node + I_KIND] == INODE_HUGETLB:
        charge_one(m, EVENT_PAGE_CACHE_STORED)
        remove_from_file(m, (word & PTE_ADDRESS) >> U12)
        return
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    change(m.stats, GAUGE_PAGE_CACHE_PAGES, -1)
    held = U(m.counts[word]) & ~(PAGE_CACHED | PAGE_DIRTY)
    m.counts[word] = np.uint32(held)
    if held & PAGE_HELD == U0:
        free_unless_poisoned(m, word, held)
        charge_page_freed(m)
    elif held & PAGE_MAPPINGS == U0:
        state[R_PINNED_ALONE] += U1


@outlined
def release_inode(m, inode):
    """One descriptor or mapping of a file less; with the last one the file and its pages go: evict_inode()."""
    state = m.state
    node = inode_row(inode)
    state[node + I_REFERENCES] -= U1
    if state[node + I_REFERENCES] != U0:
        return
    if state[node + I_KIND] == INODE_GUEST_MEMFD_4K:
        unbind_inode(m, inode)
    index = reserved = U0
    while state[node + I_CACHE] != U0:
        index = cache_next(m, state[node + I_CACHE], index)
        if index == NONE:
            break
        word = cache_find(m, state[node + I_CACHE], index)
        if state[node + I_KIND] == INODE_HUGETLB and word == RESERVED:
            cache_store(m, node + I_CACHE, index, U0)
            reserved += U1
        else:
            drop_page(m, inode, index, word)
    if reserved != U0:  # hugetlb_unreserve_pages()
        return_reserved(m, hstate_of_order(state[node + I_ORDER]), reserved)
    state[node + I_OPEN] = U0


@outlined
def _leave_file(m, row):
    """A VMA's reservation goes, and its hold on the file."""
    state = m.state
    if state[row + A_KIND] == VMA_GUEST_MEMFD:
        release_unmapped(m, state[row + A_SPACE], state[row + A_INODE])
    if state[row + A_KIND] == VMA_HUGETLB:
        return_reserved(m, hstate_of_order(huge_order(state, row)), state[row + A_RESERVED])
        state[row + A_RESERVED] = U0
    if holds_file(state, row):
        release_inode(m, state[row + A_INODE])


_close = full_only(_leave_file, None)  # a machine with closed files is none for the fast loops


@outlined
def close_vma(m, row):
    """vm_ops->close(): a VMA whose entries are gone leaves; its reservation and its hold on the file with it."""
    state = m.state
    if state[row + A_KIND] != VMA_ANONYMOUS:
        unlink_vma(state, row)
        _close(m, row)
    remove_row(state, row)
