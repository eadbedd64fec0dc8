"""Areas of a process's address space: what is mapped where, as the calls of a log make it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ("ANONYMOUS", "Area", "Areas", "joined")

ANONYMOUS = -1
"""`file` of an area of anonymous memory."""


class Area(NamedTuple):
    """A mapping.

    Attributes:
        start, end: bytes
        rights: flags of a record, READ, WRITE, EXEC
        file: which of the trace's files, ANONYMOUS: none
        offset: bytes into the file where it begins
        dontfork: a child does not get it
    """

    start: int
    end: int
    rights: int
    file: int = ANONYMOUS
    offset: int = 0
    dontfork: bool = False

    def clipped(self, start: int, end: int) -> Area:
        """What of it lies in a range that it meets."""
        first = max(start, self.start)
        offset = self.offset + first - self.start if self.file != ANONYMOUS else 0
        return self._replace(start=first, end=min(end, self.end), offset=offset)

    def continues(self, before: Area) -> bool:
        """Whether it and the one before it are one mapping: mm/vma.c:can_vma_merge_after()."""
        alike = before.end == self.start and before[2:4] == self[2:4] and before.dontfork == self.dontfork
        return alike and (self.file == ANONYMOUS or before.offset + before.end - before.start == self.offset)


class Areas:
    """Areas that do not overlap, by address; neighbours that are alike are one."""

    def __init__(self, areas: Iterable[Area] = ()) -> None:
        self._areas = sorted(areas)

    def __len__(self) -> int:
        return len(self._areas)

    def __iter__(self) -> Iterator[Area]:
        return iter(self._areas)

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Which areas meet a range: the first one, and the one behind the last."""
        first = bisect_right(self._areas, (start, 1 << 65)) - 1
        if first < 0 or self._areas[first].end <= start:
            first += 1
        return first, max(first, bisect_left(self._areas, (end,)))

    def at(self, address: int) -> Area | None:
        """What is mapped at an address."""
        before = bisect_right(self._areas, (address, 1 << 65)) - 1
        return self._areas[before] if before >= 0 and address < self._areas[before].end else None

    def parts(self, start: int, end: int) -> list[Area]:
        """What of a range is mapped, by address."""
        first, last = self._span(start, end)
        return [area.clipped(start, end) for area in self._areas[first:last]]

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of a range is not mapped, by address."""
        found = []
        for area in self.parts(start, end):
            if start < area.start:
                found.append((start, area.start))
            start = area.end
        return [*found, (start, end)] if start < end else found

    def cuts(self, start: int, end: int) -> int:
        """How many areas become more than one by a change of a range alone."""
        spans = ((at, *self._span(at, at + 1)) for at in (start, end))
        return sum(first < last and self._areas[first].start < at for at, first, last in spans)

    def remove(self, start: int, end: int) -> None:
        """Unmap a range."""
        first, last = self._span(start, end)
        kept = []
        for area in self._areas[first:last]:
            kept += [area.clipped(*side) for side in ((area.start, start), (end, area.end)) if side[0] < side[1]]
        self._areas[first:last] = kept

    def add(self, area: Area) -> None:
        """Map an area, over whatever is there."""
        self.remove(area.start, area.end)
        at = bisect_left(self._areas, area)
        around = self._areas[max(at - 1, 0) : at + 1]
        merged: list[Area] = []
        for one in sorted([*around, area]):
            if merged and one.continues(merged[-1]):
                merged[-1] = merged[-1]._replace(end=one.end)
            else:
                merged.append(one)
        self._areas[max(at - 1, 0) : at + 1] = merged

    def change(self, start: int, end: int, **fields: object) -> None:
        """Change fields of what of a range is mapped."""
        for area in self.parts(start, end):
            self.add(area._replace(**fields))  # type: ignore[arg-type]

    def child(self) -> Areas:
        """What a child gets by fork()."""
        return Areas(area for area in self._areas if not area.dontfork)


def joined(ranges: Iterable[tuple[int, int, int]], most: int, apart: Areas) -> list[tuple[int, int, int]]:
    """Ranges (start, end, rights) by address, as few as gaps of `most` bytes allow; none over what `apart` has."""
    found: list[tuple[int, int, int]] = []
    for start, end, rights in sorted(ranges):
        if found:
            first, before, had = found[-1]
            if start <= before or (start - before <= most and not apart.parts(before, start)):
                found[-1] = first, max(before, end), had | rights
                continue
        found.append((start, end, rights))
    return found
