"""`pgemu diff`: two runs of `pgemu compare --format json`, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.report.two_columns import Row

__all__ = ("diff",)

_EXPECTED = "expected a document of `pgemu compare --format json`"


@click.command(short_help="Two runs of compare side by side: which answers turned, and what differs.")
@click.argument("first", type=click.Path(dir_okay=False))
@click.argument("second", type=click.Path(dir_okay=False))
@click.option("--all", "everything", is_flag=True, help="Also the numbers that do not differ.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv"]),
    default="text",
    show_default=True,
    help="text: at most 80 columns, for a mail.",
)
def diff(first: str, second: str, everything: bool, form: str) -> None:
    """Print what two runs differ in: their configuration, every answer, and what each design counted.

    FIRST (A) and SECOND (B) are documents of `pgemu compare --format json`: of another kernel, version, order or trace.
    An answer stays or turns to another design; of both runs it is shown as compare does.
    """
    one, other = _read(first), _read(second)
    if not [design for design in one["designs"] if design in other["designs"]]:
        raise InputError(f"has no design that {first} has", second)
    try:
        text = _csv(one, other, everything) if form == "csv" else "\n".join(_lines(one, other, form, everything)) + "\n"
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(f"{_EXPECTED} of this version", f"{first}, {second}") from None
    sys.stdout.write(text)


def _lines(one: dict[str, Any], other: dict[str, Any], form: str, everything: bool) -> Iterator[str]:
    from pgemu.report.answers import wrapped
    from pgemu.report.two_columns import lacking, render
    from pgemu.report.two_documents import answer_lines, configuration_lines

    mark, fence = ("## ", ["```text"]) if form == "markdown" else ("", [])
    yield from wrapped(f"A: {_what(one)}")
    yield from ["", *wrapped(f"B: {_what(other)}")] if fence else wrapped(f"B: {_what(other)}")
    for title, lines in (
        ("Configuration", configuration_lines(one, other)),
        ("Who is better at what", answer_lines(one, other)),
    ):
        yield from ("", f"{mark}{title}", "", *fence, *lines, *(["```"] if fence else []))
    for design, rows in _counted(one, other, everything):
        yield from ("", f"{mark}{design}", "")
        for name, document in (("A", one), ("B", other)):
            if without := lacking(document["designs"][design]):
                yield from wrapped(f"  {name} was counted by another version of pgemu, without {'; '.join(without)}")
        yield render(rows, ("A", "B"), form).rstrip("\n") if rows else "  nothing differs"  # type: ignore[arg-type]


def _csv(one: dict[str, Any], other: dict[str, Any], everything: bool) -> str:
    """One table: the configuration and the answers are words, what is counted are numbers."""
    import csv
    import io

    from pgemu.report.two_columns import render
    from pgemu.report.two_documents import answers, configuration

    counted = [
        row._replace(group=f"{design}: {row.group}", key=f"{design}.{row.key}")
        for design, rows in _counted(one, other, everything)
        for row in rows
    ]
    head, *numbers = render(counted, ("A", "B"), "csv").splitlines(keepends=True)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, a, b in configuration(one, other):
        writer.writerow((f"configuration.{name.replace(' ', '_')}", "configuration", name, "", a, b, ""))
    for key, changed in answers(one, other).items():
        first, second = changed.first, changed.second
        for name, cells in (
            ("better", (first.said, second.said, changed.text)),
            ("by", (first.by, second.by, "")),
            ("basis", (first.basis, second.basis, "")),
        ):
            writer.writerow((f"{name}.{key}", name, _same(first.named, second.named), "", *cells))
    return "".join([head, out.getvalue(), *numbers])


def _same(first: str, second: str) -> str:
    return first if first == second else f"{first} / {second}"


def _counted(one: dict[str, Any], other: dict[str, Any], everything: bool) -> Iterator[tuple[str, list[Row]]]:
    """What each design that both have counted in both."""
    from pgemu.report.two_columns import differs, rows

    for design in one["designs"]:
        if design in other["designs"]:
            found = rows(one["designs"][design], other["designs"][design])
            yield design, [row for row in found if everything or differs(row)]


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        raise InputError("no such file", path) from None
    except RecursionError:
        raise InputError(f"{_EXPECTED} (too deep)", path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{_EXPECTED} ({error})", path) from None
    if not isinstance(found, dict) or not isinstance(found.get("designs"), dict) or "versions" not in found:
        raise InputError(_EXPECTED, path)
    return found


def _what(document: dict[str, Any]) -> str:
    """Which run it is, in a sentence."""
    machine = document["machines"][next(iter(document["designs"]))]
    source = str(document["trace"]["source"]).split(" (")[0].rsplit("/", 1)[-1]
    versions = document["versions"]
    named = [f"{design} {versions['pfnmap' if design == 'pfnmap' else 'like']}" for design in document["designs"]]
    page = {4096: "4K", 2 << 20: "2M"}.get(machine["page_size"], "1G")
    return ", ".join([source, *named, f"{machine['vm']} VM", f"{page} pages", f"Linux {machine['kernel']}"])
