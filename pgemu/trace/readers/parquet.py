"""Traces as Parquet: row groups of about a million records, and the memory layout in the file's metadata.

Columns are stored so that they are read quickly: bytes of a rank together (BYTE_STREAM_SPLIT), times as differences,
LZ4. A column that holds one value in all of a row group, as the statistics of its footer say, is not decoded at all.

Files of others (polars, pandas, ...) need only the schema's columns, as pgemu.trace.columns says; of what has no layout
pgemu.trace.unplaced says where it lies. pyarrow is imported inside the functions, for those alone who need it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from operator import index
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.machine.field_rules import checked
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.columns import LEVEL, check_names, check_order, check_size, columns_of, levels_of, others, records_of
from pgemu.trace.log import Doubt
from pgemu.trace.lowered import Accounting, Guest, Lowered, ProcessFile
from pgemu.trace.memory_layout import Layout
from pgemu.trace.process_files import PAGE_OF
from pgemu.trace.schema import DTYPES, Operation, Records
from pgemu.trace.source import Match, Source
from pgemu.trace.unplaced import Unplaced
from pgemu.trace.watching import tell
from pgemu.whole_file import whole_file
from pgemu_kernels.words.rows import INODES, SPACES

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = (
    "FORMATS",
    "ROW_GROUP",
    "Glance",
    "glance",
    "iterate",
    "narrow",
    "parquet_file",
    "read",
    "sniff",
    "write",
    "write_accesses",
)

FORMATS = {"parquet": "Parquet"}

ROW_GROUP = 1 << 20
_MAGIC = b"PAR1"
_OF_ACCESSES = ("time", "op", "flags", "actor", "space", "address")
_KEY = b"pgemu"
_OUTCOMES = b"pgemu.replay"
_VERSION = 1
_LONGEST = 200  # characters of a message


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
        "kind": lowered.kind,
        "guests": [{"layout": guest.layout.to_json(), "init": guest.init} for guest in lowered.guests],
        "processes": lowered.processes,
        "files": [list(file) for file in lowered.files],
    }
    if batches is None and lowered.accounting.operations == len(lowered.records):
        about["accounting"] = lowered.accounting.to_json()
    levels = lowered.fault_levels if batches is None else None
    columns = DTYPES if levels is None else {**DTYPES, LEVEL: np.dtype(np.uint8)}
    schema = pa.schema(
        [pa.field(column, pa.from_numpy_dtype(dtype), nullable=False) for column, dtype in columns.items()],
        metadata={_KEY: json.dumps(about).encode()},
    )
    try:
        with whole_file(name) as file, pq.ParquetWriter(file, schema, **_encoded(columns)) as writer:
            for records in (lowered.records,) if batches is None else batches:
                for first in range(0, len(records), ROW_GROUP):
                    piece = records[first : first + ROW_GROUP]
                    arrays = [pa.array(getattr(piece, column)) for column in DTYPES]
                    if levels is not None:
                        arrays.append(pa.array(levels[first : first + ROW_GROUP]))
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", name) from None


def _encoded(columns: Iterable[str]) -> dict[str, Any]:
    """How columns are stored: what is read three times as fast as dictionaries and zstd, and hardly larger."""
    split = dict.fromkeys(columns, "BYTE_STREAM_SPLIT")
    return {
        "compression": "lz4", "use_dictionary": False, "column_encoding": {**split, "time": "DELTA_BINARY_PACKED"},
    }  # fmt: skip


def write_accesses(stream: AccessStream, path: str | os.PathLike[str]) -> None:
    """Store a program's accesses, a row group at a time; the file appears whole or not at all.

    :raises InputError: the file cannot be written, or what the stream raises
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = os.fspath(path)
    columns = [column for column in DTYPES if column in _OF_ACCESSES]
    schema = pa.schema([pa.field(one, pa.from_numpy_dtype(DTYPES[one]), nullable=False) for one in columns])
    try:
        with whole_file(name) as file, pq.ParquetWriter(file, schema, **_encoded(columns)) as writer:
            for records in stream.batches:
                for first in range(0, len(records), ROW_GROUP):
                    piece = records[first : first + ROW_GROUP]
                    arrays = [pa.array(getattr(piece, column)) for column in columns]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
            about = {
                "version": _VERSION,
                "kind": "accesses",
                "source": stream.source,
                "format": stream.format,
                "threads": stream.tally.threads,
                "inputs": dict(stream.tally.inputs),
                "crossing": stream.tally.crossing,
                "ignored": dict(stream.tally.ignored),
                "rejected": stream.tally.rejected,
                "first_rejected": [list(one) for one in stream.tally.first_rejected],
                "notes": stream.tally.notes,
                "v2p": [] if stream.v2p is None else stream.v2p.tolist(),
            }
            writer.add_key_value_metadata({_KEY.decode(): json.dumps(about)})
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", name) from None


