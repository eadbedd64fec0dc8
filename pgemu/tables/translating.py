"""The way to translations for objects that most runs never translate with: its module is loaded at the first one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgemu.tables.translation import Translation

__all__ = ("translator",)


@cache
def translator() -> Callable[..., Translation]:
    """pgemu.tables.translation.translated; an import at each call would take as long as half of the call."""
    from pgemu.tables.translation import translated

    return translated
