"""The vmemmap's page table, and HugeTLB Vmemmap Optimization: mm/hugetlb_vmemmap.c.

A folio of order 9 or 18 has 8 or 4096 vmemmap pages. Optimised, it keeps the first; the entries of the
others point, read-only, to one shared page of tails (7.1 and later: one per zone and order) or to the
folio's own first page (before).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U6, U7, U8, U9, U12, U63, U64, U511, U512, U4095
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, fill_frame, frames_left, put_frame, take_frame
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_VMEMMAP_OPTIMIZED,
    MAPPING,
    MEMCG,
    NO_MAPCOUNT,
    PRIVATE,
    TAIL_MAPPING,
    folio_order,
    is_huge_page,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import hstate_node, hstate_of_order, in_zone, node_of, page_after
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_TABLE, PTE_WRITE
from pgemu_kernels.words.enum_words import (
    EVENT_RCU_SYNCHRONIZED,
    EVENT_TLB_FLUSH_KERNEL,
    EVENT_TLB_FLUSH_PAGE,
    EVENT_VMEMMAP_HEAD_COPIED,
    EVENT_VMEMMAP_PAGE_FREED,
    EVENT_VMEMMAP_PAGE_RESTORED,
    GAUGE_FRAMES_USED,
    GAUGE_KERNEL_TABLES,
    GAUGE_MEMMAP_BOOT_PAGES,
    GAUGE_MEMMAP_PAGES,
    GAUGE_VMEMMAP_PAGES,
)
from pgemu_kernels.words.operations import EFAULT, ENOMEM
from pgemu_kernels.words.registers import (
    R_BOOT_MARKS,
    R_FLUSHES_HELD,
    R_FRAMES,
    R_FRAMES_LIMIT,
    R_FREED_CHAIN,
    R_KERNEL_ROOT,
    R_KERNEL_UNFLUSHED,
    R_MASK_TAILS,
    R_NODE_SHIFT,
    R_OPTIMIZE_VMEMMAP,
    R_RESET_STRUCT_PAGES,
    R_TAIL_FLAGS,
    R_VMEMMAP_LARGE,
    R_VMEMMAP_PAGE,
    R_VMEMMAP_READ_ONLY,
)
from pgemu_kernels.words.rows import H_NODE_TAIL_PAGE, VMEMMAP_BOOT

U = np.uint64
_BOOT = np.uint32(VMEMMAP_BOOT)
RANGE_CEILING = U(33)  # arch/x86/mm/tlb.c:tlb_single_page_flush_ceiling


@kernel
def compound_info(state, head, order):
    """The compound_info word of a tail: a mask (the same for all tails of an order), or head address | 1.

    include/linux/page-flags.h:set_compound_head().
    """
    if state[R_MASK_TAILS] != U0:
        return ~((U1 << (order + U6)) - U1) | U1
    return vmemmap_address(state, head) | U1


@kernel
def write_tail(ram, page, flags, link, compound):
    """A tail struct page as boot leaves it; `link`: lru.prev, the one word that nobody wrote after the first."""
    ram[page + FLAGS] = flags
    ram[page + COMPOUND] = compound
    ram[page + U2] = link
    ram[page + MAPPING] = TAIL_MAPPING
    ram[page + U4] = U0
    ram[page + PRIVATE] = U0
    ram[page + COUNTS] = NO_MAPCOUNT
    ram[page + U7] = U0


# --------------------------------------------------------------------------- the kernel's table


@outlined
def kernel_table(m, slot):
    """The table below a slot of the kernel's page table, allocated if absent; NONE without memory."""
    entry = m.ram[slot]
    if entry & U1 != U0:
        return (entry & PTE_ADDRESS) >> U3
    frame = take_frame(m)
    if frame == NONE:
        return NONE
    fill_frame(m.ram, frame, U0)
    m.ram[slot] = frame << U12 | PTE_TABLE
    change(m.stats, GAUGE_KERNEL_TABLES, 1)
    return frame << U9


