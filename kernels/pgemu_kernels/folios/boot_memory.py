"""Memory of the HugeTLB zone whose struct pages are all there from boot on: unoptimised pools, what is in no pool."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U6, U8, U9, U12, U18, U64, U511, U512
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.folios.boot import NO_MEMORY, SECTION, fill_lists, page_flags
from pgemu_kernels.folios.folio import COMPOUND, COUNTS, FLAGS, NO_MAPCOUNT, ONE_CACHED, struct_page, vmemmap_address
from pgemu_kernels.folios.hstate import LRU, ORDER_1G, node_row
from pgemu_kernels.folios.hugetlb import prep_compound
from pgemu_kernels.folios.page_allocator import mark_free
from pgemu_kernels.folios.vmemmap import count_boot_pages, map_large, vmemmap_slot
from pgemu_kernels.words.registers import R_BOOT_NEXT, R_FRAMES, R_HVO, R_NODES, R_VMEMMAP_PAGE
from pgemu_kernels.words.rows import N_BASE, N_GIGANTIC, N_HUGE, N_PAGES, N_RESERVED

U = np.uint64


@outlined
def map_section(m, first, end, optimized, optimized_end):
    """The vmemmap of frames [first, end) of one section, but for the optimised ones: 0 or -ENOMEM.

    One 2M leaf if none of the section's is optimised, else 4K entries, which is what a split leaf left.
    """
    state = m.state
    state[R_BOOT_NEXT] = (state[R_BOOT_NEXT] + U511) & ~U511  # a 2M leaf's address is a multiple of 2M
    frame = state[R_FRAMES] + state[R_BOOT_NEXT]
    start = first & ~(SECTION - U1)
    state[R_BOOT_NEXT] += U512
    if optimized >= optimized_end:
        if map_large(m, vmemmap_address(state, start), frame) != 0:
            return NO_MEMORY
        count_boot_pages(m, frame, U512)
        return np.int64(0)
    for i in range(U512):
        pfn = start + (i << U6)
        if first <= pfn < end and not optimized <= pfn < optimized_end:
            slot = vmemmap_slot(m, vmemmap_address(state, pfn), U1)
            if slot == NONE:
                return NO_MEMORY
            m.ram[slot] = (frame + i) << U12 | state[R_VMEMMAP_PAGE]
            count_boot_pages(m, frame + i, U1)
    return np.int64(0)


@outlined
def map_unoptimized(m, first, end, optimized, optimized_end):
    """The vmemmap of frames [first, end) of a node, but for the optimised ones: 0 or -ENOMEM."""
    while first < end:
        last = min((first | (SECTION - U1)) + U1, end)
        low = min(max(first, optimized), optimized_end)
        high = max(min(last, optimized_end), low)
        covers = low == first and high == last
        if not covers and map_section(m, first, last, low, high) != 0:
            return NO_MEMORY
        first = last
    return np.int64(0)


@outlined
def write_struct_pages(m, first, end, counts, node):
    """Struct pages of frames [first, end) as __init_single_page() leaves them; `counts`: the word with the refcount."""
    flags = page_flags(m.state, node)
    for base in range(first, end, U64):
        page = struct_page(m, base)
        link = vmemmap_address(m.state, base) + LRU
        for _ in range(U64):
            m.ram[page + FLAGS] = flags
            m.ram[page + COMPOUND] = link
            m.ram[page + U2] = link
            m.ram[page + COUNTS] = counts
            link += U64
            page += U8


@outlined
def prepare_pages(m, first, order, pages, node):
    """Huge pages whose struct pages are all there: heads and tails."""
    write_struct_pages(m, first, first + (pages << order), NO_MAPCOUNT, node)
    for head in range(first, first + (pages << order), U1 << order):
        prep_compound(m, head, order)


@outlined
def prepare_node(m, node):
    """Memory of one node that is not optimised: its vmemmap and struct pages. 0 or -ENOMEM."""
    state = m.state
    row = node_row(node)
    base = state[row + N_BASE]
    end = base + state[row + N_PAGES]
    rest = base + (state[row + N_GIGANTIC] << U18)
    huge = rest + state[row + N_RESERVED]
    buddy = huge + (state[row + N_HUGE] << U9)
    if state[R_HVO] != U0:
        status = map_unoptimized(m, rest, end, huge, buddy)
    else:
        status = map_unoptimized(m, base, end, end, end)
    if status != 0:
        return status
    if state[R_HVO] == U0:
        prepare_pages(m, base, ORDER_1G, state[row + N_GIGANTIC], node)
        prepare_pages(m, huge, U9, state[row + N_HUGE], node)
        fill_lists(m, node, base, huge)
    write_struct_pages(m, rest, huge, ONE_CACHED, node)
    write_struct_pages(m, buddy, end, NO_MAPCOUNT, node)
    for block in range(buddy, end & ~U511, U512):
        mark_free(m, block)
    return status


@outlined
def prepare_memory(m):
    """The second part of boot, for machines that have such memory: 0 or -ENOMEM."""
    for node in range(m.state[R_NODES]):
        if prepare_node(m, node) != 0:
            return NO_MEMORY
    return np.int64(0)
