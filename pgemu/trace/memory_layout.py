"""Where guest memory lies: memory slots, the host ranges behind them, and their place in one guest_memfd.

A log's VMM had other memory (anonymous, hugetlbfs); here all of it is one guest_memfd inode, laid out so that an
offset is congruent to the GPA modulo the huge page wherever that is possible: only then are huge leaves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

__all__ = (
    "LARGEST_RANGE",
    "SYNTHETIC_HVA",
    "GivenSlot",
    "Layout",
    "RefusedSlot",
    "Region",
    "Slot",
    "bind_slots",
    "given_layout",
    "grow",
    "inferred_slots",
    "place_regions",
    "ram_ranges",
    "with_host_addresses",
)

SYNTHETIC_HVA = 0x7F00_0000_0000
"""First host address of memory for which the log names none; a multiple of 1 GiB."""

_MOST_BYTES = 1 << 52  # physical addresses of x86-64

LARGEST_RANGE = 1 << 40
"""Bytes; a longer range of guest addresses is the VMM's whole address space, no memory."""


class GivenSlot(NamedTuple):
    """A memory slot that the user states, bytes; `offset` into the guest_memfd, None: wherever it fits; `hva`, the host
    address of its memory, None: that of the log's slot there, else not known."""

    gpa: int
    size: int
    offset: int | None = None
    hva: int | None = None


@dataclass(frozen=True)
class Slot:
    """A memory slot bound to the guest_memfd; `gpa`, `size`, `hva` and `offset` (into the inode) in bytes."""

    slot: int
    gpa: int
    size: int
    hva: int
    offset: int = 0


@dataclass(frozen=True)
class RefusedSlot:
    """A memory slot of the log that guest_memfd cannot back, with the reason; it stays on other memory."""

    slot: int
    gpa: int
    size: int
    reason: str


@dataclass(frozen=True)
class Region:
    """A host mapping of the guest_memfd: `address` (HVA), `offset` and `size` in bytes."""

    address: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True)
class Layout:
    """Guest memory of a trace.

    Attributes:
        inode_size: bytes of the guest_memfd, a multiple of page_size
        page_size: bytes of a huge page
        regions: host mappings, by address
        slots: memory slots as they stand at the end of the trace, by GPA
        refused: memory slots left on other memory, as they stand at the end
        origin: "trace" (slot lines), "inferred" (from the accesses), "given" (by the user) or "workload"
    """

    inode_size: int
    page_size: int
    regions: tuple[Region, ...]
    slots: tuple[Slot, ...]
    refused: tuple[RefusedSlot, ...] = field(default=())
    origin: str = "trace"

    def __repr__(self) -> str:
        parts = f"{len(self.regions)} regions, {len(self.slots)} slots, {len(self.refused)} refused"
        return f"Layout({self.inode_size} bytes in pages of {self.page_size}, {parts}, origin={self.origin!r})"

    @property
    def inferred(self) -> bool:
        return self.origin == "inferred"

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dicts, ints and strings."""
        return {**asdict(self), "inferred": self.inferred}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """Return what `to_json` was given.

        :raises ValueError, KeyError, TypeError: it is something else, or no memory lies so
        """
        regions = tuple(Region(*_ranges(one, _REGION)) for one in data["regions"])
        slots = tuple(Slot(*_ranges(one, _SLOT)) for one in data["slots"])
        refused = tuple(_refused(one) for one in data["refused"])
        if data["origin"] not in ORIGINS:
            raise ValueError(f"origin {str(data['origin'])[:40]!r}, expected one of {', '.join(ORIGINS)}")
        for what, ranges in (
            ("regions overlap", [(region.address, region.size) for region in regions]),
            ("regions overlap in the inode", [(region.offset, region.size) for region in regions]),
        ):
            for (start, size), (following, _) in pairwise(sorted(ranges)):
                if start + size > following:
                    raise ValueError(f"{what} at {following:#x}")
        size, page = (
            _number(data, name, limit) for name, limit in (("inode_size", _MOST_BYTES), ("page_size", PAGE_1G))
        )
        if page not in (PAGE_4K, PAGE_2M, PAGE_1G):
            raise ValueError(f"page_size {page}, expected 4096, {PAGE_2M} or {PAGE_1G}")
        return cls(size, page, regions, slots, refused, data["origin"])


_MOST_HOST = 1 << 56  # user addresses with five levels
ORIGINS = ("trace", "inferred", "given", "workload")
_REGION = (("address", _MOST_HOST), ("offset", _MOST_BYTES), ("size", _MOST_BYTES))
_SLOT = (("slot", 1 << 32), ("gpa", _MOST_BYTES), ("size", _MOST_BYTES), ("hva", _MOST_HOST), ("offset", _MOST_BYTES))
"""Fields of a stored layout, and below what each is."""


def _number(data: dict[str, Any], name: str, limit: int) -> int:
    """A number of a stored layout: pages, but for a slot's number. KeyError, TypeError or ValueError for another."""
    value = data[name]
    if type(value) is not int:
        raise TypeError(f"{name} {str(value)[:40]!r}, expected a number")
    if not 0 <= value <= limit or (name != "slot" and value % PAGE_4K) or (name == "size" and not value):
        raise ValueError(f"{name} {value}, expected a number of whole pages up to {limit:#x}")
    return value


