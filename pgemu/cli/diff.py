"""`pgemu diff`: two runs of `pgemu compare --format json`, side by side."""

from __future__ import annotations

import json
import sys
from typing import Any

import rich_click as click

from pgemu.errors import InputError

__all__ = ("diff",)

_EXPECTED = "expected a document of `pgemu compare --format json`"


@click.command(short_help="Two runs of compare side by side, with difference and change.")
@click.argument("first", type=click.Path(dir_okay=False))
@click.argument("second", type=click.Path(dir_okay=False))
@click.option("--all", "everything", is_flag=True, help="Also what does not differ.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv"]),
    default="text",
    show_default=True,
    help="text: at most 80 columns, for a mail.",
)
def diff(first: str, second: str, everything: bool, form: str) -> None:
    """Print what two runs differ in, design by design.

    FIRST and SECOND are documents of `pgemu compare --format json`: of another kernel, version, order or trace.
    """
    one, other = _read(first), _read(second)
    common = [design for design in one["designs"] if design in other["designs"]]
    if not common:
        raise InputError(f"has no design that {first} has", second)
    try:
        text = "\n".join(_design(one, other, design, form, everything) for design in common)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(f"{_EXPECTED} of this version", f"{first}, {second}") from None
    sys.stdout.write(text)


def _design(one: dict[str, Any], other: dict[str, Any], design: str, form: str, everything: bool) -> str:
    """What one design did in both runs."""
    from pgemu.report.two_columns import differs, render, rows

    found = [row for row in rows(one["designs"][design], other["designs"][design]) if everything or differs(row)]
    head = ""
    if form == "csv":
        found = [row._replace(group=f"{design}: {row.group}") for row in found]
    else:
        mark, line = ("## ", "\n") if form == "markdown" else ("", "")
        head = f"{mark}{design}\n\nA: {_what(one, design)}\nB: {_what(other, design)}\n{line}"
    return head + (render(found, ("A", "B"), form) if found else "  nothing differs\n")  # type: ignore[arg-type]


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


def _what(document: dict[str, Any], design: str) -> str:
    """Which run it is, in a line of at most 80 columns."""
    machine = document["machines"].get(design, {})
    source = str(document["trace"]["source"]).split(" ")[0].rsplit("/", 1)[-1]
    version = document["versions"]["pfnmap" if design == "pfnmap" else "like"]
    page = {4096: "4K", 2 << 20: "2M"}.get(machine.get("page_size"), "1G")
    told = (source[:30], version, f"{machine.get('vm')} VM", f"{page} pages", f"Linux {machine.get('kernel')}")
    return ", ".join(told)
