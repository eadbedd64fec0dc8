"""The loop of the kernel's benchmark, as its source has it."""

from __future__ import annotations

import pytest

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Flag, Operation

pytestmark = pytest.mark.same_with_checks

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30


def test_the_defaults_are_the_benchmarks() -> None:
    assert workload.defaults_of("convert-loop") == {"guest_memory": 4 * GIB, "iterations": 10, "stride": PAGE}
    records = workload.open("convert-loop", stride=2 * MIB).records  # as few records as there can be
    assert [int((records.op == op).sum()) for op in (Operation.CONVERT, Operation.GUEST_FAULT)] == [20, 11 * 2048]
    converts = records.op == Operation.CONVERT
    assert records.flags[converts].tolist() == [int(Flag.SHARED), int(Flag.PRIVATE)] * 10
    assert set(records.length[converts].tolist()) == {4 * GIB}


def test_each_page_is_accepted_before_the_loop_and_in_each_turn() -> None:
    records = workload.open("convert-loop", guest_memory=MIB, iterations=2).records
    turn = [(Operation.CONVERT, 0)] * 2 + [(Operation.GUEST_FAULT, 4 * GIB + i * PAGE) for i in range(256)]
    expected = turn[2:] + turn * 2
    found = list(zip(records.op[2:].tolist(), records.address[2:].tolist(), strict=True))
    assert found == [(int(op), address) for op, address in expected]
    assert int(Flag.ACCEPT_4K) & int(records.flags[2])


def test_more_than_memory_holds_is_refused() -> None:
    with pytest.raises(InputError, match=r"^workload:convert-loop: iterations 1000 make .* records, expected at most"):
        workload.open("convert-loop", iterations=1000)
