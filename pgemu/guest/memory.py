"""A guest's memory: page tables of its processes in it, and a frame for each page at its first touch.

It is a machine of its own, of which only `ram` is used: its physical addresses are the guest's, so that its tables are
edited and walked as any others are. It is the same for all designs. Of a page that has none, first the tables on the
way to it get their frames, from the top one down, then the page (mm/memory.c:__handle_mm_fault(),
do_anonymous_page()); a huge page is taken before its tables, and the table that Linux deposits for its split is left
out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pgemu.guest.frames import Frames
from pgemu.guest.options import GuestOptions
from pgemu.objects.machine import Config, Machine
from pgemu.tables.access import rows_of
from pgemu.tables.page_table import PageTable
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from pgemu_kernels.words.table_words import WalkStatus

__all__ = ("GuestMemory",)

Array = np.ndarray[Any, Any]

_SPACES = 1 << 16
_LEVELS = 4
_NO_TABLE = _LEVELS + 1
_PAGE_BITS = np.uint64(45)
_TWELVE, _NINE = np.uint64(12), np.uint64(9)
_HALF = np.uint64(1 << 47)


class GuestMemory:
    """The memory of a guest.

    Attributes:
        machine: its frames, of which those of tables have contents
        tables: page tables by space
        roots: uint64[65536], guest physical address of the top table by space, 0 where there is none
        counts: "accesses", and of these "no memory" (-ENOMEM: all frames are handed out; from the first page on that
            finds none no page gets one) and "not canonical" (the guest gets a general protection fault); "pages 4K",
            "pages 2M": what was handed out at first touches; "fallback": 2M ranges that got 4K pages for want of 2
            MiB; "tables": pages of tables
    """

    def __init__(self, options: GuestOptions) -> None:
        frames = options.guest_memory // PAGE_4K
        # In a seed's order frames are scattered, and so is the memory that the tables take here.
        seed = 1 if options.allocation == "random" else 0
        self.machine = Machine(Config("pfnmap", frames=frames, memory=0, seed=seed))
        self.tables: dict[int, PageTable] = {}
        self.roots = np.zeros(_SPACES, np.uint64)
        self.counts: Counter[str] = Counter()
        self._huge = options.allocation == "thp"
        reserved = range(options.bounce.start // PAGE_4K, options.bounce.stop // PAGE_4K)
        taken = _boot_frames(self.machine)
        self._frames = Frames(frames, options.allocation, options.seed, taken, reserved, options.fragmentation)
        self._is_out = False

    @property
    def access_row(self) -> Array:
        """The access row of a walk of its tables that asks for nothing."""
        return rows_of(self.machine.format_row(0), 1 << 52, None, plain=True)

    def place(self, records: Records) -> tuple[Array, Array]:
        """Give each page that is touched for the first time a frame: (guest physical addresses, whether there is one).

        uint64[n] and bool[n], by the accesses `records`.
        """
        self.counts["accesses"] += len(records)
        canonical = (records.address + _HALF) >> np.uint64(48) == 0
        found = (
            np.where(canonical, np.uint8(WalkStatus.NOT_PRESENT), np.uint8(WalkStatus.NOT_CANONICAL)),
            np.full(len(records), _NO_TABLE, np.uint8),
            np.zeros(len(records), np.uint64),
        )
        self._translate(records, None, found)
        status, level, physical = found
        missing = np.flatnonzero(status == WalkStatus.NOT_PRESENT)
        if missing.size and not self._is_out:
            self._touch_first(records, missing, level[missing])
            self._translate(records, missing, found)
        self.counts["not canonical"] += int(np.count_nonzero(status == WalkStatus.NOT_CANONICAL))
        self.counts["no memory"] += int(np.count_nonzero(status == WalkStatus.NOT_PRESENT))
        return physical, status == WalkStatus.OK

    def _translate(self, records: Records, which: Array | None, found: tuple[Array, Array, Array]) -> None:
        """Status, level and guest physical address of accesses (of those `which`), where there are tables."""
        spaces = records.space if which is None else records.space[which]
        alone = len(spaces) > 0 and bool((spaces == spaces[0]).all())
        for space in [int(spaces[0])] if alone else np.flatnonzero(np.bincount(spaces)).tolist():
            if space not in self.tables:
                continue
            rows: Any = slice(None) if which is None else which
            if not alone:
                mine = np.flatnonzero(spaces == space)
                rows = mine if which is None else which[mine]
            walks = self.tables[space].translate(records.address[rows])
            for array, given in zip(found, (walks.status, walks.level, walks.physical), strict=True):
                array[rows] = given

    # ------------------------------------------------------------------ first touches

    def _touch_first(self, records: Records, missing: Array, level: Array) -> None:
        """Frames for pages that have none, in the order in which they are touched.

        level: of the entry of each that is not present.
        """
        key = records.address[missing] >> _TWELVE & (np.uint64(1) << _PAGE_BITS) - np.uint64(1)
        key |= records.space[missing].astype(np.uint64) << _PAGE_BITS
        first = _first_of(key)
        key, level, rows = key[first], level[first], missing[first]
        # Whether a page is the first one that needs the table of a level 1, 2, 3, below what is there.
        needs = [_is_first(key >> np.uint64(9 * n), level > n) for n in range(1, _LEVELS)]
        spaces, pages = records.space[rows], records.address[rows] & ~np.uint64(PAGE_4K - 1)
        tables = np.add.reduce([need.astype(np.int64) for need in needs])
        _, region = np.unique(key >> _NINE, return_inverse=True)
        is_huge = np.zeros(len(region), bool)  # by region, of those that get their huge page now
        edges = np.concatenate([[0], np.flatnonzero(np.diff(spaces)) + 1, [len(spaces)]])
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            space = int(spaces[start])
            if space not in self.tables and not self._create_table(space):
                return
            part = slice(start, stop)
            if self._huge:
                self._map_regions(self.tables[space], pages[part], tables[part], needs[0][part], region[part], is_huge)
            else:
                self._map_pages(self.tables[space], pages[part], tables[part])
            if self._is_out:
                return

    def _create_table(self, space: int) -> bool:
        """A process's top table: whether there was a frame for it."""
        if not self._frames.left:
            self._is_out = True
            return False
        self._hand_over(self._frames.take(1))
        table = self.machine.create_page_table("x86-64")
        self.tables[space] = table
        self.roots[space] = table.root
        self.counts["tables"] += 1
        return True

    def _hand_over(self, frames: Array) -> None:
        """Let the tables that are made next have these frames, in their order."""
        state = self.machine.arrays.state
        first = int(state[W.R_FREE_STACK])
        state[first : first + len(frames)] = frames[::-1]
        state[W.R_FREE] = len(frames)

    def _map_pages(self, table: PageTable, pages: Array, tables: Array) -> None:
        """Map pages of 4K, each with so many tables before it, as far as there are frames."""
        ends = np.cumsum(tables + 1)
        count = int(np.searchsorted(ends, self._frames.left, "right"))
        self._is_out = count < len(pages)
        if count:
            frames = self._frames.take(int(ends[count - 1]))
            is_page = np.zeros(len(frames), bool)
            is_page[ends[:count] - 1] = True
            self._map(table, pages[:count], frames[is_page], frames[~is_page], 1)

    def _map(self, table: PageTable, pages: Array, frames: Array, tables: Array, level: int) -> None:
        self._hand_over(tables)
        done = table.map_many(pages, frames << _TWELVE, level=level)
        if (done.status != 0).any() or self.machine.register(W.R_FREE):
            raise RuntimeError(f"{done!r} with {self.machine.register(W.R_FREE)} of {len(tables)} tables left")
        self.counts["tables"] += len(tables)
        self.counts[f"pages {'4K' if level == 1 else '2M'}"] += len(pages)

    def _map_regions(
        self, table: PageTable, pages: Array, tables: Array, is_first: Array, region: Array, is_huge: Array
    ) -> None:
        """The same with huge pages: a 2M range in which nothing is mapped gets one, where there is one.

        is_first: whether it is the first page of such a range; region: of each page, a number of its range.
        """
        begin = 0
        for at in [*np.flatnonzero(is_first).tolist(), len(pages)]:
            rest = begin + np.flatnonzero(~is_huge[region[begin:at]])
            if rest.size:
                self._map_pages(table, pages[rest], tables[rest])
            if self._is_out or at == len(pages):
                return
            begin = at
            upper = int(tables[at]) - 1
            frame = self._frames.take_huge() if self._frames.left >= PAGE_2M // PAGE_4K + upper else None
            if frame is None:
                self.counts["fallback"] += 1
                continue
            is_huge[region[at]] = True
            huge = pages[at : at + 1] & ~np.uint64(PAGE_2M - 1)
            self._map(table, huge, np.array([frame], np.uint64), self._frames.take(upper), 2)


def _boot_frames(machine: Machine) -> Array:
    """uint64[n]: frames that the machine has handed out by itself: those of the guest's kernel."""
    state = machine.arrays.state
    order = np.arange(machine.register(W.R_FRESH), dtype=np.uint64)
    frames: Array = order * state[W.R_SEED_MULTIPLIER] + state[W.R_SEED_OFFSET] & state[W.R_FRAMES_MASK]
    return np.union1d(frames, np.zeros(1, np.uint64))  # frame 0 is never handed out


def _first_of(keys: Array) -> Array:
    """Where each key occurs for the first time, ascending."""
    return np.sort(np.unique(keys, return_index=True)[1])


def _is_first(keys: Array, among: Array) -> Array:
    """Whether a key occurs for the first time among those of `among` (bool)."""
    found = np.zeros(len(keys), bool)
    rows = np.flatnonzero(among)
    found[rows[_first_of(keys[rows])]] = True
    return found
