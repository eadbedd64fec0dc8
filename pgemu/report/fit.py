"""Tables that fit a width without cutting a number or breaking a name: words wrap, and nothing is broken inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

__all__ = ("fit", "show")

_BETWEEN = 2  # blanks between two columns, in every table here


def show(console: Console, block: Any) -> None:
    """Print a block: tables as wide as the console, or wider where their numbers and names are."""
    narrow = console.width
    console.width = max(narrow, *(fit(table, narrow) for table in _tables(block)), 0)
    try:
        console.print(block)
    finally:
        console.width = narrow


def _tables(block: Any) -> Iterator[Table]:
    if isinstance(block, Table):
        yield block
    elif isinstance(block, Group):
        for part in block.renderables:
            yield from _tables(part)


def fit(table: Table, width: int) -> int:
    """Set the columns' widths, and return the table's.

    A column that does not wrap is as wide as its cells, of another the longest word is whole; but for lists of facts,
    whose values are paths of any length. What is left goes to whoever has the most text for its width.
    """
    room = width - _BETWEEN * (len(table.columns) - 1)
    texts = [[_plain(cell) for cell in (*([column.header] if table.show_header else []), *column.cells)]
             for column in table.columns]  # fmt: skip
    most = [max(map(len, cells), default=0) for cells in texts]
    least = [
        whole if column.no_wrap else _longest_word(cells)
        for column, cells, whole in zip(table.columns, texts, most, strict=True)
    ]
    if not table.show_header and sum(least) > room:
        least[-1] = max(room - sum(least[:-1]), 20)
    widths = [max(one, 1) for one in least]
    for _ in range(room - sum(widths)):
        wanting = [i for i, column in enumerate(table.columns) if not column.no_wrap and widths[i] < most[i]]
        if not wanting:
            break
        widths[max(wanting, key=lambda i: most[i] / widths[i])] += 1
    for column, one in zip(table.columns, widths, strict=True):
        _set(column, one)
    return sum(widths) + width - room


def _set(column: Column, width: int) -> None:
    column.width = column.min_width = width


def _plain(cell: Any) -> str:
    """A cell without styles."""
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _longest_word(cells: list[str]) -> int:
    return max((len(word) for cell in cells for word in cell.split()), default=0)
