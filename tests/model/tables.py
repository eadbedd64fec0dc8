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

    @property
    def left(self) -> int:
        """How many may still be taken."""
        return max(self.limit - self.used, 0)

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
    """A process's entry: vm_normal_page() knows no page behind a special one. `pfn`: the first frame."""

    pfn: int
    special: bool
    writable: bool


@dataclass
class HostTables(Tree):
    """A process's tables: 4K entries by virtual page number, large ones by (level, number)."""

    entries: dict[int, Entry] = field(default_factory=dict)
    huge: dict[tuple[int, int], Entry] = field(default_factory=dict)
    poisoned: set[int] = field(default_factory=set)  # pages whose entries say that a page is bad
    live: bool = True

    def find(self, page: int) -> tuple[int, Entry] | None:
        """(level, entry) over a page."""
        if page in self.entries:
            return 1, self.entries[page]
        for level in (2, 3):
            entry = self.huge.get((level, page >> 9 * (level - 1)))
            if entry is not None:
                return level, entry
        return None

    def takes_leaf(self, page: int, level: int) -> bool:
        """Whether a large entry can be made there: pmd_none(), pud_none(). A table stays, though it be empty."""
        return Table.over(level - 1, page) not in self.tables

    def map(self, page: int, entry: Entry, level: int = 1) -> bool:
        if not self.link(page, level):
            return False
        if level == 1:
            self.entries[page] = entry
        else:
            self.huge[level, page >> 9 * (level - 1)] = entry
        return True

    def huge_over(self, pages: range) -> list[tuple[int, int]]:
        """The large entries that overlap a range."""
        return [key for key in self.huge if overlap(Table(key[0] - 1, key[1]).span, pages)]

    def unmap(self, pages: range) -> list[Entry]:
        """Clear the entries of a range, large ones whole; tables stay."""
        gone = [self.huge.pop(key) for key in self.huge_over(pages)]
        if len(pages) < len(self.entries):
            present = [page for page in pages if page in self.entries]
        else:
            present = [page for page in self.entries if page in pages]
        return gone + [self.entries.pop(page) for page in present]

    def free_tables_outside(self, mapped: list[range]) -> None:
        """free_pgtables(): a table goes when no mapping reaches into what it covers."""
        self.unlink({t for t in self.tables if not any(overlap(t.span, pages) for pages in mapped)})

    def free_last_level(self, pages: range) -> None:
        """CONFIG_PT_RECLAIM: the last-level tables that lie within the range go."""
        inside = {t for t in self.tables if t.level == 1 and pages.start <= t.span.start and t.span.stop <= pages.stop}
        self.unlink(inside)


@dataclass
class Stage2(Tree):
    """A VM's stage-2 tables: leaves by (level, guest frame >> 9 * (level - 1)).

    mirror: of what firmware owns: no leaf ever takes the place of a table.
    """

    mirror: bool = False
    leaves: dict[tuple[int, int], int] = field(default_factory=dict)

    def find(self, gfn: int) -> tuple[int, int] | None:
        """(level, first frame) of the leaf over a guest frame."""
        for level in (1, 2, 3):
            pfn = self.leaves.get((level, gfn >> 9 * (level - 1)))
            if pfn is not None:
                return level, pfn
        return None

    def map(self, gfn: int, level: int, pfn: int) -> int:
        """Install a leaf over `gfn`: its level, or 0 without memory. Smaller ones there, and their tables, go."""
        while self.mirror and level > 1 and Table.over(level - 1, gfn) in self.tables:
            level -= 1
        if not self.link(gfn, level):
            return 0
        number = gfn >> 9 * (level - 1)
        span = Table(level - 1, number).span
        for key in [k for k in self.leaves if k[0] < level and k[1] << 9 * (k[0] - 1) in span]:
            del self.leaves[key]
        self.unlink({t for t in self.tables if t.level < level and t.span.start in span})
        self.leaves[level, number] = pfn - (gfn - span.start)
        return level

    def split_boundary(self, gfn: int) -> bool:
        """Split the leaf that begins before a guest frame and ends behind it, until none does."""
        while True:
            found = self.find(gfn)
            if found is None or gfn % (1 << 9 * (found[0] - 1)) == 0:
                return True
            if not self.split_one(found[0], gfn >> 9 * (found[0] - 1)):
                return False

    def split_one(self, level: int, number: int) -> bool:
        """Split a large leaf to 512 of the level below. False without memory."""
        if not self.frames.take():
            return False
        self.tables.add(Table(level - 1, number))
        pfn = self.leaves.pop((level, number))
        size = 1 << 9 * (level - 2)
        for i in range(512):
            self.leaves[level - 1, number << 9 | i] = pfn + i * size
        return True

    def zap(self, gfns: range) -> None:
        """Drop every leaf that overlaps the range, whole; tables stay."""
        for level, number in self.over(gfns):
            del self.leaves[level, number]

    def over(self, gfns: range) -> list[tuple[int, int]]:
        """The leaves that overlap a range, in order."""
        found = [key for key in self.leaves if gfns and overlap(Table(key[0] - 1, key[1]).span, gfns)]
        return sorted(found, key=lambda key: key[1] << 9 * (key[0] - 1))

    def split(self, gfns: range) -> None:
        """Split every large leaf over a range to 4K; without memory the rest stays large."""
        while large := [key for key in self.over(gfns) if key[0] > 1]:
            if not self.split_one(*large[0]):
                return

    def collapse(self, level: int, number: int, recover: bool) -> bool:
        """Replace the table below an entry of `level` by a leaf, or drop it: whether it went."""
        table = Table(level - 1, number)
        below = [key for key in self.leaves if key[0] < level and key[1] >> 9 * (level - key[0]) == number]
        if table not in self.tables or (recover and not below):
            return False
        pfn = min((self.leaves[key] - ((key[1] << 9 * (key[0] - 1)) - table.span.start) for key in below), default=0)
        for key in below:
            del self.leaves[key]
        self.unlink({t for t in self.tables if t.level < level and t.span.start in table.span})
        if recover:
            self.leaves[level, number] = pfn
        return True

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
