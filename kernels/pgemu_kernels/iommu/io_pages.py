"""struct iopt_pages: memory of a process or of a file that areas show, pinned once, however many show it.

drivers/iommu/iommufd/pages.c. A page is pinned while an area with a domain covers it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.folios.huge_pages import add_to_file, give_back_huge, take_huge
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.folios.pinning import pin_pages
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.gmem.gup import count_pinned, pin_run_of_any, unpin_run
from pgemu_kernels.process.close import release_inode
from pgemu_kernels.process.guest_memfd_4k import find_or_add_folio
from pgemu_kernels.process.tables import space_row
from pgemu_kernels.process.vma import RESERVED
from pgemu_kernels.words.enum_words import EVENT_PAGE_CACHE_STORED, FLAG_LONGTERM, FLAG_WRITE
from pgemu_kernels.words.operations import EINVAL, ENOMEM, ENOSPC
from pgemu_kernels.words.registers import R_INODES, R_IO_PAGES, R_IO_PAGES_MADE, R_IO_PINNED
from pgemu_kernels.words.rows import (
    I_CACHE,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    I_REFERENCES,
    INODE_GUEST_MEMFD,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    INODE_SHMEM,
    IP_AREAS,
    IP_INDEX,
    IP_OFFSET,
    IP_PAGES,
    IP_PROCESS,
    IP_REVOKED,
    IP_SHIFT,
    IP_SOURCE,
    IP_START,
    IP_WRITABLE,
    S_DEVICES,
    S_PINNED_VM,
)

U = np.uint64


@kernel
def pages_word(m, pages, word):
    """A word (IP_*) of a row of io_pages by its number."""
    return cache_find(m, m.state[R_IO_PAGES], pages << IP_SHIFT | word)


@kernel
def _set(m, pages, word, value):
    return cache_store(m, R_IO_PAGES, pages << IP_SHIFT | word, value)


@kernel
def revoke_pages(m, pages):
    """iopt_revoke_notify(): nothing of them is entered any more. The word has its place: a row is one node."""
    _set(m, pages, IP_REVOKED, U1)


@outlined
def hold_pages(m, pages, n):
    """`n` (uint64, two's complement to take away) areas more show them; they go with the last one.

    They hold their file, fget() of map_file: all but a guest_memfd of the designs, of whose maps nothing holds any.
    """
    before = pages_word(m, pages, IP_AREAS)
    areas = before + n
    _set(m, pages, IP_AREAS, areas)
    inode = pages_word(m, pages, IP_START)
    if pages_word(m, pages, IP_SOURCE) != U0 or m.state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
        inode = NONE
    process = pages_word(m, pages, IP_PROCESS)
    if process != U0 and (before == U0) != (areas == U0):  # mmgrab(), mmdrop()
        m.state[space_row(process - U1) + S_DEVICES] += U1 if before == U0 else U0 - U1
    if before == U0 and inode != NONE:
        m.state[inode_row(inode) + I_REFERENCES] += U1
    if areas == U0:
        if inode != NONE:
            release_inode(m, inode)
        for word in range(U1 << IP_SHIFT):
            _set(m, pages, word, U0)


@outlined
def make_pages(m, source, start, offset, count, writable, process):
    """iopt_alloc_user_pages(), iopt_alloc_file_pages(): 0 or -ENOMEM, and its number; no area shows them yet."""
    pages = m.state[R_IO_PAGES_MADE]
    m.state[R_IO_PAGES_MADE] = pages + U1
    failed = _set(m, pages, IP_SOURCE, source) != 0
    failed |= _set(m, pages, IP_START, start) != 0
    failed |= _set(m, pages, IP_OFFSET, offset) != 0
    failed |= _set(m, pages, IP_PAGES, count) != 0
    failed |= _set(m, pages, IP_WRITABLE, U1 if writable else U0) != 0
    failed |= _set(m, pages, IP_PROCESS, process) != 0
    if failed:
        for word in range(U1 << IP_SHIFT):
            _set(m, pages, word, U0)
        return np.int64(-ENOMEM), U0
    return np.int64(0), pages


@kernel
def is_mappable_file(state, inode):
    """mm/memfd.c: files of shmem and hugetlbfs; a guest_memfd is none."""
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return False
    node = inode_row(inode)
    if state[node + I_KIND] == INODE_HUGETLB:
        return True
    return state[node + I_KIND] == INODE_GUEST_MEMFD_4K and state[node + I_FLAGS] & INODE_SHMEM != U0


@outlined
def _file_page(m, inode, index, count):
    """memfd_pin_folios(): a file's page, allocated if it has none, pinned: status, frame, how many of `count` pages."""
    state = m.state
    node = inode_row(inode)
    if index >= state[node + I_PAGES]:
        return np.int64(-EINVAL), U0, U0
    if state[node + I_KIND] != INODE_HUGETLB:
        status, pfn = find_or_add_folio(m, node, index)
        if status == 0 and not pin_pages(m, pfn, U1):
            status = np.int64(-ENOMEM)
        return status, pfn, U1
    order = state[node + I_ORDER]
    word = cache_find(m, state[node + I_CACHE], index >> order)
    head = (word & PTE_ADDRESS) >> U12
    if head == U0:
        head = take_huge(m, order, word & RESERVED)
        if head == ~U0:
            return np.int64(-ENOSPC), U0, U0
        if cache_store(m, node + I_CACHE, index >> order, head << U12 | RESERVED) != 0:
            give_back_huge(m, head)
            return np.int64(-ENOMEM), U0, U0
        add_to_file(m, head, inode, index >> order << order, order)
        charge_one(m, EVENT_PAGE_CACHE_STORED)
    inside = index & ((U1 << order) - U1)
    n = min(count, (U1 << order) - inside)
    if not pin_pages(m, head + inside, n):
        return np.int64(-ENOMEM), U0, U0
    return np.int64(0), head + inside, n


@outlined
def _pin_more(m, pages, index, count):
    """Pin pages that are not yet, from `index` on: status, first frame, how many."""
    source = pages_word(m, pages, IP_SOURCE)
    if source == U0:
        inode = pages_word(m, pages, IP_START)
        status, pfn, n = _file_page(m, inode, pages_word(m, pages, IP_OFFSET) + index, count)
        if status == 0:
            count_pinned(m, np.int64(n))
        return status, pfn, n
    flags = FLAG_LONGTERM | (FLAG_WRITE if pages_word(m, pages, IP_WRITABLE) != U0 else U0)
    address = pages_word(m, pages, IP_START) + (index << U12)
    status, pfn, n = pin_run_of_any(m, source - U1, address, count, flags)
    return status, pfn, n


@kernel
def _account(m, pages, n):
    """do_update_pinned(): `n` pages more of the process are pinned: VmPin."""
    process = pages_word(m, pages, IP_PROCESS)
    if process != U0:
        m.state[space_row(process - U1) + S_PINNED_VM] += n


@kernel
def _at(pages, index):
    return pages << IP_INDEX | index


@outlined
def pin_io_pages(m, pages, index, count):
    """One area more needs pages from `index` on: (0 or -errno; first frame; how many that follow one another)."""
    word = cache_find(m, m.state[R_IO_PINNED], _at(pages, index))
    if word != U0:
        cache_store(m, R_IO_PINNED, _at(pages, index), word + U1)
        return np.int64(0), word >> U12, U1
    fresh = U1  # as far as none is pinned
    while fresh < count and cache_find(m, m.state[R_IO_PINNED], _at(pages, index + fresh)) == U0:
        fresh += U1
        if fresh == U(512):
            break
    status, pfn, n = _pin_more(m, pages, index, fresh)
    if status != 0:
        return status, U0, U0
    for i in range(n):
        if cache_store(m, R_IO_PINNED, _at(pages, index + i), (pfn + i) << U12 | U1) != 0:
            for k in range(i):
                cache_store(m, R_IO_PINNED, _at(pages, index + k), U0)
            _unpin(m, pfn, n, False)
            return np.int64(-ENOMEM), U0, U0
    _account(m, pages, n)
    return status, pfn, n


@outlined
def _unpin(m, pfn, n, dirty):
    for i in range(n):
        unpin_run(m, pfn + i, U1, dirty)
    count_pinned(m, -np.int64(n))


@outlined
def drop_run(m, pages, index, count):
    """One area less needs `count` pages from `index` on; those that none needs are unpinned."""
    dirty = pages_word(m, pages, IP_WRITABLE) != U0
    for i in range(index, index + count):
        word = cache_find(m, m.state[R_IO_PINNED], _at(pages, i))
        if word & U4095 > U1:
            cache_store(m, R_IO_PINNED, _at(pages, i), word - U1)
        elif word != U0:
            cache_store(m, R_IO_PINNED, _at(pages, i), U0)
            _unpin(m, word >> U12, U1, dirty)
            _account(m, pages, U0 - U1)
