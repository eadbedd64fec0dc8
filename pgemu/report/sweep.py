"""Several comparisons in one table, a line each: what `pgemu compare --vary` prints."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

from pgemu.experiments.verdict import QUESTIONS, verdict
from pgemu.report.screen import answer

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison

__all__ = ("sweep",)

_HEADS = {
    "conversions": "conversions",
    "guest_faults": "guest faults",
    "memory": "memory",
    "level": "2M, 1G",
    "refused": "refused",
    "broken": "broken",
}


def sweep(runs: list[tuple[dict[str, str], Comparison | str]], form: str = "text") -> str:
    """Return who is better at what in every combination.

    :param runs: each one's options, and its comparison or why there is none
    """
    names = list(runs[0][0])
    table = [[*labels.values(), *_answers(comparison)] for labels, comparison in runs]
    heads = [*names, *(_HEADS[key] for key in QUESTIONS)]
    if form == "json":
        return json.dumps([dict(zip(heads, row, strict=True)) for row in table], indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([heads, *table])
        return out.getvalue()
    if form == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *table]]
        return "\n".join(lines) + "\n"
    return _text(heads, table, len(names))


def _answers(run: Comparison | str) -> list[str]:
    if isinstance(run, str):
        return [f"not run: {run}", *["-"] * (len(QUESTIONS) - 1)]
    return [answer(run, line.measure) for line in verdict(run).values()]


def _text(heads: list[str], table: list[list[str]], named: int) -> str:
    """One combination after the other, its answers below it: six of them are wider than a line of a mail."""
    lines = []
    for row in table:
        lines.append(", ".join(f"{name} {value}" for name, value in zip(heads, row[:named], strict=False)))
        lines += [f"  {head:14} {value}" for head, value in zip(heads[named:], row[named:], strict=True)]
    return "\n".join(lines) + "\n"
