"""Traces as Parquet: zstd, row groups of about a million records, and the memory layout in the file's metadata.

Files of others (polars, pandas, ...) need only the schema's columns, as pgemu.trace.columns says; of what has no layout
pgemu.trace.unplaced says where it lies.

pyarrow is imported inside the functions, so that only those who store or load a trace pay for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.machine.field_rules import checked
from pgemu.trace.columns import CONTRACT, numbers, records_of
from pgemu.trace.log import Doubt
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import Layout
from pgemu.trace.schema import DTYPES, Operation, Records
from pgemu.trace.source import Match, Source
from pgemu.trace.unplaced import Unplaced
from pgemu.trace.watching import tell
from pgemu.whole_file import whole_file

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = ("FORMATS", "ROW_GROUP", "Glance", "glance", "iterate", "narrow", "read", "sniff", "write")

FORMATS = {"parquet": "Parquet"}

ROW_GROUP = 1 << 20
_MAGIC = b"PAR1"
# Of columns whose values hardly come twice: a dictionary of them takes longer to read than to do without.
_DELTAS = {"time": "DELTA_BINARY_PACKED", "address": "DELTA_BINARY_PACKED"}
_LEVEL = "fault_level"  # of a log that told levels
_KEY = b"pgemu"
_VERSION = 1
_LONGEST, _LONGEST_NAME = 200, 40  # of a message, of a column's name
_SHOWN = 6  # columns that a note names


def write(lowered: Lowered, path: str | os.PathLike[str], batches: Iterable[Records] | None = None) -> None:
    """Store a trace; the file appears whole or not at all.

    :param batches: records to store instead of `lowered.records`, taken one at a time
    :raises InputError: the file cannot be written
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = os.fspath(path)
    about = {
        "version": _VERSION,
        "layout": lowered.layout.to_json(),
        "init": lowered.init,
        "setup": lowered.accounting.setup,
        "source": lowered.source,
        "accesses": lowered.accesses,
        "machine": dict(lowered.machine),
        "notes": list(lowered.notes),
        "doubts": [list(doubt) for doubt in lowered.doubts],
    }
    levels = lowered.fault_levels if batches is None else None
    columns = DTYPES if levels is None else {**DTYPES, _LEVEL: np.dtype(np.uint8)}
    schema = pa.schema(
        [pa.field(column, pa.from_numpy_dtype(dtype), nullable=False) for column, dtype in columns.items()],
        metadata={_KEY: json.dumps(about).encode()},
    )
    try:
        encoded: dict[str, Any] = {"use_dictionary": list(set(columns) - _DELTAS.keys()), "column_encoding": _DELTAS}
        with whole_file(name) as file, pq.ParquetWriter(file, schema, compression="zstd", **encoded) as writer:
            for records in (lowered.records,) if batches is None else batches:
                for first in range(0, len(records), ROW_GROUP):
                    piece = records[first : first + ROW_GROUP]
                    arrays = [pa.array(getattr(piece, column)) for column in DTYPES]
                    if levels is not None:
                        arrays.append(pa.array(levels[first : first + ROW_GROUP]))
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", name) from None


class Glance(NamedTuple):
    """What a stored trace tells without its records.

    Attributes:
        lowered: the trace, with no records; whether it converts nobody has looked
        records: how many there are
        fingerprint: of the file's footer, which has the size and the extremes of every column of every row group
    """

    lowered: Lowered
    records: int
    fingerprint: str


def glance(path: str | os.PathLike[str]) -> Glance | None:
    """What a trace that `write` stored tells without its records; None of another file of Parquet.

    :raises InputError: as `read`
    """
    name = os.fspath(path)
    with _open(name) as file:
        about, rows = _about(file, name), file.metadata.num_rows
        if about is None:
            return None
        if about["setup"] > rows:
            raise InputError(f"setup of {about['setup']} records, the trace has {rows}", name)
        lowered = _lowered(about, Records.build(0), rows, name, _others(file))
        return Glance(lowered, rows, _fingerprint(file, name))


def _fingerprint(file: pq.ParquetFile, name: str) -> str:
    size = file.metadata.serialized_size
    with open(name, "rb") as raw:
        raw.seek(-min(size + 8, os.path.getsize(name)), os.SEEK_END)
        return hashlib.sha256(raw.read()).hexdigest()[:32]


