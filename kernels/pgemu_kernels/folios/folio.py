"""struct page and struct folio: 64 bytes each, at their place in the vmemmap.

Words of a struct page (include/linux/mm_types.h): 0 flags, 1 compound_info or lru.next, 2 lru.prev,
3 mapping, 4 index, 5 private, 6 _mapcount or page_type (low half) and _refcount (high half),
7 memcg_data. A folio's further fields lie in the struct pages after the head.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, U0, U1, U2, U3, U4, U6, U8, U12, U24, U32, U511, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_GUEST_PAGES,
    R_KERNEL_ROOT,
    R_LRU_REFS,
    R_MASK_TAILS,
    R_POOL_BASE,
    R_VMEMMAP,
)

U = np.uint64

ORDER_1G = U(18)
_INSIDE_1G = U((1 << 18) - 1)

FLAGS = U(0)
COMPOUND = U(1)
MAPPING = U(3)
INDEX = U(4)
PRIVATE = U(5)
COUNTS = U(6)
MEMCG = U(7)
# Words of the second to fourth struct page of a folio, from its second on.
NR_PAGES = U(7)
NR_PAGES_6_12 = U(4)
SUBPOOL_6_12 = U(8 + 2)  # 6.12 has these in the third page, later ones in the fourth
CGROUP_6_12 = U(8 + 3)
HWPOISON_6_12 = U(8 + 5)
SUBPOOL = U(16 + 2)
CGROUP = U(16 + 3)
HWPOISON = U(16 + 5)

PG_REFERENCED = U(1 << 2)
PG_UPTODATE = U(1 << 3)
PG_DIRTY = U(1 << 4)
PG_HEAD = U(1 << 6)
PG_WORKINGSET = U(1 << 9)
PG_ANON_EXCLUSIVE = U(1 << 11)  # PG_owner_2: of a private page that is one mapping's alone
FLAGS_KEPT = U(0xFFFFFFFFC0000000)  # of page->flags when a page is freed: node, zone, last_cpupid
LOW_BYTE = U(0xFF)  # of the second struct page's flags: the folio's order
HUGETLB_MIGRATABLE = U(1 << 1)
HUGETLB_FREED = U(1 << 3)  # include/linux/hugetlb.h: HPG_freed
HUGETLB_VMEMMAP_OPTIMIZED = U(1 << 4)
PGTY_HUGETLB = U(0xF4000000)
# Of a piece of a split huge page that left guest_memfd's page cache and that somebody holds: RFC v2's
# include/linux/page-flags.h.
PGTY_GUESTMEM_HUGETLB = U(0xF9000000)
_FIRST_TYPE = U(0x80000000)
_LAST_TYPE = U(0xFF000000)
TAIL_MAPPING = U(0xDEAD000000000400)
NO_MAPCOUNT = LOW32  # _mapcount -1
ONE_REFERENCE = U(1 << 32)
ONE_CACHED = U(1 << 32 | 0xFFFFFFFF)  # refcount 1, mapcount -1: an idle 4K folio of the page cache


@kernel
def vmemmap_address(state, pfn):
    """Virtual address of a struct page."""
    return state[R_VMEMMAP] + (pfn << U6)


@kernel
def struct_page(m, pfn):
    """Index in `ram` of a struct page, through the kernel's own page table: three or four loads."""
    ram = m.ram
    address = vmemmap_address(m.state, pfn)
    entry = ram[(m.state[R_KERNEL_ROOT] >> U3) + index_at(address >> U12, U4)]
    entry = ram[((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U3)]
    entry = ram[((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U2)]
    if entry & PTE_LARGE:
        return ((entry & PTE_ADDRESS) + (address & U((1 << 21) - 1))) >> U3
    entry = ram[((entry & PTE_ADDRESS) >> U3) + index_at(address >> U12, U1)]
    return ((entry & PTE_ADDRESS) | (address & U4095)) >> U3


@kernel
def folio_test_large(ram, page):
    """Whether the struct page at index `page` of `ram` is the head of others."""
    return ram[page + FLAGS] & PG_HEAD != U0


@kernel
def folio_order(ram, page):
    """mm.h:folio_order(): the low byte of the second struct page's flags."""
    return ram[page + U8 + FLAGS] & LOW_BYTE if folio_test_large(ram, page) else U0


@kernel
def order_of(m, head):
    """The order of the folio whose first frame is `head`."""
    return folio_order(m.ram, struct_page(m, head))


@kernel
def is_huge_page(m, pfn):
    """Whether a frame is the head of a HugeTLB page: PageHead and the page type, in a struct page that is no tail.

    Where tails share the head's page, every 64th of them looks like the head; the next struct page tells whose head it
    is. include/linux/page-flags.h:page_fixed_fake_head()
    """
    page = struct_page(m, pfn)
    ram = m.ram
    typed = (ram[page + COUNTS] & LOW32) >> U24 == PGTY_HUGETLB >> U24
    if ram[page + FLAGS] & PG_HEAD == U0 or ram[page + COMPOUND] & U1 != U0 or not typed:
        return False
    return m.state[R_MASK_TAILS] != U0 or ram[page + U8 + COMPOUND] == vmemmap_address(m.state, pfn) | U1


@kernel
def reference_count(ram, page):
    return ram[page + COUNTS] >> U32


@kernel
def mappings(ram, page):
    """Page-table entries that map a 4K folio; 0 for a typed one, whose word holds the type (from 0x80000000 on)."""
    word = ram[page + COUNTS] & LOW32
    return U0 if _FIRST_TYPE <= word < _LAST_TYPE else word + U1 & LOW32


@kernel
def add_references(ram, page, n):
    """Add `n` (uint64, two's complement to take away) to a folio's refcount."""
    ram[page + COUNTS] += n << U32


@kernel
def add_mapping(ram, page):
    """A 4K folio gets one more page-table entry: _mapcount + 1. mm/rmap.c:__folio_add_rmap()."""
    word = ram[page + COUNTS]
    ram[page + COUNTS] = (word & ~LOW32) | (word + U1 & LOW32)


@kernel
def remove_mapping(ram, page):
    """One page-table entry less: _mapcount - 1 and the reference that the entry held."""
    word = ram[page + COUNTS]
    ram[page + COUNTS] = (word - ONE_REFERENCE & ~LOW32) | (word - U1 & LOW32)


@outlined
def mark_accessed(m, pfn):
    """mm/swap.c:folio_mark_accessed() of the HugeTLB folio around a frame; nothing for other frames.

    A HugeTLB folio is in no LRU list. MGLRU counts its references, up to 3: 6.12 (folio_inc_refs()) sets referenced,
    then workingset, then counts; later ones (lru_gen_inc_refs()) set referenced, count, and set workingset at last.
    Without MGLRU referenced is set, and the second time cleared, for what would be activated is in no list.
    """
    ram = m.ram
    if pfn - m.state[R_POOL_BASE] >= m.state[R_GUEST_PAGES]:
        return
    head = pfn & ~U511  # of a 1G page's tails some read as its head, whose words they show
    if not is_huge_page(m, head):
        head = pfn & ~_INSIDE_1G
        if not is_huge_page(m, head) or order_of(m, head) != ORDER_1G:
            return
    page = struct_page(m, head) + FLAGS
    shift = m.state[R_LRU_REFS]
    counts = U3 << shift
    if ram[page] & PG_REFERENCED == U0:
        ram[page] |= PG_REFERENCED
    elif shift == U0:
        ram[page] &= ~PG_REFERENCED
    elif m.state[R_FOLIO_6_12] != U0 and ram[page] & PG_WORKINGSET == U0:
        ram[page] |= PG_WORKINGSET
    elif ram[page] & counts != counts:
        ram[page] += U1 << shift
    else:
        ram[page] |= PG_WORKINGSET
