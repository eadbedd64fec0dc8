"""Machine.copy() of a machine in use; the control is a memcpy of as many bytes as the copy holds, into new memory.

`live_mib` is what of the machine's arrays is not zero, in pages: what has to be copied at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.machine.snapshot import _in_use
from scene import Scene, build

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
        for array, runs in zip(used.machine.arrays, _in_use(used.machine.arrays), strict=True)
    )

    def measure(call: Callable[[], object]) -> None:
        benchmark.group = f"copy {used.machine.config.design}"
        benchmark.extra_info.update(operations=live >> 12, live_mib=round(live / (1 << 20), 1))
        benchmark.pedantic(call, rounds=1 if benchmark.disabled else ROUNDS, warmup_rounds=1)

    return measure


def test_copy(used: Scene, timed: Callable[..., None]) -> None:
    timed(used.machine.copy)


def test_control(used: Scene, timed: Callable[..., None], benchmark: Any) -> None:
    pieces = [
        np.ascontiguousarray(array[first:end])
        for array, runs in zip(used.machine.arrays, _in_use(used.machine.arrays), strict=True)
        for first, end in runs.tolist()
    ]
    source = np.concatenate([piece.view(np.uint8) for piece in pieces])
    timed(source.copy)
