"""What is read of a page table: its root and format, walks and translations of addresses, its table pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.arguments import plain
from pgemu.machine.arrays import U8, U64, Integers
from pgemu.machine.columns import as_column
from pgemu.machine.field_rules import shown
from pgemu.tables.known_root import KnownRoot
from pgemu.tables.translating import translator
from pgemu.tables.walked import Walk, walked
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import PageFormat
from pgemu_kernels.words.operations import PAGE_4K

if TYPE_CHECKING:
    from pgemu.tables.translation import Access, Kind, Translation

__all__ = ("Reading",)


class Reading(KnownRoot, but=("translate",)):
    """A page table, as far as it is read."""

    _formats: dict[int, PageFormat]
    _row: int
    _root: int

    @property
    def root(self) -> int:
        """Physical address of the (first) top table; 0 once it is destroyed. Of a domain that grows it changes."""
        return self._root

    @property
    def row(self) -> int:
        """Row of its format among the machine's formats."""
        return self._row

    @property
    def format(self) -> PageFormat:
        """What its entries look like, and how many levels there are."""
        return self._formats[self._row]

    def _check_root(self) -> None:
        if self.root == 0:
            raise ValueError("the page table was destroyed: expected one that was not")

    def walk(self, address: int) -> Walk:
        """[(level, entry address, entry)] from the top table to a leaf or to what is not present.

        ValueError for an address beyond the input addresses.

        >>> table.walk(0x4000_0000)[-1]
        (2, 0x4000, 0x800008e7)
        >>> table.walk(1 << 46)
        [(4, 0x2400, 0x0) absent]
        """
        fmt = self.format
        self._check_root()
        sign = 1 if fmt.sign_extended else 0
        high = address >> fmt.input_bits - sign
        if high != 0 and (not sign or high != (1 << 65 - fmt.input_bits) - 1):
            canonical = "a canonical one" if sign else "one"
            raise ValueError(f"address {address:#x}: expected {canonical} of {fmt.input_bits} bits")
        address &= (1 << fmt.input_bits) - 1
        ram = self.machine.arrays.ram
        at = self.root + (address >> 3 + 9 * fmt.levels) * 8
        steps = []
        for level in range(fmt.levels, 0, -1):
            entry = int(ram[at // 8])
            steps.append((level, at, entry))
            leaf = level <= fmt.largest_leaf and fmt.has_leaf_form(level, entry)
            if level == 1 or not entry & fmt.present or leaf:
                break
            at = (entry & fmt.address) + (address >> 3 + 9 * (level - 1) & 511) * 8
        return walked(steps, fmt)

    def translate(
        self,
        addresses: Integers,
        kinds: Kind | Integers | None = None,
        access: Access | None = None,
        *,
        references: bool = False,
    ) -> Translation:
        """Translate addresses (uint64[n]) in order; see pgemu.tables.translation.translate.

        >>> table.translate([0x4020_0123, 0x5000_0000])
        Translation(2: 1 OK, 1 NOT_PRESENT; physical=[0x80200123 0x0])
        >>> table.translate([0x4020_0123, 0x5000_0000], Kind.USER_WRITE).error.tolist()  # a write, from user mode
        [0, 6]
        """
        column = as_column(addresses)
        if column is None or kinds is not None or access is not None or type(references) is not bool:
            given = {"addresses": addresses, "kinds": kinds, "access": access, "references": references}
            column, kinds, access, references = plain(Reading.translate, self, **given)
        self._check_root()
        return translator()(self.machine, self._row, np.uint64(self._root), column, kinds, access, references)

    def table_pages(self) -> dict[int, U64]:
        """Physical addresses of the table pages by level of their entries, read off the tree: uint64[n] each.

        >>> {level: len(pages) for level, pages in table.table_pages().items()}
        {4: 1, 3: 1, 2: 1, 1: 0}
        """
        fmt = self.format
        self._check_root()
        tables = self.machine.arrays.ram.reshape(-1, 512)
        pages = np.uint64(self.root) + np.arange(fmt.root_tables, dtype=np.uint64) * np.uint64(PAGE_4K)
        found = {fmt.levels: pages}
        for level in range(fmt.levels, 1, -1):
            entries = tables[(pages >> np.uint64(12)).astype(np.int64)].reshape(-1)
            below = entries & np.uint64(fmt.present) != 0
            if level <= fmt.largest_leaf:
                below &= ~fmt.have_leaf_form(level, entries)
            pages = entries[below] & np.uint64(fmt.address)
            found[level - 1] = pages
        return found

    def recount(self, owner: U8) -> list[tuple[W.Broken, int]]:
        """Mark the frames of the tables in `owner` (uint8, one per frame): what is wrong, with the frame.

        A frame that has an owner already, and a table whose kept count is not that of its present entries.

        >>> owner = np.zeros(machine.arrays.ram.size // 512, np.uint8)
        >>> table.recount(owner), int(owner.sum())
        ([], 3)
        >>> table.recount(owner)[0]  # the top table's frame has an owner by now
        (<Broken.FRAMES: 1>, 2)
        """
        tables = self.machine.arrays.ram.reshape(-1, 512)
        given: Any = owner
        if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or given.shape != tables.shape[:1]:
            raise TypeError(f"owner {shown(owner)} ({type(given).__name__}): expected uint8[{len(tables)}]")
        found = []
        for pages in self.table_pages().values():
            frames = (pages >> np.uint64(12)).astype(np.int64)
            present = np.count_nonzero(tables[frames] & np.uint64(self.format.present), axis=1)
            wrong = frames[present != self.machine.arrays.counts[frames]]
            found += [(W.Broken.COUNTS, int(frame)) for frame in wrong]
            np.add.at(owner, frames, 1)
            found += [(W.Broken.FRAMES, int(frame)) for frame in np.unique(frames[owner[frames] > 1])]
        return found
