"""Streams of accesses for the tests of pgemu.guest, and a slow model of TLBs that shares no code with the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pgemu.guest import Cache, Processor, TlbCache
from pgemu.trace.schema import Operation, Records

Array = np.ndarray[Any, Any]
SIZES = {"4K": 1, "2M": 2, "1G": 3}
BASES = (0, 0x7F00_0000_0000, 0xFFFF_8880_0000_0000)


def accesses(rows: list[tuple[int, int, int, int]]) -> Records:
    """Records of (address, flags, space, actor)."""
    columns = np.array(rows or [(0, 0, 0, 0)], np.uint64).T
    address, flags, space, actor = (column[: len(rows)] for column in columns)
    return Records.build(
        len(rows), op=Operation.GUEST_ACCESS, address=address, flags=flags, space=space, actor=actor,
        time=np.arange(len(rows)),
    )  # fmt: skip


def pages(spread: int) -> st.SearchStrategy[int]:
    """Addresses of a few pages, near and far from each other."""
    return st.builds(
        lambda base, far, near, inside: base + (far << 21) + (near << 12) + inside,
        st.sampled_from(BASES), st.integers(0, spread), st.integers(0, 5), st.integers(0, 4095),
    )  # fmt: skip


def streams(most: int = 60, spread: int = 3) -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """Streams of (address, flags, space, actor)."""
    one = st.tuples(pages(spread), st.sampled_from((0, 1, 2)), st.integers(0, 2), st.integers(0, 3))
    return st.lists(one, max_size=most)


def pieces(records: Records, cuts: list[int]) -> Iterator[Records]:
    """The records, cut in places."""
    edges = [0, *sorted(cut % (len(records) + 1) for cut in cuts), len(records)]
    for first, last in pairwise(edges):
        yield records[first:last]


# --------------------------------------------------------------------------- geometry

CACHES = st.builds(
    lambda sets, ways: Cache(sets * ways, ways) if ways else Cache(), st.sampled_from((1, 2, 4)), st.integers(0, 3)
)


def tlb_caches(kinds: tuple[str, ...], least: int) -> st.SearchStrategy[tuple[TlbCache, ...]]:
    """TLBs that hold each size at most once."""
    return st.lists(
        st.tuples(st.sampled_from((1, 2, 4)), st.integers(1, 3), st.sampled_from(("4K", "2M", "1G"))),
        min_size=least, max_size=3, unique_by=lambda row: row[2],
    ).map(lambda rows: tuple(TlbCache(sets * ways, ways, (size,), kinds) for sets, ways, size in rows))  # fmt: skip


@st.composite
def processors(draw: st.DrawFn) -> Processor:
    unified = draw(st.booleans())
    first = draw(tlb_caches(("data",), 1)) + draw(tlb_caches(("fetch",), 1))
    if unified:
        size = draw(st.sampled_from((("4K", "2M", "1G"), ("4K", "2M"))))
        first = (TlbCache(4, 4, size, ("data", "fetch")),)
    second = draw(tlb_caches(("data", "fetch"), 0))
    return Processor(first, second, *(draw(CACHES) for _ in range(7)))


# --------------------------------------------------------------------------- the model


class Lru:
    """A set-associative cache of dicts: oldest first."""

    def __init__(self, entries: int, ways: int) -> None:
        self.ways = ways
        self.sets = [OrderedDict[Any, Any]() for _ in range(entries // ways if ways else 0)]

    def get(self, number: int, key: Any) -> Any:
        if not self.sets:
            return None
        line = self.sets[number % len(self.sets)]
        if key not in line:
            return None
        line.move_to_end(key)
        return line[key]

    def add(self, number: int, key: Any, value: Any) -> None:
        if not self.sets:
            return
        line = self.sets[number % len(self.sets)]
        if len(line) == self.ways:
            line.popitem(last=False)
        line[key] = value


class Model:
    """TLBs of one vCPU, over functions that say what the tables hold.

    guest(space, address) -> [(gpa of the entry, level)], from the top to the leaf, and the gpa that the leaf gives.
    stage2(gpa) -> level of its leaf; None: one stage only.
    """

    def __init__(self, processor: Processor, guest: Callable[..., Any], stage2: Callable[[int], int] | None) -> None:
        self.guest, self.stage2 = guest, stage2
        self.processor = processor
        self.clear()

    def clear(self) -> None:
        p = self.processor
        self.levels = [[(cache, Lru(cache.entries, cache.ways)) for cache in caches] for caches in (p.first, p.second)]
        self.upper = {2: Lru(p.pde.entries, p.pde.ways), 3: Lru(p.pdpte.entries, p.pdpte.ways),
                      4: Lru(p.pml4e.entries, p.pml4e.ways)}  # fmt: skip
        self.stage2_upper = {2: Lru(p.stage2_pde.entries, p.stage2_pde.ways),
                             3: Lru(p.stage2_pdpte.entries, p.stage2_pdpte.ways),
                             4: Lru(p.stage2_pml4e.entries, p.stage2_pml4e.ways)}  # fmt: skip
        self.nested = Lru(p.nested.entries, p.nested.ways)

    def access(self, address: int, flags: int, space: int) -> tuple[int, int, int]:
        """(where it was found, level of the entry, entries read)."""
        kind = "fetch" if flags & 2 else "data"
        page = (address >> 12) & ((1 << 45) - 1)
        for where in (0, 1):
            for cache, lines in self.levels[where]:
                for level in (1, 2, 3):
                    number = page >> 9 * (level - 1)
                    if kind in cache.serves and any(SIZES[size] == level for size in cache.sizes):
                        leaf = lines.get(number, (level, number, space))
                        if leaf is not None:
                            if where == 1:
                                self.enter(0, kind, page, space, leaf)
                            return where, level, 0
        leaf, read = self.walk(address, page, space)
        if leaf:
            self.enter(1, kind, page, space, leaf)
            self.enter(0, kind, page, space, leaf)
        return 2, leaf, read

    def enter(self, where: int, kind: str, page: int, space: int, leaf: int) -> None:
        fitting = [
            (SIZES[size], lines)
            for cache, lines in self.levels[where]
            for size in cache.sizes
            if kind in cache.serves and SIZES[size] <= leaf
        ]
        if fitting:
            level, lines = max(fitting, key=lambda one: one[0])
            number = page >> 9 * (level - 1)
            lines.add(number, (level, number, space), leaf)

    def walk(self, address: int, page: int, space: int) -> tuple[int, int]:
        steps, final = self.guest(space, address)
        begin = next((level for level in (2, 3, 4) if self.upper[level].get(*self.key(page, level, space))), 5)
        read = 0
        for gpa, level in steps:
            if level >= begin:
                continue
            if self.stage2 is not None and (level != begin - 1 or begin == 5):
                read += self.translate(gpa)[1]
            read += 1
            if level != steps[-1][1]:
                self.upper[level].add(*self.key(page, level, space), True)
        leaf = steps[-1][1]
        if self.stage2 is None:
            return leaf, read
        host, more = self.translate(final)
        return min(leaf, host), read + more

    @staticmethod
    def key(page: int, level: int, space: int) -> tuple[int, tuple[int, int]]:
        number = page >> 9 * (level - 1)
        return number, (number, space)

    def translate(self, gpa: int) -> tuple[int, int]:
        assert self.stage2 is not None
        leaf, page = self.stage2(gpa), gpa >> 12
        number = page >> 9 * (leaf - 1)
        if self.nested.get(number, (leaf, number)):
            return leaf, 0
        begin = next(
            (level for level in range(leaf + 1, 5) if self.stage2_upper[level].get(*self.key(page, level, 0))), 5
        )
        for level in range(leaf + 1, begin):
            self.stage2_upper[level].add(*self.key(page, level, 0), True)
        self.nested.add(number, (leaf, number), True)
        return leaf, begin - leaf
