"""Memory failure, by the path that the kernel takes for each kind of page. mm/memory-failure.c

What is done stands in the record STATE_FAILURE. A page that memory failure has handled keeps the reference that it took
until it is unpoisoned, so that it stays out of use when everybody else has let go of it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import clear_words, inode_row
from pgemu_kernels.folios.anonymous_folios import is_of_anonymous_folio
from pgemu_kernels.folios.buddy import take_page_off_buddy
from pgemu_kernels.folios.demotion import dissolve_free_hugetlb_folio
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    HUGETLB_MIGRATABLE,
    INDEX,
    MAPPING,
    ONE_CACHED,
    PG_DIRTY,
    PRIVATE,
    add_references,
    mappings,
    order_of,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hstate import hstate_of_order, in_zone
from pgemu_kernels.folios.huge_pages import give_back_huge, huge_mapcount, is_anonymous, level_of_order
from pgemu_kernels.folios.hugetlb import head_of, inode_at
from pgemu_kernels.folios.large_folios import head_and_order, split_to_pages
from pgemu_kernels.folios.page_allocator import is_block_free, take_block_at
from pgemu_kernels.folios.page_cache import cache_find, cache_next
from pgemu_kernels.folios.poison import (
    count_poisoned,
    hold_by_failure,
    is_folio_poisoned,
    poison,
)
from pgemu_kernels.gmem.large_holes import unmap_folio
from pgemu_kernels.gmem.lru import lru_drain_all
from pgemu_kernels.gmem.references import is_designs
from pgemu_kernels.process.memory_failure import (
    count_failure,
    kill_procs_of_file,
    maps_page,
    stage2_leaves,
    tell,
    unmap_anonymous_page,
    unmap_file_page,
    unmap_huge_page,
)
from pgemu_kernels.stage2.invalidate import begin_range, end_range, flush_vms, zap_range
from pgemu_kernels.stage2.notifier import notify_inode
from pgemu_kernels.words.enum_words import (
    GAUGE_ANONYMOUS_PAGES,
    GAUGE_BLOCKS_ZOMBIE,
    MF_PAGE_BUDDY,
    MF_PAGE_CLEAN_LRU,
    MF_PAGE_CLEAN_UNEVICTABLE_LRU,
    MF_PAGE_DIRTY_LRU,
    MF_PAGE_DIRTY_UNEVICTABLE_LRU,
    MF_PAGE_FREE_HUGE,
    MF_PAGE_GET_HWPOISON,
    MF_PAGE_HUGE,
    MF_PAGE_PFN_MAP,
    MF_PAGE_TRUNCATED_LRU,
    MF_PAGE_UNSPLIT_THP,
    MF_RESULT_DELAYED,
    MF_RESULT_FAILED,
    MF_RESULT_IGNORED,
    MF_RESULT_NONE,
    MF_RESULT_RECOVERED,
)
from pgemu_kernels.words.operations import EBUSY, EHWPOISON, ENXIO, EOPNOTSUPP
from pgemu_kernels.words.registers import (
    R_FAILURE_HUGE,
    R_FAILURE_PFN,
    R_FRAMES,
    R_HWPOISON,
    R_INODES,
    R_MF_DELAYED,
    R_ORDER,
    R_PINNED_ALONE,
    R_POISONED_FRAMES,
    R_ZERO_FRAME,
)
from pgemu_kernels.words.rows import (
    FILTER_BOTH,
    I_CACHE,
    I_FLAGS,
    I_KIND,
    I_LOCK,
    I_REFERENCES,
    INODE_GUEST_MEMFD_4K,
    INODE_SHMEM,
    LOCK_WRITER,
    MF_ACTION,
    MF_DROPPED,
    MF_PFN,
    MF_STAGE2,
    MF_STATUS,
    MF_TYPE,
    MF_WORDS,
    PAGE_DIRTY,
    PAGE_MAPPINGS,
    PAGE_PINNED,
    PAGE_POISONED,
    STATE_FAILURE,
)

U = np.uint64
NOBODY = NONE  # no process met the error itself


# --------------------------------------------------------------------------- the record


@kernel
def begin_record(state, pfn):
    clear_words(state, STATE_FAILURE, U(MF_WORDS))
    state[STATE_FAILURE + MF_PFN] = pfn
    state[STATE_FAILURE + MF_ACTION] = MF_RESULT_NONE


@kernel
def action_result(m, page_type, action):
    """action_result(): 0 of what was recovered or delayed, else -EBUSY."""
    m.state[STATE_FAILURE + MF_TYPE] = page_type
    m.state[STATE_FAILURE + MF_ACTION] = action
    return np.int64(0 if action == MF_RESULT_RECOVERED or action == MF_RESULT_DELAYED else -EBUSY)


@outlined
def already_poisoned(m, pfn, required):
    """-EHWPOISON of a page that was poisoned before; a process that met it and maps it gets SIGBUS."""
    address = U0 if required == NOBODY else maps_page(m, required, pfn)
    if address != U0:
        tell(m, required, address, U12, required, False)
    return np.int64(-EHWPOISON)


# --------------------------------------------------------------------------- the designs' folios


@outlined
def error_remove_folio(m, inode, first, last):
    """kvm_gmem_error_folio(): stage 2 loses the folio's pages, the file keeps them: whether it did.

    The invalidate_lock is only tried (kvm-x86 ad06cf5338bc); where a conversion or a hole holds it nothing is dropped,
    and the guest goes on reading what is poisoned until its leaf goes. Before, it was waited for.
    """
    if m.state[inode_row(inode) + I_LOCK] >= LOCK_WRITER:
        return False
    begin_range(m, inode, first, last)
    before = stage2_leaves(m.stats)
    zap_range(m, inode, first, last, FILTER_BOTH)
    count_failure(m.state, MF_STAGE2, U(before - stage2_leaves(m.stats)))
    flush_vms(m)
    end_range(m, inode, first, last)
    return True


@kernel
def truncated(m, zapped, extra):
    """truncate_error_folio() of guest_memfd, which returns MF_DELAYED, and has_extra_refcount(): what page_action()
    says.

    Up to 7.3 MF_DELAYED counts as a failure to punch the page; from v6 of "Fix MF_DELAYED handling on truncation during
    failure" (R_MF_DELAYED) it is what it says, and the page cache's references are expected.
    """
    if m.state[R_MF_DELAYED] != U0 and zapped and not extra:
        return MF_RESULT_DELAYED
    return MF_RESULT_FAILED


@outlined
def fail_small(m, inode, index, pfn, required, early):
    """A 4K folio of guest_memfd, as merged, or a piece of a huge page: its entries are replaced, stage 2 loses it, the
    file keeps it.

    Entries that no folio counts are not found, for its mapcount is 0: hwpoison_user_mappings() (captured).
    """
    page = struct_page(m, pfn)
    add_references(m.ram, page, U1)
    hold_by_failure(m, pfn, U1)
    if mappings(m.ram, page) != U0:
        unmap_file_page(m, inode, index, pfn)
        if m.ram[page + FLAGS] & PG_DIRTY != U0:
            kill_procs_of_file(m, inode, index, U12, required, early)
    dirty = m.ram[page + FLAGS] & PG_DIRTY != U0
    zapped = error_remove_folio(m, inode, index, index + U1)
    extra = reference_count(m.ram, page) > U2
    kind = MF_PAGE_DIRTY_UNEVICTABLE_LRU if dirty else MF_PAGE_CLEAN_UNEVICTABLE_LRU
    return action_result(m, kind, truncated(m, zapped, extra))


@outlined
def split_large(m, inode, pfn):
    """try_to_split_thp_page() of a folio of 2M of guest_memfd: every page becomes a folio. False where it is held."""
    head, order = head_and_order(m, pfn)
    page = struct_page(m, head)
    if reference_count(m.ram, page) != U1 << order:
        return False
    before = stage2_leaves(m.stats)
    dropped = unmap_folio(m, inode, head, m.ram[page + INDEX], U1 << order)
    count_failure(m.state, MF_DROPPED, dropped)
    count_failure(m.state, MF_STAGE2, U(before - stage2_leaves(m.stats)))
    split_to_pages(m, head, order)
    return True


@outlined
def fail_designs_page(m, pfn, required, early, counted):
    """memory_failure() of a page of the designs' files that is no HugeTLB page. `counted`: a reference was there."""
    state = m.state
    head, order = head_and_order(m, pfn)
    inode = inode_at(m, head)
    index = m.ram[struct_page(m, head) + INDEX] + (pfn - head)
    if is_folio_poisoned(m, pfn):
        return already_poisoned(m, pfn, required)
    m.ram[struct_page(m, pfn) + FLAGS] |= state[R_HWPOISON]
    count_poisoned(state, U1)
    if state[R_ORDER] != U0 and state[R_FAILURE_HUGE] == U0 and not counted:
        # RFC v2 keeps pieces off the LRU lists, and what is in none is not handled: HWPoisonHandlable().
        return action_result(m, MF_PAGE_GET_HWPOISON, MF_RESULT_IGNORED)
    lru_drain_all(m)  # shake_folio()
    if order != U0 and not split_large(m, inode, pfn):
        action_result(m, MF_PAGE_UNSPLIT_THP, MF_RESULT_FAILED)
        return np.int64(-EHWPOISON)
    return fail_small(m, inode, index, pfn, required, early)


