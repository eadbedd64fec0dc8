"""Traces as Parquet: zstd, row groups of about a million records, and the memory layout in the file's metadata.

pyarrow is imported inside the functions, so that only those who store or load a trace pay for it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.machine.field_rules import checked
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import Layout
from pgemu.trace.schema import DTYPES, Operation, Records
from pgemu.trace.source import Match, Source
from pgemu.trace.watching import tell
from pgemu.whole_file import whole_file

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ("ROW_GROUP", "iterate", "read", "sniff", "write")

ROW_GROUP = 1 << 20
_MAGIC = b"PAR1"
_LEVEL = "fault_level"  # of a log that told levels
_KEY = b"pgemu"
_VERSION = 1


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
    }
    levels = lowered.fault_levels if batches is None else None
    columns = DTYPES if levels is None else {**DTYPES, _LEVEL: np.dtype(np.uint8)}
    schema = pa.schema(
        [pa.field(column, pa.from_numpy_dtype(dtype), nullable=False) for column, dtype in columns.items()],
        metadata={_KEY: json.dumps(about).encode()},
    )
    try:
        with whole_file(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for records in (lowered.records,) if batches is None else batches:
                for first in range(0, len(records), ROW_GROUP):
                    piece = records[first : first + ROW_GROUP]
                    arrays = [pa.array(getattr(piece, column)) for column in DTYPES]
                    if levels is not None:
                        arrays.append(pa.array(levels[first : first + ROW_GROUP]))
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", name) from None


def iterate(path: str | os.PathLike[str], batch: int = ROW_GROUP) -> Iterator[Records]:
    """Yield a stored trace in batches of at most `batch` records, checked.

    :raises InputError: not Parquet, a column is missing or has another type, or a record is invalid (with its row)
    """
    import pyarrow as pa

    name = os.fspath(path)
    first = 0
    with _open(name) as file:
        try:
            for piece in file.iter_batches(batch_size=batch, columns=list(DTYPES)):
                for column in DTYPES:
                    if piece.column(column).null_count:
                        raise InputError(f"column {column!r} has a null value, expected none", name)
                records = Records(*(piece.column(column).to_numpy(zero_copy_only=False) for column in DTYPES))
                records.check(name, first)
                first += len(records)
                tell(first, file.metadata.num_rows)
                yield records
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"damaged Parquet file ({error})", name) from None


def sniff(head: bytes) -> Match:
    """Parquet begins with its name."""
    return Match.SURE if head.startswith(_MAGIC) else Match.NO


def read(path: str | os.PathLike[str] | Source) -> Lowered:
    """Load a trace that `write` stored.

    :raises InputError: as `iterate`, or the file does not say where guest memory lies
    """
    if isinstance(path, Source):
        path.close()
        if path.path is None:
            raise InputError("Parquet cannot be read compressed or from standard input, give its path", path.name)
        path = path.path
    name = os.fspath(path)
    with _open(name) as file:
        about = _about(file, name)
        levels = _levels(file, name)
    records = Records.concatenate(iterate(name))
    setup = about["setup"]
    if not 0 <= setup <= len(records):
        raise InputError(f"setup of {setup} records, the trace has {len(records)}", name)
    inputs = Counter({"record": len(records) - setup} if len(records) > setup else {})
    accounting = Accounting(events=len(records) - setup, inputs=inputs, operations=len(records), setup=setup)
    converts = bool((records.op == Operation.CONVERT).any())
    return Lowered(
        records, about["layout"], about["init"], converts, accounting, name, levels, accesses=about["accesses"],
        machine=about["machine"], notes=about["notes"],
    )  # fmt: skip


def _levels(file: pq.ParquetFile, name: str) -> npt.NDArray[np.uint8] | None:
    """The recorded levels of faults, if the trace has them."""
    import pyarrow as pa

    if _LEVEL not in file.schema_arrow.names:
        return None
    try:
        column = file.read([_LEVEL]).column(_LEVEL)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"damaged Parquet file ({error})", name) from None
    if column.type != pa.uint8() or column.null_count:
        raise InputError(f"column {_LEVEL!r} holds {column.type}, expected uint8 without null", name)
    levels = np.asarray(column.to_numpy(), np.uint8)
    if levels.size and levels.max() > 3:
        raise InputError(f"column {_LEVEL!r} holds {levels.max()}, expected at most 3", name)
    return levels


def _open(name: str) -> pq.ParquetFile:
    """Open and check the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(name)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a whole Parquet file ({str(error).splitlines()[0]})", name) from None
    schema: pa.Schema = file.schema_arrow
    for column, dtype in DTYPES.items():
        if column not in schema.names:
            file.close()
            raise InputError(f"column {column!r} is missing, expected {', '.join(DTYPES)}", name)
        field = schema.field(column)
        if field.type != pa.from_numpy_dtype(dtype):
            file.close()
            raise InputError(f"column {column!r} holds {field.type}, expected {dtype}", name)
    return file


_BROUGHT = ("vm", "stage2", "vcpus")  # fields of Config that a stored trace can bring


def _machine(about: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Config, as stored. TypeError, ValueError for another field, and for what it cannot be."""
    stored = about.get("machine", {})
    if not isinstance(stored, dict) or not set(stored) <= set(_BROUGHT):
        raise ValueError(f"machine {stored}, expected some of {', '.join(_BROUGHT)}")
    return {name: checked(name, value) for name, value in stored.items()}


def _about(file: pq.ParquetFile, name: str) -> dict[str, Any]:
    metadata = file.schema_arrow.metadata or {}
    if _KEY not in metadata:
        raise InputError("no memory layout in the file's metadata, expected a trace stored by pgemu", name)
    try:
        about = json.loads(metadata[_KEY])
        layout, init, setup = Layout.from_json(about["layout"]), about["init"], int(about["setup"])
        if about["version"] != _VERSION or init not in ("private", "shared"):
            raise ValueError(f"version {about['version']}, init {init}")
        machine, notes = _machine(about), about.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError("notes, expected a list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"metadata 'pgemu' cannot be used ({error})", name) from None
    common = {"layout": layout, "init": init, "setup": setup, "accesses": about.get("accesses") is True}
    return {**common, "machine": machine, "notes": tuple(notes)}
