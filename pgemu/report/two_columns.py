"""Two runs side by side with difference and change: two designs of one comparison, or one design of two.

Both come as documents, as Comparison.to_json() makes them and `--format json` prints them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pgemu.report.units as units
from pgemu.experiments.devices import COUNTS
from pgemu.experiments.metrics import METRICS

__all__ = ("Form", "Row", "differs", "lacking", "render", "rows")

Form = Literal["text", "markdown", "csv"]
_WIDTHS = (33, 13, 13, 12, 7)


class Row(NamedTuple):
    """One quantity of both runs; bands are (low, high), None is a share of nothing.

    Attributes:
        group, label: as people read it
        unit: "count", "bytes", "ns" or "share"
        key: as a program looks for it: no blank, comma or quote is in it
        answer: of the answer to a question: the difference, who is better, and the basis
    """

    group: str
    label: str
    unit: str
    first: float | tuple[float, float] | None
    second: float | tuple[float, float] | None
    key: str = ""
    answer: tuple[float | tuple[float, float] | None, str, str] | None = None


def rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    """Return every quantity that two runs have: members of "designs" of a document."""
    names = list(dict.fromkeys([*first["operations"], *second["operations"]]))
    for name in names:
        ends = [run["operations"].get(name, {"outcomes": {}}) for run in (first, second)]
        for outcome in dict.fromkeys(outcome for end in ends for outcome in end["outcomes"]):
            one, other = (end["outcomes"].get(outcome, 0) for end in ends)
            yield Row("Operations", f"{name}: {outcome}", "count", one, other, _key("outcomes", name, outcome))
    for name in names:
        none = {"estimate_ns": {"total": [0, 0]}}
        one, other = (tuple(run["operations"].get(name, none)["estimate_ns"]["total"]) for run in (first, second))
        yield Row("Kernel time, an estimate", name, "ns", one, other, _key("estimate_ns", name))
    for metric in METRICS:
        if metric.key not in first["state"] or metric.key not in second["state"]:  # another version of pgemu: lacking()
            continue
        one, other = (run["state"][metric.key] for run in (first, second))
        yield Row(metric.group, metric.label, metric.unit, one, other, metric.key)
    did = [run.get("devices") or {} for run in (first, second)]
    for name, label in COUNTS.items():
        if all(name in one for one in did):
            yield Row("Devices", label, "count", did[0][name], did[1][name], f"devices.{name}")


def _key(*parts: str) -> str:
    return ".".join(part.replace(" ", "_") for part in parts)


def lacking(run: Mapping[str, Any]) -> list[str]:
    """Return what another version of pgemu did not count: quantities of this one."""
    return [f"{metric.group}: {metric.label}" for metric in METRICS if metric.key not in run["state"]]


def render(found: Iterable[Row], heads: Sequence[str], form: Form = "text") -> str:
    """Return rows as text of at most 80 columns, as a table of markdown, or as CSV with plain numbers.

    With one head there is one run: its values alone, without a difference.
    """
    return {"text": _text, "markdown": _markdown, "csv": _csv}[form](list(found), heads)


def _value(value: float | tuple[float, float] | None, unit: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return units.band(*value)
    return units.size(int(value)) if unit == "bytes" else units.count(int(value))


def _difference(row: Row) -> tuple[str, str]:
    """The difference in words, and the change in percent; both empty where a band is not beside the other one."""
    if not isinstance(row.first, int | float) or not isinstance(row.second, int | float):
        return "", ""
    less = row.second - row.first
    if not less:
        return "0", ""
    text = ("-" if less < 0 else "+") + _value(abs(less), row.unit)
    return text, units.change(row.first, row.second) if row.first else "new"


def differs(row: Row) -> bool:
    """Whether two quantities differ as they are shown."""
    shown = _value(row.first, row.unit) != _value(row.second, row.unit)
    return shown or (row.unit != "ns" and row.first != row.second)


def _cells(row: Row, runs: int) -> tuple[str, ...]:
    values = row.label, _value(row.first, row.unit), _value(row.second, row.unit), *_difference(row)
    return values if runs > 1 else values[:2]


def _text(found: list[Row], heads: Sequence[str]) -> str:
    more = ("difference", "change") if len(heads) > 1 else ()
    lines = [_line("", *heads, *more), "-" * (sum(_WIDTHS) + 2)]
    group = ""
    for row in found:
        if row.group != group:
            lines.append(row.group)
            group = row.group
        name, *cells = _cells(row, len(heads))
        lines.append(_line(f"  {name}", *cells))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    """A line of the table; a name that is in the way of the numbers has one of its own."""
    name, *numbers = cells
    text = "".join(f" {n:>{w - 1}}" for n, w in zip(numbers, _WIDTHS[1:], strict=False))
    room = sum(_WIDTHS) - len(text)
    return (f"{name:{room}}{text}" if len(name) <= room else f"{name}\n{text:>{sum(_WIDTHS)}}").rstrip()


def _markdown(found: list[Row], heads: Sequence[str]) -> str:
    columns = [*heads, *(("difference", "change") if len(heads) > 1 else ())]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    group = ""
    for row in found:
        if row.group != group:
            lines.append(f"| **{row.group}** |{' |' * len(columns)}")
            group = row.group
        lines.append(f"| {' | '.join(_cells(row, len(heads)))} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    return "" if value is None else value


def _csv(found: list[Row], heads: Sequence[str]) -> str:
    """A band has a row for each end, and so has the difference of two, which is no difference of such ends: in its rows
    both values are empty. Where there are answers, they have columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = 4 + (3 if len(heads) > 1 else 1)
    more = ("better", "basis") if any(row.answer for row in found) else ()
    writer.writerow((*("key", "group", "quantity", "unit", *heads, "difference")[:columns], *more))
    for row in found:
        said = row.answer[1:] if row.answer else ("",) * len(more)
        less = row.answer[0] if row.answer else None
        if isinstance(row.first, tuple) and isinstance(row.second, tuple):
            for end, name in enumerate(("low", "high")):
                named = f"{row.key}.{name}", row.group, f"{row.label}, {name}", row.unit
                writer.writerow((*(*named, row.first[end], row.second[end], "")[:columns], *said))
            for name, apart in zip(("low", "high"), less if isinstance(less, tuple) else (), strict=False):
                named = f"{row.key}.difference.{name}", row.group, f"{row.label}, difference, {name}", row.unit
                writer.writerow((*named, "", "", apart, *said))
        elif row.first is None or row.second is None:
            cells = row.key, row.group, row.label, row.unit, *(_plain(one) for one in (row.first, row.second, less))
            writer.writerow((*cells[:columns], *said))
        else:
            less = row.second - row.first if less is None else less  # type: ignore[operator]
            cells = row.key, row.group, row.label, row.unit, row.first, row.second, less
            writer.writerow((*cells[:columns], *said))
    return out.getvalue()
