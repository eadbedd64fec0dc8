"""Tables as text: a header with names of the schema's columns, separated by commas, semicolons or tabs.

What the columns may hold is pgemu.trace.columns' to say, as of Parquet; numbers are decimal or hexadecimal with 0x,
times also timestamps of ISO 8601. A row is a line: quotes do not span lines.

pyarrow is imported inside the functions, so that only those who load a table pay for it.
"""

from __future__ import annotations

import csv
import io
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.columns import LEVEL, check_empty, check_names, check_order, check_size, levels_of, others, records_of
from pgemu.trace.schema import DTYPES, Records
from pgemu.trace.source import LONGEST_LINE, Match, Source
from pgemu.trace.unplaced import Unplaced

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"csv": "a table as text (CSV)"}

_SEPARATORS = ",;\t"
_NAMED = ("op", "flags")  # columns whose numbers have names
_HEAD = 4096  # bytes in which a header ends
_ROW = re.compile(r"row (\d+): ")
_SHOWN = 60


def sniff(head: bytes) -> Match:
    """A first line of several names of columns, one of them `op`."""
    first = head[:_HEAD].partition(b"\n")[0]
    if b"\0" in first:
        return Match.NO
    names = _header(first.decode("utf-8", "replace"))[0]
    return Match.SURE if "op" in names and len(names) > 1 else Match.NO


def _header(line: str) -> tuple[list[str], str]:
    """The names of a header and what separates them: whichever makes most of them."""
    line = line.rstrip("\r\n")
    found: list[tuple[list[str], str]] = []
    for separator in _SEPARATORS:
        try:
            names = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:
            continue
        found.append(([name.strip() for name in names], separator))
    return max(found, key=lambda one: ("op" in one[0], len(one[0])), default=([], ","))


def read(source: Source, form: str | None = None) -> Unplaced:
    """Load a table.

    :raises InputError: no header, a column that cannot be a trace's or lacks, a row of other columns than the header,
        a value that is none (with its line), or more than fits into memory
    """
    stream = _Stream(source)
    names, separator = _header(stream.header())
    try:
        check_names(names, source.name)
        pieces = [] if stream.is_empty() else list(_Table(source.name, names, separator, stream).batches())
    finally:
        source.close()
    records = Records.concatenate(records for records, _ in pieces)
    told = [levels for _, levels in pieces if levels is not None]
    return Unplaced(records, source.name, np.concatenate(told) if told else None, others(names))


class _Stream(io.RawIOBase):
    """The rows of a source as a file, as pyarrow wants it: lines that are not blank.

    Attributes:
        blank: of each blank line, how many rows are before it
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.blank: list[int] = []
        self._name = source.name
        self._blocks = source.byte_blocks()
        self._rows = 0
        self._rest = memoryview(b"")

    def header(self) -> str:
        """Take the first line."""
        line, _, rest = next(self._blocks, b"").partition(b"\n")
        self._rest = memoryview(self._rows_of(rest))
        return line.decode("utf-8", "replace")

    def is_empty(self) -> bool:
        """Whether there are no rows."""
        return not self._ahead()

    def line(self, row: int) -> int:
        """The line of a row that is counted from 0."""
        return row + 2 + bisect_right(self.blank, row)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as what was read reaches."""
        rest = self._ahead()
        size = min(len(buffer), len(rest))
        buffer[:size] = rest[:size]
        self._rest = rest[size:]
        return size

    def _ahead(self) -> memoryview:
        while not self._rest and (block := next(self._blocks, b"")):
            self._rest = memoryview(self._rows_of(block))
        return self._rest

    def _rows_of(self, block: bytes) -> bytes:
        """A block without its blank lines; each row has to be a line."""
        block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        if block[:1] == b"\n" or b"\n\n" in block:
            kept: list[bytes] = []
            for line in block.splitlines(keepends=True):
                if line == b"\n":
                    self.blank.append(self._rows + len(kept))
                else:
                    kept.append(line)
            block = b"".join(kept)
        if b"\r" in block or b'"' in block or not block.isascii():
            for number, line in enumerate(block.split(b"\n")):
                if wrong := _wrong(line):
                    shown = line.decode("utf-8", "replace")[:_SHOWN]
                    raise InputError(f"{wrong}: {shown!r}", self._name, self.line(self._rows + number))
        self._rows += block.count(b"\n")
        return block


def _wrong(line: bytes) -> str:
    """Why a line can be no row, nothing if it can."""
    if b"\r" in line or line.count(b'"') % 2:
        what = "a carriage return" if b"\r" in line else "a quote that does not end"
        return f"{what} in a line, expected each row in a line of its own"
    try:
        line.decode()
    except UnicodeDecodeError:
        return "text that is not in UTF-8"
    return ""


