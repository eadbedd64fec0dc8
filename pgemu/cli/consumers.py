"""`pgemu consumers`: which users of a process's memory work with each design, and what they do to conversions."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import rich_click as click

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

    where = "" if outcome.offset is None else f" at {outcome.offset:#x}"
    return error(outcome.status), error(outcome.convert) + where


def _table(rows: list[tuple[Consumer, dict[Design, Outcome]]]) -> list[str]:
    lines: list[tuple[str, ...]] = [
        ("", "", "restructure", "", "pfnmap", "", ""),
        ("consumer", "how", "access", "convert", "access", "convert", "source"),
    ]
    for consumer, outcomes in rows:
        cells = [cell for outcome in outcomes.values() for cell in _cells(outcome)]
        lines.append((consumer.name, consumer.access.value, *cells, consumer.source))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _breaks(outcomes: Mapping[Design, Outcome]) -> bool:
    return outcomes["restructure"].status == 0 > outcomes["pfnmap"].status


def _summary(rows: list[tuple[Consumer, dict[Design, Outcome]]]) -> list[str]:
    broken = [consumer.name for consumer, outcomes in rows if _breaks(outcomes)]
    block = [consumer.name for consumer, outcomes in rows if outcomes["restructure"].convert]
    waits = all(outcome.again == 0 for _, outcomes in rows for outcome in outcomes.values())
    who = "The same" if block == broken else ", ".join(block) or "None"
    lines = [
        f"{len(broken)} of {len(rows)} work with restructure and not with pfnmap: {', '.join(broken)}.",
        f"{who} keep restructure from converting while they hold the page{'; not afterwards' if waits else ''}.",
    ]
    return lines + [f"{consumer.name}: {consumer.note}." for consumer, _ in rows if consumer.note]


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
    converted to private: "access" is what the user gets, "convert" what the conversion returns, with the failing
    offset. GUP on VM_PFNMAP is -EFAULT, so with pfnmap whoever pins or references pages breaks, and nobody keeps a
    conversion from going through. Devices are not modelled here: of VFIO and iommufd only the pin decides.
    """
    from pgemu.experiments.consumers import document, try_all

    size = _SIZES[page_size]
    rows = try_all(page_size=size, order=order)
    if as_json:
        about = {"page_size": size, "order": order}
        sys.stdout.write(json.dumps(about | {"consumers": document(rows)}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join([*_table(rows), "", *_summary(rows)]) + "\n")
    sys.stdout.flush()
    return 0
