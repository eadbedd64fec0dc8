"""Rows of objects in a machine's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu_kernels import words as W

if TYPE_CHECKING:
    import numpy as np

    from pgemu.machine.core import Core


def next_row(core: Core, counter: np.uint64, limit: int, what: str) -> int:
    """The next unused row number of a kind. OSError ENOSPC past `limit`."""
    number = core.register(counter)
    if number >= limit:
        raise OSError(W.ENOSPC, f"more than {limit} {what}")
    return number
