"""Two machines on two threads, beside two threads that gather: what each gains over one thread, in the same run.

Kernels hold no lock of Python's, and machines share nothing but the computer. `scaling` is how much more two threads
do than one, 2 at best; `ratio` the machines' scaling to the gather's, which the computer's own limits are in. One round
of each comes after the other, so that both see the same mood of the computer; figures are medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import pytest

from pgemu.benchmarking.controls import gather
from scene import build

LENGTH, ROUNDS, ITEMS = 1 << 30, 15, 1 << 22
Call = Callable[[], object]


def seconds(pool: ThreadPoolExecutor, calls: list[Call]) -> float:
    """How long the calls take, each on a thread of its own."""
    began = time.perf_counter()
    for done in [pool.submit(call) for call in calls]:
        done.result()
    return time.perf_counter() - began


def scaling(alone: list[float], both: list[float]) -> float:
    return 2 * median(alone) / median(both)


def machine_calls(design: Any, little: bool) -> tuple[list[Call], int]:
    """Faults and zaps of two machines, in random order, and how many of them one call is."""

    def faults(number: int) -> Call:
        scene = build(design, 2 << 20 if little else 1 << 30, 16 << 20 if little else LENGTH, "random")
        addresses = scene.addresses

        def call() -> None:
            scene.process.touch_many(addresses)
            scene.process.zap_many(addresses)

        return call

    return [faults(number) for number in range(2)], 2 * (((16 << 20) if little else LENGTH) // 8192 // 256 * 255)


def gather_calls(little: bool) -> list[Call]:
    """Gathers of as many items out of arrays that no cache holds."""
    items = 1 << 12 if little else ITEMS

    def gathers(number: int) -> Call:
        random = np.random.default_rng(number)
        array = np.arange(4 * items, dtype=np.uint64)
        indices = random.integers(0, array.size, items).astype(np.uint64)
        return gather(array, indices)

    return [gathers(number) for number in range(2)]


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_two_machines_on_two_threads(benchmark: Any, design: str) -> None:
    machines, operations = machine_calls(design, benchmark.disabled)
    kinds = {"machines": machines, "gather": gather_calls(benchmark.disabled)}
    taken: dict[tuple[str, int], list[float]] = {(name, count): [] for name in kinds for count in (1, 2)}
    with ThreadPoolExecutor(2) as pool:
        for calls in kinds.values():
            seconds(pool, calls)
        for _ in range(1 if benchmark.disabled else ROUNDS):
            for name, calls in kinds.items():
                for count in (1, 2):
                    taken[name, count].append(seconds(pool, calls[:count]))
        benchmark.group = f"threads {design}"
        benchmark.extra_info.update(operations=2 * operations)
        benchmark.pedantic(lambda: seconds(pool, machines), rounds=1 if benchmark.disabled else 3)
    scales = {name: scaling(taken[name, 1], taken[name, 2]) for name in kinds}
    benchmark.extra_info.update(
        scaling=round(scales["machines"], 2), gather_scaling=round(scales["gather"], 2),
        ratio=round(scales["machines"] / scales["gather"], 2),
    )  # fmt: skip
    assert all(value > 0 for value in scales.values())
