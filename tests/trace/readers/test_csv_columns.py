"""Tables as text: what Parquet of the same columns says, and where a value is that cannot be."""

from __future__ import annotations

import csv
import io
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace import GivenSlot, LoweringOptions, Operation, Records, load
from pgemu.trace.readers import csv_columns, parquet
from pgemu.trace.schema import DTYPES
from pgemu.trace.source import Source
from pgemu.trace.unplaced import Unplaced

pytestmark = pytest.mark.same_with_checks


def parse(text: str | bytes) -> Unplaced:
    data = text.encode() if isinstance(text, str) else text
    return csv_columns.read(Source("t.csv", None, io.BytesIO(data[1 << 16 :]), data[: 1 << 16]))


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text)
    return str(caught.value)


def test_what_a_table_says() -> None:
    found = parse(
        "time,op,flags,address,offset,length,comment\n"
        "0,convert,SHARED,0,0x1000,4096,a\n"
        '5,guest fault,"WRITE|PRIVATE",0x5000,0,0,"b, ""c"""\n'
        "6,GUEST_FAULT,0x1,24576,0,0,\n"
        "6,2,, 0xFFFFFFFFFFFFFFFF ,0,0,\n"
    )
    assert found.records.op.tolist() == [Operation.CONVERT, *[Operation.GUEST_FAULT] * 3]
    assert found.records.flags.tolist() == [8, 5, 1, 0]
    assert found.records.time.tolist() == [0, 5, 6, 6]
    assert found.records.address.tolist() == [0, 0x5000, 24576, (1 << 64) - 1]
    assert found.records.offset.tolist() == [4096, 0, 0, 0]
    assert found.notes == (
        "1 column is not read: comment",
        "columns that it does not have hold 0: actor, vm, space, object",
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_separators_ends_and_quotes(separator: str, end: str, quote: str) -> None:
    rows = [["op", "address", "flags"], ["guest fault", "0x1000", ""], ["2", "8192", "WRITE|EXEC"]]
    text = end.join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in rows)
    for one in (text, text + end, text.replace(end, end + end) + end + end):
        found = parse(one)
        assert found.records.address.tolist() == [4096, 8192]
        assert found.records.flags.tolist() == [0, 3]


def test_times_of_a_calendar() -> None:
    text = "op,address,flags,time\n2,0,0,1970-01-01 00:00:00.000000007\n2,0,0,1970-01-01T00:00:01\n"
    assert parse(text).records.time.tolist() == [7, 10**9]


def test_recorded_levels() -> None:
    found = parse("op,address,flags,fault_level\n2,0,0,1\n2,0,0,3\n")
    assert found.fault_levels is not None
    assert found.fault_levels.tolist() == [1, 3]
    text = "op,address,flags,fault_level\n2,0,0,3\n2,0,0,4\n"
    assert refused(text).startswith("t.csv:3: column 'fault_level' holds 4, expected at most 3")


def test_empty_cells_that_no_operation_reads_are_0() -> None:
    names = "op,flags,address,offset,length,actor,space\n"
    empty = parse(names + "guest fault,WRITE,4096,,,1,\nconvert,SHARED,,0x1000,8192,,\nhost fault,,1,,,,\n")
    zeros = parse(names + "guest fault,WRITE,4096,0,0,1,0\nconvert,SHARED,0,4096,8192,0,0\nhost fault,,1,0,0,0,0\n")
    for column in ("op", "flags", "address", "offset", "length", "actor", "space"):
        assert getattr(empty.records, column).tolist() == getattr(zeros.records, column).tolist()


def test_tables_without_rows() -> None:
    for text in ("op,address", "op,address\n", "op,address\n\n\r\n"):
        assert len(parse(text).records) == 0


