"""A machine's first moments: the kernel's page table, the vmemmap of the HugeTLB zone, the pool."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U2, U8, U9, U12, U64, U512
from pgemu_kernels.compile import entry, kernel, outlined
from pgemu_kernels.events import (
    CONTENT_FRAMES,
    FRAMES_USED,
    HOST_TABLES,
    KERNEL_TABLES,
    OTHER_POOL_FREE,
    POOL_FREE,
    STAGE2_TABLES,
    VMEMMAP_PAGES,
    change,
)
from pgemu_kernels.folio import (
    COUNTS,
    FLAGS,
    HUGETLB_FREED,
    HUGETLB_VMEMMAP_OPTIMIZED,
    PG_HEAD,
    PGTY_HUGETLB,
    PRIVATE,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.formats import VMEMMAP_LARGE, VMEMMAP_PAGE, VMEMMAP_READ_ONLY
from pgemu_kernels.handle import open_machine
from pgemu_kernels.hugetlb import write_order
from pgemu_kernels.layout import (
    ENOMEM,
    F_EMPTY,
    R_BOOT_FRAMES,
    R_CONTENTS,
    R_FRAMES,
    R_HVO,
    R_KERNEL_ROOT,
    R_MASK_TAILS,
    R_ORDER,
    R_OTHER_BASE,
    R_OTHER_FREE,
    R_OTHER_ORDER,
    R_OTHER_PAGES,
    R_OTHER_STACK,
    R_OTHER_TAIL_PAGE,
    R_PAGE_FLAGS,
    R_POOL_BASE,
    R_POOL_FREE,
    R_POOL_PAGES,
    R_POOL_STACK,
    R_PTI,
    R_TAIL_PAGE,
    S_ROOT,
    S_USER_ROOT,
    V_ROOT,
)
from pgemu_kernels.memory import fill_frame, put_frame, take_frame
from pgemu_kernels.paging import stage2_format
from pgemu_kernels.vmemmap import compound_info, fill_tail_page, vmemmap_pages, vmemmap_slot, write_tail

U = np.uint64
_LARGE = U(VMEMMAP_LARGE)
_PAGE = U(VMEMMAP_PAGE)
_READ_ONLY = U(VMEMMAP_READ_ONLY)
NO_MEMORY = np.int64(-ENOMEM)


@kernel
def write_head(m, head, first, order, optimized):
    """The head of a free HugeTLB folio: mm/hugetlb.c:init_new_hugetlb_folio(), words as captured."""
    ram = m.ram
    for word in range(first, first + U8):
        ram[word] = U0
    ram[first + FLAGS] = m.state[R_PAGE_FLAGS] | PG_HEAD
    ram[first + PRIVATE] = HUGETLB_FREED | HUGETLB_VMEMMAP_OPTIMIZED if optimized else HUGETLB_FREED
    ram[first + COUNTS] = PGTY_HUGETLB
    write_order(ram, m.state, head, first, order)


@outlined
def map_optimized(m, head, order, tail_page):
    """The vmemmap of one optimised folio: its own first page, all others read-only to a shared one. 0 or -ENOMEM.

    `tail_page`: the shared one of its size, from 7.1 on.
    """
    ram = m.ram
    state = m.state
    start = vmemmap_address(state, head)
    flags = state[R_PAGE_FLAGS]
    compound = compound_info(state, head, order)
    own = take_frame(m)
    if own == NONE:
        return NO_MEMORY
    for i in range(U64):
        write_tail(ram, (own << U9) + i * U8, flags, compound)
    write_head(m, head, own << U9, order, True)
    tail = own if state[R_MASK_TAILS] == U0 else tail_page
    for i in range(vmemmap_pages(order)):
        slot = vmemmap_slot(m, start + (i << U12), U1)
        if slot == NONE:
            return NO_MEMORY
        ram[slot] = own << U12 | _PAGE if i == U0 else tail << U12 | _READ_ONLY
    change(m.stats, VMEMMAP_PAGES, 1)
    return np.int64(0)


@kernel
def write_folios(m, base, pages, order):
    """Head and tails of every folio of a pool whose struct pages are all there."""
    flags = m.state[R_PAGE_FLAGS]
    for folio in range(pages):
        head = base + (folio << order)
        compound = compound_info(m.state, head, order)
        first = struct_page(m, head)
        for i in range(U1 << order):
            write_tail(m.ram, first + i * U8, flags, compound)
        write_head(m, head, first, order, False)


@outlined
def map_whole(m):
    """The vmemmap of both pools without optimisation: 2M leaves onto the frames behind the others."""
    ram = m.ram
    state = m.state
    frames = state[R_BOOT_FRAMES]
    base = state[R_FRAMES]
    for i in range(U0, frames, U512):
        slot = vmemmap_slot(m, vmemmap_address(state, state[R_POOL_BASE]) + (i << U12), U2)
        if slot == NONE:
            return NO_MEMORY
        ram[slot] = (base + i) << U12 | _LARGE
    change(m.stats, FRAMES_USED, np.int64(frames))
    change(m.stats, VMEMMAP_PAGES, np.int64(frames))
    return np.int64(0)


@outlined
def boot_pool(m, base, pages, order, tail_register, stack, free_register):
    """The vmemmap and the free pages of one pool: 0 or -ENOMEM. The lowest huge page is handed out first."""
    state = m.state
    if pages == U0:
        return np.int64(0)
    if state[R_HVO] == U0:
        write_folios(m, base, pages, order)
    else:
        if state[R_MASK_TAILS] != U0:
            tail = take_frame(m)
            if tail == NONE:
                return NO_MEMORY
            state[tail_register] = tail
            fill_tail_page(m, tail, order)
            change(m.stats, VMEMMAP_PAGES, 1)
        for i in range(pages):
            if map_optimized(m, base + (i << order), order, state[tail_register]) != 0:
                return NO_MEMORY
    for i in range(pages):
        state[stack + i] = base + ((pages - U1 - i) << order)
    state[free_register] = pages
    return np.int64(0)


@entry
def boot(descriptor):
    """Build the kernel's table, the vmemmap and the pool: 0, or -ENOMEM when the frames do not suffice.

    The registers are set by then.
    """
    m = open_machine(descriptor)
    state = m.state
    order = state[R_ORDER]
    root = take_frame(m)
    if root == NONE:
        return NO_MEMORY
    fill_frame(m.ram, root, U0)
    change(m.stats, KERNEL_TABLES, 1)
    state[R_KERNEL_ROOT] = root << U12
    if state[R_HVO] == U0 and map_whole(m) != 0:
        return NO_MEMORY
    pages = state[R_POOL_PAGES]
    if boot_pool(m, state[R_POOL_BASE], pages, order, R_TAIL_PAGE, state[R_POOL_STACK], R_POOL_FREE) != 0:
        return NO_MEMORY
    change(m.stats, POOL_FREE, np.int64(pages))
    pages = state[R_OTHER_PAGES]
    order = state[R_OTHER_ORDER]
    if boot_pool(m, state[R_OTHER_BASE], pages, order, R_OTHER_TAIL_PAGE, state[R_OTHER_STACK], R_OTHER_FREE) != 0:
        return NO_MEMORY
    change(m.stats, OTHER_POOL_FREE, np.int64(pages))
    return np.int64(0)


@outlined
def empty_frame(m, value, gauge):
    """A frame full of `value`, counted: its number, or NONE."""
    frame = take_frame(m)
    if frame != NONE:
        fill_frame(m.ram, frame, value)
        m.counts[frame] = np.uint32(0)
        change(m.stats, gauge, 1)
    return frame


@kernel
def process_root(m, row):
    """Give a process (row of S_*) its empty top table, and with page-table isolation the user's copy of it."""
    frame = empty_frame(m, U0, HOST_TABLES)
    if frame == NONE:
        return NO_MEMORY
    if m.state[R_PTI] != U0:
        user = empty_frame(m, U0, HOST_TABLES)
        if user == NONE:
            put_frame(m, frame)
            change(m.stats, HOST_TABLES, -1)
            return NO_MEMORY
        m.state[row + S_USER_ROOT] = user << U12
    m.state[row + S_ROOT] = frame << U12
    return np.int64(0)


