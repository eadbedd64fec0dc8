"""Folios of a huge page that is in use, and who refers to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

PIN = 1024  # GUP_PIN_COUNTING_BIAS
PIECE = 512  # pages


@dataclass(eq=False)
class Folio:
    """A huge page of the pool while it is in use: one folio, or (split) one per base page.

    `pieces`, if not None: it is split to 2M folios, and those named here to 4K folios. Pages are numbered from the
    head; a folio has the number of its first page. By folio, `held` counts transient references, `pinned` pins, `kept`
    what KVM holds of pages that it maps (before 6.13), `mapped` ordinary page-table entries; `cached_by_cpu` has those
    that a per-CPU batch holds.
    """

    head: int
    pages: int
    owner: object = None  # the inode whose subpool it came from
    place: tuple[int, int] = (0, 0)  # its inode and block
    split: bool = False
    pieces: set[int] | None = None
    cached: bool = True
    waits: bool = False  # split though all private: to be merged, by the worker where merging is lazy
    ready: bool = False  # nobody refers to it any more; the worker returns it
    zeroed: set[int] = field(default_factory=set)  # since it is its inode's; any other page has what was there before
    shown: set[int] = field(default_factory=set)  # by a leaf to guest or host, since it is its inode's; where flags lie
    uptodate: set[int] = field(default_factory=set)  # pages of folios that have PG_uptodate
    held: Counter[int] = field(default_factory=Counter)
    mapped: Counter[int] = field(default_factory=Counter)
    pinned: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    cached_by_cpu: set[int] = field(default_factory=set)
    bad: set[int] = field(default_factory=set)  # pages that memory failure was told of
    failed: set[int] = field(default_factory=set)  # folios of which it keeps a reference

    def poisoned(self, unit: int) -> bool:
        """Whether a folio has a bad page."""
        return not self.bad.isdisjoint(range(unit, unit + self.size(unit)))

    @property
    def whole(self) -> bool:
        """Whether it is one folio."""
        return not self.split and self.pieces is None

    def unit(self, pfn: int) -> int:
        """Number of the folio that a frame belongs to."""
        page = pfn - self.head
        if self.split:
            return page
        if self.pieces is None:
            return 0
        return page if page // PIECE in self.pieces else page // PIECE * PIECE

    def size(self, unit: int) -> int:
        """Pages of a folio."""
        if self.split:
            return 1
        if self.pieces is None:
            return self.pages
        return 1 if unit // PIECE in self.pieces else PIECE

    def units(self, pages: range) -> Iterable[int]:
        """The folios that pages of it belong to."""
        if not pages:
            return
        unit = self.unit(self.head + pages.start)
        while unit < pages.stop:
            yield unit
            unit += self.size(unit)

    def busy(self, unit: int) -> bool:
        """Whether anybody but the page cache refers to a folio."""
        others = self.held[unit] or self.mapped[unit] or self.pinned[unit] or self.kept[unit]
        return bool(others) or unit in self.cached_by_cpu or unit in self.failed

    @property
    def counts(self) -> tuple[Counter[int], ...]:
        """Who refers to its folios, how often."""
        return self.held, self.mapped, self.pinned, self.kept

    @property
    def idle(self) -> bool:
        """Whether nobody but the page cache refers to any part of it."""
        held = self.cached_by_cpu or self.failed
        return not held and not any(count.total() for count in self.counts)

    def idle_part(self, pages: range) -> bool:
        """The same of folios that begin in a part of it."""
        used = (unit for count in self.counts for unit, n in count.items() if n)
        return not any(unit in pages for unit in (*used, *self.cached_by_cpu, *self.failed))

    def references(self, pfn: int) -> int:
        """Refcount of the folio that a frame belongs to."""
        unit = self.unit(pfn)
        cache = self.size(unit) if self.cached else 0
        own = self.held[unit] + self.mapped[unit] + PIN * self.pinned[unit] + self.kept[unit]
        return cache + own + (unit in self.cached_by_cpu) + (unit in self.failed)
