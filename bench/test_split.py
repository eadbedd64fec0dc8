"""Split and merge of huge pages to 4K folios and back, in both posted forms; the operations counted are 4K pages.

Vmemmap restore, rewriting and optimising of folios that are in no page cache: the gate, nodes and page-cache entries
are in `conversion` only, which is two ioctls on a guest_memfd. The control (split.c) copies the restored vmemmap pages
and makes two passes over all struct pages that store what split and merge store, in memory like the machine's.
Cases: one folio of 1G; one folio of 2M again and again; and 512 folios of 2M, as after a demotion of 1G.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from c_library import INT, NUMBER, POINTER, compiled
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.folios.merging import merge_folio
from pgemu_kernels.folios.splitting import split_folio

SPLIT_FORMS = ["rfc2", "jan2026"]
CASES = {"1G": (W.PAGE_1G, 1, 1), "2M": (W.PAGE_2M, 1, 500), "512 x 2M": (W.PAGE_2M, 512, 1)}  # size, folios, times
ROUNDS = 200
pytestmark = pytest.mark.benchmark(timer=time.thread_time)  # other processes' time is not ours
_ZERO, _ONE = np.uint64(0), np.uint64(1)
SPLIT, MERGE, BOTH = 1, 2, 3
Measure = Callable[..., None]


@njit(nogil=True, _nrt=False)
def restructure(descriptor, heads, order, what, times):
    """Split (1), merge (2) or both (3), folio by folio; the statuses combined."""
    m = open_machine(descriptor)
    status = np.int64(0)
    for _ in range(times):
        for i in range(heads.size):
            if what & 1:
                status |= split_folio(m, heads[i], order, _ZERO, _ONE)
            if what & 2:
                status |= merge_folio(m, heads[i], order, _ZERO, _ONE)
    return status


class Folios:
    """Huge pages of a machine, each held by one reference and in no inode."""

    def __init__(self, case: str, split_form: str, kernel: str = "7.3") -> None:
        size, count, self.times = CASES[case]
        self.machine = Machine(Config(pool=size * count, page_size=size, kernel=kernel, split_form=split_form))  # type: ignore[arg-type]
        state, ram = self.machine.arrays.state, self.machine.arrays.ram
        state[W.R_COUNTER_ROW] = W.STATS_COUNTERS
        self.order = np.uint64(self.machine.config.page_order)
        base = self.machine.register(W.R_POOL_BASE)
        self.heads = np.arange(count, dtype=np.uint64) * np.uint64(size >> 12) + np.uint64(base)
        root, vmemmap = self.machine.register(W.R_KERNEL_ROOT), self.machine.register(W.R_VMEMMAP)
        for head in self.heads.tolist():
            address = vmemmap + 64 * head
            entry = self.machine.walk(root, (address & (1 << 48) - 1) >> 12)[-1][2]
            ram[((entry & 0x000F_FFFF_FFFF_F000) + address % 4096) // 8 + 6] |= np.uint64(1 << 32)
        self.pages = count * (size >> 12) * self.times

    def do(self, what: int) -> None:
        assert restructure(self.machine.descriptor, self.heads, self.order, what, self.times) == 0


@pytest.fixture
def measure(pgemu_benchmark: Benchmark) -> Callable[..., None]:
    def measure(
        group: str, pages: int, call: Callable[[], object], prepare: Callable[[], object] | None = None,
        machine: Machine | None = None, role: str = "call",
    ) -> None:  # fmt: skip
        pgemu_benchmark(
            call, setup=prepare, operations=pages, machine=machine, group=f"split and merge, {group}", role=role,
            rounds=ROUNDS, warmup_rounds=2,
        )  # fmt: skip

    return measure


@pytest.mark.parametrize("kernel", ["7.3", "6.18"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
@pytest.mark.parametrize("case", CASES)
def test_split_and_merge(measure: Measure, case: str, split_form: str, kernel: str) -> None:
    folios = Folios(case, split_form, kernel)
    measure(f"{case}, {split_form}, {kernel}", folios.pages, lambda: folios.do(BOTH), None, folios.machine)


@pytest.mark.parametrize("kernel", ["7.3", "6.18"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_split(measure: Measure, split_form: str, kernel: str) -> None:
    folios = Folios("1G", split_form, kernel)
    folios.do(SPLIT)
    measure(
        f"1G, {split_form}, {kernel}", folios.pages, lambda: folios.do(SPLIT), lambda: folios.do(MERGE), folios.machine
    )


@pytest.mark.parametrize("kernel", ["7.3", "6.18"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_merge(measure: Measure, split_form: str, kernel: str) -> None:
    folios = Folios("1G", split_form, kernel)
    measure(
        f"1G, {split_form}, {kernel}", folios.pages, lambda: folios.do(MERGE), lambda: folios.do(SPLIT), folios.machine
    )


@pytest.mark.parametrize("kernel", ["7.3", "6.18"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_conversion(measure: Measure, split_form: str, kernel: str) -> None:
    """One page of a 1G block to shared and back: everything that the two ioctls do, nodes and entries included."""
    machine = Machine(Config(pool=W.PAGE_1G, kernel=kernel, split_form=split_form))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(W.PAGE_1G)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    vm.touch(0)

    def convert() -> None:
        assert gmem.convert(0, W.PAGE_4K, shared=True).status == 0
        assert gmem.convert(0, W.PAGE_4K, shared=False).status == 0

    measure(f"1G, {split_form}, {kernel}", W.PAGE_1G >> 12, convert, None, machine)


@pytest.mark.parametrize("split_to", ["2M", "4K"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_conversion_of_one_page(measure: Measure, split_form: str, split_to: str) -> None:
    """One page of a 1G block to shared: 512 pieces of 2M and one of these to 4K, against a split of all to 4K."""
    machine = Machine(Config(pool=W.PAGE_1G, split_form=split_form, split_to=split_to))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(W.PAGE_1G)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    vm.touch(0)

    def convert(shared: bool) -> None:
        assert gmem.convert(0, W.PAGE_4K, shared=shared).status == 0

    def back() -> None:
        if gmem.is_shared(0):
            convert(False)

    measure(f"one page of 1G to shared, {split_form}", W.PAGE_1G >> 12, lambda: convert(True), back, machine)


@pytest.fixture(scope="module")
def copy_and_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """split.c's function. Skips where there is no C compiler."""
    arguments = [POINTER, POINTER, NUMBER, NUMBER, NUMBER, INT]
    return compiled("split.c", "copy_and_store", arguments, tmp_path_factory.mktemp("control"), "-O2")


@pytest.mark.parametrize("kernel", ["7.3", "6.18"])
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
@pytest.mark.parametrize("case", CASES)
def test_control(measure: Measure, copy_and_store: Any, case: str, split_form: str, kernel: str) -> None:
    size, count, times = CASES[case]
    pages = size >> 12
    ram = Machine(Config(memory=32 << 20)).arrays.ram
    source, target = ram.ctypes.data + 4096, ram.ctypes.data + (2 << 20)
    memcg = int(split_form == "jan2026")

    def control() -> None:
        copy_and_store(target, source, pages, count, times, memcg)

    measure(f"{case}, {split_form}, {kernel}", pages * count * times, control, None, None, "control")
