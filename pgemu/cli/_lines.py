"""Lines for a terminal that is narrower than they are; in a pipe each stays one, for whoever looks for words."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator

__all__ = ("folded", "terminal_width")

_PIECES = re.compile(r"[^\s|]*(?:\||\s+|$)")
_INDENT = 6


def terminal_width() -> int | None:
    """Columns of the terminal that is written to, or as COLUMNS says; None in a pipe."""
    return shutil.get_terminal_size((0, 0)).columns or None


def folded(lines: Iterable[str], width: int | None = None) -> Iterator[str]:
    """Return lines of at most `width` columns: the rest goes on, indented, behind a blank or a "|" of flags.

    :param width: terminal_width() without it; what has no such place is never broken
    """
    width = width or terminal_width()
    for line in lines:
        if width is None or len(line) <= width:
            yield line
            continue
        blanks = len(line) - len(line.lstrip())
        found = line[:blanks]
        for piece in _PIECES.findall(line[blanks:]):
            if found.strip() and len((found + piece).rstrip()) > width:
                yield found.rstrip()
                found = " " * min(blanks + _INDENT, width // 2)
            found += piece
        yield found.rstrip()
