"""A comparison in each of its forms: text for a mail, markdown, CSV, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.verdict import Line, verdict
from pgemu.report.answers import WIDTH, answers_of
from pgemu.report.devices import ways
from pgemu.report.screen import screen
from pgemu.report.two_columns import Row, render, rows

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.sensitivity import Sensitivity

__all__ = ("document",)


def document(
    comparison: Comparison,
    sensitivity: Sensitivity | None,
    form: str = "text",
    *,
    details: bool = False,
    sources: bool = False,
) -> str:
    """Return a comparison as text, "markdown", "csv" or "json".

    details: with every table; sources: with the kernel functions behind the rows, and the prices.
    """
    lines = verdict(comparison, sensitivity) if len(comparison.runs) > 1 else {}
    if form == "json":
        return json.dumps(_json(comparison, lines, sensitivity, sources), indent=2) + "\n"
    if form == "text":
        return _text(comparison, lines, sensitivity, details=details, sources=sources)
    designs = [*comparison.to_json()["designs"].items()][:2]
    heads = tuple(name for name, _ in designs)
    counted = rows(designs[0][1], designs[-1][1])
    if form == "csv":
        return render([*_answers(lines, heads), *counted], heads, "csv")
    table = render(counted, heads, "markdown")
    head = [f"    {text}" if text else "" for text in screen(comparison, lines, sensitivity).splitlines()]
    return "\n".join([*head, "", table])


def _answers(lines: dict[str, Line], designs: tuple[str, ...]) -> Iterator[Row]:
    for key, one in answers_of(lines, designs).items():
        said = one.difference, one.said, one.basis
        yield Row("Answers", one.named, one.unit, one.first, one.second, f"answers.{key}", said)


def _text(
    comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None, *, details: bool, sources: bool
) -> str:
    text = screen(comparison, lines, sensitivity)
    if not (details or sources):
        return text
    from rich.console import Console

    from pgemu.report.details import write, write_sources

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # what is narrower breaks lines by itself, where it likes
    with console.capture() as captured:
        if details:
            write(comparison, console, sensitivity)
        if sources:
            write_sources(comparison, console)
    tables = "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip("\n") + "\n"
    return f"{text}\n{tables}"


def _json(
    comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None, sources: bool
) -> dict[str, Any]:
    found = comparison.to_json()
    answers = answers_of(lines, [run.design for run in comparison.runs])
    found["verdict"] = {key: answer.to_json() for key, answer in answers.items()}
    if sensitivity:
        found["sensitivity"] = {
            "complete": sensitivity.complete,
            "tried": [{"rule": trial.rule, "alternative": trial.label} for trial in sensitivity.trials],
            "untouched": sensitivity.untouched,
            "iommu_unmaps": {
                label: {run.design: run.devices.to_json() for run in runs if run.devices}
                for label, runs in ways(sensitivity)
            },
            "rules": {rule: {"text": one.text, "source": one.source} for rule, one in INFERENCES.items()},
        }
    if sources:
        from pgemu.report.plain_sources import sources as sources_of

        found["sources"] = sources_of(comparison)
    return found
