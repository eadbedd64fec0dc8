"""Columns of a table as others write them, as a trace's: integers of any width, names as text, dictionaries of either.

Which columns there have to be is read off the operations (`Operation.columns`): `op` always; `flags`, `address`,
`offset` and `length` where an operation of the trace reads them. Others may be missing, and hold 0 then.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.trace.schema import COLUMNS, DTYPES, Flag, Operation, Records, once

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = (
    "CONTRACT",
    "LEVEL",
    "check_empty",
    "check_names",
    "check_order",
    "check_size",
    "columns_of",
    "levels_of",
    "numbers",
    "others",
    "records_of",
)

CONTRACT = (
    "op; flags, address, offset and length where an operation of the trace reads them; time, actor, vm, space and "
    "object else hold 0"
)
LEVEL = "fault_level"
"""Column of a log that told levels: of the leaf that answered each guest fault."""
_LEVEL = np.dtype(np.uint8)
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_TOLD = ("flags", "address", "offset", "length")  # none of them means something that a trace need not say
_LONGEST_CODE = 8
_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}  # of a timestamp, in ns
_TITLES = {int(op): op.name.lower().replace("_", " ") for op in Operation}
_SHOWN, _LONGEST_NAME = 60, 40  # characters of a value, of a column's name
_NAMED = 6  # columns that a note names


def check_names(names: Sequence[str], source: str) -> None:
    """Refuse a table whose columns cannot be a trace's.

    :raises InputError: no `op`, or a column twice
    """
    twice = [column for column, count in Counter(names).items() if count > 1 and (column in DTYPES or column == LEVEL)]
    if twice or "op" not in names:
        what = f"column {twice[0]!r} is there twice" if twice else "column 'op' is missing"
        raise InputError(f"{what}, expected {CONTRACT}", source)


def others(names: Sequence[str]) -> tuple[str, ...]:
    """A note of the columns that are none of a trace's, and of those that are missing."""
    unread = [printable(one)[:_LONGEST_NAME] for one in names if one not in DTYPES and one != LEVEL]
    missing = [one for one in DTYPES if one not in names]
    notes = []
    if unread:
        more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
        count = f"{len(unread)} column{'s are' if len(unread) > 1 else ' is'}"
        notes.append(f"{count} not read: {', '.join(unread[:_NAMED])}{more}")
    if missing:
        notes.append(f"columns that it does not have hold 0: {', '.join(missing)}")
    return tuple(notes)


def check_size(rows: int, source: str) -> None:
    """Refuse what would not fit into memory: a column of one value takes no room in a file."""
    need = 2 * rows * sum(dtype.itemsize for dtype in DTYPES.values())
    if need > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise InputError(
            f"{rows} records take {need >> 20} MiB of memory, more than the {memory >> 20} there are", source
        )


def check_order(times: npt.NDArray[np.uint64], last: int, source: str, first: int) -> int:
    """The time of the last record; InputError with the row where time goes back.

    :param last: time of the record before
    """
    if not times.size:
        return last
    few = once(times)
    back = few[1:] < few[:-1]
    if int(times[0]) < last or back.any():
        row = 0 if int(times[0]) < last else int(np.argmax(back)) + 1
        raise InputError(f"row {first + row}: time {times[row]} is before the row above, expected rows by time", source)
    return int(times[-1])


def levels_of(
    batch: pa.RecordBatch, source: str, first: int, held: Mapping[str, pa.Array] = _NOTHING
) -> npt.NDArray[np.uint8] | None:
    """Recorded levels of faults, None if the table has none; InputError for what is none."""
    if LEVEL not in held and LEVEL not in batch.schema.names:
        return None
    levels: npt.NDArray[np.uint8] = columns_of(batch, held, [LEVEL], source, first)[LEVEL]
    if levels.size and levels.max() > 3:
        row = int(np.argmax(levels > 3))
        raise InputError(f"row {first + row}: column {LEVEL!r} holds {levels[row]}, expected at most 3", source)
    return levels


def columns_of(
    batch: pa.RecordBatch, held: Mapping[str, pa.Array], wanted: Iterable[str], source: str, first: int
) -> dict[str, npt.NDArray[Any]]:
    """Columns of a batch as the schema's: views where nothing has to be converted, and can only be read.

    What has one value in all rows is one value that is seen as many times (schema.once).

    :param held: arrays of one, of columns that have that value in all rows and are not in the batch
    :param first: row of the batch's first, for messages
    """
    there, found = batch.schema.names, {}
    for name in wanted:
        dtype = DTYPES.get(name, _LEVEL)
        if name in there:
            found[name] = numbers(batch.column(name), name, dtype, source, first)
        else:
            one = numbers(held[name], name, dtype, source, first) if name in held else np.zeros(1, dtype)
            found[name] = np.broadcast_to(one, (batch.num_rows,))
    return found


def records_of(
    batch: pa.RecordBatch, source: str, first: int, held: Mapping[str, pa.Array] = _NOTHING
) -> Records:  # fmt: skip
    """A batch as records, checked; see columns_of.

    :raises InputError: a column that cannot be a trace's, or lacks (with its row), or a record that none can be
    """
    records = Records(**columns_of(batch, held, DTYPES, source, first))
    records.check(source, first)
    there = {*batch.schema.names, *held}
    for name in _TOLD:
        if name not in there:
            reading = np.isin(records.op, [int(op) for op, meanings in COLUMNS.items() if name in meanings])
            if reading.any():
                row = int(np.argmax(reading))
                operation = _TITLES[int(records.op[row])]
                raise InputError(f"row {first + row}: column {name!r} is missing, which {operation} reads", source)
    return records


def check_empty(batch: pa.RecordBatch, empty: Mapping[str, npt.NDArray[np.bool_]], source: str, first: int) -> None:
    """InputError with the row for a cell that is empty and that the row's operation reads.

    :param empty: bool[n] by column: which cells are
    """
    if not empty or "op" not in batch.schema.names:
        return
    ops = numbers(batch.column("op"), "op", DTYPES["op"], source, first)
    for name in (one for one in _TOLD if one in empty):  # others are 0 where they are missing, too
        cells = empty[name]
        reading = cells & np.isin(ops, [int(op) for op, meanings in COLUMNS.items() if name in meanings])
        if reading.any():
            row = int(np.argmax(reading))
            operation = _TITLES[int(ops[row])]
            raise InputError(f"row {first + row}: {operation} reads column {name!r}, expected a number", source)


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


def _code(word: str) -> int | None:
    """The code that a word is: decimal, or hexadecimal with 0x; None for a name, and for what no column holds."""
    digits = word.lower().removeprefix("0x")
    if not word.isascii() or not digits.isalnum() or len(word) > _LONGEST_CODE:
        return None
    try:
        code = int(digits, 10 if digits == word.lower() else 16)
    except ValueError:
        return None
    return code if code <= int(np.iinfo(np.uint8).max) else None


def _operation(word: str) -> int | None:
    code = _code(word.strip())
    if code is not None:
        return code
    found = Operation.__members__.get(word.strip().upper().replace(" ", "_"))
    return None if found is None else int(found)


def _flags(word: str) -> int | None:
    """Names joined by "|", none for no flag."""
    whole = _code(word.strip())
    if whole is not None:
        return whole
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
