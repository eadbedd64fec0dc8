"""Large folios of anonymous memory: 2M of the page allocator, counted by page and by folio in their struct pages.

mm/rmap.c, include/linux/rmap.h with CONFIG_PAGE_MAPCOUNT; struct folio of include/linux/mm_types.h. A folio is mapped
by 2M leaves (_entire_mapcount), by 4K entries (_mapcount of each page), or by both; each mapping holds a reference.
Not modelled: LRU lists and their generations in the flags, the queue of folios that wait to be split under memory
pressure (the flag that says so and its count are), memcg.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U2, U3, U4, U8, U9, U32, U63, U511, U512
from pgemu_kernels.engine.charge import change, change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, fill_frame, zero_contents
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    MAPPING,
    NO_MAPCOUNT,
    ONE_REFERENCE,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_HEAD,
    PG_UPTODATE,
    add_references,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.large_folios import head_and_order, make_folio
from pgemu_kernels.folios.page_allocator import free_pages, take_pages
from pgemu_kernels.words.enum_words import (
    EVENT_FOLIO_ZEROED_PAGES,
    EVENT_HUGE_FOLIO_ALLOCATED,
    EVENT_HUGE_FOLIO_FREED,
    EVENT_RMAP_CHANGED,
    GAUGE_ANON_HUGE_PAGES,
    GAUGE_CONTENT_FRAMES,
)
from pgemu_kernels.words.registers import (
    R_CONTENTS,
    R_FOLIO_6_12,
    R_GUEST_PAGES,
    R_HUGE_ANONYMOUS,
    R_HUGE_ZERO_FRAME,
    R_LARGE_MAPPED,
    R_NODES,
    R_POOL_BASE,
    R_THP_DEFERRED_SPLIT,
    R_THP_ZERO_PAGE_ALLOC,
)

U = np.uint64
PG_LRU = U(1 << 5)
PG_SWAPBACKED = U(1 << 17)
PG_LARGE_RMAPPABLE = U(1 << 9)  # of the second struct page
PG_PARTIALLY_MAPPED = U(1 << 16)  # of the second struct page: it waits to be split, for some of it is mapped no more
ENTIRELY_MAPPED = U(0x800000)  # in _nr_pages_mapped: by a 2M leaf
_SHARED = U1 << U63  # FOLIO_MM_IDS_SHARED_BIT in _mm_ids
_ID = U((1 << 31) - 1)
_MAPCOUNTS = U4  # _mm_id_mapcount[2], less one, in the second struct page
_IDS = U(5)  # _mm_id[2]


@kernel
def is_large_anonymous(state, pfn):
    """Whether a frame that anonymous memory maps is a page of a large folio, not one of ordinary memory."""
    return pfn - state[R_POOL_BASE] < state[R_GUEST_PAGES]


@kernel
def compound_head(m, pfn):
    """compound_head() of a page of a large folio."""
    head, _order = head_and_order(m, pfn)
    return head


@kernel
def is_of_anonymous_folio(m, pfn):
    """Whether a frame of the HugeTLB zone is of a large folio of anonymous memory, or of the huge zero page."""
    if m.state[R_HUGE_ANONYMOUS] == U0:
        return False
    page = struct_page(m, pfn & ~U511)
    if pfn & ~U511 == m.state[R_HUGE_ZERO_FRAME]:
        return True
    anonymous = m.ram[page + FLAGS] & (PG_HEAD | PG_SWAPBACKED) == PG_HEAD | PG_SWAPBACKED
    return anonymous and m.ram[page + MAPPING] & U1 != U0


# --------------------------------------------------------------------------- words of struct folio


@kernel
def _add_half(ram, word, high, n):
    """Add `n` (uint64, two's complement) to the low or the high half of a word: what it is then, 32 bits."""
    shift = U32 if high else U0
    value = ((ram[word] >> shift) + n) & LOW32
    ram[word] = (ram[word] & ~(LOW32 << shift)) | value << shift
    return value


@kernel
def _change_large(ram, second, n):
    """_large_mapcount, which is one less than the mappings, changes by `n`."""
    return _add_half(ram, second + U2, False, n)


@kernel
def _change_entire(m, second, n):
    """_entire_mapcount, less one."""
    old = m.state[R_FOLIO_6_12] != U0
    return _add_half(m.ram, second + (U2 if old else U3), old, n)


@kernel
def _change_pages_mapped(m, second, n):
    """_nr_pages_mapped."""
    old = m.state[R_FOLIO_6_12] != U0
    return _add_half(m.ram, second + (U3 if old else U2), not old, n)


@kernel
def large_mapcount(ram, page):
    """folio_large_mapcount(): entries of all levels that map a large folio; `page` is its head's index in `ram`."""
    return ram[page + U8 + U2] + U1 & LOW32


@kernel
def entire_mapcount(m, page):
    """folio_entire_mapcount(): 2M leaves that map it."""
    if m.state[R_FOLIO_6_12] != U0:
        return (m.ram[page + U8 + U2] >> U32) + U1 & LOW32
    return m.ram[page + U8 + U3] + U1 & LOW32


@kernel
def pages_mapped(m, page):
    """folio->_nr_pages_mapped."""
    return m.ram[page + U8 + U3] & LOW32 if m.state[R_FOLIO_6_12] != U0 else m.ram[page + U8 + U2] >> U32


@kernel
def _slot_of_mm(ram, second, number):
    """Which of a folio's two slots has a process's number (mm_id): 0, 1, or 2 for neither."""
    ids = ram[second + _IDS]
    if ids & _ID == number:
        return U0
    return U1 if (ids >> U32) & _ID == number else U2


@kernel
def _set_id(ram, second, slot, number):
    shift = U32 if slot == U1 else U0
    ram[second + _IDS] = (ram[second + _IDS] & ~(_ID << shift)) | number << shift


@outlined
def _add_of_mm(m, second, space, n):
    """folio_add_return_large_mapcount(): `n` more mappings, by a process. 6.12 does not tell whose they are."""
    ram = m.ram
    now = _change_large(ram, second, n)
    if m.state[R_FOLIO_6_12] != U0:
        return
    slot = _slot_of_mm(ram, second, space + U1)
    if slot != U2:
        _add_half(ram, second + _MAPCOUNTS, slot == U1, n)
        return
    slot = _slot_of_mm(ram, second, U0)
    if slot == U2:
        return
    _set_id(ram, second, slot, space + U1)
    _add_half(ram, second + _MAPCOUNTS, slot == U1, n)
    if slot == U1 or now != n - U1:
        ram[second + _IDS] |= _SHARED


@outlined
def _remove_of_mm(m, second, space, n):
    """folio_sub_return_large_mapcount(): the folio is one process's alone again where a slot has all mappings."""
    ram = m.ram
    now = _change_large(ram, second, U0 - n)
    if m.state[R_FOLIO_6_12] != U0:
        return
    slot = _slot_of_mm(ram, second, space + U1)
    if slot != U2:
        if _add_half(ram, second + _MAPCOUNTS, slot == U1, U0 - n) != LOW32:
            return
        _set_id(ram, second, slot, U0)
    counts = ram[second + _MAPCOUNTS]
    if counts & LOW32 == now or counts >> U32 == now:
        ram[second + _IDS] &= ~_SHARED


@kernel
def mapped_by_one(ram, page):
    """Mappings of the process that has the more of a large folio's two slots, from 6.15 on."""
    counts = ram[page + U8 + _MAPCOUNTS]
    return max(counts + U1 & LOW32, (counts >> U32) + U1 & LOW32)


@kernel
def maybe_mapped_shared(ram, page):
    """folio_test_large_maybe_mapped_shared(), from 6.15 on."""
    return ram[page + U8 + _IDS] & _SHARED != U0


# --------------------------------------------------------------------------- allocation and the end


@outlined
def _take(m):
    """2M of the page allocator as a folio with one reference and no mapping, zeroed: its head, or NONE."""
    head = take_pages(m, U9, U0)
    if head == NONE and m.state[R_NODES] > U1:
        head = take_pages(m, U9, U1)
    if head == NONE:
        return NONE
    zero_contents(m, head, U512)
    make_folio(m, head, U9, U0, U0, U0)
    page = struct_page(m, head)
    m.ram[page + COUNTS] = NO_MAPCOUNT | ONE_REFERENCE
    m.ram[page + U8 + _IDS] = U0
    charge_one(m, EVENT_HUGE_FOLIO_ALLOCATED)
    charge(m, EVENT_FOLIO_ZEROED_PAGES, 512)
    return head


@outlined
def take_large_anonymous(m, anon_vma, index):
    """vma_alloc_anon_folio_pmd() and folio_add_new_anon_rmap() but for the mapping: the head, or NONE.

    `anon_vma`: its number; `index`: linear_page_index() of the address.
    """
    head = _take(m)
    if head != NONE:
        page = struct_page(m, head)
        m.ram[page + FLAGS] |= PG_UPTODATE | PG_SWAPBACKED | PG_LRU
        m.ram[page + U8 + FLAGS] |= PG_LARGE_RMAPPABLE
        set_anon_vma(m, head, anon_vma)
        m.ram[page + U4] = index
    return head


@kernel
def set_anon_vma(m, head, anon_vma):
    """folio_move_anon_rmap(): folio->mapping names the anon_vma (a model address), bit 0 set."""
    m.ram[struct_page(m, head) + MAPPING] = U(0xFFFF888100000000) | anon_vma << U(12) | U1


@outlined
def huge_zero_page(m):
    """get_huge_zero_folio(): the first frame of the huge zero page, which stays, or NONE. mm/huge_memory.c

    That its last user may go, and it with him under memory pressure, is not modelled.
    """
    state = m.state
    if state[R_HUGE_ZERO_FRAME] == U0:
        head = _take(m)
        if head == NONE:
            return NONE
        state[R_HUGE_ZERO_FRAME] = head
        state[R_THP_ZERO_PAGE_ALLOC] += U1
    return state[R_HUGE_ZERO_FRAME]


@outlined
def put_large(m, head, n):
    """folio_put_refs(): the folio goes to the page allocator with its last reference; whether it did."""
    page = struct_page(m, head)
    add_references(m.ram, page, U0 - n)
    if reference_count(m.ram, page) != U0:
        return False
    m.ram[page + U8 + FLAGS] &= ~(PG_LARGE_RMAPPABLE | PG_PARTIALLY_MAPPED)
    charge_one(m, EVENT_HUGE_FOLIO_FREED)
    free_pages(m, head, U9, False)
    return True


# --------------------------------------------------------------------------- mappings


@outlined
def defer_split(m, head):
    """deferred_split_folio(): pages lost their last mapping; whether others of the folio still have one."""
    page = struct_page(m, head)
    waits = m.ram[page + U8 + FLAGS] & PG_PARTIALLY_MAPPED != U0
    if U0 < pages_mapped(m, page) < ENTIRELY_MAPPED and not waits:
        m.ram[page + U8 + FLAGS] |= PG_PARTIALLY_MAPPED
        m.state[R_THP_DEFERRED_SPLIT] += U1


@outlined
def add_rmap_pmd(m, head, space):
    """folio_add_anon_rmap_pmd(): a process's 2M leaf maps the folio; its reference is the caller's to take."""
    page = struct_page(m, head)
    _add_of_mm(m, page + U8, space, U1)
    if _change_entire(m, page + U8, U1) == U0:
        mapped = _change_pages_mapped(m, page + U8, ENTIRELY_MAPPED)
        m.state[R_LARGE_MAPPED] += U512 + ENTIRELY_MAPPED - mapped
        change_value(m.stats, GAUGE_ANON_HUGE_PAGES, 1)
    charge_one(m, EVENT_RMAP_CHANGED)


@outlined
def remove_rmap_pmd(m, head, space):
    """folio_remove_rmap_pmd(): one 2M leaf less."""
    page = struct_page(m, head)
    _remove_of_mm(m, page + U8, space, U1)
    if _change_entire(m, page + U8, NONE) == LOW32:
        left = _change_pages_mapped(m, page + U8, U0 - ENTIRELY_MAPPED)
        m.state[R_LARGE_MAPPED] -= U512 - left
        change_value(m.stats, GAUGE_ANON_HUGE_PAGES, -1)
        if left < U512:
            defer_split(m, head)
    charge_one(m, EVENT_RMAP_CHANGED)


@outlined
def add_rmap_ptes(m, head, pfn, n, space, exclusive):
    """folio_add_anon_rmap_ptes(), folio_try_dup_anon_rmap_ptes(): 4K entries of a process map `n` pages from `pfn` on.

    `exclusive`: each page is that mapping's alone; else none is.
    """
    ram = m.ram
    fresh = U0
    second = struct_page(m, head) + U8
    for i in range(n):
        page = struct_page(m, pfn + i)
        if _add_half(ram, page + COUNTS, False, U1) == U0:
            fresh += U1
        ram[page + FLAGS] = ram[page + FLAGS] & ~PG_ANON_EXCLUSIVE | (PG_ANON_EXCLUSIVE if exclusive else U0)
    if _change_pages_mapped(m, second, fresh) < ENTIRELY_MAPPED:
        m.state[R_LARGE_MAPPED] += fresh
    _add_of_mm(m, second, space, n)
    charge(m, EVENT_RMAP_CHANGED, np.int64(n))


@outlined
def remove_rmap_ptes(m, head, pfn, n, space):
    """folio_remove_rmap_ptes() but for defer_split(): the entries that map `n` pages from `pfn` on are gone.

    Returns whether one of them was a page's last.
    """
    first = struct_page(m, head)
    last = U0
    _remove_of_mm(m, first + U8, space, n)
    for i in range(n):
        if _add_half(m.ram, struct_page(m, pfn + i) + COUNTS, False, NONE) == LOW32:
            last += U1
    if _change_pages_mapped(m, first + U8, U0 - last) < ENTIRELY_MAPPED:
        m.state[R_LARGE_MAPPED] -= last
    charge(m, EVENT_RMAP_CHANGED, np.int64(n))
    return last != U0


# --------------------------------------------------------------------------- pages


@kernel
def is_page_exclusive(m, pfn):
    """PageAnonExclusive() of a page of a large folio; of a 2M leaf it is that of the head."""
    return m.ram[struct_page(m, pfn) + FLAGS] & PG_ANON_EXCLUSIVE != U0


@kernel
def set_page_exclusive(m, pfn, exclusive):
    """SetPageAnonExclusive(), or ClearPageAnonExclusive()."""
    page = struct_page(m, pfn)
    m.ram[page + FLAGS] = m.ram[page + FLAGS] & ~PG_ANON_EXCLUSIVE | (PG_ANON_EXCLUSIVE if exclusive else U0)


@kernel
def set_large_dirty(m, pfn):
    """folio_set_dirty() of the folio around a page."""
    m.ram[struct_page(m, compound_head(m, pfn)) + FLAGS] |= PG_DIRTY


@kernel
def contents_of_large(m, pfn):
    """The frame that has the contents of a page of a large folio, or 0 where it holds zeroes."""
    return U(m.counts[m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]])


@kernel
def put_contents(m, pfn, frame):
    """A frame, taken by the caller, has the contents of a page that had none."""
    m.counts[m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]] = np.uint32(frame)
    change(m.stats, GAUGE_CONTENT_FRAMES, 1)


@outlined
def copy_from_large(m, frame, pfn):
    """The contents of a page of a large folio into a frame of ordinary memory."""
    old = contents_of_large(m, pfn)
    if old == U0:
        fill_frame(m.ram, frame, U0)
    else:
        copy_frame(m.ram, frame, old)
