"""A page that memory failure had is good again. mm/memory-failure.c:unpoison_memory()"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U511
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.frames import put_frame
from pgemu_kernels.folios.counts import pin_count
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    MAPPING,
    NO_MAPCOUNT,
    ONE_CACHED,
    PRIVATE,
    add_references,
    mappings,
    order_of,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.huge_pages import give_back_huge
from pgemu_kernels.folios.hugetlb import head_of
from pgemu_kernels.folios.page_allocator import has_poison, mark_free
from pgemu_kernels.folios.poison import (
    count_poisoned,
    forget_poison,
    hold_by_failure,
    is_folio_poisoned,
    is_held_by_failure,
)
from pgemu_kernels.gmem.references import drop, is_designs, transient
from pgemu_kernels.words.operations import EBUSY, ENXIO, EOPNOTSUPP
from pgemu_kernels.words.registers import R_FRAMES, R_HW_FAILURE, R_HWPOISON, R_ORDER, R_POISONED_FRAMES
from pgemu_kernels.words.rows import PAGE_POISONED

U = np.uint64


@outlined
def unpoison_huge(m, head):
    """unpoison_memory() of a HugeTLB page: 0 or -EBUSY."""
    page = struct_page(m, head)
    pages = U1 << order_of(m, head)
    ours = is_designs(m, head, page)
    if not is_folio_poisoned(m, head):
        return np.int64(-EBUSY)
    free = m.ram[page + PRIVATE] & HUGETLB_FREED != U0
    held = transient(m, head) != U0 or pin_count(m.ram, page) != U0  # then its one reference is not memory failure's
    if not free and (held or reference_count(m.ram, page) > U1 or m.ram[page + MAPPING] != U0):
        return np.int64(-EBUSY)
    forget_poison(m, head, pages)
    if not free and ours and is_held_by_failure(m, head):
        hold_by_failure(m, head, U0)
        drop(m, head, U1)
    elif not free and not ours and reference_count(m.ram, page) == U1:
        add_references(m.ram, page, ~U0)
        give_back_huge(m, head)
    return np.int64(0)


@outlined
def unpoison_in_zone(m, pfn):
    """The same of a frame with a struct page: 0 or -EBUSY."""
    state = m.state
    head = head_of(m, pfn)
    if head != NONE:
        return unpoison_huge(m, head)
    page = struct_page(m, pfn)
    if not is_folio_poisoned(m, pfn) or reference_count(m.ram, page) > U1:
        return np.int64(-EBUSY)
    if mappings(m.ram, page) != U0 or m.ram[page + MAPPING] != U0:
        return np.int64(-EBUSY)
    m.ram[page + FLAGS] &= ~state[R_HWPOISON]
    count_poisoned(state, ~U0)
    if is_held_by_failure(m, pfn):
        hold_by_failure(m, pfn, U0)
        drop(m, pfn, U1)
    elif state[R_ORDER] != U0 and m.ram[page + COUNTS] == ONE_CACHED and not has_poison(m, pfn & ~U511):
        m.ram[page + COUNTS] = NO_MAPCOUNT
        mark_free(m, pfn & ~U511)
    return np.int64(0)


@outlined
def unpoison_ordinary(m, pfn):
    """The same of a frame of ordinary memory."""
    state = m.state
    word = U(m.counts[pfn])
    if state[R_POISONED_FRAMES] == U0 or word != PAGE_POISONED:
        return np.int64(-EBUSY)
    m.counts[pfn] = np.uint32(0)
    state[R_POISONED_FRAMES] -= U1
    count_poisoned(state, ~U0)
    put_frame(m, pfn)
    return np.int64(0)


@outlined
def unpoison_memory(m, pfn):
    """unpoison_memory(): 0; -EBUSY of a page that is not poisoned, or that anybody but memory failure holds;
    -EOPNOTSUPP after a failure that was not injected; -ENXIO without a struct page."""
    state = m.state
    if not in_zone(state, pfn) and pfn >= state[R_FRAMES]:
        return np.int64(-ENXIO)
    if state[R_HWPOISON] == U0 or state[R_HW_FAILURE] != U0:
        return np.int64(-EOPNOTSUPP)
    return unpoison_in_zone(m, pfn) if in_zone(state, pfn) else unpoison_ordinary(m, pfn)
