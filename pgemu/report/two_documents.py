"""Two documents of `pgemu compare --format json`: which answers changed, and what was configured otherwise.

What each design counted in both is two_columns.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pgemu.report.units as units
from pgemu.report.answers import WIDTH, Answer, heads, left_out, row, wrapped

__all__ = ("Changed", "Differing", "answer_lines", "answers", "configuration", "configuration_lines", "unanswered")

Document = Mapping[str, Any]

_BYTES = ("page_size", "memory", "other_pool", "buddy", "reserved", "guest_memfd")
_CELLS = (24, 26, 26)  # of a table of what differs


class Changed(NamedTuple):
    """The answer to one question in both documents."""

    first: Answer
    second: Answer

    @property
    def text(self) -> str:
        """What became of it: "pfnmap stays better", "turns from pfnmap to undecided"."""
        one, other = self.first.said, self.second.said
        if one != other:
            return f"turns from {one} to {other}"
        return f"{one} in both" if one in ("alike", "undecided", "neither") else f"{one} stays better"


class Differing(NamedTuple):
    """A part of the configuration that differs, as both have it."""

    name: str
    first: str
    second: str


# --------------------------------------------------------------------------- answers


def answers(one: Document, other: Document) -> dict[str, Changed]:
    """The questions that both documents answer about the same two designs; those of `other` in the order of `one`.

    :raises KeyError, TypeError, ValueError: something that is no document
    """
    if unanswered(one, other):
        return {}
    reverse = _compared(one) != _compared(other)
    found = {}
    for key, data in one["verdict"].items():
        if key in other["verdict"]:
            second = Answer.from_json(other["verdict"][key])
            found[key] = Changed(Answer.from_json(data), second.swapped() if reverse else second)
    return found


def unanswered(one: Document, other: Document) -> str:
    """Why no answers stand beside each other, or ""."""
    for name, document in (("A", one), ("B", other)):
        if not document.get("verdict"):
            number = len(document["designs"])
            return f"{name} has no verdict: it is of {'one design' if number == 1 else 'a run without one'}"
    if set(_compared(one)) != set(_compared(other)):
        return f"A compares {' and '.join(_compared(one))}, B {' and '.join(_compared(other))}"
    return ""


def _compared(document: Document) -> list[str]:
    return list(document["designs"])[:2]


def answer_lines(one: Document, other: Document) -> Iterator[str]:
    """Every answer of both, in the form that the first screen has, with what became of it."""
    if why := unanswered(one, other):
        yield from wrapped(f"no answers beside each other: {why}")
        return
    yield from heads(_compared(one))
    found = answers(one, other)
    for changed in found.values():
        yield f"{changed.first.question}: {changed.text}"
        yield row("  A", *changed.first.cells)
        yield row("  B", *changed.second.cells)
    yield from left_out(answer.without for changed in found.values() for answer in changed)


# --------------------------------------------------------------------------- configuration


def configuration(one: Document, other: Document) -> list[Differing]:
    """What two runs differ in: trace, versions, machines; a field that differs alike in all designs once."""
    parts = [_parts(document) for document in (one, other)]
    names = dict.fromkeys([*parts[0], *parts[1]])
    found = [Differing(name, *(_said(name, part.get(name)) for part in parts)) for name in names]
    return [*(line for line in found if line.first != line.second), *_machines(one, other)]


def _parts(document: Document) -> dict[str, Any]:
    """The trace and the versions of a document, by name."""
    trace = document["trace"]
    memory = trace["memory"]
    return {
        "trace": trace["source"],
        "operations": trace["records"],
        "events": trace["accounting"]["events"],
        "memory at first": trace["init"],
        "guest_memfd": memory["inode_size"],
        "memory slots": memory["slots"],
        "slots are from": memory["origin"],
        **document["versions"],
        "done instead": document.get("instead", []),
        "check": document["check"],
        "pgemu": document["pgemu"],
    }


def _machines(one: Document, other: Document) -> Iterator[Differing]:
    designs = [design for design in one["machines"] if design in other["machines"]]
    machines = {design: (one["machines"][design], other["machines"][design]) for design in designs}
    by_field: dict[str, dict[str, Differing]] = {}
    for design, (first, second) in machines.items():
        for name in dict.fromkeys([*first, *second]):
            if name == "pool":  # as large as the guest_memfd
                continue
            cells = [_said(name, machine.get(name)) for machine in (first, second)]
            if cells[0] != cells[1]:
                by_field.setdefault(name, {})[design] = Differing(f"{design}: {name}", *cells)
    for name, found in by_field.items():
        if len({line[1:] for line in found.values()}) == 1 and len(found) == len(designs) > 1:
            yield next(iter(found.values()))._replace(name=name)
        else:
            yield from found.values()


def _said(name: str, value: Any) -> str:
    if name == "memory slots" and isinstance(value, list):
        return ", ".join(f"{slot['gpa']:#x} {units.size(slot['size'])}" for slot in value) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, int):
        return "-" if value is None else str(value)
    return units.size(value) if name in _BYTES else units.count(value)


def configuration_lines(one: Document, other: Document) -> Iterator[str]:
    """What two runs differ in, side by side, or one below the other where that is too long."""
    found = configuration(one, other)
    if not found:
        yield "A and B are configured alike"
        return
    name, first, second = _CELLS
    yield f"{'A and B differ in':{name}}  {'A':{first}}  B".rstrip()
    yield "-" * WIDTH
    for line in found:
        if len(line.name) <= name and len(line.first) <= first and len(line.second) <= second:
            yield f"{line.name:{name}}  {line.first:{first}}  {line.second}".rstrip()
            continue
        yield line.name
        for mark, value in (("A", line.first), ("B", line.second)):
            yield from textwrap.wrap(
                value, WIDTH, initial_indent=f"  {mark}  ", subsequent_indent="     ", break_on_hyphens=False
            )
