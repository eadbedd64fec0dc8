"""4K pages of the page allocator as guest memory (page_size 4096): a buddy allocator below the 2M blocks.

mm/page_alloc.c: rmqueue_buddy(), expand(), __free_one_page(). Free blocks of orders 0 to 8 stand in lists by order,
whose links are words 1 and 2 of their first struct pages, as the kernel's are; blocks of order 9 are page_allocator's.
In front of them is a list per node, as of the one CPU: what is freed last comes first (as captured), and what has been
there longest goes back when it grows too long. A page of it is no buddy. Not modelled (inference: they change which
frame comes, not what is done with it): that an empty list is filled by the batch, migrate types, and that a block that
will soon merge is put at the end of its list.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U2, U9
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    FLAGS_KEPT,
    MAPPING,
    NO_MAPCOUNT,
    ONE_CACHED,
    PG_HEAD,
    PRIVATE,
    folio_order,
    struct_page,
)
from pgemu_kernels.folios.hstate import (
    LIST_POISON1,
    LIST_POISON2,
    first_page,
    is_head,
    list_add,
    list_del,
    node_of,
    page_of,
)
from pgemu_kernels.folios.page_allocator import (
    PGTY_BUDDY,
    count_small,
    is_block_free,
    mark_free,
    take_block,
    take_block_at,
)
from pgemu_kernels.folios.vmemmap import rewrite_pages
from pgemu_kernels.words.registers import R_HWPOISON, R_INIT_ON_ALLOC, R_NODES
from pgemu_kernels.words.rows import (
    FREE_ORDERS,
    PCP_BATCH,
    PCP_HIGH,
    STATE_FREE_AREAS,
    STATE_PCP,
    STATE_PCP_COUNTS,
)

U = np.uint64
_ORDERS = U(FREE_ORDERS)
_BLOCK = np.int64(512)


@kernel
def free_area(node, order):
    """Where the list head of a node's free blocks of an order (0 to 8) lies in `state`."""
    return STATE_FREE_AREAS + ((node * _ORDERS + order) << U1)


@kernel
def is_buddy(m, pfn, order):
    """Whether a frame is the first of a free block of exactly this order: page_is_buddy()."""
    page = struct_page(m, pfn)
    return m.ram[page + COUNTS] & LOW32 == PGTY_BUDDY and m.ram[page + PRIVATE] == order


@kernel
def add_free_block(m, node, pfn, order):
    """__add_to_free_list() and set_buddy_order()."""
    page = struct_page(m, pfn)
    m.ram[page + PRIVATE] = order
    m.ram[page + COUNTS] = PGTY_BUDDY
    list_add(m, free_area(node, order), pfn)


@kernel
def remove_free_block(m, pfn):
    """__del_page_from_free_list()."""
    page = struct_page(m, pfn)
    list_del(m, pfn)
    m.ram[page + PRIVATE] = U0
    m.ram[page + COUNTS] = NO_MAPCOUNT


@kernel
def pcp_list(node):
    """Where the list head of a node's per-CPU pages lies in `state`."""
    return STATE_PCP + (node << U1)


@outlined
def free_one_page(m, pfn, order):
    """A block whose pages are prepared goes to the lists by order; free ones join as far as they go."""
    node = node_of(m.state, pfn)
    while order < U9 and is_buddy(m, pfn ^ (U1 << order), order):
        remove_free_block(m, pfn ^ (U1 << order))
        pfn &= ~(U1 << order)
        order += U1
    if order < U9:
        add_free_block(m, node, pfn, order)
        return
    count_small(m, -_BLOCK, -_BLOCK)
    mark_free(m, pfn)


@outlined
def drain_pages(m, node, count):
    """The `count` pages that have been in the per-CPU list longest go to the lists by order: free_pcppages_bulk()."""
    state = m.state
    for _ in range(min(count, state[STATE_PCP_COUNTS + node])):
        pfn = page_of(state, state[pcp_list(node) + U1])
        list_del(m, pfn)
        state[STATE_PCP_COUNTS + node] -= U1
        free_one_page(m, pfn, U0)


@outlined
def drain_all(m):
    """drain_all_pages(): as an allocation does that would fail otherwise."""
    for node in range(m.state[R_NODES]):
        drain_pages(m, node, m.state[STATE_PCP_COUNTS + node])