class _Table:
    """A table while it is read."""

    def __init__(self, source: str, names: Sequence[str], separator: str, stream: _Stream) -> None:
        self._source = source
        self._names = names
        self._separator = separator
        self._stream = stream
        self._wrong: tuple[int, str] | None = None  # line of other columns, and how many it has

    def batches(self) -> Iterator[tuple[Records, Any]]:
        """Records and recorded levels, checked."""
        import pyarrow as pa
        from pyarrow import csv as arrow

        known = [name for name in self._names if name in DTYPES or name == LEVEL]
        # Columns of names that are not read may be there twice, or have none.
        columns = [name if name in known else f"\0{number}" for number, name in enumerate(self._names)]
        first = last = 0
        try:
            reader = arrow.open_csv(
                self._stream,
                arrow.ReadOptions(use_threads=False, block_size=4 * LONGEST_LINE, column_names=columns),
                arrow.ParseOptions(
                    delimiter=self._separator, ignore_empty_lines=False, invalid_row_handler=self._other_row
                ),
                arrow.ConvertOptions(
                    include_columns=known, column_types=dict.fromkeys(known, pa.string()), strings_can_be_null=False
                ),
            )
            for batch in reader:
                found = self._checked(batch, first, last)
                first += len(found[0])
                check_size(first, self._source)
                last = int(found[0].time[-1]) if len(found[0]) else last
                yield found
        except pa.ArrowException as error:
            if self._wrong is not None:
                raise InputError(self._wrong[1], self._source, self._wrong[0]) from None
            text = " ".join(str(error).split())
            raise InputError(f"not a table ({text[:200]})", self._source) from None
        if self._wrong is not None:
            raise InputError(self._wrong[1], self._source, self._wrong[0])

    def _other_row(self, row: Any) -> str:
        """A row of other columns than the header ends the reading."""
        if self._wrong is None:
            line = self._stream.line(row.number - 1)  # which is counted from 1
            counts = f"{row.actual_columns} column{'s' * (row.actual_columns != 1)}, expected {row.expected_columns}"
            self._wrong = line, f"{counts} as in the header: {row.text[:_SHOWN]!r}"
        return "error"

    def _checked(self, batch: pa.RecordBatch, first: int, last: int) -> tuple[Records, Any]:
        import pyarrow as pa

        try:
            empty: dict[str, Any] = {}
            arrays = [
                self._numbers(batch.column(number), name, empty) for number, name in enumerate(batch.schema.names)
            ]
            made = pa.RecordBatch.from_arrays(arrays, batch.schema.names)
            check_empty(made, empty, self._source, first)
            found = records_of(made, self._source, first), levels_of(made, self._source, first)
            check_order(found[0].time, last, self._source, first)
        except _CellError as error:
            raise InputError(error.args[0], self._source, self._stream.line(first + error.args[1])) from None
        except InputError as error:
            match = _ROW.match(error.what)
            if match is None:
                raise
            raise InputError(error.what[match.end() :], self._source, self._stream.line(int(match[1]))) from None
        return found

    def _numbers(self, column: pa.Array, name: str, empty: dict[str, Any]) -> pa.Array:
        """A column of text as what pgemu.trace.columns takes: numbers, times, or names.

        :param empty: gets which cells are empty, by column; they are 0, as in a column that is not there
        """
        import pyarrow as pa
        from pyarrow import compute

        column = compute.utf8_trim_whitespace(column)
        if name in _NAMED:
            return column
        try:
            return column.cast(pa.uint64())
        except pa.ArrowInvalid:
            pass
        if name == "time":
            try:
                return column.cast(pa.timestamp("ns"))
            except pa.ArrowInvalid:
                pass
        cells = compute.equal(column, "")
        if name != "time" and compute.any(cells).as_py():
            empty[name] = np.asarray(cells)
            return self._numbers(compute.if_else(cells, "0", column), name, empty)
        values = column.to_pylist()
        row = next(number for number, value in enumerate(values) if not _is_number(value))
        what = f"column {name!r} holds {values[row][:_SHOWN]!r}"
        raise _CellError(f"{what}, expected a number of 64 bits, decimal or hexadecimal with 0x", row)


class _CellError(Exception):
    """A value that is none, and its row in the batch."""


def _is_number(value: str) -> bool:
    """Whether a value is a number as the library reads it."""
    import pyarrow as pa

    try:
        pa.array([value]).cast(pa.uint64())
    except pa.ArrowInvalid:
        return False
    return True
