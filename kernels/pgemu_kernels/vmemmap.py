"""The vmemmap's page table, and HugeTLB Vmemmap Optimization: mm/hugetlb_vmemmap.c.

A folio of order 9 or 18 has 8 or 4096 vmemmap pages. Optimised, it keeps the first; the entries of the
others point, read-only, to one shared page of tails (7.1 and later: one per zone and order) or to the
folio's own first page (before).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U3, U6, U8, U9, U12, U21, U30, U39, U63, U64, U511, U512
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    KERNEL_TABLES,
    TLB_FLUSH_KERNEL,
    VMEMMAP_PAGE_FREED,
    VMEMMAP_PAGE_RESTORED,
    VMEMMAP_PAGES,
    change,
    charge,
    charge_one,
)
from pgemu_kernels.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_VMEMMAP_OPTIMIZED,
    MAPPING,
    NO_MAPCOUNT,
    PRIVATE,
    TAIL_MAPPING,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.formats import ADDRESS, TABLE, VMEMMAP_PAGE, VMEMMAP_READ_ONLY
from pgemu_kernels.layout import (
    ENOMEM,
    R_KERNEL_ROOT,
    R_MASK_TAILS,
    R_PAGE_FLAGS,
    R_RESET_STRUCT_PAGES,
    R_TAIL_PAGE,
)
from pgemu_kernels.memory import copy_frame, fill_frame, frames_left, put_frame, take_frame

U = np.uint64
_ADDRESS = U(ADDRESS)
_TABLE = U(TABLE)
_PAGE = U(VMEMMAP_PAGE)
_READ_ONLY = U(VMEMMAP_READ_ONLY)


@kernel
def compound_info(state, head, order):
    """The compound_info word of a tail: a mask (the same for all tails of an order), or head address | 1.

    include/linux/page-flags.h:set_compound_head().
    """
    if state[R_MASK_TAILS] != U0:
        return ~((U1 << (order + U6)) - U1) | U1
    return vmemmap_address(state, head) | U1


@kernel
def write_tail(ram, page, flags, compound):
    """A clean tail struct page: mm/page_alloc.c:prep_compound_tail() on a page that was initialised."""
    ram[page + FLAGS] = flags
    ram[page + COMPOUND] = compound
    ram[page + U(2)] = U0
    ram[page + MAPPING] = TAIL_MAPPING
    ram[page + U(4)] = U0
    ram[page + PRIVATE] = U0
    ram[page + COUNTS] = NO_MAPCOUNT
    ram[page + U(7)] = U0


@kernel
def kernel_table(m, slot):
    """The table below a slot of the kernel's page table, allocated if absent; NONE without memory."""
    entry = m.ram[slot]
    if entry & U1 != U0:
        return (entry & _ADDRESS) >> U3
    frame = take_frame(m)
    if frame == NONE:
        return NONE
    fill_frame(m.ram, frame, U0)
    m.ram[slot] = frame << U12 | _TABLE
    change(m.stats, KERNEL_TABLES, 1)
    return frame << U9


@kernel
def vmemmap_slot(m, address, level):
    """Slot of level 1 or 2 that maps a vmemmap address, tables allocated on the way; NONE without memory."""
    table = kernel_table(m, (m.state[R_KERNEL_ROOT] >> U3) + (address >> U39 & U511))
    if table == NONE:
        return NONE
    table = kernel_table(m, table + (address >> U30 & U511))
    if table == NONE:
        return NONE
    slot = table + (address >> U21 & U511)
    if level == U(2):
        return slot
    table = kernel_table(m, slot)
    if table == NONE:
        return NONE
    return table + (address >> U12 & U511)


@kernel
def vmemmap_pte(m, address):
    """Slot of the 4K entry of a vmemmap address whose tables exist."""
    ram = m.ram
    entry = ram[(m.state[R_KERNEL_ROOT] >> U3) + (address >> U39 & U511)]
    entry = ram[((entry & _ADDRESS) >> U3) + (address >> U30 & U511)]
    entry = ram[((entry & _ADDRESS) >> U3) + (address >> U21 & U511)]
    return ((entry & _ADDRESS) >> U3) + (address >> U12 & U511)