def _stored_accesses(file: pq.ParquetFile, about: dict[str, Any], name: str, opened: ExitStack) -> AccessStream:
    """What `write_accesses` stored; what is opened for it is closed behind the last batch."""

    def batches() -> Iterator[Records]:
        with opened:
            for records, _ in _batches(file, name, ROW_GROUP):
                if (records.op != Operation.GUEST_ACCESS).any():
                    row = int(np.argmax(records.op != Operation.GUEST_ACCESS))
                    raise InputError(f"operation {records.op[row]} among guest accesses", name)
                yield records

    try:
        counts = [Counter({str(one): index(n) for one, n in about[of].items()}) for of in ("inputs", "ignored")]
        notes = [printable(note) for note in about["notes"]]
        first = [(index(number), printable(text)) for number, text in about.get("first_rejected", ())]
        tally = Tally(
            0, counts[0], index(about.get("crossing", 0)), counts[1], index(about["rejected"]), first,
            index(about["threads"]), notes,
        )  # fmt: skip
        v2p = np.array(about["v2p"], dtype=np.uint64).reshape(-1, 3) if about["v2p"] else None
        form = printable(about["format"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        opened.close()
        raise InputError(f"metadata 'pgemu' cannot be used ({str(error)[:_LONGEST]})", name) from None
    return AccessStream.of(name, form, batches(), tally, v2p, opened.close)


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
        stored, rows = _stored(file, name), file.metadata.num_rows
        if stored is None or stored.get("kind") == "accesses":
            return None
        about = _about(stored, name)
        if about["setup"] > rows:
            raise InputError(f"setup of {about['setup']} records, the trace has {rows}", name)
        lowered = _lowered(about, Records.build(0), rows, name, others(file.schema_arrow.names))
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
        for piece, held, first in _pieces(file, name, wanted, batch):
            with _damage(name, "damaged"):
                found = columns_of(piece, held, wanted, name, first)
            tell(first + piece.num_rows, file.metadata.num_rows)
            yield found


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


def _held(file: pq.ParquetFile, name: str, places: Mapping[str, int], group: int) -> dict[str, pa.Array]:
    """Columns that hold one value in all of a row group, as its statistics say: arrays of that one."""
    import pyarrow as pa

    found = {}
    with _damage(name, "damaged"):
        about = file.metadata.row_group(group)
        for column, place in places.items():
            stored, kind = about.column(place), file.schema_arrow.field(column).type
            # Of a type that is damaged the library ends the process when it is asked for statistics.
            told = stored.statistics if stored.physical_type in ("INT32", "INT64") else None
            if told is None or not told.has_min_max or not told.has_null_count or told.null_count:
                continue
            if (value := told.min) == told.max:
                # Of what is unsigned the library tells the signed number of the same bits.
                value = value % (1 << kind.bit_width) if pa.types.is_unsigned_integer(kind) else value
                found[column] = pa.array([value], kind)
    return found


def _pieces(
    file: pq.ParquetFile, name: str, wanted: Iterable[str], batch: int, begin: int = 0, threads: bool = False
) -> Iterator[tuple[pa.RecordBatch, dict[str, pa.Array], int]]:
    """Some columns of a file from the row group of record `begin` on: those that had to be decoded, those that hold one
    value (see _held), and the first row."""
    import pyarrow as pa

    groups, first = _row_groups(file, begin)
    schema, paths = file.schema_arrow, [file.schema.column(place).path for place in range(len(file.schema))]
    there = [column for column in schema.names if column in wanted]
    places = {one: paths.index(one) for one in there if pa.types.is_integer(schema.field(one).type)}
    for held, alike in groupby(groups, lambda group: _held(file, name, places, group)):
        columns = [column for column in there if column not in held] or ["op"]  # for the number of rows
        pieces = file.iter_batches(batch_size=batch, columns=columns, row_groups=list(alike), use_threads=threads)
        while True:
            with _damage(name, "damaged"):
                piece = next(pieces, None)
            if piece is None:
                break
            yield piece, held, first
            first += piece.num_rows


def _batches(
    file: pq.ParquetFile, name: str, batch: int, begin: int = 0, threads: bool = False
) -> Iterator[tuple[Records, npt.NDArray[np.uint8] | None]]:
    """Records from number `begin` on and recorded levels of faults, None if the trace has none."""
    last = 0
    for piece, held, first in _pieces(file, name, [*DTYPES, LEVEL], batch, begin, threads):
        with _damage(name, "damaged"):
            records = records_of(piece, name, first, held)
            levels = levels_of(piece, name, first, held)
        last = check_order(records.time, last, name, first)
        skipped = min(max(begin - first, 0), len(records))
        tell(first + len(records), file.metadata.num_rows)
        if skipped:
            records, levels = records[skipped:], None if levels is None else levels[skipped:]
        yield records, levels


@contextmanager
def _damage(name: str, what: str) -> Iterator[None]:
    """What the library says of a file that is no whole one."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        short = "memory is short, or " if isinstance(error, MemoryError) else ""  # a damaged file may ask for any size
        raise InputError(f"{short}{what} Parquet file ({text[:_LONGEST]})", name) from None


def sniff(head: bytes) -> Match:
    """Parquet begins with its name."""
    return Match.SURE if head.startswith(_MAGIC) else Match.NO


def read(path: str | os.PathLike[str] | Source, form: str | None = None) -> Lowered | Unplaced | AccessStream:
    """Load a trace: placed, if `write` stored it, else as its columns are.

    :raises InputError: as `iterate`, the metadata of `write` cannot be used, or the records do not fit into memory
    """
    name = path.name if isinstance(path, Source) else os.fspath(path)
    with ExitStack() as stack:
        copy: BinaryIO | None = None
        if isinstance(path, Source):
            if path.path is None:  # its end is read first
                copy = stack.enter_context(path.whole())
            path.close()
        file = stack.enter_context(_open(name, copy))
        stored = _stored(file, name)
        if stored is not None and stored.get("kind") == "accesses":
            return _stored_accesses(file, stored, name, stack.pop_all())
        about = None if stored is None else _about(stored, name)
        notes = others(file.schema_arrow.names)
        check_size(file.metadata.num_rows, name)
        pieces = list(_batches(file, name, ROW_GROUP, threads=True))
    records = Records.concatenate(records for records, _ in pieces)
    told = [levels for _, levels in pieces if levels is not None]
    levels = np.concatenate(told) if told else None
    if about is None:
        return Unplaced(records, name, levels, notes)
    if about["setup"] > len(records):
        raise InputError(f"setup of {about['setup']} records, the trace has {len(records)}", name)
    lowered = _lowered(about, records, len(records), name, notes)
    return replace(lowered, converts=bool((records.op == Operation.CONVERT).any()), fault_levels=levels)


def _lowered(about: Mapping[str, Any], records: Records, rows: int, name: str, notes: tuple[str, ...]) -> Lowered:
    """The trace of what `write` stored beside its records."""
    setup = about["setup"]
    accounting = about["accounting"] or _of_records(rows, setup)
    if (accounting.operations, accounting.setup) != (rows, setup):
        raise InputError(f"accounts of {accounting.operations} records, the trace has {rows}", name)
    return Lowered(
        records, about["layout"], about["init"], False, accounting, name, accesses=about["accesses"],
        machine=about["machine"], notes=about["notes"] + notes, doubts=about["doubts"],
        guests=about["guests"], **about["of_processes"],
    )  # fmt: skip


def _of_records(count: int, setup: int) -> Accounting:
    """The account of a trace that says nothing of what it was made from."""
    inputs = Counter({"record": count - setup} if count > setup else {})
    return Accounting(events=count - setup, inputs=inputs, operations=count, setup=setup)


def parquet_file(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """Open a file by the bytes of its name, which need not be text; a text the library would try as a URI, too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.OSFile(os.fsencode(path)))


def _open(name: str, copy: BinaryIO | None = None) -> pq.ParquetFile:
    """Open a file, or the copy of what cannot be read at any place, and check which columns there are."""
    import pyarrow.parquet as pq

    with _damage(name, "not a whole"):
        file = parquet_file(name) if copy is None else pq.ParquetFile(copy)
        names = file.schema_arrow.names
    try:
        if _OUTCOMES in (file.metadata.metadata or {}):
            raise InputError("this is the outcomes of pgemu replay, expected the trace that it ran", name)
        check_names(names, name)
    except InputError:
        file.close()
        raise
    return file


_BROUGHT = ("vm", "stage2", "vcpus")  # fields of Config that a stored trace can bring


def _machine(about: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Config, as stored. TypeError, ValueError for another field, and for what it cannot be."""
    stored = about.get("machine", {})
    if not isinstance(stored, dict) or not set(stored) <= set(_BROUGHT):
        raise ValueError(f"machine {stored}, expected some of {', '.join(_BROUGHT)}")
    return {name: checked(name, value) for name, value in stored.items()}


def _processes(about: Mapping[str, Any]) -> dict[str, Any]:
    """Whose memory it is, and what stands before the first record. TypeError, ValueError for what cannot be."""
    kind, processes, files = about.get("kind", "guest"), about.get("processes", 1), about.get("files", [])
    if kind not in ("guest", "process"):
        raise ValueError(f"kind {str(kind)[:40]!r}, expected guest or process")
    if type(processes) is not int or not 0 <= processes <= SPACES:
        raise ValueError(f"processes {str(processes)[:40]}, expected a number up to {SPACES}")
    found = tuple(ProcessFile(*file) for file in files)
    if len(found) > INODES:
        raise ValueError(f"{len(found)} files, expected at most {INODES}")
    for file in found:
        page = PAGE_OF.get(file.kind) if isinstance(file.kind, str) else None
        if page is None or type(file.size) is not int or not 0 < file.size < 1 << 63 or file.size % page:
            raise ValueError(f"file {str(tuple(file))[:60]}, expected its kind and a size in whole pages")
    return {"kind": kind, "processes": processes, "files": found}


def _stored(file: pq.ParquetFile, name: str) -> dict[str, Any] | None:
    """What was stored beside the records, None if pgemu did not write the file."""
    metadata = {**(file.metadata.metadata or {}), **(file.schema_arrow.metadata or {})}
    if _KEY not in metadata:
        return None
    try:
        about = json.loads(metadata[_KEY])
        if about["version"] != _VERSION:
            raise ValueError(f"version {about['version']}, expected {_VERSION}")
        if not isinstance(about, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        file.close()
        raise InputError(f"metadata 'pgemu' cannot be used ({str(error)[:_LONGEST]})", name) from None
    except RecursionError:
        file.close()
        raise InputError("metadata 'pgemu' cannot be used (too deep)", name) from None
    return about


def _about(about: dict[str, Any], name: str) -> dict[str, Any]:
    """What `write` stored beside the records, checked."""
    try:
        layout, init, setup = Layout.from_json(about["layout"]), about["init"], about["setup"]
        if init not in ("private", "shared"):
            raise ValueError(f"init {init}")
        if type(setup) is not int or setup < 0:
            raise ValueError(f"setup {setup}, expected a number of records")
        machine, notes = _machine(about), about.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError("notes, expected a list of texts")
        accounting = Accounting.from_json(about["accounting"]) if "accounting" in about else None
        guests = tuple(Guest(Layout.from_json(one["layout"]), one["init"]) for one in about.get("guests", []))
        if any(guest.init not in ("private", "shared") for guest in guests):
            raise ValueError("a guest that is neither private nor shared at first")
        doubts = about.get("doubts", [])
        if not all(
            isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], str)
            for one in doubts
        ):
            raise ValueError("doubts, expected a list of pairs of texts")
        of_processes = _processes(about)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"metadata 'pgemu' cannot be used ({str(error)[:_LONGEST]})", name) from None
    common = {"layout": layout, "init": init, "setup": setup, "accesses": about.get("accesses") is True}
    told = tuple(Doubt(printable(text), printable(of)) for text, of in doubts)
    return {
        **common,
        "accounting": accounting,
        "of_processes": of_processes,
        "guests": guests,
        "machine": machine,
        "notes": tuple(map(printable, notes)),
        "doubts": told,
    }