@outlined
def take_page_of(m, node):
    """A 4K page of a node with one reference: the last one freed, else the first of the smallest free block, or NONE.

    rmqueue_pcplist(), expand()
    """
    state = m.state
    order = U0
    if state[STATE_PCP_COUNTS + node] != U0:
        pfn = first_page(state, pcp_list(node))
        list_del(m, pfn)
        state[STATE_PCP_COUNTS + node] -= U1
        m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED
        count_small(m, np.int64(0), np.int64(-1))
        return pfn
    while order < _ORDERS and is_head(state[free_area(node, order)]):
        order += U1
    if order < _ORDERS:
        pfn = first_page(state, free_area(node, order))
        remove_free_block(m, pfn)
    else:
        pfn = take_block(m, node)
        if pfn == NONE:
            return NONE
        count_small(m, _BLOCK, _BLOCK)  # it left the blocks, not the guests' memory
        page = struct_page(m, pfn)  # as list_del() leaves it
        m.ram[page + U1] = LIST_POISON1
        m.ram[page + U2] = LIST_POISON2
        m.ram[page + PRIVATE] = U0
    while order > U0:
        order -= U1
        add_free_block(m, node, pfn + (U1 << order), order)
    m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED
    count_small(m, np.int64(0), np.int64(-1))
    return pfn


@outlined
def take_page_off_buddy(m, pfn):
    """A free 4K page leaves the lists, the blocks around it stay: whether it was free. mm/page_alloc.c

    It ends with one reference. The per-CPU lists are emptied before (zone_pcp_disable()).
    """
    drain_all(m)
    order = U0
    while order < _ORDERS and not is_buddy(m, pfn & ~((U1 << order) - U1), order):
        order += U1
    first = pfn & ~((U1 << order) - U1)
    if order < _ORDERS:
        remove_free_block(m, first)
    elif is_block_free(m.state, pfn):
        take_block_at(m, pfn)
        count_small(m, _BLOCK, _BLOCK)
    else:
        return False
    while order > U0:  # break_down_buddy_pages()
        order -= U1
        half = U1 << order
        other = first if pfn >= first + half else first + half
        add_free_block(m, node_of(m.state, pfn), other, order)
        first = first + half if other == first else first
    m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED
    count_small(m, np.int64(0), np.int64(-1))
    return True


@outlined
def take_page(m, preferred, strict):
    """A 4K page of the preferred node, else (not `strict`) of the other, with one reference; NONE.

    post_alloc_hook(): zeroed, where the kernel is configured so; that is not counted (users of it zero it once more).
    """
    pfn = take_page_of(m, preferred)
    if pfn == NONE and not strict and m.state[R_NODES] > U1:
        pfn = take_page_of(m, U1 - preferred)
    if pfn != NONE and m.state[R_INIT_ON_ALLOC] != U0:
        zero_contents(m, pfn, U1)
    return pfn


@outlined
def free_large(m, head, order):
    """The same of a folio of several pages, which goes to the lists by order at once (in Linux orders 1 to 3 and 9 wait
    in per-CPU lists, too).
    """
    kept = (FLAGS_KEPT | m.state[R_HWPOISON], U0, NONE, U0), (NONE, U0, U0, U0)
    rewrite_pages(m, head, head + (U1 << order), kept, ((U0, U0, U0, U0), (U0, U0, NO_MAPCOUNT, U0)))
    count_small(m, np.int64(0), np.int64(U1 << order))
    free_one_page(m, head, order)


@outlined
def free_page(m, pfn):
    """The last reference of a 4K page is gone: free_pages_prepare(), free_frozen_page_commit()."""
    state = m.state
    page = struct_page(m, pfn)
    if m.ram[page + FLAGS] & PG_HEAD != U0:
        free_large(m, pfn, folio_order(m.ram, page))
        return
    m.ram[page + FLAGS] &= FLAGS_KEPT | m.state[R_HWPOISON]
    m.ram[page + MAPPING] = U0
    m.ram[page + PRIVATE] = U0
    m.ram[page + COUNTS] = NO_MAPCOUNT
    node = node_of(state, pfn)
    count_small(m, np.int64(0), np.int64(1))
    list_add(m, pcp_list(node), pfn)
    state[STATE_PCP_COUNTS + node] += U1
    if state[STATE_PCP_COUNTS + node] >= PCP_HIGH:
        drain_pages(m, node, PCP_BATCH)


# Only machines with parameters have 4K guest memory.
taken_page = full_only(take_page, NONE)
freed_page = full_only(free_page, None)
