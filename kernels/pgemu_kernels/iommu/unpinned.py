"""Areas of an IOAS over a guest_memfd of the two designs: I/O entries without pins, of what is backed and shared.

What-ifs, for Linux refuses such files. A page that is private or that has no folio is not entered, so that a device
faults there; nothing that is allocated later is entered by itself. What is entered is zeroed before, unless it was
used.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U12
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, inode_row
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, order_of, struct_page
from pgemu_kernels.gmem.items import find_bit
from pgemu_kernels.gmem.levels import frame_of
from pgemu_kernels.gmem.references import folio_head
from pgemu_kernels.gmem.zeroing import zero_folio
from pgemu_kernels.iommu.areas import area_end, area_flags, area_memory, area_start
from pgemu_kernels.iommu.domain import walk_domain
from pgemu_kernels.iommu.io_pages import pages_word
from pgemu_kernels.tables.domain import map_frames, unmap_frames
from pgemu_kernels.tables.walker import format_row
from pgemu_kernels.words.enum_words import GAUGE_IOMMU_PAGES
from pgemu_kernels.words.registers import R_ORDER
from pgemu_kernels.words.rows import (
    AREA_READ,
    AREA_WRITE,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    D_LOST,
    I_BASE,
    I_KIND,
    I_OPEN,
    I_WORD,
    INODE_DEVICE,
    INODE_GUEST_MEMFD,
    IP_INDEX,
    IP_OFFSET,
    IP_REVOKED,
    IP_SOURCE,
    IP_START,
)
from pgemu_kernels.words.table_words import E_FORMAT, E_ROOT

U = np.uint64
_INDEX = (U1 << IP_INDEX) - U1


@kernel
def kind_of(m, pages):
    """The kind of the file (INODE_*) of a row of io_pages; ALL of a process's memory."""
    if pages_word(m, pages, IP_SOURCE) != U0:
        return ALL
    return m.state[inode_row(pages_word(m, pages, IP_START)) + I_KIND]


@kernel
def is_unpinned(m, pages):
    """Whether a row of io_pages is a guest_memfd of the designs, or a dma-buf: nothing of it is pinned."""
    kind = kind_of(m, pages)
    return kind == INODE_GUEST_MEMFD or kind == INODE_DEVICE


@kernel
def shows(m, d, key, inode):
    """Whether an area shows pages of a guest_memfd of the designs."""
    pages = area_memory(m, d, key) >> IP_INDEX
    return pages_word(m, pages, IP_SOURCE) == U0 and pages_word(m, pages, IP_START) == inode


@kernel
def first_page_shown(m, d, key):
    """The page of the file that an area begins with."""
    memory = area_memory(m, d, key)
    return pages_word(m, memory >> IP_INDEX, IP_OFFSET) + (memory & _INDEX)


@kernel
def part_of_area(m, d, key, start, end):
    """Pages [start, end) of a file as I/O addresses of an area over it: (from, to), both the same where it has none."""
    page = first_page_shown(m, d, key)
    iova = area_start(m, d, key)
    first = max(start, page)
    last = min(end, page + (area_end(key) - iova >> U12))
    if first >= last:
        return iova, iova
    return iova + (first - page << U12), iova + (last - page << U12)


@kernel
def entry_over(m, e, iova):
    """The leaf over an I/O address and log 2 of what it covers; 0 and that of the hole."""
    return walk_domain(m, e.request[E_ROOT], format_row(m.state, e.request[E_FORMAT]), iova)


@kernel
def after(iova, shift):
    """Address behind what covers an address."""
    return (iova | (U1 << shift) - U1) + U1


@outlined
def _hole_end(m, e, iova, end):
    """Where the hole at an I/O address ends, `end` at most; the address itself where it is none."""
    while iova < end:
        entry, shift = entry_over(m, e, iova)
        if entry != U0:
            return iova
        iova = min(after(iova, shift), end)
    return end


@outlined
def enter_run(m, e, d, iova, physical, length, rights):
    """Enter frames that follow one another where nothing is entered: how many pages. Without memory for tables those
    that are left are D_LOST."""
    end = iova + length
    shift = physical - iova
    entered = U0
    while iova < end:
        entry, covers = entry_over(m, e, iova)
        if entry != U0:
            iova = min(after(iova, covers), end)
            continue
        last = _hole_end(m, e, iova, end)
        read, write = rights & AREA_READ != U0, rights & AREA_WRITE != U0
        if map_frames(e, iova, iova + shift, last - iova, read, write) == 0:
            entered += last - iova >> U12
        else:
            m.state[d + D_LOST] += last - iova >> U12
        iova = last
    change(m.stats, GAUGE_IOMMU_PAGES, np.int64(entered))
    return entered


