"""Fixtures of the benchmarks, and the table of ratios that is printed after them.

A group is one path, design, huge page size, footprint and order of access; in each, the last line is the
control. Figures are medians; read the ratios, the machine's mood is in both sides of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from control import walk_and_store
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M
from scene import HVA, Measure, Scene, build

FOOTPRINTS = {"16M": 16 << 20, "1G": 1 << 30, "16G": 16 << 30}
ROUNDS = {"16M": 40, "1G": 7, "16G": 5}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--footprint",
        action="append",
        choices=list(FOOTPRINTS),
        help="guest memory that the operations range over (repeatable; default 16M, within L2, and 1G)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scene" in metafunc.fixturenames:
        footprints = metafunc.config.getoption("--footprint") or ["16M", "1G"]
        metafunc.parametrize("footprint", footprints, scope="module")
        metafunc.parametrize("order", ["sequential", "random"], scope="module")
        metafunc.parametrize("page_size", ["2M", "1G"], scope="module")
        metafunc.parametrize("design", ["restructure", "pfnmap"], scope="module")


@pytest.fixture(scope="module")
def scene(design: str, page_size: str, footprint: str, order: str) -> Scene:
    size = {"2M": PAGE_2M, "1G": PAGE_1G}[page_size]
    return build(design, size, FOOTPRINTS[footprint], order)


@pytest.fixture
def measure(
    benchmark: Any, scene: Scene, design: str, page_size: str, footprint: str, order: str, request: Any
) -> Measure:
    """measure(path, call, prepare): time `call`, with `prepare` before each round."""

    def run(path: str, call: Callable[[], object], prepare: Callable[[], object]) -> None:
        benchmark.group = f"{path} {design}, {page_size} pages, {order} over {footprint}"
        benchmark.extra_info.update(
            operations=len(scene.offsets), footprint=footprint, order=order, design=design, page_size=page_size
        )
        benchmark.pedantic(call, setup=lambda: prepare() and None, rounds=ROUNDS[footprint], warmup_rounds=1)

    return run


@pytest.fixture
def control(scene: Scene) -> Callable[[], object]:
    """Walk and store over the same pages of the process's own tables, which it leaves empty again."""
    scene.process.touch_many(scene.addresses)
    scene.process.zap(HVA, scene.length)
    ram = scene.machine.arrays.ram
    root = np.uint64(scene.process.root)
    pages = (scene.addresses) >> np.uint64(12)
    zero = np.uint64(0)
    return lambda: walk_and_store(ram, root, pages, zero)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rates: dict[str, dict[str, float]] = {}
    for bench in session.benchmarks:
        if bench.has_error or not bench.stats.data:
            continue
        rate = bench.extra_info["operations"] / bench.stats.median / 1e6
        rates.setdefault(bench.group, {})[bench.name.partition("[")[0].removeprefix("test_")] = rate
    if not rates:
        return
    terminalreporter.section("million operations a second (median), ratio to the control of the same group")
    for group, row in rates.items():
        control = row.get("control")
        cells = [
            f"{name} {rate:.1f}" + (f" ({rate / control:.2f})" if control and name != "control" else "")
            for name, rate in row.items()
        ]
        terminalreporter.write_line(f"{group}: {', '.join(cells)}")
