"""A balloon: holes as captured, and faults on what came back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Operation, Records

pytestmark = pytest.mark.same_with_checks

PAGE, M2, MIB = 4096, 2 << 20, 1 << 20


def of(records: Records, op: Operation) -> Records:
    return records.take(np.flatnonzero(records.op == op))


def test_counts_of_the_captured_balloon() -> None:
    """320 MiB, to 192 and back, by pages: 32,768 holes, each of a page that was touched, and as many faults after."""
    records = workload.open("balloon").records
    holes = of(records, Operation.PUNCH_HOLE)
    assert len(holes) == 32_768
    assert set(holes.length.tolist()) == {PAGE}
    assert len(of(records, Operation.GUEST_FAULT)) == 81_920 + 2 * 32_768
    rows = np.flatnonzero(records.op == Operation.PUNCH_HOLE)
    assert np.array_equal(records.address[rows - 1], records.offset[rows])
    assert sorted(holes.offset.tolist()) == list(range(192 * MIB, 320 * MIB, PAGE))


def test_units_of_free_page_reporting_are_not_touched_before() -> None:
    records = workload.open("balloon", unit=M2, reused=0).records
    assert len(of(records, Operation.PUNCH_HOLE)) == 64
    assert len(of(records, Operation.GUEST_FAULT)) == 81_920


@settings(max_examples=25)
@given(
    st.integers(0, 5), st.sampled_from([PAGE, M2, 2 * M2]), st.integers(0, 4), st.integers(0, 3), st.floats(0, 1),
    st.floats(0, 1),
)  # fmt: skip
def test_whatever_the_parameters(seed: int, unit: int, units: int, rounds: int, reused: float, share: float) -> None:
    """No unit goes into the balloon twice in a round, and what is used again is of those units."""
    given = {"guest_memory": 8 * 2 * M2, "inflated": units * unit, "unit": unit}
    made = workload.open("balloon", seed, rounds=rounds, reused=reused, scattered=share, **given)
    holes = of(made.records, Operation.PUNCH_HOLE).offset
    assert len(holes) == units * rounds
    touched = of(made.records, Operation.GUEST_FAULT)
    first = 8 * 2 * M2 // PAGE
    before = units * (unit == PAGE)
    again = round(reused * units * unit / PAGE)
    assert len(touched) == first + rounds * (before + again)
    for turn in range(rounds):
        given_back = Counter(holes[turn * units : (turn + 1) * units].tolist())
        assert not given_back or max(given_back.values()) == 1
        begin = first + turn * (before + again) + before
        used = touched.address[begin : begin + again]
        assert {int(address) // unit * unit for address in used.tolist()} <= set(given_back)
        assert len(set(used.tolist())) == again


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"unit": 3 * PAGE}, "unit 12288: expected 4096 or a multiple of 2097152"),
        ({"inflated": 1024 * MIB}, "inflated 1073741824: expected a multiple of 4096 from 0 to 335544320"),
        ({"rounds": 1000}, "rounds 1000 touch .* pages, expected at most"),
    ],
)
def test_what_does_not_fit_is_refused(parameters: dict[str, float], expected: str) -> None:
    with pytest.raises(InputError, match=f"^workload:balloon: {expected}"):
        workload.open("balloon", **parameters)
