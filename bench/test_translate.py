"""Translation of 2^22 mapped 4K pages, in random order and in order, beside other programs.

The control of random order gathers the same level-1 entries by indices computed beforehand; that of sequential
order is the same walk in C (walk.c), which takes the same row of format words.

What stands between a random walk and the gather, by leaving parts out (AMD Zen 4, an idle machine, medians): the
gather alone takes 6.7 ns an address; walking down to the last table, whose 64 KiB of level-2 entries do not fit the
first-level cache, 2.9 ns; keeping the slot and computing and storing the results, about 2 ns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amounts import amount
from built_tables import build_tree, tables_for, take_frames
from c_library import NUMBER, POINTER, SIZE, address, compiled
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark, Controls
from pgemu.tables.translation import Access, Kind, translate
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

PAGES = amount(1 << 22, 1 << 18)
FEW = amount(1 << 12, 64)  # for what walks in Python
ROUNDS = 15
Array = np.ndarray[Any, Any]


@dataclass
class Scene:
    machine: Machine
    root: int
    level1: Array  # the level-1 entries, one after the other
    addresses: dict[str, Array]

    def physical(self, addresses: Array) -> Array:
        """What they translate to."""
        return addresses + np.uint64(self.machine.register(W.R_POOL_BASE) << 12)


@pytest.fixture(scope="module")
def pages() -> Scene:
    machine = Machine(Config("pfnmap", pool=PAGES * W.PAGE_4K))
    first = take_frames(machine, tables_for(PAGES))
    frames = np.arange(PAGES, dtype=np.uint64) + np.uint64(machine.register(W.R_POOL_BASE))

    def words(page: int, count: int) -> Array:
        return machine.arrays.ram[page * 512 : (page + count) * 512]

    root, level1 = build_tree(first, frames, formats.TABLE, formats.FILE_LEAF, words)
    addresses = np.arange(PAGES, dtype=np.uint64) << np.uint64(12)
    random = np.random.default_rng(1).permutation(addresses)
    return Scene(machine, root, words(level1, PAGES // 512), {"sequential": addresses, "random": random})


@pytest.fixture(params=["random", "sequential"])
def order(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def timed(pgemu_benchmark: Benchmark, order: str) -> Callable[..., None]:
    def run(call: Callable[[], object], operations: int = PAGES, role: str | None = None, rounds: int = ROUNDS) -> None:
        pgemu_benchmark(
            call, operations=operations, group="translate", order=order, footprint=PAGES << 12, role=role,
            rounds=rounds,
        )  # fmt: skip

    return run


def check_and_time(pages: Scene, timed: Callable[..., None], order: str, kind: Kind | None) -> None:
    addresses = pages.addresses[order]
    out = translate(pages.machine, 0, pages.root, addresses, kind, Access())
    assert (out.status == 0).all()
    assert (out.physical == pages.physical(addresses)).all()
    timed(lambda: translate(pages.machine, 0, pages.root, addresses, kind, Access(), out=out))


def test_plain(pages: Scene, timed: Callable[..., None], order: str) -> None:
    check_and_time(pages, timed, order, None)


def test_checked(pages: Scene, timed: Callable[..., None], order: str) -> None:
    """Reserved bits, rights, accessed bits."""
    check_and_time(pages, timed, order, Kind.USER_READ)


def test_gather(pages: Scene, timed: Callable[..., None], order: str, pgemu_control: Controls) -> None:
    gather = pgemu_control.gather(pages.level1, pages.addresses[order] >> np.uint64(12))
    timed(gather, role="control" if order == "random" else "peer")


def test_c(pages: Scene, timed: Callable[..., None], order: str, tmp_path: Path) -> None:
    """The same walk in C."""
    addresses = pages.addresses[order]
    physical = np.zeros(PAGES, np.uint64)
    status, levels = np.ones(PAGES, np.uint8), np.zeros(PAGES, np.uint8)
    ram, row = pages.machine.arrays.ram, pages.machine.format_row(0)
    arguments = [POINTER, NUMBER, POINTER, NUMBER, POINTER, SIZE, POINTER, POINTER, POINTER]
    walk = compiled("walk.c", "translate", arguments, tmp_path, "-O3")
    timed(
        lambda: walk(address(ram), ram.size, address(row), pages.root, address(addresses), PAGES, address(physical),
                     address(status), address(levels)),
        role="control" if order == "sequential" else "peer",
    )  # fmt: skip
    plain = translate(pages.machine, 0, pages.root, addresses)
    assert (physical == plain.physical).all()
    assert (status == plain.status).all()
    assert (levels == plain.level).all()


def test_volatility3(pages: Scene, timed: Callable[..., None], order: str, image: Path) -> None:
    """volatility3's Intel layer over an image of the machine: Python, one address after the other, few of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what Python has deprecated
        contexts = pytest.importorskip("volatility3.framework.contexts")
        from volatility3.framework.layers import intel, physical

    context = contexts.Context()
    context.config["file.location"] = image.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["intel.memory_layer"] = "file"
    context.config["intel.page_map_offset"] = pages.root
    layer = intel.Intel32e(context, "intel", "intel")
    addresses = pages.addresses[order][:FEW]
    found: list[int] = []

    def walk() -> None:
        found[:] = [layer._translate(address)[0] for address in addresses.tolist()]

    timed(walk, FEW, "peer", 3)
    assert (np.array(found, np.uint64) == pages.physical(addresses)).all()


@pytest.fixture(scope="module")
def image(pages: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine's memory, raw: where nothing is, the file has holes."""
    path = tmp_path_factory.mktemp("image") / "memory.raw"
    pages.machine.write_image(path, "raw")
    return path
