"""Bounce buffers that stay shared: what is asked for follows from the parameters."""

from __future__ import annotations

import numpy as np
import pytest

from pgemu import workload
from pgemu.trace import Flag, Operation
from pgemu.trace.memory_layout import SYNTHETIC_HVA

pytestmark = pytest.mark.same_with_checks

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30


def test_without_more_there_is_one_conversion_of_64_mib() -> None:
    """4 GiB are 2048 blocks of 2M, 32 of them buffers; each request is two touches."""
    records = workload.open("swiotlb-steady").records
    counts = {Operation(op).name: int((records.op == op).sum()) for op in set(records.op.tolist())}
    assert counts == {"MMAP": 1, "BIND": 1, "CONVERT": 1, "GUEST_FAULT": 2016 + 100_000, "HOST_FAULT": 100_000}
    convert = records.op == Operation.CONVERT
    assert records.length[convert].tolist() == [64 * MIB]
    assert records.offset[convert].tolist() == [2 * GIB - 64 * MIB]
    # 10,000 a second: 10 seconds of I/O, of which the last request begins 0.1 ms before their end.
    host = np.flatnonzero(records.op == Operation.HOST_FAULT)
    assert int(records.time[host[-1]] - records.time[host[0]]) == 99_999 * 100_000


def test_requests_take_slots_one_behind_the_other_and_all_lie_in_the_buffers() -> None:
    records = workload.open("swiotlb-steady", guest_memory=256 * MIB, requests=300, request=256 << 10).records
    host = records.take(np.flatnonzero(records.op == Operation.HOST_FAULT))
    pages = (host.address - np.uint64(SYNTHETIC_HVA)) // np.uint64(PAGE)
    room, first = 64 * MIB // PAGE, 192 * MIB // PAGE
    assert pages.tolist() == [first + i % room for i in range(300 * 64)]
    # Whoever fills a buffer writes to all of it before the other one reads the first page.
    steady = np.flatnonzero((records.op == Operation.HOST_FAULT) | (records.flags & np.uint8(int(Flag.SHARED)) != 0))
    rows = records.take(steady[records.op[steady] != Operation.CONVERT])
    assert len(rows) == 2 * 300 * 64
    for request in range(300):
        part = rows[2 * 64 * request : 2 * 64 * (request + 1)]
        assert [bool(flags & Flag.WRITE) for flags in part.flags.tolist()] == [True] * 64 + [False] * 64
        assert len(set(part.op[:64].tolist())) == len(set(part.op[64:].tolist())) == 1


def test_conversions_are_as_many_a_second_as_asked_for_and_outside() -> None:
    """2000 requests at 1000 a second are 2 seconds: of 151 a second 302."""
    made = workload.open("swiotlb-steady", guest_memory=256 * MIB, requests=2000, rate=1000, conversions=151)
    records = made.records
    converts = np.flatnonzero((records.op == Operation.CONVERT) & (records.length == PAGE))
    assert len(converts) == 302
    assert bool((records.offset[converts] < 192 * MIB).all())
    assert records.offset[converts[::2]].tolist() == records.offset[converts[1::2]].tolist()
    assert set(records.flags[converts[::2]].tolist()) == {int(Flag.SHARED)}
    assert set(records.flags[converts[1::2]].tolist()) == {int(Flag.PRIVATE)}
    steps = np.diff(records.time[converts].astype(np.int64))
    assert steps.min() >= 2 * 10**9 // 302 - 1
    assert steps.max() <= 2 * 10**9 // 302 + 1


def test_no_requests_are_no_steady_state() -> None:
    made = workload.open("swiotlb-steady", guest_memory=128 * MIB, requests=0, conversions=5)
    assert made.accounting.balanced()
    assert int((made.records.op == Operation.HOST_FAULT).sum()) == 0
