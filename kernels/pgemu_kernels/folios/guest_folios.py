"""Huge pages of guest_memfd: taken from subpool and pool, put in the page cache, given back. mm/hugetlb.c."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U6, U8, U32
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.folios.buddy import freed_page, taken_page
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    INDEX,
    MAPPING,
    NO_MAPCOUNT,
    PG_DIRTY,
    PG_HEAD,
    PG_UPTODATE,
    PGTY_GUESTMEM_HUGETLB,
    PGTY_HUGETLB,
    SUBPOOL,
    SUBPOOL_6_12,
    struct_page,
)
from pgemu_kernels.folios.hugetlb import (
    SUBPOOLS_AT,
    dequeue,
    dequeue_any,
    enqueue,
    mapping_address,
    set_cgroup,
    set_subpool,
)
from pgemu_kernels.folios.page_cache import charge_added, charge_page_freed
from pgemu_kernels.folios.policy import no_other_node, preferred_node
from pgemu_kernels.folios.pools import free_or_enqueue, return_reserved, use_surplus
from pgemu_kernels.words.enum_words import (
    EVENT_HUGE_FOLIO_ALLOCATED,
    EVENT_HUGE_FOLIO_FREED,
    EVENT_PAGE_CACHE_STORED,
    EVENT_STRUCT_PAGE_BYTES,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
    GAUGE_WORK_PENDING,
)
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_HSTATE,
    R_MERGE_LAZY,
    R_NODES,
    R_ORDER,
    R_SPLIT_FORM,
)
from pgemu_kernels.words.rows import (
    B_METADATA,
    B_OUTSTANDING,
    B_PENDING,
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_ZOMBIE,
    CGROUP_ADDRESS,
    H_RESERVED,
    I_SUBPOOL,
    P_LIVE,
    P_MAX,
    P_RESERVED,
    P_USED,
    P_WORDS,
    SPLIT_FORM_RFC2,
    STATE_SUBPOOLS,
)

U = np.uint64
_CGROUP = U(CGROUP_ADDRESS)


# --------------------------------------------------------------------------- subpools


@kernel
def subpool_row(subpool):
    return STATE_SUBPOOLS + subpool * U(P_WORDS)


@kernel
def subpool_allows(state, subpool):
    """Whether a subpool (row + 1, 0 for none) is below its limit; pages that left the inode count until they return."""
    return subpool == U0 or state[subpool_row(subpool - U1) + P_USED] < state[subpool_row(subpool - U1) + P_MAX]


@outlined
def subpool_take(m, h, subpool):
    """hugepage_subpool_get_pages(1) of an inode's subpool, whose pages are all reserved: the reservation is used."""
    row = subpool_row(subpool)
    m.state[row + P_USED] += U1
    m.state[row + P_RESERVED] -= U1
    m.state[h + H_RESERVED] -= U1


@outlined
def subpool_give(m, h, subpool):
    """hugepage_subpool_put_pages(1): the reservation is the subpool's again, until nobody has the subpool any more."""
    row = subpool_row(subpool)
    m.state[row + P_USED] -= U1
    m.state[row + P_RESERVED] += U1
    m.state[h + H_RESERVED] += U1
    subpool_release(m, h, subpool)


@kernel
def unreserve_only(m, h, count):
    m.state[h + H_RESERVED] -= count


# Machines that have had surplus pages are none for the fast loops (count_surplus()).
unreserve = full_only(return_reserved, unreserve_only)
free_to_pool = full_only(free_or_enqueue, enqueue)


@kernel
def subpool_release(m, h, subpool):
    """unlock_or_release_subpool(): without pages and without an inode it returns its reservation."""
    row = subpool_row(subpool)
    if m.state[row + P_LIVE] == U0 and m.state[row + P_USED] == U0:
        unreserve(m, h, m.state[row + P_RESERVED])
        m.state[row + P_RESERVED] = U0


# --------------------------------------------------------------------------- the designs' blocks


@kernel
def nothing_beyond(m, h, node, strict):
    return NONE


obtain_beyond = full_only(use_surplus, nothing_beyond)


