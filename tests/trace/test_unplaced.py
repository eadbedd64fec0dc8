"""Tables of the schema's columns that others wrote: read whatever their types, laid out as they say, or refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import GivenSlot, LoweringOptions, load
from pgemu.trace.readers import parquet
from pgemu.trace.schema import DTYPES, Flag, Operation

pytestmark = pytest.mark.same_with_checks

M, G = 1 << 20, 1 << 30
HVA = 0x7F00_0000_0000
SMALL = LoweringOptions(page_size=2 * M)
# 4 MiB mapped, bound, touched by guest and host, and a page of it converted.
ROWS: dict[str, list[int]] = {
    "op": [Operation.MMAP, Operation.BIND, Operation.GUEST_FAULT, Operation.HOST_FAULT, Operation.CONVERT],
    "flags": [0, 0, Flag.WRITE, 0, Flag.SHARED],
    "address": [HVA, 0, 0x1000, HVA + 4096, 0],
    "offset": [0, 0, 0, 0, 4096],
    "length": [4 * M, 4 * M, 0, 0, 4096],
}
WIDE = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
MOST = {type_: int(np.iinfo(type_.to_pandas_dtype()).max) for type_ in WIDE}


def store(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def operations(path: Path, options: LoweringOptions = SMALL) -> list[tuple[int, ...]]:
    """Columns of what is replayed, behind what was set up beside the file."""
    found = load(path, options)
    assert found.accounting.balanced()
    records = found.records
    columns = (getattr(records, name).tolist() for name in ("op", "flags", "address", "offset", "length"))
    return list(zip(*columns, strict=True))


def rows(columns: dict[str, list[int]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in zip(*columns.values(), strict=True)]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """The same trace, as anybody may have written it."""
    arrays = {}
    for name, values in ROWS.items():
        if name == "op" and draw(st.booleans()):
            spell = draw(st.sampled_from([str.upper, str.lower, lambda word: word.replace("_", " ").title()]))
            array = pa.array([spell(Operation(op).name) for op in values], draw(st.sampled_from(TEXTS)))
        elif name == "flags" and draw(st.booleans()):
            array = pa.array(["|".join(flag.name or "" for flag in Flag(flags)) for flags in values])
        else:
            array = pa.array([int(value) for value in values], draw(st.sampled_from(fitting(values))))
        if draw(st.booleans()) and array.type != pa.string_view():
            array = array.dictionary_encode()
        arrays[name] = array
    for name, dtype in DTYPES.items():
        if name not in arrays and draw(st.booleans()):
            arrays[name] = pa.array(np.zeros(5, dtype))
    for name in draw(st.lists(st.sampled_from(["__index_level_0__", "é", "x.y", "comment\x1b"]), unique=True)):
        arrays[name] = pa.array([[1], [2], [], [], [3]])
    order = draw(st.permutations(sorted(arrays)))
    table = pa.table({name: arrays[name] for name in order})
    return table.replace_schema_metadata({b"pandas": b"{}"}) if draw(st.booleans()) else table


TEXTS = [pa.string(), pa.large_string(), pa.string_view()]


def fitting(values: list[int]) -> list[pa.DataType]:
    return [type_ for type_, most in MOST.items() if max(values) <= most]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), group=st.integers(1, 5))
def test_a_trace_is_the_same_however_it_was_written(tmp_path: Path, table: pa.Table, group: int) -> None:
    path = tmp_path / "a"
    pq.write_table(table, path, row_group_size=group)
    assert operations(path) == rows(ROWS)
    found = load(path, SMALL)
    assert (found.accounting.setup, found.accounting.inputs, found.init) == (2, {"record": 3}, "private")
    assert (found.layout.origin, found.layout.inode_size) == ("trace", 4 * M)
    assert [(slot.gpa, slot.size, slot.hva) for slot in found.layout.slots] == [(0, 4 * M, HVA)]
    unread = [name for name in table.column_names if name not in DTYPES]
    assert any("not read" in note and f"{len(unread)} column" in note for note in found.notes) == bool(unread)
    missing = [name for name in DTYPES if name not in table.column_names]
    assert not missing or f"columns that it does not have hold 0: {', '.join(missing)}" in found.notes
    assert all(note.isprintable() for note in found.notes)


def test_pgemu_s_own_metadata_may_be_lost_on_the_way(tmp_path: Path) -> None:
    """Whoever filters a stored trace with another tool keeps what it asks for, not where it lay."""
    boot = workload.open("tdx-boot")
    parquet.write(boot, tmp_path / "a")
    store(tmp_path / "b", pq.read_table(tmp_path / "a").replace_schema_metadata(None))
    found = load(tmp_path / "b")
    for name in DTYPES:
        assert np.array_equal(getattr(found.records, name), getattr(boot.records, name))
    assert (found.layout.inode_size, found.init) == (boot.layout.inode_size, boot.init)
    places = [(slot.gpa, slot.size, slot.hva, slot.offset) for slot in boot.layout.slots]
    assert [(slot.gpa, slot.size, slot.hva, slot.offset) for slot in found.layout.slots] == sorted(places)
    assert found.accounting.setup == boot.accounting.setup


def test_without_slots_memory_is_inferred_as_for_logs(tmp_path: Path) -> None:
    addresses = [0x1000, 5 * M, 3 * G, 8 * G + 7 * M]
    path = store(tmp_path / "a", pa.table({"op": [2] * 4, "flags": [1] * 4, "address": addresses}))
    log = tmp_path / "log"
    log.write_text(
        "".join(
            f"CPU-11 [000] ..... 1.000000: kvm_page_fault: vcpu 0 rip 0x0 address {address:#x} error_code 0x100000006\n"
            for address in addresses
        )
    )
    for options in (SMALL, LoweringOptions(), LoweringOptions(memslots=(GivenSlot(0, 16 * G, 2 * G),))):
        found, expected = load(path, options), load(log, options)
        assert found.layout == expected.layout
        for name in ("op", "flags", "address", "offset", "length"):
            assert np.array_equal(getattr(found.records, name), getattr(expected.records, name))


@pytest.mark.parametrize(
    ("op", "flags", "init"),
    [
        (Operation.GUEST_FAULT, Flag.PRIVATE | Flag.WRITE, "private"), (Operation.CONVERT, Flag.SHARED, "private"),
        (Operation.GUEST_FAULT, Flag.SHARED, "shared"), (Operation.GUEST_FAULT, Flag.WRITE, "shared"),
        (Operation.ZAP, Flag.MADVISE, "shared"),
    ],
)  # fmt: skip
def test_memory_begins_private_where_a_record_needs_private_memory(
    tmp_path: Path, op: Operation, flags: int, init: str
) -> None:
    columns = {name: values[:4] for name, values in ROWS.items()}
    columns["op"][2], columns["flags"][2], columns["address"][2] = op, flags, HVA if op is Operation.ZAP else 0
    columns["length"][2] = 0 if op is Operation.GUEST_FAULT else 4096
    found = load(store(tmp_path / "trace.parquet", pa.table(columns)), SMALL)
    assert found.init == init
    assert load(tmp_path / "trace.parquet", LoweringOptions(page_size=2 * M, init="shared")).init == "shared"


def test_host_addresses_without_a_mapping_are_left_out_and_counted(tmp_path: Path) -> None:
    columns = {name: values[2:] for name, values in ROWS.items()}
    path = store(tmp_path / "a", pa.table(columns))
    found = load(path, SMALL)
    assert found.accounting.without_operation == {"not guest memory (no mmap row: host addresses unknown)": 1}
    assert [Operation(op).name for op in found.records.op] == ["MMAP", "BIND", "GUEST_FAULT", "CONVERT"]
    assert found.layout.inode_size == 2 * M
    given = LoweringOptions(page_size=2 * M, memslots=(GivenSlot(0, 4 * M, 0),))
    assert [Operation(op).name for op in load(path, given).records.op][2:] == ["GUEST_FAULT", "HOST_FAULT", "CONVERT"]


def test_an_offset_that_may_be_any_memory_is_refused(tmp_path: Path) -> None:
    """With a hole below 4 GiB the offset of what is above may be the address, or follow what is below."""
    columns = {
        "op": [2, 2, 3],
        "flags": [1, 1, 8],
        "address": [0, 4 * G, 0],
        "offset": [0, 0, 4 * G],
        "length": [0, 0, 4096],
    }
    path = store(tmp_path / "a", pa.table(columns))
    with pytest.raises(InputError, match=r"a: row 2: which guest memory offset 0x100000000 is cannot be inferred"):
        load(path)
    found = load(path, LoweringOptions(memslots=(GivenSlot(0, 2 * G, 0), GivenSlot(4 * G, 2 * G, 4 * G))))
    assert found.layout.inode_size == 6 * G


_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


@given(
    unit=st.sampled_from(list(_UNITS)), values=st.lists(st.integers(-3, (1 << 63) - 1), min_size=5, max_size=5),
    zone=st.sampled_from([None, "UTC", "Asia/Tokyo"]), duration=st.booleans(),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_timestamps_of_any_unit_are_nanoseconds_exactly(
    tmp_path: Path, unit: str, values: list[int], zone: str | None, duration: bool
) -> None:
    """Of a timestamp those since 1970; what 64 bits do not hold is refused."""
    values.sort()
    type_ = pa.duration(unit) if duration else pa.timestamp(unit, zone)
    table = pa.table({**ROWS, "time": pa.array(values, pa.int64()).cast(type_)})
    path = tmp_path / "a"
    try:
        pq.write_table(table, path)  # Parquet has no seconds
    except pa.ArrowInvalid:
        return
    wanted = [value * _UNITS[unit] for value in values]
    if wanted[0] >= 0 and wanted[-1] < 1 << 64:
        assert load(path, SMALL).records.time.tolist() == wanted
    else:
        with pytest.raises(InputError, match=r"row \d: column 'time' holds -?\d+ m?u?n?s, expected 0 to 2\^64 - 1 ns"):
            load(path, SMALL)


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("op", None, "column 'op' is missing, expected op; flags, address"),
        ("address", None, "row 0: column 'address' is missing, which mmap reads"),
        ("offset", None, "row 0: column 'offset' is missing, which mmap reads"),
        ("length", None, "row 0: column 'length' is missing, which mmap reads"),
        ("flags", None, "row 0: column 'flags' is missing, which mmap reads"),
        ("vm", [0, 0, -1, 0, 0], "row 2: column 'vm' holds -1, expected 0 to 65535"),
        ("actor", [0, 0, 0, 70000, 0], "row 3: column 'actor' holds 70000, expected 0 to 65535"),
        ("address", [0, 0, 0, 0, -(1 << 63)], "row 4: column 'address' holds -9223372036854775808, expected 0 to 18"),
        ("op", [6, 9, 2, None, 3], "row 3: column 'op' has a null value, expected none"),
        ("op", [None] * 5, "row 0: column 'op' has a null value, expected none"),
        ("op", ["mmap", "bind", "guest fault", "fly", "convert"], "row 3: column 'op' holds 'fly', expected names"),
        ("flags", ["", "", "WRITE|FLY", "", ""], "row 2: column 'flags' holds 'WRITE|FLY', expected names"),
        ("address", ["0"] * 5, "column 'address' holds string, expected integers"),
        ("address", [0.0] * 5, "column 'address' holds double, expected integers"),
        ("op", [True] * 5, "column 'op' holds bool, expected integers or names"),
        ("time", [datetime.date(2026, 1, 1)] * 5, r"column 'time' holds date32\[day\], expected integers"),
        ("actor", [datetime.datetime(2026, 1, 1)] * 5, r"column 'actor' holds timestamp\[us\], expected integers"),
        ("time", [datetime.datetime(1969, 1, 1)] * 5, r"row 0: column 'time' holds -31536000000000 us, expected 0 to"),
        ("offset", [[0]] * 5, "column 'offset' holds list<.*>, expected integers"),
        ("offset", [0, 0, 0, 0, 5], "row 4: offset 0x5, expected a multiple of 4096"),
        ("address", [HVA, 0, 1 << 60, HVA, 0], "row 2: address 0x1000000000000000, expected guest memory below 2.52"),
        ("length", [4 * M, 4 * M, 0, 0, 1 << 60], "row 4: length 0x1000000000000000, expected guest memory"),
        ("vm", [0, 0, 1, 0, 0], "row 2: vm 1, expected 0, the only VM of a trace"),
        ("object", [0, 5, 0, 0, 0], "row 1: object 5, expected 0, the only guest_memfd of a trace"),
        ("flags", [0, 0, 0, 0, 0], "row 4: flags 0, expected PRIVATE or SHARED"),
        ("flags", ["", "", "", "", "PRIVATE|SHARED"], "row 4: flags 12, expected PRIVATE or SHARED, not both"),
        ("time", [0, 1, 2, 1, 3], "row 3: time 1 is before the row above, expected rows by time"),
    ],
)
def test_what_cannot_be_a_trace_s_column_is_named(tmp_path: Path, column: str, values: Any, complaint: str) -> None:
    columns: dict[str, Any] = {**ROWS, column: values}
    path = store(tmp_path / "a", pa.table({name: values for name, values in columns.items() if values is not None}))
    with pytest.raises(InputError, match=f"/a: {complaint}"):
        load(path, SMALL)


@pytest.mark.parametrize("column", ["op", "fault_level"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, column: str) -> None:
    arrays = [pa.array(values) for values in ROWS.values()] + [pa.array([1] * 5)] * 2
    path = store(tmp_path / "a", pa.Table.from_arrays(arrays, [*ROWS, column, column]))
    with pytest.raises(InputError, match=f"column '{column}' is there twice"):
        load(path)


def test_options_of_logs_and_slots_beside_those_of_the_records_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "a", pa.table(ROWS))
    with pytest.raises(InputError, match=r"its memory slots are records .bind., which --memslot cannot replace"):
        load(path, LoweringOptions(memslots=(GivenSlot(0, 4 * M),)))
    for options in (
        LoweringOptions(dontneed="zap"),
        LoweringOptions(vm_processes=(1,)),
        LoweringOptions(tdx_shared_bit="47"),
    ):
        with pytest.raises(
            InputError, match="the VM's process, its addresses and the meaning of MADV_DONTNEED are fixed"
        ):
            load(path, options)


def test_more_records_than_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of one value takes no room in a file: here 2^24 records in some kilobytes."""
    path = store(tmp_path / "a", pa.table({"op": np.full(1 << 24, 2, np.uint8)}))
    assert path.stat().st_size < 1 << 16
    monkeypatch.setattr(parquet, "_batches", None)  # it is not asked
    monkeypatch.setattr(parquet.os, "sysconf", {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}.__getitem__)
    with pytest.raises(InputError, match="16777216 records take 1408 MiB of memory, more than the 1024 there are"):
        load(path)


