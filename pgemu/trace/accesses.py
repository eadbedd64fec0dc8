"""Accesses of a program as a recording of addresses holds them: a stream, of which a batch at a time is in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.schema import Flag, Operation, Records
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("EXEC", "READ", "THREADS", "WRITE", "AccessStream", "Tally", "accesses")

THREADS = 256
"""Threads of a program are actors below this: the vCPUs that they run on."""

_MOST_SHOWN = 3
_LONGEST = 80
_MANY_REJECTED = 100_000


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

    def refuse_foreign(self, source: str, unit: str, expected: str, *, at_end: bool = False) -> None:
        """Refuse a file of which more is rejected than understood: at its end, or once that is many.

        :param unit: what the numbers count, "line" or "record"
        :raises InputError: with the first of what was rejected
        """
        understood = sum(self.inputs.values())
        if self.rejected <= understood or not (at_end or self.rejected > _MANY_REJECTED):
            if at_end and not understood:
                raise InputError(f"no access in it, expected {expected}", source)
            return
        number, what = self.first_rejected[0]
        many = f"{self.rejected:,} of {self.rejected + understood:,} {unit}s are not understood"
        raise InputError(f"{many}, the first is {unit} {number:,}: {what!r}, expected {expected}", source)


@dataclass(frozen=True)
class AccessStream:
    """A recording of addresses.

    Attributes:
        source: name of the file
        format: what it is, as "Lackey text"
        batches: records of GUEST_ACCESS in their order, taken once; InputError, with line or record, where they cannot
            be read on
        tally: of what was taken so far
        v2p: uint64[n, 3], first virtual and first physical address and bytes of each translation that was recorded,
            by virtual address; None where none was
    """

    source: str
    format: str
    batches: Iterator[Records]
    tally: Tally
    v2p: npt.NDArray[np.uint64] | None = None

    @classmethod
    def of(cls, source: str, format: str, batches: Iterable[Records], tally: Tally) -> AccessStream:
        """A stream whose records are counted as they are taken."""

        def counted() -> Iterator[Records]:
            for records in batches:
                tally.records += len(records)
                if len(records):
                    yield records

        return cls(source, format, counted(), tally)


def accesses(
    address: npt.NDArray[np.uint64],
    size: npt.NDArray[np.uint64],
    flags: npt.NDArray[np.uint8],
    actor: npt.NDArray[np.uint16] | int,
    time: npt.NDArray[np.uint64],
    tally: Tally,
) -> Records:
    """Records of accesses: one for each, a second one, on the next page, for what crosses a page's end.

    :param address: uint64[n], of the first byte
    :param size: uint64[n], bytes; 0 counts as 1, more than a page is cut at two pages and counted as ignored
    :param flags: uint8[n], WRITE, EXEC, or none
    :param actor: uint16[n], the thread
    :param time: uint64[n], as good as the recording has it: its own, or the number of the access
    """
    page = np.uint64(PAGE_4K)
    last = address + np.maximum(size, np.uint64(1)) - np.uint64(1)
    last = np.maximum(last, address)  # an access does not wrap around the end of the address space
    crosses = (address ^ last) >= page
    beyond = int(np.count_nonzero(last // page - address // page > 1))
    if beyond:
        tally.ignored["pages of accesses beyond the second"] += beyond
    several = int(np.count_nonzero(crosses))
    tally.crossing += several
    if not several:
        return Records.build(
            len(address), op=Operation.GUEST_ACCESS, flags=flags, actor=actor, address=address, time=time
        )
    order = np.repeat(np.arange(len(address)), 1 + crosses.astype(np.intp))
    second = np.concatenate([[False], order[1:] == order[:-1]])
    where = address[order]
    where[second] = (where[second] | (page - np.uint64(1))) + np.uint64(1)
    actors = actor if isinstance(actor, int) else actor[order]
    return Records.build(
        len(order), op=Operation.GUEST_ACCESS, flags=flags[order], actor=actors, address=where, time=time[order]
    )


WRITE, EXEC, READ = np.uint8(int(Flag.WRITE)), np.uint8(int(Flag.EXEC)), np.uint8(0)
"""Flags of an access by what it does."""
