"""A guest's accesses through TLBs over a design's stage 2, and what makes operations of them.

The controls walk the same addresses without TLBs: through both stages (translate_nested), and through the tables of the
guest alone (translate).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from amounts import amount
from pgemu import Config
from pgemu.guest import DesignRun, GuestOptions, GuestProgram, Tlb
from pgemu.pytest_plugin import Benchmark
from pgemu.tables.translation import Kind, translate_nested
from pgemu.trace.schema import Operation, Records
from pgemu_kernels import words as W

COUNT = amount(1 << 20, 1 << 14)
BASE = np.uint64(0x7F00_0000_0000)
ROUNDS = 7
Array = np.ndarray[Any, Any]


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
def timed(pgemu_benchmark: Benchmark, stream: tuple[str, DesignRun, Records]) -> Callable[..., None]:
    def timed(path: str, call: Callable[[], object], role: str = "call") -> None:
        pgemu_benchmark(call, operations=COUNT, group=f"{path}, {stream[0]}", role=role, rounds=ROUNDS)

    return timed


@pytest.mark.parametrize("path", ["look up", "collapse"])
def test_guest(stream: tuple[str, DesignRun, Records], timed: Callable[..., None], path: str) -> None:
    _, run, records = stream
    batch = run.program.feed(records)
    assert len(batch.records) == 0
    timed(path, (lambda: run.feed(batch)) if path == "look up" else lambda: run.program.feed(records))


@pytest.mark.parametrize("path", ["look up", "collapse"])
def test_control(stream: tuple[str, DesignRun, Records], timed: Callable[..., None], path: str) -> None:
    _, run, records = stream
    table, address = run.program.memory.tables[0], records.address
    if path == "collapse":
        timed(path, lambda: table.translate(address), "control")
        return
    run.write_tables()
    places = 0, table.root, run.machine.register(W.R_STAGE2_FORMAT), run.vm.root
    assert (translate_nested(run.machine, *places, address, Kind.USER_READ).status == 0).all()
    timed(path, lambda: translate_nested(run.machine, *places, address, Kind.USER_READ), "control")
