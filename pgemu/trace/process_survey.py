"""What stands before a log: areas that its processes touch and that no call in it maps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pgemu.trace.events import Input
from pgemu.trace.process_areas import Area, Areas, joined
from pgemu.trace.process_player import Player, rounded
from pgemu_kernels.words.operations import PAGE_2M

__all__ = ("Before", "Survey")

_A, _B, _C, _KIND, _E = 4, 5, 6, 0, 8
_ANONYMOUS_MAP = 0x20


class Before(NamedTuple):
    """Areas of each memory from its beginning on, by address; of those with a file the inode of hugetlbfs."""

    areas: list[Area]
    inodes: dict[int, int]  # by the address of the area


class Survey(Player):
    """Plays a log to find them."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self._seen: dict[int, Areas] = {}  # what calls of the log mapped at any time
        self._apart: defaultdict[int, Areas] = defaultdict(Areas)  # the same with what children mapped
        self._touched: defaultdict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        self._maps: list[tuple[int, int]] = []  # mmap of a file: position, length
        self.untold: Counter[tuple[int, int]] = Counter()  # faults of a page that do not say their kind
        self.inode_of_map: dict[int, int] = {}  # position of an mmap -> inode of hugetlbfs

    def begin(self, at: int, memory: int) -> bool:
        """There is room for any."""
        self.areas[memory] = Areas()
        self._seen[memory] = Areas()
        return True

    def need(self, at: int, memory: int, start: int, end: int, rights: int) -> bool:
        """What is not mapped stands before, unless it was mapped and went."""
        for first, last in self.areas[memory].gaps(start, end):
            self._touch(memory, first, last, rights)
        return True

    def _touch(self, memory: int, start: int, end: int, rights: int) -> None:
        while True:
            if self._seen[memory].parts(start, end):
                return
            parent = self.memories.memories[memory].parent
            if parent is None:
                break
            memory = parent
        touched = self._touched[memory]
        touched[start, end] = touched.get((start, end), 0) | rights

    def mapped(self, memory: int, area: Area) -> None:
        """What a call maps was not there before."""
        one = Area(area.start, area.end, 0)
        self._seen[memory].add(one)
        while True:
            self._apart[memory].add(one)
            parent = self.memories.memories[memory].parent
            if parent is None:
                return
            memory = parent

    def fork(self, at: int, memory: int, child: int) -> bool:
        """There is room for any."""
        self._seen[child] = Areas()
        return True

    def faults_again(self, memory: int, page: int) -> bool:
        """Not known yet."""
        self.untold[memory, page] += 1
        return False

    def hugetlbfs_of(self, at: int) -> int | None:
        """Not known yet."""
        row = self.rows[at]
        if not int(row[_E]) & _ANONYMOUS_MAP:
            self._maps.append((at, int(row[_B])))
        return None

    # ------------------------------------------------------------------ what was found

    def before(self) -> dict[int, Before]:
        """By memory what it has at first."""
        windows = self._hugetlbfs()
        found = {}
        for memory in sorted({*self._touched, *windows}):
            huge = windows.get(memory, {})
            touched = self._touched[memory]
            ranges = [(*at, rights) for at, rights in touched.items() if not _inside(at, huge.values())]
            areas = [Area(start, end, rights) for start, end, rights in self._joined(memory, ranges, huge.values())]
            found[memory] = Before(sorted(areas), {area.start: inode for inode, area in huge.items()})
            found[memory].areas.extend(huge.values())
            found[memory].areas.sort()
        return found

    def _joined(
        self, memory: int, ranges: list[tuple[int, int, int]], huge: Iterable[Area]
    ) -> list[tuple[int, int, int]]:
        apart = Areas(self._apart[memory])
        for area in huge:
            apart.add(area._replace(rights=0))
        return joined(ranges, self.options.area_gap, apart)

    def _hugetlbfs(self) -> dict[int, dict[int, Area]]:
        """Where files of hugetlbfs are mapped of which only their own events tell: by the size of an mmap, or by faults
        of which each is in a 2M page of its own, as many as the file has. By memory, then by inode."""
        kinds = np.isin(self.rows[:, _KIND], [int(Input.HUGETLBFS_FALLOCATE), int(Input.HUGETLBFS_EVICT)])
        memory_of: dict[int, int] = {}
        for at in np.flatnonzero(kinds).tolist():
            memory_of.setdefault(int(self.rows[at, _A]), int(self.memories.of_event[at]))
        found: defaultdict[int, dict[int, Area]] = defaultdict(dict)
        for inode, memory in memory_of.items():
            size = rounded(self.log.sizes.get(inode, 0), PAGE_2M)
            maps = [at for at, length in self._maps if size and rounded(length, PAGE_2M) == size]
            if maps:
                self.inode_of_map |= dict.fromkeys(maps, inode)
            elif size and (start := self._window(memory, size)) is not None:
                found[memory][inode] = Area(start, start + size, 7, 0)
        return found

    def _window(self, memory: int, size: int) -> int | None:
        """Where as many 2M pages lie as a file has, each touched once, and none beside them."""
        touched = Counter(start // PAGE_2M for start, _ in self._touched[memory])
        once = sorted(block for block, count in touched.items() if count == 1)
        runs = [[once[0]]] if once else []
        for one, other in pairwise(once):
            if other == one + 1:
                runs[-1].append(other)
            else:
                runs.append([other])
        fitting = [run for run in runs if len(run) * PAGE_2M == size]
        return fitting[0][0] * PAGE_2M if len(fitting) == 1 else None


def _inside(at: tuple[int, int], areas: Iterable[Area]) -> bool:
    return any(area.start <= at[0] and at[1] <= area.end for area in areas)
