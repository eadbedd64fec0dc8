"""A machine's first moments: the kernel's page table, the vmemmap of the HugeTLB zone, the pools."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U8, U9, U12, U18, U64, U512
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.frames import empty_frame, put_frame, take_frame
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.rows import has_vm_property
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_VMEMMAP_OPTIMIZED,
    MAPPING,
    ONE_CACHED,
    PG_HEAD,
    PGTY_HUGETLB,
    PRIVATE,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import LRU, ORDER_1G, hstate_node, hstate_of_order, init_list, list_add, node_row
from pgemu_kernels.folios.hugetlb import count_listed, free_list, write_order
from pgemu_kernels.folios.hvo import tail_page
from pgemu_kernels.folios.vmemmap import compound_info, count_boot_pages, vmemmap_pages, vmemmap_slot, write_tail
from pgemu_kernels.formats.bits import PTE_SAVED_DIRTY, BootMarks
from pgemu_kernels.tables.walker import stage2_format
from pgemu_kernels.words.enum_words import (
    GAUGE_CONTENT_FRAMES,
    GAUGE_HOST_TABLES,
    GAUGE_KERNEL_TABLES,
    GAUGE_MEMMAP_BOOT_PAGES,
    GAUGE_MEMMAP_PAGES,
    GAUGE_STAGE2_TABLES,
    GAUGE_VMEMMAP_PAGES,
    VM_MIRRORED,
)
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import (
    R_BOOT_ASCENDING,
    R_BOOT_MARKS,
    R_BOOT_NEXT,
    R_CONTENTS,
    R_DEFERRED_STRUCT_PAGES,
    R_FRAMES,
    R_HVO,
    R_KERNEL_ROOT,
    R_MASK_TAILS,
    R_NODE_SHIFT,
    R_NODES,
    R_PAGE_FLAGS,
    R_POOL_BASE,
    R_PTI,
    R_VMEMMAP_PAGE,
    R_VMEMMAP_READ_ONLY,
)
from pgemu_kernels.words.requests import MACHINE, PROCESS_ROOT, STAGE2_ROOT
from pgemu_kernels.words.rows import (
    H_ACTIVE,
    H_LIST,
    H_NODE_PAGES,
    H_NODE_TAIL_PAGE,
    H_ORDER,
    H_PAGES,
    H_WORDS,
    HSTATES,
    N_BASE,
    N_GIGANTIC,
    N_HUGE,
    N_RESERVED,
    S_ROOT,
    S_USER_ROOT,
    STATE_HSTATES,
    TABLE_MIRROR,
    V_PRIVATE_ROOT,
    V_ROOT,
)
from pgemu_kernels.words.table_words import F_EMPTY

U = np.uint64
NO_MEMORY = np.int64(-ENOMEM)
_NO_MARKS = U(BootMarks.NONE)
_FIRST_64 = U(BootMarks.FIRST_64)
SECTION = U(32768)  # struct pages in 2M of vmemmap: 128 MiB of memory, a section


@kernel
def page_flags(state, node):
    """Flags of a struct page as mm/mm_init.c:__init_single_page() leaves them."""
    return state[R_PAGE_FLAGS] | node << state[R_NODE_SHIFT]


# --------------------------------------------------------------------------- pages that are optimised from boot on


@outlined
def write_free_folio(m, page, head, order, node):
    """The first 64 struct pages of an optimised huge page that nobody ever used, at an index of `ram`. As captured."""
    ram = m.ram
    flags = page_flags(m.state, node)
    compound = compound_info(m.state, head, order)
    link = vmemmap_address(m.state, head) + LRU
    for i in range(U64):
        write_tail(ram, page + i * U8, flags, link + (i << U6), compound)
    ram[page + FLAGS] = flags | PG_HEAD
    ram[page + COMPOUND] = link
    ram[page + MAPPING] = U0
    ram[page + PRIVATE] = HUGETLB_VMEMMAP_OPTIMIZED
    ram[page + COUNTS] = PGTY_HUGETLB
    write_order(ram, m.state, head, page, order)


@outlined
def map_optimized(m, head, order, own, tail, marks):
    """The vmemmap of one optimised folio: its own page, all others read-only to a shared one. 0 or -ENOMEM.

    `marks`: how the boot allocator leaves a 1G page (formats.BootMarks).
    """
    state = m.state
    start = vmemmap_address(state, head)
    pages = vmemmap_pages(order)
    read_only = tail << U12 | state[R_VMEMMAP_READ_ONLY] | (PTE_SAVED_DIRTY if marks != _NO_MARKS else U0)
    writable = own << U12 | state[R_VMEMMAP_PAGE]
    for base in range(U0, pages, U512):
        slot = vmemmap_slot(m, start + (base << U12), U1)
        if slot == NONE:
            return NO_MEMORY
        for i in range(min(pages - base, U512)):
            page = base + i
            is_writable = page == U0 or (marks == _FIRST_64 and page >= U64)
            m.ram[slot + i] = writable if is_writable else read_only
    return np.int64(0)


@outlined
def own_frame(m):
    """One frame for the vmemmap page that an optimised folio keeps, from the running system; NONE."""
    frame = take_frame(m)
    if frame != NONE:
        change(m.stats, GAUGE_VMEMMAP_PAGES, 1)
        change(m.stats, GAUGE_MEMMAP_PAGES, 1)
    return frame


@outlined
def boot_frame(m):
    """One frame of the boot allocator, behind all others."""
    frame = m.state[R_FRAMES] + m.state[R_BOOT_NEXT]
    m.state[R_BOOT_NEXT] += U1
    count_boot_pages(m, frame, U1)
    return frame


@outlined
def fill_boot_tail_page(m, frame, node):
    """The shared tail page of the boot allocator's 1G pages: it shows what was written to it last, before that.

    Those are the struct pages of the last 256 KiB of the node's last 1G page (with deferred initialisation: of the
    zone's first 128 MiB), each with one reference and its own list links. As captured for 7.3.4; why it is so is
    inference.
    """
    state = m.state
    row = node_row(node)
    last = state[row + N_BASE] + (state[row + N_GIGANTIC] << U18)
    if state[R_DEFERRED_STRUCT_PAGES] != U0:
        last = state[row + N_BASE] + SECTION
    compound = compound_info(state, U0, ORDER_1G)
    for i in range(U64):
        page = (frame << U9) + i * U8
        link = vmemmap_address(state, last - U64 + i) + LRU
        write_tail(m.ram, page, page_flags(state, node), link, compound)
        m.ram[page + COUNTS] = ONE_CACHED


@outlined
def boot_gigantic(m, node):
    """The 1G pages of a node: 0 or -ENOMEM."""
    state = m.state
    row = node_row(node)
    marks = state[R_BOOT_MARKS]
    shared = U0
    if state[row + N_GIGANTIC] != U0 and state[R_MASK_TAILS] != U0:
        shared = boot_frame(m)
        change(m.stats, GAUGE_MEMMAP_BOOT_PAGES, -1)  # shared tail pages are not counted
        state[hstate_node(hstate_of_order(ORDER_1G), node) + H_NODE_TAIL_PAGE] = shared
        fill_boot_tail_page(m, shared, node)
    for i in range(state[row + N_GIGANTIC]):
        head = state[row + N_BASE] + (i << U18)
        if marks == _NO_MARKS:
            own = own_frame(m)
            if own == NONE:
                return NO_MEMORY
        else:
            own = boot_frame(m)
        write_free_folio(m, own << U9, head, ORDER_1G, node)
        if map_optimized(m, head, ORDER_1G, own, shared if shared != U0 else own, marks) != 0:
            return NO_MEMORY
    return np.int64(0)


@outlined
def boot_huge(m, head, node):
    """One 2M page of a pool, optimised by the running system: 0 or -ENOMEM."""
    tail = U0
    if m.state[R_MASK_TAILS] != U0:
        tail = tail_page(m, head, U9)
        if tail == NONE:
            return NO_MEMORY
    own = own_frame(m)
    if own == NONE:
        return NO_MEMORY
    write_free_folio(m, own << U9, head, U9, node)
    return map_optimized(m, head, U9, own, tail if tail != U0 else own, _NO_MARKS)


# --------------------------------------------------------------------------- nodes


@outlined
def boot_node(m, node):
    """The huge pages of one node that are optimised, and its free lists: 0 or -ENOMEM.

    Memory whose struct pages are all there follows: boot_memory.prepare_memory().
    """
    state = m.state
    row = node_row(node)
    huge = state[row + N_BASE] + (state[row + N_GIGANTIC] << U18) + state[row + N_RESERVED]
    status = boot_gigantic(m, node)
    for head in range(huge, huge + (state[row + N_HUGE] << U9), U512):
        if status == 0:
            status = boot_huge(m, head, node)
    if status == 0:
        fill_lists(m, node, state[row + N_BASE], huge)
    return status


@outlined
def fill_lists(m, node, base, huge):
    """The free lists of a node: 2M pages ascending, 1G pages as captured."""
    state = m.state
    row = node_row(node)
    h = hstate_of_order(U9)
    pages = state[row + N_HUGE]
    for i in range(pages):
        add_free(m, h, node, huge + ((pages - U1 - i) << U9))
    h = hstate_of_order(ORDER_1G)
    pages = state[row + N_GIGANTIC]
    for i in range(pages):
        at = pages - U1 - i if state[R_BOOT_ASCENDING] != U0 else i
        add_free(m, h, node, base + (at << U18))


@outlined
def add_free(m, h, node, head):
    """A new page of a pool, free."""
    list_add(m, free_list(h, node), head)
    count_listed(m, h, node, head, 1)
    m.state[h + H_PAGES] += U1
    m.state[hstate_node(h, node) + H_NODE_PAGES] += U1


@outlined
def boot_machine(m):
    """Build the kernel's table, the vmemmap and the pools: 0, or -ENOMEM when the frames do not suffice."""
    state = m.state
    root = empty_frame(m, U0, GAUGE_KERNEL_TABLES)
    if root == NONE:
        return NO_MEMORY
    state[R_KERNEL_ROOT] = root << U12
    for i in range(U(HSTATES)):
        h = STATE_HSTATES + i * U(H_WORDS)
        state[h + H_ORDER] = ORDER_1G if i == U1 else U9
        init_list(state, h + H_ACTIVE)
        init_list(state, h + H_LIST)
        init_list(state, free_list(h, U0))
        init_list(state, free_list(h, U1))
    for node in range(state[R_NODES]):
        if state[R_HVO] != U0 and boot_node(m, node) != 0:
            return NO_MEMORY
    return np.int64(0)


