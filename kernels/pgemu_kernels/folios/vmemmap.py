"""The vmemmap's page table. Its optimisation (HVO) is hvo.py's: mm/hugetlb_vmemmap.c.

A folio of order 9 or 18 has 8 or 4096 vmemmap pages. Optimised, it keeps the first; the entries of the
others point, read-only, to one shared page of tails (7.1 and later: one per zone and order) or to the
folio's own first page (before).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import (
    NONE,
    U0,
    U1,
    U2,
    U3,
    U4,
    U6,
    U7,
    U8,
    U9,
    U12,
    U63,
    U64,
    U512,
    U4095,
    merge_words,
    prefetch,
)
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import empty_frame, put_frame
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    INDEX,
    MAPPING,
    MEMCG,
    NO_MAPCOUNT,
    PRIVATE,
    TAIL_MAPPING,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_TABLE, PTE_WRITE
from pgemu_kernels.words.enum_words import (
    EVENT_TLB_FLUSH_KERNEL,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_FRAMES_USED,
    GAUGE_KERNEL_TABLES,
    GAUGE_MEMMAP_BOOT_PAGES,
    GAUGE_MEMMAP_PAGES,
    GAUGE_VMEMMAP_PAGES,
)
from pgemu_kernels.words.operations import EFAULT, ENOMEM
from pgemu_kernels.words.registers import (
    R_FLUSHES_HELD,
    R_FRAMES,
    R_FRAMES_LIMIT,
    R_FREED_CHAIN,
    R_KERNEL_ROOT,
    R_KERNEL_UNFLUSHED,
    R_MASK_TAILS,
    R_VMEMMAP_LARGE,
)
from pgemu_kernels.words.rows import VMEMMAP_BOOT

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


@outlined
def rewrite(ram, page, source, count, ahead, index, kept, put):
    """Write `count` struct pages from `page` on: what those from `source` on have, changed.

    `kept`, `put`: of words 0 to 3 and of words 4 to 7, which bits stay and which are set. `index` is or-ed into the
    index of the first page, index + 1 into that of the next, unless it is NONE. `ahead`: words to what is prefetched.
    """
    step = U1
    if index == NONE:
        index = step = U0
    for _ in range(count):
        prefetch(ram, page + ahead)
        merge_words(ram, page, source, kept[0], put[0], U0)
        merge_words(ram, page + INDEX, source + INDEX, kept[1], put[1], index)
        index += step
        page += U8
        source += U8


@outlined
def rewrite_pages(m, start, end, kept, put):
    """rewrite() in place of struct pages [start, end), which fill vmemmap pages or lie within one."""
    for base in range(start, end, U64):
        page = struct_page(m, base)
        rewrite(m.ram, page, page, min(U64, end - base), U512, NONE, kept, put)


# --------------------------------------------------------------------------- the kernel's table


@outlined
def kernel_table(m, slot):
    """The table below a slot of the kernel's page table, allocated if absent; NONE without memory."""
    entry = m.ram[slot]
    if entry & U1 != U0:
        return (entry & PTE_ADDRESS) >> U3
    frame = empty_frame(m, U0, GAUGE_KERNEL_TABLES)
    if frame == NONE:
        return NONE
    m.ram[slot] = frame << U12 | PTE_TABLE
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
def store_vmemmap(m, address, value):
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
    free_vmemmap_page(m, frame, later)


@kernel
def free_vmemmap_page(m, frame, later):
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
