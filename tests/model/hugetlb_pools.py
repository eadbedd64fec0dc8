"""HugeTLB pools as lists and dicts, after mm/hugetlb.c: how many pages each has, on which node, and the free ones.

A free list is a list of head frames in the order in which they are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model.outcome import Outcome
from model.struct_pages import (
    BUDDY,
    FLAGS,
    FREED,
    HEAD,
    LISTS,
    LOW32,
    MAPPING,
    NEXT,
    POISON1,
    POISON2,
    PREV,
    PRIVATE,
    VMEMMAP,
)
from model.vmemmap import Vmemmap
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import EBUSY, ENOMEM


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


class Pools(Vmemmap):
    """Pools of 2M and of 1G over one or two nodes, and 2M blocks that are in no pool."""

    def __init__(self, kernel: str, base: int, **sizes: Any) -> None:
        super().__init__(kernel, base, **sizes)
        self.hwpoison = self.kernel.hwpoison if self.configuration.memory_failure else 0
        self.pools = {9: Pool(9, 0, len(self.nodes)), 18: Pool(18, 1, len(self.nodes))}
        self.poisoned: dict[int, list[int]] = {}  # head -> pages
        self.raw: list[int | None] = []  # poisoned pages by the place of their record
        self.blocks: set[int] = set()  # first frames of free 2M blocks
        for n, node in enumerate(self.nodes):
            for block in range(node.buddy, node.end, 512):
                self.free_block(block)
            gigantic = list(range(node.base, node.huge, 1 << 18))
            self._fill(18, n, gigantic if self.kernel.ascending else gigantic[::-1])
            self._fill(9, n, list(range(node.huge, node.buddy, 512)))
        self.relink()

    def _fill(self, order: int, n: int, heads: list[int]) -> None:
        pool = self.pools[order]
        pool.free[n] = heads
        pool.pages[n] = len(heads)
        for head in heads:
            self.set_flag(head, PRIVATE, FREED)

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