# --------------------------------------------------------------------------- HugeTLB pages


@outlined
def free_huge_failed(m, head, pfn):
    """__page_handle_poison() of a free huge page: it leaves its pool, the 2M block with the page stays out."""
    status = dissolve_free_hugetlb_folio(m, hstate_of_order(order_of(m, head)), head)
    if status != 0:
        return MF_RESULT_FAILED
    m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED  # page_ref_inc()
    return MF_RESULT_RECOVERED


@outlined
def fail_designs_huge(m, head):
    """me_huge_page() of a whole huge page of guest_memfd, or of a 2M piece: stage 2 loses all of it.

    Nobody is found who maps it: an entry of a folio there is none, and others it does not count.
    """
    state = m.state
    page = struct_page(m, head)
    pages = U1 << order_of(m, head)
    add_references(m.ram, page, U1)
    hold_by_failure(m, head, U1)
    first = m.ram[page + INDEX]
    zapped = error_remove_folio(m, inode_at(m, head), first, first + pages)
    extra = reference_count(m.ram, page) > pages + U1
    state[STATE_FAILURE + MF_TYPE] = MF_PAGE_HUGE
    return action_result(m, MF_PAGE_HUGE, truncated(m, zapped, extra))


@outlined
def fail_mapped_huge(m, head, pfn, required, early):
    """me_huge_page() of a page of hugetlbfs, which the file keeps, or of private memory, which leaves its pool."""
    page = struct_page(m, head)
    order = order_of(m, head)
    add_references(m.ram, page, U1)
    if huge_mapcount(m, head) != U0:
        unmap_huge_page(m, head, level_of_order(order), required, early)
    if m.ram[page + MAPPING] != U0 and not is_anonymous(m, head):
        extra = reference_count(m.ram, page) > (U1 << order) + U1
        return action_result(m, MF_PAGE_HUGE, MF_RESULT_FAILED if extra else MF_RESULT_RECOVERED)
    add_references(m.ram, page, ~U0)
    if reference_count(m.ram, page) != U0:
        return action_result(m, MF_PAGE_HUGE, MF_RESULT_FAILED)
    give_back_huge(m, head)
    return action_result(m, MF_PAGE_HUGE, free_huge_failed(m, head, pfn))


