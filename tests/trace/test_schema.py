"""The schema: what records hold, how they are packed, and that every operation is described."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.errors import InputError
from pgemu.trace.schema import ACTOR_LIMIT, COLUMNS, DTYPES, SIMULATED, Flag, Operation, Records, columns_table


def test_every_operation_is_described_with_existing_columns() -> None:
    assert set(COLUMNS) == set(Operation)
    assert all(set(meanings) <= set(DTYPES) for meanings in COLUMNS.values())


def test_table_has_a_row_per_operation_and_a_dash_for_unread_columns() -> None:
    rows = columns_table().splitlines()[2:]
    assert len(rows) == len(Operation)
    unpin = next(row for row in rows if row.startswith("| unpin "))
    assert [cell.strip() for cell in unpin.strip("|").split("|")] == ["unpin", "12", *"---", "pin", *"---"]


def test_operations_without_a_machine_are_not_called_simulated() -> None:
    missing = set(Operation) - SIMULATED
    assert {operation.name for operation in missing} == {
        "NESTED_MAP",
        "NESTED_UNMAP",
        "GUEST_ACCESS",
    }


def test_header_packs_the_small_columns() -> None:
    records = Records.build(1, op=Operation.CONVERT, flags=int(Flag.SHARED), actor=0x102, vm=0x304, space=0x506)
    assert records.header().dtype == np.uint64
    assert int(records.header()[0]) == 0x0506_0304_0102_0803


def test_slices_are_views_and_pieces_join_in_order() -> None:
    records = Records.build(4, op=Operation.GUEST_FAULT, address=[1, 2, 3, 4])
    assert np.shares_memory(records[1:3].address, records.address)
    assert Records.concatenate([records[2:], records[:2]]).address.tolist() == [3, 4, 1, 2]
    assert len(Records.concatenate([])) == 0


def test_wrong_dtype_length_or_name_is_refused() -> None:
    columns: dict[str, Any] = {name: np.zeros(2, dtype) for name, dtype in DTYPES.items()}
    with pytest.raises(ValueError, match="actor of uint64"):
        Records(**{**columns, "actor": np.zeros(2, np.uint64)})
    with pytest.raises(ValueError, match="length of "):
        Records(**{**columns, "length": np.zeros(3, np.uint64)})
    with pytest.raises(TypeError, match="column colour: expected some of time"):
        Records.build(1, colour=1)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("op", 99, "row 12: unknown operation code 99"),
        ("op", 0, "row 12: unknown operation code 0"),
        ("actor", ACTOR_LIMIT, "row 12: actor 1024, expected less than 1024"),
        ("offset", 0x1001, "row 12: offset 0x1001, expected a multiple of 4096"),
        ("length", 1, "row 12: length 0x1, expected a multiple of 4096"),
    ],
)
def test_records_from_outside_are_checked(column: str, value: int, message: str) -> None:
    records = Records.build(3, op=Operation.CONVERT, offset=0x1000, length=0x1000)
    records.check("a.parquet", 10)
    getattr(records, column)[2] = value
    with pytest.raises(InputError, match="^a.parquet: " + message):
        records.check("a.parquet", 10)


@pytest.mark.parametrize("op", Operation)
@pytest.mark.parametrize("column", ["offset", "length"])
def test_only_bytes_that_an_operation_reads_must_be_whole_pages(op: Operation, column: str) -> None:
    records = Records.build(1, op=op)
    getattr(records, column)[0] = 5
    if COLUMNS[op].get(column, "").startswith("bytes"):
        with pytest.raises(InputError, match=f"row 0: {column} 0x5, expected a multiple of 4096"):
            records.check("a.parquet")
    else:
        records.check("a.parquet")