def narrow(path: str | os.PathLike[str], columns: Iterable[str], batch: int = ROW_GROUP) -> Iterator[dict[str, Any]]:
    """Yield some columns of a stored trace, in batches: arrays by name, zeroes of what it does not have.

    :raises InputError: as `iterate`, of these columns
    """
    name = os.fspath(path)
    wanted = list(columns)
    with _open(name) as file:
        there = [column for column in wanted if column in file.schema_arrow.names]
        pieces = file.iter_batches(batch_size=batch, columns=there, use_threads=False)
        first = 0
        while True:
            with _damage(name, "damaged"):
                piece = next(pieces, None)
            if piece is None:
                return
            with _damage(name, "damaged"):
                found = {one: numbers(piece.column(one), one, DTYPES[one], name, first) for one in there}
            first += piece.num_rows
            tell(first, file.metadata.num_rows)
            yield {one: found.get(one, np.zeros(piece.num_rows, DTYPES[one])) for one in wanted}


def iterate(path: str | os.PathLike[str], batch: int = ROW_GROUP, first: int = 0) -> Iterator[Records]:
    """Yield a stored trace in batches of at most `batch` records, from record `first` on, checked.

    Their arrays can only be read. Who runs them has a core for that: they are decoded by one thread, the caller's.

    :raises InputError: not Parquet, a column that cannot be a trace's or is missing, or a record that none can be (with
        its row)
    """
    name = os.fspath(path)
    with _open(name) as file:
        yield from (records for records, _ in _batches(file, name, batch, first))


def _row_groups(file: pq.ParquetFile, first: int) -> tuple[list[int], int]:
    """The row groups that hold record `first` and those behind it, and the first record of these."""
    begin, groups = 0, file.metadata.num_row_groups
    for group in range(groups):
        end = begin + file.metadata.row_group(group).num_rows
        if end > first:
            return list(range(group, groups)), begin
        begin = end
    return [], begin


def _batches(
    file: pq.ParquetFile, name: str, batch: int, begin: int = 0, threads: bool = False
) -> Iterator[tuple[Records, npt.NDArray[np.uint8] | None]]:
    """Records from number `begin` on and recorded levels of faults, None if the trace has none."""
    last = 0
    groups, first = _row_groups(file, begin)
    wanted = [column for column in file.schema_arrow.names if column in DTYPES or column == _LEVEL]
    pieces = file.iter_batches(batch_size=batch, columns=wanted, row_groups=groups, use_threads=threads)
    while True:
        with _damage(name, "damaged"):
            piece = next(pieces, None)
        if piece is None:
            return
        with _damage(name, "damaged"):
            records = records_of(piece, name, first)
            levels = None
            if _LEVEL in wanted:
                levels = numbers(piece.column(_LEVEL), _LEVEL, np.dtype(np.uint8), name, first)
                if levels.size and levels.max() > 3:
                    raise InputError(f"column {_LEVEL!r} holds {levels.max()}, expected at most 3", name)
        last = _check_order(records.time, last, name, first)
        skipped = min(max(begin - first, 0), len(records))
        first += len(records)
        tell(first, file.metadata.num_rows)
        if skipped:
            records, levels = records[skipped:], None if levels is None else levels[skipped:]
        yield records, levels


def _check_order(times: npt.NDArray[np.uint64], last: int, name: str, first: int) -> int:
    """The time of the last record; InputError with the row where time goes back."""
    if not times.size:
        return last
    back = times[1:] < times[:-1]
    if int(times[0]) < last or back.any():
        row = 0 if int(times[0]) < last else int(np.argmax(back)) + 1
        raise InputError(f"row {first + row}: time {times[row]} is before the row above, expected rows by time", name)
    return int(times[-1])


