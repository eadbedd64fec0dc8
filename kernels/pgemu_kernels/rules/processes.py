"""The recount's part of processes: their tables, whose page each leaf is, page caches, HugeTLB pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12, U18, U32, U511, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, size_of
from pgemu_kernels.engine.rows import broken, find_vma, inode_row, space_root, vma_row
from pgemu_kernels.folios.anonymous_folios import (
    compound_head,
    is_large_anonymous,
    is_of_anonymous_folio,
    is_page_exclusive,
)
from pgemu_kernels.folios.folio import COUNTS, INDEX, MAPPING, struct_page
from pgemu_kernels.folios.guest_folios import subpool_row
from pgemu_kernels.folios.hstate import hstate_of_order, order_of_hstate
from pgemu_kernels.folios.huge_pages import huge_mapcount, level_of_order
from pgemu_kernels.folios.hugetlb import mapping_address
from pgemu_kernels.folios.page_cache import cache_find, cache_next
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.entries import holds_page, leaf_pfn, points_to_table, pte_pfn
from pgemu_kernels.process.tables import below, space_row
from pgemu_kernels.process.vma import RESERVED, huge_order, page_offset
from pgemu_kernels.rules.anonymous_folios import check_anonymous_folios
from pgemu_kernels.rules.invariants import check_host_leaf, expect, expect_gauge
from pgemu_kernels.rules.pools import check_pools
from pgemu_kernels.words.enum_words import (
    BROKEN_COUNTS,
    BROKEN_FRAMES,
    BROKEN_POISON_MAPPED,
    BROKEN_REFERENCES,
    BROKEN_WRONG_PFN,
    GAUGE_ANONYMOUS_PAGES,
    GAUGE_CACHE_NODES,
    GAUGE_HOST_LEAVES_4K,
    GAUGE_PAGE_CACHE_PAGES,
)
from pgemu_kernels.words.registers import (
    R_FRAMES,
    R_HUGE_ZERO_FRAME,
    R_INODES,
    R_POISONED_FRAMES,
    R_SUBPOOLS,
    R_VMAS,
    R_ZERO_FRAME,
)
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_RESERVED,
    FOUND_ANONYMOUS,
    FOUND_CACHED,
    FOUND_HUGE_ANONYMOUS,
    FOUND_HUGE_MAPPED,
    FOUND_LARGE_MAPPED,
    FOUND_MAPCOUNTS,
    FOUND_MAPPED,
    FOUND_NODES,
    FOUND_RESERVED,
    FOUND_RESERVED_1G,
    FOUND_RSS,
    FOUND_TABLES,
    H_RESERVED,
    I_BASE,
    I_CACHE,
    I_KIND,
    I_ORDER,
    I_REFERENCES,
    INODE_GUEST_MEMFD,
    INODE_GUEST_MEMFD_4K,
    INODE_HUGETLB,
    P_HSTATE,
    P_RESERVED,
    PAGE_CACHED,
    PAGE_DIRTY,
    PAGE_EXCLUSIVE,
    PAGE_MAPPINGS,
    PAGE_PINNED,
    PAGE_POISONED,
    S_DEPOSITED,
    S_RSS,
    S_USER_ROOT,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_GUEST_MEMFD_4K,
    VMA_HUGETLB,
)

U = np.uint64
_HEIGHT = U(7)
_TABLE = np.uint8(1)
_PAGE = np.uint8(7)
_NODE = np.uint8(8)


# --------------------------------------------------------------------------- leaves


@kernel
def _check_page(m, row, address, entry, owner, found):
    """A 4K entry of anonymous memory or of a guest_memfd of 4K folios."""
    kind = m.state[row + A_KIND]
    frame = pte_pfn(entry)
    if entry & PTE_SPECIAL != U0:
        expect(m, kind == VMA_ANONYMOUS and frame == m.state[R_ZERO_FRAME], BROKEN_WRONG_PFN, address >> U12)
        expect(m, entry & PTE_WRITE == U0, BROKEN_WRONG_PFN, address >> U12)
        return
    word = U(m.counts[frame])
    expect(m, word & PAGE_POISONED == U0, BROKEN_POISON_MAPPED, address >> U12)
    found[FOUND_MAPPED] += 1
    found[FOUND_RSS] += 1
    if owner[frame] == np.uint8(0):
        owner[frame] = _PAGE
        found[FOUND_MAPCOUNTS] += np.int64(word & PAGE_MAPPINGS)
        found[FOUND_ANONYMOUS] += np.int64(word & PAGE_CACHED == U0)
    expect(m, owner[frame] == _PAGE, BROKEN_FRAMES, frame)
    expect(m, word & PAGE_EXCLUSIVE == U0 or word & PAGE_MAPPINGS == U1, BROKEN_COUNTS, frame)
    expect(m, (word & PAGE_CACHED != U0) == (kind == VMA_GUEST_MEMFD_4K), BROKEN_COUNTS, frame)
    if kind == VMA_ANONYMOUS:
        writable = entry & PTE_PRESENT != U0 and entry & PTE_WRITE != U0
        expect(m, not writable or word & PAGE_EXCLUSIVE != U0, BROKEN_WRONG_PFN, address >> U12)
    else:
        node = inode_row(m.state[row + A_INODE])
        cached = cache_find(m, m.state[node + I_CACHE], page_offset(m.state, row, address))
        expect(m, cached == frame, BROKEN_WRONG_PFN, address >> U12)


@kernel
def _check_huge(m, row, address, level, entry, found):
    """An entry of a HugeTLB mapping: a whole page of its size, its file's if it is shared."""
    state = m.state
    order = huge_order(state, row)
    head = pte_pfn(entry)
    found[FOUND_HUGE_MAPPED] += 1
    expect(m, level == level_of_order(order) and head & ((U1 << order) - U1) == U0, BROKEN_WRONG_PFN, address >> U12)
    if state[row + A_FLAGS] & VM_SHARED != U0:
        node = inode_row(state[row + A_INODE])
        word = cache_find(m, state[node + I_CACHE], page_offset(state, row, address) >> order)
        expect(m, (word & PTE_ADDRESS) >> U12 == head, BROKEN_WRONG_PFN, address >> U12)


