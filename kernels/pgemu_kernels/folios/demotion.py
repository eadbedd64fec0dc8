"""Demotion and dissolution of a pool's pages. mm/hugetlb.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U9
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.folios.folio import (
    FLAGS,
    HUGETLB_FREED,
    LOW_BYTE,
    PG_HEAD,
    PRIVATE,
    struct_page,
)
from pgemu_kernels.folios.hstate import (
    ORDER_1G,
    first_page,
    hstate_node,
    hstate_of_order,
    list_del,
    list_move,
    node_of,
    order_of_hstate,
    page_after,
    skip_poisoned,
)
from pgemu_kernels.folios.hugetlb import free_list, prep_compound
from pgemu_kernels.folios.hvo import is_optimized, restore_batch
from pgemu_kernels.folios.pools import collect, join_pool, readmit, remove, tries, turn, update_and_free
from pgemu_kernels.words.enum_words import (
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
)
from pgemu_kernels.words.operations import EBUSY, EINVAL
from pgemu_kernels.words.registers import R_NODES
from pgemu_kernels.words.rows import (
    H_FREE,
    H_LIST,
    H_NEXT_FREE,
    H_NODE_FREE,
    H_NODE_SURPLUS,
    H_RESERVED,
)

U = np.uint64


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
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, np.int64(U1 << order_of_hstate(m.state, h)))
    charge(m, EVENT_STRUCT_PAGE_BYTES, 24 * np.int64(U1 << order_of_hstate(m.state, h)))


@outlined
def collect_free(m, h, node, limit):
    """Up to `limit` free pages of a node that are not poisoned leave the pool for the list: how many."""
    count = U0
    head = skip_poisoned(m, first_page(m.state, free_list(h, node)))
    while head != U0 and count < limit:
        following = skip_poisoned(m, page_after(m, head))
        remove(m, h, head, U0)
        collect(m, h, head)
        count += U1
        head = following
    return count


@outlined
def demote_list(m, h, target):
    """demote_free_hugetlb_folios(): the 1G pages of the list become 2M pages of the target's pool: (status, pages).

    Their vmemmap is restored in one batch, in the order of the list; those that came to be whole are demoted the last
    first, so that the pages of the one that was free first are free first. The others are free in their pool again.
    """
    state = m.state
    row = h + H_LIST
    anchor = first_page(state, row)
    status, whole = restore_batch(m, anchor, U0)
    for _ in range(U1, max(whole, U1)):
        list_move(m, row, page_after(m, anchor))
    done = U0
    head = first_page(state, row)
    while head != U0:
        following = page_after(m, head)
        if not is_optimized(m, head):
            list_del(m, head)
            demote_page(m, h, target, head)
            done += U1
        head = following
    join_pool(m, target)
    while first_page(state, row) != U0:
        head = first_page(state, row)
        list_del(m, head)
        readmit(m, h, head, U0)
    return status, done


@outlined
def demote_some(m, h, count, node):
    """demote_pool_huge_page(): up to `count` pages of the nodes in turn: (status, pages); -EBUSY: all are poisoned."""
    done = U0
    status = np.int64(0)
    for _ in range(tries(m, node)):
        if status == 0 and done < count:
            collect_free(m, h, turn(m, h + H_NEXT_FREE, node), count - done)
            status, demoted = demote_list(m, h, hstate_of_order(U9))
            done += demoted
    if status == 0 and done == U0:
        status = np.int64(-EBUSY)
    return status, done


@outlined
def demote(m, h, count, node):
    """A write to `demote` of 1G pages: (0, pages demoted), as many as there are; -EINVAL for 2M pages.

    -EBUSY: there are none, or all are poisoned. -ENOMEM: a page's vmemmap could not be restored, and it stays. Linux
    asks only that there be another number of free pages, of the node or of all, than of reserved ones: it takes
    reserved ones, too, and what counts as surplus goes on to. mm/hugetlb_sysfs.c:demote_store()
    """
    state = m.state
    if order_of_hstate(state, h) != ORDER_1G:
        return np.int64(-EINVAL), U0
    done = U0
    while done < count:
        free = state[h + H_FREE] if node >= state[R_NODES] else state[hstate_node(h, node) + H_NODE_FREE]
        if free == state[h + H_RESERVED]:
            break
        status, demoted = demote_some(m, h, count - done, node)
        done += demoted
        if status != 0:
            return status, done
    return np.int64(0), done


@outlined
def dissolve_free_hugetlb_folio(m, h, head):
    """dissolve_free_hugetlb_folio(): a free page leaves its pool: 0, -EBUSY if it is in use or reserved, -ENOMEM."""
    state = m.state
    page = struct_page(m, head)
    if m.ram[page + PRIVATE] & HUGETLB_FREED == U0 or state[h + H_FREE] - state[h + H_RESERVED] == U0:
        return np.int64(-EBUSY)
    surplus = U1 if state[hstate_node(h, node_of(state, head)) + H_NODE_SURPLUS] != U0 else U0
    remove(m, h, head, surplus)
    return update_and_free(m, h, head, surplus)
