"""Files as they arrive when something went wrong: logs and tables of the samples, changed at random, from a seed."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pgemu import workload
from pgemu.trace import LoweringOptions, load
from pgemu.trace.readers import parquet
from pgemu.trace.schema import DTYPES, Operation

DATA = Path(__file__).parent / "data"
COMPRESSORS: list[Callable[[bytes], bytes]] = [
    bytes, bytes, bytes, lzma.compress, gzip.compress, zstandard.ZstdCompressor().compress,
]  # fmt: skip
EXTREMES = [0, 1, 7, 4095, 4096, 1 << 31, 1 << 47, (1 << 52) - 4096, 1 << 52, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]


# --------------------------------------------------------------------------- logs


@cache
def logs() -> list[bytes]:
    """The sample logs: whole small ones, and the beginnings and ends of large ones."""
    found = [path.read_bytes() for path in sorted((DATA / "cases").glob("*.txt"))]
    for path in sorted((DATA / "traces").glob("*.xz")):
        lines = lzma.decompress(path.read_bytes()).splitlines(keepends=True)
        found += [b"".join(lines[:150]), b"".join(lines[len(lines) // 2 :][:150])]
    return found


def flipped(data: bytes, random: Random, most: int = 8) -> bytes:
    """Some bytes are others."""
    found = bytearray(data)
    for _ in range(random.randint(1, most)):
        if found:
            found[random.randrange(len(found))] = random.choice([random.randrange(256), 0, 10, 13, 27, 32, 48, 255])
    return bytes(found)


def _cut(lines: list[bytes], at: int, random: Random) -> None:
    lines[at] = lines[at][: random.randint(0, len(lines[at]))] + b"\n" * random.randint(0, 1)


def _joined(lines: list[bytes], at: int, random: Random) -> None:
    lines[at] = lines[at].rstrip(b"\n") + random.choice([b"", b" ", b"\r", b"\t", b"\0"])


def _repeated(lines: list[bytes], at: int, random: Random) -> None:
    lines[at:at] = [lines[at]] * (random.choice([1, 2, 300]) if len(lines[at]) < 10_000 else 1)


def _moved(lines: list[bytes], at: int, random: Random) -> None:
    lines.insert(random.randint(0, len(lines) - 1), lines.pop(at))


def _widened(lines: list[bytes], at: int, random: Random) -> None:
    """A column more, at every line or one."""
    word = random.choice([b"12/34 ", b"(1) ", b"x ", b"[001] ", b"3.5: ", b"\xff\xfe ", b"  ", b"\x1b[1m "])
    place = random.randint(0, 40)
    for number in random.choice([range(len(lines)), [at]]):
        lines[number] = lines[number][:place] + word + lines[number][place:]


def _renumbered(lines: list[bytes], at: int, random: Random) -> None:
    """A number of a line is another one."""
    numbers = list(re.finditer(rb"0x[0-9a-f]+|\b\d+\b", lines[at]))
    if numbers:
        found = random.choice(numbers)
        value = random.choice([*EXTREMES, 1 << 64, 10**30, -1])
        text = random.choice([b"%d" % value, b"%#x" % value, b"", b"9" * 5000, b"0x"])
        lines[at] = lines[at][: found.start()] + text + lines[at][found.end() :]


def _long(lines: list[bytes], at: int, random: Random) -> None:
    word = random.choice([b" ", b"a", b": ", b"a=1 ", b"(", b"[0] ", b"0", b"\t1 "])
    place = random.randint(0, len(lines[at]))
    lines[at] = lines[at][:place] + word * random.choice([100, 20_000, 1_100_000 // len(word)]) + lines[at][place:]


LINE_CHANGES = [_cut, _joined, _repeated, _moved, _widened, _renumbered, _renumbered, _renumbered, _long]


def log(random: Random) -> bytes:
    """A sample log, changed, plain or compressed."""
    data = random.choice(logs())
    for _ in range(random.randint(0, 3)):
        lines = data.splitlines(keepends=True) or [b""]
        random.choice(LINE_CHANGES)(lines, random.randrange(len(lines)), random)
        data = b"".join(lines)
    if random.random() < 0.3:
        data = flipped(data, random)
    if random.random() < 0.1:
        data += random.choice(logs())
    data = random.choice(COMPRESSORS)(data)
    if random.random() < 0.2:
        data = flipped(data, random, 3)
    return data[: random.randint(0, len(data))] if random.random() < 0.1 else data


# --------------------------------------------------------------------------- tables


@cache
def tables() -> list[pa.Table]:
    """Stored traces, with their metadata: of a workload, and of a log that tells levels."""
    boot = workload.open("tdx-boot")
    levels = load(DATA / "traces" / "vm-convert-swprot.ftrace.txt.xz", LoweringOptions(page_size=2 << 20))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for lowered in (boot, levels):
            parquet.write(lowered, Path(folder) / "table")
            found.append(pq.read_table(Path(folder) / "table").slice(0, 300))
    return found


def _value(random: Random) -> Any:
    return random.choice([*EXTREMES, -1, -4096, True, None, "x", "", 1.5, [], {}, [1], {"a": 1}, 1 << 70, "\x1b[0m"])


def _metadata(table: pa.Table, random: Random) -> pa.Table:
    """The layout and what stands beside it, a value of it another one, or text that is no JSON."""
    metadata = table.schema.metadata or {}
    if b"layout" not in metadata.get(b"pgemu", b"") or random.random() < 0.2:
        other = random.choice(
            [None, {b"pgemu": b"{"}, {b"pgemu": b"[" * random.choice([3, 100_000])}, {b"pgemu": b"\xff"}]
        )
        return table.replace_schema_metadata(other)
    about = json.loads(metadata[b"pgemu"])
    place: Any = about
    while True:
        key = random.choice(list(place) if isinstance(place, dict) else list(range(len(place)))) if place else None
        if key is None or not isinstance(place[key], dict | list) or not place[key] or random.random() < 0.2:
            break
        place = place[key]
    if key is not None and random.random() < 0.2:
        del place[key]
    elif key is not None:
        place[key] = _value(random)
    return table.replace_schema_metadata({b"pgemu": json.dumps(about).encode()})


def _typed(table: pa.Table, random: Random) -> pa.Table:
    """A column of another type."""
    number = random.randrange(table.num_columns)
    kind = random.choice(
        [pa.int8(), pa.int16(), pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.bool_(), pa.null()]
    )
    try:
        column = table.column(number).cast(kind, safe=False)
    except pa.ArrowException:
        column = pa.nulls(table.num_rows, kind)
    if random.random() < 0.3 and kind != pa.null():
        column = column.dictionary_encode()
    return table.set_column(number, table.schema.names[number], column)


def _revalued(table: pa.Table, random: Random) -> pa.Table:
    """Some values of a column are others."""
    number = random.randrange(table.num_columns)
    name = table.schema.names[number]
    dtype = DTYPES.get(name, np.dtype(np.uint8))
    values = [int(value) if isinstance(value, int) else 0 for value in table.column(number).to_pylist()]
    for _ in range(random.randint(1, 5)):
        if values:
            codes = [int(op) for op in Operation]
            value = random.choice(codes if name == "op" else EXTREMES) & int(np.iinfo(dtype).max)
            values[random.randrange(len(values))] = value
    if name == "op" and random.random() < 0.3:
        names = {int(op): op.name for op in Operation}
        column = pa.array([names.get(value, str(value)) for value in values])
    else:
        column = pa.array([value & int(np.iinfo(dtype).max) for value in values], pa.from_numpy_dtype(dtype))
    return table.set_column(number, name, column)


def _columns(table: pa.Table, random: Random) -> pa.Table:
    """Columns that are missing, there twice, in another order, of other names."""
    order = list(range(table.num_columns))
    change = random.randrange(4)
    if change == 0:
        order.remove(random.choice(order))
    elif change == 1:
        order.append(random.choice(order))
    elif change == 2:
        random.shuffle(order)
    names = [table.schema.names[number] for number in order]
    if change == 3:
        names[random.randrange(len(names))] = random.choice(["", "x", "\x1b[2J", "é" * 500, "op", "a.b", "fault_level"])
    made = pa.Table.from_arrays([table.column(number) for number in order], names)
    return made.replace_schema_metadata(table.schema.metadata)


def _rows(table: pa.Table, random: Random) -> pa.Table:
    first = random.randint(0, table.num_rows)
    return table.slice(first, random.choice([0, 1, 50, table.num_rows]))


TABLE_CHANGES = [_metadata, _metadata, _typed, _revalued, _revalued, _columns, _rows]


def table(random: Random) -> bytes:
    """A stored trace, changed: in its values, columns and metadata, or in the bytes of the file."""
    found = random.choice(tables())
    if random.random() < 0.4:
        found = found.replace_schema_metadata(None)
    for _ in range(random.randint(0, 3)):
        if found.num_columns > 1:
            found = random.choice(TABLE_CHANGES)(found, random)
    sink = pa.BufferOutputStream()
    compression = random.choice(["zstd", "none", "snappy"])
    pq.write_table(found, sink, compression=compression, row_group_size=random.choice([7, 100, 1 << 20]))
    data = sink.getvalue().to_pybytes()
    if random.random() < 0.4:
        data = flipped(data, random, random.choice([1, 3, 20]))
    return data[: random.randint(0, len(data))] if random.random() < 0.05 else data
