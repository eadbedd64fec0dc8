"""guest_memfd inodes and the windows through which processes and VMs see them."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.folio import Folio
from model.tables import common


@dataclass
class Inode:
    """Pages, which of them are shared, the huge pages that are allocated, and memory policies by block."""

    pages: int
    shared: set[int]
    open: bool = True
    blocks: dict[int, Folio] = field(default_factory=dict)
    policies: dict[int, tuple[int, int]] = field(default_factory=dict)  # mode, nodes
    assigned: set[int] = field(default_factory=set)  # pages that the RMP assigns to a guest
    assigned_2m: set[int] = field(default_factory=set)  # ... and numbers of the 2M that one entry assigns

    def assign(self, index: int, level: int) -> None:
        """sev_gmem_prepare(): 2M at once where that much may be mapped and none of it is assigned."""
        block = range(index // 512 * 512, index // 512 * 512 + 512)
        if index in self.assigned:
            return
        if level > 1 and self.assigned.isdisjoint(block):
            self.assigned.update(block)
            self.assigned_2m.add(index // 512)
        self.assigned.add(index)

    def unassign(self, pages: range) -> None:
        """sev_gmem_invalidate(): an entry of 2M that reaches beyond is split."""
        self.assigned.difference_update(pages)
        self.assigned_2m.difference_update(range(pages.start // 512, (pages.stop - 1) // 512 + 1))


@dataclass
class Window:
    """A VMA or a memory slot: virtual or guest pages [first, first + n) show pages of an inode from `pgoff` on.

    A VMA may be `counted`: its entries are those of folios, whatever the design. A slot may be `released`: there, but
    without memory; `closed`: its file is held by mappings alone; or log dirty pages. Its userspace address is `place`,
    as a page.
    """

    owner: int
    pages: range
    inode: int
    pgoff: int
    read_only: bool = False
    counted: bool = False
    released: bool = False
    dirty: bool = False
    closed: bool = False
    place: int | None = None

    @property
    def file(self) -> range:
        return range(self.pgoff, self.pgoff + len(self.pages))

    def file_page(self, page: int) -> int:
        """Page of the inode that a page of the window shows."""
        return page - self.pages.start + self.pgoff

    def file_range(self, pages: range) -> range:
        """Pages of the inode that a part of the window shows."""
        return range(self.file_page(pages.start), self.file_page(pages.stop))

    def showing(self, inode: int, pages: range) -> range:
        """Pages of the window that show pages of an inode; empty if none."""
        if inode != self.inode or self.released:
            return range(0)
        part = common(self.file, pages)
        shift = self.pages.start - self.pgoff
        return range(part.start + shift, part.stop + shift)

    def cut(self, pages: range) -> Window:
        """The part of the window over `pages`."""
        return Window(self.owner, pages, self.inode, self.file_page(pages.start), self.read_only, self.counted)
