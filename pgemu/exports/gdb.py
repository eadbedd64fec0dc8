"""A core of physical memory that gdb opens at virtual addresses, too: what page tables map, as segments over the same
bytes of the file.

gdb and other readers of ELF cores go by p_vaddr. An image of pgemu has physical memory at Linux's direct map
(physical address 0 at 0xffff888000000000); this adds a PT_LOAD for each range of a root's tables, whose bytes are those
of the physical memory that it maps. Memory that the image does not hold, but a mapping leads to, is left out, or reads
as zero: in images of machines it is what was never written, in others what was not saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from pgemu.errors import InputError
from pgemu.images import elf
from pgemu.tables.ranges import range_arrays
from pgemu.whole_file import whole_file

if TYPE_CHECKING:
    from pgemu.images.image import Image
    from pgemu_kernels.formats.page_format import PageFormat

__all__ = ("Exported", "write_core")

Array = np.ndarray[Any, Any]
MOST_SEGMENTS = 60_000  # e_phnum has 16 bits, and gdb makes a section of each


class Exported(NamedTuple):
    """What was written: bytes of physical memory, segments and bytes of virtual memory, bytes that no memory holds."""

    physical: int
    segments: int
    virtual: int
    missing: int


class _View(NamedTuple):
    """A range of virtual addresses, and the physical address that it begins at."""

    virtual: int
    physical: int
    size: int


def write_core(
    image: Image, views: list[tuple[PageFormat, int]], path: str | os.PathLike[str], *, missing_as_zero: bool = False
) -> Exported:
    """Write an ELF core with the memory of an image and what the tables of `views` map: (format, root) of each.

    missing_as_zero: what the image does not hold reads as zero, else it is left out.
    InputError where the virtual addresses of several views, or of one and the direct map, overlap, or there are more
    ranges than a core has room for. OSError where it cannot be written.
    """
    ranges = [(start, end) for start, end in image.ranges]
    found: list[_View] = []
    missing = most = 0
    for fmt, root in views:
        for view, held in _views(image, fmt, root):
            missing += 0 if held else view.size
            most = max(most, 0 if held else view.size)
            in_direct_map = view.virtual - elf.DIRECT_MAP == view.physical  # it is there already
            if (held or missing_as_zero) and not (held and in_direct_map):
                found.append(view)
    _check(found, ranges, image.path)
    head, places = elf.prologue(ranges, image.roots, image.kernel, image.configuration, found)
    with whole_file(path) as file:
        file.write(head)
        for (start, end), place in zip(ranges, places, strict=True):
            file.seek(place)
            _copy(image, start, end, file)
        file.truncate(places[-1] + ranges[-1][1] - ranges[-1][0] + (most if missing_as_zero else 0))
    return Exported(sum(end - start for start, end in ranges), len(found), sum(v.size for v in found), missing)


def _views(image: Image, fmt: PageFormat, root: int) -> Iterator[tuple[_View, bool]]:
    """Ranges that the tables map, cut where the image begins or ends, with whether it holds them."""
    for arrays in range_arrays(image, fmt, root):
        for address, length, physical, level, *_, step in zip(*arrays.tolist(), strict=True):
            page = 4096 << 9 * (level - 1)
            parts = [(address, physical, length)] if step else [
                (address + at, physical, page) for at in range(0, length, page)
            ]  # fmt: skip
            for virtual, begin, size in parts:
                yield from _held(image, virtual, begin, size)


def _held(image: Image, virtual: int, physical: int, size: int) -> Iterator[tuple[_View, bool]]:
    at = physical
    for start, end in image.ranges:
        first, last = max(start, at), min(end, physical + size)
        if first >= last:
            continue
        if first > at:
            yield _View(virtual + at - physical, at, first - at), False
        yield _View(virtual + first - physical, first, last - first), True
        at = last
    if at < physical + size:
        yield _View(virtual + at - physical, at, physical + size - at), False


def _check(found: list[_View], ranges: list[tuple[int, int]], name: str) -> None:
    if len(found) + len(ranges) > MOST_SEGMENTS:
        raise InputError(
            f"{len(found)} ranges of virtual memory: expected at most {MOST_SEGMENTS - len(ranges)}, a segment each",
            name,
        )
    spans = [(view.virtual, view.virtual + view.size) for view in found]
    spans += [(elf.DIRECT_MAP + start, elf.DIRECT_MAP + end) for start, end in ranges]
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise InputError(f"virtual address {start:#x} is of several roots, expected of one", name)


def _copy(image: Image, start: int, end: int, file: BinaryIO) -> None:
    """Copy a range of memory, but for pages of zeroes."""
    piece = 1 << 20
    for at in range(start, end, piece):
        data = image.read(at, min(piece, end - at))
        if data.count(0) == len(data):
            file.seek(len(data), os.SEEK_CUR)
        else:
            file.write(data)
