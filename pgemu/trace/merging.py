"""Several traces as one, of VMs and processes that have nothing in common but the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.lowered import Accounting, Guest, Lowered
from pgemu.trace.schema import COLUMNS, DTYPES, Records
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("merge", "merge_accesses")

_NUMBERED = {
    "VM": "vm",
    "process": "process",
    "parent": "process",
    "IOMMU domain": "domain",
    "inode": "inode",
    "pin": "pin",
    "mapping": "mapping",
    "device": "device",
    "guest process": "guest process",
}
"""What is numbered by the trace, by how the meaning of a column begins; other numbers are the machine's own."""


_MEANINGS = {int(op): means for op, means in COLUMNS.items()}


def _kind_of(meaning: str) -> str | None:
    return next((kind for begin, kind in _NUMBERED.items() if meaning.startswith(begin)), None)


def merge(traces: Sequence[Lowered], *, from_zero: bool = False) -> Lowered:
    """One trace of all records by time, those of equal time in the order of the traces.

    VMs, processes, inodes, IOMMU domains, pins and devices of each trace are numbered behind those of the ones before.

    :param from_zero: each trace's time counts from its first record; else it stays, which is right for one clock
    :raises InputError: fewer than two, traces of VMs among those of processes, or numbers that no column holds
    """
    if len(traces) < 2:
        raise InputError("expected two traces or more to merge")
    first = traces[0]
    for one in traces[1:]:
        if one.kind != first.kind:
            raise InputError(
                f"memory of a {one.kind}, expected that of a {first.kind} as of {first.source}", one.source
            )
        if one.layout.page_size != first.layout.page_size:
            pages = f"{one.layout.page_size} bytes, expected {first.layout.page_size} as of {first.source}"
            raise InputError(f"its guest memory is in pages of {pages} (--page-size)", one.source)
        if dict(one.machine) != dict(first.machine):
            raise InputError(
                f"its machine is {dict(one.machine)}, expected {dict(first.machine)} as of {first.source}", one.source
            )
    behind: Counter[str] = Counter()
    setups, rest, guests = [], [], list[Guest]()
    for one in traces:
        records, behind = _renumbered(one, behind)
        if from_zero and len(records):
            records = replace(records, time=records.time - records.time.min())
        setup = one.accounting.setup
        setups.append(records[:setup])
        rest.append(records[setup:])
        guests.extend(one.guests or ((Guest(one.layout, one.init),) if one.kind == "guest" else ()))
    joined = Records.concatenate(rest)
    ahead, joined = Records.concatenate(setups), joined.take(np.argsort(joined.time, kind="stable"))
    if len(ahead) and len(joined):
        ahead.time[:] = joined.time[0]
    accounting = Accounting.added(one.accounting for one in traces)
    notes = tuple(f"{one.source}: {note}" for one in traces for note in one.notes)
    return Lowered(
        Records.concatenate([ahead, joined]),
        first.layout,
        "private" if any(guest.init == "private" for guest in guests) else first.init,
        any(one.converts for one in traces),
        accounting,
        " + ".join(one.source for one in traces),
        accesses=all(one.accesses for one in traces),
        machine=first.machine,
        notes=notes,
        doubts=tuple(doubt for one in traces for doubt in one.doubts),
        kind=first.kind,
        guests=tuple(guests),
        processes=sum(one.processes for one in traces),
        files=tuple(file for one in traces for file in one.files),
    )


def _renumbered(lowered: Lowered, behind: Counter[str]) -> tuple[Records, Counter[str]]:
    """A trace's records with numbers behind those of the traces before, and how many there are with it."""
    records = lowered.records
    columns: dict[str, Any] = {}
    made = {"vm": 1, "process": 1, "inode": 1}
    if lowered.kind == "process":
        made = {"process": lowered.processes, "inode": len(lowered.files)}
    most: Counter[str] = Counter(made)
    for column in ("vm", "space", "object"):
        found = getattr(records, column).astype(np.uint64)
        for op in np.unique(records.op).tolist():
            kind = _kind_of(_MEANINGS[op].get(column, ""))
            rows = np.flatnonzero(records.op == op)
            if column == "object" and kind == "inode":
                rows = rows[records.object[rows] != NO_INODE]
            if kind is None or not rows.size:
                continue
            most[kind] = max(most[kind], int(found[rows].max()) + 1)
            found[rows] += np.uint64(behind[kind])
        if found.size and int(found.max()) > np.iinfo(DTYPES[column]).max:
            raise InputError(f"column {column!r} of the merged trace holds {int(found.max())}", lowered.source)
        columns[column] = found.astype(DTYPES[column])
    return replace(records, **columns), behind + most


def merge_accesses(streams: Sequence[AccessStream], *, from_zero: bool = False) -> AccessStream:
    """Streams of several programs as one, by time, in bounded memory; each one's processes are numbered behind those of
    the ones before, which a stream has one of (InputError: more).

    :param from_zero: as of merge()
    """
    if len(streams) < 2:
        raise InputError("expected two traces or more to merge")
    tally = Tally()
    title = " + ".join(dict.fromkeys(one.format for one in streams))
    merged = _told(_by_time(streams, from_zero), streams, tally)
    return AccessStream.of(" + ".join(one.source for one in streams), title, merged, tally)


def _told(batches: Iterator[Records], streams: Sequence[AccessStream], tally: Tally) -> Iterator[Records]:
    """The batches, and behind the last one what each stream had beside them."""
    yield from batches
    tally.threads = sum(one.tally.threads for one in streams)
    for one in streams:
        tally.inputs += one.tally.inputs
        tally.ignored += one.tally.ignored
        tally.crossing += one.tally.crossing
        tally.rejected += one.tally.rejected
        tally.first_rejected += [(number, f"{one.source}: {text}") for number, text in one.tally.first_rejected]
        tally.notes += [f"{one.source}: {note}" for note in one.tally.notes]


def _by_time(streams: Sequence[AccessStream], from_zero: bool) -> Iterator[Records]:
    """Batches by time: up to the earliest of the last times that the streams' waiting batches have."""
    waiting = [_shifted(one, number, from_zero) for number, one in enumerate(streams)]
    heads: list[Records | None] = [next(one, None) for one in waiting]
    while any(head is not None for head in heads):
        until = min(int(head.time[-1]) for head in heads if head is not None)
        pieces = []
        for number, head in enumerate(heads):
            if head is None:
                continue
            head = _through(head, waiting[number], until)
            count = int(np.searchsorted(head.time, np.uint64(until), side="right"))
            pieces.append(head[:count])
            heads[number] = head[count:] if count < len(head) else next(waiting[number], None)
        joined = Records.concatenate(pieces)
        yield joined.take(np.argsort(joined.time, kind="stable"))


def _through(head: Records, more: Iterator[Records], until: int) -> Records:
    """A batch with those behind it, until none that follows is of time `until`."""
    pieces = [head]
    while int(pieces[-1].time[-1]) == until and (following := next(more, None)) is not None:
        pieces.append(following)
    return Records.concatenate(pieces) if len(pieces) > 1 else head


def _shifted(stream: AccessStream, number: int, from_zero: bool) -> Iterator[Records]:
    """A stream's batches with the process that it is, and its time."""
    began: int | None = None
    for records in stream.batches:
        if records.space.any():
            raise InputError("several processes, expected one to merge", stream.source)
        if began is None:
            began = int(records.time[0]) if from_zero else 0
        space = np.full(len(records), number, DTYPES["space"])
        yield replace(records, space=space, time=records.time - np.uint64(began))
