"""What an operation returned."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """As pgemu.Result."""

    status: int
    detail: int = 0


OK = Outcome(0)
