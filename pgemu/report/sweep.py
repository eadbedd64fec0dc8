"""Several comparisons in one table: what `pgemu compare --vary` prints. Each answer as the first screen has it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pgemu.experiments.verdict import verdict
from pgemu.report.answers import WIDTH, Answer, answers_of, heads, left_out, row, wrapped
from pgemu.report.screen import about

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.verdict import Sensitivity

__all__ = ("Combination", "sweep")


class Combination(NamedTuple):
    """One combination of a sweep: its options as they were written, and its comparison or why there is none."""

    labels: dict[str, str]
    comparison: Comparison | str
    sensitivity: Sensitivity | None = None

    @property
    def designs(self) -> list[str]:
        """The designs that are compared; none where there is no comparison."""
        return [] if isinstance(self.comparison, str) else [run.design for run in self.comparison.runs[:2]]

    @property
    def answers(self) -> dict[str, Answer]:
        """What it answers, by question; nothing where there is no comparison."""
        if isinstance(self.comparison, str):
            return {}
        return answers_of(verdict(self.comparison, self.sensitivity), self.designs)

    @property
    def reason(self) -> str | None:
        """Why there is no comparison."""
        return self.comparison if isinstance(self.comparison, str) else None


def sweep(runs: Sequence[Combination], form: str = "text") -> str:
    """Return every answer of every combination: what both designs have, which is better, by how much, and the basis.

    form: "text" of at most 80 columns; "markdown", a row per combination and answer; "csv", the same with plain
    numbers, both ends of a band (ns, bytes, counts, shares); "json", the verdicts as `--format json` of one comparison
    has them. `first` and `second` there are of `designs`.
    """
    designs = next((run.designs for run in runs if run.designs), ["first", "second"])
    return {"text": _text, "markdown": _markdown, "csv": _csv, "json": _json}[form](runs, designs)


def _json(runs: Sequence[Combination], _: list[str]) -> str:
    found = [
        {
            "options": run.labels,
            "designs": run.designs,
            "verdict": {key: answer.to_json() for key, answer in run.answers.items()},
            "not_run": run.reason,
        }
        for run in runs
    ]
    return json.dumps(found, indent=2) + "\n"


def _csv(runs: Sequence[Combination], designs: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{name}_{end}" for name in (*designs, "difference") for end in ("low", "high")]
    columns = ("key", "question", "unit", *ends, "better", "basis", "rests_on", "not_run")
    writer.writerow((*runs[0].labels, *columns))
    for run in runs:
        if run.reason is not None:
            writer.writerow((*run.labels.values(), *[""] * (len(columns) - 1), run.reason))
        for key, answer in run.answers.items():
            numbers = [end for value in (answer.first, answer.second, answer.difference) for end in _band(value)]
            rests = "; ".join(
                f"{rest.rule}: {rest.alternative}: {rest.then or 'undecided'}" for rest in answer.rests_on
            )
            cells = (key, answer.named, answer.unit, *numbers, answer.said, answer.basis, rests, "")
            writer.writerow((*run.labels.values(), *cells))
    return out.getvalue()


def _band(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else ("" if value is None else value,) * 2


def _markdown(runs: Sequence[Combination], designs: list[str]) -> str:
    columns = [*runs[0].labels, "question", *designs, "better", "by", "basis"]
    lines = [columns, ["---"] * len(columns)]
    for run in runs:
        labels = list(run.labels.values())
        if run.reason is not None:
            lines.append([*labels, f"not run: {run.reason}", *[""] * 5])
        lines += [[*labels, answer.named, *answer.cells] for answer in run.answers.values()]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _text(runs: Sequence[Combination], designs: list[str]) -> str:
    return "\n".join(line.rstrip() for line in _lines(runs, designs)) + "\n"


def _about(runs: Sequence[Combination]) -> Iterator[str]:
    """What varies, and what of the first screen's head is the same wherever there is a comparison."""
    compared = [run.comparison for run in runs if not isinstance(run.comparison, str)]
    sources = dict.fromkeys(comparison.lowered.source.rsplit("/", 1)[-1] for comparison in compared)
    count = f"{len(runs)} combination{'s' * (len(runs) != 1)}"
    yield f"{', '.join(sources)}: {count} of {', '.join(runs[0].labels)}"
    # Of the line of versions the one that does not vary.
    first, *others = ([part for text in about(one) for part in text.split("; ")] for one in compared)
    yield from (text for text in first if all(text in other for other in others))


def _lines(runs: Sequence[Combination], designs: list[str]) -> Iterator[str]:
    """One combination after the other under one head, each with the rules that turn its answers."""
    for text in _about(runs):
        yield from wrapped(text)
    yield ""
    yield from heads(designs)
    for run in runs:
        yield from wrapped(", ".join(f"{name} {value}" for name, value in run.labels.items()))
        if run.reason is not None:
            yield from wrapped(f"  not run: {run.reason}")
        yield from (row(answer.question, *answer.cells) for answer in run.answers.values())
        rules = {rest.rule for answer in run.answers.values() for rest in answer.rests_on if " and " not in rest.rule}
        if rules:
            yield from wrapped(f"  rests on {', '.join(sorted(rules))}")
    yield "-" * WIDTH
    yield from left_out(answer.without for run in runs for answer in run.answers.values())
