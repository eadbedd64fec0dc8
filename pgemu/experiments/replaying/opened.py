"""Where a replay's records come from: a stored trace batch by batch, or any other one, which is held in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.experiments.setting_up import Named
from pgemu.trace import load, require_input
from pgemu.trace.devices import OF_DEVICES
from pgemu.trace.lowering import adapt
from pgemu.trace.readers.parquet import glance, iterate, narrow, sniff
from pgemu.trace.schema import DTYPES, Records
from pgemu.trace.source import Match
from pgemu_kernels.words.operations import Operation
from pgemu_kernels.words.rows import INODES, NO_INODE, SPACES, VMS

if TYPE_CHECKING:
    from pgemu.trace.lowered import Lowered, LoweringOptions

__all__ = ("BATCH", "OpenTrace", "Stage", "Survey", "columns_meaning", "open_trace")

BATCH = 1 << 17
"""Records that are decoded at a time."""
_SURVEYED = ("op", "vm", "space", "object")

Stage = Callable[[Records], Records]
"""What makes of a batch the records that run, in order and with what it remembers of the batches before: guests'
virtual accesses become faults by it."""


@dataclass(frozen=True)
class Survey:
    """What the records of a trace are of.

    Attributes:
        counts: int64[256], records by operation
        named: the processes, VMs and inodes that have to be there before the first record: as many as records name by
            their numbers; of a trace that forks the processes of its VMs
        anonymous: mappings of anonymous memory
    """

    counts: np.ndarray[Any, Any]
    named: Named
    anonymous: int = 0

    def count(self, *operations: Operation) -> int:
        """How many records of these kinds."""
        return int(sum(self.counts[op] for op in operations))


@dataclass(frozen=True)
class OpenTrace:
    """A trace that is to be replayed.

    Attributes:
        lowered: the trace; of one that is read batch by batch without its records
        count: how many records it has
        survey: what they are of
        identity: a digest, by which a run that is resumed knows the trace again
        path: of the file that is read batch by batch, None where `lowered` has the records
    """

    lowered: Lowered
    count: int
    survey: Survey
    identity: str
    path: str | None = None

    def batches(self, first: int = 0, stages: Sequence[Stage] = (), size: int = BATCH) -> Iterator[Records]:
        """Yield the records as they run, from number `first` on.

        With stages all of the trace goes through them, and what they made of the records before is left out.
        """
        skipped = 0 if stages else first
        done = skipped
        for decoded in self._decoded(skipped, size):
            records = decoded
            for stage in stages:
                records = stage(records)
            left_out = min(max(first - done, 0), len(records))
            done += len(records)
            if left_out < len(records):
                yield records[left_out:]

    def _decoded(self, first: int, size: int) -> Iterator[Records]:
        if self.path is not None:
            yield from iterate(self.path, size, first)
            return
        for begin in range(first, len(self.lowered.records), size):
            yield self.lowered.records[begin : begin + size]

    def columns(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Columns op, vm, space and object of all records, in batches, as they are before any stage."""
        if self.path is not None:
            yield from narrow(self.path, _SURVEYED)
            return
        yield {column: getattr(self.lowered.records, column) for column in _SURVEYED}

    def with_records(self, lowered: Lowered) -> OpenTrace:
        """The same of a trace in memory whose records were changed."""
        return in_memory(lowered) if lowered is not self.lowered else self


def open_trace(
    name: str,
    options: LoweringOptions,
    seed: int = 0,
    parameters: Mapping[str, float] | None = None,
    input_format: str | None = None,
) -> OpenTrace:
    """Open a trace: what pgemu stored as Parquet stays in its file, unless it has devices.

    :raises InputError: as pgemu.trace.load
    """
    if not parameters and input_format in (None, "parquet") and _is_parquet(name):
        found = glance(name)
        if found is not None:
            survey = _survey(narrow(name, _SURVEYED))
            lowered = replace(adapt(found.lowered, options), converts=survey.count(Operation.CONVERT) > 0, table=True)
            if lowered.kind == "guest" and not survey.count(*OF_DEVICES):
                return OpenTrace(lowered, found.records, survey, found.fingerprint, name)
    lowered = load(name, options, seed, input_format, **(parameters or {}))
    if lowered.kind == "guest" and not lowered.guests:
        require_input(lowered)
    return in_memory(lowered)


def in_memory(lowered: Lowered) -> OpenTrace:
    """A trace that is loaded already."""
    records = lowered.records
    found = hashlib.sha256()
    for column in DTYPES:
        found.update(np.ascontiguousarray(getattr(records, column)).data)
    columns = {column: getattr(records, column) for column in _SURVEYED}
    return OpenTrace(lowered, len(records), _survey([columns]), found.hexdigest()[:32])


def _is_parquet(name: str) -> bool:
    if not Path(name).is_file():
        return False
    with open(name, "rb") as file:
        return sniff(file.read(8)) is Match.SURE


# --------------------------------------------------------------------------- what records name


def columns_meaning(what: str) -> dict[str, frozenset[Operation]]:
    """Which operations have the number of a "process", "VM" or "inode" in which column; none of devices."""
    found: dict[str, set[Operation]] = {}
    for op in set(Operation).difference(OF_DEVICES):
        for column, meaning in op.columns.items():
            if column in DTYPES and _means(meaning, what):
                found.setdefault(column, set()).add(op)
    return {column: frozenset(operations) for column, operations in found.items()}


def _means(meaning: str, what: str) -> bool:
    first, _, more = re.split("[,;]", meaning)[0].partition(" ")
    return more != "of a device" and (first == what or (what == "process" and first == "parent"))


_LIMITS = {"process": SPACES, "VM": VMS, "inode": INODES}


def _survey(pieces: Any) -> Survey:
    counts = np.zeros(256, np.int64)
    most = dict.fromkeys(_LIMITS, 0)
    anonymous = 0
    reading = {
        what: [(column, _flags(operations)) for column, operations in columns_meaning(what).items()] for what in _LIMITS
    }
    for columns in pieces:
        op = columns["op"]
        counts += np.bincount(op, minlength=256)
        anonymous += int(((op == Operation.MMAP) & (columns["object"] == NO_INODE)).sum())
        for what, limit in _LIMITS.items():
            for column, flags in reading[what]:
                values = columns[column]
                if not values.any():
                    continue
                named = values[flags[op] & (values < limit)]
                most[what] = max(most[what], int(named.max(initial=0)))
    vms = most["VM"] + 1
    forks = counts[Operation.FORK] > 0
    return Survey(counts, Named(vms if forks else max(vms, most["process"] + 1), vms, most["inode"] + 1), anonymous)


def _flags(operations: frozenset[Operation]) -> np.ndarray[Any, Any]:
    flags = np.zeros(256, bool)
    flags[[int(op) for op in operations]] = True
    return flags
