"""Two machines that must have come to the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu.objects.machine import Machine
from pgemu_kernels import words as W


def arrays(machine: Machine) -> dict[str, np.ndarray[Any, Any]]:
    """The machine's arrays, less the operation records: several ways use different ones."""
    found = dict(machine.arrays._asdict())
    state = found["state"].copy()
    state[int(W.STATE_OPS) : int(W.STATE_INODES)] = 0
    return found | {"state": state}


def assert_same(one: Machine, other: Machine) -> None:
    theirs = arrays(other)
    for name, array in arrays(one).items():
        assert np.array_equal(array, theirs[name]), name