@kernel
def vmemmap_pages(order):
    """Vmemmap pages of a folio: 8 for order 9, 4096 for order 18."""
    return U1 << (order - U6)


@outlined
def restore(m, head, order):
    """hugetlb_vmemmap_restore_folio(): 0, or -ENOMEM with nothing changed.

    Takes 7 or 4095 frames, all or none, fills each with what the shared page showed and maps it
    read-write. vmemmap_restore_pte(), alloc_vmemmap_page_list().
    """
    ram = m.ram
    state = m.state
    missing = vmemmap_pages(order) - U1
    if frames_left(m) < missing:
        return np.int64(-ENOMEM)
    start = vmemmap_address(state, head)
    first = struct_page(m, head)
    masks = state[R_MASK_TAILS] != U0
    reset = state[R_RESET_STRUCT_PAGES] * U8
    sample = first + U63 * U8
    for i in range(U1, missing + U1):
        slot = vmemmap_pte(m, start + (i << U12))
        frame = take_frame(m)
        page = frame << U9
        if masks:
            # Eight values kept in registers, 64 times: the copies of the folio's struct page 63.
            w0, w1, w2, w3 = ram[sample], ram[sample + U1], ram[sample + U(2)], ram[sample + U3]
            w4, w5, w6, w7 = ram[sample + U(4)], ram[sample + U(5)], ram[sample + U6], ram[sample + U(7)]
            for at in range(page, page + U512, U8):
                ram[at] = w0
                ram[at + U1] = w1
                ram[at + U(2)] = w2
                ram[at + U3] = w3
                ram[at + U(4)] = w4
                ram[at + U(5)] = w5
                ram[at + U6] = w6
                ram[at + U(7)] = w7
        else:
            copy_frame(ram, frame, first >> U9)
            for word in range(reset):
                ram[page + word] = ram[first + reset + word]
        ram[slot] = frame << U12 | _PAGE
    ram[first + PRIVATE] &= ~HUGETLB_VMEMMAP_OPTIMIZED
    change(m.stats, VMEMMAP_PAGES, np.int64(missing))
    charge(m, VMEMMAP_PAGE_RESTORED, np.int64(missing))
    charge_one(m, TLB_FLUSH_KERNEL)
    return np.int64(0)


@outlined
def optimize(m, head, order):
    """hugetlb_vmemmap_optimize_folio(): 0, or -ENOMEM with the folio left as it was.

    The head's page is copied to a new frame (7.1 and later need one; before, the old page is kept when
    there is none), all other entries become read-only ones to the shared page, and the old pages go.
    """
    ram = m.ram
    state = m.state
    pages = vmemmap_pages(order)
    start = vmemmap_address(state, head)
    first = struct_page(m, head)
    old = first >> U9
    frame = take_frame(m)
    if frame == NONE and state[R_MASK_TAILS] != U0:
        return np.int64(-ENOMEM)
    if frame == NONE:
        frame = old
    ram[first + PRIVATE] |= HUGETLB_VMEMMAP_OPTIMIZED
    if frame != old:
        copy_frame(ram, frame, old)
        ram[vmemmap_pte(m, start)] = frame << U12 | _PAGE
        put_frame(m, old)
    tail = frame if state[R_MASK_TAILS] == U0 else state[R_TAIL_PAGE]
    for i in range(U1, pages):
        slot = vmemmap_pte(m, start + (i << U12))
        put_frame(m, (ram[slot] & _ADDRESS) >> U12)
        ram[slot] = tail << U12 | _READ_ONLY
    change(m.stats, VMEMMAP_PAGES, 1 - np.int64(pages))
    charge(m, VMEMMAP_PAGE_FREED, np.int64(pages) - 1)
    charge_one(m, TLB_FLUSH_KERNEL)
    return np.int64(0)


@outlined
def fill_tail_page(m, frame, order):
    """The shared tail page of a zone and order: 64 clean tails. vmemmap_get_tail()."""
    flags = m.state[R_PAGE_FLAGS]
    compound = compound_info(m.state, U0, order)
    for i in range(U64):
        write_tail(m.ram, (frame << U9) + i * U8, flags, compound)