@outlined
def fail_huge(m, head, pfn, required, early, counted):
    """try_memory_failure_hugetlb(): all of a huge page is poisoned, and which of its pages it was is noted.

    One that is in use and not migratable is marked and left alone: __get_huge_page_for_hwpoison(). hugetlbfs sets that
    flag at its faults; whether guest_memfd does nobody has said (R_FAILURE_HUGE).
    """
    state = m.state
    page = struct_page(m, head)
    before = is_folio_poisoned(m, head)
    status = poison(m, head, pfn)
    if before or status == -EBUSY:
        return already_poisoned(m, head, required)
    if status != 0:
        return status
    if m.ram[page + PRIVATE] & HUGETLB_FREED != U0:
        return action_result(m, MF_PAGE_FREE_HUGE, free_huge_failed(m, head, pfn))
    if is_designs(m, head, page) and m.ram[page + MAPPING] != U0:
        if state[R_FAILURE_HUGE] != U0 or counted:
            return fail_designs_huge(m, head)
    elif m.ram[page + PRIVATE] & HUGETLB_MIGRATABLE != U0:
        return fail_mapped_huge(m, head, pfn, required, early)
    return action_result(m, MF_PAGE_GET_HWPOISON, MF_RESULT_IGNORED)


# --------------------------------------------------------------------------- other pages with a struct page


