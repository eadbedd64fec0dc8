"""What a walk of one address came past, entry by entry, as people look at it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pgemu.machine.short import html_table
from pgemu.tables.entries import decode
from pgemu_kernels.formats.page_format import PageFormat

__all__ = ("Walk", "WalkedEntry", "walked")


class WalkedEntry(NamedTuple):
    """An entry of a walk: its level (1 = 4K, 2 = 2M, 3 = 1G, ...), its physical address, its value."""

    level: int
    address: int
    entry: int

    def __repr__(self) -> str:
        return f"({self.level}, {self.address:#x}, {self.entry:#x})"


class Walk(list[WalkedEntry]):
    """A list of (level, address, entry), from the top table to a leaf or to what is not present.

    format: of the entries; it names their bits where the walk is shown.
    """

    format: PageFormat

    def _flags(self, entry: WalkedEntry) -> str:
        found = decode(self.format, entry.level, entry.entry)
        return found.flags or found.kind.value

    def __repr__(self) -> str:
        return f"[{', '.join(f'{entry} {self._flags(entry)}' for entry in self)}]"

    def _repr_html_(self) -> str:
        rows = [(one.level, hex(one.address), hex(one.entry), self._flags(one)) for one in self]
        return html_table(("level", "address", "entry", "flags"), rows, len(rows))


def walked(entries: Iterable[tuple[int, int, int]], fmt: PageFormat) -> Walk:
    """The entries of a walk, top table first."""
    made = Walk(map(WalkedEntry._make, entries))
    made.format = fmt
    return made
