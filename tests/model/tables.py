"""Page tables as dicts: which leaves there are, and which table pages must exist for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

TOP = 4  # level of the root's entries


class Frames:
    """How many frames of metadata may be used, and how many are."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, n: int = 1) -> bool:
        """Take `n` frames, all or none."""
        if self.used + n > self.limit:
            return False
        self.used += n
        return True

    def put(self, n: int = 1) -> None:
        self.used -= n


class Table(NamedTuple):
    """A table page below a root: the level of its entries, and its number among those of that level."""

    level: int
    number: int

    @classmethod
    def over(cls, level: int, page: int) -> Table:
        """The table of a level that a page's translation goes through."""
        return cls(level, page >> 9 * level)

    @property
    def span(self) -> range:
        """Pages that the table covers."""
        return range(self.number << 9 * self.level, self.number + 1 << 9 * self.level)


@dataclass
class Tree:
    """What both kinds of tree share: table pages linked from the top down, which frames pay for."""

    frames: Frames
    tables: set[Table] = field(default_factory=set)

    @property
    def table_pages(self) -> int:
        """Table pages with the root."""
        return len(self.tables) + 1

    def link(self, page: int, level: int) -> bool:
        """Link what is missing down to the table of `level`; those above a failure stay."""
        for above in range(TOP - 1, level - 1, -1):
            table = Table.over(above, page)
            if table not in self.tables:
                if not self.frames.take():
                    return False
                self.tables.add(table)
        return True

    def unlink(self, tables: set[Table]) -> None:
        self.tables -= tables
        self.frames.put(len(tables))


class Entry(NamedTuple):
    """A process's 4K entry: vm_normal_page() knows no page behind a special one."""

    pfn: int
    special: bool
    writable: bool


@dataclass
class HostTables(Tree):
    """A process's tables: 4K entries by virtual page number."""

    entries: dict[int, Entry] = field(default_factory=dict)

    def map(self, page: int, entry: Entry) -> bool:
        if not self.link(page, 1):
            return False
        self.entries[page] = entry
        return True

    def unmap(self, pages: range) -> list[Entry]:
        """Clear the entries of a range; tables stay."""
        present = [page for page in self.entries if page in pages]
        return [self.entries.pop(page) for page in present]

    def free_tables_outside(self, mapped: list[range]) -> None:
        """free_pgtables(): a table goes when no mapping reaches into what it covers."""
        self.unlink({t for t in self.tables if not any(overlap(t.span, pages) for pages in mapped)})

    def free_last_level(self, pages: range) -> None:
        """CONFIG_PT_RECLAIM: the last-level tables that lie within the range go."""
        inside = {t for t in self.tables if t.level == 1 and pages.start <= t.span.start and t.span.stop <= pages.stop}
        self.unlink(inside)


@dataclass
class Stage2(Tree):
    """A VM's stage-2 tables: leaves by (level, guest frame >> 9 * (level - 1))."""

    leaves: dict[tuple[int, int], int] = field(default_factory=dict)

    def find(self, gfn: int) -> tuple[int, int] | None:
        """(level, first frame) of the leaf over a guest frame."""
        for level in (1, 2, 3):
            pfn = self.leaves.get((level, gfn >> 9 * (level - 1)))
            if pfn is not None:
                return level, pfn
        return None

    def map(self, gfn: int, level: int, pfn: int) -> bool:
        """Install a leaf over `gfn`; smaller ones there, and their tables, go. False without memory."""
        if not self.link(gfn, level):
            return False
        number = gfn >> 9 * (level - 1)
        span = Table(level - 1, number).span
        for key in [k for k in self.leaves if k[0] < level and k[1] << 9 * (k[0] - 1) in span]:
            del self.leaves[key]
        self.unlink({t for t in self.tables if t.level < level and t.span.start in span})
        self.leaves[level, number] = pfn - (gfn - span.start)
        return True

    def zap(self, gfns: range) -> None:
        """Drop every leaf that overlaps the range, whole; tables stay."""
        for level, number in list(self.leaves):
            if overlap(Table(level - 1, number).span, gfns):
                del self.leaves[level, number]

    def drop_all(self) -> None:
        """A new, empty root takes the old one's place."""
        self.leaves.clear()
        self.unlink(set(self.tables))


def overlap(a: range, b: range) -> bool:
    """Whether two ranges of pages, both in steps of one, share any."""
    return max(a.start, b.start) < min(a.stop, b.stop)


def common(a: range, b: range) -> range:
    """What two ranges share; empty if nothing."""
    return range(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
