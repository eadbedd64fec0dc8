"""`pgemu consumers`: which users of a process's memory work with each design, and what they do to conversions."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import rich_click as click

from pgemu.cli._lines import terminal_width

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgemu.experiments.consumers import Consumer, Outcome
    from pgemu.machine.designs import Design

__all__ = ("consumers",)

_SIZES = {"2M": 2 << 20, "1G": 1 << 30}
_ORDERS = ("rfc2", "fixup", "jan2026")


def _cells(outcome: Outcome) -> tuple[str, str]:
    """What the access returned, and what the conversion did meanwhile."""
    from pgemu.experiments.consumers import error

    return error(outcome.status), error(outcome.convert)


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _table(rows: list[tuple[Consumer, dict[Design, Outcome]]], width: int) -> list[str]:
    """A line for each consumer, or where that is too long its outcomes on a line of their own."""
    cells = [tuple(cell for outcome in outcomes.values() for cell in _cells(outcome)) for _, outcomes in rows]
    about = [(consumer.name, consumer.access.value) for consumer, _ in rows]
    heads = ("access", "convert", "access", "convert")
    head, *table = _columns([("consumer", "how", *heads), *((*a, *c) for a, c in zip(about, cells, strict=True))])
    above = []
    if max(map(len, (head, *table))) > width:
        above = ["consumer, how"]
        head, *table = _columns([("  access", *heads[1:]), *((f"  {one}", *more) for one, *more in cells)])
        table = [line for (name, how), row in zip(about, table, strict=True) for line in (f"{name}, {how}", row)]
    first = head.index("access")
    designs = f"{'restructure':{head.index('access', first + 1) - first}}pfnmap"
    return [*above, f"{'':{first}}{designs}", head, *table]


def _sources(rows: list[tuple[Consumer, dict[Design, Outcome]]], width: int) -> list[str]:
    """A line for each consumer, or where that is too long its source on lines of their own."""
    head = ("consumer", "gets at memory by")
    lines = _columns([head, *((consumer.name, consumer.source) for consumer, _ in rows)])
    if max(map(len, lines)) <= width:
        return lines
    lines = [", ".join(head)]
    for consumer, _ in rows:
        file, colon, function = consumer.source.partition(":")
        whole = [f"  {file}{colon}{function}"]
        lines += [consumer.name, *(whole if len(whole[0]) <= width else (f"  {file}{colon}", f"    {function}"))]
    return lines


def _offsets(rows: list[tuple[Consumer, dict[Design, Outcome]]]) -> list[str]:
    """Where conversions failed: mostly all at the page that is held."""
    by_offset: dict[int, list[str]] = {}
    for consumer, outcomes in rows:
        for design, outcome in outcomes.items():
            if outcome.offset is not None:
                by_offset.setdefault(outcome.offset, []).append(f"{consumer.name} ({design})")
    if len(by_offset) == 1:
        return [f"Every conversion that fails does so at offset {min(by_offset):#x}."]
    return [f"Conversions that fail at offset {offset:#x}: {', '.join(who)}." for offset, who in by_offset.items()]


def _breaks(outcomes: Mapping[Design, Outcome]) -> bool:
    return outcomes["restructure"].status == 0 > outcomes["pfnmap"].status


def _summary(rows: list[tuple[Consumer, dict[Design, Outcome]]], width: int) -> list[str]:
    from pgemu.report.answers import wrapped

    broken = [consumer.name for consumer, outcomes in rows if _breaks(outcomes)]
    block = [consumer.name for consumer, outcomes in rows if outcomes["restructure"].convert]
    waits = all(outcome.again == 0 for _, outcomes in rows for outcome in outcomes.values())
    who = "The same" if block == broken else ", ".join(block) or "None"
    lines = [
        f"{len(broken)} of {len(rows)} work with restructure and not with pfnmap: {', '.join(broken)}.",
        f"{who} keep restructure from converting while they hold the page{'; not afterwards' if waits else ''}.",
    ]
    lines += _offsets(rows) + [f"{consumer.name}: {consumer.note}." for consumer, _ in rows if consumer.note]
    return [part for line in lines for part in wrapped(line, width)]


@click.command(short_help="Who uses a process's memory from within the kernel, tried on each design.")
@click.option("--page-size", type=click.Choice(list(_SIZES)), default="2M", show_default=True, help="Huge page size.")
@click.option(
    "--order", type=click.Choice(_ORDERS), default="fixup", show_default=True,
    help="Order of steps of restructure's conversion.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def consumers(page_size: str, order: str, as_json: bool) -> int:
    """Try every kind of user of a process's memory on a small machine of each design.

    Each gets at a shared page of a guest_memfd through the mapping, and while it holds the page its huge page is
    converted to private: "access" is what the user gets, "convert" what the conversion returns. GUP on VM_PFNMAP is
    -EFAULT, so with pfnmap whoever pins or references pages breaks, and nobody keeps a conversion from going through.
    What devices do through entries that nobody holds pages for: pgemu audit.
    """
    from pgemu.experiments.consumers import document, try_all
    from pgemu.report.answers import WIDTH

    size = _SIZES[page_size]
    rows = try_all(page_size=size, order=order)
    if as_json:
        about = {"page_size": size, "order": order}
        sys.stdout.write(json.dumps(about | {"consumers": document(rows)}, indent=2) + "\n")
    else:
        width = terminal_width() or WIDTH
        parts = (_table(rows, width), _summary(rows, min(width, WIDTH)), _sources(rows, width))
        sys.stdout.write("\n\n".join("\n".join(lines) for lines in parts) + "\n")
    sys.stdout.flush()
    return 0
