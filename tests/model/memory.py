"""Folios, the HugeTLB pool, the vmemmap and the contents of guest pages, as objects and dicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from model.tables import Frames

STRUCT_PAGES = 64  # per vmemmap page
POOL_BASE = 1 << 20  # first frame of guest memory while there are fewer frames of metadata than that


@dataclass
class Folio:
    """A huge page of the pool while it is in use: one folio, or (split) one per base page.

    Pages are numbered from the head. `held` counts transient references per folio (an unsplit one is
    page 0), `mapped` ordinary page-table entries per page.
    """

    head: int
    pages: int
    owner: object = None  # the inode whose subpool it came from
    split: bool = False
    cached: bool = True
    uptodate: set[int] = field(default_factory=set)
    held: Counter[int] = field(default_factory=Counter)
    mapped: Counter[int] = field(default_factory=Counter)

    def unit(self, pfn: int) -> int:
        """Number of the folio that a frame belongs to."""
        return pfn - self.head if self.split else 0

    @property
    def idle(self) -> bool:
        """Whether nobody but the page cache refers to any part of it."""
        return not self.held.total() and not self.mapped.total()

    def references(self, pfn: int) -> int:
        """Refcount of the folio that a frame belongs to."""
        unit = self.unit(pfn)
        cache = (1 if self.split else self.pages) if self.cached else 0
        return cache + self.held[unit] + self.mapped[unit]


class Memory:
    """The pool with its vmemmap, and the frames that page tables and contents take."""

    def __init__(
        self,
        kernel: str,
        order: int,
        pool_pages: int,
        frames: int | None,
        hvo: bool,
        zero_by_page: bool,
        series: str = "jan2026",
    ) -> None:
        self.pages = 1 << order
        self.by_page = series == "rfc2"
        self.nodes = 0  # xarray nodes of split folios in the page cache, 7 to a frame
        self.stashes = 0  # 64 to a frame
        self.hvo = hvo
        self.one_tail_page = kernel == "7.3"  # 7.1 and later: all folios of an order share it
        self.zero_by_page = zero_by_page
        self.heads = [POOL_BASE + i * self.pages for i in range(pool_pages)]
        # The free list's front is its end here: 2M pages ascending, 1G pages of the boot allocator as captured.
        self.free = self.heads[:] if kernel == "7.3" and order == 18 else self.heads[::-1]
        self.in_use: dict[int, Folio] = {}
        self.optimized = set(self.heads) if hvo else set()
        self.contents: dict[int, bytes] = {}
        self.boot_vmemmap = 0 if hvo else -(-pool_pages * self.pages // 32768) * 512  # whole 2M leaves
        limit = 1 << 60 if frames is None else frames + self.boot_vmemmap
        self.frames = Frames(limit)
        self.frames.take(self.kernel_tables + self.vmemmap_pages)

    @property
    def vmemmap_per_folio(self) -> int:
        return self.pages // STRUCT_PAGES

    @property
    def vmemmap_pages(self) -> int:
        if not self.hvo:
            return self.boot_vmemmap
        restored = len(self.heads) - len(self.optimized)
        return int(self.one_tail_page) + len(self.heads) + restored * (self.vmemmap_per_folio - 1)

    @property
    def nodes_per_folio(self) -> int:
        """A node for 64 pages, one for 4096, one for 2^18; rfc2 makes the upper one of a 2M page anew."""
        if self.pages == 512:
            return 9 if self.by_page else 8
        return 4096 + 64 + 1

    def change_objects(self, nodes: int, stashes: int) -> bool:
        """Allocate (or free) nodes and stashes, all or none."""
        frames = [-(-n // 7) - (-s // 64) for n, s in (
            (self.nodes, self.stashes), (self.nodes + nodes, self.stashes + stashes)
        )]  # fmt: skip
        if not self.frames.take(frames[1] - frames[0]):
            return False
        self.nodes += nodes
        self.stashes += stashes
        return True

    @property
    def kernel_tables(self) -> int:
        """Root, one table of 512G, one of 1G; below them a last-level table per 2M of optimised vmemmap."""
        return 3 + (-(-len(self.heads) * self.vmemmap_per_folio // 512) if self.hvo else 0)

    def folio_of(self, pfn: int) -> Folio | None:
        """The folio in use that a frame belongs to."""
        return self.in_use.get(pfn & ~(self.pages - 1))

    def take(self) -> Folio | None:
        """A huge page into the page cache; the one given back last comes first."""
        if not self.free:
            return None
        folio = Folio(self.free.pop(), self.pages)
        self.in_use[folio.head] = folio
        return folio

    def uncache(self, folio: Folio) -> None:
        """Out of the page cache; to the pool if nobody holds any of it, merged if it was split."""
        if folio.split and folio.cached:
            assert self.change_objects(-self.nodes_per_folio, 0)
        folio.cached = False
        if not folio.idle:
            return
        if folio.split:
            self.merge(folio, keep=False)
        del self.in_use[folio.head]
        self.free.append(folio.head)

    def split(self, folio: Folio) -> bool:
        """To 4K folios; an optimised vmemmap is restored first, all of it or nothing.

        Nodes are allocated before that, or (rfc2) after it: then a failure merges the folio again.
        """
        nodes = self.nodes_per_folio
        if not self.change_objects(0 if self.by_page else nodes, int(self.by_page)):
            return False
        if folio.head in self.optimized:
            if not self.frames.take(self.vmemmap_per_folio - 1):
                assert self.change_objects(0 if self.by_page else -nodes, -int(self.by_page))
                return False
            self.optimized.remove(folio.head)
        folio.split = True
        if self.by_page and not self.change_objects(nodes, 0):
            self.join(folio)
            return False
        return True

    def merge(self, folio: Folio, keep: bool) -> None:
        """Back to one folio.

        One flag then speaks for all pages: if some of them (`keep`: the folio stays in use) are up to
        date, the others are zeroed.
        """
        if keep and folio.uptodate and not self.zero_by_page:
            self.zero_pages(folio, set(range(self.pages)) - folio.uptodate)
        if folio.cached:
            assert self.change_objects(-self.nodes_per_folio, 0)
        self.join(folio)

    def join(self, folio: Folio) -> None:
        """Pages become one folio. Without a frame for the new head page its vmemmap stays whole."""
        assert self.change_objects(0, -int(self.by_page))
        folio.split = False
        if not self.hvo:
            return
        if self.one_tail_page:
            if not self.frames.take():
                return
            self.frames.put()
        self.optimized.add(folio.head)
        self.frames.put(self.vmemmap_per_folio - 1)

    def first_use(self, folio: Folio, pfn: int, leaf: int = 1) -> None:
        """Zero what a leaf of `leaf` pages makes visible and was not up to date; folios go whole unless by page."""
        size = leaf if folio.split or self.zero_by_page else self.pages
        start = (pfn - folio.head) // size * size
        self.zero_pages(folio, set(range(start, start + size)) - folio.uptodate)

    def zero_pages(self, folio: Folio, pages: set[int]) -> None:
        folio.uptodate |= pages
        self.forget({folio.head + page for page in pages})

    def forget(self, pfns: set[int]) -> None:
        """These frames read as zero from now on."""
        for pfn in pfns & self.contents.keys():
            del self.contents[pfn]
            self.frames.put()

    def write(self, pfn: int, data: bytes) -> bool:
        """Store a page's contents, which take a frame where there were none."""
        if pfn not in self.contents and not self.frames.take():
            return False
        self.contents[pfn] = data
        return True