@kernel
def _is_in_place(m, row, address, pfn):
    """Whether a page of a large folio is the one that its index says for an address: linear_page_index()."""
    head = compound_head(m, pfn)
    index = m.ram[struct_page(m, head) + INDEX] + (pfn - head)
    return index == page_offset(m.state, row, address)


@outlined
def _check_large(m, row, address, level, entry, found):
    """An entry of 2M, or of 4K of a large folio, of anonymous memory; the huge zero page is nobody's to write."""
    pfn = leaf_pfn(entry, level)
    writable = entry & PTE_PRESENT != U0 and entry & PTE_WRITE != U0
    if level == U2:
        found[FOUND_HUGE_ANONYMOUS] += 1
        expect(m, pfn & U511 == U0, BROKEN_WRONG_PFN, address >> U12)
    if level == U2 and pfn == m.state[R_HUGE_ZERO_FRAME]:
        expect(m, not writable, BROKEN_WRONG_PFN, address >> U12)
        return
    if not is_large_anonymous(m.state, pfn) or not is_of_anonymous_folio(m, pfn):
        broken(m.state, BROKEN_WRONG_PFN, address >> U12)
        return
    found[FOUND_LARGE_MAPPED] += 1
    found[FOUND_RSS] += np.int64(U512 if level == U2 else U1)
    expect(m, _is_in_place(m, row, address, pfn), BROKEN_WRONG_PFN, address >> U12)
    expect(m, not writable or is_page_exclusive(m, pfn), BROKEN_WRONG_PFN, address >> U12)


@outlined
def _check_leaf(m, space, address, level, entry, owner, found):
    """One entry that is neither empty nor a table."""
    state = m.state
    if not holds_page(entry):
        return  # a marker
    found[level - U1] += 1
    row = find_vma(state, space, address)
    if row == NONE:
        broken(state, BROKEN_WRONG_PFN, address >> U12)
        return
    kind = state[row + A_KIND]
    if kind == VMA_GUEST_MEMFD:
        check_host_leaf(m, row, address, level, entry)
        found[FOUND_RSS] += np.int64(entry & PTE_SPECIAL == U0)
    elif kind == VMA_HUGETLB:
        _check_huge(m, row, address, level, entry, found)
    elif state[row + A_FLAGS] & VM_PFNMAP != U0:
        pfn = state[inode_row(state[row + A_INODE]) + I_BASE] + page_offset(state, row, address)
        expect(m, leaf_pfn(entry, level) == pfn and entry & PTE_SPECIAL != U0, BROKEN_WRONG_PFN, address >> U12)
    elif kind == VMA_ANONYMOUS and (level != U1 or is_large_anonymous(state, pte_pfn(entry))):
        _check_large(m, row, address, level, entry, found)
    else:
        _check_page(m, row, address, entry, owner, found)


