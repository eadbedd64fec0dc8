"""How objects show themselves in a line: columns by their ends, results by their counts, fields that were changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import IntEnum
from html import escape
from itertools import islice
from typing import Any

import numpy as np

__all__ = ("changed", "column", "counted", "html_table", "html_walks", "walks")

_MOST = 4  # kinds that are named one by one
_ROWS = 20  # of a table in a notebook


def column(values: Any) -> str:
    """An array in a line, of a long one both ends: "[1 1 2 ... 3 3 3]"."""
    text = np.array2string(np.asarray(values), threshold=6, edgeitems=3, max_line_width=1 << 20)
    return " ".join(text.split())


def counted(counts: Mapping[str, int]) -> str:
    """How many of what, the most frequent first: "13,872 RET_PF_FIXED, 2,953 RET_PF_SPURIOUS"; "none"."""
    ordered = sorted(counts.items(), key=lambda one: -one[1])
    parts = [f"{n:,} {name}" for name, n in ordered[:_MOST]]
    if rest := sum(n for _, n in ordered[_MOST:]):
        parts.append(f"{rest:,} others")
    return ", ".join(parts) or "none"


def walks(batch: Any, statuses: type[IntEnum]) -> str:
    """A batch of translations by what they ended in, and where the first ones led."""
    codes, counts = np.unique(batch.status, return_counts=True)
    names = {statuses(code).name: n for code, n in zip(codes.tolist(), counts.tolist(), strict=True)}
    physical = [hex(address) for address in batch.physical[:3].tolist()] + ["..."] * (batch.physical.size > 3)
    return f"{type(batch).__name__}({batch.status.size:,}: {counted(names)}; physical=[{' '.join(physical)}])"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], total: int | None = None) -> str:
    """A table as a notebook shows it, of many rows the first ones and how many there are in all (`total`)."""
    shown = list(islice(rows, _ROWS))
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in shown]
    more = "" if total is None or total <= len(shown) else f"<p>{len(shown)} of {total:,}</p>"
    return f"<table>{''.join(lines)}</table>{more}"


def html_walks(batch: Any, statuses: type[IntEnum], levels: Mapping[str, Any]) -> str:
    """The same of a batch of translations: status, where it led, and `levels`, arrays by their heads."""
    rows = (
        (
            i,
            statuses(int(batch.status[i])).name,
            hex(int(batch.physical[i])),
            *(int(all_[i]) for all_ in levels.values()),
        )
        for i in range(batch.status.size)
    )
    return html_table(("", "status", "physical", *levels), rows, batch.status.size)


def changed(instance: Any) -> str:
    """A dataclass with the fields that are not as by default, as it can be written."""
    parts = []
    for field in fields(instance):
        value = getattr(instance, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is MISSING or value != default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(parts)})"
