"""Rows of objects in a machine's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu_kernels import words as W

if TYPE_CHECKING:
    import numpy as np

    from pgemu.objects.machine import Machine


def next_row(machine: Machine, counter: np.uint64, limit: int, what: str) -> int:
    """The next unused row number of a kind. OSError ENOSPC past `limit`."""
    number = machine.register(counter)
    if number >= limit:
        raise OSError(W.ENOSPC, f"more than {limit} {what}")
    return number
