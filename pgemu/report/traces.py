"""What a trace holds, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pgemu.errors import printable
from pgemu.report import units

__all__ = ("about", "not_in_it", "table_of_formats", "table_of_records")

_HEX = ("address", "offset", "length")
_SHOWN = 8


def about(found: Mapping[str, Any]) -> str:
    """A page about what pgemu.trace.about says."""
    lines = _accesses if "accesses" in found else _several if "vm_processes" in found else _records
    return "\n".join(lines(found)) + "\n"


def _records(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['source']}: {found['kind']}, {units.count(found['records'])} records"
    yield from _counts("operations", found["operations"])
    if found["setup"]:
        yield _row("of them", f"{units.count(found['setup'])} set memory up")
    yield _row("time", _span(found["time_ns"]))
    if found["guests"]:
        for number, guest in enumerate(found["guests"]):
            yield _row("" if number else "memory", f"{_memory(guest['memory'], guest['init'])}, VM {number}")
    elif found["vms"]:
        what = _memory(found["memory"], found["init"])
        yield _row("memory", f"{what}, of {found['vms']} VMs" if found["vms"] > 1 else what)
    yield from _accounting(found["accounting"])
    yield from _texts(found)


def _accounting(accounting: Mapping[str, Any]) -> Iterator[str]:
    for name in ("inputs", "outcomes", "ignored", "unknown", "skipped", "without_operation"):
        yield from _counts(name.replace("_", " "), accounting.get(name, {}))
    if accounting["lost"]:
        yield _row("lost", f"{units.count(accounting['lost'])} events, which the ring buffer dropped")


def _several(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['source']}: {found['kind']}, {units.count(found['events'])} events"
    for place, vm in enumerate(found["vm_processes"]):
        who = f"{vm['kind']} {vm['number']} ({printable(vm['name'])})"
        yield _row("" if place else "VMs", f"{who}: {units.count(vm['inputs'])} input{'s' * (vm['inputs'] != 1)}")
    yield _row("time", _span(found["time_ns"]))
    yield from _accounting(found["accounting"])
    yield from _texts(found)


def _memory(memory: Mapping[str, Any], init: str) -> str:
    slots = len(memory["slots"])
    return f"{units.size(memory['inode_size'])} in {slots} slot{'s' * (slots != 1)}, {init} at first"


def _accesses(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['source']}: {found['kind']} ({found['format']}), {units.count(found['records'])} records"
    yield from _counts("accesses", found["accesses"])
    yield from _counts("inputs", found["inputs"])
    if found["crossing"]:
        yield _row("crossing", f"{units.count(found['crossing'])} reach into a second page, a record each")
    yield _row("time", _span(found["time_ns"]))
    yield _row("threads", f"{found['threads']}, of {found['processes']} process{'es' * (found['processes'] != 1)}")
    pages = found["pages"]
    yield _row("pages", f"{units.count(pages)} of 4K ({units.size(pages << 12)})" if isinstance(pages, int) else pages)
    for place in found["ranges"]:
        yield _row("", f"{place['start']:#014x}-{place['end']:#014x}: {units.count(place['pages'])}")
    if found["translations"]:
        yield _row("translations", f"{units.count(found['translations'])} virtual ranges with their physical address")
    yield from _counts("ignored", found["ignored"])
    if found["rejected"]:
        yield _row("rejected", units.count(found["rejected"]))
        for number, text in found["first_rejected"]:
            yield _row("", f"{number}: {text!r}")
    yield from _texts(found)


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}"


def _span(time: Sequence[int]) -> str:
    if not time:
        return "none"
    first, last = time
    return f"{first / 1e9:.6f} to {last / 1e9:.6f} s, {units.band(last - first, last - first)}"


def _counts(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    for place, (what, count) in enumerate(sorted(counts.items(), key=lambda one: -one[1])):
        yield _row("" if place else name, f"{units.count(count):>14}  {what}")


def not_in_it(missing: Mapping[str, int]) -> str:
    """What of a trace is in no record, the most frequent first; "" for nothing."""
    found = sorted(missing.items(), key=lambda one: -one[1])
    told = ", ".join(f"{units.count(count)} {printable(name)}" for name, count in found if count)
    return f"not in it: {told}" if told else ""


def _texts(found: Mapping[str, Any]) -> Iterator[str]:
    for name in ("notes", "doubts"):
        for place, text in enumerate(found.get(name, ())):
            yield _row("" if place else name, text)


def table_of_records(rows: Iterable[Mapping[str, Any]]) -> str:
    """Records one below the other; addresses, offsets and lengths in hexadecimal."""
    lines = []
    for row in rows:
        parts = [f"{row['time'] / 1e9:.9f}", f"{row['op']:<16}", f"actor {row['actor']}"]
        for name, value in row.items():
            if name not in ("time", "op", "actor"):
                parts.append(f"{name} {value:#x}" if name in (*_HEX, "flags") else f"{name} {value}")
        lines.append("  ".join(parts))
    return "\n".join(lines) + "\n" if lines else ""


def table_of_formats(formats: Mapping[str, str]) -> str:
    """Names of formats and what they are."""
    width = max(map(len, formats))
    return "".join(f"{name:<{width}}  {title}\n" for name, title in sorted(formats.items()))
