"""Two machines that must have come to the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu.machine import Machine
from pgemu_kernels import layout as L


def arrays(machine: Machine) -> dict[str, np.ndarray[Any, Any]]:
    """The machine's arrays, less the operation records: several ways use different ones."""
    found = dict(machine.arrays._asdict())
    state = found["state"].copy()
    state[int(L.STATE_OPS) : int(L.STATE_INODES)] = 0
    return found | {"state": state}


def assert_same(one: Machine, other: Machine) -> None:
    theirs = arrays(other)
    for name, array in arrays(one).items():
        assert np.array_equal(array, theirs[name]), name