def test_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    names = [Operation(op).name for op in ROWS["op"]]
    path = tmp_path / "a"
    for op in (polars.Series(ROWS["op"]), polars.Series(names, dtype=polars.Categorical), polars.Series(names)):
        polars.DataFrame({**ROWS, "op": op}).write_parquet(path)
        assert operations(path) == rows(ROWS)


def test_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    names = [Operation(op).name for op in ROWS["op"]]
    path = tmp_path / "a"
    for op in (ROWS["op"], pandas.array(ROWS["op"], "Int64"), pandas.Categorical(names), names):
        pandas.DataFrame({**ROWS, "op": op}, index=list("abcde")).to_parquet(path)
        assert operations(path) == rows(ROWS)
        assert any("1 column is not read: __index_level_0__" in note for note in load(path, SMALL).notes)


# --------------------------------------------------------------------------- devices


def of_devices(**columns: list[int]) -> dict[str, list[int]]:
    """ROWS, and rows of devices behind them; columns that are not given hold 0."""
    count = len(columns["op"])
    names = dict.fromkeys([*ROWS, *columns])
    return {name: ROWS.get(name, [0] * len(ROWS["op"])) + columns.get(name, [0] * count) for name in names}


NONE = (1 << 32) - 1  # no inode: memory of the process
DEVICES = of_devices(
    op=[Operation.DMA_MAP, Operation.DMA_MAP, Operation.DMA_ACCESS, Operation.DMA_UNMAP, Operation.DMA_UNMAP],
    flags=[3, 3, 0, 0, 0],
    object=[NONE, 0, 7, 0, 0],
    space=[0, 1, 0, 0, 0],
    address=[0x1000, 0x1000, 0x1234, 0x1000, 0],
    offset=[HVA + 4096, 4096, 0, 0, 0],
    length=[4096, 4096, 8, 4096, (1 << 64) - 1],
)


