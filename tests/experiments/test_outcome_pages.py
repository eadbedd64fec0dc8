"""Pages of outcomes, read by pyarrow: what was put in comes out, whatever is in a page and wherever pages end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.experiments.replaying import outcomes
from pgemu.experiments.replaying.outcomes import OutcomeFile, Rows
from pgemu.experiments.replaying.pages import Column, PageFile

pytestmark = pytest.mark.same_with_checks

Array = np.ndarray[Any, Any]


def write(path: Path, pages: list[tuple[Array, Array]], words: list[str], groups: list[int]) -> None:
    with path.open("wb") as file:
        pages_of = PageFile(file, [Column("number"), Column("word", texts=True)])
        for i, (numbers, places) in enumerate(pages):
            pages_of.add(numbers, places)
            if i in groups or i == len(pages) - 1:
                pages_of.end_group({"word": words})
        pages_of.finish({"key": b"value"}, "made by hand")


def numbers_of(kind: str, count: int, first: int) -> Array:
    start = np.uint64(first)
    if kind == "consecutive":
        return start + np.arange(count, dtype=np.uint64)
    if kind == "one":
        return np.full(count, start, np.uint64)
    if kind == "few":
        return np.arange(count, dtype=np.uint64) * np.uint64(7) % np.uint64(5)
    return start ^ np.arange(count, dtype=np.uint64) << np.uint64(13)


PAGES = st.lists(
    st.tuples(
        st.sampled_from(["consecutive", "one", "few", "any"]),
        st.integers(1, 700),
        st.sampled_from([0, 1, 255, 256, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 701]),
        st.sampled_from(["one", "any", "wide"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(drawn=PAGES, groups=st.sets(st.integers(0, 5)), size=st.integers(1, 900))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int, int, str]], groups: set[int], size: int
) -> None:
    words = [f"word {i}" for i in range(300)]
    pages = []
    for kind, count, first, places in drawn:
        number = np.arange(count) % (300 if places == "wide" else 9) if places != "one" else np.full(count, 3)
        pages.append((numbers_of(kind, count, first), number.astype(np.uint16 if places == "wide" else np.uint8)))
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    write(path, pages, words, sorted(groups))
    expected = [n for numbers, _ in pages for n in numbers.tolist()], [words[p] for _, at in pages for p in at.tolist()]
    with pq.ParquetFile(path) as file:
        assert file.metadata.metadata == {b"key": b"value"}
        table = file.read()
        assert (table["number"].to_pylist(), table["word"].to_pylist()) == expected
        pieces = [piece.to_pydict() for piece in file.iter_batches(batch_size=size)]
    assert [n for piece in pieces for n in piece["number"]] == expected[0]
    assert [word for piece in pieces for word in piece["word"]] == expected[1]


def test_sizes_and_extremes_are_those_of_the_file(tmp_path: Path) -> None:
    pages = [(numbers_of("consecutive", 1000, 1000 * i), np.zeros(1000, np.uint8)) for i in range(3)]
    write(path := tmp_path / "a.parquet", pages, ["a"], [1])
    about = pq.read_metadata(path)
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    assert [group.num_rows for group in groups] == [2000, 1000]
    assert [(s.min, s.max) for s in (group.column(0).statistics for group in groups)] == [(0, 1999), (2000, 2999)]
    stored = sum(group.column(i).total_compressed_size for group in groups for i in range(2))
    assert path.stat().st_size == 4 + stored + about.serialized_size + 8
    assert stored < 600  # nothing is new in any of 6,000 values


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