@outlined
def vmemmap_slot(m, address, level):
    """Slot of level 1 or 2 that maps a vmemmap address, tables allocated on the way; NONE without memory."""
    table = kernel_table(m, (m.state[R_KERNEL_ROOT] >> U3) + index_at(address >> U12, U4))
    if table == NONE:
        return NONE
    table = kernel_table(m, table + index_at(address >> U12, U3))
    if table == NONE:
        return NONE
    slot = table + index_at(address >> U12, U2)
    if level == U2:
        return slot
    table = kernel_table(m, slot)
    if table == NONE:
        return NONE
    return table + index_at(address >> U12, U1)


@kernel
def vmemmap_directory(m, address):
    """Slot of the level-2 entry of a vmemmap address whose tables exist."""
    ram = m.ram
    entry = ram[(m.state[R_KERNEL_ROOT] >> U3) + index_at(address >> U12, U4)]
    entry = ram[((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U3)]
    return ((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U2)


@kernel
def vmemmap_pte(m, address):
    """Slot of the 4K entry of a vmemmap address whose tables exist."""
    entry = m.ram[vmemmap_directory(m, address)]
    return ((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U1)


@kernel
def vmemmap_pages(order):
    """Vmemmap pages of a folio: 8 for order 9, 4096 for order 18."""
    return U1 << (order - U6)


@outlined
def store(m, address, value):
    """A store to the vmemmap: 0, or -EFAULT through a read-only entry or where nothing is mapped; and the entry's slot.

    In Linux a fault is an oops; tails of an optimised folio are read-only. Only memcg_data takes the value: the machine
    itself follows what the other words hold, so an outsider's store leaves them as they are.
    """
    directory = vmemmap_directory(m, address)
    entry = m.ram[directory]
    slot = directory
    inside = U((1 << 21) - 1)
    if entry & PTE_LARGE == U0 and entry & U1 != U0:
        slot = vmemmap_pte(m, address)
        entry = m.ram[slot]
        inside = U4095
    if entry & U1 == U0 or entry & PTE_WRITE == U0:
        return np.int64(-EFAULT), slot
    if address & U63 == MEMCG << U3:
        m.ram[((entry & PTE_ADDRESS & ~inside) + (address & inside)) >> U3] = value
    return np.int64(0), slot


# --------------------------------------------------------------------------- pages and flushes


@kernel
def flush_kernel_range(m, pages):
    """flush_tlb_kernel_range(): every CPU is interrupted; up to 33 pages are invalidated one by one, else all."""
    if m.state[R_FLUSHES_HELD] != U0:
        m.state[R_KERNEL_UNFLUSHED] += U(pages)
        return
    charge_one(m, EVENT_TLB_FLUSH_KERNEL)
    if pages <= RANGE_CEILING:
        charge(m, EVENT_TLB_FLUSH_PAGE, np.int64(pages))


@kernel
def forget_vmemmap_page(m, frame):
    """A vmemmap page is given up: counted by where it came from. hugetlb_vmemmap.c:free_vmemmap_page()."""
    if frame >= m.state[R_FRAMES] and m.counts[frame] == _BOOT:
        m.counts[frame] = np.uint32(0)
        change(m.stats, GAUGE_MEMMAP_BOOT_PAGES, -1)
        change(m.stats, GAUGE_MEMMAP_PAGES, 1)  # taken off with the others by the caller


@kernel
def give_up(m, frame, later):
    """A vmemmap page is not mapped any more: counted, and freed now or later."""
    forget_vmemmap_page(m, frame)
    release(m, frame, later)


@kernel
def release(m, frame, later):
    """Free a vmemmap page, or put it in the chain of those to be freed after the flush of a batch."""
    if later:
        m.ram[frame << U9] = m.state[R_FREED_CHAIN]
        m.state[R_FREED_CHAIN] = frame
    else:
        put_frame(m, frame)


@outlined
def free_chain(m):
    """Free the pages of the chain."""
    frame = m.state[R_FREED_CHAIN]
    while frame != U0:
        following = m.ram[frame << U9]
        put_frame(m, frame)
        frame = following
    m.state[R_FREED_CHAIN] = U0


# --------------------------------------------------------------------------- restore


@kernel
def _fill_restored(ram, frame, shared, masks, reset):
    """vmemmap_restore_pte(): what the shared page shows; before 7.1 its first struct pages are a head's and reset.

    As captured for 7.3.4: the page is copied, stale words included; that differs from 64 copies of one struct page
    where the boot allocator left 64 different ones.
    """
    copy_frame(ram, frame, shared)
    if not masks:
        page = frame << U9
        for word in range(reset):
            ram[page + word] = ram[page + reset + word]


@kernel
def remap_restored(m, head, order):
    """Give a folio its vmemmap pages again, without a flush: 0, or -ENOMEM with nothing changed.

    alloc_vmemmap_page_list(): all pages or none.
    """
    ram = m.ram
    state = m.state
    pages = vmemmap_pages(order)
    if frames_left(m) < pages - U1:
        return np.int64(-ENOMEM)
    start = vmemmap_address(state, head)
    masks = state[R_MASK_TAILS] != U0
    reset = state[R_RESET_STRUCT_PAGES] * U8
    bits = state[R_VMEMMAP_PAGE]
    # The shared page is read until the last entry is changed: all entries show the same one.
    shared = (ram[vmemmap_pte(m, start + U(4096))] & PTE_ADDRESS) >> U12
    for base in range(U0, pages, U512):
        slot = vmemmap_pte(m, start + (base << U12))
        for i in range(U1 if base == U0 else U0, min(pages - base, U512)):
            frame = take_frame(m)
            _fill_restored(ram, frame, shared, masks, reset)
            ram[slot + i] = frame << U12 | bits
    count_restored(m, struct_page(m, head), order)
    return np.int64(0)


@kernel
def count_restored(m, first, order):
    """A folio (its head's index in `ram`) has its vmemmap pages again."""
    pages = np.int64(vmemmap_pages(order)) - 1
    m.ram[first + PRIVATE] &= ~HUGETLB_VMEMMAP_OPTIMIZED
    change(m.stats, GAUGE_VMEMMAP_PAGES, pages)
    change(m.stats, GAUGE_MEMMAP_PAGES, pages)
    charge(m, EVENT_VMEMMAP_PAGE_RESTORED, pages)


@kernel
def flush_restored(m, order):
    """The flush after a restore covers all 8 or 4096 pages before 7.1, afterwards not the first one."""
    flush_kernel_range(m, vmemmap_pages(order) - (U1 if m.state[R_MASK_TAILS] != U0 else U0))


@kernel
def end_restore(m, first, order):
    """What a restore does beside writing pages and entries."""
    if m.state[R_MASK_TAILS] == U0:
        charge_one(m, EVENT_RCU_SYNCHRONIZED)
    count_restored(m, first, order)
    flush_restored(m, order)


@kernel
def is_optimized(m, head):
    """Whether a huge page's vmemmap is optimised: HPG_vmemmap_optimized."""
    return m.ram[struct_page(m, head) + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED != U0


@outlined
def restore(m, head, order):
    """hugetlb_vmemmap_restore_folio(): 0, or -ENOMEM with nothing changed."""
    if not is_optimized(m, head):
        return np.int64(0)
    if m.state[R_MASK_TAILS] == U0:
        charge_one(m, EVENT_RCU_SYNCHRONIZED)
    status = remap_restored(m, head, order)
    if status == 0:
        flush_restored(m, order)
    return status


@kernel
def next_huge_page(m, pfn, end):
    """Head of the first HugeTLB page from `pfn` on and before `end`, 0 if there is none."""
    while pfn < end:
        if in_zone(m.state, pfn) and is_huge_page(m, pfn):
            return pfn
        pfn = (pfn | U511) + U1
    return U0


@kernel
def next_of_batch(m, head, end):
    """The head that follows in a batch: in its list (`end` 0) or in memory; 0 after the last."""
    if end == U0:
        return page_after(m, head)
    return next_huge_page(m, head + (U1 << folio_order(m, head)), end)


@outlined
def restore_batch(m, first, end):
    """hugetlb_vmemmap_restore_folios(): a list of pages, or all before `end`, with one flush: (status, pages done).

    Stops at the first that gets no memory.
    """
    done = U0
    status = np.int64(0)
    restored = False
    waited = m.state[R_MASK_TAILS] != U0
    head = first
    while head != U0 and status == 0:
        following = next_of_batch(m, head, end)
        if is_optimized(m, head):
            if not waited:
                charge_one(m, EVENT_RCU_SYNCHRONIZED)
            waited = True
            status = remap_restored(m, head, folio_order(m, head))
            restored = restored or status == 0
        if status == 0:
            done += U1
        head = following
    if restored:
        charge_one(m, EVENT_TLB_FLUSH_KERNEL)
    return status, done


# --------------------------------------------------------------------------- optimise


@outlined
def split_directory(m, address, flush):
    """Replace a 2M leaf of the vmemmap by a table of 512 entries: 0 or -ENOMEM. vmemmap_split_pmd()."""
    slot = vmemmap_directory(m, address)
    entry = m.ram[slot]
    if entry & PTE_LARGE == U0:
        return np.int64(0)
    table = take_frame(m)
    if table == NONE:
        return np.int64(-ENOMEM)
    frame = (entry & PTE_ADDRESS) >> U12
    bits = m.state[R_VMEMMAP_PAGE]
    for i in range(U512):
        m.ram[(table << U9) + i] = (frame + i) << U12 | bits
    m.ram[slot] = table << U12 | PTE_TABLE
    change(m.stats, GAUGE_KERNEL_TABLES, 1)
    if flush:
        flush_kernel_range(m, U512)
    return np.int64(0)


@outlined
def split_directories(m, head, order, flush):
    """The 2M leaves that map a folio's vmemmap, 1 or 8, become tables: 0 or -ENOMEM."""
    start = vmemmap_address(m.state, head)
    end = start + (vmemmap_pages(order) << U12)
    address = start
    while address < end:
        status = split_directory(m, address, flush)
        if status != 0:
            return status
        address = (address | U((1 << 21) - 1)) + U1
    return np.int64(0)


@outlined
def fill_tail_page(m, frame, order, node):
    """A shared tail page made at run time: 64 clean tails. vmemmap_get_tail(), init_compound_tail()."""
    flags = m.state[R_TAIL_FLAGS] | node << m.state[R_NODE_SHIFT]
    compound = compound_info(m.state, U0, order)
    for i in range(U64):
        write_tail(m.ram, (frame << U9) + i * U8, flags, U0, compound)


@outlined
def tail_page(m, head, order):
    """The shared tail page of a folio's node and order, made when it is first asked for; NONE without memory."""
    node = node_of(m.state, head)
    word = hstate_node(hstate_of_order(order), node) + H_NODE_TAIL_PAGE
    frame = m.state[word]
    if frame == U0:
        frame = take_frame(m)
        if frame != NONE:
            fill_tail_page(m, frame, order, node)
            m.state[word] = frame
            change(m.stats, GAUGE_VMEMMAP_PAGES, 1)
    return frame


@outlined
def remap_optimized(m, head, order, later):
    """Remap a folio's vmemmap to one page of its own and a shared one, without a flush: 0 or -ENOMEM, nothing changed.

    The head's page is copied to a new frame: 7.1 and later need one; before, the old page is kept when there is none.
    Then the 2M leaves are split, each with a flush; those split before memory ended stay split. `later`: the pages
    given up are in the chain afterwards. __hugetlb_vmemmap_optimize_folio(), vmemmap_remap_free().

    Simplified: where memory ends at the second to eighth leaf of a 1G page, Linux has remapped what lies before and
    restores it from the shared page.
    """
    ram = m.ram
    state = m.state
    pages = vmemmap_pages(order)
    start = vmemmap_address(state, head)
    masks = state[R_MASK_TAILS] != U0
    tail = tail_page(m, head, order) if masks else U0
    if tail == NONE:
        return np.int64(-ENOMEM)
    frame = take_frame(m)
    if frame == NONE and masks:
        return np.int64(-ENOMEM)
    first = struct_page(m, head)
    ram[first + PRIVATE] |= HUGETLB_VMEMMAP_OPTIMIZED
    old = first >> U9
    if frame != NONE:
        copy_frame(ram, frame, old)
        charge_one(m, EVENT_VMEMMAP_HEAD_COPIED)
    if split_directories(m, head, order, True) != 0:
        ram[first + PRIVATE] &= ~HUGETLB_VMEMMAP_OPTIMIZED
        if frame != NONE:
            release(m, frame, later)
        return np.int64(-ENOMEM)
    if frame == NONE:
        frame = old
    else:
        ram[vmemmap_pte(m, start)] = frame << U12 | state[R_VMEMMAP_PAGE]
        give_up(m, old, later)
    entry = (tail if masks else frame) << U12 | state[R_VMEMMAP_READ_ONLY]
    for base in range(U0, pages, U512):
        slot = vmemmap_pte(m, start + (base << U12))
        for i in range(U1 if base == U0 else U0, min(pages - base, U512)):
            give_up(m, (ram[slot + i] & PTE_ADDRESS) >> U12, later)
            ram[slot + i] = entry
    net = np.int64(1) - np.int64(pages)  # with a new page for the head or without
    change(m.stats, GAUGE_VMEMMAP_PAGES, net)
    change(m.stats, GAUGE_MEMMAP_PAGES, net)
    charge(m, EVENT_VMEMMAP_PAGE_FREED, -net)
    return np.int64(0)


@kernel
def should_optimize(m, head):
    """Whether a huge page that joins a pool is optimised: vmemmap_should_optimize_folio()."""
    return m.state[R_OPTIMIZE_VMEMMAP] != U0 and not is_optimized(m, head)


@outlined
def optimize(m, head, order):
    """hugetlb_vmemmap_optimize_folio(): 0, or -ENOMEM with the folio left as it was."""
    if not should_optimize(m, head):
        return np.int64(0)
    if m.state[R_MASK_TAILS] == U0:
        charge_one(m, EVENT_RCU_SYNCHRONIZED)
    status = remap_optimized(m, head, order, False)
    if status == 0:
        flush_kernel_range(m, vmemmap_pages(order))
    return status


@kernel
def presplit(m, head):
    """hugetlb_vmemmap_split_folio(): 0 or -ENOMEM, without flushes."""
    return split_directories(m, head, folio_order(m, head), False) if should_optimize(m, head) else np.int64(0)


@outlined
def optimize_batch(m, first, end):
    """hugetlb_vmemmap_optimize_folios(): a list of pages, or all before `end`, with two flushes: how many it did.

    One flush comes after all 2M leaves are split, one before the pages given up are freed; both come whether or not
    there is anything to do, and where the boot allocator optimises (6.15) the first only for a batch that has pages.
    A page that gets no memory makes the others' pages free at once, and is tried once more.
    """
    done = U0
    if first == U0 and m.state[R_BOOT_MARKS] != U0:
        charge_one(m, EVENT_TLB_FLUSH_KERNEL)
        return done
    head = first
    while head != U0 and presplit(m, head) == 0:
        head = next_of_batch(m, head, end)
    charge_one(m, EVENT_TLB_FLUSH_KERNEL)
    if first != U0 and m.state[R_MASK_TAILS] == U0 and should_optimize(m, first):
        charge_one(m, EVENT_RCU_SYNCHRONIZED)
    head = first
    while head != U0:
        following = next_of_batch(m, head, end)
        order = folio_order(m, head)
        if not should_optimize(m, head):
            head = following
            continue
        status = remap_optimized(m, head, order, True)
        if status != 0 and m.state[R_FREED_CHAIN] != U0:
            charge_one(m, EVENT_TLB_FLUSH_KERNEL)
            free_chain(m)
            status = remap_optimized(m, head, order, True)
        if status == 0:
            done += U1
        head = following
    charge_one(m, EVENT_TLB_FLUSH_KERNEL)
    free_chain(m)
    return done


# --------------------------------------------------------------------------- boot


@kernel
def map_large(m, address, frame):
    """A 2M leaf of the vmemmap onto 512 frames: 0 or -ENOMEM."""
    slot = vmemmap_slot(m, address, U2)
    if slot == NONE:
        return np.int64(-ENOMEM)
    m.ram[slot] = frame << U12 | m.state[R_VMEMMAP_LARGE]
    return np.int64(0)


@outlined
def count_boot_pages(m, frame, pages):
    """Vmemmap pages that the boot allocator gave: marked, in use, and beyond the limit of frames."""
    m.state[R_FRAMES_LIMIT] += pages
    for i in range(frame, frame + pages):
        m.counts[i] = _BOOT
    change(m.stats, GAUGE_FRAMES_USED, np.int64(pages))
    change(m.stats, GAUGE_VMEMMAP_PAGES, np.int64(pages))
    change(m.stats, GAUGE_MEMMAP_BOOT_PAGES, np.int64(pages))
