"""MADV_COLLAPSE of anonymous memory: 4K pages copied into a huge page. mm/khugepaged.c

Of khugepaged's own rounds nothing is modelled: nobody knows when they come.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U9, U512
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, frames_left, take_frame
from pgemu_kernels.engine.rows import inode_row, space_root
from pgemu_kernels.folios.anonymous_folios import (
    contents_of_large,
    is_large_anonymous,
    put_contents,
    take_large_anonymous,
)
from pgemu_kernels.folios.pinning import has_pins
from pgemu_kernels.formats.bits import PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.anonymous import unmap_page
from pgemu_kernels.process.entries import holds_page, points_to_table, pte_pfn
from pgemu_kernels.process.huge_memory import make_huge_leaf
from pgemu_kernels.process.huge_pmd import deposit_table
from pgemu_kernels.process.madvise import over_vmas
from pgemu_kernels.process.tables import below, slot_of_level
from pgemu_kernels.process.vma import page_offset
from pgemu_kernels.process.zapping import defer_unmapped, forget_large
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.tables.walker import count_host_leaf
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_CLEARED,
    EVENT_PAGE_COPIED,
    EVENT_TLB_FLUSH_MM,
    GAUGE_HOST_LEAVES_2M,
)
from pgemu_kernels.words.operations import EAGAIN, EINVAL, ENOMEM, EOPNOTSUPP, PAGE_2M
from pgemu_kernels.words.registers import (
    R_COLLAPSE_BATCHES,
    R_COLLAPSE_SKIPS_HOLES,
    R_COLLAPSES_READ_ONLY,
    R_HUGE_ANONYMOUS,
    R_THP_COLLAPSE_ALLOC,
)
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_SPACE,
    A_START,
    I_FLAGS,
    INODE_SHMEM,
    VM_NOHUGEPAGE,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD_4K,
)

U = np.uint64
_SIZE = U(PAGE_2M)
_INSIDE = _SIZE - U1
_COLLAPSED = np.int64(0)
_NOT_THIS = np.int64(1)  # of what it fails with others are tried
_END = np.int64(2)  # ... none is
_REFERENCED = np.int64(3)  # SCAN_PAGE_COUNT: others are tried


@kernel
def _is_suitable(m, table):
    """hpage_collapse_scan_pmd() of a table for madvise(): whether it may be collapsed. The zero page and what is not
    there count as holes, of which there may be any number; a guard page, and before 6.18 that none may be written, is
    against it."""
    writable = m.state[R_COLLAPSES_READ_ONLY] != U0
    for i in range(U512):
        entry = m.ram[table + i]
        if entry != U0 and not holds_page(entry):
            return False
        if entry == U0 or entry & PTE_SPECIAL != U0:
            continue
        writable = writable or entry & PTE_WRITE != U0
    return writable


@kernel
def _is_pinned(m, table):
    """is_refcount_suitable(): whether somebody but mappings has a page of a table."""
    for i in range(U512):
        entry = m.ram[table + i]
        if entry != U0 and entry & PTE_SPECIAL == U0 and holds_page(entry) and has_pins(m, pte_pfn(entry)):
            return True
    return False


@kernel
def _copy_contents(m, pfn, source):
    """The contents of a page into a page of the new folio: into a frame, where it has any."""
    if is_large_anonymous(m.state, source):
        source = contents_of_large(m, source)
    if source != U0:
        frame = take_frame(m)
        copy_frame(m.ram, frame, source)
        put_contents(m, pfn, frame)


@outlined
def _copy_pages(m, row, table, head):
    """__collapse_huge_page_copy(): every page of a table into a folio; then they are unmapped, their entries empty."""
    space = m.state[row + A_SPACE]
    cleared = np.int64(0)
    copied = np.int64(0)
    for i in range(U512):
        entry = m.ram[table + i]
        m.ram[table + i] = U0
        if entry == U0:
            continue
        cleared += 1
        if entry & PTE_SPECIAL != U0:
            continue
        copied += 1
        frame = pte_pfn(entry)
        _copy_contents(m, head + i, frame)
        if is_large_anonymous(m.state, frame):
            forget_large(m, space, frame)
            if m.state[R_COLLAPSE_BATCHES] == U0:
                defer_unmapped(m)
        else:
            unmap_page(m, space, frame)
    defer_unmapped(m)
    count_host_leaf(m, -cleared)
    charge(m, EVENT_LEAF_CLEARED, cleared)
    charge(m, EVENT_PAGE_COPIED, copied)


@outlined
def _collapse_huge_page(m, row, address, slot):
    """collapse_huge_page(): the table below a slot becomes a 2M leaf, and is deposited. 0 or -ENOMEM."""
    state = m.state
    if frames_left(m) < U512:
        return np.int64(-ENOMEM)  # for the contents
    head = take_large_anonymous(m, state[row + A_ANON_VMA], page_offset(state, row, address))
    if head == NONE:
        return np.int64(-ENOMEM)
    state[R_THP_COLLAPSE_ALLOC] += U1
    notify_range(m, state[row + A_SPACE], address, address + _SIZE)
    charge_one(m, EVENT_TLB_FLUSH_MM)  # pmdp_collapse_flush()
    table = below(m, slot)
    _copy_pages(m, row, table, head)
    m.ram[slot] = U0
    deposit_table(m, state[row + A_SPACE], table >> U9)
    make_huge_leaf(m, row, slot, head)
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, 1)
    state[R_HUGE_ANONYMOUS] = U1
    return np.int64(0)


@kernel
def _collapse_one(m, row, address):
    """One 2M: _COLLAPSED, _NOT_THIS, _END, or -ENOMEM."""
    slot = slot_of_level(m, space_root(m.state, m.state[row + A_SPACE]), address, U2)
    if slot == NONE:
        return _NOT_THIS  # SCAN_PMD_NULL
    entry = m.ram[slot]
    if entry == U0:
        return _NOT_THIS if m.state[R_COLLAPSE_SKIPS_HOLES] != U0 else _END
    if not points_to_table(entry):
        return _COLLAPSED
    if not _is_suitable(m, below(m, slot)):
        return _NOT_THIS
    if _is_pinned(m, below(m, slot)):
        return _REFERENCED
    return _collapse_huge_page(m, row, address, slot)


@kernel
def _can_have_huge_pages(state, row):
    """__thp_vma_allowable_orders(): 0, -EINVAL, or -EOPNOTSUPP for shmem."""
    kind = state[row + A_KIND]
    if kind == VMA_GUEST_MEMFD_4K and state[inode_row(state[row + A_INODE]) + I_FLAGS] & INODE_SHMEM != U0:
        return np.int64(-EOPNOTSUPP)
    if kind != VMA_ANONYMOUS or state[row + A_FLAGS] & VM_NOHUGEPAGE != U0 or state[row + A_ANON_VMA] == U0:
        return np.int64(-EINVAL)
    last = (state[row + A_END] - _SIZE) & ~_INSIDE
    fits = state[row + A_END] >= state[row + A_START] + _SIZE and last >= state[row + A_START]
    return np.int64(0 if fits else -EINVAL)


@outlined
def _collapse_vma(m, op, row, start, end):
    """madvise_collapse() of [start, end) of one VMA: 0, -EINVAL, -ENOMEM, -EOPNOTSUPP; -EAGAIN if the last one that
    failed did so because a page of it is pinned: madvise_collapse_errno()."""
    refused = _can_have_huge_pages(m.state, row)
    if refused != 0:
        return refused
    address = (start + _INSIDE) & ~_INSIDE
    failed = np.int64(0)
    while address < end & ~_INSIDE:
        status = _collapse_one(m, row, address)
        if status < 0:
            return status
        if status != _COLLAPSED:
            failed = np.int64(-EAGAIN if status == _REFERENCED else -EINVAL)
        if status == _END:
            break
        address += _SIZE
    return failed


madvise_collapse = over_vmas(outlined, _collapse_vma)
