"""A piece of a trace by time, with what stood at its beginning: what was mapped and bound, and what was shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.schema import COLUMNS, Operation, Records
from pgemu_kernels.words.operations import Flag

__all__ = ("cut", "cut_accesses")

_TITLES = {int(op): op.name.lower().replace("_", " ") for op in Operation}
_MAKES_STATE = frozenset(
    (
        *(Operation.MMAP, Operation.MUNMAP, Operation.BIND, Operation.UNBIND, Operation.MEMSLOT, Operation.ATTRIBUTES),
        *(Operation.PROTECT, Operation.REMAP, Operation.FORK, Operation.EXIT, Operation.VM_EXIT, Operation.CLOSE),
        *(Operation.LOCK, Operation.ADVISE_HUGE, Operation.DONTFORK, Operation.DOFORK, Operation.DMA_MAP),
        *(Operation.DMA_UNMAP, Operation.MEMORY_POLICY, Operation.DIRTY_LOGGING, Operation.POOL_RESIZE),
    )
)
"""Operations before the cut that are run all the same: without them the rest would be another trace."""


def cut(lowered: Lowered, first: int | None = None, end: int | None = None, vm: int | None = None) -> Lowered:
    """The records of a time and of a VM.

    What maps, binds and protects memory before `first` stays, at its beginning, and so does what is shared then (as
    conversions, one for each range that differs from the beginning); faults before it are left out, so that pages are
    faulted in again. The notes say how much of each.

    :param first, end: nanoseconds, from `first` on and before `end`; None: from the beginning, to the end
    :param vm: records that name another VM are left out; what names none, as faults of the host, stays
    :raises InputError: no record is left
    """
    records, setup = lowered.records, lowered.accounting.setup
    place = np.arange(len(records))
    before = (place < setup) | (records.time < np.uint64(first or 0))
    inside = ~before & (records.time < np.uint64(end) if end is not None else True)
    if vm is not None:
        inside &= ~_of_vms(records) | (records.vm == vm)
    if not inside.any():
        raise InputError("no record is left of it", lowered.source)
    early = before & (place >= setup)
    kept = (place < setup) | (early & np.isin(records.op, [int(op) for op in _MAKES_STATE]))
    converts = np.flatnonzero(early & (records.op == Operation.CONVERT))
    folded = _state(records.take(converts), lowered)
    made = Records.concatenate([records.take(np.flatnonzero(kept)), folded, records.take(np.flatnonzero(inside))])
    ahead = int(np.count_nonzero(kept)) + len(folded)
    if ahead and ahead < len(made):
        made.time[:ahead] = made.time[ahead]
    dropped = Counter(
        {
            _TITLES[op]: n
            for op, n in Counter(records.op[early & ~kept & (records.op != Operation.CONVERT)].tolist()).items()
        }
    )
    notes = list(lowered.notes)
    if early.any():
        what = ", ".join(f"{count:,} {name}" for name, count in dropped.most_common(4)) or "none"
        notes.append(
            f"cut: {ahead - setup:,} operations before it make what stood at its beginning, the others are left out "
            f"({what})"
        )
    if (late := int(np.count_nonzero(~before & ~inside))) > 0:
        notes.append(f"cut: {late:,} operations behind it, or of other VMs, are left out")
    if missing := lowered.accounting.missing():
        what = ", ".join(f"{count:,} {name}" for name, count in missing.most_common())
        notes.append(f"cut: of the whole trace not in it: {what}")
    count = len(made) - ahead
    accounting = Accounting(count, Counter({"record": count}), operations=len(made), setup=ahead)
    levels = lowered.fault_levels
    if levels is not None:
        levels = np.concatenate([levels[kept], np.zeros(len(folded), np.uint8), levels[inside]])
    return replace(lowered, records=made, accounting=accounting, fault_levels=levels, notes=tuple(notes), again=None)


def cut_accesses(stream: AccessStream, first: tuple[bool, int] | None, end: tuple[bool, int] | None) -> AccessStream:
    """A stream's accesses of a time.

    :param first, end: whether it counts from the first access, and nanoseconds; None: no limit
    """
    began: int | None = None

    def inside() -> Iterator[Records]:
        nonlocal began
        for records in stream.batches:
            if began is None:
                began = int(records.time[0])
            low, high = (0 if one is None else one[1] + (began if one[0] else 0) for one in (first, end))
            wanted = (records.time >= np.uint64(low)) & (records.time < np.uint64(high) if end is not None else True)
            if wanted.any():
                yield records.take(np.flatnonzero(wanted))
        whole = stream.tally  # which no time is of
        tally.ignored, tally.rejected, tally.first_rejected = whole.ignored, whole.rejected, whole.first_rejected

    tally = Tally(threads=stream.tally.threads, notes=[*stream.tally.notes, "cut by time"])
    return AccessStream.of(stream.source, stream.format, inside(), tally, stream.v2p)


def _of_vms(records: Records) -> npt.NDArray[np.bool_]:
    """Which records name a VM."""
    named: npt.NDArray[np.bool_] = np.isin(records.op, [int(op) for op, means in COLUMNS.items() if "vm" in means])
    return named


def _state(converts: Records, lowered: Lowered) -> Records:
    """Conversions that make what the given ones made, one after the other, of memory as it was at first."""
    made = []
    for inode in np.unique(converts.object).tolist():
        own = converts.take(np.flatnonzero(converts.object == inode))
        init = lowered.guests[inode].init if inode < len(lowered.guests) else lowered.init
        start, end = own.offset, own.offset + own.length
        edges = np.unique(np.concatenate([start, end]))
        shared = np.full(max(len(edges) - 1, 0), init == "shared")
        to_shared = own.flags & np.uint8(int(Flag.SHARED)) != 0
        firsts, lasts = np.searchsorted(edges, start), np.searchsorted(edges, end)
        for first, last, value in zip(firsts.tolist(), lasts.tolist(), to_shared.tolist(), strict=True):
            shared[first:last] = value
        differs = np.concatenate([[False], shared != (init == "shared"), [False]])
        begins, ends = np.flatnonzero(~differs[:-1] & differs[1:]), np.flatnonzero(differs[:-1] & ~differs[1:])
        made.append(
            Records.build(
                len(begins),
                op=Operation.CONVERT,
                flags=int(Flag.PRIVATE if init == "shared" else Flag.SHARED),
                vm=own.vm[0],
                object=inode,
                actor=own.actor[0],
                offset=edges[begins],
                length=edges[ends] - edges[begins],
            )
        )
    return Records.concatenate(made)
