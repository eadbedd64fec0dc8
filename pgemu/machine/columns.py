"""What callers give as columns, as the arrays that entries take. Needs no compiler."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pgemu.machine.field_rules import Rule, amount, checked
from pgemu_kernels import words as W

__all__ = ("FIELDS", "addresses_of", "check_fields", "column_of", "integers")

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
    if given.ndim > 1:
        raise ValueError(f"{what} of {given.ndim} dimensions: expected one")
    column = np.ascontiguousarray(given, dtype=np.uint64).reshape(-1)
    return column if column.flags.carray else column.copy()  # not aligned, or only to be read


def addresses_of(values: Any) -> Array:
    """uint64[n]. ValueError for what are no addresses."""
    return _unsigned(values, "addresses")


def column_of(values: Any, count: int) -> Array:
    """uint64[count], or of one element for all. ValueError for another number of elements."""
    column = _unsigned(values, "column")
    if column.size not in (1, count):
        raise ValueError(f"column of {column.size} elements: expected {count} or 1")
    return column


FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        name: amount(0, limit - 1, f"0 to {limit - 1}")
        for name, limit in {
            "operation": 256, "flags": 256, "actor": int(W.ACTORS), "vm": 1 << 16, "space": 1 << 16, "object": 1 << 32,
            "address": 1 << 64, "offset": 1 << 64, "length": 1 << 64,
        }.items()
    }
)  # fmt: skip
"""Columns of the trace schema, as an operation's arguments."""


def check_fields(*values: Any) -> tuple[int, ...]:
    """The values of an operation's columns, in the order of FIELDS, as ints.

    :raises TypeError: a value is no integer
    :raises ValueError: a value does not fit its column
    """
    return tuple(checked(name, value, FIELDS) for name, value in zip(FIELDS, values, strict=True))
