"""Several traces as one, of VMs and processes that have nothing in common but the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.lowered import Accounting, Guest, Lowered
from pgemu.trace.schema import COLUMNS, DTYPES, Operation, Records
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("merge",)

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
    accounting = Accounting(
        len(joined), Counter({"record": len(joined)}), operations=len(ahead) + len(joined), setup=len(ahead)
    )
    notes = tuple(f"{one.source}: {note}" for one in traces for note in one.notes)
    return Lowered(
        Records.concatenate([ahead, joined]),
        first.layout,
        first.init,
        any(one.converts for one in traces),
        accounting,
        " + ".join(one.source for one in traces),
        accesses=all(one.accesses for one in traces),
        machine=first.machine,
        notes=notes,
        doubts=tuple(doubt for one in traces for doubt in one.doubts),
        kind=first.kind,
        guests=tuple(guests),
    )


def _renumbered(lowered: Lowered, behind: Counter[str]) -> tuple[Records, Counter[str]]:
    """A trace's records with numbers behind those of the traces before, and how many there are with it."""
    records = lowered.records
    columns: dict[str, npt.NDArray[np.generic]] = {}
    most: Counter[str] = Counter({kind: 1 for kind in ("vm", "process", "inode")} if lowered.kind == "guest" else {})
    for column in ("vm", "space", "object"):
        found = getattr(records, column).astype(np.uint64)
        for op in np.unique(records.op).tolist():
            kind = _kind_of(COLUMNS[Operation(op)].get(column, ""))
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
