"""Translation of 2^22 mapped 4K pages, in random order and in order.

The control of random order gathers the same level-1 entries by indices computed beforehand; that of sequential
order is the same walk in C (walk.c), which takes the same row of format words.

What stands between a random walk and the gather, by leaving parts out (AMD Zen 4, an idle machine, medians): the
gather alone takes 6.7 ns an address; walking down to the last table, whose 64 KiB of level-2 entries do not fit the
first-level cache, 2.9 ns; keeping the slot and computing and storing the results, about 2 ns.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from control import gather
from pgemu.objects.machine import Config, Machine
from pgemu.tables.translation import Access, Kind, translate
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from tables import build_tree, tables_for, take_frames

PAGES = 1 << 22
ROUNDS = 15
Array = np.ndarray[Any, Any]


@dataclass
class Scene:
    machine: Machine
    root: int
    level1: Array  # the level-1 entries, one after the other
    addresses: dict[str, Array]


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
def timed(benchmark: Any, order: str) -> Callable[[Callable[[], object]], None]:
    def run(call: Callable[[], object]) -> None:
        benchmark.group = f"translate 2^22 4K pages, {order}"
        benchmark.extra_info.update(operations=PAGES, order=order)
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)

    return run


def check_and_time(pages: Scene, timed: Callable[..., None], order: str, kind: Kind | None) -> None:
    addresses = pages.addresses[order]
    out = translate(pages.machine, 0, pages.root, addresses, kind, Access())
    assert (out.status == 0).all()
    assert (out.physical >> np.uint64(12) == (addresses >> np.uint64(12)) + np.uint64(1 << 20)).all()
    timed(lambda: translate(pages.machine, 0, pages.root, addresses, kind, Access(), out=out))


def test_plain(pages: Scene, timed: Callable[..., None], order: str) -> None:
    check_and_time(pages, timed, order, None)


def test_checked(pages: Scene, timed: Callable[..., None], order: str) -> None:
    """Reserved bits, rights, accessed bits."""
    check_and_time(pages, timed, order, Kind.USER_READ)


def test_control(pages: Scene, timed: Callable[..., None], order: str, tmp_path: Path) -> None:
    addresses = pages.addresses[order]
    if order == "random":
        entries = np.empty(PAGES, np.uint64)
        indices = addresses >> np.uint64(12)
        timed(lambda: gather(pages.level1, indices, entries))
        return
    physical = np.zeros(PAGES, np.uint64)
    status, levels = np.ones(PAGES, np.uint8), np.zeros(PAGES, np.uint8)
    ram, row = pages.machine.arrays.ram, pages.machine.format_row(0)
    walk = compile_walk(tmp_path)
    timed(lambda: walk(address(ram), ram.size, address(row), pages.root, address(addresses), PAGES, address(physical),
                       address(status), address(levels)))  # fmt: skip
    plain = translate(pages.machine, 0, pages.root, addresses)
    assert (physical == plain.physical).all()
    assert (status == plain.status).all()
    assert (levels == plain.level).all()


def address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def compile_walk(folder: Path) -> Any:
    """walk.c's function. Skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the control with")
    library = folder / "walk.so"
    source = Path(__file__).with_name("walk.c")
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).translate
    pointer, number = ctypes.c_void_p, ctypes.c_uint64
    function.argtypes = [pointer, number, pointer, number, pointer, ctypes.c_size_t, pointer, pointer, pointer]
    function.restype = None
    return function