def _ranges(data: Any, fields: tuple[tuple[str, int], ...]) -> list[int]:
    """Numbers of a stored region or slot."""
    if not isinstance(data, dict) or set(data) != {name for name, _ in fields}:
        raise TypeError(f"{str(data)[:60]}, expected {', '.join(name for name, _ in fields)}")
    return [_number(data, name, limit) for name, limit in fields]


def _refused(data: Any) -> RefusedSlot:
    """A stored slot that was left out: of any size and place, it is only shown."""
    if not isinstance(data, dict) or set(data) != {"slot", "gpa", "size", "reason"}:
        raise TypeError(f"{str(data)[:60]}, expected slot, gpa, size, reason")
    numbers = [data[name] for name in ("slot", "gpa", "size")]
    if any(type(one) is not int or not 0 <= one < 1 << 64 for one in numbers) or not isinstance(data["reason"], str):
        raise TypeError(f"{str(data)[:60]}, expected numbers of 64 bits and a text")
    return RefusedSlot(data["slot"], data["gpa"], data["size"], data["reason"])


def align_up(value: int, step: int) -> int:
    """Return the lowest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def ram_ranges(slots: Iterable[Slot]) -> list[tuple[int, int]]:
    """Merge the host ranges of slots that overlap or touch; return (first, end) by address."""
    ranges: list[tuple[int, int]] = []
    for start, end in sorted((slot.hva, slot.hva + slot.size) for slot in slots):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((start, end))
    return ranges


def place_regions(ranges: Sequence[tuple[int, int]], slots: Sequence[Slot], page_size: int) -> list[Region]:
    """Give each host range its place in the inode, big ones first; return them by address.

    A range of 2 MiB or more begins where the offset of its largest slot is congruent to that slot's GPA modulo
    the huge page; smaller ones, which no huge leaf fits, follow one another.
    """
    regions = []
    end = 0
    largest_in = _largest_slots(ranges, slots)
    for start, stop in sorted(ranges, key=lambda item: (item[0] - item[1], item[0])):
        offset = end
        if stop - start >= PAGE_2M:
            largest = largest_in[start]
            wanted = (largest.gpa - (largest.hva - start)) % page_size
            offset = align_up(end - wanted, page_size) + wanted
        regions.append(Region(start, offset, stop - start))
        end = offset + stop - start
    return sorted(regions, key=lambda region: region.address)


def _largest_slots(ranges: Sequence[tuple[int, int]], slots: Sequence[Slot]) -> dict[int, Slot]:
    """The largest slot of each range, of several the one of the lowest GPA, by the range's first address."""
    starts = sorted(start for start, _ in ranges)
    found: dict[int, Slot] = {}
    for slot in slots:
        start = starts[bisect_right(starts, slot.hva) - 1]
        best = found.get(start)
        if best is None or (slot.size, -slot.gpa) > (best.size, -best.gpa):
            found[start] = slot
    return found


def grow(layout: Layout, page_size: int, guest_memory: int | None, least: int = 0) -> Layout:
    """Round the inode up to huge pages, or make it as large as asked.

    :param least: bytes that it has to have beside what is mapped
    :raises InputError: `guest_memory` is not a multiple of the page size or smaller than what the slots need, which is
        more than physical addresses reach
    """
    needed = max((region.offset + region.size for region in layout.regions), default=0)
    needed = max(needed, least)
    if needed > _MOST_BYTES:
        raise InputError(f"memory slots that need {needed} bytes of guest memory, expected at most {_MOST_BYTES}")
    size = max(align_up(needed, page_size), page_size)
    if guest_memory is not None:
        if guest_memory <= 0 or guest_memory % page_size:
            raise InputError(f"guest memory of {guest_memory} bytes is not a multiple of the page size {page_size}")
        if guest_memory < needed:
            raise InputError(f"guest memory of {guest_memory} bytes is too small, the memory slots need {size}")
        size = guest_memory
    return replace(layout, inode_size=size, page_size=page_size)


