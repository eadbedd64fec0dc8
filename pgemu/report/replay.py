"""A replay as people read it, and as JSON: how many records ended in what, what was counted, what it may have cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pgemu.report.units as units
from pgemu.errors import printable
from pgemu.machine.results import operation_name
from pgemu.report.answers import WIDTH, wrapped
from pgemu.report.traces import not_in_it
from pgemu_kernels.words.events import Event

if TYPE_CHECKING:
    from pgemu.experiments.replaying.run import Replayed

__all__ = ("document", "text")

_EVENTS = 12  # that are shown


def _events(replayed: Replayed) -> dict[str, int]:
    """Events of the records, the most frequent first."""
    before, after = replayed.booted, replayed.statistics
    counts = {event.name.lower(): after.event(event) - before.event(event) for event in Event}
    return dict(sorted(((name, n) for name, n in counts.items() if n), key=lambda item: -item[1]))


def document(replayed: Replayed, out: str, label: str = "") -> dict[str, Any]:
    """Plain dicts, lists and numbers; counts are ints, times are nanoseconds; equal runs give equal documents."""
    finding = replayed.finding
    return {
        **({"label": label} if label else {}),
        **replayed.about(),
        "output": out,
        "records": replayed.records,
        "total": replayed.total,
        "refusal": replayed.refusal or None,
        "shards": replayed.shards,
        "instead": replayed.instead or None,
        "notes": list(replayed.notes),
        "not_in_it": dict(replayed.missing),
        "operations": {
            operation_name(run.operation): {
                "count": run.count,
                "outcomes": run.outcomes,
                "estimate_ns": {name: list(getattr(run, name)) for name in ("total", "mean", "p50", "p99", "worst")},
            }
            for run in replayed.operations
        },
        "events": _events(replayed),
        "broken": finding.to_json() if finding else None,
    }


def text(replayed: Replayed, out: str, label: str = "") -> str:
    """The same in lines; the rate is that of this process."""
    return "\n".join(_lines(replayed, out, label)) + "\n"


def _lines(replayed: Replayed, out: str, label: str) -> Iterator[str]:
    config = replayed.config
    name = f"{printable(replayed.source)}{f', {label}' if label else ''}"
    yield f"{name} on {config.design}: {units.count(replayed.records)} of {units.count(replayed.total)} records"
    if replayed.refusal:
        yield from wrapped(f"nothing has run: {replayed.refusal}", WIDTH)
        return
    ran = replayed.records - replayed.resumed
    rate = f"{ran / replayed.seconds / 1e6:.2f} M/s" if replayed.seconds and ran else "-"
    from_there = f", from a checkpoint after {units.count(replayed.resumed)}" if replayed.resumed else ""
    yield f"  {rate}, {replayed.seconds:.1f} s{from_there}; outcomes in {printable(out)}"
    if replayed.shards > 1:
        yield f"  on {replayed.shards} machines, whose records share nothing"
    if replayed.instead:
        yield from (f"  {line}" for line in wrapped(replayed.instead, WIDTH - 2))
    if told := not_in_it(replayed.missing):
        yield from (f"  {line}" for line in wrapped(told, WIDTH - 2))
    for note in replayed.notes:
        yield from (f"  {line}" for line in wrapped(f"note: {printable(note)}", WIDTH - 2))
    yield ""
    yield f"  {'operation':18}{'count':>14}  {'estimated':<16}outcomes"
    for run in replayed.operations:
        outcomes = ", ".join(f"{units.count(n)} {name}" for name, n in run.outcomes.items())
        begin, *more = wrapped(outcomes, WIDTH - 50)
        yield f"  {operation_name(run.operation):18}{run.count:>14,}  {units.band(*run.total):<16}{begin}"
        yield from (f"{'':50}{line}" for line in more)
    events = _events(replayed)
    if events:
        shown = ", ".join(f"{units.count(n)} {name}" for name, n in list(events.items())[:_EVENTS])
        left = f" and {len(events) - _EVENTS} more" if len(events) > _EVENTS else ""
        yield ""
        yield from (f"  {line}" for line in wrapped(f"events: {shown}{left}", WIDTH - 2))
    if replayed.finding:
        finding = replayed.finding
        why = " (defects explain it)" if finding.explained else ""
        yield f"  broken: {units.count(finding.count)}, first {finding.rule}, after record {finding.after}{why}"
