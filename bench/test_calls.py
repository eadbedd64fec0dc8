"""Single calls from Python; the control is a call of the same entry that finds no operation to run.

What a call costs beyond the control is Python's: checking the arguments, writing them down, reading the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.machine.single import Single
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark
from pgemu_kernels.words.operations import PAGE_4K
from scene import HVA

CALLS = 2000
ROUNDS = 25
POOL = 1 << 30


@pytest.fixture
def timed(pgemu_benchmark: Benchmark) -> Callable[..., None]:
    def measure(call: Callable[[], object], role: str = "call") -> None:
        def calls() -> None:
            for _ in range(CALLS):
                call()

        pgemu_benchmark(calls, operations=CALLS, group="single calls", role=role, rounds=ROUNDS)

    return measure


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(Config("pfnmap", pool=POOL))


@pytest.fixture(scope="module")
def objects(machine: Machine) -> tuple[Any, Any, Any]:
    """guest_memfd, process and VM; the first page is shared."""
    gmem = machine.create_guest_memfd(POOL)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == vm.bind(gmem, 0).status == 0
    assert gmem.convert(0, PAGE_4K, shared=True).status == 0
    process.touch(HVA)
    return gmem, process, vm


def test_guest_touch(objects: tuple[Any, Any, Any], timed: Callable[..., None]) -> None:
    vm = objects[2]
    timed(lambda: vm.touch(2 * PAGE_4K))


def test_host_touch(objects: tuple[Any, Any, Any], timed: Callable[..., None]) -> None:
    process = objects[1]
    timed(lambda: process.touch(HVA))


def test_convert(objects: tuple[Any, Any, Any], timed: Callable[..., None]) -> None:
    """Of a page that is so already: the call, not the conversion."""
    gmem = objects[0]
    timed(lambda: gmem.convert(0, PAGE_4K, shared=True))


def test_translate(objects: tuple[Any, Any, Any], timed: Callable[..., None]) -> None:
    process = objects[1]
    assert process.translate([HVA]).status[0] == 0
    timed(lambda: process.translate([HVA]))


def test_control(machine: Machine, timed: Callable[..., None]) -> None:
    columns = Single().columns
    nothing = (*columns[:5], columns[5][:0], columns[6][:0])
    run, zero = machine.fast_entry(), np.uint64(0)
    timed(lambda: run(machine.descriptor, *nothing, zero), role="control")
