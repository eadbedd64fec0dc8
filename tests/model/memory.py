"""The pool, the vmemmap and the contents of guest pages, as objects and dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from model.folio import PIECE, Folio
from model.parameters import POOL_BASE, Parameters
from model.tables import Frames

STRUCT_PAGES = 64  # per vmemmap page
LRU_BATCH = 31  # PAGEVEC_SIZE
PIECE_NODES = 8  # xarray nodes of a split 2M folio, in place; of a 1G one that was split to 2M folios:
PIECES_NODES = 1 + 64


class Boot(NamedTuple):
    """Frames in use after boot, of them kernel tables and vmemmap; how many may be; the first one of guest memory."""

    used: int
    kernel_tables: int
    vmemmap: int
    limit: int
    base: int


class Memory:
    """The pool with its vmemmap, and the frames that page tables and contents take.

    `boot`: a machine's own figures, where several nodes or 4K pages make them depend on more than the pool.
    """

    def __init__(self, parameters: Parameters, boot: Boot | None = None) -> None:
        kernel, order = parameters.kernel, parameters.page_order
        self.order = order
        self.pages = 1 << order
        self.by_page = parameters.by_page
        self.queued = parameters.worker == "queued"
        self.lru_cache = parameters.lru_cache
        self.nodes = 0  # xarray nodes of split folios in the page cache, 7 to a frame
        self.stashes = 0  # 64 to a frame
        self.hvo = parameters.hvo and order > 0
        self.one_tail_page = kernel == "7.3"  # 7.1 and later: all folios of an order share it
        self.tail_of_pieces = False
        self.parameters = parameters
        self.zero_by_page = parameters.zero == "page"
        self.stale = 0  # pages that a leaf has shown though they were not zeroed
        self.lost = False  # pages in use were zeroed
        self.heads = parameters.heads(boot.base if boot else POOL_BASE)
        # The free list's front is its end here: 2M pages ascending, 1G pages of the boot allocator as captured.
        ascending = kernel == "7.3" and order == 18
        self.free = [heads[:] if ascending else heads[::-1] for heads in self.heads]
        self.choose: Callable[[int, int], int | None] | None = None  # which page the page allocator gave (order 0)
        self.in_use: dict[int, Folio] = {}
        self.bad: dict[int, set[int]] = {}  # free huge pages that are poisoned, which nobody gets
        self.batch: list[tuple[Folio, int]] = []  # folios that wait for an LRU list
        self.optimized = {head for heads in self.heads for head in heads} if self.hvo else set()
        self.contents: dict[int, bytes] = {}
        self.boot_vmemmap = 0 if self.hvo else -(-self.count * self.pages // 32768) * 512  # whole 2M leaves
        self.more_vmemmap = self.more_tables = 0
        if boot:
            self.more_vmemmap = boot.vmemmap - self.vmemmap_pages
            self.more_tables = boot.kernel_tables - self.kernel_tables
            self.frames = Frames(boot.limit)
            self.frames.used = boot.used
        else:
            limit = 1 << 60 if parameters.frames is None else parameters.frames + self.boot_vmemmap
            self.frames = Frames(limit)
            self.frames.take(self.kernel_tables + self.vmemmap_pages)
        self.limit = self.frames.limit

    # ------------------------------------------------------------------ what is counted

    @property
    def count(self) -> int:
        """Huge pages in the pool."""
        return sum(map(len, self.heads))

    @property
    def count_free(self) -> int:
        return sum(map(len, self.free))

    @property
    def vmemmap_per_folio(self) -> int:
        return self.pages // STRUCT_PAGES

    @property
    def vmemmap_pages(self) -> int:
        if not self.hvo:
            return self.boot_vmemmap + self.more_vmemmap
        in_pieces = [folio for folio in self.in_use.values() if folio.pieces is not None]
        whole = self.count - len(in_pieces)
        restored = whole - len(self.optimized)
        pieces = sum(self.pages // PIECE + len(folio.pieces or ()) * 7 for folio in in_pieces)
        tails = int(self.one_tail_page) + int(self.tail_of_pieces)
        return tails + whole + restored * (self.vmemmap_per_folio - 1) + pieces + self.more_vmemmap

    @property
    def kernel_tables(self) -> int:
        """Root, one table of 512G, one of 1G; below them a last-level table per 2M of optimised vmemmap."""
        return 3 + (-(-self.count * self.vmemmap_per_folio // 512) if self.hvo else 0) + self.more_tables

    @property
    def nodes_per_folio(self) -> int:
        """A node for 64 pages, one for 4096, one for 2^18; rfc2 makes the upper one of a 2M page anew."""
        if self.pages == 512:
            return 9 if self.by_page else 8
        return 4096 + 64 + 1

    def nodes_of(self, folio: Folio) -> int:
        """Nodes that a folio takes in the page cache."""
        if folio.pieces is not None:
            return PIECES_NODES + PIECE_NODES * len(folio.pieces)
        return self.nodes_per_folio if folio.split else 0

    def limit_frames(self, free: int | None) -> None:
        """Only `free` more frames may be taken; None: as booted."""
        self.frames.limit = self.limit if free is None else min(self.limit, self.frames.used + free)

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

    # ------------------------------------------------------------------ taking and returning

    def folio_of(self, pfn: int) -> Folio | None:
        """The folio in use that a frame belongs to."""
        return self.in_use.get(pfn & ~(self.pages - 1))

    def take(self, nodes: list[int], place: tuple[int, int]) -> Folio | None:
        """A huge page of the first of some nodes that has one into the page cache; the last one back comes first.

        Which 4K page the page allocator gives is not modelled: `choose` tells, and it must be a free one.
        """
        good = {node: [head for head in self.free[node] if head not in self.bad] for node in nodes}
        node = next((node for node in nodes if good[node]), None)
        if node is None:
            return None
        head = self.choose(*place) if self.order == 0 and self.choose else good[node][-1]
        assert head is not None
        assert head in self.free[node], f"page {head:#x} is no free one of node {node}"
        self.free[node].remove(head)
        folio = Folio(head, self.pages, place=place)
        self.in_use[head] = folio
        if self.order == 0:
            self.forget({head})  # CONFIG_INIT_ON_ALLOC_DEFAULT_ON
            self.lru_add(folio, 0)
        return folio

    def uncache(self, folio: Folio, evicted: bool = False) -> None:
        """Out of the page cache; to the pool if nobody holds any of it, merged if it was split.

        With rfc2, a split folio of an inode that is `evicted` is always the worker's to return.
        """
        if folio.cached:
            assert self.change_objects(-self.nodes_of(folio), 0)
        folio.cached = folio.waits = False
        if folio.idle:
            later = evicted and self.by_page and self.queued and not folio.whole
            self.give_back(folio, later)

    def dropped(self, folio: Folio) -> None:
        """A reference is gone: the last one of a folio outside the page cache sends it back."""
        if not folio.cached and folio.idle:
            self.give_back(folio, self.queued and not folio.whole)

    def give_back(self, folio: Folio, later: bool = False) -> None:
        """To the pool, now or when the worker comes."""
        folio.ready = later
        if later:
            return
        if folio.split:
            self.merge(folio, keep=False)
        elif folio.pieces is not None:
            self.join_pieces(folio)
        del self.in_use[folio.head]
        if folio.bad:
            self.bad[folio.head] = folio.bad
        self.free[next(n for n, heads in enumerate(self.heads) if folio.head in heads)].append(folio.head)

    # ------------------------------------------------------------------ LRU batches

    def lru_add(self, folio: Folio, unit: int) -> None:
        """folio_add_lru(): the per-CPU batch holds a reference until it is full, or drained."""
        if not self.lru_cache:
            return
        folio.cached_by_cpu.add(unit)
        self.batch.append((folio, unit))
        if len(self.batch) == LRU_BATCH:
            self.lru_drain()

    def lru_drain(self) -> int:
        """lru_add_drain_all(): how many folios."""
        batch, self.batch = self.batch, []
        for folio, unit in batch:
            folio.cached_by_cpu.remove(unit)
            self.dropped(folio)
        return len(batch)

    # ------------------------------------------------------------------ split and merge

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
        self.inherit(folio, range(folio.pages), 1)
        if self.by_page:  # each page is inserted anew
            for unit in range(folio.pages if self.lru_cache else 0):
                self.lru_add(folio, unit)
        return True

    def merge(self, folio: Folio, keep: bool) -> None:
        """Back to one folio. `keep`: it stays in use."""
        if keep:
            self.join_flags(folio, range(self.pages))
        if folio.cached:
            assert self.change_objects(-self.nodes_per_folio, 0)
        self.join(folio)

    def join(self, folio: Folio) -> None:
        """Pages become one folio. Without a frame for the new head page its vmemmap stays whole."""
        assert self.change_objects(0, -int(self.by_page))
        folio.split = folio.waits = False
        if not self.hvo:
            return
        if self.one_tail_page:
            if not self.frames.take():
                return
            self.frames.put()
        self.optimized.add(folio.head)
        self.frames.put(self.vmemmap_per_folio - 1)

    # ------------------------------------------------------------------ 2M folios of a 1G folio; frames are not short

    def change_pieces(self, folio: Folio, pieces: set[int] | None) -> None:
        """Which 2M folios are split; None: it is one folio of 1G."""
        before = self.nodes_of(folio), self.vmemmap_pages
        folio.pieces = pieces
        if pieces is not None:
            self.optimized.discard(folio.head)
            self.tail_of_pieces |= self.hvo and self.one_tail_page
        elif self.hvo:
            self.optimized.add(folio.head)
        assert self.frames.take(self.vmemmap_pages - before[1])
        if folio.cached:
            assert self.change_objects(self.nodes_of(folio) - before[0], 0)

    def split_pieces(self, folio: Folio, pieces: set[int]) -> None:
        """To 2M folios, and some of these to 4K."""
        if folio.pieces is None:
            self.inherit(folio, range(folio.pages), PIECE)
        for piece in pieces - (folio.pieces or set()):
            self.inherit(folio, range(piece * PIECE, piece * PIECE + PIECE), 1)
        self.change_pieces(folio, (folio.pieces or set()) | pieces)

    def merge_piece(self, folio: Folio, piece: int) -> None:
        """4K folios to a 2M folio, whose flag speaks for all of them."""
        self.join_flags(folio, range(piece * PIECE, piece * PIECE + PIECE))
        self.change_pieces(folio, (folio.pieces or set()) - {piece})

    def join_pieces(self, folio: Folio, keep: bool = False) -> None:
        """2M folios to one of 1G."""
        if keep:
            self.join_flags(folio, range(self.pages))
        self.change_pieces(folio, None)
        folio.waits = False

    # ------------------------------------------------------------------ contents

    def first_use(self, folio: Folio, pfn: int, leaf: int = 1) -> None:
        """Zero what a leaf of `leaf` pages makes visible and was not; folios go whole unless by page."""
        unit = folio.unit(pfn)
        pages = range(unit, unit + folio.size(unit))
        if unit not in folio.uptodate:
            if self.parameters.clears_first:
                used = {unit}
            elif self.zero_by_page:
                size = min(leaf, len(pages))
                start = (pfn - folio.head) // size * size
                used = set(range(start, start + size))
            else:
                used = set(pages)
            if self.parameters.flags_only:
                self.lost |= not used.isdisjoint(folio.shown)
            else:
                used -= folio.zeroed
            self.zero_pages(folio, used)
            if self.parameters.flags_only or folio.zeroed.issuperset(pages):
                folio.uptodate |= set(pages)

    def show(self, folio: Folio, pfn: int, leaf: int = 1) -> None:
        """A new leaf of `leaf` pages shows them; what was never zeroed counts when it is shown first."""
        start = (pfn - folio.head) // leaf * leaf
        pages = range(start, start + leaf)
        if self.parameters.keeps_shown or not folio.zeroed.issuperset(pages):
            new = set(pages) - folio.shown
            self.stale += len(new - folio.zeroed)
            folio.shown |= new

    def inherit(self, folio: Folio, pages: range, size: int) -> None:
        """A folio is split to folios of `size`: all are up to date as it was, or else those that are known to be."""
        if pages.start in folio.uptodate or self.parameters.flags_only:
            return
        for start in pages[::size]:
            if folio.zeroed.issuperset(range(start, start + size)):
                folio.uptodate |= set(range(start, start + size))

    def join_flags(self, folio: Folio, pages: range) -> None:
        """Folios become one."""
        known = folio.zeroed & set(pages)
        if self.parameters.flag_stays:
            uptodate = pages.start in folio.uptodate
        else:
            if known and self.parameters.merge_zero == "unzeroed":
                self.zero_pages(folio, set(pages) - known)
            uptodate = folio.zeroed.issuperset(pages)
        folio.uptodate -= set(pages)
        if uptodate:
            folio.uptodate |= set(pages)

    def zero_part(self, folio: Folio, pages: range) -> None:
        """A hole: only where a flag may lie more is known of what it has zeroed than that it reads as zero."""
        start = pages.start
        if "hole-zeroes-from-start" in self.parameters.defects:
            start = folio.unit(folio.head + start)
        self.lost |= not folio.shown.isdisjoint(range(start, pages.start))
        folio.shown.difference_update(pages)
        self.forget({folio.head + page for page in range(start, pages.stop)})
        for page in range(start, pages.stop) if self.parameters.flag_stays else ():
            if self.parameters.flags_only or folio.unit(folio.head + page) in folio.uptodate:
                folio.zeroed.add(page)

    def zero_pages(self, folio: Folio, pages: set[int]) -> None:
        folio.zeroed |= pages
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
