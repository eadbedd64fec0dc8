"""HugeTLB pools and their vmemmap as lists and dicts, after mm/hugetlb.c and mm/hugetlb_vmemmap.c.

A vmemmap page is an object with 64 struct pages of 8 words; an entry of the vmemmap's page table names one, so that
sharing is identity. A free list is a list of head frames in the order in which they are taken. Frames are a number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import EBUSY, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP, WOULD_SPIN

STRUCT_PAGES = 64  # of one vmemmap page
ALL_ONES = (1 << 64) - 1
LOW32 = (1 << 32) - 1
VMEMMAP = 0xFFFF_EA00_0000_0000
LISTS = 0xFFFF_FFFF_8200_0000  # where the machine says that the kernel has its list heads
CGROUP = 0xFFFF_8880_0030_0000
RAW_POISON = 0xFFFF_8880_0031_0000
POISON1, POISON2 = 0xDEAD_0000_0000_0100, 0xDEAD_0000_0000_0122
TAIL_MAPPING = 0xDEAD_0000_0000_0400
HUGETLB, BUDDY = 0xF400_0000, 0xF000_0000  # page types
HEAD = 1 << 6
PAGE_FLAGS = (1 << 19) - 1  # those that a page has for itself
INHERITED = sum(1 << bit for bit in (0, 2, 3, 4, 8, 9, 10, 17, 18))  # those that the pages of a split folio get
FREED, OPTIMIZED = 1 << 3, 1 << 4  # of a huge page's private word

FLAGS, NEXT, PREV, MAPPING, INDEX, PRIVATE, COUNTS, MEMCG = range(8)  # the words of a struct page

READ_WRITE, READ_ONLY, LARGE, SAVED_DIRTY = 0x8000_0000_0000_0163, 0x8000_0000_0000_0121, 0x8000_0000_0000_01E3, 1 << 58


class Word(NamedTuple):
    """A word of a huge page: in its n-th struct page."""

    page: int
    word: int


@dataclass(frozen=True)
class Kernel:
    """What differs between kernels, by what their sources and the captures say.

    masks: compound_info is a mask and tails share one page per node and order. reset: struct pages rewritten in each
    restored vmemmap page. early: the boot allocator optimises 1G pages. batches_nothing: how often a batch without a
    page flushes.
    """

    masks: bool
    reset: int
    early: bool
    order: dict[Word, int]  # what prep_compound_head() writes for any order
    pages: Word
    subpool: Word
    cgroup: Word
    raw_poison: Word
    deferred_list: Word | None
    batches_nothing: int
    hwpoison: int = 1 << 21
    ascending: bool = True


_LATER: dict[str, Any] = {
    "early": True,
    "order": {Word(1, 2): LOW32, Word(1, 3): LOW32, Word(1, 4): ALL_ONES},
    "pages": Word(1, 7),
    "subpool": Word(3, 2),
    "cgroup": Word(3, 3),
    "raw_poison": Word(3, 5),
    "deferred_list": Word(2, 2),
    "batches_nothing": 1,
}
KERNELS = {
    "6.12": Kernel(
        masks=False, reset=3, early=False, order={Word(1, 2): ALL_ONES, Word(1, 3): 0}, pages=Word(1, 4),
        subpool=Word(2, 2), cgroup=Word(2, 3), raw_poison=Word(2, 5), deferred_list=None, batches_nothing=2,
        hwpoison=1 << 20,
    ),
    "6.18": Kernel(masks=False, reset=4, **_LATER),
    "7.3": Kernel(masks=True, reset=0, ascending=False, **_LATER),
}  # fmt: skip


class Configuration(NamedTuple):
    """Flags of struct pages at boot and of those made later; where the node begins; what is configured."""

    flags: int
    later: int
    node_shift: int
    cgroups: bool
    deferred: bool
    memory_failure: bool


CONFIGURATIONS = {
    "debian": Configuration(0x0017_FFFF_C000_0000, 0x0010_0000_0000_0000, 54, True, True, True),
    "small": Configuration(0x4000_0000_0000_0000, 0x4000_0000_0000_0000, 0, False, False, False),
}


class Outcome(NamedTuple):
    status: int
    detail: int


@dataclass(eq=False)
class VmemmapPage:
    """A page of 64 struct pages; `boot`: the boot allocator gave it."""

    words: np.ndarray[Any, Any]
    boot: bool = False

    def copy(self) -> VmemmapPage:
        return VmemmapPage(self.words.copy())


class Entry(NamedTuple):
    """A 4K entry of the vmemmap's table."""

    page: VmemmapPage
    bits: int

    @property
    def writable(self) -> bool:
        return bool(self.bits & 2)


@dataclass
class Pool:
    """A struct hstate: of each node its pages, its surplus ones and its free list; pages in use, the last one first."""

    order: int
    number: int
    nodes: int
    overcommit: int = 0
    next_allocate: int = 0
    next_free: int = 0
    pages: list[int] = field(init=False)
    surplus: list[int] = field(init=False)
    free: list[list[int]] = field(init=False)
    active: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = [0] * self.nodes
        self.surplus = [0] * self.nodes
        self.free = [[] for _ in range(self.nodes)]

    @property
    def persistent(self) -> int:
        return sum(self.pages) - sum(self.surplus)

    @property
    def count_free(self) -> int:
        return sum(len(heads) for heads in self.free)

    def lists(self) -> list[tuple[int, list[int]]]:
        """Address of each list's head, and what is in it."""
        row = LISTS + 8 * 24 * self.number
        return [(row + 8 * 8, self.active)] + [(row + 8 * (12 + 6 * n), self.free[n]) for n in range(self.nodes)]