@outlined
def obtain_folio(m, inode, index):
    """A huge page for page `index` of an inode, with one reference and in no page cache: its head's PFN, or NONE.

    Of the inode's subpool, on the node of the memory policy; a page beyond the pool where reserved ones left it as
    surplus. mm/hugetlb.c:dequeue_hugetlb_folio_node_exact() and the posted guestmem_hugetlb_alloc_folio() and
    hugetlb_alloc_folio(); where guests have 4K pages (R_ORDER 0), mm/filemap.c:filemap_alloc_folio().
    """
    state = m.state
    row = inode_row(inode)
    node = U0
    strict = False
    if state[R_NODES] > U1:
        node = preferred_node(m, row, index)
        strict = no_other_node(m, row, index)
    if state[R_ORDER] == U0:
        return taken_page(m, node, strict)
    h = state[R_HSTATE]
    subpool = state[row + I_SUBPOOL]
    if not subpool_allows(state, subpool):
        return NONE
    head = dequeue(m, h, node) if strict else dequeue_any(m, h, node)
    if head == NONE:
        head = obtain_beyond(m, h, node, strict)
    if head != NONE and subpool != U0:
        subpool_take(m, h, subpool - U1)
    return head


@outlined
def insert_folio(m, inode, block, index, head):
    """Put what obtain_folio() gave in the page cache, for block row `block` of an inode that begins at page `index`.

    It ends with one reference per base page, which are the page cache's. mm/filemap.c:__filemap_add_folio(). Of a 4K
    folio the nodes of the page cache and its flags of the (unevictable) LRU are not modelled.
    """
    state = m.state
    ram = m.ram
    page = struct_page(m, head)
    subpool = state[inode_row(inode) + I_SUBPOOL]
    ram[page + MAPPING] = mapping_address(inode)
    ram[page + INDEX] = index
    if state[R_ORDER] != U0:
        ram[page + COUNTS] = PGTY_HUGETLB | U1 << (state[R_ORDER] + U32)
        set_subpool(ram, state, page, subpool)
        set_cgroup(ram, state, page, _CGROUP)
        charge_one(m, EVENT_HUGE_FOLIO_ALLOCATED)
    state[block + B_PFN] = head
    state[block + B_STATE] = BLOCK_HUGE
    state[block + B_METADATA] = subpool
    change(m.stats, GAUGE_BLOCKS_HUGE, 1)
    charge_added(m)


@outlined
def give_back_folio(m, inode, head):
    """Free what obtain_folio() gave to a fault that came second, when somebody else's is in the page cache by now."""
    state = m.state
    if state[R_ORDER] == U0:
        freed_page(m, head)
        return
    m.ram[struct_page(m, head) + COUNTS] = PGTY_HUGETLB
    subpool = state[inode_row(inode) + I_SUBPOOL]
    if subpool != U0:
        subpool_give(m, state[R_HSTATE], subpool - U1)
    free_to_pool(m, state[R_HSTATE], head)
    charge_one(m, EVENT_HUGE_FOLIO_ALLOCATED)
    charge_one(m, EVENT_HUGE_FOLIO_FREED)


@kernel
def subpool_of(m, page):
    """Row + 1 of the subpool that a huge folio names, 0 for none."""
    word = U8 + (SUBPOOL_6_12 if m.state[R_FOLIO_6_12] != U0 else SUBPOOL)
    address = m.ram[page + word]
    return U0 if address == U0 else (address - SUBPOOLS_AT >> U6) + U1


@outlined
def return_to_pool(m, head):
    """The last reference of a huge folio of the designs (or of a 4K one) is gone: mm/hugetlb.c:free_huge_folio().

    Where its node has surplus pages it leaves, though the subpool has one reserved again.
    """
    ram = m.ram
    if m.state[R_ORDER] == U0:
        freed_page(m, head)
        charge_page_freed(m)
        return
    h = m.state[R_HSTATE]
    page = struct_page(m, head)
    ram[page + FLAGS] &= ~(PG_UPTODATE | PG_DIRTY)
    ram[page + MAPPING] = U0
    ram[page + COUNTS] = PGTY_HUGETLB
    subpool = subpool_of(m, page)
    if subpool != U0:
        subpool_give(m, h, subpool - U1)
    set_subpool(ram, m.state, page, U0)
    set_cgroup(ram, m.state, page, U0)
    charge_one(m, EVENT_HUGE_FOLIO_FREED)
    charge(m, EVENT_STRUCT_PAGE_BYTES, 36)
    free_to_pool(m, h, head)