@kernel
def root_frames(m, value, gauge, two):
    """Empty top tables: the frames of one and (`two`) of another one, else of the first again; NONE twice."""
    frame = empty_frame(m, value, gauge)
    if frame == NONE or not two:
        return frame, frame
    second = empty_frame(m, value, gauge)
    if second == NONE:
        put_frame(m, frame)
        change(m.stats, gauge, -1)
        return NONE, NONE
    return frame, second


@kernel
def process_root(m, row):
    """Give a process (row of S_*) its empty top table, and with page-table isolation a second one for user mode.

    Linux has both in 8 KiB, the user's behind the kernel's; here it is any frame, named by S_USER_ROOT.
    """
    isolated = m.state[R_PTI] != U0
    frame, user = root_frames(m, U0, GAUGE_HOST_TABLES, isolated)
    if frame == NONE:
        return NO_MEMORY
    if isolated:
        m.state[row + S_USER_ROOT] = user << U12
    m.state[row + S_ROOT] = frame << U12
    return np.int64(0)


@kernel
def stage2_root(m, row):
    """Give a VM (row of V_*) its empty top table, and one for the mirror of private memory if its kind has that."""
    mirrored = has_vm_property(m.state, row, VM_MIRRORED)
    frame, private = root_frames(m, m.state[stage2_format(m) + F_EMPTY], GAUGE_STAGE2_TABLES, mirrored)
    if frame == NONE:
        return NO_MEMORY
    if mirrored:
        m.counts[private] = np.uint32(TABLE_MIRROR)
    m.state[row + V_ROOT] = frame << U12
    m.state[row + V_PRIVATE_ROOT] = private << U12
    return np.int64(0)


@kernel
def content_frame(m, pfn):
    """The frame with the contents of a guest frame, given one of zeroes if it has none."""
    at = m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]
    frame = U(m.counts[at])
    if frame == U0:
        frame = empty_frame(m, U0, GAUGE_CONTENT_FRAMES)
        if frame == NONE:
            return NO_MEMORY
        m.counts[at] = np.uint32(frame)
    return np.int64(frame)


@entry
def provide(descriptor, what, where):
    """Provide what Python asks for: PROCESS_ROOT for a row of S_*, STAGE2_ROOT for a row of V_*, CONTENTS of a PFN.

    MACHINE comes first, once the registers are set: the kernel's table, the vmemmap and the pools. 0, of contents the
    number of the frame that holds them, or -ENOMEM.
    """
    m = open_machine(descriptor)
    if what == MACHINE:
        return boot_machine(m)
    if what == PROCESS_ROOT:
        return process_root(m, where)
    if what == STAGE2_ROOT:
        return stage2_root(m, where)
    return content_frame(m, where)
