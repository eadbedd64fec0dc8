"""Machines of every design, page size, footprint and order of access, on the fixtures of pgemu.pytest_plugin.

A group is one path, design, huge page size, footprint and order of access. Figures are medians; read the ratios to the
group's control, the machine's mood is in both sides of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import amounts
import pgemu.pytest_plugin as plugin
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K
from scene import Measure, Scene, build
from table import FOOTPRINT, PAGE_SIZE, wanted

FOOTPRINTS = {"16M": 16 << 20, "1G": 1 << 30, "16G": 16 << 30}
ROUNDS = {"16M": 40, "1G": 7, "16G": 5}
PAGE_SIZES = {"4K": PAGE_4K, "2M": PAGE_2M, "1G": PAGE_1G}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.is_registered(plugin):  # pgemu is on the path, but not installed
        pluginmanager.register(plugin, "pgemu")
    parser.addoption(
        "--footprint",
        action="append",
        choices=list(FOOTPRINTS),
        help="guest memory that the operations range over (repeatable; default 16M, within L2, and 1G)",
    )
    parser.addoption("--readme", action="store_true", help=f"only what README.md tells, over {FOOTPRINT} (table.py)")


def pytest_configure(config: pytest.Config) -> None:
    disabled = config.getoption("benchmark_disable", True) and not config.getoption("benchmark_enable", False)
    amounts.little = bool(disabled)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scene" in metafunc.fixturenames:
        readme = metafunc.config.getoption("--readme", False)
        usual = ["16M"] if amounts.little else ["16M", "1G"]
        footprints = [FOOTPRINT] if readme else metafunc.config.getoption("--footprint", None) or usual
        metafunc.parametrize("footprint", footprints, scope="module")
        metafunc.parametrize("order", ["sequential", "random"], scope="module")
        metafunc.parametrize("page_size", [PAGE_SIZE] if readme else list(PAGE_SIZES), scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--readme", False):
        kept = [item for item in items if wanted(item.path.name, item.name)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="module")
def scene(pgemu_design: str, page_size: str, footprint: str, order: str) -> Scene:
    return build(pgemu_design, PAGE_SIZES[page_size], FOOTPRINTS[footprint], order)


@pytest.fixture
def measure(pgemu_benchmark: plugin.Benchmark, scene: Scene, page_size: str, footprint: str, order: str) -> Measure:
    """measure(path, call, prepare): time `call`, with `prepare` before each round."""

    def run(path: str, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> None:
        pgemu_benchmark(
            call, setup=prepare, operations=len(scene.offsets), machine=scene.machine, group=path,
            page_size=page_size, footprint=footprint, order=order, rounds=ROUNDS[footprint],
        )  # fmt: skip

    return run


@pytest.fixture
def control(scene: Scene, pgemu_control: plugin.Controls) -> Callable[[], object]:
    """Walk and store over the same pages."""
    return pgemu_control(scene.addresses)
