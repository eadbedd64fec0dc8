"""What conversions and holes do to I/O entries of a guest_memfd that nobody holds pages for: POLICY_*.

Asked on the lists in 2026 and built nowhere: who unmaps, how wide that gets under a large entry, what a device sees
meanwhile. A page range is one of the file; hulls are kept in the operation's record (O_WIDE_*).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, trailing_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row
from pgemu_kernels.engine.shareability import shared_in_range
from pgemu_kernels.iommu.areas import area_after, area_end, area_from, area_memory, area_start
from pgemu_kernels.iommu.domain import begin_edit, domain_row, end_edit, frames_used, physical_of
from pgemu_kernels.iommu.io_pages import revoke_pages
from pgemu_kernels.iommu.unpinned import (
    after,
    enter_pages,
    entry_over,
    first_page_shown,
    mapped_pages,
    part_of_area,
    remove_entries,
    shows,
)
from pgemu_kernels.tables.domain_cut import cut_at, page_attributes, put_together
from pgemu_kernels.tables.walker import format_row
from pgemu_kernels.words.events import CLOCK_HIGH, CLOCK_LOW
from pgemu_kernels.words.rows import (
    D_CUT,
    D_JOINED,
    D_POLICY,
    D_RETURNED,
    D_REVOKED,
    D_ROOT,
    D_WIDENED,
    D_WINDOW_HIGH,
    D_WINDOW_LOW,
    D_WINDOWS,
    I_DOMAINS,
    IP_INDEX,
    O_WIDE_END,
    O_WIDE_HIGH,
    O_WIDE_LOW,
    O_WIDE_START,
    POLICY_MIRROR,
    POLICY_NONE,
    POLICY_NOTIFIER,
)
from pgemu_kernels.words.table_words import E_FORMAT, F_PAGE_SIZES

U = np.uint64


# --------------------------------------------------------------------------- taking


@outlined
def _cut_border(e, d, iova):
    """Let no entry cross an address: whether that worked."""
    status, cut = cut_at(e, format_row(e.state, e.request[E_FORMAT]), iova)
    e.state[d + D_CUT] += cut
    return status == 0


@outlined
def _start_of_leaf(m, e, iova):
    """The address that the leaf over one begins with, or the address where there is none."""
    entry, shift = entry_over(m, e, iova)
    return iova if entry == U0 else iova >> shift << shift


@kernel
def _end_of_leaf(m, e, iova):
    """Where the leaf ends that has the last byte before an address."""
    entry, shift = entry_over(m, e, iova - U1)
    return iova if entry == U0 else after(iova - U1, shift)


@kernel
def _note_wide(m, op, start, end):
    """Pages [start, end) of the file are to be given back at the operation's end."""
    state = m.state
    if state[op + O_WIDE_END] == U0:
        state[op + O_WIDE_START] = start
        state[op + O_WIDE_LOW] = U(m.stats[CLOCK_LOW])
        state[op + O_WIDE_HIGH] = U(m.stats[CLOCK_HIGH])
    state[op + O_WIDE_START] = min(state[op + O_WIDE_START], start)
    state[op + O_WIDE_END] = max(state[op + O_WIDE_END], end)


@outlined
def _take_run(m, e, op, d, key, first, last):
    """Unmap I/O addresses [first, last) of an area, and what the policy makes of leaves that cross their borders."""
    state = m.state
    start = first
    end = last
    if state[d + D_POLICY] != POLICY_MIRROR or not (_cut_border(e, d, first) and _cut_border(e, d, last)):
        start = _start_of_leaf(m, e, first)
        end = _end_of_leaf(m, e, last)
    inside = mapped_pages(m, e, first, last)
    gone = remove_entries(m, e, start, end)
    state[d + D_REVOKED] += gone
    state[d + D_WIDENED] += gone - inside
    if state[d + D_POLICY] > POLICY_NOTIFIER:
        page = first_page_shown(m, d, key) - (area_start(m, d, key) >> U12)
        _note_wide(m, op, page + (start >> U12), page + (end >> U12))


@outlined
def _take_from(m, op, d, inode, start, end):
    """Unmap pages [start, end) from one address space: one edit, one flush at its end."""
    used = frames_used(m)
    e = begin_edit(m, d)
    key = area_from(m, d, U0)
    while key != NONE:
        if shows(m, d, key, inode):
            first, last = part_of_area(m, d, key, start, end)
            if first != last:
                _take_run(m, e, op, d, key, first, last)
        key = area_after(m, d, key)
    end_edit(m, e, d, used)


@outlined
def take_from_domains(m, op, inode, start, end):
    """Pages [start, end) are about to be private, or their inode's no more: devices lose them as their policy says."""
    state = m.state
    domains = state[inode_row(inode) + I_DOMAINS]
    while domains != U0:
        d = domain_row(trailing_zeros(domains))
        domains &= domains - U1
        if state[d + D_POLICY] > POLICY_NONE and state[d + D_ROOT] != U0:
            _take_from(m, op, d, inode, start, end)


