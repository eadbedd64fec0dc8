"""Accesses as records: what crosses a page, threads as actors, files that are mostly foreign, memory that stays."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import readers, source
from pgemu.trace.accesses import THREADS, AccessStream, Actors, Tally, accesses
from pgemu.trace.readers import lackey
from pgemu.trace.schema import DTYPES, Operation, Records
from streams import in_pieces

pytestmark = pytest.mark.same_with_checks

TOP = (1 << 64) - 1
ADDRESS = st.one_of(
    st.integers(0, TOP),
    st.builds(lambda page, off: max(0, (page << 12) - off), st.integers(1, 1 << 52), st.integers(1, 9)),
)
ACCESSES = st.lists(st.tuples(ADDRESS, st.integers(0, 20_000), st.integers(0, 2), st.integers(0, 255)), max_size=30)


def columns(found: list[tuple[int, int, int, int]]) -> tuple[Any, ...]:
    dtypes = np.uint64, np.uint64, np.uint8, np.uint16
    return tuple(np.array([row[i] for row in found], dtype) for i, dtype in enumerate(dtypes))


@given(ACCESSES)
def test_what_crosses_a_page_is_two_records(found: list[tuple[int, int, int, int]]) -> None:
    address, size, flags, actor = columns(found)
    tally = Tally()
    records = accesses(address, size, flags, actor, np.arange(len(found), dtype=np.uint64), tally)
    expected, crossing, beyond = [], 0, 0
    for number, (first, count, flag, thread) in enumerate(found):
        last = min(first + max(count, 1) - 1, TOP)
        expected.append((number, flag, thread, first))
        if last >> 12 != first >> 12:
            expected.append((number, flag, thread, ((first >> 12) + 1) << 12))
            crossing += 1
            beyond += (last >> 12) - (first >> 12) > 1
    got = zip(*(getattr(records, name).tolist() for name in ("time", "flags", "actor", "address")), strict=True)
    assert list(got) == expected
    assert (tally.crossing, tally.ignored["pages of accesses beyond the second"]) == (crossing, beyond)


def test_columns_that_accesses_do_not_read_are_0_and_cannot_be_written() -> None:
    address, size, flags, _ = columns([(0x1000, 8, 1, 0)])
    for records in (
        accesses(address, size, flags, 3, address, Tally()),
        accesses(address, None, flags, 3, address, Tally()),
    ):
        whole = Records.build(1, time=0x1000, op=Operation.GUEST_ACCESS, flags=1, actor=3, address=0x1000)
        assert all((getattr(records, name) == getattr(whole, name)).all() for name in DTYPES)
        with pytest.raises(ValueError, match="read-only"):
            records.op[0] = 0


@given(st.lists(st.lists(st.integers(0, 400), min_size=1), max_size=6))
def test_threads_are_numbered_as_they_appear(batches: list[list[int]]) -> None:
    tally, seen = Tally(), list[int]()
    actors = Actors(tally, "a")
    for batch in batches:
        seen += [thread for thread in dict.fromkeys(batch) if thread not in seen]
        found = actors.of(np.array(batch, np.uint64))
        assert found.dtype == np.uint16
        assert found.tolist() == [seen.index(thread) % THREADS for thread in batch]
    assert tally.threads == max(len(seen), 1)
    assert len(tally.notes) == (len(seen) > THREADS)


def test_a_file_is_refused_by_what_is_more() -> None:
    tally = Tally()
    tally.refuse_foreign("a", "line", 1, "text", at_end=True)
    with pytest.raises(InputError, match="a: no access in it, expected text"):
        tally.refuse_foreign("a", "line", 0, "text", at_end=True)
    tally.reject(3, "x" * 100)
    tally.reject(4, "y")
    tally.refuse_foreign("a", "line", 1, "text")  # few so far
    tally.refuse_foreign("a", "line", 2, "text", at_end=True)
    with pytest.raises(InputError, match=f"a: 2 of 3 lines are not understood, the first is line 3: '{'x' * 80}', exp"):
        tally.refuse_foreign("a", "line", 1, "text", at_end=True)
    tally.reject(5, "z", 200_000)
    with pytest.raises(InputError, match="a: 200,002 of 200,003 lines"):
        tally.refuse_foreign("a", "line", 1, "text")


def test_a_stream_counts_what_was_taken_and_leaves_out_what_is_empty() -> None:
    tally = Tally()
    stream = AccessStream.of("a", "b", [Records.build(0), Records.build(3), Records.build(2)], tally)
    assert len(next(stream.batches)) == 3
    assert tally.records == 3
    assert [len(batch) for batch in stream.batches] == [2]
    assert tally.records == 5
    stream.close()


@pytest.mark.parametrize("form", ["lackey", "champsim", "drmemtrace"])
def test_more_of_the_same_takes_no_more_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lackey, "wanted", lambda lines, size, name: False)
    monkeypatch.setattr(lackey, "_BLOCK", 1 << 15)
    monkeypatch.setattr(source, "_RECORD_BLOCK", 1 << 15)
    instruction = np.array([0x401000, 0, 0x7000, 0, 0x1000, 0x2000, 0, 0], np.uint64).tobytes()
    head = np.array([(25, 0, 6), (22, 4, 1)], [("t", "<u2"), ("s", "<u2"), ("v", "<u8")])
    reads = np.array([(0, 8, 0x7FFC), (1, 8, 0x1000)] * 1000, head.dtype)
    piece = {
        "lackey": b"I  0401ab70,3\n M 1fff000ffe,8\n" * 500,
        "champsim": instruction * 500,
        "drmemtrace": reads.tobytes(),
    }

    def peak(times: int) -> int:
        data = head.tobytes() + piece[form] * times if form == "drmemtrace" else piece[form] * times
        opened = in_pieces(data, [1 << 12])
        tracemalloc.start()
        try:
            stream = readers.read(opened, form)
            assert isinstance(stream, AccessStream)
            assert sum(map(len, stream.batches)) > 1000 * times
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = 6 if form == "lackey" else 20
    peak(few)  # what is loaded and cached once
    assert peak(4 * few) < 1.2 * peak(few)
