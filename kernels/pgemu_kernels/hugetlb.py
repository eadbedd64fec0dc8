"""The HugeTLB pool: folios taken from it, put in a page cache, given back."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import ALL, LOW32, NONE, U0, U1, U8, U32
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    BLOCKS_HUGE,
    BLOCKS_SPLIT,
    BLOCKS_ZOMBIE,
    HUGE_FOLIO_ALLOCATED,
    HUGE_FOLIO_FREED,
    PAGE_CACHE_STORED,
    POOL_FREE,
    STRUCT_PAGE_BYTES,
    change,
    charge,
    charge_one,
)
from pgemu_kernels.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    INDEX,
    MAPPING,
    NO_MAPCOUNT,
    ONE_REFERENCE,
    PG_DIRTY,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.layout import (
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_ZOMBIE,
    R_FOLIO_6_12,
    R_ORDER,
    R_PAGE_FLAGS,
    R_POOL_FREE,
    R_POOL_STACK,
)
from pgemu_kernels.vmemmap import compound_info

U = np.uint64

# Where the kernel would have its `struct address_space`s: one 4K object per inode in the direct map.
# A model address: no source gives one, and nothing is stored there.
MAPPING_ADDRESS = U(0xFFFF888000001000)


@kernel
def mapping_address(inode):
    """Value of folio->mapping for an inode."""
    return MAPPING_ADDRESS + (inode << U(12))


@kernel
def write_order(ram, state, head, first, order):
    """The fields of a folio that lie in its second to fourth struct page, as in a free HugeTLB page.

    mm/internal.h:prep_compound_head(), mm/hugetlb.c:init_new_hugetlb_folio(); words as captured.
    """
    flags = state[R_PAGE_FLAGS]
    compound = compound_info(state, head, order)
    second = first + U8
    ram[second + FLAGS] = flags | order
    ram[second + COMPOUND] = compound
    ram[second + U(5)] = U0
    ram[second + COUNTS] = NO_MAPCOUNT
    if state[R_FOLIO_6_12] != U0:
        ram[second + U(2)] = ALL  # _large_mapcount -1, _entire_mapcount -1
        ram[second + U(3)] = U0  # _nr_pages_mapped, _pincount
        ram[second + U(4)] = U1 << order  # _folio_nr_pages
        ram[second + U(7)] = U0
    else:
        ram[second + U(2)] = LOW32  # _large_mapcount -1, _nr_pages_mapped 0
        ram[second + U(3)] = LOW32  # _entire_mapcount -1, _pincount 0
        ram[second + U(4)] = ALL  # _mm_id_mapcount, _mm_ids
        ram[second + U(7)] = U1 << order  # _nr_pages
    third = first + U(16)
    ram[third + FLAGS] = flags
    ram[third + COMPOUND] = compound
    fourth = first + U(24)
    ram[fourth + FLAGS] = flags
    ram[fourth + COMPOUND] = compound
    if state[R_FOLIO_6_12] != U0:
        ram[third + U(2)] = U0  # _hugetlb_subpool
        ram[third + U(3)] = U0  # _hugetlb_cgroup
    else:
        link = vmemmap_address(state, head) + U(144)  # _deferred_list, empty
        ram[third + U(2)] = link
        ram[third + U(3)] = link
        ram[fourth + U(2)] = U0  # _hugetlb_subpool


@kernel
def take_folio(m, inode, block, index):
    """Take a huge page from the pool for block row `block` of an inode and put it in the page cache.

    Returns the head's PFN, or NONE when the pool is empty. The folio ends with one reference per base
    page, which are the page cache's. mm/hugetlb.c:dequeue_hugetlb_folio_node_exact(),
    mm/filemap.c:__filemap_add_folio().
    """
    state = m.state
    top = state[R_POOL_FREE]
    if top == U0:
        return NONE
    state[R_POOL_FREE] = top - U1
    head = state[state[R_POOL_STACK] + top - U1]
    ram = m.ram
    page = struct_page(m, head)
    ram[page + MAPPING] = mapping_address(inode)
    ram[page + INDEX] = index
    ram[page + PRIVATE] &= ~HUGETLB_FREED
    ram[page + COUNTS] = PGTY_HUGETLB | U1 << (state[R_ORDER] + U32)
    m.state[block + B_PFN] = head
    m.state[block + B_STATE] = BLOCK_HUGE
    change(m.stats, POOL_FREE, -1)
    change(m.stats, BLOCKS_HUGE, 1)
    charge_one(m, HUGE_FOLIO_ALLOCATED)
    charge_one(m, PAGE_CACHE_STORED)
    charge(m, STRUCT_PAGE_BYTES, 28)
    return head


@kernel
def return_to_pool(m, head):
    """The last reference of a huge folio is gone: mm/hugetlb.c:free_huge_folio()."""
    ram = m.ram
    page = struct_page(m, head)
    ram[page + FLAGS] &= ~(PG_UPTODATE | PG_DIRTY)
    ram[page + MAPPING] = U0
    ram[page + INDEX] = U0
    ram[page + PRIVATE] |= HUGETLB_FREED
    ram[page + COUNTS] = PGTY_HUGETLB
    state = m.state
    top = state[R_POOL_FREE]
    state[state[R_POOL_STACK] + top] = head
    state[R_POOL_FREE] = top + U1
    change(m.stats, POOL_FREE, 1)
    charge_one(m, HUGE_FOLIO_FREED)
    charge(m, STRUCT_PAGE_BYTES, 36)


@kernel
def forget_block(m, block):
    """Block row `block` holds no folio any more."""
    m.state[block + B_PFN] = U0
    m.state[block + B_STATE] = BLOCK_ABSENT
    m.state[block + B_OUTSTANDING] = U0
    m.state[block + B_WAITS] = U0


@kernel
def free_block(m, block):
    """Truncate an unsplit folio: out of the page cache and back to the pool."""
    return_to_pool(m, m.state[block + B_PFN])
    change(m.stats, BLOCKS_HUGE, -1)
    charge_one(m, PAGE_CACHE_STORED)
    forget_block(m, block)


@outlined
def release_block(m, block):
    """Take an unsplit folio out of the page cache; it goes to the pool now or with its last reference."""
    ram = m.ram
    head = m.state[block + B_PFN]
    page = struct_page(m, head)
    extra = (ram[page + COUNTS] >> U32) - (U1 << m.state[R_ORDER])
    if extra == U0:
        free_block(m, block)
        return
    ram[page + COUNTS] = PGTY_HUGETLB | extra << U32
    ram[page + MAPPING] = U0
    change(m.stats, BLOCKS_HUGE, -1)
    change(m.stats, BLOCKS_ZOMBIE, 1)
    charge_one(m, PAGE_CACHE_STORED)
    forget_block(m, block)


@outlined
def make_zombie(m, block):
    """Take a split block's pieces out of the page cache though some are held: all their references but those go."""
    ram = m.ram
    head = m.state[block + B_PFN]
    held = U0
    for i in range(U1 << m.state[R_ORDER]):
        page = struct_page(m, head + i)
        ram[page + MAPPING] = U0
        ram[page + COUNTS] -= ONE_REFERENCE
        if ram[page + COUNTS] >> U32 != U0:
            held += U1
    m.state[block + B_STATE] = BLOCK_ZOMBIE
    m.state[block + B_OUTSTANDING] = held
    change(m.stats, BLOCKS_SPLIT, -1)
    change(m.stats, BLOCKS_ZOMBIE, 1)