H = "op,address,flags\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (H + "2,1,0\n2,x,0\n", "t.csv:3: column 'address' holds 'x', expected a number of 64 bits, decimal or hexa"),
        (H + "2,1,0\n\n\n2,,0\n", "t.csv:5: guest fault reads column 'address', expected a number"),
        ("op,offset,length,flags\n3,0,1,8\n3,0,,8\n", "t.csv:3: convert reads column 'length', expected a number"),
        ("op,address,flags,time\n2,0,1,\n", "t.csv:2: column 'time' holds '', expected a number"),
        (H + "2,-1,0\n", "t.csv:2: column 'address' holds '-1'"),
        (H + "2,18446744073709551616,0\n", "t.csv:2: column 'address' holds '18446744073709551616'"),
        (H + "2,0x10000000000000000,0\n", "t.csv:2: column 'address' holds"),
        (H + "2,1.0,0\n", "t.csv:2: column 'address' holds '1.0'"),
        (H + "fly,1,0\n", "t.csv:2: column 'op' holds 'fly', expected names of operations"),
        (H + "300,1,0\n", "t.csv:2: column 'op' holds '300', expected names of operations"),
        (H + "200,1,0\n", "t.csv:2: unknown operation code 200"),
        (H + "2,1,0\n2,1,WRITE|FLY\n", "t.csv:3: column 'flags' holds 'WRITE|FLY', expected names of flags"),
        (H + "2,1,0\n2,1\n", "t.csv:3: 2 columns, expected 3 as in the header: '2,1'"),
        (H + "\n2,1,0,0\n", "t.csv:3: 4 columns, expected 3 as in the header"),
        (H + '2,"1\n",0\n', "t.csv:2: a quote that does not end in a line"),
        (H + "2,1\r,0\n", "t.csv:2: a carriage return in a line"),
        (H + "2,1,0\n3,1,0\n", "t.csv:3: column 'offset' is missing, which convert reads"),
        ("op,address,flags,actor\n2,1,0,9\n2,1,0,70000\n", "t.csv:3: column 'actor' holds 70000, expected 0 to 65535"),
        ("op,address,flags,actor\n2,1,0,65535\n", "t.csv:2: actor 65535, expected less than"),
        ("op,flags,address,time\n2,0,1,5\n2,0,1,4\n", "t.csv:3: time 4 is before the row above"),
        ("op,flags,address,time\n2,0,1,soon\n", "t.csv:2: column 'time' holds 'soon', expected a number"),
        ("op,op,address\n", "t.csv: column 'op' is there twice, expected op; flags"),
        ("time,address\n1,1\n", "t.csv: column 'op' is missing, expected op; flags"),
        (H + "2,\udcff,0\n", "column 'address'"),
    ],
)
def test_what_is_refused_and_where(text: str, expected: str) -> None:
    assert expected in refused(text.encode("utf-8", "replace").decode())


def test_lines_are_named_in_every_block() -> None:
    """Blank lines count, wherever the text is cut into pieces."""
    rows = 500_000
    text = "op,address,flags\n" + "\n2,4096,1\n" * rows
    assert refused(text + "\n2,z,1\n").startswith(f"t.csv:{2 * rows + 3}: column 'address' holds 'z'")
    assert refused(text + "\n2,1\n").startswith(f"t.csv:{2 * rows + 3}: 2 columns")
    assert len(parse(text + "2,4096,1").records) == rows + 1


def test_text_that_is_none() -> None:
    with pytest.raises(InputError, match=r"t\.csv: binary data"):
        parse(b"op,address,flags\n2,1,\0\n")
    with pytest.raises(InputError, match=r"t\.csv"):
        parse(b"op,address,flags\n2,\xff\xfe,\n")


def test_a_table_runs_as_its_parquet_does(tmp_path: Path) -> None:
    """Compressed, too, with slots that are given."""
    text = "op,flags,address,offset,length\nguest fault,WRITE,0x1000,0,0\nconvert,SHARED,0,0x1000,0x1000\n"
    path, packed, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    path.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    numbers = {name: [int(value, 0) for value in columns[name]] for name in ("address", "offset", "length")}
    pq.write_table(pa.table({**columns, **numbers}), other)
    options = LoweringOptions(page_size=2 << 20, memslots=(GivenSlot(0, 4 << 20),))
    wanted, *found = (load(one, options) for one in (other, path, packed))
    for one in found:
        assert one.table
        assert one.init == wanted.init == "private"
        assert one.layout == wanted.layout
        for name in DTYPES:
            assert np.array_equal(getattr(one.records, name), getattr(wanted.records, name))


CODES = st.sampled_from([int(operation) for operation in Operation])


@st.composite
def tables(draw: st.DrawFn) -> Records:
    count = draw(st.integers(0, 20))
    columns = {
        name: draw(st.lists(st.integers(0, int(np.iinfo(dtype).max)), min_size=count, max_size=count))
        for name, dtype in DTYPES.items()
    }
    columns["op"] = draw(st.lists(CODES, min_size=count, max_size=count))
    columns["flags"] = [flags & 63 for flags in columns["flags"]]
    columns["time"].sort()
    columns["actor"] = [actor % 512 for actor in columns["actor"]]
    for name in ("offset", "length"):
        columns[name] = [value & -4096 for value in columns[name]]
    return Records.build(count, **columns)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(records=Records.build(0), separator=",", hexadecimal=False, quoting=csv.QUOTE_ALL, blank=True)
@given(
    records=tables(), separator=st.sampled_from(",;\t"), hexadecimal=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), blank=st.booleans(),
)  # fmt: skip
def test_what_is_written_comes_back(
    tmp_path: Path, records: Records, separator: str, hexadecimal: bool, quoting: int, blank: bool
) -> None:
    """As Python's own writer writes it, and as Parquet of it reads."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator="\n\n" if blank else "\n")  # type: ignore[arg-type]
    writer.writerow(DTYPES)
    for row in zip(*(getattr(records, name).tolist() for name in DTYPES), strict=True):
        writer.writerow([hex(value) if hexadecimal else value for value in row])
    found = parse(file.getvalue()).records
    pq.write_table(pa.table({name: getattr(records, name) for name in DTYPES}), tmp_path / "p")
    other = parquet.read(tmp_path / "p")
    assert isinstance(other, Unplaced)
    for name in DTYPES:
        assert getattr(found, name).tolist() == getattr(records, name).tolist() == getattr(other.records, name).tolist()
