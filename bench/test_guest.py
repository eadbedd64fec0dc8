"""A guest's accesses through TLBs over a design's stage 2, and what makes operations of them.

The control sums the addresses of the same batch of accesses into as many counters as a first-level TLB has entries: a
load, an index and a store each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from pgemu import Config
from pgemu.guest import DesignRun, GuestOptions, GuestProgram, Tlb
from pgemu.trace.schema import Operation, Records

COUNT = 1 << 20
BASE = np.uint64(0x7F00_0000_0000)
ROUNDS = 7
Array = np.ndarray[Any, Any]


@njit(nogil=True, _nrt=False)
def tally(addresses, counters):
    """counters[page % 64] += 1 for each address."""
    for address in addresses:
        counters[address >> np.uint64(12) & np.uint64(63)] += np.uint64(1)


def offsets(pattern: str) -> Array:
    random = np.random.default_rng(1)
    if pattern == "sequential":
        return np.arange(COUNT, dtype=np.uint64) * np.uint64(8)
    size = {"random 4M": 4 << 20, "random 1G": 1 << 30}[pattern]
    return random.integers(size, size=COUNT, dtype=np.uint64)


@pytest.fixture(scope="module", params=["sequential", "random 4M", "random 1G"])
def stream(request: Any) -> tuple[str, DesignRun, Records]:
    """Every page was touched before."""
    records = Records.build(COUNT, op=Operation.GUEST_ACCESS, address=offsets(request.param) + BASE)
    run = DesignRun(Config("pfnmap", vm="sw"), GuestProgram(GuestOptions()), Tlb("skylake-sp"))
    run.feed(run.program.feed(records))
    return request.param, run, records


@pytest.fixture
def timed(benchmark: Any, stream: tuple[str, DesignRun, Records]) -> Callable[[str, Callable[[], object]], None]:
    def timed(path: str, call: Callable[[], object]) -> None:
        benchmark.group = f"{path}, {stream[0]}"
        benchmark.extra_info.update(operations=COUNT)
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)

    return timed


@pytest.mark.parametrize("path", ["look up", "collapse"])
def test_guest(stream: tuple[str, DesignRun, Records], timed: Callable[..., None], path: str) -> None:
    _, run, records = stream
    batch = run.program.feed(records)
    assert len(batch.records) == 0
    timed(path, (lambda: run.feed(batch)) if path == "look up" else lambda: run.program.feed(records))


@pytest.mark.parametrize("path", ["look up", "collapse"])
def test_control(stream: tuple[str, DesignRun, Records], timed: Callable[..., None], path: str) -> None:
    addresses, counters = stream[2].address, np.zeros(64, np.uint64)
    timed(path, lambda: tally(addresses, counters))