# --------------------------------------------------------------------------- tables


@kernel
def _own_table(m, owner, slot, found):
    """Mark a table: False if it is one that processes share and it was seen before."""
    frame = (m.ram[slot] & PTE_ADDRESS) >> U12
    if owner[frame] == _TABLE and m.counts[frame] != np.uint32(0):
        return False
    expect(m, owner[frame] == np.uint8(0), BROKEN_FRAMES, frame)
    owner[frame] = _TABLE
    found[FOUND_TABLES] += 1
    return True


@kernel
def _no_table(m, space, table, base, owner, found):
    """Below level 1."""


@kernel
def _check_deposited(m, space, owner, found):
    """The tables kept for splits: empty ones, as many as 2M leaves of anonymous memory were found of the process."""
    kept = np.int64(0)
    frame = m.state[space_row(space) + S_DEPOSITED]
    while frame != U0 and owner[frame] == np.uint8(0):
        owner[frame] = _TABLE
        found[FOUND_TABLES] += 1
        kept += 1
        empty = True
        for i in range(U512):
            empty = empty and m.ram[(frame << U9) + i] == U0
        expect(m, empty, BROKEN_FRAMES, frame)
        frame = U(m.counts[frame])
    expect(m, frame == U0 and kept == found[FOUND_HUGE_ANONYMOUS], BROKEN_COUNTS, space)


def recount_of_process(check_leaf: Callable[..., Any]) -> Callable[..., Any]:
    """A walk (m, space, owner, found) of a process's tables that checks each entry which is neither empty nor a table.

    Leaves, tables and mapped pages are added to `found` (int64[FOUND_WORDS]).
    """

    def of_level(lower: Callable[..., Any], level: np.uint64) -> Callable[..., Any]:
        @outlined
        def walk_table(m, space, table, base, owner, found):
            """The leaves of a table of a level, by its first word, and (`lower`) of the tables below it."""
            for i in range(U512):
                slot = table + i
                entry = m.ram[slot]
                address = base + i * size_of(level)
                if level > U1 and points_to_table(entry):
                    if _own_table(m, owner, slot, found):
                        lower(m, space, below(m, slot), address, owner, found)
                elif entry != U0 and level < U4:
                    check_leaf(m, space, address, level, entry, owner, found)

        return walk_table

    walk_tables = reduce(of_level, (U1, U2, U3, U4), _no_table)

    @outlined
    def walk_process(m, space, owner, found):
        state = m.state
        root = space_root(state, space)
        if root == U0:
            return
        for frame in (root >> U12, state[space_row(space) + S_USER_ROOT] >> U12):
            if frame != U0:
                expect(m, owner[frame] == np.uint8(0), BROKEN_FRAMES, frame)
                owner[frame] = _TABLE
                found[FOUND_TABLES] += 1
        found[FOUND_RSS] = 0
        found[FOUND_HUGE_ANONYMOUS] = 0
        walk_tables(m, space, root >> U3, U0, owner, found)
        _check_deposited(m, space, owner, found)
        expect(m, state[space_row(space) + S_RSS] == U(found[FOUND_RSS]), BROKEN_COUNTS, space)

    return walk_process


check_process = recount_of_process(_check_leaf)


# --------------------------------------------------------------------------- page caches


@outlined
def own_nodes(m, root, owner, found):
    """Mark the nodes of a radix tree by its root word; each is entered where its first index is."""
    height = root & _HEIGHT
    index = U0
    while height != U0 and index >> (U9 * height) == U0:
        node = root & PTE_ADDRESS
        level = height
        while True:
            if node != U0 and index & ((U1 << (U9 * level)) - U1) == U0:
                expect(m, owner[node >> U12] == np.uint8(0), BROKEN_FRAMES, node >> U12)
                owner[node >> U12] = _NODE
                found[FOUND_NODES] += 1
            if node == U0 or level == U1:
                break
            node = m.ram[(node >> U3) + index_at(index, level)]
            level -= U1
        index = ((index >> (U9 * level)) + U1) << (U9 * level)


@outlined
def _check_cached_pages(m, node, owner, found):
    """Pages of a guest_memfd of 4K folios, mapped or not."""
    index = cache_next(m, m.state[node + I_CACHE], U0)
    while index != NONE:
        frame = cache_find(m, m.state[node + I_CACHE], index)
        found[FOUND_CACHED] += 1
        if owner[frame] == np.uint8(0):
            owner[frame] = _PAGE
            kept = U(m.counts[frame]) & ~(PAGE_DIRTY | PAGE_POISONED | PAGE_PINNED)
            expect(m, kept == PAGE_CACHED, BROKEN_COUNTS, frame)
        expect(m, owner[frame] == _PAGE and U(m.counts[frame]) & PAGE_CACHED != U0, BROKEN_FRAMES, frame)
        index = cache_next(m, m.state[node + I_CACHE], index + U1)


