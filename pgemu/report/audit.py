"""The audit as people read it: a claim, what was tried, what was measured, the verdict, and what it rests on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pgemu.experiments.audit import document
from pgemu.report.answers import WIDTH, wrapped

if TYPE_CHECKING:
    from pgemu.experiments.audit import Audited, Outcome
    from pgemu.experiments.claims.claim import Figure

__all__ = ("write",)

_COLUMN = 15


def _number(value: float | str) -> str:
    """A figure's value, numbers in groups of three."""
    return value if isinstance(value, str) else f"{value:,}"


def _figures(figures: dict[str, Figure], trial: str, other: str) -> Iterator[str]:
    what = WIDTH - 2 * _COLUMN - 3
    yield f"  {'':{what}}{trial:>{_COLUMN}}{other:>{_COLUMN}}".rstrip()
    for figure in figures.values():
        first, *more = wrapped(f"{figure.what}, {figure.unit}" if figure.unit else figure.what, what - 1)
        values = [_number(value) for value in (figure.trial, figure.other)]
        yield f"  {first:{what}}{values[0]:>{_COLUMN}}{values[1]:>{_COLUMN}}"
        yield from (f"    {line}" for line in more)


def _paragraph(head: str, text: str) -> Iterator[str]:
    """Text behind a word, later lines under its beginning."""
    first, *more = wrapped(text, WIDTH - len(head) - 4)
    yield f"  {head}: {first}"
    yield from (f"  {'':{len(head) + 2}}{line}" for line in more)


def _setting(outcome: Outcome) -> str:
    return f"{outcome.switch} {outcome.label}".strip()


def _claim(one: Audited) -> Iterator[str]:
    claim, (first, *others) = one.claim, one.outcomes
    mark = "" if one.as_documented else f" (documented: {claim.expected})"
    yield f"{claim.name}: {one.verdict}{mark}"
    yield from _paragraph(claim.kind, f"{claim.claim} ({claim.by})")
    yield from _paragraph("tried", claim.tried)
    yield from _figures(first.figures, claim.setting.on_trial, claim.setting.other)
    label = next((f" ({switch.name} {next(iter(switch.settings))})" for switch in claim.switches if one.turns), "")
    yield from _paragraph(f"{first.found.verdict}{label}", first.found.why)
    for outcome in others:
        yield from _paragraph(f"{outcome.found.verdict} ({_setting(outcome)})", outcome.found.why)
    for switch in claim.switches:
        if switch.source:
            yield from _paragraph(switch.name, switch.source)
    if claim.note:
        yield from _paragraph("note", claim.note)
    yield f"  rests on: {claim.evidence}"


def _counts(audited: Sequence[Audited]) -> str:
    counts = Counter(one.verdict.value for one in audited)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items())


def _text(audited: Sequence[Audited]) -> str:
    lines = [f"{len(audited)} claims, each tried on machines of both designs: {_counts(audited)}"]
    blocks = ["\n".join(wrapped(lines[0])), *("\n".join(_claim(one)) for one in audited)]
    return "\n\n".join(blocks) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(audited: Sequence[Audited]) -> str:
    lines = ["| claim | verdict | measured | rests on |", "| --- | --- | --- | --- |"]
    for one in audited:
        outcomes = "; ".join(
            f"{f'{_setting(outcome)}: {outcome.found.verdict}, ' if outcome.switch else ''}{outcome.found.why}"
            for outcome in one.outcomes
        )
        claim = f"{one.claim.claim} ({one.claim.by})"
        lines.append(f"| {_cell(claim)} | {one.verdict} | {_cell(outcomes)} | {one.claim.evidence} |")
    return "\n".join(lines) + "\n"


def _json(audited: Sequence[Audited]) -> str:
    return json.dumps({"claims": document(audited)}, indent=2) + "\n"


_FORMS = {"text": _text, "markdown": _markdown, "json": _json}


def write(audited: Sequence[Audited], form: str) -> str:
    """The audit as "text", "markdown" or "json"."""
    return _FORMS[form](audited)
