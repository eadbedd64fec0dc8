"""Reports of comparisons for people: tables, and the large differences in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.text import Text

from pgemu.report import tables
from pgemu.report.formats import document
from pgemu.report.sentences import differences, notes

if TYPE_CHECKING:
    from rich.console import Console

    from pgemu.experiments.compare import Comparison

__all__ = ("document", "findings", "write", "write_sources")


def write(comparison: Comparison, console: Console) -> None:
    """Print the whole report."""
    blocks = [
        tables.trace(comparison.lowered),
        tables.memory_slots(comparison.lowered),
        tables.machine(comparison),
        tables.outcomes(comparison),
        tables.times(comparison),
        tables.state(comparison),
        tables.limits(comparison),
    ]
    for block in blocks:
        console.print(block)
        console.print()
    _paragraphs(console, "Notes", notes(comparison))
    if len(comparison.runs) > 1:
        _paragraphs(console, "Differences", differences(comparison) or ["Nothing differs by a factor of two or more."])
    _paragraphs(console, "Broken invariants", findings(comparison))


def write_sources(comparison: Comparison, console: Console) -> None:
    """Print what each row models, and what each price is made of."""
    for block in (
        tables.operation_sources(comparison),
        tables.state_sources(comparison),
        tables.limit_sources(comparison),
        tables.tags(),
        tables.prices(comparison),
    ):
        console.print()
        console.print(block)


def findings(comparison: Comparison, *, explained: bool = True) -> list[str]:
    """Return one line per design that broke a rule; without `explained` only of those whose defects do not say why."""
    lines = []
    total = len(comparison.lowered.records)
    for run in comparison.runs:
        if run.finding and (explained or not run.finding.explained):
            rule = run.finding.rule.lower().replace("_", " ")
            when = f"noticed after {run.finding.after:,} of {total:,} operations"
            if run.finding.after > total:
                when = "noticed after closing"
            lines.append(
                f"{run.design}: {run.finding.count:,} findings, the first: {rule}, at {run.finding.index:#x}, {when}"
            )
    return lines


def _paragraphs(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print()