def table_of(columns: dict[str, list[int]]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.uint64()) for name, values in columns.items()})


def test_rows_of_devices_are_read(tmp_path: Path) -> None:
    """Host addresses are no places in the guest_memfd, an access has any length, and all ones are everything."""
    path = store(tmp_path / "a.parquet", table_of(DEVICES))
    found = load(path, SMALL)
    assert found.layout.inode_size == 4 * M
    assert found.records.length.tolist()[-5:] == DEVICES["length"][-5:]
    assert found.records.space.tolist()[-5:] == [0, 1, 0, 0, 0]
    assert found.records.offset.tolist()[-5:-3] == [HVA + 4096, 4096]


def test_maps_by_host_addresses_that_nothing_tells_are_left_out(tmp_path: Path) -> None:
    kept = [i for i, op in enumerate(DEVICES["op"]) if op not in (Operation.MMAP, Operation.HOST_FAULT)]
    columns = {name: [values[i] for i in kept] for name, values in DEVICES.items()}
    found = load(store(tmp_path / "a.parquet", table_of(columns)), SMALL)
    assert sum(found.accounting.without_operation.values()) == 1
    assert int((found.records.op == Operation.DMA_MAP).sum()) == 1


def test_a_copy_names_an_address_space(tmp_path: Path) -> None:
    columns = of_devices(op=[Operation.DMA_MAP], flags=[3 | Flag.COPY], object=[5], offset=[1 << 60], length=[4096])
    found = load(store(tmp_path / "a.parquet", table_of(columns)), SMALL)
    assert found.records.object.tolist()[-1] == 5