@outlined
def _revoke_from(m, d, inode):
    used = frames_used(m)
    e = begin_edit(m, d)
    key = area_from(m, d, U0)
    while key != NONE:
        if shows(m, d, key, inode):
            revoke_pages(m, area_memory(m, d, key) >> IP_INDEX)
            if m.state[d + D_ROOT] != U0:
                m.state[d + D_REVOKED] += remove_entries(m, e, area_start(m, d, key), area_end(key))
        key = area_after(m, d, key)
    end_edit(m, e, d, used)


@outlined
def revoke_dmabuf(m, inode):
    """drivers/iommu/iommufd/pages.c:iopt_revoke_notify(): every domain loses a device's memory; the areas stay, and
    nothing is entered in them again."""
    state = m.state
    domains = state[inode_row(inode) + I_DOMAINS]
    while domains != U0:
        _revoke_from(m, domain_row(trailing_zeros(domains)), inode)
        domains &= domains - U1


# --------------------------------------------------------------------------- giving back


@outlined
def _is_one_run(m, e, address, size, physical, attributes):
    """Whether leaves of these attributes map [address, address + size) to physical memory from `physical` on."""
    f = format_row(m.state, e.request[E_FORMAT])
    at = address
    while at < address + size:
        entry, shift = entry_over(m, e, at)
        if entry == U0 or page_attributes(m.state, f, entry) != attributes:
            return False
        if physical_of(m.state, f, entry, shift, at) != physical + (at - address):
            return False
        at = after(at, shift)
    return True


@kernel
def _next_size(sizes, shift):
    """Log 2 of the next larger size of a leaf, 0 for none."""
    larger = sizes >> shift + U1
    return U0 if larger == U0 else shift + U1 + trailing_zeros(larger)


@outlined
def _largest_leaf(m, e, d, key, inode, iova):
    """Log 2 of the largest leaf that could map an address, which is mapped: its area, its memory and what is shared
    allow it, and all of it is mapped."""
    state = m.state
    f = format_row(state, e.request[E_FORMAT])
    entry, shift = entry_over(m, e, iova)
    physical = physical_of(state, f, entry, shift, iova)
    attributes = page_attributes(state, f, entry)
    start = area_start(m, d, key)
    pages = first_page_shown(m, d, key)
    following = _next_size(state[f + F_PAGE_SIZES], shift)
    while following != U0:
        size = U1 << following
        base = iova & ~(size - U1)
        at = physical - (iova - base)
        if base < start or base + size > area_end(key) or at & (size - U1) != U0:
            break
        index = pages + (base - start >> U12)
        if shared_in_range(m, inode_row(inode), index, index + (size >> U12)) != size >> U12:
            break
        if not _is_one_run(m, e, base, size, at, attributes):
            break
        shift = following
        following = _next_size(state[f + F_PAGE_SIZES], shift)
    return shift


@outlined
def _put_together(m, e, d, key, inode, first, last):
    """Let I/O addresses [first, last) be mapped by the largest leaves that there can be."""
    at = first
    while at < last:
        entry, shift = entry_over(m, e, at)
        if entry != U0:
            largest = _largest_leaf(m, e, d, key, inode, at)
            if largest != shift:
                put_together(e, format_row(m.state, e.request[E_FORMAT]), at >> largest << largest, largest)
                m.state[d + D_JOINED] += U1
                shift = largest
        at = after(at, shift)


@outlined
def _return_to(m, op, d, inode, start, end):
    """Enter what is backed and shared of pages [start, end) in one address space: how many pages."""
    used = frames_used(m)
    e = begin_edit(m, d)
    entered = U0
    key = area_from(m, d, U0)
    while key != NONE:
        if shows(m, d, key, inode):
            first, last = part_of_area(m, d, key, start, end)
            if first != last:
                page = first_page_shown(m, d, key)
                base = area_start(m, d, key)
                from_page = page + (first - base >> U12)
                entered += enter_pages(m, e, d, key, inode, from_page, page + (last - base >> U12))
                if m.state[d + D_POLICY] == POLICY_MIRROR:
                    _put_together(m, e, d, key, inode, first, last)
        key = area_after(m, d, key)
    end_edit(m, e, d, used)
    m.state[d + D_RETURNED] += entered
    return entered


@kernel
def _note_window(m, op, d):
    """A device could not reach pages that were its own before and are after the operation."""
    state = m.state
    state[d + D_WINDOWS] += U1
    state[d + D_WINDOW_LOW] += U(m.stats[CLOCK_LOW]) - state[op + O_WIDE_LOW]
    state[d + D_WINDOW_HIGH] += U(m.stats[CLOCK_HIGH]) - state[op + O_WIDE_HIGH]


@outlined
def return_to_domains(m, op, inode, start, end):
    """What an operation took besides is given back, and pages [start, end), which are shared now, are entered."""
    state = m.state
    wide_start = state[op + O_WIDE_START]
    wide_end = state[op + O_WIDE_END]
    state[op + O_WIDE_END] = U0
    domains = state[inode_row(inode) + I_DOMAINS]
    while domains != U0:
        d = domain_row(trailing_zeros(domains))
        domains &= domains - U1
        if state[d + D_POLICY] > POLICY_NOTIFIER and state[d + D_ROOT] != U0:
            if wide_end != U0 and _return_to(m, op, d, inode, wide_start, wide_end) != U0:
                _note_window(m, op, d)
            if start < end:
                _return_to(m, op, d, inode, start, end)
