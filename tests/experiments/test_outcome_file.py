"""The file of outcomes: what stands in it for results and operations of any kind, and for none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pgemu.experiments.replaying import outcomes
from pgemu.experiments.replaying.outcomes import OutcomeFile, Rows

pytestmark = pytest.mark.same_with_checks


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    with OutcomeFile(tmp_path / "o") as file:
        file.finish({})
    table = pq.read_table(tmp_path / "o")
    assert (table.num_rows, table.column_names) == (0, ["index", "operation", "result", "detail"])


@pytest.mark.parametrize("status", [[0, -1, 2303, -256], [0, -257], [-1, 1 << 40]])
def test_statuses_have_names_however_large(
    tmp_path: Path, status: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(outcomes, "_BLOCK", 3)
    count = len(status)
    rows = Rows(
        np.arange(count, dtype=np.uint64), np.array([3, 200, 3, 3][:count], np.uint8), np.array(status, np.int64),
        np.full(count, 1 << 63, np.uint64),
    )  # fmt: skip
    with OutcomeFile(tmp_path / "o") as file:
        file.add(rows)
        file.finish({})
    table = pq.read_table(tmp_path / "o").to_pydict()
    names = {0: "ok", -1: "-EPERM", 2303: "status 0x8ff", -256: "-errno 256", -257: "-errno 257"}
    names |= {1 << 40: "status 0x10000000000"}
    assert table["result"] == [names[one] for one in status]
    assert table["operation"] == ["convert", "unknown", "convert", "convert"][:count]
    assert table["detail"] == [1 << 63] * count
