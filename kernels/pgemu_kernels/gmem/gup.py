"""get_user_pages() with FOLL_PIN: pages of a process faulted in, made its own where they must be, pinned. mm/gup.c

One step pins a run: pages that follow one another and lie under one entry. Whoever wants more calls it again.
Mappings of pfnmap are VM_PFNMAP, which GUP refuses. FOLL_LONGTERM asks for nothing of what lies in the pool: neither
guest_memfd's folios nor those of a machine without ZONE_MOVABLE have to move (check_and_migrate_movable_folios()).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12
from pgemu_kernels.engine.charge import change, charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.properties import gup_works
from pgemu_kernels.engine.rows import find_vma, space_root
from pgemu_kernels.folios.counts import unpin
from pgemu_kernels.folios.folio import FLAGS, MAPPING, PG_DIRTY, is_huge_page, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.huge_pages import give_back_huge, is_anonymous, is_exclusive
from pgemu_kernels.folios.pinning import head_in_zone, is_transparent, pin_pages, unpin_frame, unpin_large_anonymous
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_DIRTY, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.gmem.host_entries import counted_view
from pgemu_kernels.gmem.references import is_designs, last_reference
from pgemu_kernels.process.anonymous import UNSHARE, is_anon_exclusive
from pgemu_kernels.process.entries import leaf_pfn, points_to_table
from pgemu_kernels.process.fault import fault_error, fault_of_designs, handle_mm_fault
from pgemu_kernels.process.huge_pmd import is_huge_zero
from pgemu_kernels.process.tables import lookup_address, space_row
from pgemu_kernels.words.enum_words import EVENT_PAGE_PINNED, FLAG_LONGTERM, FLAG_WRITE, GAUGE_PAGES_PINNED
from pgemu_kernels.words.operations import EAGAIN, EFAULT, ENOMEM
from pgemu_kernels.words.registers import R_HUGE_ZERO_FRAME, R_ZERO_FRAME
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_KIND,
    A_PROT,
    A_READ_ONLY,
    A_SPACE,
    PROT_READ,
    PROT_WRITE,
    S_HAS_PINNED,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64
_TAKE = U0  # what is to be done with an entry: its page is pinned,
_FAULT = U1  # ... or it is faulted in first,
_UNSHARE = U2  # ... or made this mapping's alone
TOUCH = U(1 << 8)  # beside a record's flags: FOLL_TOUCH, as pin_user_pages_remote() has it
_TRIES = U(4)  # a fault may put in the zero page, which is to be unshared, or split a huge page


@kernel
def check_vma(m, row, write):
    """mm/gup.c:check_vma_flags(): 0 or -EFAULT, without looking at the page."""
    state = m.state
    if row == NONE or state[row + A_FLAGS] & VM_PFNMAP != U0:
        return np.int64(-EFAULT)
    if state[row + A_KIND] == VMA_GUEST_MEMFD:
        if not (gup_works(m) or counted_view(m, row)):
            return np.int64(-EFAULT)  # VM_PFNMAP: no fault is attempted
        refused = (write and state[row + A_READ_ONLY] != U0) or state[row + A_PROT] == U0
        return np.int64(-EFAULT if refused else 0)
    needed = PROT_WRITE if write else PROT_READ
    return np.int64(-EFAULT if state[row + A_PROT] & needed == U0 else 0)


# --------------------------------------------------------------------------- by kind of mapping


@kernel
def _needs_no_more(m, row, entry, level, longterm):
    """Entries of the designs' files are shared: nothing is copied."""
    return _TAKE


@kernel
def _holds_own_page(m, row, entry, level):
    """PageAnonExclusive() of a private mapping's page, or not PageAnon(), which is the second."""
    pfn = leaf_pfn(entry, level)
    if m.state[row + A_KIND] == VMA_HUGETLB:
        return is_exclusive(m, pfn), is_anonymous(m, pfn)
    return is_anon_exclusive(m, pfn), True


@outlined
def _must_unshare(m, row, entry, level, longterm):
    """gup_must_unshare() of an entry that may not be written: _TAKE or _UNSHARE."""
    state = m.state
    kind = state[row + A_KIND]
    if state[row + A_FLAGS] & VM_SHARED != U0 or (kind != VMA_ANONYMOUS and kind != VMA_HUGETLB):
        return _TAKE
    if is_zero_page(m, row, entry, level):
        return _UNSHARE if longterm else _TAKE
    exclusive, anonymous = _holds_own_page(m, row, entry, level)
    if anonymous:
        return _TAKE if exclusive else _UNSHARE
    return _UNSHARE if longterm else _TAKE


@kernel
def is_zero_page(m, row, entry, level):
    """Whether an entry of a mapping of anonymous memory is one of the small or the huge zero page: no pin counts."""
    if m.state[row + A_KIND] != VMA_ANONYMOUS:
        return False
    return is_huge_zero(m.state, entry) if level == U2 else entry & PTE_SPECIAL != U0


