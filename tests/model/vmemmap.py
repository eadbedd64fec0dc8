"""Struct pages in memory, and what HVO makes of them, after mm/hugetlb_vmemmap.c. Frames are a number."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from model.struct_pages import (
    ALL_ONES,
    CONFIGURATIONS,
    COUNTS,
    FLAGS,
    HEAD,
    HUGETLB,
    KERNELS,
    LOW32,
    MAPPING,
    NEXT,
    OPTIMIZED,
    PREV,
    PRIVATE,
    READ_ONLY,
    READ_WRITE,
    SAVED_DIRTY,
    STRUCT_PAGES,
    TAIL_MAPPING,
    VMEMMAP,
    Entry,
    VmemmapPage,
    Word,
)
from pgemu_kernels.words.events import Event


class Node(NamedTuple):
    """Frames of a node: where its 1G pages, its 2M pages and its other memory begin, and its end."""

    base: int
    huge: int
    buddy: int
    end: int


def share(count: int, nodes: int, node: int) -> int:
    """How many of `count` things a node gets that are dealt out one by one."""
    return len(range(node, count, nodes))


class Vmemmap:
    """Memory of one or two nodes and its struct pages, as boot leaves them, with the vmemmap's optimisation (HVO)."""

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
        self.optimizing = self.hvo = hvo
        self.entries: dict[int, Entry] = {}  # by number of the vmemmap page
        self.large: dict[int, list[VmemmapPage]] = {}  # 2M leaves, by number of 2M: their 512 pages
        self.tables: set[tuple[int, int]] = {(5, 0)}
        self.tails: dict[tuple[int, int], VmemmapPage] = {}  # shared tail pages, by order and node
        self.orders: dict[int, int] = {}  # head -> order of every huge page
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
