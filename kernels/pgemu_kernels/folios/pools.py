"""Pools that grow and shrink, reservations, surplus pages: mm/hugetlb.c. Demotion is demotion.py's, poison poison.py's.

Huge pages come from the page allocator's 2M blocks and go back to them. Pages on their way from one place to another
lie in a list of their hstate (H_LIST), where Linux has a local one.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.buddy import drain_all
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    LOW_BYTE,
    ONE_REFERENCE,
    PG_HEAD,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    struct_page,
)
from pgemu_kernels.folios.hstate import (
    ORDER_1G,
    first_page,
    hstate_node,
    list_add,
    list_del,
    node_of,
    order_of_hstate,
    page_after,
)
from pgemu_kernels.folios.hugetlb import count_listed, enqueue, free_list, prep_compound
from pgemu_kernels.folios.hvo import is_optimized, optimize, optimize_batch, restore, restore_batch
from pgemu_kernels.folios.page_allocator import charge_tails, free_pages, take_pages
from pgemu_kernels.folios.poison import move_poison
from pgemu_kernels.words.enum_words import (
    EVENT_HUGE_FOLIO_ALLOCATED,
    EVENT_HUGE_FOLIO_FREED,
)
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import R_FULL, R_GIGANTIC_SURPLUS, R_HWPOISON, R_NODES, R_ORDER
from pgemu_kernels.words.rows import (
    H_ACTIVE,
    H_FREE,
    H_LIST,
    H_NEXT_ALLOCATE,
    H_NEXT_FREE,
    H_NODE_PAGES,
    H_NODE_SURPLUS,
    H_OVERCOMMIT,
    H_PAGES,
    H_RESERVED,
    H_SURPLUS,
)

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
    state[R_FULL] = U1  # the fast loops know none
    state[h + H_SURPLUS] += n
    state[hstate_node(h, node) + H_NODE_SURPLUS] += n


@outlined
def allocate_fresh(m, h, node):
    """alloc_fresh_hugetlb_folio() on one node: a frozen HugeTLB folio in no list, or NONE."""
    order = order_of_hstate(m.state, h)
    head = take_pages(m, order, node)
    if head == NONE and m.state[R_ORDER] == U0:
        drain_all(m)
        head = take_pages(m, order, node)
    if head != NONE:
        prep_compound(m, head, order)
        charge_tails(m, order, 24)
        charge_one(m, EVENT_HUGE_FOLIO_ALLOCATED)
    return head


@outlined
def allocate_surplus(m, h, preferred, strict):
    """alloc_surplus_hugetlb_folio(): a frozen page beyond the pool, in no list; NONE.

    As far as nr_overcommit_hugepages allows, of the preferred node, else of the other unless `strict`. Gigantic pages
    can be surplus since 6.19 only.
    """
    state = m.state
    order = order_of_hstate(state, h)
    gigantic = order == ORDER_1G and state[R_GIGANTIC_SURPLUS] == U0
    if gigantic or state[h + H_SURPLUS] >= state[h + H_OVERCOMMIT]:
        return NONE
    head = allocate_fresh(m, h, preferred)
    if head == NONE and state[R_NODES] > U1 and not strict:
        head = allocate_fresh(m, h, U1 - preferred)
    if head != NONE:
        optimize(m, head, order)
        count_pages(state, h, node_of(state, head), U1)
        count_surplus(state, h, node_of(state, head), U1)
    return head


@outlined
def use_surplus(m, h, preferred, strict):
    """allocate_surplus() of a page that is used at once: it is active and has one reference. NONE."""
    head = allocate_surplus(m, h, preferred, strict)
    if head != NONE:
        list_add(m, h + H_ACTIVE, head)
        m.ram[struct_page(m, head) + COUNTS] = PGTY_HUGETLB | ONE_REFERENCE
    return head


@outlined
def remove(m, h, head, surplus):
    """remove_hugetlb_folio(): out of its list and its pool's counts; `surplus` (0 or 1): it counted as surplus."""
    state = m.state
    node = node_of(state, head)
    list_del(m, head)
    if m.ram[struct_page(m, head) + PRIVATE] & HUGETLB_FREED != U0:
        count_listed(m, h, node, head, -1)
    count_surplus(state, h, node, U0 - surplus)
    count_pages(state, h, node, NONE)