def inferred_slots(start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64]) -> list[Slot]:
    """Guess slots from what is touched or converted: whole 2 MiB blocks, joined across gaps of less than 1 GiB.

    :param start: first guest addresses of the ranges seen, uint64[n], bytes
    :param end: the addresses behind them; a range of more than 1 TiB is the VMM's whole address space, no memory
    """
    kept = end - start <= np.uint64(LARGEST_RANGE)
    first, last = start[kept] >> np.uint64(21), (end[kept] - np.uint64(1)) >> np.uint64(21)
    order = np.argsort(first, kind="stable")
    first, last = first[order], np.maximum.accumulate(last[order])
    gap = first[1:].astype(np.int64) - last[:-1].astype(np.int64) - 1
    breaks = np.flatnonzero(gap >= PAGE_1G // PAGE_2M)
    starts = np.concatenate([first[:1], first[breaks + 1]]).tolist()
    ends = np.concatenate([last[breaks], last[-1:]]).tolist()
    return _synthetic(
        [GivenSlot(low * PAGE_2M, (high + 1 - low) * PAGE_2M) for low, high in zip(starts, ends, strict=True)]
    )


def _synthetic(given: Sequence[GivenSlot]) -> list[Slot]:
    """Host addresses as stated; others are invented: congruent to the GPA modulo 1 GiB, never adjacent to others."""
    slots = []
    base = SYNTHETIC_HVA
    stated = sorted((slot.hva, slot.hva + slot.size) for slot in given if slot.hva is not None)
    for number, (gpa, size, offset, hva) in enumerate(given):
        if hva is None:
            for first, end in stated:
                if first <= base + PAGE_1G + gpa % PAGE_1G + size and base < end + PAGE_1G:
                    base = align_up(end, PAGE_1G) + PAGE_1G
            hva = base + gpa % PAGE_1G
            base = align_up(hva + size, PAGE_1G) + PAGE_1G
        slots.append(Slot(number, gpa, size, hva, offset or 0))
    return slots


def with_host_addresses(given: Sequence[GivenSlot], seen: Sequence[Slot]) -> list[GivenSlot]:
    """The slots that the user states with the host addresses that are known.

    :param seen: slots of the log; they lend their host addresses where they cover a given one
    """
    found = []
    for slot in given:
        match = next((s for s in seen if s.gpa <= slot.gpa and slot.gpa + slot.size <= s.gpa + s.size), None)
        lent = None if match is None else match.hva + slot.gpa - match.gpa
        found.append(slot if slot.hva is not None else slot._replace(hva=lent))
    return found


def given_layout(
    given: Sequence[GivenSlot], seen: Sequence[Slot], refused: Sequence[RefusedSlot], page_size: int
) -> Layout:
    """Lay out the slots that the user states, each a host mapping of its own.

    :param seen: slots of the log, as in with_host_addresses()
    :raises InputError: not in whole pages, or two of them overlap in GPA, host address or offset
    """
    slots = _synthetic(with_host_addresses(given, seen))
    for slot in slots:
        if slot.size <= 0 or (slot.gpa | slot.size | slot.offset | slot.hva) % PAGE_4K:
            raise InputError(f"memory slot {slot.gpa:#x}:{slot.size:#x} is not made of whole 4 KiB pages")
    _refuse_overlap("guest addresses", [(slot.gpa, slot.size) for slot in slots])
    _refuse_overlap("host addresses", [(slot.hva, slot.size) for slot in slots])
    free = [slot for slot, one in zip(slots, given, strict=True) if one.offset is None]
    fixed = [
        Region(slot.hva, slot.offset, slot.size)
        for slot, one in zip(slots, given, strict=True)
        if one.offset is not None
    ]
    behind = align_up(max((region.offset + region.size for region in fixed), default=0), page_size)
    placed = place_regions([(slot.hva, slot.hva + slot.size) for slot in free], free, page_size)
    regions = sorted(
        [*fixed, *(replace(region, offset=region.offset + behind) for region in placed)],
        key=lambda region: region.address,
    )
    _refuse_overlap("offsets", [(region.offset, region.size) for region in regions])
    bound = bind_slots(slots, regions)
    return Layout(0, page_size, tuple(regions), tuple(sorted(bound, key=lambda s: s.gpa)), tuple(refused), "given")


def bind_slots(slots: Iterable[Slot], regions: Sequence[Region]) -> list[Slot]:
    """Return the slots with the offsets that their host addresses have in the regions, which are by address."""
    bound = []
    starts = [region.address for region in regions]
    for slot in slots:
        region = regions[bisect_right(starts, slot.hva) - 1]
        bound.append(replace(slot, offset=region.offset + slot.hva - region.address))
    return bound


def _refuse_overlap(what: str, ranges: list[tuple[int, int]]) -> None:
    ranges.sort()
    for (start, size), (following, _) in pairwise(ranges):
        if start + size > following:
            raise InputError(f"memory slots overlap in their {what} at {following:#x}")
