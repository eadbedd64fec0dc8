"""HugeTLB pages that processes map: taken from the pool of their size, referenced, mapped, given back."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U2, U3, U8, U12, U18, U32
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, take_frame, zero_contents
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_MIGRATABLE,
    INDEX,
    MAPPING,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    add_references,
    order_of,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hstate import hstate_of_order
from pgemu_kernels.folios.hugetlb import dequeue_any, mapping_address, set_cgroup
from pgemu_kernels.folios.pools import free_or_enqueue, use_surplus
from pgemu_kernels.formats.bits import PTE_DIRTY, PTE_SAVED_DIRTY
from pgemu_kernels.words.enum_words import (
    EVENT_FOLIO_ZEROED_PAGES,
    EVENT_HUGE_FOLIO_ALLOCATED,
    EVENT_HUGE_FOLIO_FREED,
    EVENT_PAGE_COPIED,
    EVENT_RMAP_CHANGED,
    EVENT_STRUCT_PAGE_BYTES,
    GAUGE_CONTENT_FRAMES,
    GAUGE_HUGETLB_PAGES,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_CONTENTS, R_FOLIO_6_12, R_HSTATE, R_POOL_BASE
from pgemu_kernels.words.rows import CGROUP_ADDRESS, H_FREE, H_RESERVED

U = np.uint64


@kernel
def level_of_order(order):
    """2 for order 9, 3 for order 18."""
    return U3 if order == U18 else U2


@outlined
def alloc_hugetlb_folio(m, order, reserved, preferred):
    """alloc_hugetlb_folio(): a huge page with one reference, contents as they are, its head; NONE if none can be had.

    `reserved` (0 or 1): the caller has a reservation, which is used up. Without, and without a free page that nobody
    has reserved, one is allocated beyond the pool as far as nr_overcommit_hugepages allows. Of the node `preferred`,
    else of the other.
    """
    state = m.state
    h = hstate_of_order(order)
    head = NONE
    if reserved != U0 or state[h + H_FREE] != state[h + H_RESERVED]:  # available_huge_pages(), which wraps
        head = dequeue_any(m, h, preferred)
    if head == NONE:
        head = use_surplus(m, h, preferred, False)
    if head == NONE:
        return NONE
    state[h + H_RESERVED] -= reserved
    set_cgroup(m.ram, state, struct_page(m, head), U(CGROUP_ADDRESS))
    change(m.stats, GAUGE_HUGETLB_PAGES, 1 if h == state[R_HSTATE] else 0)
    charge_one(m, EVENT_HUGE_FOLIO_ALLOCATED)
    charge(m, EVENT_STRUCT_PAGE_BYTES, 28)
    return head


@outlined
def take_huge(m, order, reserved):
    """The same zeroed and with no reference, for a process."""
    head = alloc_hugetlb_folio(m, order, reserved, U0)
    if head != NONE:
        page = struct_page(m, head)
        m.ram[page + COUNTS] = PGTY_HUGETLB
        m.ram[page + FLAGS] |= PG_UPTODATE
        m.ram[page + PRIVATE] |= HUGETLB_MIGRATABLE
        zero_contents(m, head, U1 << order)
        charge(m, EVENT_FOLIO_ZEROED_PAGES, np.int64(U1 << order))
    return head


@outlined
def give_back_huge(m, head):
    """The last reference is gone: back to the pool, where the last page freed is the first one taken.

    mm/hugetlb.c:free_huge_folio(). A page of a pool with surplus pages on its node goes to the page allocator.
    """
    state = m.state
    h = hstate_of_order(order_of(m, head))
    page = struct_page(m, head)
    if is_anonymous(m, head):
        m.ram[page + FLAGS] &= ~PG_ANON_EXCLUSIVE
    m.ram[page + MAPPING] = U0
    m.ram[page + PRIVATE] &= ~HUGETLB_MIGRATABLE
    m.ram[page + COUNTS] = PGTY_HUGETLB
    set_cgroup(m.ram, state, page, U0)
    change(m.stats, GAUGE_HUGETLB_PAGES, -1 if h == state[R_HSTATE] else 0)
    charge_one(m, EVENT_HUGE_FOLIO_FREED)
    charge(m, EVENT_STRUCT_PAGE_BYTES, 36)
    free_or_enqueue(m, h, head)


@kernel
def _add_low(ram, word, n):
    """Add `n` (uint64, two's complement) to the low half of a word."""
    ram[word] = (ram[word] & ~LOW32) | (ram[word] + n & LOW32)


@kernel
def _change_mapcounts(m, head, n):
    """_entire_mapcount and _large_mapcount, where the kernel's version has them. mm/rmap.c, for HugeTLB."""
    second = struct_page(m, head) + U8
    _add_low(m.ram, second + U2, n)
    if m.state[R_FOLIO_6_12] != U0:
        m.ram[second + U2] += n << U32
    else:
        _add_low(m.ram, second + U3, n)
    charge_one(m, EVENT_RMAP_CHANGED)


@kernel
def huge_mapcount(m, head):
    """How many entries map a huge page."""
    return m.ram[struct_page(m, head) + U8 + U2] + U1 & LOW32


@kernel
def is_anonymous(m, head):
    """Whether a huge page belongs to private mappings and to no file: PAGE_MAPPING_ANON."""
    return m.ram[struct_page(m, head) + MAPPING] & U1 != U0


@kernel
def map_huge(m, head):
    """One more entry maps a huge page."""
    add_references(m.ram, struct_page(m, head), U1)
    _change_mapcounts(m, head, U1)


@outlined
def unmap_huge(m, head, entry):
    """One entry less; without any reference left the page goes to its pool. Returns 1 if it did.

    `entry`: what it was; the page is dirty if it was.
    """
    page = struct_page(m, head)
    if entry & (PTE_DIRTY | PTE_SAVED_DIRTY) != U0:  # huge_pte_dirty()
        m.ram[page + FLAGS] |= PG_DIRTY
    _change_mapcounts(m, head, NONE)
    add_references(m.ram, page, NONE)
    if reference_count(m.ram, page) == U0:
        give_back_huge(m, head)
        return U1
    return U0


@kernel
def move_anonymous(m, head, anon_vma):
    """folio_move_anon_rmap(), SetPageAnonExclusive(): folio->mapping names the anon_vma (a model address), bit 0 set,
    and the page is one mapping's alone."""
    page = struct_page(m, head)
    m.ram[page + MAPPING] = U(0xFFFF888100000000) | anon_vma << U12 | U1
    m.ram[page + FLAGS] |= PG_ANON_EXCLUSIVE


@kernel
def set_anonymous(m, head, anon_vma, index):
    """hugetlb_add_new_anon_rmap(). `index`: vma_index() of the address."""
    move_anonymous(m, head, anon_vma)
    m.ram[struct_page(m, head) + INDEX] = index


@kernel
def is_exclusive(m, head):
    """PageAnonExclusive() of a private page."""
    return m.ram[struct_page(m, head) + FLAGS] & PG_ANON_EXCLUSIVE != U0


@kernel
def duplicate_anonymous(m, head):
    """hugetlb_try_dup_anon_rmap(): fork maps a page once more, which is no mapping's alone any longer."""
    if is_anonymous(m, head):
        m.ram[struct_page(m, head) + FLAGS] &= ~PG_ANON_EXCLUSIVE
    map_huge(m, head)


@kernel
def add_to_file(m, head, inode, index, order):
    """hugetlb_add_to_page_cache(): one reference per base page, which are the page cache's; the page is dirty."""
    page = struct_page(m, head)
    m.ram[page + FLAGS] |= PG_DIRTY
    m.ram[page + MAPPING] = mapping_address(inode)
    m.ram[page + INDEX] = index
    add_references(m.ram, page, U1 << order)


@outlined
def remove_from_file(m, head):
    """The page cache lets go of a huge page; it goes to its pool unless something else holds it."""
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~(PG_UPTODATE | PG_DIRTY)
    m.ram[page + MAPPING] = U0
    add_references(m.ram, page, U0 - (U1 << order_of(m, head)))
    if reference_count(m.ram, page) == U0:
        give_back_huge(m, head)


@outlined
def copy_huge(m, target, source, order):
    """copy_user_large_folio(): the contents too, as far as there are any and frames for them. 0 or -1."""
    charge(m, EVENT_PAGE_COPIED, np.int64(U1 << order))
    if m.stats[STATS_GAUGES + GAUGE_CONTENT_FRAMES * U2] == 0:
        return np.int64(0)
    base = m.state[R_CONTENTS] - m.state[R_POOL_BASE]
    for i in range(U1 << order):
        old = U(m.counts[base + source + i])
        if old != U0:
            frame = take_frame(m)
            if frame == NONE:
                return np.int64(-1)
            copy_frame(m.ram, frame, old)
            m.counts[base + target + i] = np.uint32(frame)
            change(m.stats, GAUGE_CONTENT_FRAMES, 1)
    return np.int64(0)
