"""One form for every answer of a comparison: on the first screen, in a sweep, beside that of another run, as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pgemu.report.units as units
from pgemu.experiments.verdict import SLOT_REACH

if TYPE_CHECKING:
    from pgemu.experiments.verdict import Line, Measure

__all__ = (
    "WIDTH",
    "Answer",
    "Rest",
    "answers_of",
    "heads",
    "left_out",
    "measured",
    "points",
    "row",
    "value",
    "wrapped",
)

WIDTH = 80
_NAME = 18
_ENDS = (31, 44)  # of both values
_STARTS = (44, 56, 69)  # of who is better, by how much, and the basis, behind a gap

Value = float | tuple[float, float] | None


class Rest(NamedTuple):
    """What an answer rests on: a rule or a defect, the alternative to it, and who is better then."""

    rule: str
    alternative: str
    then: str | None


class Answer(NamedTuple):
    """The answer to one question.

    Attributes:
        question: in words
        better: the design that is better, "alike", or None: the bands of the estimate overlap
        first, second: what both designs have, and `difference`: second less first. (low, high) where `unit` is "ns";
            None: a share of nothing, or a difference to that
        unit: "ns", "bytes", "count" or "share"
        basis: what it rests on, a kind of verdict.Basis
        rests_on: the rules or defects that turn it
        without: the rule by which both values and the difference leave out what the machines counted, or ""
    """

    question: str
    better: str | None
    first: Value
    second: Value
    difference: Value
    unit: str
    basis: str
    rests_on: tuple[Rest, ...] = ()
    without: str = ""

    @property
    def said(self) -> str:
        """Who is better, in a word: what only a defect makes counts for nobody."""
        if self.basis == "defect":
            return "neither"
        return self.better or "undecided"

    @property
    def by(self) -> str:
        """By how much the better one is better: a time, or how many times; "" where nobody is."""
        if self.said in ("neither", "alike", "undecided"):
            return ""
        if isinstance(self.difference, tuple):
            low, high = sorted(abs(end) for end in self.difference)
            return units.band(low, high)
        if not isinstance(self.first, int | float) or not isinstance(self.second, int | float) or self.unit == "share":
            return ""
        low, high = sorted((self.first, self.second))
        return f"{high / low:,.3g}x" if low and high < 1000 * low else f"{high / low:,.0f}x" if low else ""

    @property
    def text(self) -> str:
        """Which design is better, and by how much."""
        return f"{self.said} {self.by}".rstrip()

    @property
    def named(self) -> str:
        """The question, and the rule by which its values leave something out."""
        return f"{self.question} ({self.without})" if self.without else self.question

    @property
    def cells(self) -> tuple[str, ...]:
        """Both values, who is better, by how much, and the basis, as people read them."""
        basis = "" if self.basis == "even" else self.basis
        return value(self.first, self.unit), value(self.second, self.unit), self.said, self.by, basis

    def swapped(self) -> Answer:
        """The same with the designs the other way round."""
        less = self.difference
        if less is not None:
            less = (-less[1], -less[0]) if isinstance(less, tuple) else -less
        return self._replace(first=self.second, second=self.first, difference=less)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, with the names of the attributes.

        Whom a defect alone makes better is not in it: "better" is "neither" then, as everywhere.
        """
        better = self.said if self.basis == "defect" else self.better
        return {**self._asdict(), "better": better, "rests_on": [rest._asdict() for rest in self.rests_on]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """Return what to_json() gave; KeyError or TypeError for something else."""
        rests = tuple(Rest(one["rule"], one["alternative"], one["then"]) for one in data["rests_on"])
        first, second, less = (_value(data[name]) for name in ("first", "second", "difference"))
        question, unit, basis, without = (str(data.get(name, "")) for name in ("question", "unit", "basis", "without"))
        return cls(question, data["better"], first, second, less, unit, basis, rests, without)


def _value(found: Any) -> Value:
    if found is None:
        return None
    if isinstance(found, list):
        low, high = found
        return float(low), float(high)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"{found!r}: expected a number or two")
    return found


def measured(measure: Measure, designs: Sequence[str], question: str = "", basis: str = "") -> Answer:
    """A measure of two designs as an answer."""
    better, first, second, less, unit = measure
    return Answer(question, _name(better, designs), first, second, less, unit, basis)


def _name(better: int | None, designs: Sequence[str]) -> str | None:
    return None if better is None else "alike" if better == -1 else designs[better]


def answers_of(lines: Mapping[str, Line], designs: Sequence[str]) -> dict[str, Answer]:
    """The answers of a verdict, in its order."""
    return {
        key: measured(line.measure, designs, line.question, line.basis.kind)._replace(
            rests_on=tuple(Rest(rule, label, _name(better, designs)) for rule, label, better in line.basis.rules),
            without=line.without,
        )
        for key, line in lines.items()
    }


def value(found: Value, unit: str) -> str:
    """A value or a difference as people read it."""
    if found is None:
        return "none"
    if isinstance(found, tuple):
        return units.band(*found) if any(found) else "none"
    if unit == "bytes":
        return units.size(int(found))
    return units.share(found) if unit == "share" else units.count(int(found))


# --------------------------------------------------------------------------- lines of a mail


def left_out(rules: Iterable[str]) -> Iterator[str]:
    """What values and differences of answers leave out, a sentence for each rule (`Answer.without`)."""
    for rule in dict.fromkeys(filter(None, rules)):
        what = {SLOT_REACH: "zeroing that no slot reaches"}[rule]
        yield f"times of both designs are without {what} ({rule})"


def heads(designs: Sequence[str]) -> Iterator[str]:
    """The heads of a table of answers."""
    yield row("", *designs, "better", "by", "basis")
    yield "-" * WIDTH


def row(*cells: str) -> str:
    """A line of such a table: a question, and the cells of its answer; a wide one moves the next ones no further than
    it has to."""
    name, *rest = cells
    line = ""
    for gap in (2, 1):
        line = name.ljust(_NAME)
        for cell, end in zip(rest[:2], _ENDS, strict=True):
            line += " " + cell.rjust(end - len(line) - 1)
        for cell, start in zip(rest[2:], _STARTS, strict=True):
            line = f"{line.ljust(start + gap - 1)} {cell}"
        line = line.rstrip()
        if len(line) <= WIDTH:
            break
    return line


def points(text: str) -> list[str]:
    """A sentence as a point of a list."""
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """A sentence in lines of at most `width` columns, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
