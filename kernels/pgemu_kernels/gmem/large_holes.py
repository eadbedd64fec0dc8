"""Holes in large folios of the page allocator (Config.large_folios): mm/truncate.c:truncate_inode_pages_range()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U12
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import block_row, inode_row, space_root, vma_overlap
from pgemu_kernels.folios.folio import INDEX, mappings, reference_count, struct_page
from pgemu_kernels.folios.guest_folios import release_block
from pgemu_kernels.folios.large_folios import head_and_order, release_large, split_by_halves
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.gmem.vm_kinds import make_shared
from pgemu_kernels.process.tables import gather_begin, gather_flush, lookup_address
from pgemu_kernels.process.vma import first_vma
from pgemu_kernels.process.zapping import drop_large_pfn, unmap_mapping_range
from pgemu_kernels.words.rows import A_NEXT, A_SPACE, B_PFN, B_STATE, BLOCK_ABSENT

U = np.uint64


@outlined
def remove_whole(m, inode, start, end):
    """Truncate the folios that lie in pages [start, end); a mapped one is unmapped before: truncate_cleanup_folio()."""
    state = m.state
    node = inode_row(inode)
    index = start
    while index < end:
        block = block_row(m, node, index)
        index += U1
        if state[block + B_STATE] == BLOCK_ABSENT:
            continue
        head, order = head_and_order(m, state[block + B_PFN])
        page = struct_page(m, head)
        first = m.ram[page + INDEX]
        last = first + (U1 << order)
        index = last
        if first < start or last > end:
            continue
        if order == U0 and mappings(m.ram, page) != U0:
            unmap_mapping_range(m, inode, first, last)
        if order == U0:
            release_block(m, block)
        else:
            release_large(m, node, head, order)
        make_shared(m, node, first, last)


@outlined
def unmap_folio(m, inode, head, first, pages):
    """What a split does to the entry of a folio that nobody counts: mm/rmap.c:try_to_unmap() walks the file's VMAs.

    The walk ends where the folio is not mapped, which is after the first VMA already (inference from
    rmap_walk_control.done): another one keeps its large entry. 4K entries stay. Returns how many entries went.
    """
    state = m.state
    row = first_vma(state, inode)
    while row != U0:
        start, end = vma_overlap(state, row, inode, first, first + pages)
        if start < end:
            slot, level = lookup_address(m, space_root(state, state[row + A_SPACE]), start)
            if level == U2 and (m.ram[slot] & PTE_ADDRESS) >> U12 == head:
                gather_begin(m)
                drop_large_pfn(m, row, start, U2)
                gather_flush(m, state[row + A_SPACE])
                return U1
            return U0
        row = state[row + A_NEXT]
    return U0


@outlined
def remove_part(m, inode, at, start, end):
    """Split the folio with page `at` at both ends of what a hole [start, end) covers of it.

    truncate_inode_partial_folio(), which zeroes nothing of memory that may be a guest's own (mapping_inaccessible(), as
    captured). Where somebody holds the folio it stays as it is.
    """
    state = m.state
    node = inode_row(inode)
    block = block_row(m, node, at)
    if state[block + B_STATE] == BLOCK_ABSENT:
        return
    head, order = head_and_order(m, state[block + B_PFN])
    if order == U0:
        return
    page = struct_page(m, head)
    first = m.ram[page + INDEX]
    pages = U1 << order
    low = max(start, first)
    high = min(end, first + pages)
    if reference_count(m.ram, page) != pages:
        return  # can_split_folio()
    unmap_folio(m, inode, head, first, pages)
    split_by_halves(m, head, order, low - first)
    if high == first + pages:
        return
    other, order = head_and_order(m, state[block_row(m, node, high) + B_PFN])
    if order != U0:
        split_by_halves(m, other, order, high - m.ram[struct_page(m, other) + INDEX])


@outlined
def punch_large(m, inode, start, end):
    """Free pages [start, end) of an inode: whole folios, then what is left of those at both ends."""
    remove_whole(m, inode, start, end)
    remove_part(m, inode, start, start, end)
    remove_part(m, inode, end - U1, start, end)
    remove_whole(m, inode, start, end)