@outlined
def readmit(m, h, head, surplus):
    """add_hugetlb_folio(): a page whose vmemmap could not be restored is free in its pool again.

    `surplus` (0 or 1): it counts as surplus.
    """
    state = m.state
    node = node_of(state, head)
    count_pages(state, h, node, U1)
    count_surplus(state, h, node, surplus)
    list_add(m, free_list(h, node), head)
    count_listed(m, h, node, head, 1)


@outlined
def free_to_allocator(m, h, head):
    """The end of __update_and_free_hugetlb_folio(): a page whose vmemmap is whole goes back to the page allocator.

    The poison of the folio becomes that of the base pages it was found on, whose 2M blocks stay out.
    """
    order = order_of_hstate(m.state, h)
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~(PG_HEAD | PG_UPTODATE)
    second = struct_page(m, head + U1)
    m.ram[second + FLAGS] &= ~LOW_BYTE
    poisoned = m.ram[page + FLAGS] & m.state[R_HWPOISON] != U0
    if poisoned:
        move_poison(m, head, order)
    free_pages(m, head, order, poisoned)
    charge_one(m, EVENT_HUGE_FOLIO_FREED)


@outlined
def update_and_free(m, h, head, surplus):
    """update_and_free_hugetlb_folio() of a page already removed: 0, or -ENOMEM with the page free in its pool again.

    `surplus` (0 or 1): there it counts as surplus.
    """
    if restore(m, head, order_of_hstate(m.state, h)) != 0:
        readmit(m, h, head, surplus)
        return np.int64(-ENOMEM)
    free_to_allocator(m, h, head)
    return np.int64(0)