@outlined
def fail_free(m, pfn):
    """A free page of the page allocator: take_page_off_buddy(). Of blocks of 2M all of it stays out, an inference."""
    if m.state[R_ORDER] == U0:
        if not take_page_off_buddy(m, pfn):
            return False
        hold_by_failure(m, pfn, U1)
        change(m.stats, GAUGE_BLOCKS_ZOMBIE, 1)
        return True
    if not is_block_free(m.state, pfn):
        return False
    take_block_at(m, pfn)
    m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED
    return True


@outlined
def fail_in_zone(m, pfn, required, early, counted):
    """memory_failure() of a frame that has a struct page."""
    state = m.state
    head = head_of(m, pfn)
    if head != NONE:
        return fail_huge(m, head, pfn, required, early, counted)
    if is_of_anonymous_folio(m, pfn):
        return np.int64(-EOPNOTSUPP)
    first = pfn
    if state[R_ORDER] == U0:
        first, _ = head_and_order(m, pfn)
    page = struct_page(m, first)
    if m.ram[page + MAPPING] != U0 and is_designs(m, first, page):
        return fail_designs_page(m, pfn, required, early, counted)
    if is_folio_poisoned(m, pfn):
        return already_poisoned(m, pfn, required)
    m.ram[struct_page(m, pfn) + FLAGS] |= state[R_HWPOISON]
    count_poisoned(state, U1)
    if fail_free(m, pfn):
        return action_result(m, MF_PAGE_BUDDY, MF_RESULT_RECOVERED)
    if state[R_ORDER] == U0 and is_designs(m, first, page):  # it left its file while somebody held it
        add_references(m.ram, page, U1)
        hold_by_failure(m, first, U1)
        return action_result(m, MF_PAGE_TRUNCATED_LRU, MF_RESULT_IGNORED)
    return action_result(m, MF_PAGE_GET_HWPOISON, MF_RESULT_IGNORED)


# --------------------------------------------------------------------------- pages of ordinary memory


@outlined
def cached_at(m, pfn):
    """(inode, page) of the guest_memfd of 4K folios, or shmem file, that has a frame; (NONE, 0)."""
    state = m.state
    for inode in range(state[R_INODES]):
        node = inode_row(inode)
        if state[node + I_KIND] != INODE_GUEST_MEMFD_4K or state[node + I_REFERENCES] == U0:
            continue
        index = cache_next(m, state[node + I_CACHE], U0)
        while index != NONE:
            if cache_find(m, state[node + I_CACHE], index) == pfn:
                return inode, index
            index = cache_next(m, state[node + I_CACHE], index + U1)
    return NONE, U0


