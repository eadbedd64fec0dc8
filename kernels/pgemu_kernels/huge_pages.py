"""HugeTLB pages that processes map: taken from the pool of their size, referenced, mapped, given back."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import LOW32, NONE, U0, U1, U2, U3, U8, U12, U32
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    CONTENT_FRAMES,
    FOLIO_ZEROED_PAGES,
    HUGE_FOLIO_ALLOCATED,
    HUGE_FOLIO_FREED,
    HUGETLB_PAGES,
    OTHER_POOL_FREE,
    PAGE_COPIED,
    POOL_FREE,
    RMAP_CHANGED,
    STRUCT_PAGE_BYTES,
    change,
    charge,
    charge_one,
)
from pgemu_kernels.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    INDEX,
    MAPPING,
    PG_DIRTY,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    add_references,
    reference_count,
    struct_page,
)
from pgemu_kernels.hugetlb import mapping_address
from pgemu_kernels.layout import (
    R_CONTENTS,
    R_FOLIO_6_12,
    R_ORDER,
    R_OTHER_BASE,
    R_OTHER_FREE,
    R_OTHER_ORDER,
    R_OTHER_PAGES,
    R_OTHER_RESERVED,
    R_OTHER_STACK,
    R_POOL_BASE,
    R_POOL_FREE,
    R_POOL_STACK,
    R_RESERVED,
    STATS_GAUGES,
)
from pgemu_kernels.memory import copy_frame, take_frame, zero_contents

U = np.uint64


@kernel
def level_of_order(order):
    """2 for order 9, 3 for order 18."""
    return U3 if order == U(18) else U2


@kernel
def _is_other(state, order):
    return order != state[R_ORDER]


@kernel
def free_register(state, order):
    """The register that counts a pool's free pages."""
    return R_OTHER_FREE if _is_other(state, order) else R_POOL_FREE


@kernel
def reserved_register(state, order):
    """The register that counts those of them that mappings have reserved."""
    return R_OTHER_RESERVED if _is_other(state, order) else R_RESERVED


@kernel
def order_of(state, head):
    """Order of the pool that a head page belongs to."""
    base = state[R_OTHER_BASE]
    inside = head >= base and head < base + (state[R_OTHER_PAGES] << state[R_OTHER_ORDER])
    return state[R_OTHER_ORDER] if inside else state[R_ORDER]


@kernel
def may_reserve(state, order, pages):
    """Whether the pool has `pages` that nobody has reserved. No size without a pool has any."""
    if order != state[R_ORDER] and order != state[R_OTHER_ORDER]:
        return pages == U0
    return state[reserved_register(state, order)] + pages <= state[free_register(state, order)]


@outlined
def take_huge(m, order, reserved):
    """A zeroed huge page with no reference, its head; NONE when the pool has none left.

    `reserved` (0 or 1): the caller has a reservation, which is used up. mm/hugetlb.c:alloc_hugetlb_folio().
    """
    state = m.state
    if reserved == U0 and not may_reserve(state, order, U1):
        return NONE
    register = free_register(state, order)
    top = state[register]
    if top == U0:
        return NONE
    other = _is_other(state, order)
    state[register] = top - U1
    state[reserved_register(state, order)] -= reserved
    head = state[state[R_OTHER_STACK if other else R_POOL_STACK] + top - U1]
    page = struct_page(m, head)
    m.ram[page + PRIVATE] &= ~HUGETLB_FREED
    m.ram[page + COUNTS] = PGTY_HUGETLB
    m.ram[page + FLAGS] |= PG_UPTODATE
    change(m.stats, OTHER_POOL_FREE if other else POOL_FREE, -1)
    change(m.stats, HUGETLB_PAGES, 0 if other else 1)
    zero_contents(m, head, U1 << order)
    charge_one(m, HUGE_FOLIO_ALLOCATED)
    charge(m, FOLIO_ZEROED_PAGES, np.int64(U1 << order))
    charge(m, STRUCT_PAGE_BYTES, 28)
    return head


@outlined
def give_back_huge(m, head):
    """The last reference is gone: back to the pool, where the last page freed is the first one taken.

    mm/hugetlb.c:free_huge_folio(), enqueue_hugetlb_folio().
    """
    state = m.state
    order = order_of(state, head)
    other = _is_other(state, order)
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~(PG_UPTODATE | PG_DIRTY)
    m.ram[page + MAPPING] = U0
    m.ram[page + INDEX] = U0
    m.ram[page + PRIVATE] |= HUGETLB_FREED
    m.ram[page + COUNTS] = PGTY_HUGETLB
    register = free_register(state, order)
    top = state[register]
    state[state[R_OTHER_STACK if other else R_POOL_STACK] + top] = head
    state[register] = top + U1
    change(m.stats, OTHER_POOL_FREE if other else POOL_FREE, 1)
    change(m.stats, HUGETLB_PAGES, 0 if other else -1)
    charge_one(m, HUGE_FOLIO_FREED)
    charge(m, STRUCT_PAGE_BYTES, 36)


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
    charge_one(m, RMAP_CHANGED)


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
def unmap_huge(m, head):
    """One entry less; without any reference left the page goes to its pool. Returns 1 if it did."""
    page = struct_page(m, head)
    _change_mapcounts(m, head, NONE)
    add_references(m.ram, page, NONE)
    if reference_count(m.ram, page) == U0:
        give_back_huge(m, head)
        return U1
    return U0


@kernel
def set_anonymous(m, head, anon_vma, index):
    """hugetlb_add_new_anon_rmap(): folio->mapping names the anon_vma (a model address), bit 0 set."""
    page = struct_page(m, head)
    m.ram[page + MAPPING] = U(0xFFFF888100000000) | anon_vma << U12 | U1
    m.ram[page + INDEX] = index


@kernel
def add_to_file(m, head, inode, index, order):
    """hugetlb_add_to_page_cache(): one reference per base page, which are the page cache's."""
    page = struct_page(m, head)
    m.ram[page + MAPPING] = mapping_address(inode)
    m.ram[page + INDEX] = index
    add_references(m.ram, page, U1 << order)


@outlined
def remove_from_file(m, head):
    """The page cache lets go of a huge page; it goes to its pool unless something else holds it."""
    page = struct_page(m, head)
    m.ram[page + MAPPING] = U0
    add_references(m.ram, page, U0 - (U1 << order_of(m.state, head)))
    if reference_count(m.ram, page) == U0:
        give_back_huge(m, head)


@outlined
def copy_huge(m, target, source, order):
    """copy_user_large_folio(): the contents too, as far as there are any and frames for them. 0 or -1."""
    charge(m, PAGE_COPIED, np.int64(U1 << order))
    if m.stats[STATS_GAUGES + CONTENT_FRAMES * U2] == 0:
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
            change(m.stats, CONTENT_FRAMES, 1)
    return np.int64(0)


@kernel
def discard_huge(m, head):
    """A huge page that nobody came to reference goes back."""
    give_back_huge(m, head)
