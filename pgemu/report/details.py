"""Every table of a comparison, and notes to them: `pgemu compare --details` and `--sources`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.text import Text

import pgemu.report.tables as tables
from pgemu.report.devices import table as devices
from pgemu.report.fit import show
from pgemu.report.sentences import defects, findings, notes

if TYPE_CHECKING:
    from rich.console import Console

    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.sensitivity import Sensitivity

__all__ = ("write", "write_sources")


def write(comparison: Comparison, console: Console, sensitivity: Sensitivity | None = None) -> None:
    """Print every table, and notes to them."""
    blocks = [
        tables.trace(comparison.lowered),
        tables.memory_slots(comparison.lowered),
        tables.machine(comparison),
        tables.outcomes(comparison),
        tables.times(comparison),
        tables.worst(comparison),
        tables.state(comparison),
        *devices(comparison, sensitivity),
        tables.limits(comparison),
    ]
    for block in blocks:
        show(console, block)
        console.print()
    _paragraphs(console, "Notes", notes(comparison))
    _paragraphs(console, "Defects", defects(comparison))
    _paragraphs(console, "Broken invariants", findings(comparison))


def write_sources(comparison: Comparison, console: Console) -> None:
    """Print what each row models, and what each price is made of."""
    for block in (
        tables.operation_sources(comparison),
        tables.state_sources(comparison),
        tables.limit_sources(comparison),
        tables.tags(),
        tables.prices(comparison),
        tables.checks(comparison),
    ):
        console.print()
        show(console, block)


def _paragraphs(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print()
