"""The recount of the HugeTLB zone: every 2M block has one owner, every list holds what it should."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U2, U9, U12, U18, U32, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.folios.folio import (
    COUNTS,
    HUGETLB_FREED,
    HUGETLB_VMEMMAP_OPTIMIZED,
    MAPPING,
    PRIVATE,
    is_huge_page,
    order_of,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import (
    first_page,
    hstate_node,
    hstate_of_order,
    is_head,
    links_of,
    list_head,
    node_row,
    page_after,
)
from pgemu_kernels.folios.huge_pages import huge_mapcount
from pgemu_kernels.folios.hugetlb import free_list, mapping_address
from pgemu_kernels.folios.page_allocator import PGTY_BUDDY, is_block_free
from pgemu_kernels.folios.vmemmap import vmemmap_directory, vmemmap_pte
from pgemu_kernels.folios.xarray import has_pieces
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE
from pgemu_kernels.gmem.references import zombie_of
from pgemu_kernels.rules.invariants import expect
from pgemu_kernels.words.enum_words import (
    BROKEN_COUNTS,
    BROKEN_FRAMES,
    BROKEN_REFERENCES,
    BROKEN_VMEMMAP,
    GAUGE_BUDDY_BLOCKS,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_NODES
from pgemu_kernels.words.rows import (
    FOUND_HUGE_MAPPED,
    H_ACTIVE,
    H_FREE,
    H_LIST,
    H_NODE_FREE,
    H_NODE_PAGES,
    H_NODE_SURPLUS,
    H_ORDER,
    H_PAGES,
    H_SURPLUS,
    H_WORDS,
    HSTATES,
    I_KIND,
    INODE_GUEST_MEMFD,
    N_BASE,
    N_GIGANTIC,
    N_PAGES,
    N_RESERVED,
    STATE_HSTATES,
)

U = np.uint64


@kernel
def _check_list(m, row, h, freed):
    """Walk a list of an hstate: how many pages, each of its order, marked as free or not, with links both ways."""
    count = U0
    before = list_head(row)
    head = first_page(m.state, row)
    while head != U0:
        page = struct_page(m, head)
        expect(m, m.ram[page + U2] == before, BROKEN_COUNTS, head)
        # The later form of a split leaves the first page of a split folio in the active list.
        huge = is_huge_page(m, head)
        expect(m, huge or not freed, BROKEN_COUNTS, head)
        # ... also the first 2M piece of a 1G page.
        piece = not freed and has_pieces(m.state) and m.state[h + H_ORDER] > U9
        expect(m, not huge or piece or order_of(m, head) == m.state[h + H_ORDER], BROKEN_COUNTS, head)
        expect(m, not huge or (m.ram[page + PRIVATE] & HUGETLB_FREED != U0) == freed, BROKEN_COUNTS, head)
        expect(m, not freed or m.ram[page + COUNTS] >> U32 <= U1, BROKEN_REFERENCES, head)
        before = links_of(m, head)
        count += U1
        head = page_after(m, head)
    expect(m, m.state[row + U1] == before, BROKEN_COUNTS, count)
    return count


@kernel
def _check_huge_page(m, head, found):
    """A huge page's references and the entries of its vmemmap: read-only to one page if and only if it is optimised.

    Its mapcount is taken off what was found of the entries that map it.
    """
    page = struct_page(m, head)
    ram = m.ram
    start = vmemmap_address(m.state, head)
    shared = False
    if ram[vmemmap_directory(m, start)] & PTE_LARGE == U0:
        shared = (
            ram[vmemmap_pte(m, start + U(4096))] & PTE_ADDRESS == ram[vmemmap_pte(m, start + U(8192))] & PTE_ADDRESS
        )
    expect(m, shared == (ram[page + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED != U0), BROKEN_VMEMMAP, head)
    mapping = ram[page + MAPPING]
    if mapping != U0 and mapping & U1 == U0:
        inode = (mapping - mapping_address(U0)) >> U12
        if m.state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
            return
    if mapping & U1 != U0:
        expect(m, ram[page + COUNTS] >> U32 >= huge_mapcount(m, head), BROKEN_REFERENCES, head)
    found[FOUND_HUGE_MAPPED] -= np.int64(huge_mapcount(m, head))


@kernel
def _is_piece(m, head):
    """Whether a 2M folio is a piece of a 1G page of an inode of the designs, or was before its inode let it go."""
    if not has_pieces(m.state):
        return False
    mapping = m.ram[struct_page(m, head) + MAPPING]
    if mapping == U0:
        return zombie_of(m, head & ~U((1 << 18) - 1)) != NONE
    inode = (mapping - mapping_address(U0)) >> U12
    return mapping & U1 == U0 and m.state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD


@outlined
def _check_node(m, node, found):
    """The blocks of a node: free ones, huge pages, and those that are in pieces: (free, pages of 2M, of 1G)."""
    state = m.state
    row = node_row(node)
    base = state[row + N_BASE]
    end = base + state[row + N_PAGES]
    kept = base + (state[row + N_GIGANTIC] << U18)
    kept_end = kept + state[row + N_RESERVED]
    free = U0
    huge = U0
    gigantic = U0
    pfn = base
    while pfn < end:
        following = pfn + U512
        if is_block_free(state, pfn):
            free += U1
            expect(m, m.ram[struct_page(m, pfn) + COUNTS] & LOW32 == PGTY_BUDDY, BROKEN_FRAMES, pfn)
        elif is_huge_page(m, pfn):
            order = order_of(m, pfn)
            huge += U1 if order == U9 and not _is_piece(m, pfn) else U0
            gigantic += U0 if order == U9 else U1
            _check_huge_page(m, pfn, found)
            following = pfn + (U1 << order)
        elif kept <= pfn < kept_end:
            following = kept_end
        pfn = following
    return free, huge, gigantic


@outlined
def check_pools(m, found):
    """The HugeTLB zone against the counts and lists that the machine keeps.

    A page that is split is no head: of each size there are at most as many heads as the pool has pages.
    """
    state = m.state
    free = U0
    for node in range(state[R_NODES]):
        blocks, huge, gigantic = _check_node(m, node, found)
        free += blocks
        expect(m, huge <= state[hstate_node(hstate_of_order(U9), node) + H_NODE_PAGES], BROKEN_COUNTS, huge)
        expect(m, gigantic <= state[hstate_node(hstate_of_order(U18), node) + H_NODE_PAGES], BROKEN_COUNTS, gigantic)
    expect(m, m.stats[STATS_GAUGES + GAUGE_BUDDY_BLOCKS * U2] == np.int64(free), BROKEN_FRAMES, free)
    for i in range(U(HSTATES)):
        h = STATE_HSTATES + i * U(H_WORDS)
        pages = U0
        listed = U0
        surplus = U0
        for node in range(state[R_NODES]):
            row = hstate_node(h, node)
            count = _check_list(m, free_list(h, node), h, True)
            expect(m, count == state[row + H_NODE_FREE], BROKEN_COUNTS, count)
            pages += state[row + H_NODE_PAGES]
            surplus += state[row + H_NODE_SURPLUS]
            listed += count
        expect(m, listed == state[h + H_FREE], BROKEN_COUNTS, listed)
        expect(m, pages == state[h + H_PAGES], BROKEN_COUNTS, pages)
        expect(m, surplus == state[h + H_SURPLUS], BROKEN_COUNTS, surplus)
        expect(m, listed + _check_list(m, h + H_ACTIVE, h, False) <= pages, BROKEN_COUNTS, listed)
        expect(m, is_head(state[h + H_LIST]), BROKEN_COUNTS, h)
