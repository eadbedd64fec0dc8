"""Calls from C (pgemu.h): walks of 2^20 mapped 4K pages, one by one and in batches, and host faults.

Python's batch is the same machine code called with the same arrays. The control of single walks is the same walk in C
(walk.c) in one loop over all addresses: a batch that asks for no entry before it needs it, as a caller of single walks
cannot. `c_short_batches` is the batch's own code in pieces of 63, which are too short for it to ask ahead.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import pgemu
from built_tables import build_tree, tables_for, take_frames
from c_library import NUMBER, POINTER, SIZE, address, compiled
from pgemu import capi
from pgemu.objects.machine import Config, Machine
from pgemu.tables.translation import Access, Kind, translate
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from scene import HVA

PAGES = 1 << 20
FAULTS = 1 << 16
ROUNDS = 15
SHORT = 63
Array = np.ndarray[Any, Any]
_POINTER, _NUMBER = POINTER, NUMBER
WALK = [POINTER, NUMBER, POINTER, NUMBER, POINTER, SIZE, POINTER, POINTER, POINTER]  # of walk.c


class Scene(NamedTuple):
    machine: Machine
    root: int
    addresses: Array  # in random order
    c: Any  # what c_calls.c defines
    table: int  # address of struct pgemu_api

    def begin(self) -> tuple[Any, ...]:
        return self.table, capi.handle(self.machine)


def compile_calls(folder: Path) -> Any:
    """c_calls.c's functions. Skips where there is no C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build c_calls.c with")
    library = folder / "c_calls.so"
    source = Path(__file__).with_name("c_calls.c")
    command = ["cc", "-O2", "-shared", "-fPIC", f"-I{pgemu.get_include()}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(library))
    found.single.argtypes = [_POINTER, _POINTER, *[_NUMBER] * 3, _POINTER, _NUMBER, _POINTER]
    found.single.restype = _NUMBER
    found.batches.argtypes = [_POINTER, _POINTER, *[_NUMBER] * 3, _POINTER, _NUMBER, _NUMBER, *[_POINTER] * 4]
    found.batches.restype = ctypes.c_int64
    found.host_faults.argtypes = [_POINTER, _POINTER, _NUMBER, _POINTER, _NUMBER]
    found.host_faults.restype = _NUMBER
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    c = compile_calls(tmp_path_factory.mktemp("c"))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = _POINTER, (ctypes.py_object, ctypes.c_char_p)
    machine = Machine(Config("pfnmap", pool=PAGES * W.PAGE_4K))
    first = take_frames(machine, tables_for(PAGES))
    frames = np.arange(PAGES, dtype=np.uint64) + np.uint64(machine.register(W.R_POOL_BASE))

    def words(page: int, count: int) -> Array:
        return machine.arrays.ram[page * 512 : (page + count) * 512]

    root, _ = build_tree(first, frames, formats.TABLE, formats.FILE_LEAF, words)
    addresses = np.random.default_rng(1).permutation(np.arange(PAGES, dtype=np.uint64) << np.uint64(12))
    return Scene(machine, root, addresses, c, int(pointer(capi._C_API, capi.CAPSULE)))


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Callable[[], object]], None]:
    def run(call: Callable[[], object]) -> None:
        benchmark.group = "from C: translate 2^20 4K pages, random"
        benchmark.extra_info.update(operations=PAGES, order="random")
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)

    return run


def outputs() -> tuple[Array, Array, Array, Array]:
    words, bytes_ = (np.zeros(PAGES, dtype) for dtype in (np.uint64, np.uint8))
    return words, words.copy(), bytes_, bytes_.copy()


def expected(pages: Scene) -> Array:
    return (pages.addresses >> np.uint64(12)) + np.uint64(pages.machine.register(W.R_POOL_BASE)) << np.uint64(12)


def single(pages: Scene, timed: Callable[..., None], kind: int) -> None:
    physical = outputs()[0]
    arguments = (0, pages.root, kind, address(pages.addresses), PAGES, address(physical))
    begin = pages.begin()
    assert pages.c.single(*begin, *arguments) == PAGES
    assert (physical == expected(pages)).all()
    timed(lambda: pages.c.single(*begin, *arguments))


def batches(pages: Scene, timed: Callable[..., None], together: int) -> None:
    found = outputs()
    to = map(address, found)
    arguments = (0, pages.root, Kind.USER_READ, address(pages.addresses), PAGES, together, *to)
    begin = pages.begin()
    assert pages.c.batches(*begin, *arguments) == 0
    assert (found[0] == expected(pages)).all()
    timed(lambda: pages.c.batches(*begin, *arguments))


def test_c_single(pages: Scene, timed: Callable[..., None]) -> None:
    """Rights and reserved bits are checked, accessed bits set."""
    single(pages, timed, Kind.USER_READ)


def test_c_single_plain(pages: Scene, timed: Callable[..., None]) -> None:
    single(pages, timed, 8)  # PGEMU_KIND_PLAIN


def test_c_batch(pages: Scene, timed: Callable[..., None]) -> None:
    batches(pages, timed, PAGES)


def test_c_short_batches(pages: Scene, timed: Callable[..., None]) -> None:
    batches(pages, timed, SHORT)


def test_python_batch(pages: Scene, timed: Callable[..., None]) -> None:
    def call(out: Any = None) -> Any:
        return translate(pages.machine, 0, pages.root, pages.addresses, Kind.USER_READ, Access(), out=out)

    out = call()
    assert (out.physical == expected(pages)).all()
    timed(lambda: call(out))


def test_control(pages: Scene, timed: Callable[..., None], tmp_path: Path) -> None:
    physical, _, status, levels = outputs()
    ram, row = pages.machine.arrays.ram, pages.machine.format_row(0)
    walk = compiled("walk.c", "translate", WALK, tmp_path, "-O3")
    timed(lambda: walk(address(ram), ram.size, address(row), pages.root, address(pages.addresses), PAGES,
                       address(physical), address(status), address(levels)))  # fmt: skip
    assert (physical == expected(pages)).all()


# --------------------------------------------------------------------------- faults


@pytest.fixture(params=["restructure", "pfnmap"])
def faults(request: Any, benchmark: Any) -> tuple[Any, Array, Callable[..., None]]:
    """A process over FAULTS pages that are shared, each mapped by a leaf of 4K."""
    machine = Machine(Config(request.param, pool=1 << 30))
    gmem = machine.create_guest_memfd(1 << 30, shared=True)
    process = machine.create_process()
    assert process.mmap(gmem, HVA).status == 0
    addresses = np.arange(FAULTS, dtype=np.uint64) * np.uint64(W.PAGE_4K) + np.uint64(HVA)

    def run(call: Callable[[], object]) -> None:
        benchmark.group = f"from C: host faults {request.param}, sequential over 2^16 pages"
        benchmark.extra_info.update(operations=FAULTS, order="sequential", design=request.param)
        setup = lambda: process.zap(HVA, FAULTS * W.PAGE_4K) and None  # noqa: E731
        benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=1)

    return process, addresses, run


def test_c_host_faults(pages: Scene, faults: tuple[Any, Array, Callable[..., None]]) -> None:
    process, addresses, run = faults
    begin = (pages.table, capi.handle(process.machine))
    arguments = (process.space, address(addresses), FAULTS)
    assert pages.c.host_faults(*begin, *arguments) == FAULTS
    run(lambda: pages.c.host_faults(*begin, *arguments))


def test_python_host_faults(faults: tuple[Any, Array, Callable[..., None]]) -> None:
    process, addresses, run = faults
    run(lambda: process.touch_many(addresses, write=True))
