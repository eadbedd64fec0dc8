"""Two machines that must have come to the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu.objects.machine import Machine
from pgemu_kernels import words as W

PAGE = 4096
SMALL = 1 << 20  # bytes: what is compared as a whole

Array = np.ndarray[Any, Any]


def arrays(machine: Machine) -> dict[str, Array]:
    """The machine's arrays (views), less the operation records: several ways use different ones."""
    found = dict(machine.arrays._asdict())
    state = found.pop("state")
    return found | {"state": state[: int(W.STATE_OPS)], "rows": state[int(W.STATE_INODES) :]}


def assert_same(one: Machine, other: Machine) -> None:
    theirs = arrays(other)
    for name, array in arrays(one).items():
        assert same(array, theirs[name]), name


def same(one: Array, other: Array) -> bool:
    """Whether two arrays are equal. Pages of 4K that nobody touched are zero: reading them costs a fault each."""
    if one.nbytes < SMALL or one.shape != other.shape or one.dtype != other.dtype:
        return np.array_equal(one, other)
    whole = one.size - one.size % (PAGE // one.itemsize)
    pages = np.flatnonzero(touched(one[:whole]) | touched(other[:whole]))
    first, second = (array[:whole].reshape(-1, PAGE // array.itemsize) for array in (one, other))
    return np.array_equal(first[pages], second[pages]) and np.array_equal(one[whole:], other[whole:])


def touched(array: Array) -> Array:
    """bool[n]: whether a process has a page, or had one that was swapped out, under each 4K of an array."""
    first, last = array.ctypes.data // PAGE, (array.ctypes.data + array.nbytes - 1) // PAGE
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(8 * first)
            words = np.frombuffer(file.read(8 * (last - first + 1)), np.uint64)
    except OSError:
        words = np.zeros(0, np.uint64)
    count = array.nbytes // PAGE
    if len(words) != last - first + 1:  # not Linux, or not all was told
        return np.ones(count, np.bool_)
    known = words >> np.uint64(62) != 0
    return known[:count] | known[-count:]  # arrays need not begin where a page does