@kernel
def stage2_root(m, row):
    """Give a VM (row of V_*) its empty top table."""
    frame = empty_frame(m, m.state[stage2_format(m) + F_EMPTY], STAGE2_TABLES)
    if frame == NONE:
        return NO_MEMORY
    m.state[row + V_ROOT] = frame << U12
    return np.int64(0)


@kernel
def content_frame(m, pfn):
    """The frame with the contents of a guest frame, given one of zeroes if it has none."""
    at = m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]
    frame = U(m.counts[at])
    if frame == U0:
        frame = empty_frame(m, U0, CONTENT_FRAMES)
        if frame == NONE:
            return NO_MEMORY
        m.counts[at] = np.uint32(frame)
    return np.int64(frame)


PROCESS_ROOT = 0
STAGE2_ROOT = 1
CONTENTS = 2


@entry
def provide(descriptor, what, where):
    """Provide what Python asks for: PROCESS_ROOT for a row of S_*, STAGE2_ROOT for a row of V_*, CONTENTS of a PFN.

    0, of contents the number of the frame that holds them, or -ENOMEM.
    """
    m = open_machine(descriptor)
    if what == PROCESS_ROOT:
        return process_root(m, where)
    if what == STAGE2_ROOT:
        return stage2_root(m, where)
    return content_frame(m, where)
