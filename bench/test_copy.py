"""Machine.copy() of a machine in use; the control is a memcpy of its live bytes into memory that is as new.

`live_mib` is what of the machine's arrays is not zero, in pages: what has to be copied at least.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.machine.snapshot import in_use
from pgemu.objects.machine import Machine
from scene import Scene, build

Array = np.ndarray[Any, Any]
LENGTH, ROUNDS = 1 << 30, 9


@pytest.fixture(scope="module", params=["restructure", "pfnmap"])
def used(request: pytest.FixtureRequest) -> Scene:
    """Every other page of 1 GiB is shared, and is mapped by the process; the others are mapped by the VM."""
    scene = build(request.param, 1 << 30, LENGTH, "sequential")
    scene.process.touch_many(scene.addresses)
    scene.vm.touch_many(scene.offsets)
    return scene


@pytest.fixture
def timed(benchmark: Any, used: Scene) -> Callable[[Callable[[], object]], None]:
    live = sum(
        int((runs[:, 1] - runs[:, 0]).sum()) * array.itemsize
        for array, runs in zip(used.machine.arrays, in_use(used.machine.arrays), strict=True)
    )

    def measure(call: Callable[[], object]) -> None:
        benchmark.group = f"copy {used.machine.config.design}"
        benchmark.extra_info.update(operations=live >> 12, live_mib=round(live / (1 << 20), 1))
        benchmark.pedantic(call, rounds=1 if benchmark.disabled else ROUNDS, warmup_rounds=1)

    return measure


def test_copy(used: Scene, timed: Callable[..., None]) -> None:
    timed(used.machine.copy)


def live_bytes(machine: Machine) -> Array:
    """uint8[n]: what test_copy copies, one run behind the other."""
    pieces = [
        array[first:end].view(np.uint8)
        for array, runs in zip(machine.arrays, in_use(machine.arrays), strict=True)
        for first, end in runs.tolist()
    ]
    return np.concatenate(pieces)


def test_control(used: Scene, timed: Callable[..., None]) -> None:
    """Into new memory of huge pages, as a machine's is."""
    source = live_bytes(used.machine)

    def copy() -> None:
        with mmap.mmap(-1, source.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            target = np.frombuffer(memory, np.uint8)
            target[:] = source
            del target

    timed(copy)


def test_into_old_memory(used: Scene, timed: Callable[..., None]) -> None:
    """The same into memory that is there, which no copy has."""
    source = live_bytes(used.machine)
    target = np.zeros_like(source)
    timed(lambda: np.copyto(target, source))