@kernel
def own_merged(m, block, first):
    """A merged folio names the subpool and the cgroup of its allocation again."""
    set_subpool(m.ram, m.state, first, m.state[block + B_METADATA])
    set_cgroup(m.ram, m.state, first, _CGROUP)


@kernel
def start_waiting(m, block):
    """A block that is split though all private waits; where the worker merges them, it is on its list."""
    if m.state[block + B_WAITS] == U0:
        m.state[block + B_WAITS] = U1
        if m.state[R_MERGE_LAZY] != U0:
            change(m.stats, GAUGE_WORK_PENDING, 1)


@kernel
def stop_waiting(m, block):
    """A block is no longer one that is split though all private; where the worker merges them, it is off its list."""
    if m.state[block + B_WAITS] != U0:
        m.state[block + B_WAITS] = U0
        if m.state[R_MERGE_LAZY] != U0:
            change(m.stats, GAUGE_WORK_PENDING, -1)


@kernel
def forget_block(m, block):
    """Block row `block` holds no folio any more."""
    m.state[block + B_PFN] = U0
    m.state[block + B_STATE] = BLOCK_ABSENT
    m.state[block + B_OUTSTANDING] = U0
    m.state[block + B_PENDING] = U0
    stop_waiting(m, block)
    m.state[block + B_METADATA] = U0


@kernel
def free_block(m, block):
    """Truncate an unsplit folio: out of the page cache and back to the pool."""
    return_to_pool(m, m.state[block + B_PFN])
    change(m.stats, GAUGE_BLOCKS_HUGE, -1)
    charge_one(m, EVENT_PAGE_CACHE_STORED)
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
    kind = NO_MAPCOUNT if m.state[R_ORDER] == U0 else PGTY_HUGETLB
    ram[page + COUNTS] = kind | extra << U32
    ram[page + MAPPING] = U0
    change(m.stats, GAUGE_BLOCKS_HUGE, -1)
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, 1)
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    forget_block(m, block)


@kernel
def abandon(ram, page, references, split_form):
    """A folio of a split block leaves the page cache, with the cache's references: whether somebody holds it.

    Form rfc2 marks it: the free_folio hook clears uptodate and sets the page type of guestmem_hugetlb, which lies
    where the mapcount does: nothing maps the page any more. The last reference clears the type. A 2M folio stays a
    HugeTLB page, which has its own way back.
    """
    ram[page + MAPPING] = U0
    ram[page + COUNTS] -= references << U32
    held = ram[page + COUNTS] >> U32 != U0
    if split_form == SPLIT_FORM_RFC2:
        ram[page + FLAGS] &= ~PG_UPTODATE
        if held and ram[page + FLAGS] & PG_HEAD == U0:
            ram[page + COUNTS] = (ram[page + COUNTS] & ~LOW32) | PGTY_GUESTMEM_HUGETLB
    return held


@kernel
def become_zombie(m, block, gauge, held, pending):
    """A block, counted by `gauge` until now, is a zombie: `held` pages are outstanding, `pending` are back."""
    stop_waiting(m, block)
    m.state[block + B_STATE] = BLOCK_ZOMBIE
    m.state[block + B_OUTSTANDING] = held
    m.state[block + B_PENDING] = pending
    change(m.stats, gauge, -1)
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, 1)


@outlined
def make_zombie(m, block):
    """Take a split block's pieces out of the page cache though some are held: all their references but those go."""
    state = m.state
    head = state[block + B_PFN]
    pages = U1 << state[R_ORDER]
    held = U0
    for i in range(pages):
        if abandon(m.ram, struct_page(m, head + i), U1, state[R_SPLIT_FORM]):
            held += U1
    become_zombie(m, block, GAUGE_BLOCKS_SPLIT, held, pages - held)
    charge(m, EVENT_PAGE_CACHE_STORED, np.int64(pages))
