"""What each record of a replay returned, as Parquet: a row per record, in their order.

Columns: `index` (uint64, number of the record among those that run, from 0 on; records put before a trace's first
count, what was left out of it does not), `operation` and `result` (names, as dictionaries: what the
kernel's function returned, as pgemu.machine.results.result_name() calls it), `detail` (uint64: the level of a fault's
leaf, the failing offset of a refused conversion, ...: pgemu.machine.results.Results). Row groups have ROW_GROUP rows;
LZ4. The file's metadata has a key `pgemu.replay`, JSON: `version` of this form, `pgemu`, `trace` (its name),
`identity` (digest of the trace), `records` (how many rows), `complete` (whether these are all), `machine` (fields of
Config). Equal runs write equal files, however often they were interrupted, and on however many processes. What a record
took is not in it: machines count events and time by operation, not by record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self

import numpy as np

from pgemu.errors import InputError
from pgemu.machine.results import operation_name, result_name, status_name
from pgemu.trace.readers.parquet import parquet_file
from pgemu.trace.schema import Operation
from pgemu.whole_file import whole_file

__all__ = ("KEY", "ROW_GROUP", "VERSION", "OutcomeFile", "Rows", "RowsFile", "merged", "read_rows")

Array = np.ndarray[Any, Any]
ROW_GROUP = 1 << 18
_BLOCK = 1 << 17  # rows in which they come
KEY = b"pgemu.replay"
VERSION = 1
_LEAST, _SHIFT = -256, 12  # the first of 2^12 statuses that a table has room for
_OPERATIONS = {int(op): op for op in Operation}
_NAMED = ["unknown", *(operation_name(_OPERATIONS[code]) for code in range(1, len(_OPERATIONS) + 1))]  # by code


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Outcomes of some records: their numbers (uint64[n], ascending), operations (uint8[n]), and what they returned."""

    index: Array
    op: Array
    status: Array
    detail: Array

    def __len__(self) -> int:
        return len(self.index)

    def piece(self, first: int, end: int) -> Rows:
        """Rows [first, end); the arrays are views."""
        return Rows(*(getattr(self, field.name)[first:end] for field in fields(self)))

    @classmethod
    def concatenate(cls, pieces: Iterable[Rows]) -> Rows:
        """Rows of one piece behind the other."""
        nothing = (np.zeros(0, dtype) for dtype in (np.uint64, np.uint8, np.int64, np.uint64))
        parts = [cls(*nothing), *pieces]
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


# --------------------------------------------------------------------------- rows as numbers