@outlined
def _check_huge_file(m, inode):
    """Pages of a hugetlbfs file: held by its cache. How many are reserved and not allocated."""
    state = m.state
    node = inode_row(inode)
    order = state[node + I_ORDER]
    waiting = U0
    index = cache_next(m, state[node + I_CACHE], U0)
    while index != NONE:
        word = cache_find(m, state[node + I_CACHE], index)
        head = (word & PTE_ADDRESS) >> U12
        if head == U0:
            expect(m, word == RESERVED, BROKEN_COUNTS, index)
            waiting += U1
        else:
            page = struct_page(m, head)
            references = m.ram[page + COUNTS] >> U32
            expect(m, m.ram[page + MAPPING] == mapping_address(inode), BROKEN_WRONG_PFN, head)
            expect(m, references >= (U1 << order) + huge_mapcount(m, head), BROKEN_REFERENCES, head)
        index = cache_next(m, state[node + I_CACHE], index + U1)
    return waiting


@kernel
def _reserve(found, order, pages):
    """Somebody has pages of this order reserved."""
    found[FOUND_RESERVED if order == U9 else FOUND_RESERVED_1G] += np.int64(pages)


@kernel
def _own_poisoned(m, owner):
    """Poisoned pages of ordinary memory that nobody but memory failure holds: as many as are counted."""
    state = m.state
    alone = U0
    for frame in range(state[R_FRAMES] if state[R_POISONED_FRAMES] != U0 else U0):
        if m.counts[frame] == np.uint32(PAGE_POISONED) and owner[frame] == np.uint8(0):
            owner[frame] = _PAGE
            alone += U1
    expect(m, alone == state[R_POISONED_FRAMES], BROKEN_FRAMES, alone)


@outlined
def check_processes(m, owner, found):
    """What was found of all processes, and the page caches, against what the machine keeps."""
    state = m.state
    if state[R_ZERO_FRAME] != U0:
        expect(m, owner[state[R_ZERO_FRAME]] == np.uint8(0), BROKEN_FRAMES, state[R_ZERO_FRAME])
        owner[state[R_ZERO_FRAME]] = _PAGE
    for inode in range(state[R_INODES]):
        node = inode_row(inode)
        kind = state[node + I_KIND]
        if kind == INODE_GUEST_MEMFD or state[node + I_REFERENCES] == U0:
            continue
        own_nodes(m, state[node + I_CACHE], owner, found)
        if kind == INODE_GUEST_MEMFD_4K:
            _check_cached_pages(m, node, owner, found)
        elif kind == INODE_HUGETLB:
            _reserve(found, state[node + I_ORDER], _check_huge_file(m, inode))
    _own_poisoned(m, owner)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] != U0 and state[row + A_KIND] == VMA_HUGETLB:
            _reserve(found, huge_order(state, row), state[row + A_RESERVED])
    for i in range(state[R_SUBPOOLS]):
        row = subpool_row(i)
        _reserve(found, order_of_hstate(state, state[row + P_HSTATE]), state[row + P_RESERVED])
    for order, word in ((U9, FOUND_RESERVED), (U18, FOUND_RESERVED_1G)):
        reserved = U(found[word])
        expect(m, reserved == state[hstate_of_order(order) + H_RESERVED], BROKEN_COUNTS, reserved)
    check_pools(m, found)
    expect(m, found[FOUND_HUGE_MAPPED] == 0, BROKEN_REFERENCES, U(found[FOUND_HUGE_MAPPED]))
    expect(m, found[FOUND_MAPPED] == found[FOUND_MAPCOUNTS], BROKEN_COUNTS, U(found[FOUND_MAPPED]))
    check_anonymous_folios(m, found[FOUND_LARGE_MAPPED])
    expect_gauge(m, GAUGE_ANONYMOUS_PAGES, found[FOUND_ANONYMOUS])
    expect_gauge(m, GAUGE_PAGE_CACHE_PAGES, found[FOUND_CACHED])
    for level in range(U2):
        expect_gauge(m, GAUGE_HOST_LEAVES_4K + U1 + level, found[U1 + level])
    expect_gauge(m, GAUGE_CACHE_NODES, found[FOUND_NODES])
