"""What user space asks of the IOMMU in a trace: by which name it maps guest memory, and what it unmaps by itself.

Records that map guest memory for devices name it by a host address or as pages of the guest_memfd; what a door of Linux
takes is one of the two (through()). A VMM that knows of conversions takes converted pages from devices before or after
they become private, and maps them again once they are shared (with_unmaps()), as QEMU's RamDiscardManager lets VFIO do.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.trace.lowered import Lowered
from pgemu.trace.memory_layout import Region
from pgemu.trace.schema import Records
from pgemu_kernels.words.operations import Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("OF_DEVICES", "ByUserSpace", "Name", "of_devices", "through", "with_unmaps")

Name = Literal["address", "file"]
"""What a map names guest memory by: an address of the process, or pages of the guest_memfd."""

OF_DEVICES = (Operation.DMA_MAP, Operation.DMA_UNMAP, Operation.DMA_ACCESS)
_ELSEWHERE = int(Flag.COPY | Flag.IOVA_ANY)  # maps whose memory or address is in no record
_EVERYTHING = (1 << 64) - 1


def of_devices(records: Records) -> npt.NDArray[np.bool_]:
    """bool[n]: which records are of devices."""
    return np.isin(records.op, [int(op) for op in OF_DEVICES])


def through(records: Records, regions: Iterable[Region], name: Name) -> Records:
    """Records whose maps of guest memory name it as asked; a map that no region has whole stays as it is.

    :param regions: host mappings of the guest_memfd
    """
    maps = (records.op == Operation.DMA_MAP) & (records.flags & np.uint8(int(Flag.COPY)) == 0)
    by_address = maps & (records.object == NO_INODE)
    object_, offset = records.object.copy(), records.offset.copy()
    for region in regions:
        size, length = np.uint64(region.size), records.length
        start = np.uint64(region.address if name == "file" else region.offset)
        other = np.uint64(region.offset if name == "file" else region.address)
        named = by_address if name == "file" else maps & (records.object == 0)
        inside = named & (records.offset >= start) & (length <= size) & (records.offset - start <= size - length)
        object_[inside] = 0 if name == "file" else int(NO_INODE)
        offset[inside] = records.offset[inside] - start + other
    return replace(records, object=object_, offset=offset)


# --------------------------------------------------------------------------- who follows conversions


class ByUserSpace(NamedTuple):
    """Records that user space added to a trace: unmaps before or after conversions, maps behind them."""

    unmaps: int
    maps: int


class _Piece(NamedTuple):
    """A part of a map: of an address space, from an IOVA on, pages of the guest_memfd from a byte on; and the record
    that asked for it."""

    space: int
    iova: int
    offset: int
    length: int
    record: int

    def part(self, start: int, end: int) -> _Piece:
        """Its bytes [start, end) of the guest_memfd, which lie in it."""
        return self._replace(iova=self.iova + start - self.offset, offset=start, length=end - start)

    def around(self, start: int, end: int) -> Iterator[_Piece]:
        """What is left of it without [start, end)."""
        if self.offset < start:
            yield self.part(self.offset, start)
        if self.offset + self.length > end:
            yield self.part(end, self.offset + self.length)


class _Pieces:
    """Pieces by where they lie in the guest_memfd, and by address space and IOVA, where they do not overlap."""

    def __init__(self) -> None:
        self._by_offset: list[tuple[int, _Piece]] = []
        self._by_iova: list[tuple[int, int, _Piece]] = []
        self._longest = 0

    def add(self, piece: _Piece) -> None:
        insort(self._by_offset, (piece.offset, piece))
        insort(self._by_iova, (piece.space, piece.iova, piece))
        self._longest = max(self._longest, piece.length)

    def remove(self, piece: _Piece) -> None:
        del self._by_offset[bisect_left(self._by_offset, (piece.offset, piece))]
        del self._by_iova[bisect_left(self._by_iova, (piece.space, piece.iova, piece))]

    def meeting(self, start: int, end: int) -> list[_Piece]:
        """Pieces with some of bytes [start, end) of the guest_memfd."""
        first = bisect_left(self._by_offset, (start - self._longest,))
        last = bisect_left(self._by_offset, (end,))
        return [piece for _, piece in self._by_offset[first:last] if piece.offset + piece.length > start]

    def at(self, space: int, iova: int, end: int) -> list[_Piece]:
        """Pieces with some of I/O addresses [iova, end) of an address space."""
        first = bisect_left(self._by_iova, (space, iova))
        last = bisect_left(self._by_iova, (space, end))
        before = self._by_iova[max(first - 1, 0) : first]
        found = [one for one in before if one[0] == space and one[1] + one[2].length > iova]
        return [piece for *_, piece in (*found, *self._by_iova[first:last])]


@dataclass
class _Added:
    """Records to add, each at a place: twice the number of a record before it, and one more behind it."""

    places: list[int]
    ops: list[int]
    pieces: list[_Piece]

    def note(self, place: int, op: Operation, piece: _Piece) -> None:
        self.places.append(place)
        self.ops.append(int(op))
        self.pieces.append(piece)


class _UserSpace:
    """A VMM that follows the conversions of a trace: what it has mapped for devices, and what it owes them."""

    def __init__(self, lowered: Lowered, late: bool) -> None:
        self._lowered = lowered
        self._records = lowered.records
        self._late = late
        self._mapped, self._owed = _Pieces(), _Pieces()
        self.added = _Added([], [], [])

    def run(self) -> None:
        records = self._records
        handlers = {
            int(Operation.CONVERT): self._convert,
            int(Operation.DMA_MAP): self._map,
            int(Operation.DMA_UNMAP): self._unmap,
        }
        for i in np.flatnonzero(np.isin(records.op, list(handlers))).tolist():
            handlers[int(records.op[i])](i)

    def _map(self, i: int) -> None:
        records = self._records
        place = self._place(i)
        length = int(records.length[i])
        if int(records.flags[i]) & _ELSEWHERE or place is None or not length:
            return  # of other memory, or at an address that no record says
        piece = _Piece(int(records.space[i]), int(records.address[i]), place, length, i)
        if not self._mapped.at(piece.space, piece.iova, piece.iova + length):  # else it is refused
            self._mapped.add(piece)
            self._owe_nothing(piece.space, piece.iova, piece.iova + length)

    def _place(self, i: int) -> int | None:
        """Where the memory of a map lies in the guest_memfd, None where it is other memory."""
        start, length = int(self._records.offset[i]), int(self._records.length[i])
        if self._records.object[i] != NO_INODE:
            return start
        for region in self._lowered.layout.regions:
            if region.address <= start and start + length <= region.end:
                return start - region.address + region.offset
        return None

    def _unmap(self, i: int) -> None:
        records = self._records
        space, iova, length = (int(column[i]) for column in (records.space, records.address, records.length))
        start, end = (0, _EVERYTHING) if length == _EVERYTHING else (iova, iova + length)
        found = self._mapped.at(space, start, end)
        if any(piece.iova < start or piece.iova + piece.length > end for piece in found):  # which is refused
            return
        for piece in found:
            self._mapped.remove(piece)
        self._owe_nothing(space, start, end)

    def _owe_nothing(self, space: int, start: int, end: int) -> None:
        """The trace itself says what is at I/O addresses [start, end) from now on."""
        for piece in self._owed.at(space, start, end):
            self._owed.remove(piece)
            move = piece.offset - piece.iova
            for rest in piece.around(start + move, end + move):
                self._owed.add(rest)

    def _convert(self, i: int) -> None:
        records = self._records
        start, length = int(records.offset[i]), int(records.length[i])
        if records.flags[i] & np.uint8(int(Flag.PRIVATE)):
            self._take(i, start, start + length)
        else:
            self._give_back(i, start, start + length)

    def _take(self, i: int, start: int, end: int) -> None:
        """Whole maps are unmapped, for type1 and iommufd cut none; what is not converted of them is mapped again."""
        place = 2 * i + self._late
        for piece in self._mapped.meeting(start, end):
            self._mapped.remove(piece)
            self.added.note(place, Operation.DMA_UNMAP, piece)
            for rest in piece.around(start, end):
                self._mapped.add(rest)
                self.added.note(place, Operation.DMA_MAP, rest)
            self._owed.add(piece.part(max(start, piece.offset), min(end, piece.offset + piece.length)))

    def _give_back(self, i: int, start: int, end: int) -> None:
        for piece in self._owed.meeting(start, end):
            self._owed.remove(piece)
            for rest in piece.around(start, end):
                self._owed.add(rest)
            again = piece.part(max(start, piece.offset), min(end, piece.offset + piece.length))
            self._mapped.add(again)
            self.added.note(2 * i + 1, Operation.DMA_MAP, again)


def with_unmaps(lowered: Lowered, *, late: bool) -> tuple[Lowered, ByUserSpace]:
    """A trace in which user space follows the conversions: before a conversion to private it unmaps what devices have
    of the range, behind one to shared it maps that again. A map is unmapped whole, and the rest of it mapped again.

    :param late: it unmaps behind the conversion, at once: no record of the trace comes between
    :returns: the trace, and how many records were added
    """
    vmm = _UserSpace(lowered, late)
    vmm.run()
    places, ops, pieces = vmm.added.places, vmm.added.ops, vmm.added.pieces
    if not places:
        return lowered, ByUserSpace(0, 0)
    records = lowered.records
    anchors = np.array(places, np.int64) // 2
    asked = records.take(np.array([piece.record for piece in pieces], np.intp))  # whose process, rights and name
    offset = np.array([piece.offset for piece in pieces], np.uint64)
    came = np.array([vmm._place(piece.record) for piece in pieces], np.uint64)
    maps = np.array(ops, np.uint8) == Operation.DMA_MAP
    new = replace(
        asked,
        time=records.time[anchors],
        op=np.array(ops, np.uint8),
        actor=records.actor[anchors],
        flags=np.where(maps, asked.flags, 0).astype(np.uint8),
        vm=np.where(maps, asked.vm, 0).astype(np.uint16),
        object=np.where(maps, asked.object, 0).astype(np.uint32),
        address=np.array([piece.iova for piece in pieces], np.uint64),
        offset=np.where(maps, asked.offset + (offset - came), 0).astype(np.uint64),
        length=np.array([piece.length for piece in pieces], np.uint64),
    )
    own = 2 * np.arange(len(records), dtype=np.int64)
    # A record itself stands behind what is added before it, and before what is added behind it.
    keys = np.concatenate([2 * own + 1, 2 * np.array(places, np.int64)])
    order = np.argsort(keys, kind="stable")
    levels = lowered.fault_levels
    if levels is not None:
        levels = np.concatenate([levels, np.zeros(len(new), levels.dtype)])[order]
    both = Records.concatenate([records, new]).take(order)
    counts = ByUserSpace(int((~maps).sum()), int(maps.sum()))
    return replace(lowered, records=both, fault_levels=levels), counts