@outlined
def free_or_enqueue(m, h, head):
    """The end of free_huge_folio(): to the page allocator where the node has surplus pages, else to the pool."""
    node = node_of(m.state, head)
    if m.state[hstate_node(h, node) + H_NODE_SURPLUS] != U0:
        remove(m, h, head, U1)
        update_and_free(m, h, head, U1)
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

    Without memory those before the first that got none are freed and the rest is tried again; if there are none before
    it, pages are restored one by one, up to the first that can be, and those that cannot be are surplus in the pool.
    bulk_vmemmap_restore_error()
    """
    state = m.state
    status, _ = restore_batch(m, first_page(state, h + H_LIST), U0)
    while status != 0:
        if not free_whole_pages(m, h):
            gone = False
            while not gone and first_page(state, h + H_LIST) != U0:
                head = first_page(state, h + H_LIST)
                list_del(m, head)
                gone = update_and_free(m, h, head, U1) == 0
        status, _ = restore_batch(m, first_page(state, h + H_LIST), U0)
    free_whole_pages(m, h)


@outlined
def free_whole_pages(m, h):
    """The pages of the list up to the first whose vmemmap is optimised go to the page allocator; whether there were."""
    head = first_page(m.state, h + H_LIST)
    found = False
    while head != U0 and not is_optimized(m, head):
        list_del(m, head)
        free_to_allocator(m, h, head)
        found = True
        head = first_page(m.state, h + H_LIST)
    return found


# --------------------------------------------------------------------------- nr_hugepages


@kernel
def tries(m, node):
    """How many nodes a request may use: `node`, or all (NONE)."""
    return U1 if node < m.state[R_NODES] else m.state[R_NODES]


@kernel
def turn(m, word, node):
    """The node whose turn it is of those that a request may use, and the next one's turn it is then.

    hstate_next_node_to_alloc(). A request for one node leaves the turn with it.
    """
    nodes = m.state[R_NODES]
    at = node if node < nodes else m.state[word]
    m.state[word] = node if node < nodes else (U0 if at + U1 >= nodes else at + U1)
    return at


@outlined
def allocate_next(m, h, node):
    """alloc_pool_huge_folio(): a fresh page of `node`, or of the node whose turn it is, or the next; NONE."""
    head = NONE
    for _ in range(tries(m, node)):
        if head == NONE:
            head = allocate_fresh(m, h, turn(m, h + H_NEXT_ALLOCATE, node))
    return head


@outlined
def remove_next(m, h, node, surplus):
    """remove_pool_hugetlb_folio(): a free page of `node`, or of the node whose turn it is, to the list; 0 or NONE.

    `surplus` (0 or 1): of a node that has surplus pages, and it is one of them.
    """
    for _ in range(tries(m, node)):
        at = turn(m, h + H_NEXT_FREE, node)
        head = first_page(m.state, free_list(h, at))
        if head != U0 and (surplus == U0 or m.state[hstate_node(h, at) + H_NODE_SURPLUS] != U0):
            remove(m, h, head, surplus)
            collect(m, h, head)
            return U0
    return NONE


@outlined
def adjust_surplus(m, h, node, up):
    """adjust_pool_surplus(): one page more or less counts as surplus, of the next node that has one; 0 or NONE."""
    state = m.state
    for _ in range(tries(m, node)):
        at = turn(m, h + (H_NEXT_FREE if up else H_NEXT_ALLOCATE), node)
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


@kernel
def fewest(state, h):
    """To how many persistent pages a pool can shrink: those in use, and those reserved.

    Free surplus pages are there where a vmemmap could not be restored; they are not persistent ones.
    """
    free = state[h + H_FREE]
    surplus = state[h + H_SURPLUS]
    if free > persistent(state, h):
        free = free - surplus if free > surplus else U0
    return state[h + H_RESERVED] + persistent(state, h) - free


@outlined
def resize(m, h, count, node):
    """set_max_huge_pages(): what a write to nr_hugepages does; `node` NONE: all. The number of pages afterwards.

    A count for one node means the node's own persistent pages: the others' are added. It ends early when memory does;
    pages in use become surplus. `count` is at most the pages of the zone, so that nothing overflows.
    """
    state = m.state
    if node < state[R_NODES]:
        row = hstate_node(h, node)
        count += persistent(state, h) - (state[row + H_NODE_PAGES] - state[row + H_NODE_SURPLUS])
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
    if count > grown or first_page(state, h + H_LIST) != U0:
        join_pool(m, h)
    target = max(count, fewest(state, h))
    while target < persistent(state, h):
        if remove_next(m, h, node, U0) == NONE:
            break
    free_list_of_pages(m, h)
    while count < persistent(state, h):
        if adjust_surplus(m, h, node, True) == NONE:
            break
    return state[h + H_PAGES]


# --------------------------------------------------------------------------- reservations


@outlined
def reserve_pages(m, h, count):
    """hugetlb_acct_memory() of a mapping's or a subpool's pages: 0, or -ENOMEM with nothing reserved.

    What the pool has not free is taken beyond it, as far as nr_overcommit_hugepages allows: gather_surplus_pages().
    """
    state = m.state
    while state[h + H_RESERVED] + count > state[h + H_FREE]:
        short = state[h + H_RESERVED] + count - state[h + H_FREE]
        if not gather_surplus(m, h, short):
            return np.int64(-ENOMEM)
    state[h + H_RESERVED] += count
    return np.int64(0)


@outlined
def gather_surplus(m, h, count):
    """So many surplus pages join the pool, free; whether there were as many, else there is none more."""
    whole = True
    for _ in range(count):
        head = allocate_surplus(m, h, U0, False)
        if head == NONE:
            whole = False
            break
        collect(m, h, head)
    head = first_page(m.state, h + H_LIST)
    while head != U0:
        if whole:
            enqueue(m, h, head)
        else:  # free_huge_folio()
            remove(m, h, head, U1)
            update_and_free(m, h, head, U1)
        head = first_page(m.state, h + H_LIST)
    return whole


@outlined
def return_reserved(m, h, count):
    """hugetlb_acct_memory() of pages that are no longer reserved, and with them go free surplus pages.

    return_unused_surplus_pages(): as many as there are, of each node with surplus pages in turn.
    """
    state = m.state
    state[h + H_RESERVED] -= count
    for _ in range(min(count, state[h + H_SURPLUS])):
        if remove_next(m, h, NONE, U1) == NONE:
            break
    if first_page(state, h + H_LIST) != U0:
        free_list_of_pages(m, h)
