"""A guest program's accesses as host physical addresses of one design, and the lines of simulators of DRAM.

Formats: "ramulator2", its LoadStoreTrace (src/ramulator/frontend/impl/memory_trace/loadstore_trace.cpp:init_trace():
"LD 0x12340", "ST 0x1000"), and "ramulator", the memory trace of Ramulator 1 (README, "Memory Trace Driven":
"0x12345680 R", "0x4cbd56c0 W").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from pgemu.guest.program import GuestBatch, GuestProgram
from pgemu.guest.run import DesignRun
from pgemu.guest.tlb import Tlb
from pgemu.machine.config import Config
from pgemu.tables.translation import Translation, WalkStatus, translate
from pgemu.trace.schema import Flag, Operation
from pgemu_kernels import words as W

__all__ = ("LINES", "PhysicalRun", "Reference", "lines")

Array = np.ndarray[Any, Any]
Reference = Literal["ramulator2", "ramulator"]
LINES: dict[str, tuple[str, str]] = {
    "ramulator2": ("LD {:#x}\n", "ST {:#x}\n"),
    "ramulator": ("{:#x} R\n", "{:#x} W\n"),
}
"""By format the lines of a read and of a write."""

# Operations that give pages and take none: accesses before and after them find the same physical addresses.
_TOUCHES = (int(Operation.GUEST_FAULT), int(Operation.HOST_FAULT))


class _References(NamedTuple):
    """Physical addresses, each with whether it is written, in the order in which they come."""

    address: Array  # uint64[n]
    write: Array  # bool[n]


class PhysicalRun(DesignRun):
    """A machine of one design that runs a guest's program and tells the physical address of each access.

    Attributes:
        counts: "accesses" that have a physical address, "references" of their walks to entries of tables, "without
            translation": accesses (and entries of the guest's tables) that the design's stage 2 does not map
    """

    def __init__(self, config: Config, program: GuestProgram) -> None:
        super().__init__(config, program, Tlb())
        self.counts: Counter[str] = Counter()

    # ------------------------------------------------------------------ accesses

    def addresses(self, batch: GuestBatch, *, walks: bool = False) -> Iterator[tuple[Array, Array]]:
        """Run a batch's operations, and yield (uint64[n] physical addresses, bool[n] whether it is a write) in order.

        walks: before each access the entries that a nested walk of it reads, from the top table on: for each of the
        guest's tables those of stage 2, then the guest's entry, at last those of stage 2 for the page. Every access
        walks: there is no TLB.
        """
        done = 0
        for first, last in pairwise(self._stops(batch, every=walks)):
            upto = int(np.searchsorted(batch.at, np.uint64(last), "left"))
            self._run(batch, done, upto)
            done = upto
            found = self._walk(batch, slice(first, last)) if walks else self._final(batch, slice(first, last))
            yield found.address, found.write
        self._run(batch, done, len(batch.records))

    def _run(self, batch: GuestBatch, first: int, end: int) -> None:
        if first < end:
            records = batch.records[first:end]
            self._note(records, self.machine.run(records).status)

    @staticmethod
    def _stops(batch: GuestBatch, *, every: bool) -> list[int]:
        """Where accesses are cut: at every operation, or at those that are no touch, before which others may run."""
        count = len(batch.accesses)
        is_touch = np.isin(batch.records.op, np.array(_TOUCHES, np.uint8))
        inside = np.unique(batch.at if every else batch.at[~is_touch])
        return [0, *inside[(inside > 0) & (inside < count)].tolist(), count] if count else [0]

    def stage2(self, gpas: Array, *, references: bool = False) -> Translation:
        """Translate guest physical addresses (uint64[n]) by what the design maps: of a VM with two trees by
        that of private memory, then by the other.

        Nothing is checked, and no accessed bit is set.
        """
        row = self.machine.register(W.R_STAGE2_FORMAT)
        found = translate(self.machine, row, self.vm.private_root, gpas, references=references)
        if self.vm.private_root == self.vm.root or (found.status == WalkStatus.OK).all():
            return found
        other = translate(self.machine, row, self.vm.root, gpas, references=references)
        mine = found.status != WalkStatus.OK
        for name in ("physical", "status", "level", "error"):
            getattr(found, name)[mine] = getattr(other, name)[mine]
        return found if not references else found._replace(references=other.references if mine.all() else found[4])

    def _final(self, batch: GuestBatch, piece: slice) -> _References:
        found = self.stage2(batch.physical[piece])
        return self._kept(found, batch.accesses.flags[piece])

    def _kept(self, found: Translation, flags: Array) -> _References:
        is_there = found.status == WalkStatus.OK
        self.counts["accesses"] += int(is_there.sum())
        self.counts["without translation"] += int((~is_there).sum())
        write = flags & np.uint8(Flag.WRITE) != 0
        return _References(found.physical[is_there], write[is_there])

    # ------------------------------------------------------------------ walks

    def _walk(self, batch: GuestBatch, piece: slice) -> _References:
        """Each access with the entries that its walk reads."""
        accesses, memory = batch.accesses[piece], self.program.memory
        count = len(accesses)
        columns: list[Array] = []  # uint64[n, k], 0: none
        guest = np.zeros((count, 0), np.uint64)
        for space in np.unique(accesses.space).tolist():
            mine = np.flatnonzero(accesses.space == space)
            walked = memory.tables[space].translate(accesses.address[mine], references=True).references
            assert walked is not None
            reads = walked.reads
            if reads.shape[1] > guest.shape[1]:
                guest = np.pad(guest, ((0, 0), (0, reads.shape[1] - guest.shape[1])))
            guest[mine, : reads.shape[1]] = reads
        for entries in guest.T:
            there = np.flatnonzero(entries)
            columns.append(self._nested(entries, there))
        everything = np.arange(count)
        columns.append(self._nested(batch.physical[piece], everything, accesses.flags, counted=True))
        addresses = np.concatenate(columns, axis=1)
        write = np.zeros(addresses.shape, np.bool_)
        write[:, -1] = accesses.flags & np.uint8(Flag.WRITE) != 0
        some = addresses != 0
        self.counts["references"] += int(some[:, :-1].sum())
        return _References(addresses[some], write[some])

    def _nested(self, gpas: Array, rows: Array, flags: Array | None = None, *, counted: bool = False) -> Array:
        """uint64[n, k]: of each of `rows` the entries of stage 2 that are read for its address, and where that lies."""
        found = self.stage2(gpas[rows], references=True)
        assert found.references is not None
        reads = found.references.reads
        table = np.zeros((gpas.size, reads.shape[1] + 1), np.uint64)
        table[rows, :-1] = reads
        is_there = found.status == WalkStatus.OK
        table[rows, -1] = np.where(is_there, found.physical, np.uint64(0))
        if counted:
            self.counts["accesses"] += int(is_there.sum())
        self.counts["without translation"] += int((~is_there).sum())
        return table


def lines(form: str, addresses: Array, write: Array) -> str:
    """The lines of a format (a key of LINES) for physical addresses."""
    read, written = (text.format for text in LINES[form])
    return "".join([
        written(address) if is_write else read(address)
        for address, is_write in zip(addresses.tolist(), write.tolist(), strict=True)
    ])  # fmt: skip