@kernel
def is_backed(m, block):
    """Whether a huge page of an inode has its memory in the page cache."""
    kind = m.state[block + B_STATE]
    return kind != BLOCK_ABSENT and kind != BLOCK_ZOMBIE


@outlined
def _enter_device(m, e, d, key, start, end):
    """The same of a dma-buf, all of which is there unless it was revoked: pages.c:iopt_dmabuf_revoked()."""
    pages = area_memory(m, d, key) >> IP_INDEX
    if pages_word(m, pages, IP_REVOKED) != U0:
        return U0
    base = m.state[inode_row(pages_word(m, pages, IP_START)) + I_BASE]
    at = area_start(m, d, key) + (start - first_page_shown(m, d, key) << U12)
    return enter_run(m, e, d, at, base + start << U12, end - start << U12, area_flags(m, d, key))


@outlined
def _prepare(m, node, start, end, frame):
    """Zero what of pages [start, end), frame `frame` on, was never used: a device is a user like any other.

    Inference: no provider of a guest_memfd to devices was posted; whoever hands pages out has to prepare them, as
    kvm_gmem_get_pfn() and kvm_gmem_fault_user_mapping() do.
    """
    index = start
    while index < end:
        pfn = frame + (index - start)
        head = folio_head(m, pfn)
        order = order_of(m, head)
        if m.ram[struct_page(m, head) + FLAGS] & PG_UPTODATE != U0:
            index = (index | (U1 << order) - U1) + U1
        else:
            zero_folio(m, node, index, pfn, U1, order)
            index += U1


@outlined
def enter_pages(m, e, d, key, inode, start, end):
    """Enter what is backed and shared of pages [start, end), which an area shows: how many pages."""
    state = m.state
    node = inode_row(inode)
    page = first_page_shown(m, d, key)
    if state[node + I_KIND] == INODE_DEVICE:
        return _enter_device(m, e, d, key, start, end)
    base = area_start(m, d, key)
    inside = (U1 << state[R_ORDER]) - U1
    entered = U0
    index = start
    while index < end and state[node + I_OPEN] != U0:
        index = find_bit(state, state[node + I_WORD], index, end, U0)
        if index == end:
            break
        block = block_row(m, node, index)
        border = min(end, (index | inside) + U1)
        if not is_backed(m, block):
            index = border
            continue
        last = find_bit(state, state[node + I_WORD], index, border, ALL)
        frame = frame_of(m, block, index)
        while last == border and border < end and is_backed(m, block_row(m, node, border)):
            if frame_of(m, block_row(m, node, border), border) != frame + (border - index):
                break
            border = min(end, (border | inside) + U1)
            last = find_bit(state, state[node + I_WORD], last, border, ALL)
        at = base + (index - page << U12)
        _prepare(m, node, index, last, frame)
        entered += enter_run(m, e, d, at, frame << U12, last - index << U12, area_flags(m, d, key))
        index = last
    return entered


@outlined
def mapped_pages(m, e, start, end):
    """4K pages of I/O addresses [start, end) that are mapped."""
    found = U0
    while start < end:
        entry, shift = entry_over(m, e, start)
        following = min(after(start, shift), end)
        if entry != U0:
            found += following - start >> U12
        start = following
    return found


@outlined
def remove_entries(m, e, start, end):
    """Unmap what there is of I/O addresses [start, end), which cut no leaf: how many pages."""
    gone = U0
    at = start
    while at < end:
        entry, shift = entry_over(m, e, at)
        if entry == U0:
            at = min(after(at, shift), end)
            continue
        run = after(at, shift)
        while run < end:
            entry, shift = entry_over(m, e, run)
            if entry == U0:
                break
            run = after(run, shift)
        while at < run:
            went = unmap_frames(e, at, run - at)
            if went == U0 or went > run - at:
                break
            gone += went >> U12
            at += went
        at = max(at, run)
    change(m.stats, GAUGE_IOMMU_PAGES, -np.int64(gone))
    return gone
