"""Columns of a table as others write them, as a trace's: integers of any width, names as text, dictionaries of either.

Which columns there have to be is read off the operations (`Operation.columns`): `op` always; `flags`, `address`,
`offset` and `length` where an operation of the trace reads them. Others may be missing, and hold 0 then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.trace.schema import COLUMNS, DTYPES, Flag, Operation, Records

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("CONTRACT", "numbers", "records_of")

CONTRACT = (
    "op; flags, address, offset and length where an operation of the trace reads them; time, actor, vm, space and "
    "object else hold 0"
)
_TOLD = ("flags", "address", "offset", "length")  # none of them means something that a trace need not say
_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}  # of a timestamp, in ns
_TITLES = {int(op): op.name.lower().replace("_", " ") for op in Operation}
_SHOWN = 60


def records_of(batch: pa.RecordBatch, source: str, first: int) -> Records:
    """A batch as records, checked; columns that need no conversion are views of it, and can only be read.

    :param first: row of the batch's first, for messages
    :raises InputError: a column that cannot be a trace's, or lacks (with its row), or a record that none can be
    """
    there = set(batch.schema.names)
    columns = {
        name: numbers(batch.column(name), name, dtype, source, first) for name, dtype in DTYPES.items() if name in there
    }
    lacking = {name: np.zeros(batch.num_rows, dtype) for name, dtype in DTYPES.items() if name not in there}
    records = Records(**columns, **lacking)
    records.check(source, first)
    for name in _TOLD:
        if name not in there:
            reading = np.isin(records.op, [int(op) for op, meanings in COLUMNS.items() if name in meanings])
            if reading.any():
                row = int(np.argmax(reading))
                operation = _TITLES[int(records.op[row])]
                raise InputError(f"column {name!r} is missing, which {operation} of row {first + row} reads", source)
    return records


def numbers(column: pa.Array, name: str, dtype: np.dtype[Any], source: str, first: int) -> npt.NDArray[Any]:
    """A column as numbers of the schema's type.

    :raises InputError: of another kind, a null value, or a value that the type does not hold (with its row)
    """
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        row = int(np.argmax(np.asarray(column.is_null())))
        raise InputError(f"row {first + row}: column {name!r} has a null value, expected none", source)
    is_text = any(is_(column.type) for is_ in (kinds.is_string, kinds.is_large_string, kinds.is_string_view))
    if is_text and name in _NAMES:
        return _named(column, name, dtype, source, first)
    if name == "time" and (kinds.is_timestamp(column.type) or kinds.is_duration(column.type)):
        return _nanoseconds(column, dtype, source, first)
    if not kinds.is_integer(column.type):
        expected = "integers or names" if name in _NAMES else "integers"
        raise InputError(f"column {name!r} holds {printable(str(column.type))[:_SHOWN]}, expected {expected}", source)
    found: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if found.dtype != dtype:
        most = int(np.iinfo(dtype).max)
        beyond = (found < 0) | (found > most)
        if beyond.any():
            row = int(np.argmax(beyond))
            raise InputError(f"row {first + row}: column {name!r} holds {found[row]}, expected 0 to {most}", source)
    return found.astype(dtype, copy=False)


def _nanoseconds(column: pa.Array, dtype: np.dtype[Any], source: str, first: int) -> npt.NDArray[Any]:
    """Timestamps or durations as nanoseconds, exactly: of a timestamp those since 1970."""
    import pyarrow as pa

    unit = _UNITS[column.type.unit]
    found: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    beyond = (found < 0) | (found > int(np.iinfo(dtype).max) // unit)
    if beyond.any():
        row = int(np.argmax(beyond))
        what = f"{found[row]} {column.type.unit}"
        raise InputError(f"row {first + row}: column 'time' holds {what}, expected 0 to 2^64 - 1 ns", source)
    times: npt.NDArray[Any] = found.astype(dtype) * dtype.type(unit)
    return times


def _named(column: pa.Array, name: str, dtype: np.dtype[Any], source: str, first: int) -> npt.NDArray[Any]:
    """A column of names as their codes; each name is looked up once."""
    import pyarrow as pa

    encoded = column.cast(pa.large_string()).dictionary_encode()
    words, places = encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)
    codes = [_NAMES[name](word) for word in words]
    if None in codes:
        which = codes.index(None)
        row = first + int(np.argmax(places == which))
        raise InputError(
            f"row {row}: column {name!r} holds {words[which][:_SHOWN]!r}, expected {_EXPECTED[name]}", source
        )
    return np.array(codes, dtype)[places] if words else np.zeros(0, dtype)


def _operation(word: str) -> int | None:
    found = Operation.__members__.get(word.strip().upper().replace(" ", "_"))
    return None if found is None else int(found)


def _flags(word: str) -> int | None:
    """Names joined by "|", none for no flag."""
    code = 0
    for part in word.split("|") if word.strip() else ():
        found = Flag.__members__.get(part.strip().upper())
        if found is None:
            return None
        code |= int(found)
    return code


_NAMES: Mapping[str, Callable[[str], int | None]] = {"op": _operation, "flags": _flags}
"""Columns whose numbers have names."""
_EXPECTED = {
    "op": f"names of operations, {', '.join(list(_TITLES.values())[:9])}, ... (pgemu.trace.COLUMNS has them all)",
    "flags": f"names of flags, joined by |: {', '.join(name for name in Flag.__members__)}",
}
