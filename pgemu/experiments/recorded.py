"""What a recorded VM's guest used without a fault, and what that would be on a design: bounds of guest faults.

A log has an access only where it faulted. What the recorded VM had mapped, its guest used unseen: a design that maps
smaller than the recorded VM did, or that drops more from stage 2 than was converted, would have taken faults there
which the log does not have. As replayed, the log is the lower bound. For the upper bound whatever the recorded VM had
mapped is touched as soon as the design may lack it: all 4K pages of a large recorded leaf after its fault, and, after
an operation that dropped leaves for a part of them, what the recorded VM kept mapped there. An access to what is
mapped costs nothing.

What the recorded VM had mapped is what its faults mapped (`Lowered.fault_levels`), less what the log's conversions,
holes, zaps and slots took away. A log without levels could have had the largest leaves: the bounds are wide then, and
say so. What was mapped before the log began, or is in lost events, is in no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.machine.statistics import Statistics
from pgemu.trace.lowered import Lowered
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Operation

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine

__all__ = ("Levels", "RecordedBounds", "bounds", "replay_unseen")

Array = np.ndarray[Any, Any]
Bounds = tuple[int, int]
Levels = Literal["accesses", "recorded", "unknown"]
"""Whether the trace has every access, faults with their recorded levels, or faults without."""

_BEYOND = int(W.STATS_COUNTERS) + int(Event.SPTE_PAGES_BEYOND)
_ACCESS = np.uint64(Operation.GUEST_FAULT)
_LEAVES = (
    (Gauge.STAGE2_LEAVES_4K, PAGE_4K),
    (Gauge.STAGE2_LEAVES_2M, PAGE_2M),
    (Gauge.STAGE2_LEAVES_1G, PAGE_1G),
)
_TAKES_AWAY = (
    Operation.CONVERT,
    Operation.PUNCH_HOLE,
    Operation.ZAP,
    Operation.MUNMAP,
    Operation.BIND,
    Operation.UNBIND,
)


@dataclass(frozen=True)
class RecordedBounds:
    """What a log leaves open about one design; each pair is as replayed, and with what the guest used unseen.

    Attributes:
        levels: what the trace tells; "unknown" makes the bounds wide, "accesses" makes them equal
        faults: guest faults
        mapped: bytes that stage 2 maps at the end, the smaller end first
        mapped_at: the same by size of the leaf (4096, ...), as replayed first
        beyond: bytes that conversions dropped from stage 2 beyond the converted range
        unseen: accesses that were added for the second end; most of them find their page mapped
        upper: what the machine counted with them
    """

    levels: Levels
    faults: Bounds
    mapped: Bounds
    mapped_at: Mapping[int, Bounds]
    beyond: Bounds
    unseen: int
    upper: Statistics


def bounds(
    lowered: Lowered,
    replayed: Statistics,
    boot: Callable[[], Machine],
    progress: Callable[[int], None] | None = None,
) -> RecordedBounds:
    """Bound what a design would have taken on a recorded VM.

    :param replayed: of the machine that ran the trace as it is, before its inode was closed
    :param boot: makes a machine such as that one was before the first record
    :param progress: called with the records that have run
    """
    levels: Levels = "accesses" if lowered.accesses else "unknown" if lowered.fault_levels is None else "recorded"
    upper, unseen = replayed, 0
    if levels != "accesses":
        upper, unseen = replay_unseen(lowered, boot(), progress)
    both = (replayed, upper)
    at = {size: (replayed.gauge(gauge) * size, upper.gauge(gauge) * size) for gauge, size in _LEAVES}
    low, high = sorted(sum(pair[end] for pair in at.values()) for end in (0, 1))
    faults, more = (statistics.event(Event.GUEST_FAULT, Operation.GUEST_FAULT) for statistics in both)
    dropped, more_dropped = (
        statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) * PAGE_4K for statistics in both
    )
    return RecordedBounds(
        levels,
        (faults, max(faults, more)),
        (low, high),
        MappingProxyType(at),
        (dropped, max(dropped, more_dropped)),
        unseen,
        upper,
    )


def replay_unseen(
    lowered: Lowered, machine: Machine, progress: Callable[[int], None] | None = None
) -> tuple[Statistics, int]:
    """Run a trace on a fresh machine, with accesses to whatever the recorded VM had mapped and the machine may lack.

    Returns what the machine counted, and how many accesses were added.
    """
    recording = _Recording(lowered, rounded=bool(machine.register(W.R_ZAP_ROUNDED)))
    records = lowered.records
    header, object_ = records.header(), records.object.astype(np.uint64)
    columns = (header, object_, records.address, records.offset, records.length)
    stats = machine.arrays.stats
    done = unseen = 0

    def run(end: int) -> None:
        nonlocal done
        machine.run_columns(*(column[done:end] for column in columns), count=end - done)
        recording.small_faults(end)
        done = end

    for stop in recording.stops():
        counter = _BEYOND + stop.op * W.EVENTS
        before = int(stats[counter])
        run(stop.record + 1)
        for gpas in recording.after(stop, int(stats[counter]) - before):
            machine.run_columns(_ACCESS, 0, gpas, count=len(gpas))
            unseen += len(gpas)
        if progress:
            progress(done)
    run(len(records))
    return machine.statistics, unseen


class _Stop(NamedTuple):
    """A record after which something may have to be touched."""

    record: int
    op: int
    address: int
    offset: int
    length: int
    level: int


@dataclass
class _Slot:
    """A memory slot, and at which level the recorded VM had each page mapped: uint8[pages], 0 for not."""

    gpa: int
    offset: int
    size: int
    level: Array = field(init=False)

    def __post_init__(self) -> None:
        self.level = np.zeros(self.size // PAGE_4K, np.uint8)

    def leaf(self, page: int, level: int) -> tuple[int, int]:
        """First page and end of the leaf of a level over a page, as far as the slot reaches."""
        pages = 1 << 9 * (level - 1)
        first = self.gpa // PAGE_4K
        start = (first + page) // pages * pages - first
        return max(start, 0), min(start + pages, len(self.level))

    def drop(self, start: int, end: int) -> None:
        """Pages [start, end) are unmapped: leaves that reach into them go whole."""
        for page in (start, end - 1):
            level = int(self.level[page])
            if level > 1:
                low, high = self.leaf(page, level)
                self.level[low:high] = 0
        self.level[start:end] = 0

    def mapped(self, start: int, end: int) -> Array:
        """uint64[n]: guest addresses of pages [start, end) that are mapped."""
        pages = np.flatnonzero(self.level[start:end]) + start
        return np.asarray(self.gpa + pages * PAGE_4K, np.uint64)


class _Recording:
    """What the recorded VM had mapped, from record to record."""

    def __init__(self, lowered: Lowered, *, rounded: bool) -> None:
        self._lowered = lowered
        self._rounded = rounded  # what is dropped beyond a range lies in its huge pages
        self._records = lowered.records
        self._faults = lowered.records.op == Operation.GUEST_FAULT
        largest = {PAGE_4K: 1, PAGE_2M: 2, PAGE_1G: 3}[lowered.layout.page_size]
        known = lowered.fault_levels
        # Where levels are not known, a leaf could be as large as any of the design's.
        self._levels: Array = np.where(self._faults, np.uint8(largest), np.uint8(0)) if known is None else known
        self._small = np.flatnonzero(self._faults & (self._levels == 1))
        self._seen = 0  # of these
        self._slots: dict[int, _Slot] = {}

    def stops(self) -> Iterator[_Stop]:
        """Large leaves, and what takes memory away."""
        large = self._faults & (self._levels > 1)
        takes = np.isin(self._records.op, [int(op) for op in _TAKES_AWAY])
        chosen = np.flatnonzero(large | takes)
        columns = (self._records.op, self._records.address, self._records.offset, self._records.length, self._levels)
        yield from map(_Stop, chosen.tolist(), *(column[chosen].tolist() for column in columns))

    def small_faults(self, end: int) -> None:
        """The faults of records below `end`, from where the last call ended, mapped 4K pages."""
        begin = self._seen
        if begin < len(self._small) and self._small[begin] < end:
            self._seen = int(np.searchsorted(self._small, end))
        if begin == self._seen:
            return
        address = self._records.address[self._small[begin : self._seen]]
        for slot in self._slots.values():
            inside = address[(address >= slot.gpa) & (address < slot.gpa + slot.size)]
            slot.level[(inside - np.uint64(slot.gpa)) >> np.uint64(12)] = 1

    def after(self, stop: _Stop, beyond: int) -> list[Array]:
        """What to touch after a record, `beyond` pages having been dropped beyond its range: uint64[n] each."""
        if stop.op == Operation.GUEST_FAULT:
            return self._fault(stop.address, stop.level)
        if stop.op == Operation.BIND:
            self._slots[stop.address] = _Slot(stop.address, stop.offset, stop.length)
            return []
        if stop.op == Operation.UNBIND:
            self._slots.pop(stop.address, None)
            if self._lowered.init == "shared":  # kvm_mmu_zap_all_fast(): all of the VM's leaves go
                for slot in self._slots.values():
                    slot.level[:] = 0
            return []
        return self._taken_away(stop, beyond)

    def _fault(self, address: int, level: int) -> list[Array]:
        """A recorded leaf of a level: its pages, but those that were mapped already."""
        for slot in self._slots.values():
            if slot.gpa <= address < slot.gpa + slot.size:
                low, high = slot.leaf((address - slot.gpa) // PAGE_4K, level)
                fresh = np.flatnonzero(slot.level[low:high] == 0) + low
                slot.level[low:high] = level
                return [np.asarray(slot.gpa + fresh * PAGE_4K, np.uint64)] if len(fresh) else []
        return []

    def _taken_away(self, stop: _Stop, beyond: int) -> list[Array]:
        """A range of the inode left stage 2: what was mapped around it, if the machine dropped some of that, too."""
        found = []
        for start, end in self._offsets(stop):
            for slot in self._slots.values():
                low = (max(start, slot.offset) - slot.offset) // PAGE_4K
                high = (min(end, slot.offset + slot.size) - slot.offset) // PAGE_4K
                if low >= high:
                    continue
                slot.drop(low, high)
                if beyond:  # of at most two leaves, 2M ones or larger
                    level = 2 if beyond < 2 << 9 and not self._rounded else 3
                    around = slot.mapped(slot.leaf(low, level)[0], slot.leaf(high - 1, level)[1])
                    found += [around] if len(around) else []
        return found

    def _offsets(self, stop: _Stop) -> Iterator[tuple[int, int]]:
        """The ranges of the inode that a record takes away, in bytes."""
        if stop.op in (Operation.CONVERT, Operation.PUNCH_HOLE):
            yield stop.offset, stop.offset + stop.length
            return
        for region in self._lowered.layout.regions:
            low, high = max(stop.address, region.address), min(stop.address + stop.length, region.end)
            if low < high:
                yield low - region.address + region.offset, high - region.address + region.offset
