"""What callers give as columns, as the arrays that entries take. Needs no compiler."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels import words as W

__all__ = ("addresses_of", "check_fields", "column_of", "integers")

Array = np.ndarray[Any, Any]
_WORD = np.dtype(np.uint64)


def integers(values: Any) -> Array:
    """`values` as an array. NumPy makes float64 of a list with numbers below and above 2^63: it becomes uint64 here."""
    given = np.asarray(values)
    if given.dtype.kind == "f" and not isinstance(values, np.ndarray):
        exact = np.asarray(values, dtype=np.object_)
        if all(isinstance(value, int) and 0 <= value < 1 << 64 for value in exact.flat):
            return exact.astype(np.uint64)
    return given


def _unsigned(values: Any, what: str) -> Array:
    """uint64[n], C order, writeable, as entries are compiled for. ValueError for what are no numbers of that kind."""
    if type(values) is np.ndarray and values.dtype == _WORD and values.ndim == 1 and values.flags.carray:
        return values
    if type(values) is list and len(values) == 1 and type(values[0]) is int and 0 <= values[0] < 1 << 64:
        return np.array(values, _WORD)
    given = integers(values)
    if given.size and (given.dtype.kind not in "ui" or (given.dtype.kind == "i" and given.min() < 0)):
        raise ValueError(f"{what} of {given.dtype}: expected integers that are not negative")
    column = np.ascontiguousarray(given, dtype=np.uint64).reshape(-1)
    return column if column.flags.writeable else column.copy()


def addresses_of(values: Any) -> Array:
    """uint64[n]. ValueError for what are no addresses."""
    return _unsigned(values, "addresses")


def column_of(values: Any, count: int) -> Array:
    """uint64[count], or of one element for all. ValueError for another number of elements."""
    column = _unsigned(values, "column")
    if column.size not in (1, count):
        raise ValueError(f"column of {column.size} elements: expected {count} or 1")
    return column


def check_fields(
    op: int, flags: int, actor: int, vm: int, space: int, object_: int, address: int, offset: int, length: int
) -> None:
    """ValueError where a value does not fit its column of the trace schema, TypeError where it is no number."""
    limits: dict[str, tuple[Any, int]] = {
        "operation": (op, 256), "flags": (flags, 256), "actor": (actor, W.ACTORS), "vm": (vm, 1 << 16),
        "space": (space, 1 << 16), "object": (object_, 1 << 32), "address": (address, 1 << 64),
        "offset": (offset, 1 << 64), "length": (length, 1 << 64),
    }  # fmt: skip
    for name, (value, limit) in limits.items():
        if isinstance(value, float) and not value.is_integer():  # would be cut off, and nobody told
            raise ValueError(f"{name} {value!r}: expected an integer from 0 to {limit - 1}")
        if not isinstance(value, float) and not hasattr(value, "__index__"):
            raise TypeError(f"{name} {value!r} ({type(value).__name__}): expected an integer from 0 to {limit - 1}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} {value}: expected 0 to {limit - 1}")
