"""`pgemu diff`: two runs of `pgemu compare --format json`, side by side."""

from __future__ import annotations

import json
import sys
from typing import Any

import rich_click as click

from pgemu.errors import InputError

__all__ = ("diff",)


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
    from pgemu.report.two_columns import differs, render, rows

    one, other = _read(first), _read(second)
    common = [design for design in one["designs"] if design in other["designs"]]
    if not common:
        raise InputError(f"has no design that {first} has", second)
    for design in common:
        try:
            found = list(rows(one["designs"][design], other["designs"][design]))
        except (KeyError, TypeError, AttributeError):
            raise InputError("expected a document of `pgemu compare --format json` of this version", second) from None
        if not everything:
            found = [row for row in found if differs(row)]
        if form == "csv":
            found = [row._replace(group=f"{design}: {row.group}") for row in found]
        else:
            mark = "## " if form == "markdown" else ""
            print(f"{mark}{design}\n\nA: {_what(one, design)}\nB: {_what(other, design)}")
        if form == "markdown":
            print()
        sys.stdout.write(render(found, ("A", "B"), form) if found else "  nothing differs\n")  # type: ignore[arg-type]
        if design != common[-1] and form != "csv":
            print()


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        raise InputError("no such file", path) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"expected a document of `pgemu compare --format json` ({error})", path) from None
    if not isinstance(found, dict) or not isinstance(found.get("designs"), dict) or "versions" not in found:
        raise InputError("expected a document of `pgemu compare --format json`", path)
    return found


def _what(document: dict[str, Any], design: str) -> str:
    """Which run it is, in a line of at most 80 columns."""
    machine = document["machines"].get(design, {})
    source = str(document["trace"]["source"]).split(" ")[0].rsplit("/", 1)[-1]
    version = document["versions"]["pfnmap" if design == "pfnmap" else "like"]
    page = {4096: "4K", 2 << 20: "2M"}.get(machine.get("page_size"), "1G")
    told = (source[:30], version, f"{machine.get('vm')} VM", f"{page} pages", f"Linux {machine.get('kernel')}")
    return ", ".join(told)