@outlined
def fail_cached(m, inode, index, pfn, required, early):
    """The same of a page of guest_memfd as merged, or of shmem, which counts as recovered: shmem_error_remove_folio().

    Both keep the page, and memory failure keeps its reference.
    """
    state = m.state
    shmem = state[inode_row(inode) + I_FLAGS] & INODE_SHMEM != U0
    m.counts[pfn] = np.uint32(U(m.counts[pfn]) | PAGE_POISONED)
    if U(m.counts[pfn]) & PAGE_MAPPINGS != U0:
        unmap_file_page(m, inode, index, pfn)
        if U(m.counts[pfn]) & PAGE_DIRTY != U0:
            kill_procs_of_file(m, inode, index, U12, required, early)
    dirty = U(m.counts[pfn]) & PAGE_DIRTY != U0
    if shmem:
        return action_result(m, MF_PAGE_DIRTY_LRU if dirty else MF_PAGE_CLEAN_LRU, MF_RESULT_RECOVERED)
    before = stage2_leaves(m.stats)
    notify_inode(m, inode, index, index + U1)
    count_failure(state, MF_STAGE2, U(before - stage2_leaves(m.stats)))
    kind = MF_PAGE_DIRTY_UNEVICTABLE_LRU if dirty else MF_PAGE_CLEAN_UNEVICTABLE_LRU
    return action_result(m, kind, truncated(m, True, False))


@outlined
def fail_ordinary(m, pfn, required, early):
    """memory_failure() of a frame of ordinary memory: -EOPNOTSUPP where nothing maps or caches it.

    Free frames, page tables and the kernel's own are not modelled. The page of zeroes is the kernel's.
    """
    state = m.state
    if pfn == state[R_ZERO_FRAME]:
        return action_result(m, MF_PAGE_GET_HWPOISON, MF_RESULT_IGNORED)
    alone = U(m.counts[pfn]) == PAGE_POISONED and state[R_POISONED_FRAMES] != U0
    inode, index = cached_at(m, pfn)
    poisoned = alone or (inode != NONE and U(m.counts[pfn]) & PAGE_POISONED != U0)
    if poisoned:
        return already_poisoned(m, pfn, required)
    if inode != NONE:
        count_poisoned(state, U1)
        return fail_cached(m, inode, index, pfn, required, early)
    if unmap_anonymous_page(m, pfn, required, early) == U0:
        return np.int64(-EOPNOTSUPP)
    count_poisoned(state, U1)
    leave_anonymous(m, pfn)
    return action_result(m, MF_PAGE_DIRTY_LRU, MF_RESULT_RECOVERED)


@kernel
def leave_anonymous(m, pfn):
    """The page that was anonymous memory is memory failure's alone: me_pagecache_clean() of an anonymous folio."""
    pinned = U(m.counts[pfn]) & PAGE_PINNED
    m.counts[pfn] = np.uint32(PAGE_POISONED | pinned)
    m.state[R_POISONED_FRAMES if pinned == U0 else R_PINNED_ALONE] += U1  # else it is when the last pin goes
    change(m.stats, GAUGE_ANONYMOUS_PAGES, -1)


# --------------------------------------------------------------------------- all of them


@outlined
def by_kind(m, pfn, required, early, counted):
    """memory_failure() by what kind of frame it is."""
    state = m.state
    if state[R_HWPOISON] == U0:
        return np.int64(-EOPNOTSUPP)
    if in_zone(state, pfn):
        return fail_in_zone(m, pfn, required, early, counted)
    if pfn < state[R_FRAMES]:
        return fail_ordinary(m, pfn, required, early)
    if state[R_FAILURE_PFN] == U0:
        return np.int64(-ENXIO)
    return action_result(m, MF_PAGE_PFN_MAP, MF_RESULT_IGNORED)  # no range is registered: register_pfn_address_space()


@outlined
def memory_failure(m, pfn, required, early, counted):
    """memory_failure(): 0 of what was recovered or delayed, else -errno. `required`: the process that met the error
    itself (MF_ACTION_REQUIRED), or NOBODY. `early`: vm.memory_failure_early_kill. `counted`: MF_COUNT_INCREASED.

    -EBUSY: it failed or was ignored. -EHWPOISON: the page was poisoned before, or a large folio cannot be split.
    -ENXIO: no struct page, before 6.19. -EOPNOTSUPP without
    CONFIG_MEMORY_FAILURE, and of what is not modelled: transparent huge pages of anonymous memory, free and kernel
    pages of ordinary memory. -ENOMEM where a machine has noted POISONED pages of huge ones.
    """
    begin_record(m.state, pfn)
    status = np.int64(by_kind(m, pfn, required, early, counted))
    m.state[STATE_FAILURE + MF_STATUS] = U(status)
    return status