@kernel
def _no_zero_page(m, row, entry, level):
    return False


# --------------------------------------------------------------------------- the step


def pinning(fault: Callable[..., Any], must_unshare: Callable[..., Any], is_zero: Callable[..., Any]) -> Any:
    """A step (m, space, address, pages, flags) that pins up to `pages` pages of a process from `address` on.

    It returns 0 or -errno, the first frame, and how many pages, which follow one another: 1 of small pages, of a large
    one as many as are left. flags: WRITE, LONGTERM. -EFAULT without a mapping, for VM_PFNMAP, where the mapping does
    not allow the access or its fault ends in a signal; -ENOMEM without memory, or where the folio's count is at its
    end; -EAGAIN where Linux would wait for the invalidate_lock. mm/gup.c:__get_user_pages(), follow_page_pte(),
    faultin_page(). fault: (m, space, row, address, access). must_unshare, is_zero: of the kinds of mappings there are.
    """

    @outlined
    def look(m, row, address, flags):
        """What is to be done with the page at an address: the word, its entry, the entry's level."""
        slot, level = lookup_address(m, space_root(m.state, m.state[row + A_SPACE]), address)
        entry = m.ram[slot]
        if entry & PTE_PRESENT == U0 or (level > U1 and points_to_table(entry)):
            return _FAULT, entry, level
        if entry & PTE_WRITE != U0:
            return _TAKE, entry, level
        if flags & FLAG_WRITE != U0:
            return _FAULT, entry, level
        return must_unshare(m, row, entry, level, flags & FLAG_LONGTERM != U0), entry, level

    @outlined
    def pin_run(m, space, address, pages, flags):
        state = m.state
        row = find_vma(state, space, address)
        status = check_vma(m, row, flags & FLAG_WRITE != U0)
        if status != 0:
            return status, U0, U0
        access = U1 if flags & FLAG_WRITE != U0 else U0
        todo, entry, level = look(m, row, address, flags)
        for _ in range(_TRIES):
            if todo == _TAKE:
                break
            status = fault_error(fault(m, space, row, address, UNSHARE if todo == _UNSHARE else access), False)
            if status != 0:
                return status, U0, U0
            todo, entry, level = look(m, row, address, flags)
        if todo != _TAKE:
            return np.int64(-EAGAIN), U0, U0
        state[space_row(space) + S_HAS_PINNED] = U1
        inside = (address >> U12) & (pages_of(level) - U1)
        n = min(pages, pages_of(level) - inside)
        pfn = leaf_pfn(entry, level) + inside
        if level == U2 and flags & TOUCH != U0 and entry & PTE_SPECIAL == U0:
            touch_pmd(m, space, address, access == U1)
        if not is_zero(m, row, entry, level):
            if not pin_pages(m, pfn, n):
                return np.int64(-ENOMEM), U0, U0
        count_pinned(m, np.int64(n))
        return np.int64(0), pfn, n

    return pin_run


@outlined
def touch_pmd(m, space, address, write):
    """mm/huge_memory.c:touch_pmd(): a 2M leaf that is pinned with FOLL_TOUCH is accessed, and dirty if for writing."""
    slot, _level = lookup_address(m, space_root(m.state, space), address)
    m.ram[slot] |= PTE_ACCESSED | PTE_DIRTY if write else PTE_ACCESSED


@kernel
def count_pinned(m, n):
    """`n` pages more are pinned, or less."""
    charge(m, EVENT_PAGE_PINNED, abs(n))
    change(m.stats, GAUGE_PAGES_PINNED, n)


pin_run_of_designs = pinning(fault_of_designs, _needs_no_more, _no_zero_page)
pin_run_of_any = pinning(handle_mm_fault, _must_unshare, is_zero_page)


# --------------------------------------------------------------------------- back


@outlined
def unpin_run(m, pfn, n, dirty):
    """Give back pins of `n` pages of one folio from frame `pfn` on: gup_put_folio(); without a reference left it goes.

    `dirty`: unpin_user_page_range_dirty_lock() with make_dirty. Neither zero page is counted: is_zero_folio().
    """
    if pfn == m.state[R_ZERO_FRAME] and pfn != U0:
        return
    if not in_zone(m.state, pfn):
        unpin_frame(m, pfn, dirty)
        return
    head = head_in_zone(m, pfn)
    if head == m.state[R_HUGE_ZERO_FRAME]:
        return
    page = struct_page(m, head)
    if dirty:
        m.ram[page + FLAGS] |= PG_DIRTY
    if is_transparent(m, head):
        unpin_large_anonymous(m, head, n)
        return
    huge = is_huge_page(m, head) and not is_designs(m, head, page)
    if unpin(m.ram, page, n):
        if huge:
            give_back_huge(m, head)
        elif m.ram[page + MAPPING] == U0:
            last_reference(m, head, page)
