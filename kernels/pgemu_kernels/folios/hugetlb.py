"""HugeTLB folios and the free lists of their pools, by size and node. mm/hugetlb.c."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, LOW32, NONE, U0, U1, U2, U3, U4, U6, U7, U8, U12, U18, U511
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.folio import (
    CGROUP,
    CGROUP_6_12,
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    MAPPING,
    ONE_REFERENCE,
    PG_HEAD,
    PGTY_HUGETLB,
    PRIVATE,
    SUBPOOL,
    SUBPOOL_6_12,
    TAIL_MAPPING,
    is_huge_page,
    order_of,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import first_page, hstate_node, in_zone, list_move, node_of, skip_poisoned
from pgemu_kernels.folios.vmemmap import compound_info, rewrite_pages
from pgemu_kernels.words.enum_words import (
    GAUGE_OTHER_POOL_FREE,
    GAUGE_POOL_FREE,
)
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_HSTATE,
    R_HUGETLB_CGROUP,
    R_NODES,
)
from pgemu_kernels.words.rows import (
    H_ACTIVE,
    H_FREE,
    H_NODE_FREE,
    H_NODE_FREE_LIST,
    SUBPOOLS_ADDRESS,
)

U = np.uint64

# Where the kernel would have its `struct address_space`s: one 4K object per inode in the direct map.
# A model address: no source gives one, and nothing is stored there.
MAPPING_ADDRESS = U(0xFFFF888000001000)
SUBPOOLS_AT = U(SUBPOOLS_ADDRESS)


@kernel
def mapping_address(inode):
    """Value of folio->mapping for an inode."""
    return MAPPING_ADDRESS + (inode << U12)


@kernel
def inode_at(m, head):
    """The inode whose page cache holds a folio."""
    return (m.ram[struct_page(m, head) + MAPPING] - MAPPING_ADDRESS) >> U12


# --------------------------------------------------------------------------- words of a folio


@outlined
def prep_compound_head(ram, state, head, first, order):
    """mm/internal.h:prep_compound_head(): the fields of a folio that lie in its second and third struct page.

    `first` is the head's index in `ram`. _mapcount and _refcount of these pages are not touched, nor are flags but for
    the order.
    """
    second = first + U8
    ram[second + FLAGS] = (ram[second + FLAGS] & ~U(0xFF)) | order
    if state[R_FOLIO_6_12] != U0:
        ram[second + U2] = ALL  # _large_mapcount -1, _entire_mapcount -1
        ram[second + U3] = U0  # _nr_pages_mapped, _pincount
        ram[second + U4] = U1 << order  # _folio_nr_pages
    else:
        ram[second + U2] = LOW32  # _large_mapcount -1, _nr_pages_mapped 0
        ram[second + U3] = LOW32  # _entire_mapcount -1, _pincount 0
        ram[second + U4] = ALL  # _mm_id_mapcount, _mm_ids
        ram[second + U7] = U1 << order  # _nr_pages
        if order != U1:
            ram[first + U18] = vmemmap_address(state, head) + U(144)  # _deferred_list, empty
            ram[first + U(19)] = ram[first + U18]


@outlined
def write_order(ram, state, head, first, order):
    """prep_compound_head() and the rest of mm/hugetlb.c:init_new_hugetlb_folio(): no subpool, no cgroup."""
    prep_compound_head(ram, state, head, first, order)
    set_subpool(ram, state, first, U0)
    set_cgroup(ram, state, first, U0)


@kernel
def set_subpool(ram, state, first, subpool):
    """hugetlb_set_folio_subpool(): a row + 1, or 0 for none."""
    word = U8 + (SUBPOOL_6_12 if state[R_FOLIO_6_12] != U0 else SUBPOOL)
    ram[first + word] = U0 if subpool == U0 else SUBPOOLS_AT + (subpool - U1 << U6)


@kernel
def set_cgroup(ram, state, first, cgroup):
    """set_hugetlb_cgroup(): its address, or 0. Only where the kernel has HugeTLB cgroups."""
    if state[R_HUGETLB_CGROUP] != U0:
        ram[first + U8 + (CGROUP_6_12 if state[R_FOLIO_6_12] != U0 else CGROUP)] = cgroup


@outlined
def prep_compound(m, head, order):
    """prep_compound_page() and init_new_hugetlb_folio() over struct pages that are all there: a frozen HugeTLB folio.

    24 bytes in each tail: mapping, compound_info, private.
    """
    prep_folio(m, head, order, U1 << order)


@outlined
def prep_folio(m, head, order, pages):
    """prep_compound() of which only the first `pages` struct pages, a multiple of 64, are written."""
    ram = m.ram
    kept = (NONE, U0, NONE, U0), (NONE, U0, NONE, NONE)
    tail = (U0, compound_info(m.state, head, order), U0, TAIL_MAPPING), (U0, U0, U0, U0)
    rewrite_pages(m, head, head + pages, kept, tail)
    first = struct_page(m, head)
    ram[first + FLAGS] |= PG_HEAD
    ram[first + COMPOUND] = U0
    ram[first + MAPPING] = U0
    ram[first + COUNTS] = (ram[first + COUNTS] & ~LOW32) | PGTY_HUGETLB
    write_order(ram, m.state, head, first, order)


# --------------------------------------------------------------------------- free lists


@kernel
def free_list(h, node):
    """Word of the list head of a node's free pages."""
    return hstate_node(h, node) + H_NODE_FREE_LIST


@kernel
def count_listed(m, h, node, head, n):
    """A page of the free list is counted and marked (`n` 1, int64); one that left it is neither any more (-1)."""
    m.state[h + H_FREE] += U(n)
    m.state[hstate_node(h, node) + H_NODE_FREE] += U(n)
    private = struct_page(m, head) + PRIVATE
    m.ram[private] = (m.ram[private] & ~HUGETLB_FREED) | (HUGETLB_FREED if n > 0 else U0)
    change(m.stats, GAUGE_POOL_FREE if h == m.state[R_HSTATE] else GAUGE_OTHER_POOL_FREE, n)


@outlined
def enqueue(m, h, head):
    """enqueue_hugetlb_folio(): to the front of its node's free list, from whatever list it is in."""
    node = node_of(m.state, head)
    list_move(m, free_list(h, node), head)
    count_listed(m, h, node, head, 1)


@outlined
def dequeue(m, h, node):
    """dequeue_hugetlb_folio_node_exact(): the first page of a node's free list that is not poisoned, or NONE.

    It goes to the active list, with one reference.
    """
    head = skip_poisoned(m, first_page(m.state, free_list(h, node)))
    if head == U0:
        return NONE
    list_move(m, h + H_ACTIVE, head)
    m.ram[struct_page(m, head) + COUNTS] = PGTY_HUGETLB | ONE_REFERENCE
    count_listed(m, h, node, head, -1)
    return head


@outlined
def dequeue_any(m, h, preferred):
    """A free page of the preferred node, else of the other: dequeue_hugetlb_folio_nodemask()."""
    head = dequeue(m, h, preferred)
    if head == NONE and m.state[R_NODES] > U1:
        head = dequeue(m, h, U1 - preferred)
    return head


@outlined
def head_of(m, pfn):
    """Head of the HugeTLB page that holds a frame, or NONE."""
    if in_zone(m.state, pfn):
        for head in (pfn & ~U((1 << 18) - 1), pfn & ~U511):
            if in_zone(m.state, head) and is_huge_page(m, head) and pfn - head < U1 << order_of(m, head):
                return head
    return NONE
