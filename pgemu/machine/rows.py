"""Rows of objects in a machine's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def memslot_rows(core: Core) -> np.ndarray[Any, Any]:
    """The rows of memory slots that are or were in use, uint64[n, M_WORDS]: a view."""
    used = core.register(W.R_MEMSLOTS)
    return core.arrays.state[int(W.STATE_MEMSLOTS) :][: used * W.M_WORDS].reshape(-1, W.M_WORDS)