class RowsFile:
    """A file of rows as numbers, while it is written, for read_rows(); it appears with the end of the context."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"index": pa.uint64(), "op": pa.uint8(), "status": pa.int64(), "detail": pa.uint64()}
        self._schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
        with ExitStack() as stack:
            file = stack.enter_context(whole_file(self._path))
            split = dict.fromkeys(kinds, "BYTE_STREAM_SPLIT")
            writer = pq.ParquetWriter(
                file, self._schema, compression="lz4", use_dictionary=False, column_encoding=split
            )
            self._parquet = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def add(self, rows: Rows) -> None:
        """Take rows that follow those before."""
        import pyarrow as pa

        columns = [pa.array(column) for column in (rows.index, rows.op, rows.status, rows.detail)]
        self._parquet.write_batch(pa.record_batch(columns, schema=self._schema))

    def finish(self, about: Mapping[str, Any]) -> None:
        """What the rows are whoever merges them knows."""


def read_rows(path: str, size: int = ROW_GROUP) -> Iterator[Rows]:
    """Yield what RowsFile wrote. InputError where it is not whole."""
    import pyarrow as pa

    try:
        with parquet_file(path) as file:
            for batch in file.iter_batches(batch_size=size, columns=["index", "op", "status", "detail"]):
                yield Rows(*(batch.column(i).to_numpy() for i in range(4)))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"rows of a run cannot be read ({' '.join(str(error).split())[:100]})", path) from None


def merged(parts: Iterable[Iterator[Rows]], records: int, window: int = ROW_GROUP) -> Iterator[Rows]:
    """Rows of several runs in the order of their indices, of which they have each of 0 to records - 1 once."""
    sources = [_Ahead(part) for part in parts]
    for first in range(0, records, window):
        end = min(first + window, records)
        columns = [np.zeros(end - first, dtype) for dtype in (np.uint8, np.int64, np.uint64)]
        found = 0
        for source in sources:
            for rows in source.below(end):
                at = (rows.index - np.uint64(first)).astype(np.intp)
                for column, values in zip(columns, (rows.op, rows.status, rows.detail), strict=True):
                    column[at] = values
                found += len(rows)
        assert found == end - first, f"{found} outcomes of {end - first} records from {first} on"
        yield Rows(np.arange(first, end, dtype=np.uint64), *columns)


class _Ahead:
    """Rows that are taken up to an index."""

    def __init__(self, rows: Iterator[Rows]) -> None:
        self._rows = rows
        self._left: Rows | None = next(rows, None)

    def below(self, end: int) -> Iterator[Rows]:
        """Yield those with an index below `end`."""
        while self._left is not None:
            cut = int(np.searchsorted(self._left.index, np.uint64(end)))
            if cut:
                yield self._left.piece(0, cut)
            if cut < len(self._left):
                self._left = self._left.piece(cut, len(self._left))
                return
            self._left = next(self._rows, None)


# --------------------------------------------------------------------------- rows with names


class _Names:
    """Names of results, a number each, by operation and status."""

    def __init__(self) -> None:
        self._table = np.full(256 << _SHIFT, -1, np.int16)
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """All that were asked for so far."""
        return list(self._numbers)

    def numbers(self, op: Array, status: Array) -> Array:
        """int16[n]: the number of each name."""
        if not status.size:
            return np.zeros(0, np.int16)
        least, most = int(status.min()), int(status.max())
        if least < _LEAST or most >= _LEAST + (1 << _SHIFT):
            return self._one_by_one(op, status)
        if least == most and (code := int(op.min())) == int(op.max()):
            return np.full(status.size, self._number(code, least), np.int16)
        keys = op.astype(np.int64)
        keys <<= _SHIFT
        keys += status
        keys -= _LEAST
        found: Array = self._table.take(keys)
        if int(found.min()) < 0:
            for key in np.unique(keys[found < 0]).tolist():
                self._table[key] = self._number(key >> _SHIFT, (key & (1 << _SHIFT) - 1) + _LEAST)
            found = self._table.take(keys)
        return found

    def _one_by_one(self, op: Array, status: Array) -> Array:
        pairs, places = np.unique(np.stack([op.astype(np.int64), status]), axis=1, return_inverse=True)
        return np.array([self._number(*pair) for pair in pairs.T.tolist()], np.int16)[places.ravel()]

    def _number(self, op: int, status: int) -> int:
        known = _OPERATIONS.get(op)
        name = status_name(None, status) if known is None else result_name(known, status)
        return self._numbers.setdefault(name, len(self._numbers))


class OutcomeFile:
    """The file of outcomes while it is written: it appears with the end of the context, unless something was raised."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._stack = ExitStack()
        self._waiting: list[Rows] = []
        self._names = _Names()
        self._count = 0  # of those that wait
        self.rows = 0

    def __enter__(self) -> Self:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = pa.dictionary(pa.int16(), pa.string())
        kinds = {"index": pa.uint64(), "operation": name, "result": name, "detail": pa.uint64()}
        self._schema = pa.schema([pa.field(column, kind, nullable=False) for column, kind in kinds.items()])
        self._operations = pa.array(_NAMED)
        with ExitStack() as stack:
            file = stack.enter_context(whole_file(self._path))
            writer = pq.ParquetWriter(
                file, self._schema, compression="lz4", use_dictionary=["operation", "result"],
                column_encoding=dict.fromkeys(("index", "detail"), "BYTE_STREAM_SPLIT"), write_statistics=["index"],
            )  # fmt: skip
            self._parquet = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def add(self, rows: Rows) -> None:
        """Take rows that follow those before."""
        self._waiting.append(rows)
        self._count += len(rows)
        self.rows += len(rows)
        while self._count >= ROW_GROUP:
            self._write(ROW_GROUP)

    def _write(self, count: int) -> None:
        """Write the first `count` waiting rows as a row group, whose pages depend on nothing but these rows."""
        import pyarrow as pa

        blocks = [self._block(min(_BLOCK, count - first)) for first in range(0, count, _BLOCK)]
        numbers = [self._names.numbers(block.op, block.status) for block in blocks]
        names = pa.array(self._names.names)  # of all blocks: with a dictionary each they would be written as plain text
        batches = []
        for block, results in zip(blocks, numbers, strict=True):
            codes = np.where(block.op < len(_NAMED), block.op, 0).astype(np.int16)
            operations = pa.DictionaryArray.from_arrays(pa.array(codes), self._operations)
            named = pa.DictionaryArray.from_arrays(pa.array(results), names)
            columns = [pa.array(block.index), operations, named, pa.array(block.detail)]
            batches.append(pa.record_batch(columns, schema=self._schema))
        self._parquet.write_table(pa.Table.from_batches(batches), row_group_size=ROW_GROUP)

    def _block(self, count: int) -> Rows:
        """Take so many rows off those that wait, which has to copy none where they came in blocks."""
        self._count -= count
        taken, found = 0, []
        while taken < count:
            rows = self._waiting.pop(0)
            if len(rows) > count - taken:
                self._waiting.insert(0, rows.piece(count - taken, len(rows)))
                rows = rows.piece(0, count - taken)
            taken += len(rows)
            found.append(rows)
        return found[0] if len(found) == 1 else Rows.concatenate(found)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write what is left, and what the file is."""
        if self._count:
            self._write(self._count)
        document = {"version": VERSION, "records": self.rows, **about}
        self._parquet.add_key_value_metadata({KEY.decode(): json.dumps(document, sort_keys=True)})
