"""What callers give as columns, as the arrays that entries take. Needs no compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pgemu.machine.field_rules import Rule, amount, checked
from pgemu_kernels import words as W

__all__ = ("EACH", "FIELDS", "as_column", "check_fields", "column_of", "each", "integers", "unsigned")

Array = np.ndarray[Any, Any]
_WORD = np.dtype(np.uint64)
_NO_ARRAYS = (str, bytes, bytearray, dict, set, frozenset, np.ma.MaskedArray)  # though they can be gone through


def integers(values: Any) -> Array:
    """`values` as an array. NumPy makes float64 of a list with numbers below and above 2^63: it becomes uint64 here."""
    given = np.asarray(values)
    if given.dtype.kind == "f" and not isinstance(values, np.ndarray):
        exact = np.asarray(values, dtype=np.object_)
        if all(isinstance(value, int) and 0 <= value < 1 << 64 for value in exact.flat):
            return exact.astype(np.uint64)
    return given


def as_column(values: Any) -> Array | None:
    """uint64[n], C order, writeable, as entries are compiled for, of what needs no second look; None of all else."""
    if type(values) is np.ndarray:
        ready = values.dtype == _WORD and values.ndim == 1 and values.flags.carray
        return values if ready else None
    if type(values) is list and len(values) == 1 and type(values[0]) is int and 0 <= values[0] < 1 << 64:
        return np.array(values, _WORD)
    return None


def unsigned(given: Array, dtype: np.dtype[Any] = _WORD) -> Array:
    """The same of any array of integers in one dimension that `dtype`, an unsigned one, can hold."""
    column = np.ascontiguousarray(given, dtype=dtype).reshape(-1)
    return column if column.flags.carray else column.copy()  # not aligned, or only to be read


def _array(value: Any) -> Array:
    """`value` as an array; TypeError for what is no array and no sequence."""
    if isinstance(value, _NO_ARRAYS) or not hasattr(value, "__iter__"):
        raise TypeError
    if not hasattr(value, "__len__"):
        value = list(value)
    if not isinstance(value, np.ndarray | range) and any(isinstance(one, bool | np.bool_) for one in value):
        raise TypeError
    try:
        return integers(value)
    except (ValueError, OverflowError):  # rows of several lengths, numbers beyond every type
        raise TypeError from None


def _one_or_array(value: Any) -> Array:
    """The same, or of a single integer an array of one."""
    if hasattr(value, "__index__") and not isinstance(value, np.ndarray):
        return integers([FIELDS["address"].plain(value)])
    return _array(value)


def _up_to(most: int) -> Callable[[Array], bool]:
    def holds(given: Array) -> bool:
        """Whether an array is one of integers, in one dimension, none of them negative or beyond `most`."""
        if given.ndim != 1:
            return False
        if given.dtype == np.uint64 and most == (1 << 64) - 1:
            return True
        if not given.size:
            return given.dtype.kind in "uif"  # of an empty list NumPy makes floats
        return given.dtype.kind in "ui" and int(given.min()) >= 0 and int(given.max()) <= most

    return holds


def each(bits: int) -> Rule:
    """A sequence or array of integers of so many bits."""
    said = f"a sequence or array of integers, one dimension, each from 0 to 2**{bits} - 1"
    return Rule(lambda: said, _array, _up_to((1 << bits) - 1))


def _or_one(rule: Rule) -> Rule:
    """Such a sequence, or one such integer."""
    return rule._replace(expected=lambda: f"an integer, or {rule.expected()}", plain=_one_or_array)


EACH = each(64)
_COLUMNS = {size: _or_one(each(8 * size)) for size in (1, 2, 4, 8)}  # by bytes of an element


def column_of(values: Any, count: int, name: str, dtype: np.dtype[Any] = _WORD) -> Array:
    """An array of `dtype`, of uint64 if not told, with `count` elements, or with one for all.

    TypeError and ValueError, with the name, for all else.
    """
    column = None
    if dtype is _WORD:
        plain = type(values) is np.uint64 or (type(values) is int and 0 <= values < 1 << 64)
        column = np.array([values], _WORD) if plain else as_column(values)
    if column is None:
        column = unsigned(checked(name, values, {name: _COLUMNS[dtype.itemsize]}), dtype)
    if column.size not in (1, count):
        raise ValueError(f"{name} of {column.size} elements: expected {count} or 1")
    return column


FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        name: amount(0, limit - 1, f"0 to {limit - 1}")
        for name, limit in {
            "op": 256, "flags": 256, "actor": int(W.ACTORS), "vm": 1 << 16, "space": 1 << 16, "object_": 1 << 32,
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
