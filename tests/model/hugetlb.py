"""HugeTLB pages taken from their pools and given back, after mm/hugetlb.c, and split as posted."""

from __future__ import annotations

from typing import Any

import numpy as np

from model.hugetlb_pools import Pool, Pools
from model.outcome import Outcome
from model.struct_pages import (
    ALL_ONES,
    CGROUP,
    COUNTS,
    FLAGS,
    FREED,
    HEAD,
    HUGETLB,
    INDEX,
    INHERITED,
    LOW32,
    MAPPING,
    MEMCG,
    NEXT,
    PAGE_FLAGS,
    PRIVATE,
    RAW_POISON,
    STRUCT_PAGES,
    TAIL_MAPPING,
)
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import EBUSY, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP, WOULD_SPIN


class Model(Pools):
    """Memory of HugeTLB pages, with those in use: their references, their poison, their split and merge."""

    def __init__(self, kernel: str, base: int, **sizes: Any) -> None:
        super().__init__(kernel, base, **sizes)
        self.references: dict[int, int] = {}
        self.pieces: dict[int, int] = {}  # head -> order of what is split

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
