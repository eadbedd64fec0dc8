"""What a trace holds, as plain dicts: for people who look at one before they run it."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.accesses import AccessStream
from pgemu.trace.lowered import Lowered
from pgemu.trace.processes import SeveralVmsError
from pgemu.trace.schema import DTYPES, Flag, Operation, Records

__all__ = ("about_accesses", "about_records", "about_several", "first_records", "name_of")

_TITLES = {int(op): op.name.lower().replace("_", " ") for op in Operation}
_BY_CODE = {int(op): op for op in Operation}
_GAP = 1 << 30  # bytes between two ranges of addresses that are told apart


def about_records(lowered: Lowered) -> dict[str, Any]:
    """Source, kind, operations by name, times, VMs, processes, memory, where events went, notes and doubts."""
    records, accounting = lowered.records, lowered.accounting
    rest = records[accounting.setup :]
    nothing = not len(records) and not accounting.inputs
    of_vms = lowered.kind == "guest" and not nothing
    kind = {"guest": "a VM's memory", "process": "processes' memory"}[lowered.kind]
    return {
        "source": lowered.source,
        "kind": "nothing that concerns memory" if nothing else kind,
        "records": len(records),
        "setup": accounting.setup,
        "operations": _operations(records),
        "time_ns": _time(rest if len(rest) else records),
        "actors": int(np.unique(records.actor).size),
        "vms": max(len(lowered.guests), int(records.vm.max(initial=0)) + 1) if of_vms else 0,
        "init": lowered.init,
        "memory": lowered.layout.to_json(),
        "guests": [{"memory": guest.layout.to_json(), "init": guest.init} for guest in lowered.guests],
        "accounting": accounting.to_json(),
        "notes": list(lowered.notes),
        "doubts": [doubt.text for doubt in lowered.doubts],
    }


def about_several(found: SeveralVmsError) -> dict[str, Any]:
    """Of a log of several VMs, none of which is chosen: their processes, times, where events went, notes."""
    log = found.log
    times = log.rows[:, 1]
    return {
        "source": log.source,
        "kind": "several VMs' memory",
        "events": log.events,
        "vms": len(found.vms),
        "vm_processes": [
            {"number": vm.number, "kind": "process" if vm.known else "thread", "name": vm.name, "inputs": vm.inputs}
            for vm in found.vms
        ],
        "time_ns": [int(times.min()), int(times.max())],
        "accounting": {
            **{name: dict(getattr(log, name)) for name in ("inputs", "outcomes", "ignored", "unknown", "skipped")},
            "lost": log.lost,
        },
        "notes": [*log.notes, found.what],
    }


def _operations(records: Records) -> dict[str, int]:
    """How many of each, the most frequent first."""
    codes, counts = np.unique(records.op, return_counts=True)
    found = Counter(
        {_TITLES.get(code, f"op {code}"): n for code, n in zip(codes.tolist(), counts.tolist(), strict=True)}
    )
    return dict(found.most_common())


def _time(records: Records) -> list[int]:
    """First and last, nanoseconds; [] of no record."""
    return [int(records.time[0]), int(records.time[-1])] if len(records) else []


def about_accesses(stream: AccessStream) -> dict[str, Any]:
    """The same of a program's accesses, of which all batches are taken; pages are counted where they are 4K ones."""
    first = last = 0
    spaces: set[int] = set()
    kinds: Counter[str] = Counter()
    pages = np.zeros(0, np.uint64)
    for records in stream.batches:
        if not kinds:
            first = int(records.time[0])
        last = int(records.time[-1])
        write, fetch = (records.flags & np.uint8(int(flag)) != 0 for flag in (Flag.WRITE, Flag.EXEC))
        kinds["write"] += int(np.count_nonzero(write))
        kinds["fetch"] += int(np.count_nonzero(fetch))
        kinds["read"] += len(records) - int(np.count_nonzero(write | fetch))
        spaces.update(np.unique(records.space).tolist())
        if pages.size < _MOST_PAGES:
            pages = np.union1d(pages, records.address >> np.uint64(12))
    tally = stream.tally
    if not tally.records:
        raise InputError("no access in it", stream.source)
    return {
        "source": stream.source,
        "kind": "a program's accesses",
        "format": stream.format,
        "records": tally.records,
        "accesses": dict(kinds),
        "inputs": dict(tally.inputs),
        "crossing": tally.crossing,
        "time_ns": [first, last],
        "threads": tally.threads,
        "processes": len(spaces),
        "pages": int(pages.size) if pages.size < _MOST_PAGES else f"more than {_MOST_PAGES}",
        "ranges": _ranges(pages),
        "translations": 0 if stream.v2p is None else len(stream.v2p),
        "ignored": dict(tally.ignored),
        "rejected": tally.rejected,
        "first_rejected": [list(one) for one in tally.first_rejected],
        "notes": list(tally.notes),
    }


_MOST_PAGES = 1 << 24
_MOST_RANGES = 8


def _ranges(pages: np.ndarray) -> list[dict[str, Any]]:
    """Where the pages lie: ranges with less than 1 GiB of nothing between two pages, the largest first."""
    if not pages.size:
        return []
    ends = np.flatnonzero(np.diff(pages) > np.uint64(_GAP >> 12))
    starts = np.concatenate([[0], ends + 1])
    lasts = np.concatenate([ends, [pages.size - 1]])
    found = [
        {"start": int(pages[i]) << 12, "end": (int(pages[j]) + 1) << 12, "pages": int(j - i) + 1}
        for i, j in zip(starts.tolist(), lasts.tolist(), strict=True)
    ]
    return sorted(found, key=lambda one: -int(one["pages"]))[:_MOST_RANGES]


def first_records(records: Records, count: int) -> list[dict[str, Any]]:
    """The first records as dicts: names of operations, numbers of the columns that the operation reads."""
    rows = []
    for i in range(min(count, len(records))):
        op = _BY_CODE.get(int(records.op[i]))
        row: dict[str, Any] = {name: int(getattr(records, name)[i]) for name in DTYPES if name != "op"}
        rows.append({"op": _TITLES.get(int(records.op[i]), str(int(records.op[i])))} | row)
        if op is not None:
            row = rows[-1]
            for name in ("flags", "vm", "space", "object", "address", "offset", "length"):
                if name not in op.columns:
                    del row[name]
    return rows


def name_of(path: str | os.PathLike[str]) -> str:
    """What a stored trace of a file is called: its name without what tells formats and compression."""
    name = os.path.basename(os.fspath(path))
    for suffix in (".xz", ".gz", ".zst", ".txt", ".log", ".ftrace", ".parquet", ".zip", ".trace"):
        name = name.removesuffix(suffix)
    return name or "trace"