class Node(NamedTuple):
    """Frames of a node: where its 1G pages, its 2M pages and its other memory begin, and its end."""

    base: int
    huge: int
    buddy: int
    end: int


def share(count: int, nodes: int, node: int) -> int:
    """How many of `count` things a node gets that are dealt out one by one."""
    return len(range(node, count, nodes))


class Model:
    """Memory of HugeTLB pages: pools of 2M and of 1G over one or two nodes, and 2M blocks that are in no pool."""

    def __init__(
        self,
        kernel: str,
        base: int,
        *,
        huge: int = 0,
        gigantic: int = 0,
        buddy: int = 0,
        nodes: int = 1,
        hvo: bool = True,
        configuration: str = "debian",
        frames: int | None = None,
    ) -> None:
        self.kernel = KERNELS[kernel]
        self.configuration = CONFIGURATIONS[configuration]
        self.hwpoison = self.kernel.hwpoison if self.configuration.memory_failure else 0
        self.optimizing = self.hvo = hvo
        self.pools = {9: Pool(9, 0, nodes), 18: Pool(18, 1, nodes)}
        self.entries: dict[int, Entry] = {}  # by number of the vmemmap page
        self.large: dict[int, list[VmemmapPage]] = {}  # 2M leaves, by number of 2M: their 512 pages
        self.tables: set[tuple[int, int]] = {(5, 0)}
        self.tails: dict[tuple[int, int], VmemmapPage] = {}  # shared tail pages, by order and node
        self.orders: dict[int, int] = {}  # head -> order of every huge page
        self.poisoned: dict[int, list[int]] = {}  # head -> pages
        self.raw: list[int | None] = []  # poisoned pages by the place of their record
        self.references: dict[int, int] = {}
        self.pieces: dict[int, int] = {}  # head -> order of what is split
        self.blocks: set[int] = set()  # first frames of free 2M blocks
        self.events: Counter[Event] = Counter()
        self.memmap = self.memmap_boot = self.taken = self.boot_pages = 0
        self.limit = 1 << 62 if frames is None else frames
        self.nodes: list[Node] = []
        for n in range(nodes):
            first = base + (share(gigantic, nodes, n) << 18)
            last = first + (share(huge, nodes, n) << 9)
            end = last + (share(buddy, nodes, n) << 9)
            self.nodes.append(Node(base, first, last, end))
            base += -(-(end - base) >> 18) << 18
        for n in range(nodes):
            self._boot(n)
        self.relink()

    # ------------------------------------------------------------------ frames

    @property
    def used(self) -> int:
        """Frames in use: tables and vmemmap pages."""
        return len(self.tables) + self.taken + self.boot_pages

    @property
    def left(self) -> int:
        return self.limit + self._boot_given - self.used

    _boot_given = 0

    def take(self, page: VmemmapPage) -> VmemmapPage | None:
        if self.left < 1:
            return None
        self.taken += 1
        return page

    def drop(self, page: VmemmapPage) -> None:
        """free_vmemmap_page(): back to where it came from."""
        if page.boot:
            self.boot_pages -= 1
            self.memmap_boot -= 1
        else:
            self.taken -= 1
            self.memmap -= 1

    def boot_page(self, page: VmemmapPage, counted: bool = True) -> VmemmapPage:
        page.boot = True
        self.boot_pages += 1
        self._boot_given += 1
        self.memmap_boot += counted
        return page

    # ------------------------------------------------------------------ struct pages

    def node_of(self, pfn: int) -> int:
        return max(n for n in range(len(self.nodes)) if pfn >= self.nodes[n].base)

    def page_at(self, pfn: int) -> VmemmapPage:
        number = pfn // STRUCT_PAGES
        if number >> 9 in self.large:
            return self.large[number >> 9][number & 511]
        return self.entries[number].page

    def words(self, pfn: int) -> Any:
        """The 8 words of a struct page (a view)."""
        return self.page_at(pfn).words[pfn % STRUCT_PAGES]

    def get(self, pfn: int, word: int) -> int:
        return int(self.words(pfn)[word])

    def put(self, pfn: int, word: int, value: int) -> None:
        self.words(pfn)[word] = value

    def over(self, head: int, order: int) -> list[Any]:
        """The words of all struct pages of a huge page, 64 at a time."""
        return [self.page_at(pfn).words for pfn in range(head, head + (1 << order), STRUCT_PAGES)]

    def set_flag(self, pfn: int, word: int, bits: int, on: bool = True) -> None:
        self.put(pfn, word, self.get(pfn, word) | bits if on else self.get(pfn, word) & ~bits)

    def set_type(self, pfn: int, kind: int) -> None:
        self.put(pfn, COUNTS, self.get(pfn, COUNTS) & ~LOW32 | kind)

    def compound(self, head: int, order: int) -> int:
        return ALL_ONES ^ (1 << order + 6) - 1 | 1 if self.kernel.masks else VMEMMAP + 64 * head | 1

    def fresh(self, pfn: int, node: int, counts: int = LOW32) -> VmemmapPage:
        """64 struct pages from `pfn` on as boot leaves them: lru points at itself."""
        page = VmemmapPage(np.zeros((STRUCT_PAGES, 8), np.uint64))
        links = np.uint64(VMEMMAP + 64 * pfn + 8) + np.arange(STRUCT_PAGES, dtype=np.uint64) * np.uint64(64)
        page.words[:, FLAGS] = self.configuration.flags | node << self.configuration.node_shift
        page.words[:, NEXT] = page.words[:, PREV] = links
        page.words[:, COUNTS] = counts
        return page

    def write_head(self, head: int, order: int) -> None:
        """prep_compound_head() and init_new_hugetlb_folio()."""
        kernel = self.kernel
        self.set_flag(head, FLAGS, HEAD)
        self.put(head, NEXT, 0)
        self.put(head, MAPPING, 0)
        self.set_type(head, HUGETLB)
        self.put(head + 1, FLAGS, self.get(head + 1, FLAGS) & ~0xFF | order)
        fields = {**kernel.order, kernel.pages: 1 << order, kernel.subpool: 0}
        if self.configuration.cgroups:
            fields[kernel.cgroup] = 0
        if kernel.deferred_list:
            link = VMEMMAP + 64 * (head + 2) + 16
            fields |= {kernel.deferred_list: link, Word(2, 3): link}
        for where, value in fields.items():
            self.put(head + where.page, where.word, value)

    def prepare(self, head: int, order: int) -> None:
        """prep_compound_page(): every tail gets its mapping, its compound word and no private word."""
        for words in self.over(head, order):
            words[:, NEXT] = self.compound(head, order)
            words[:, MAPPING] = TAIL_MAPPING
            words[:, PRIVATE] = 0
        self.write_head(head, order)
        self.orders[head] = order

    # ------------------------------------------------------------------ boot

    def _table(self, number: int, level: int) -> None:
        """The tables above an entry of this level for a vmemmap page."""
        address = VMEMMAP + number * 4096
        for above in range(level + 1, 5):
            self.tables.add((above, address >> 12 + 9 * (above - 1)))

    def set_entry(self, number: int, page: VmemmapPage, bits: int) -> None:
        self.entries[number] = Entry(page, bits)
        self._table(number, 1)

    def _boot(self, n: int) -> None:
        node = self.nodes[n]
        if self.hvo:
            for head in range(node.base, node.huge, 1 << 18):
                self._boot_gigantic(head, n)
            for head in range(node.huge, node.buddy, 512):
                self._boot_optimized(head, 9, self.boot_tail(9, n) if self.kernel.masks else None, False)
        self._boot_whole(n, node.buddy if self.hvo else node.base)
        if not self.hvo:
            for head in range(node.base, node.huge, 1 << 18):
                self.prepare(head, 18)
            for head in range(node.huge, node.buddy, 512):
                self.prepare(head, 9)
        for block in range(node.buddy, node.end, 512):
            self.free_block(block)
        gigantic = list(range(node.base, node.huge, 1 << 18))
        self._fill(18, n, gigantic if self.kernel.ascending else gigantic[::-1])
        self._fill(9, n, list(range(node.huge, node.buddy, 512)))

    def _fill(self, order: int, n: int, heads: list[int]) -> None:
        pool = self.pools[order]
        pool.free[n] = heads
        pool.pages[n] = len(heads)
        for head in heads:
            self.set_flag(head, PRIVATE, FREED)

    def boot_tail(self, order: int, n: int) -> VmemmapPage:
        """A shared tail page, taken when it is first needed; the machine has memory at boot."""
        page = self.get_tail(order, n)
        assert page is not None
        return page

    def _boot_gigantic(self, head: int, n: int) -> None:
        early = self.kernel.early
        tail = None
        if self.kernel.masks:
            if (18, n) not in self.tails:
                self.tails[18, n] = self.boot_page(self._stale_tail(n), counted=False)
            tail = self.tails[18, n]
        self._boot_optimized(head, 18, tail, early)

    def _stale_tail(self, n: int) -> VmemmapPage:
        """7.3's: what was written to it last, by struct pages of other frames (captured)."""
        end = self.nodes[n].base + (1 << 15) if self.configuration.deferred else self.nodes[n].huge
        page = self.fresh(end - STRUCT_PAGES, n, 1 << 32 | LOW32)
        page.words[:, NEXT] = self.compound(0, 18)
        page.words[:, MAPPING] = TAIL_MAPPING
        return page

    def _boot_optimized(self, head: int, order: int, tail: VmemmapPage | None, early: bool) -> None:
        """A huge page that is optimised from boot on. `early`: by the boot allocator, whose entries have bit 58.

        6.18's has entries 64 and on read-write.
        """
        own = self.fresh(head, self.node_of(head))
        own.words[:, NEXT] = self.compound(head, order)
        own.words[:, MAPPING] = TAIL_MAPPING
        if early:
            self.boot_page(own)
        else:
            taken = self.take(own)
            assert taken is not None
            self.memmap += 1
        first = head // STRUCT_PAGES
        marks = SAVED_DIRTY if early else 0
        for i in range(1 << order - 6):
            bits = READ_ONLY | marks
            if i == 0 or (early and tail is None and i >= 64):
                bits = READ_WRITE
            self.set_entry(first + i, own if i == 0 or tail is None else tail, bits)
        self.write_head(head, order)
        self.put(head, NEXT, VMEMMAP + 64 * head + 8)
        self.put(head, PRIVATE, OPTIMIZED)
        self.orders[head] = order

    def _boot_whole(self, n: int, start: int) -> None:
        """Memory whose struct pages are all there: 2M leaves where no optimised huge page is among them."""
        section = STRUCT_PAGES * 512
        end = self.nodes[n].end
        for base in range(start // section * section, end, section):
            numbers = range(max(base, start) // STRUCT_PAGES, min(base + section, end) // STRUCT_PAGES)
            pages = {i: self.boot_page(self.fresh(i * STRUCT_PAGES, n)) for i in numbers}
            if base < start:
                for number, page in pages.items():
                    self.set_entry(number, page, READ_WRITE)
            else:
                blank = np.zeros((STRUCT_PAGES, 8), np.uint64)
                leaf = range(base // STRUCT_PAGES, base // STRUCT_PAGES + 512)
                rest = {i: self.boot_page(VmemmapPage(blank)) for i in leaf if i not in pages}
                self.large[base // section] = [(pages | rest)[i] for i in leaf]
                self._table(base // STRUCT_PAGES, 2)

    # ------------------------------------------------------------------ lists

    def relink(self) -> None:
        """The links of everything in the pools' lists, once an operation has ended."""
        for pool in self.pools.values():
            for address, heads in pool.lists():
                links = [address, *(VMEMMAP + 64 * head + 8 for head in heads), address]
                for i, head in enumerate(heads):
                    self.put(head, NEXT, links[i + 2])
                    self.put(head, PREV, links[i])

    def enqueue(self, pool: Pool, head: int) -> None:
        """enqueue_hugetlb_folio()."""
        pool.free[self.node_of(head)].insert(0, head)
        self.set_flag(head, PRIVATE, FREED)

    def remove(self, pool: Pool, head: int, surplus: bool) -> None:
        """remove_hugetlb_folio()."""
        n = self.node_of(head)
        (pool.free[n] if head in pool.free[n] else pool.active).remove(head)
        pool.pages[n] -= 1
        pool.surplus[n] -= surplus
        self.set_flag(head, PRIVATE, FREED, False)
        self.put(head, NEXT, POISON1)
        self.put(head, PREV, POISON2)

    def readmit(self, pool: Pool, head: int, surplus: bool) -> None:
        """add_hugetlb_folio()."""
        n = self.node_of(head)
        pool.pages[n] += 1
        pool.surplus[n] += surplus
        self.enqueue(pool, head)

    # ------------------------------------------------------------------ the page allocator

    def free_block(self, pfn: int) -> None:
        self.put(pfn, PRIVATE, 9)
        self.set_type(pfn, BUDDY)
        self.blocks.add(pfn)

    def alloc_pages(self, order: int, n: int) -> int | None:
        """The lowest block of a node that is free."""
        node = self.nodes[n]
        for head in range(node.base, node.end - (1 << order) + 1, 1 << order):
            parts = range(head, head + (1 << order), 512)
            if self.blocks.issuperset(parts):
                self.blocks.difference_update(parts)
                for block in parts:
                    self.put(block, PRIVATE, 0)
                    self.set_type(block, LOW32)
                return head
        return None

    def alloc_fresh(self, pool: Pool, n: int) -> int | None:
        """alloc_fresh_hugetlb_folio() without its vmemmap's optimisation."""
        head = self.alloc_pages(pool.order, n)
        if head is not None:
            self.prepare(head, pool.order)
            self.events[Event.HUGE_FOLIO_ALLOCATED] += 1
            self._written((1 << pool.order) - 1)
        return head

    def _written(self, pages: int) -> None:
        """Tails of a page that joins or leaves a pool: the price of a 2M page that does holds them."""
        self._stored(pages, 24)
        self.events[Event.STRUCT_PAGE_WRITTEN] -= pages if pages < 512 else 0

    def _stored(self, pages: int, size: int) -> None:
        self.events[Event.STRUCT_PAGE_WRITTEN] += pages
        self.events[Event.STRUCT_PAGE_BYTES] += size * pages

    def free_pages(self, head: int) -> None:
        """The end of __update_and_free_hugetlb_folio() and __free_pages_prepare(); blocks with poison stay out."""
        order = self.orders.pop(head)
        self.set_flag(head, FLAGS, self.hwpoison, False)
        bad = self.poisoned.pop(head, [])
        for pfn in bad:
            self.set_flag(pfn, FLAGS, self.hwpoison)
            self.raw[self.raw.index(pfn)] = None
        if bad:
            self.put(head + self.kernel.raw_poison.page, self.kernel.raw_poison.word, 0)
        for words in self.over(head, order):
            words[:, FLAGS] &= np.uint64(0xFFFF_FFFF_C000_0000 | self.hwpoison)
            words[:, NEXT] = 0
            words[:, MAPPING] = 0
        self.put(head, PRIVATE, 0)
        self.set_type(head, LOW32)
        self.put(head + self.kernel.pages.page, self.kernel.pages.word, 0)
        self._written((1 << order) - 1)
        self.events[Event.HUGE_FOLIO_FREED] += 1
        for block in range(head, head + (1 << order), 512):
            if not any(block <= pfn < block + 512 for pfn in bad):
                self.free_block(block)

    # ------------------------------------------------------------------ vmemmap: flushes and tables

    def flush_all(self) -> None:
        self.events[Event.TLB_FLUSH_KERNEL] += 1

    def flush_range(self, pages: int) -> None:
        self.events[Event.TLB_FLUSH_KERNEL] += 1
        if pages <= 33:
            self.events[Event.TLB_FLUSH_PAGE] += pages

    def synchronize_rcu(self) -> None:
        if not self.kernel.masks:
            self.events[Event.RCU_SYNCHRONIZED] += 1

    def split_leaves(self, head: int, order: int, flush: bool) -> bool:
        """vmemmap_split_pmd() of each 2M leaf over a huge page's vmemmap; False without memory for a table."""
        first = head // STRUCT_PAGES
        for leaf in range(first >> 9, (first + (1 << order - 6) - 1 >> 9) + 1):
            if leaf not in self.large:
                continue
            if self.left < 1:
                return False
            self.tables.add((2, (VMEMMAP >> 21) + leaf))
            for i, page in enumerate(self.large.pop(leaf)):
                self.entries[(leaf << 9) + i] = Entry(page, READ_WRITE)
            if flush:
                self.flush_range(512)
        return True

    def is_optimized(self, head: int) -> bool:
        return bool(self.get(head, PRIVATE) & OPTIMIZED)

    def get_tail(self, order: int, n: int) -> VmemmapPage | None:
        """vmemmap_get_tail()."""
        if (order, n) not in self.tails:
            page = VmemmapPage(np.zeros((STRUCT_PAGES, 8), np.uint64))
            page.words[:, FLAGS] = self.configuration.later | n << self.configuration.node_shift
            page.words[:, NEXT] = self.compound(0, order)
            page.words[:, MAPPING] = TAIL_MAPPING
            page.words[:, COUNTS] = LOW32
            if self.take(page) is None:
                return None
            self.tails[order, n] = page
        return self.tails[order, n]

    # ------------------------------------------------------------------ vmemmap: optimise

    def remap_free(self, head: int, freed: list[VmemmapPage]) -> bool:
        """__hugetlb_vmemmap_optimize_folio() of a page that should be: False without memory, as it was.

        `freed` gets the pages given up, the head's new one if it came to nothing.
        """
        order = self.orders[head]
        first = head // STRUCT_PAGES
        tail = self.get_tail(order, self.node_of(head)) if self.kernel.masks else None
        if self.kernel.masks and tail is None:
            return False
        own = self.take(self.page_at(head).copy())
        if own is None and self.kernel.masks:
            return False
        if own is not None:
            self.memmap += 1
            self.events[Event.VMEMMAP_HEAD_COPIED] += 1
        if not self.split_leaves(head, order, True):
            freed += [own] if own is not None else []
            return False
        old = [self.entries[first + i].page for i in range(1 << order - 6)]
        freed += old if own is not None else old[1:]
        own = own or old[0]
        self.entries[first] = Entry(own, READ_WRITE)
        for i in range(1, 1 << order - 6):
            self.entries[first + i] = Entry(tail or own, READ_ONLY)
        self.set_flag(head, PRIVATE, OPTIMIZED)
        self.events[Event.VMEMMAP_PAGE_FREED] += (1 << order - 6) - 1
        return True

    def free_list(self, freed: list[VmemmapPage]) -> None:
        for page in freed:
            self.drop(page)
        freed.clear()

    def should_optimize(self, head: int) -> bool:
        return self.optimizing and not self.is_optimized(head)

    def optimize_one(self, head: int) -> bool:
        """hugetlb_vmemmap_optimize_folio()."""
        if not self.should_optimize(head):
            return True
        freed: list[VmemmapPage] = []
        self.synchronize_rcu()
        done = self.remap_free(head, freed)
        if done:
            self.flush_range(1 << self.orders[head] - 6)
        self.free_list(freed)
        return done

    def optimize_many(self, heads: list[int]) -> int:
        """hugetlb_vmemmap_optimize_folios(): how many it did."""
        if not heads:
            self.events[Event.TLB_FLUSH_KERNEL] += self.kernel.batches_nothing
            return 0
        for head in heads:
            if self.should_optimize(head) and not self.split_leaves(head, self.orders[head], False):
                break
        self.flush_all()
        if self.should_optimize(heads[0]):
            self.synchronize_rcu()
        freed: list[VmemmapPage] = []
        done = 0
        for head in heads:
            if not self.should_optimize(head):
                continue
            success = self.remap_free(head, freed)
            if not success and freed:
                self.flush_all()
                self.free_list(freed)
                success = self.remap_free(head, freed)
            done += success
        self.flush_all()
        self.free_list(freed)
        return done

    # ------------------------------------------------------------------ vmemmap: restore

    def remap_alloc(self, head: int) -> bool:
        """__hugetlb_vmemmap_restore_folio() of an optimised page: all pages or none."""
        order = self.orders[head]
        pages = (1 << order - 6) - 1
        if self.left < pages:
            return False
        first = head // STRUCT_PAGES
        shared = self.entries[first + 1].page
        for i in range(1, pages + 1):
            page = self.take(shared.copy())
            assert page is not None
            reset = self.kernel.reset
            page.words[:reset] = page.words[reset : 2 * reset].copy()
            self.entries[first + i] = Entry(page, READ_WRITE)
        self.memmap += pages
        self.set_flag(head, PRIVATE, OPTIMIZED, False)
        self.events[Event.VMEMMAP_PAGE_RESTORED] += pages
        return True

    def restore_one(self, head: int) -> bool:
        """hugetlb_vmemmap_restore_folio()."""
        if not self.is_optimized(head):
            return True
        self.synchronize_rcu()
        done = self.remap_alloc(head)
        if done:
            self.flush_range((1 << self.orders[head] - 6) - self.kernel.masks)
        return done

    def restore_many(self, heads: list[int]) -> int:
        """hugetlb_vmemmap_restore_folios(): how many, from the first on, are whole."""
        restored = 0
        done = 0
        for head in heads:
            if self.is_optimized(head):
                if not restored:
                    self.synchronize_rcu()
                if not self.remap_alloc(head):
                    break
                restored += 1
            done += 1
        if restored:
            self.flush_all()
        return done

    # ------------------------------------------------------------------ pages to the page allocator and back

    def join(self, pool: Pool, heads: list[int]) -> None:
        """prep_and_add_allocated_folios() of a list."""
        self.optimize_many(heads)
        for head in heads:
            pool.pages[self.node_of(head)] += 1
            self.enqueue(pool, head)

    def update_and_free(self, pool: Pool, head: int) -> bool:
        """update_and_free_hugetlb_folio() of a page removed; without memory it is surplus in its pool."""
        if not self.restore_one(head):
            self.readmit(pool, head, True)
            return False
        self.free_pages(head)
        return True

    def free_many(self, pool: Pool, heads: list[int]) -> None:
        """update_and_free_pages_bulk(), with bulk_vmemmap_restore_error()."""
        while (whole := self.restore_many(heads)) < len(heads):
            for head in heads[:whole]:
                self.free_pages(head)
            heads = heads[whole:]
            while whole == 0 and heads:
                if self.update_and_free(pool, heads.pop(0)):
                    break
        for head in heads:
            self.free_pages(head)

    # ------------------------------------------------------------------ nr_hugepages

    def turns(self, pool: Pool, word: str, node: int | None) -> list[int]:
        """The nodes in the order in which they are tried; each try moves the turn: call `turn` for it."""
        allowed = list(range(pool.nodes)) if node is None else [node]
        at = getattr(pool, word)
        start = allowed.index(at) if at in allowed else 0
        return allowed[start:] + allowed[:start]

    @staticmethod
    def turn(pool: Pool, word: str, order: list[int], i: int) -> int:
        """Try the i-th of these nodes: the next one is next, also if this one has nothing."""
        setattr(pool, word, order[(i + 1) % len(order)])
        return order[i]

    def adjust_surplus(self, pool: Pool, node: int | None, delta: int) -> bool:
        """adjust_pool_surplus()."""
        word = "next_allocate" if delta < 0 else "next_free"
        order = self.turns(pool, word, node)
        for i in range(len(order)):
            n = self.turn(pool, word, order, i)
            if pool.surplus[n] if delta < 0 else pool.surplus[n] < pool.pages[n]:
                pool.surplus[n] += delta
                return True
        return False

    def resize(self, order: int, count: int, node: int | None) -> Outcome:
        """set_max_huge_pages()."""
        pool = self.pools[order]
        if node is not None:
            count += pool.persistent - (pool.pages[node] - pool.surplus[node])
        while sum(pool.surplus) and count > pool.persistent:
            if not self.adjust_surplus(pool, node, -1):
                break
        if not self._grow(pool, count, node):
            return Outcome(0, sum(pool.pages))
        free = pool.count_free
        if free > pool.persistent:
            free = max(free - sum(pool.surplus), 0)
        target = max(count, pool.persistent - free)
        leaving: list[int] = []
        while target < pool.persistent:
            nodes = self.turns(pool, "next_free", node)
            for i in range(len(nodes)):
                n = self.turn(pool, "next_free", nodes, i)
                if pool.free[n]:
                    leaving.insert(0, pool.free[n][0])
                    self.remove(pool, pool.free[n][0], False)
                    break
            else:
                break
        self.free_many(pool, leaving)
        while count < pool.persistent:
            if not self.adjust_surplus(pool, node, 1):
                break
        return Outcome(0, sum(pool.pages))

    def _grow(self, pool: Pool, count: int, node: int | None) -> bool:
        """The pages that are missing, as far as memory goes; False where it ended."""
        fresh: list[int] = []
        enough = True
        while enough and count > pool.persistent + len(fresh):
            order = self.turns(pool, "next_allocate", node)
            head = None
            for i in range(len(order)):
                head = self.alloc_fresh(pool, self.turn(pool, "next_allocate", order, i))
                if head is not None:
                    fresh.insert(0, head)
                    break
            enough = head is not None
        if fresh or not enough:
            self.join(pool, fresh)
        return enough

    def demote(self, count: int, node: int | None) -> Outcome:
        """demote_store() of 1G pages, demote_pool_huge_page(), demote_free_hugetlb_folios()."""
        source, target = self.pools[18], self.pools[9]
        done = 0
        while done < count and (source.count_free if node is None else len(source.free[node])):
            demoted = 0
            status = 0
            order = self.turns(source, "next_free", node)
            for i in range(len(order)):
                n = self.turn(source, "next_free", order, i)
                heads = [h for h in source.free[n] if not self.get(h, FLAGS) & self.hwpoison][: count - done - demoted]
                for head in heads:
                    self.remove(source, head, False)
                whole = self.restore_in_turn(heads)
                demoted += len(whole)
                self._demote_all(target, whole)
                for head in [h for h in heads[::-1] if h not in whole]:
                    self.readmit(source, head, False)
                status = 0 if len(whole) == len(heads) else -ENOMEM
                if status or demoted == count - done:
                    break
            done += demoted
            if status or not demoted:
                return Outcome(status or -EBUSY, done)
        return Outcome(0, done)

    def restore_in_turn(self, heads: list[int]) -> list[int]:
        """Those made whole, in the order in which they are demoted: collected in a list, the last one comes first."""
        backwards = heads[::-1]
        done = self.restore_many(backwards)
        return backwards[:done][::-1] + [h for h in backwards[done:] if not self.is_optimized(h)]

    def _demote_all(self, target: Pool, heads: list[int]) -> None:
        """1G pages that are whole become 512 pages of 2M each; the lowest of the first is free first."""
        new: list[int] = []
        for gigantic in heads:
            self.set_flag(gigantic, FLAGS, HEAD, False)
            del self.orders[gigantic]
            for head in range(gigantic, gigantic + (1 << 18), 512):
                self.prepare(head, 9)
                new.insert(0, head)
            self._written(1 << 18)
        self.join(target, new)

    # ------------------------------------------------------------------ taking and giving back

    def set_cgroup(self, head: int, value: int) -> None:
        if self.configuration.cgroups:
            self.put(head + self.kernel.cgroup.page, self.kernel.cgroup.word, value)

    def allocate(self, order: int, node: int | None) -> Outcome:
        """alloc_hugetlb_folio() without a reservation: the preferred node first."""
        pool = self.pools[order]
        preferred = node or 0
        nodes = [preferred, *(n for n in range(pool.nodes) if n != preferred)]
        for n in nodes:
            for head in pool.free[n]:
                if not self.get(head, FLAGS) & self.hwpoison:
                    pool.free[n].remove(head)
                    self.set_flag(head, PRIVATE, FREED, False)
                    return self._hand_out(pool, head)
        if order == 18 or sum(pool.surplus) >= pool.overcommit:
            return Outcome(-ENOMEM, 0)
        for n in nodes:
            fresh = self.alloc_fresh(pool, n)
            if fresh is not None:
                self.optimize_one(fresh)
                pool.pages[n] += 1
                pool.surplus[n] += 1
                return self._hand_out(pool, fresh)
        return Outcome(-ENOMEM, 0)

    def _hand_out(self, pool: Pool, head: int) -> Outcome:
        pool.active.insert(0, head)
        self.references[head] = 1
        self.put(head, COUNTS, HUGETLB | 1 << 32)
        self.set_cgroup(head, CGROUP)
        self.events[Event.HUGE_FOLIO_ALLOCATED] += 1
        self.events[Event.STRUCT_PAGE_BYTES] += 28
        return Outcome(0, head)

    def free(self, head: int) -> Outcome:
        """free_huge_folio() of a page in use."""
        if head not in self.references:
            return Outcome(-EINVAL, 0)
        if self.references[head] > 1:
            return self._refer(head, -1)._replace(detail=0)
        del self.references[head]
        pool = self.pools[self.orders[head]]
        self.put(head, MAPPING, 0)
        self.put(head, COUNTS, HUGETLB)
        self.set_cgroup(head, 0)
        self.events[Event.HUGE_FOLIO_FREED] += 1
        self.events[Event.STRUCT_PAGE_BYTES] += 36
        if pool.surplus[self.node_of(head)]:
            self.remove(pool, head, True)
            self.update_and_free(pool, head)
        else:
            pool.active.remove(head)
            self.enqueue(pool, head)
        return Outcome(0, 0)

    def _refer(self, head: int, count: int) -> Outcome:
        self.references[head] += count
        self.put(head, COUNTS, HUGETLB | self.references[head] << 32)
        return Outcome(0, self.references[head])

    def get_references(self, head: int, count: int) -> Outcome:
        """folio_try_get() of a page in use or free: the count afterwards."""
        self.events[Event.REFERENCE_CHANGED] += 1
        return self._refer(head, count) if head in self.references else Outcome(-ENOMEM, 0)

    def put_references(self, head: int, count: int) -> Outcome:
        """folio_put_refs(): the last one frees the page; -EINVAL for references that are not there."""
        self.events[Event.REFERENCE_CHANGED] += 1
        if count > self.references.get(head, 0):
            return Outcome(-EINVAL, 0)
        if count < self.references[head]:
            return self._refer(head, -count)
        self.references[head] = 1
        return self.free(head)

    def head_of(self, pfn: int) -> int | None:
        """The huge page that a frame belongs to."""
        for head in (pfn & ~511, pfn & ~((1 << 18) - 1)):
            if head in self.orders and pfn < head + (1 << self.orders[head]):
                return head
        return None

    def dissolve(self, pfn: int) -> Outcome:
        """dissolve_free_hugetlb_folio()."""
        head = self.head_of(pfn)
        if head is None:
            return Outcome(-EINVAL, 0)
        pool = self.pools[self.orders[head]]
        n = self.node_of(head)
        if head not in pool.free[n]:
            return Outcome(-EBUSY, 0)
        surplus = pool.surplus[n] > 0
        self.remove(pool, head, surplus)
        if not self.restore_one(head):
            self.readmit(pool, head, surplus)
            return Outcome(-ENOMEM, 0)
        self.free_pages(head)
        return Outcome(0, 0)

    def poison(self, pfn: int) -> Outcome:
        """folio_set_hugetlb_hwpoison(): the newest record is the first of the folio's list."""
        head = self.head_of(pfn)
        if head is None:
            return Outcome(-EINVAL, 0)
        if not self.hwpoison:
            return Outcome(-EOPNOTSUPP, 0)
        if pfn in self.poisoned.get(head, []):
            return Outcome(-EBUSY, 0)
        self.poisoned.setdefault(head, []).append(pfn)
        if None not in self.raw:
            self.raw.append(None)
        place = self.raw.index(None)
        self.raw[place] = pfn
        self.set_flag(head, FLAGS, self.hwpoison)
        self.put(head + self.kernel.raw_poison.page, self.kernel.raw_poison.word, RAW_POISON + 16 * place)
        return Outcome(0, 0)

    # ------------------------------------------------------------------ split and merge, the later posted form

    def split(self, head: int) -> Outcome:
        """Every page a folio of its own, with the head's inherited flags and one reference; the head stays listed."""
        if head not in self.references:
            return Outcome(-EINVAL, 0)
        if self.references[head] != 1:
            self.events[Event.FREEZE_SPIN] += 1
            return Outcome(-WOULD_SPIN, 0)
        order = self.orders[head]
        if self.is_optimized(head) and self.left < (1 << order - 6) - 1:
            return Outcome(-ENOMEM, 0)
        self.restore_one(head)
        flags = self.get(head, FLAGS) & ~HEAD
        link, memcg = self.get(head, NEXT), self.get(head, MEMCG)
        for i, words in enumerate(self.over(head, order)):
            words[:, FLAGS] = words[:, FLAGS] & np.uint64(ALL_ONES ^ PAGE_FLAGS) | np.uint64(flags & INHERITED)
            words[:, NEXT] = 0
            words[:, MAPPING] = 0
            words[:, INDEX] = np.arange(STRUCT_PAGES * i, STRUCT_PAGES * (i + 1))
            words[:, COUNTS] = 1 << 32 | LOW32
            words[:, MEMCG] = memcg
        self.put(head, NEXT, link)
        self.put(head, FLAGS, flags)
        del self.references[head]
        self.pieces[head] = self.orders.pop(head)
        self.events[Event.FOLIO_SPLIT] += 1
        self.events[Event.FOLIO_FROZEN] += 1
        self._stored((1 << order) - 1, 44)
        return Outcome(0, 0)

    def merge(self, head: int, order: int) -> Outcome:
        """Back to one folio with one reference, optimised if there is memory for it."""
        if self.pieces.get(head) != order:
            return Outcome(-EINVAL, 0)
        flags, private = self.get(head, FLAGS), self.get(head, PRIVATE)
        for words in self.over(head, order):
            words[:, FLAGS] &= np.uint64(ALL_ONES ^ PAGE_FLAGS)
            words[:, NEXT] = self.compound(head, order)
            words[:, MAPPING] = TAIL_MAPPING
            words[:, PRIVATE] = 0
            words[:, COUNTS] = LOW32
        self.write_head(head, order)
        self.put(head, FLAGS, flags | HEAD)
        self.put(head, PRIVATE, private)
        self.put(head, COUNTS, HUGETLB | 1 << 32)
        self.orders[head] = self.pieces.pop(head)
        self.references[head] = 1
        self.events[Event.FOLIO_MERGED] += 1
        self.events[Event.FOLIO_FROZEN] += 1 << order
        self._stored((1 << order) - 1, 24)
        self.optimize_one(head)
        self.set_cgroup(head, CGROUP)
        return Outcome(0, 0)

    # ------------------------------------------------------------------ vmemmap of chosen pages

    def change_vmemmap(self, start: int, end: int, optimize: bool) -> Outcome:
        """VMEMMAP_OPTIMIZE and VMEMMAP_RESTORE of the huge pages whose heads lie in [start, end)."""
        heads = sorted(head for head in self.orders if start <= head < end)
        if not heads:
            return Outcome(-EINVAL, 0)
        if any(head in self.references for head in heads):
            return Outcome(-EBUSY, 0)
        if len(heads) == 1:
            done = self.optimize_one(heads[0]) if optimize else self.restore_one(heads[0])
            count = int(self.is_optimized(heads[0]) if optimize else done)
            return Outcome(0 if done else -ENOMEM, count)
        if optimize:
            return Outcome(0, self.optimize_many(heads))
        done_many = self.restore_many(heads)
        return Outcome(0 if done_many == len(heads) else -ENOMEM, done_many)

    def store(self, pfn: int, word: int, value: int) -> int:
        """A store to a struct page: 0, or -EFAULT through a read-only entry."""
        number = pfn // STRUCT_PAGES
        if number >> 9 not in self.large and not self.entries[number].writable:
            self.events[Event.VMEMMAP_FAULT] += 1
            return -EFAULT
        self.put(pfn, word, value)
        return 0
