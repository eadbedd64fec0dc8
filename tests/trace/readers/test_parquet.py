"""Stored traces: what goes in comes out, whole files only, foreign files refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import GivenSlot, Lowered, LoweringOptions, Operation, Records, load
from pgemu.trace.log import Doubt
from pgemu.trace.readers import parquet
from pgemu.trace.schema import ACTOR_LIMIT, DTYPES

pytestmark = pytest.mark.same_with_checks

BOOT = workload.open("tdx-boot")

CODES = st.sampled_from([int(operation) for operation in Operation])


@st.composite
def some_records(draw: st.DrawFn) -> Records:
    count = draw(st.integers(0, 40))
    columns = {name: draw(arrays.arrays(dtype, count)) for name, dtype in DTYPES.items()}
    columns["op"] = draw(arrays.arrays(np.uint8, count, elements=CODES))
    columns["flags"] &= np.uint8(63)
    columns["time"].sort()
    columns["actor"] %= np.uint16(ACTOR_LIMIT)
    columns["offset"] &= ~np.uint64(4095)
    columns["length"] &= ~np.uint64(4095)
    return Records(**columns)


def stored(path: Path) -> Lowered:
    """A trace that pgemu stored."""
    found = parquet.read(path)
    assert isinstance(found, Lowered)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(records=some_records(), batch=st.integers(1, 50))
def test_round_trip(tmp_path: Path, records: Records, batch: int) -> None:
    path = tmp_path / "a.parquet"
    accounting = dataclasses.replace(BOOT.accounting, setup=0)
    parquet.write(dataclasses.replace(BOOT, records=records, accounting=accounting), path)
    back = stored(path)
    pieces = list(parquet.iterate(path, batch))
    assert all(len(piece) <= batch for piece in pieces)
    for name in DTYPES:
        assert np.array_equal(getattr(back.records, name), getattr(records, name))
        assert np.array_equal(getattr(Records.concatenate(pieces), name), getattr(records, name))
    assert (back.layout, back.init) == (BOOT.layout, BOOT.init)
    assert back.accounting.balanced()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(records=some_records(), batch=st.integers(1, 50), first=st.integers(0, 45), group=st.integers(1, 45))
def test_batches_from_any_record_on(tmp_path: Path, records: Records, batch: int, first: int, group: int) -> None:
    path = tmp_path / "a.parquet"
    accounting = dataclasses.replace(BOOT.accounting, setup=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP", group)
        parquet.write(dataclasses.replace(BOOT, records=records, accounting=accounting), path)
    left = Records.concatenate(parquet.iterate(path, batch, first))
    narrow = list(parquet.narrow(path, ["op", "object"], batch))
    for name in DTYPES:
        assert np.array_equal(getattr(left, name), getattr(records, name)[first:]), name
    for name in ("op", "object"):
        found = np.concatenate([np.zeros(0, DTYPES[name]), *(piece[name] for piece in narrow)])
        assert np.array_equal(found, getattr(records, name)), name
        assert found.dtype == DTYPES[name]


def test_a_glance_tells_what_reading_tells_but_for_the_records(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write(BOOT, path)
    glance, whole = parquet.glance(path), stored(path)
    assert glance is not None
    assert glance.records == len(whole.records)
    known = {"records", "converts"}
    for field in dataclasses.fields(Lowered):
        if field.name not in known:
            assert getattr(glance.lowered, field.name) == getattr(whole, field.name), field.name
    address = BOOT.records.address.copy()
    address[1234] ^= np.uint64(4096)
    parquet.write(dataclasses.replace(BOOT, records=dataclasses.replace(BOOT.records, address=address)), path)
    other = parquet.glance(path)
    assert other is not None
    assert other.fingerprint != glance.fingerprint
    pq.write_table(pa.table({"op": pa.array([2], pa.uint8()), "address": pa.array([0], pa.uint64())}), path)
    assert parquet.glance(path) is None


def test_what_a_log_said_of_its_machine_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    doubts = (Doubt("none of 9 conversions are of this memory", "conversions"), Doubt("addresses collide"))
    parquet.write(dataclasses.replace(BOOT, notes=("bit 47 is taken", "left out"), doubts=doubts), path)
    back = stored(path)
    assert (back.machine, back.notes) == (BOOT.machine, ("bit 47 is taken", "left out"))
    assert back.doubts == doubts


@pytest.mark.parametrize(
    "machine", [{"vm": "td"}, {"stage2": ["ept"]}, {"vcpus": 0}, {"vcpus": "1"}, {"vcpus": True}, {"pool": 1}, 3]
)
def test_a_machine_that_cannot_be_is_refused(tmp_path: Path, machine: object) -> None:
    path = tmp_path / "a.parquet"
    parquet.write(BOOT, path)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"pgemu"]) | {"machine": machine}
    pq.write_table(table.replace_schema_metadata({b"pgemu": json.dumps(about)}), path)
    with pytest.raises(InputError, match="metadata 'pgemu' cannot be used"):
        parquet.read(path)


def test_load_recognises_parquet_and_follows_the_options_it_can(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    parquet.write(BOOT, path)
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "LZ4"
    lowered = load(path, LoweringOptions(init="shared", guest_memory=8 << 30))
    assert (lowered.init, lowered.layout.inode_size, lowered.converts) == ("shared", 8 << 30, True)
    assert lowered.accounting.setup == BOOT.accounting.setup
    with pytest.raises(InputError, match="fixed in this trace"):
        load(path, LoweringOptions(memslots=(GivenSlot(0, 4096),)))
    with pytest.raises(InputError, match="fixed in this trace"):
        load(path, LoweringOptions(dontneed="zap"))


def test_batches_are_stored_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    parquet.write(BOOT, path, batches=(BOOT.records[first : first + 5000] for first in range(0, 15000, 5000)))
    assert np.array_equal(stored(path).records.address, BOOT.records.address)
    assert pq.ParquetFile(path).metadata.num_row_groups == 3


def test_nothing_half_written_remains(tmp_path: Path) -> None:
    def failing() -> object:
        yield BOOT.records
        raise RuntimeError("stop")

    path = tmp_path / "trace"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="stop"):
        parquet.write(BOOT, path, batches=failing())  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["trace"]
    assert path.read_text() == "before"
    with pytest.raises(InputError, match="cannot be written"):
        parquet.write(BOOT, tmp_path / "no" / "trace")


def test_bad_records_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    records = BOOT.records[:7]
    bad = dataclasses.replace(records, op=np.array([*records.op[:6], 200], np.uint8))
    parquet.write(dataclasses.replace(BOOT, records=bad), path)
    with pytest.raises(InputError, match="trace: row 6: unknown operation code 200"):
        load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="trace: not a whole Parquet file"):
        load(path)


def test_recorded_levels_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    levels = np.arange(len(BOOT.records), dtype=np.uint64).astype(np.uint8) % 4
    parquet.write(dataclasses.replace(BOOT, fault_levels=levels, accesses=False), path)
    back = stored(path)
    assert back.fault_levels is not None
    assert np.array_equal(back.fault_levels, levels)
    assert not back.accesses
    assert np.array_equal(stored(path).records.address, BOOT.records.address)
    parquet.write(BOOT, path)
    back = stored(path)
    assert back.fault_levels is None
    assert back.accesses


def test_levels_that_no_leaf_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    parquet.write(dataclasses.replace(BOOT, fault_levels=np.full(len(BOOT.records), 4, np.uint8)), path)
    with pytest.raises(InputError, match="column 'fault_level' holds 4, expected at most 3"):
        parquet.read(path)
    table = pq.read_table(path)
    number = table.schema.get_field_index("fault_level")
    wide = table.set_column(number, "fault_level", table.column(number).cast(pa.int64()))
    pq.write_table(wide.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputError, match="column 'fault_level' holds 4, expected at most 3"):
        parquet.read(path)  # of any width


def damaged(path: Path, **changes: Any) -> Path:
    """BOOT as a file whose metadata has other values, by their path: `layout__regions__0__size=-1`."""
    parquet.write(BOOT, path)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"pgemu"])
    for where, value in changes.items():
        *steps, last = [int(step) if step.isdigit() else step for step in where.split("__")]
        place = about
        for step in steps:
            place = place[step]
        place[last] = value
    pq.write_table(table.replace_schema_metadata({b"pgemu": json.dumps(about)}), path)
    return path


WRONG = [None, True, "x", "4096", 1.5, -1, -4096, 4097, 1 << 60, 1 << 63, 1 << 64, 10**400, [], {}, [4096]]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(
    "where",
    ["layout__inode_size", "layout__regions__0__address", "layout__regions__0__offset", "layout__regions__1__size"]
    + [f"layout__slots__0__{name}" for name in ("gpa", "size", "hva", "offset")],
)
def test_a_layout_that_no_memory_has_is_refused(tmp_path: Path, where: str, value: Any) -> None:
    with pytest.raises(InputError, match="metadata 'pgemu' cannot be used") as caught:
        load(damaged(tmp_path / "trace", **{where: value}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"layout__regions__0__size": 0},
        {"layout__regions__1__offset": 0},  # where the other one is
        {"layout__regions": [1]},
        {"layout__slots": [{"gpa": 0}]},
        {"layout__refused": [{"slot": 0, "gpa": 0, "size": 4096, "reason": 1}]},
        {"layout__origin": "[/red]"},
        {"layout__page_size": 8192},
        {"layout": []},
        {"setup": -1},
        {"setup": True},
        {"setup": 1.5},
        {"notes": ["a", 1]},
        {"init": ["private"]},
    ],
)
def test_metadata_of_other_shapes_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="metadata 'pgemu' cannot be used"):
        load(damaged(tmp_path / "trace", **changes))


@pytest.mark.parametrize("depth", [100, 100_000])
@pytest.mark.parametrize("ends", ["[]", "{}"])
def test_metadata_nested_however_deep_is_refused(tmp_path: Path, depth: int, ends: str) -> None:
    path = tmp_path / "trace"
    parquet.write(BOOT, path)
    opening = '{"a":' if ends == "{}" else "["
    text = opening * depth + "1" + ends[1] * depth
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"pgemu": text.encode()}), path)
    with pytest.raises(InputError, match="trace: metadata 'pgemu' cannot be used"):
        load(path)


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_records_that_are_not_by_time_are_refused(tmp_path: Path, batch: int) -> None:
    path = tmp_path / "a.parquet"
    times = np.array([3, 3, 9, 8, 10], np.uint64)
    records = Records.build(5, time=times, op=int(Operation.WORK))
    parquet.write(
        dataclasses.replace(BOOT, records=records, accounting=dataclasses.replace(BOOT.accounting, setup=0)), path
    )
    with pytest.raises(InputError, match="row 3: time 8 is before the row above, expected rows by time"):
        list(parquet.iterate(path, batch))


@pytest.mark.parametrize("value", [0, 1, (1 << 32) - 1, 1 << 31])
def test_what_holds_one_value_in_a_row_group_is_that_value(tmp_path: Path, value: int) -> None:
    count = 40
    half = np.arange(count, dtype=np.uint64) // np.uint64(20)
    records = Records.build(
        count, time=np.arange(count), op=Operation.GUEST_FAULT, vm=half, object=np.where(half, value, 7),
        address=np.where(half, np.uint64((1 << 63) + 4096), np.arange(count, dtype=np.uint64) << np.uint64(12)),
    )  # fmt: skip
    path = tmp_path / "a.parquet"
    parquet.write(BOOT, path, [records[:20], records[20:]])
    for batch in (7, 20, 64):
        pieces = list(parquet.iterate(path, batch))
        back = Records.concatenate(pieces)
        assert all(np.array_equal(getattr(back, name), getattr(records, name)) for name in DTYPES)
        assert [piece.object.strides for piece in pieces] == [(0,)] * len(pieces)
        columns = list(parquet.narrow(path, ["op", "vm", "length"], batch))
        assert np.concatenate([one["vm"] for one in columns]).tolist() == half.tolist()
        assert [header for piece in pieces for header in piece.header().tolist()] == records.header().tolist()


@pytest.mark.parametrize("statistics", [True, False])
def test_tables_of_one_value_are_checked_by_it(tmp_path: Path, statistics: bool) -> None:
    rows = {"op": [2] * 5, "flags": [0] * 5, "address": [0] * 5, "offset": [0] * 5, "length": [0] * 5}
    wrong = {"vm": -1, "op": 200, "offset": 5, "actor": 1 << 15}
    for column, value in wrong.items():
        table = pa.table({name: pa.array(values, pa.int64()) for name, values in {**rows, column: [value] * 5}.items()})
        pq.write_table(table, tmp_path / "a.parquet", write_statistics=statistics)
        if column == "offset":  # which no operation of these reads
            assert Records.concatenate(parquet.iterate(tmp_path / "a.parquet")).offset.tolist() == [5] * 5
            continue
        with pytest.raises(InputError, match=f"row 0: .* {value},|row 0: unknown operation code {value}"):
            list(parquet.iterate(tmp_path / "a.parquet"))
