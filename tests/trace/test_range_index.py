"""Which ranges meet: as trying each pair says, without trying each pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu.trace.range_index import ALWAYS, RangeIndex, covered

pytestmark = pytest.mark.same_with_checks

TOP = (1 << 64) - 1
ADDRESS = st.one_of(st.integers(0, 40), st.integers(TOP - 40, TOP), st.integers(0, TOP))
RANGE = st.tuples(ADDRESS, ADDRESS)
STAND = st.one_of(st.just(ALWAYS), st.tuples(st.integers(0, 60), st.integers(0, 60)))


@given(
    entries=st.lists(st.tuples(st.integers(0, 50), RANGE), max_size=30),
    queries=st.lists(st.tuples(RANGE.map(sorted).map(tuple), STAND), max_size=12),
    timed=st.booleans(),
)
def test_meetings_are_those_of_each_pair(
    entries: list[tuple[int, tuple[int, int]]], queries: list[tuple[tuple[int, int], tuple[int, int]]], timed: bool
) -> None:
    entries.sort(key=lambda entry: entry[0])
    rows = np.array([row for row, _ in entries], np.intp)
    first, last = (np.array([range_[side] for _, range_ in entries], np.uint64) for side in (0, 1))
    found = RangeIndex(rows, first, last).meetings(
        [range_ for range_, _ in queries], [stand for _, stand in queries] if timed else None
    )
    expected = []
    for number, ((low, high), (begin, end)) in enumerate(queries):
        met = [
            position
            for position, (row, (one, other)) in enumerate(entries)
            if one <= other and one <= high and other >= low and (not timed or begin <= row < end)
        ]
        if met:
            expected.append((number, met))
    assert [(number, met.tolist()) for number, met in found] == expected


@given(st.lists(ADDRESS, max_size=20), st.lists(RANGE, max_size=10))
def test_covered_addresses_lie_in_one_of_the_ranges(addresses: list[int], ranges: list[tuple[int, int]]) -> None:
    found = covered(np.array(addresses, np.uint64), ranges)
    assert found.tolist() == [any(low <= one <= high for low, high in ranges) for one in addresses]
