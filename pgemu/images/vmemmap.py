"""The page-table entries that map struct pages, one for each 4K of them: what HVO edits. No compiler involved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from pgemu.tables.walk import Kind, Memory, leaf_address, walk
from pgemu_kernels.formats.page_format import PageFormat
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("VmemmapPage", "vmemmap_pages")


class VmemmapPage(NamedTuple):
    """What maps one 4K page of a folio's struct pages.

    address: virtual. level, entry_address, entry: the last entry of the walk; level 2 or 3: part of a large leaf.
    frame: PFN, or None where nothing is mapped. shared: another page of the folio's vmemmap shows the same frame.
    """

    address: int
    level: int
    entry_address: int
    entry: int
    frame: int | None
    writable: bool
    shared: bool


_Mapped = tuple[int, int, int, int, int | None, bool]  # a VmemmapPage without `shared`


def vmemmap_pages(memory: Memory, fmt: PageFormat, root: int, address: int, end: int) -> Iterator[VmemmapPage]:
    """What maps each 4K page from `address`, a multiple of 4096, to `end`, both virtual.

    ValueError where a table lies only in part in the memory, or the address is none of the format.
    """
    found: list[_Mapped] = []
    while address < end:
        stop = min(end, (address >> 21) + 1 << 21)
        found += _mapped(memory, fmt, root, address, stop)
        address = stop
    times = Counter(mapped[4] for mapped in found)
    return (VmemmapPage(*mapped, mapped[4] is not None and times[mapped[4]] > 1) for mapped in found)


def _mapped(memory: Memory, fmt: PageFormat, root: int, address: int, end: int) -> list[_Mapped]:
    """Vmemmap pages of addresses that share a last-level table, or the entry that stands in its place."""
    steps = walk(memory, fmt, root, address)
    if not steps:
        raise ValueError(f"address {address:#x}: expected one of the vmemmap, which is mapped")
    last, pages = steps[-1], range(address, end, PAGE_4K)
    if last.level > 1 or last.kind is Kind.UNREADABLE:
        slots = [(last.address, last.entry, last.kind is Kind.LEAF)] * len(pages)
    else:
        entries = memory.words(last.address, len(pages)).tolist()
        slots = [(last.address + 8 * i, entry, entry & fmt.present != 0) for i, entry in enumerate(entries)]
    return [
        (
            page, last.level, where, entry, leaf_address(fmt, last.level, entry, page) >> 12 if leaf else None,
            leaf and entry & fmt.write != 0,
        )
        for page, (where, entry, leaf) in zip(pages, slots, strict=True)
    ]  # fmt: skip