@contextmanager
def _damage(name: str, what: str) -> Iterator[None]:
    """What the library says of a file that is no whole one."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} Parquet file ({text[:_LONGEST]})", name) from None


def sniff(head: bytes) -> Match:
    """Parquet begins with its name."""
    return Match.SURE if head.startswith(_MAGIC) else Match.NO


def read(path: str | os.PathLike[str] | Source, form: str | None = None) -> Lowered | Unplaced:
    """Load a trace: placed, if `write` stored it, else as its columns are.

    :raises InputError: as `iterate`, the metadata of `write` cannot be used, or the records do not fit into memory
    """
    if isinstance(path, Source):
        path.close()
        if path.path is None:
            raise InputError("Parquet cannot be read compressed or from standard input, give its path", path.name)
        path = path.path
    name = os.fspath(path)
    with _open(name) as file:
        about = _about(file, name)
        others = _others(file)
        _check_size(file.metadata.num_rows, name)
        pieces = list(_batches(file, name, ROW_GROUP, threads=True))
    records = Records.concatenate(records for records, _ in pieces)
    told = [levels for _, levels in pieces if levels is not None]
    levels = np.concatenate(told) if told else None
    if about is None:
        return Unplaced(records, name, levels, others)
    if about["setup"] > len(records):
        raise InputError(f"setup of {about['setup']} records, the trace has {len(records)}", name)
    lowered = _lowered(about, records, len(records), name, others)
    return replace(lowered, converts=bool((records.op == Operation.CONVERT).any()), fault_levels=levels)


def _lowered(about: Mapping[str, Any], records: Records, rows: int, name: str, others: tuple[str, ...]) -> Lowered:
    """The trace of what `write` stored beside its records."""
    setup = about["setup"]
    inputs = Counter({"record": rows - setup} if rows > setup else {})
    accounting = Accounting(events=rows - setup, inputs=inputs, operations=rows, setup=setup)
    return Lowered(
        records, about["layout"], about["init"], False, accounting, name, accesses=about["accesses"],
        machine=about["machine"], notes=about["notes"] + others, doubts=about["doubts"],
    )  # fmt: skip


def _check_size(rows: int, name: str) -> None:
    """Refuse what would not fit into memory: a column of one value takes no room in a file."""
    need = 2 * rows * sum(dtype.itemsize for dtype in DTYPES.values())
    if need > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise InputError(
            f"{rows} records take {need >> 20} MiB of memory, more than the {memory >> 20} there are", name
        )


def _others(file: pq.ParquetFile) -> tuple[str, ...]:
    """A note of the columns that are none of a trace's, and of those that are missing."""
    names = file.schema_arrow.names
    others = [printable(one)[:_LONGEST_NAME] for one in names if one not in DTYPES and one != _LEVEL]
    missing = [one for one in DTYPES if one not in names]
    notes = []
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        count = f"{len(others)} column{'s are' if len(others) > 1 else ' is'}"
        notes.append(f"{count} not read: {', '.join(others[:_SHOWN])}{more}")
    if missing:
        notes.append(f"columns that it does not have hold 0: {', '.join(missing)}")
    return tuple(notes)


def _open(name: str) -> pq.ParquetFile:
    """Open and check which columns there are."""
    import pyarrow.parquet as pq

    with _damage(name, "not a whole"):
        file = pq.ParquetFile(name)
        names = file.schema_arrow.names
    twice = [column for column, count in Counter(names).items() if count > 1 and (column in DTYPES or column == _LEVEL)]
    if twice or "op" not in names:
        file.close()
        what = f"column {twice[0]!r} is there twice" if twice else "column 'op' is missing"
        raise InputError(f"{what}, expected {CONTRACT}", name)
    return file


_BROUGHT = ("vm", "stage2", "vcpus")  # fields of Config that a stored trace can bring


def _machine(about: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Config, as stored. TypeError, ValueError for another field, and for what it cannot be."""
    stored = about.get("machine", {})
    if not isinstance(stored, dict) or not set(stored) <= set(_BROUGHT):
        raise ValueError(f"machine {stored}, expected some of {', '.join(_BROUGHT)}")
    return {name: checked(name, value) for name, value in stored.items()}


def _about(file: pq.ParquetFile, name: str) -> dict[str, Any] | None:
    """What `write` stored beside the records, None if it did not write the file."""
    metadata = file.schema_arrow.metadata or {}
    if _KEY not in metadata:
        return None
    try:
        about = json.loads(metadata[_KEY])
        layout, init, setup = Layout.from_json(about["layout"]), about["init"], about["setup"]
        if about["version"] != _VERSION or init not in ("private", "shared"):
            raise ValueError(f"version {about['version']}, init {init}")
        if type(setup) is not int or setup < 0:
            raise ValueError(f"setup {setup}, expected a number of records")
        machine, notes = _machine(about), about.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError("notes, expected a list of texts")
        doubts = about.get("doubts", [])
        if not all(
            isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], str)
            for one in doubts
        ):
            raise ValueError("doubts, expected a list of pairs of texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"metadata 'pgemu' cannot be used ({str(error)[:_LONGEST]})", name) from None
    except RecursionError:
        raise InputError("metadata 'pgemu' cannot be used (too deep)", name) from None
    common = {"layout": layout, "init": init, "setup": setup, "accesses": about.get("accesses") is True}
    told = tuple(Doubt(printable(text), printable(of)) for text, of in doubts)
    return {**common, "machine": machine, "notes": tuple(map(printable, notes)), "doubts": told}
