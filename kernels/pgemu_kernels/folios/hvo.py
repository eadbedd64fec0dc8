"""The vmemmap's optimisation: restore and optimise, single and in batches. mm/hugetlb_vmemmap.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U8, U9, U12, U64, U511, U512
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, frames_left, take_frame
from pgemu_kernels.folios.folio import (
    HUGETLB_VMEMMAP_OPTIMIZED,
    PRIVATE,
    is_huge_page,
    order_of,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import hstate_node, hstate_of_order, in_zone, node_of, page_after
from pgemu_kernels.folios.vmemmap import (
    compound_info,
    flush_kernel_range,
    free_chain,
    free_vmemmap_page,
    give_up,
    vmemmap_directory,
    vmemmap_pages,
    vmemmap_pte,
    write_tail,
)
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_TABLE
from pgemu_kernels.words.enum_words import (
    EVENT_RCU_SYNCHRONIZED,
    EVENT_TLB_FLUSH_KERNEL,
    EVENT_VMEMMAP_HEAD_COPIED,
    EVENT_VMEMMAP_PAGE_FREED,
    EVENT_VMEMMAP_PAGE_RESTORED,
    GAUGE_KERNEL_TABLES,
    GAUGE_MEMMAP_PAGES,
    GAUGE_VMEMMAP_PAGES,
)
from pgemu_kernels.words.operations import ENOMEM
from pgemu_kernels.words.registers import (
    R_BOOT_MARKS,
    R_FREED_CHAIN,
    R_MASK_TAILS,
    R_NODE_SHIFT,
    R_OPTIMIZE_VMEMMAP,
    R_RESET_STRUCT_PAGES,
    R_TAIL_FLAGS,
    R_VMEMMAP_PAGE,
    R_VMEMMAP_READ_ONLY,
)
from pgemu_kernels.words.rows import H_NODE_TAIL_PAGE

U = np.uint64


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
    return next_huge_page(m, head + (U1 << order_of(m, head)), end)


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
            status = remap_restored(m, head, order_of(m, head))
            restored = restored or status == 0
        if status == 0:
            done += U1
        head = following
    if restored:
        charge_one(m, EVENT_TLB_FLUSH_KERNEL)
    return status, done


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
            free_vmemmap_page(m, frame, later)
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
    return split_directories(m, head, order_of(m, head), False) if should_optimize(m, head) else np.int64(0)


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
        order = order_of(m, head)
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
