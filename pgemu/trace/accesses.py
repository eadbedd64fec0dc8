"""Accesses of a program as a recording of addresses holds them: a stream, of which a batch at a time is in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.schema import DTYPES, Flag, Operation, Records
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("EXEC", "NO_TIMES", "READ", "THREADS", "WRITE", "AccessStream", "Actors", "Tally", "accesses")

THREADS = 256
"""Threads of a program are actors below this: the vCPUs that they run on."""

NO_TIMES = "assumed, it has no times: an access's time is its number, in nanoseconds"
"""A note of what has its accesses in order and nothing else."""

_MOST_SHOWN = 3
_LONGEST = 80
_LAST_PAGE = np.uint64((1 << 64) - PAGE_4K)
_LEAST_CONSTANT = 1 << 16
_MANY_REJECTED = 100_000
_MOST_THREADS = 1 << 16


@dataclass
class Tally:
    """What a stream held so far, complete once its last batch was taken.

    Attributes:
        records: accesses, those that cross a page's end counted twice
        inputs: accesses of the recording by kind: "read", "write", "modify", "fetch"
        crossing: accesses that reach into a second page
        ignored: what of the format is no access, by name
        rejected: lines or records that are not understood
        first_rejected: the first of them: number of line or record, and what stands there
        threads: how many there are
        notes: what was taken to mean something, in words
    """

    records: int = 0
    inputs: Counter[str] = field(default_factory=Counter)
    crossing: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    first_rejected: list[tuple[int, str]] = field(default_factory=list)
    threads: int = 1
    notes: list[str] = field(default_factory=list)

    def reject(self, number: int, what: str, count: int = 1) -> None:
        """Count what is not understood; the first ones are kept to be shown."""
        self.rejected += count
        if len(self.first_rejected) < _MOST_SHOWN:
            self.first_rejected.append((number, what[:_LONGEST]))

    def refuse_foreign(self, source: str, unit: str, understood: int, expected: str, *, at_end: bool = False) -> None:
        """Refuse a file of which more is rejected than understood: at its end, or once that is many.

        :param unit: what is counted, "line" or "record"
        :raises InputError: with the first of what was rejected
        """
        if at_end and not understood and not self.rejected:
            raise InputError(f"no access in it, expected {expected}", source)
        if at_end or self.rejected > _MANY_REJECTED:
            self.refuse_mostly_foreign(source, unit, understood, expected)

    def refuse_mostly_foreign(self, source: str, unit: str, understood: int, expected: str) -> None:
        """The same of what was read so far, however little that is; with no access it need not be wrong."""
        if self.rejected <= understood:
            return
        number, what = self.first_rejected[0]
        many = f"{self.rejected:,} of {self.rejected + understood:,} {unit}s are not understood"
        raise InputError(f"{many}, the first is {unit} {number:,}: {what!r}, expected {expected}", source)


@dataclass(eq=False)
class AccessStream:
    """A recording of addresses.

    Attributes:
        source: name of the file
        format: what it is, as "Lackey text"
        batches: records of GUEST_ACCESS in their order, taken once; InputError, with line or record, where they cannot
            be read on
        tally: of what was taken so far
        v2p: uint64[n, 3], first virtual and first physical address and bytes of each translation that was recorded,
            by virtual address, those in the recording itself once its last batch was taken; None where none was
        close: of a stream of which nothing is taken; the last batch closes the file, too
    """

    source: str
    format: str
    batches: Iterator[Records]
    tally: Tally
    v2p: npt.NDArray[np.uint64] | None = None
    close: Callable[[], None] = lambda: None

    @classmethod
    def of(
        cls,
        source: str,
        format: str,
        batches: Iterable[Records],
        tally: Tally,
        v2p: npt.NDArray[np.uint64] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> AccessStream:
        """A stream whose records are counted as they are taken."""

        def counted() -> Iterator[Records]:
            for records in batches:
                tally.records += len(records)
                if len(records):
                    yield records

        return cls(source, format, counted(), tally, v2p, close)


def accesses(
    address: npt.NDArray[np.uint64],
    size: npt.NDArray[np.uint64] | None,
    flags: npt.NDArray[np.uint8],
    actor: npt.NDArray[np.uint16] | int,
    time: npt.NDArray[np.uint64],
    tally: Tally,
) -> Records:
    """Records of accesses: one for each, a second one, on the next page, for what crosses a page's end.

    :param address: uint64[n], of the first byte
    :param size: uint64[n], bytes; 0 counts as 1, more than a page is cut at two pages and counted as ignored; None:
        the recording has none, each is in the page of its first byte
    :param flags: uint8[n], WRITE, EXEC, or none
    :param actor: uint16[n], the thread
    :param time: uint64[n], as good as the recording has it: its own, or the number of the access
    """
    if size is None:
        return _records(address, flags, actor, time)
    page = np.uint64(PAGE_4K)
    end = (address & (page - np.uint64(1))) + size  # seen from the beginning of its page
    crossing = np.flatnonzero(end > page)
    if crossing.size:  # an access does not wrap around the end of the address space
        crossing = crossing[address[crossing] < _LAST_PAGE]
    if not crossing.size:
        return _records(address, flags, actor, time)
    beyond = int(np.count_nonzero(end[crossing] > page + page))
    if beyond:
        tally.ignored["pages of accesses beyond the second"] += beyond
    tally.crossing += crossing.size
    second = crossing + np.arange(1, crossing.size + 1)
    before = np.zeros(len(address) + crossing.size, np.intp)  # of each record: how many are a second one
    before[second] = 1
    order = np.arange(len(before)) - np.cumsum(before)
    where = address[order]
    where[second] = (where[second] | (page - np.uint64(1))) + np.uint64(1)
    actors = actor if isinstance(actor, int) else actor[order]
    return _records(where, flags[order], actors, time[order])


def _records(
    address: npt.NDArray[np.uint64],
    flags: npt.NDArray[np.uint8],
    actor: npt.NDArray[np.uint16] | int,
    time: npt.NDArray[np.uint64],
) -> Records:
    """Records.build() for these columns; the others are views of what is never written."""
    count = len(address)
    others = {name: _constant(name, 0, count) for name in ("vm", "space", "object", "offset", "length")}
    op = _constant("op", int(Operation.GUEST_ACCESS), count)
    actors = _constant("actor", actor, count) if isinstance(actor, int) else actor
    return Records(time=time, op=op, flags=flags, actor=actors, address=address, **others)


def _constant(column: str, value: int, count: int) -> npt.NDArray[Any]:
    """A column of one value, read-only."""
    size = max(1 << (count - 1).bit_length(), _LEAST_CONSTANT) if count else _LEAST_CONSTANT
    return _constants(column, value, size)[:count]


@lru_cache(maxsize=64)
def _constants(column: str, value: int, size: int) -> npt.NDArray[Any]:
    found = np.full(size, value, DTYPES[column])
    found.flags.writeable = False
    return found


class Actors:
    """Actors of a recording's threads, by the order in which they appear.

    :param tally: is told how many there are
    :param source: name of the file
    """

    def __init__(self, tally: Tally, source: str) -> None:
        self._tally, self._source = tally, source
        self._known: dict[int, int] = {}

    def of(self, threads: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
        """uint16[n]: the actor of each thread's number; those past the first THREADS share actors, which is noted.

        :raises InputError: more than _MOST_THREADS of them
        """
        numbers, first, places = np.unique(threads, return_index=True, return_inverse=True)
        for number in numbers[np.argsort(first)].tolist():
            self._known.setdefault(number, len(self._known))
        if len(self._known) > _MOST_THREADS:
            raise InputError(f"more than {_MOST_THREADS:,} threads", self._source)
        if len(self._known) > THREADS >= self._tally.threads:
            self._tally.notes.append(f"it has more than {THREADS} threads, of which some are taken to be one")
        self._tally.threads = max(len(self._known), 1)
        actors = np.array([self._known[number] % THREADS for number in numbers.tolist()], np.uint16)
        found: npt.NDArray[np.uint16] = actors[places.reshape(-1)]
        return found


WRITE, EXEC, READ = np.uint8(int(Flag.WRITE)), np.uint8(int(Flag.EXEC)), np.uint8(0)
"""Flags of an access by what it does."""
