"""Pools that grow and shrink, surplus pages, demotion, poison: mm/hugetlb.c.

Huge pages come from the page allocator's 2M blocks and go back to them. Pages on their way from one place to another
lie in a list of their hstate (H_LIST), where Linux has a local one.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U9, U511
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    HUGE_FOLIO_ALLOCATED,
    HUGE_FOLIO_FREED,
    STRUCT_PAGE_BYTES,
    STRUCT_PAGE_WRITTEN,
    charge,
    charge_one,
)
from pgemu_kernels.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    HWPOISON,
    HWPOISON_6_12,
    LOW_BYTE,
    ONE_REFERENCE,
    PG_HEAD,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    struct_page,
)
from pgemu_kernels.hstate import (
    ORDER_1G,
    first_page,
    hstate_node,
    hstate_of_order,
    list_add,
    list_del,
    node_of,
    order_of_hstate,
    page_after,
)
from pgemu_kernels.hugetlb import count_enqueued, count_free, enqueue, free_list, prep_compound
from pgemu_kernels.layout import (
    EBUSY,
    EINVAL,
    ENOMEM,
    EOPNOTSUPP,
    H_ACTIVE,
    H_FREE,
    H_LIST,
    H_NEXT_ALLOCATE,
    H_NEXT_FREE,
    H_NODE_FREE,
    H_NODE_PAGES,
    H_NODE_SURPLUS,
    H_PAGES,
    H_RESERVED,
    H_SURPLUS,
    POISONED,
    POISONED_ADDRESS,
    R_FOLIO_6_12,
    R_HWPOISON,
    R_NODES,
    R_POISONED,
    STATE_POISONED,
)
from pgemu_kernels.page_allocator import free_pages, take_pages
from pgemu_kernels.vmemmap import is_optimized, optimize, optimize_batch, restore, restore_batch

U = np.uint64

# --------------------------------------------------------------------------- pages join and leave


@kernel
def count_pages(state, h, node, n):
    """nr_huge_pages and that of a node, by `n` (uint64, two's complement to take away)."""
    state[h + H_PAGES] += n
    state[hstate_node(h, node) + H_NODE_PAGES] += n


@kernel
def count_surplus(state, h, node, n):
    """surplus_huge_pages and that of a node."""
    state[h + H_SURPLUS] += n
    state[hstate_node(h, node) + H_NODE_SURPLUS] += n


@outlined
def allocate_fresh(m, h, node):
    """alloc_fresh_hugetlb_folio() on one node: a frozen HugeTLB folio in no list, or NONE."""
    order = order_of_hstate(m.state, h)
    head = take_pages(m, order, node)
    if head != NONE:
        prep_compound(m, head, order)
        charge(m, STRUCT_PAGE_WRITTEN, np.int64(U1 << order) - 1)
        charge(m, STRUCT_PAGE_BYTES, 24 * (np.int64(U1 << order) - 1))
        charge_one(m, HUGE_FOLIO_ALLOCATED)
    return head


@outlined
def allocate_surplus(m, h):
    """alloc_surplus_hugetlb_folio(): a page beyond the pool, in use, with one reference; NONE.

    Gigantic pages cannot be surplus: alloc_surplus_hugetlb_folio() refuses them.
    """
    state = m.state
    order = order_of_hstate(state, h)
    if order == ORDER_1G:
        return NONE
    head = NONE
    for node in range(state[R_NODES]):
        if head == NONE:
            head = allocate_fresh(m, h, node)
    if head != NONE:
        optimize(m, head, order)
        list_add(m, h + H_ACTIVE, head)
        m.ram[struct_page(m, head) + COUNTS] = PGTY_HUGETLB | ONE_REFERENCE
        count_pages(state, h, node_of(state, head), U1)
        count_surplus(state, h, node_of(state, head), U1)
    return head


@outlined
def remove(m, h, head, surplus):
    """remove_hugetlb_folio(): out of its list and its pool's counts; `surplus` (0 or 1): it counted as surplus."""
    state = m.state
    node = node_of(state, head)
    page = struct_page(m, head)
    list_del(m, head)
    if m.ram[page + PRIVATE] & HUGETLB_FREED != U0:
        m.ram[page + PRIVATE] &= ~HUGETLB_FREED
        state[h + H_FREE] -= U1
        state[hstate_node(h, node) + H_NODE_FREE] -= U1
        count_free(m, h, -1)
    count_surplus(state, h, node, U0 - surplus)
    count_pages(state, h, node, NONE)


@outlined
def add_surplus(m, h, head):
    """add_hugetlb_folio(): a page whose vmemmap could not be restored is in the pool again, as surplus."""
    state = m.state
    node = node_of(state, head)
    count_pages(state, h, node, U1)
    count_surplus(state, h, node, U1)
    list_add(m, free_list(h, node), head)
    count_enqueued(m, h, node, head)


@outlined
def free_to_allocator(m, h, head):
    """The end of __update_and_free_hugetlb_folio(): a page whose vmemmap is whole goes back to the page allocator.

    The poison of the folio becomes that of the base page it was found on, whose 2M block stays out.
    """
    order = order_of_hstate(m.state, h)
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~(PG_HEAD | PG_UPTODATE)
    second = struct_page(m, head + U1)
    m.ram[second + FLAGS] &= ~LOW_BYTE
    kept = NONE
    if m.ram[page + FLAGS] & m.state[R_HWPOISON] != U0:
        kept = move_poison(m, head, order)
    free_pages(m, head, order, kept)
    charge_one(m, HUGE_FOLIO_FREED)


@outlined
def update_and_free(m, h, head):
    """update_and_free_hugetlb_folio() of a page already removed: 0, or -ENOMEM with the page surplus in its pool."""
    if restore(m, head, order_of_hstate(m.state, h)) != 0:
        add_surplus(m, h, head)
        return np.int64(-ENOMEM)
    free_to_allocator(m, h, head)
    return np.int64(0)


@outlined
def free_or_enqueue(m, h, head):
    """The end of free_huge_folio(): to the page allocator where the node has surplus pages, else to the pool."""
    node = node_of(m.state, head)
    if m.state[hstate_node(h, node) + H_NODE_SURPLUS] != U0:
        remove(m, h, head, U1)
        update_and_free(m, h, head)
    else:
        enqueue(m, h, head)


# --------------------------------------------------------------------------- lists of pages


@outlined
def collect(m, h, head):
    """A page in no list goes to the front of the list of pages on their way."""
    list_add(m, h + H_LIST, head)


@outlined
def join_pool(m, h):
    """prep_and_add_allocated_folios(): the pages of the list are optimised together and join the pool, free."""
    state = m.state
    optimize_batch(m, first_page(state, h + H_LIST), U0)
    head = first_page(state, h + H_LIST)
    while head != U0:
        following = page_after(m, head)
        count_pages(state, h, node_of(state, head), U1)
        enqueue(m, h, head)
        head = following


@outlined
def free_list_of_pages(m, h):
    """update_and_free_pages_bulk(): the vmemmap of the list's pages is restored together, then they are freed.

    Without memory those that are whole are freed first, and the others restored one by one with what that gave;
    what still cannot be is surplus in the pool. bulk_vmemmap_restore_error().
    """
    state = m.state
    restore_batch(m, first_page(state, h + H_LIST), U0)
    for single in range(U(2)):
        head = first_page(state, h + H_LIST)
        while head != U0:
            following = page_after(m, head)
            if single == U1 or not is_optimized(m, head):
                list_del(m, head)
                if single == U1:
                    update_and_free(m, h, head)
                else:
                    free_to_allocator(m, h, head)
            head = following


# --------------------------------------------------------------------------- nr_hugepages


@kernel
def turn(m, word, nodes):
    """The node whose turn it is, round robin over all nodes: hstate_next_node_to_alloc()."""
    node = m.state[word]
    m.state[word] = U0 if node + U1 >= nodes else node + U1
    return node


@outlined
def allocate_next(m, h, node):
    """alloc_pool_huge_folio(): a fresh page of `node`, or of the node whose turn it is, or the next; NONE."""
    nodes = m.state[R_NODES]
    if node < nodes:
        return allocate_fresh(m, h, node)
    head = NONE
    for _ in range(nodes):
        if head == NONE:
            head = allocate_fresh(m, h, turn(m, h + H_NEXT_ALLOCATE, nodes))
    return head


@outlined
def first_free(m, h, node):
    """The first free page of a node that is not poisoned, 0 for none."""
    head = first_page(m.state, free_list(h, node))
    while head != U0 and m.ram[struct_page(m, head) + FLAGS] & m.state[R_HWPOISON] != U0:
        head = page_after(m, head)
    return head


@outlined
def remove_next(m, h, node):
    """remove_pool_hugetlb_folio(): a free page of `node`, or of the node whose turn it is, to the list; 0 or NONE."""
    nodes = m.state[R_NODES]
    for _ in range(nodes if node >= nodes else U1):
        at = node if node < nodes else turn(m, h + H_NEXT_FREE, nodes)
        head = first_page(m.state, free_list(h, at))
        if head != U0:
            remove(m, h, head, U0)
            collect(m, h, head)
            return U0
    return NONE


@outlined
def adjust_surplus(m, h, node, up):
    """adjust_pool_surplus(): one page more or less counts as surplus, of a node that has one to give; 0 or NONE."""
    state = m.state
    for at in range(state[R_NODES]):
        if node < state[R_NODES] and at != node:
            continue
        row = hstate_node(h, at)
        if up and state[row + H_NODE_SURPLUS] < state[row + H_NODE_PAGES]:
            count_surplus(state, h, at, U1)
            return U0
        if not up and state[row + H_NODE_SURPLUS] != U0:
            count_surplus(state, h, at, NONE)
            return U0
    return NONE


@kernel
def persistent(state, h):
    """persistent_huge_pages()."""
    return state[h + H_PAGES] - state[h + H_SURPLUS]


@outlined
def resize(m, h, count, node):
    """set_max_huge_pages(): what a write to nr_hugepages does; `node` NONE: all. The number of pages afterwards.

    A count for one node means the node's own pages: the others' are added. It ends early when memory does; pages in
    use become surplus.
    """
    state = m.state
    if node < state[R_NODES]:
        count += state[h + H_PAGES] - state[hstate_node(h, node) + H_NODE_PAGES]
    while state[h + H_SURPLUS] != U0 and count > persistent(state, h):
        if adjust_surplus(m, h, node, False) == NONE:
            break
    grown = persistent(state, h)
    while count > grown:
        head = allocate_next(m, h, node)
        if head == NONE:
            break
        collect(m, h, head)
        grown += U1
    join_pool(m, h)
    in_use = state[h + H_RESERVED] + state[h + H_PAGES] - state[h + H_FREE]
    target = max(count, in_use)
    while target < persistent(state, h):
        if remove_next(m, h, node) == NONE:
            break
    free_list_of_pages(m, h)
    while count < persistent(state, h):
        if adjust_surplus(m, h, node, True) == NONE:
            break
    return state[h + H_PAGES]


# --------------------------------------------------------------------------- demotion, dissolution


@outlined
def demote_page(m, h, target, head):
    """demote_free_hugetlb_folios(): a 1G page, removed and whole, becomes 512 pages of 2M in the target's list.

    They are collected in ascending order, so that the free list begins with the lowest once they have joined the pool.
    """
    small = order_of_hstate(m.state, target)
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~PG_HEAD
    m.ram[struct_page(m, head + U1) + FLAGS] &= ~LOW_BYTE
    for new in range(head, head + (U1 << order_of_hstate(m.state, h)), U1 << small):
        prep_compound(m, new, small)
        collect(m, target, new)
    charge(m, STRUCT_PAGE_WRITTEN, np.int64(U1 << order_of_hstate(m.state, h)))
    charge(m, STRUCT_PAGE_BYTES, 24 * np.int64(U1 << order_of_hstate(m.state, h)))


@outlined
def demote(m, h, count, node):
    """A write to `demote` of 1G pages: (0, pages demoted); -EINVAL for 2M pages, -EBUSY without a free page.

    demote_store(), demote_pool_huge_page(). -ENOMEM: a page's vmemmap could not be restored, and it stays.
    """
    state = m.state
    order = order_of_hstate(state, h)
    if order != ORDER_1G:
        return np.int64(-EINVAL), U0
    target = hstate_of_order(U9)
    done = U0
    for at in range(state[R_NODES]):
        if node < state[R_NODES] and at != node:
            continue
        while done < count:
            free = state[h + H_FREE] - state[h + H_RESERVED]
            head = first_free(m, h, at)
            if head == U0 or free == U0:
                break
            remove(m, h, head, U0)
            if restore(m, head, order) != 0:
                readmit(m, h, head)
                return np.int64(-ENOMEM), done
            demote_page(m, h, target, head)
            join_pool(m, target)
            done += U1
    if done < count and done == U0:
        return np.int64(-EBUSY), done
    return np.int64(0), done


@outlined
def readmit(m, h, head):
    """add_hugetlb_folio() without surplus: a page that could not be demoted is free in its pool again."""
    node = node_of(m.state, head)
    count_pages(m.state, h, node, U1)
    list_add(m, free_list(h, node), head)
    count_enqueued(m, h, node, head)


@outlined
def dissolve(m, h, head):
    """dissolve_free_hugetlb_folio(): a free page leaves its pool: 0, -EBUSY if it is in use or reserved, -ENOMEM."""
    state = m.state
    page = struct_page(m, head)
    if m.ram[page + PRIVATE] & HUGETLB_FREED == U0 or state[h + H_FREE] - state[h + H_RESERVED] == U0:
        return np.int64(-EBUSY)
    remove(m, h, head, U0)
    if restore(m, head, order_of_hstate(state, h)) != 0:
        readmit(m, h, head)
        return np.int64(-ENOMEM)
    free_to_allocator(m, h, head)
    return np.int64(0)


# --------------------------------------------------------------------------- poison


@outlined
def poison(m, head, pfn):
    """folio_set_hugetlb_hwpoison(): the folio is poisoned, the base page noted: 0, -EBUSY if it was, -ENOMEM.

    -EOPNOTSUPP without CONFIG_MEMORY_FAILURE.
    """
    state = m.state
    if state[R_HWPOISON] == U0:
        return np.int64(-EOPNOTSUPP)
    for i in range(state[R_POISONED]):
        if state[STATE_POISONED + i] == pfn:
            return np.int64(-EBUSY)
    row = U0
    while row < state[R_POISONED] and state[STATE_POISONED + row] != U0:
        row += U1
    if row == U(POISONED):
        return np.int64(-ENOMEM)
    state[R_POISONED] = max(state[R_POISONED], row + U1)
    state[STATE_POISONED + row] = pfn
    page = struct_page(m, head)
    m.ram[page + FLAGS] |= state[R_HWPOISON]
    word = U(8) + (HWPOISON_6_12 if state[R_FOLIO_6_12] != U0 else HWPOISON)
    m.ram[page + word] = U(POISONED_ADDRESS) + row * U(16)
    return np.int64(0)


@outlined
def move_poison(m, head, order):
    """folio_clear_hugetlb_hwpoison(): the poison moves to the base pages noted; the first block of a poisoned one.

    Inference: the page allocator keeps the 2M block of the first poisoned page out, in place of the 4K page alone.
    """
    state = m.state
    kept = NONE
    m.ram[struct_page(m, head) + FLAGS] &= ~state[R_HWPOISON]
    for i in range(state[R_POISONED]):
        pfn = state[STATE_POISONED + i]
        if pfn - head < U1 << order:
            m.ram[struct_page(m, pfn) + FLAGS] |= state[R_HWPOISON]
            kept = pfn & ~U511
    return kept
