"""What devices ask for: DMA mappings of 4K beside EPT edits, accesses, conversions beside an empty domain.

The control of mappings is an EPT edit of the same pages, that of a conversion the same machine without devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from amounts import amount
from pgemu.machine.core import Core
from pgemu.objects.devices import VfioContainer
from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark, Controls, MachineFactory
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

VA = 0x7200_0000_0000
IOVA = 1 << 39
PAGES = amount(1 << 15, 1 << 10)  # of 4K: half of what dma_entry_limit allows
Measure = Callable[..., None]
OFFSETS = np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
UNITS = ["vtd", "amd"]
FORMATS = {"vtd": "vtd-s2", "amd": "amd-v1"}
PARAMETERS = {"amd-v1": {"levels": 4, "page_sizes": PAGE_4K}}  # every leaf one of 4K, as of the others
POLICIES = ["none", "revoke", "mirror"]


@pytest.fixture
def measure(pgemu_benchmark: Benchmark) -> Measure:
    def measure(
        group: str, call: Callable[[], object], prepare: Callable[[], object] | None = None, *,
        machine: Core | None = None, count: int = PAGES, **more: Any,
    ) -> None:  # fmt: skip
        pgemu_benchmark(
            call, setup=prepare, operations=count, machine=machine, group=f"devices, {group}",
            footprint=PAGES * PAGE_4K, rounds=7, **more,
        )  # fmt: skip

    return measure


class Scene:
    """A container with a device over memory of a process that is there: 4K frames, at the same distance in both."""

    def __init__(self, unit: Any) -> None:
        self.machine = machine = Machine(Config(pool=PAGE_2M, page_size=PAGE_2M, memory=2 * PAGES * PAGE_4K))
        self.process = machine.create_process()
        assert self.process.mmap_anonymous(VA, PAGES * PAGE_4K, 3).status == 0
        self.process.touch_many(VA + OFFSETS)
        self.container: VfioContainer = machine.create_vfio_container(unit)
        self.device: IoDevice = self.container.attach()

    def map(self) -> None:
        done = self.container.map_many(IOVA + OFFSETS, PAGE_4K, self.process, VA + OFFSETS)
        assert not done.status.any()

    def unmap(self) -> None:
        header = np.uint64(16 | self.container.number << 48)
        done = self.container.machine.run_columns(header, 0, IOVA + OFFSETS, 0, PAGE_4K, count=PAGES)
        assert not done.status.any()


@pytest.mark.parametrize("unit", UNITS)
def test_dma_map(measure: Measure, unit: str) -> None:
    scene = Scene(unit)
    measure(f"map {unit}", scene.map, scene.container.unmap_all, machine=scene.machine, order="sequential")


@pytest.mark.parametrize("unit", UNITS)
def test_dma_unmap(measure: Measure, unit: str) -> None:
    scene = Scene(unit)
    measure(f"unmap {unit}", scene.unmap, scene.map, machine=scene.machine, order="sequential")


def edits(fmt: str) -> dict[str, Callable[[], object]]:
    """The same pages as edits of a table of a format: an EPT, or what DMA mappings do to an I/O page table."""
    table = Machine(Config()).create_page_table(fmt, **PARAMETERS.get(fmt, {}))
    assert table.map_range(IOVA, 0, PAGES * PAGE_4K, max_level=1).status == 0
    tables: Any = "zap" if fmt == "ept" else None
    calls: dict[str, Callable[[], object]] = {
        "map": lambda: table.map_many(IOVA + OFFSETS, OFFSETS),
        "unmap": lambda: table.unmap_many(IOVA + OFFSETS, tables=tables),
    }
    calls["unmap"]()
    return calls


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("edit", ["map", "unmap"])
def test_io_table(measure: Measure, edit: str, unit: str) -> None:
    measure_edit(measure, edit, unit, edits(FORMATS[unit]))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("edit", ["map", "unmap"])
def test_control(measure: Measure, edit: str, unit: str) -> None:
    """An EPT whose tables stand."""
    measure_edit(measure, edit, unit, edits("ept"), role="control")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("edit", ["map", "unmap"])
def test_walk_and_store(measure: Measure, pgemu_control: Controls, edit: str, unit: str) -> None:
    """No edit at all: down four levels and a store."""
    measure(f"{edit} {unit}", pgemu_control(IOVA + OFFSETS), order="sequential", role="peer")


def measure_edit(
    measure: Measure, edit: str, unit: str, calls: dict[str, Callable[[], object]], role: str = "call"
) -> None:
    if edit == "unmap":
        calls["map"]()
    other = "unmap" if edit == "map" else "map"
    measure(f"{edit} {unit}", calls[edit], calls[other], order="sequential", role=role)


@pytest.mark.parametrize("order", ["sequential", "random"])
@pytest.mark.parametrize("unit", UNITS)
def test_access(measure: Measure, unit: str, order: str) -> None:
    scene = Scene(unit)
    scene.map()
    iovas = IOVA + (np.random.default_rng(1).permutation(OFFSETS) if order == "random" else OFFSETS)
    call = scene.device.access_many
    measure(f"access {unit}", lambda: call(iovas, write=True), machine=scene.machine, order=order)
    assert not call(iovas, write=True).status.any()


@pytest.mark.parametrize("order", ["sequential", "random"])
@pytest.mark.parametrize("unit", UNITS)
def test_control_of_access(measure: Measure, unit: str, order: str) -> None:
    """The same walks without what an operation of a machine is: translations of the table."""
    scene = Scene(unit)
    scene.map()
    iovas = IOVA + (np.random.default_rng(1).permutation(OFFSETS) if order == "random" else OFFSETS)
    measure(f"access {unit}", lambda: scene.container.table.translate(iovas), order=order, role="control")


@pytest.fixture
def convert(measure: Measure, pgemu_machine: MachineFactory, pgemu_design: str) -> Callable[..., None]:
    def convert(policy: str | None, mapped: bool = False, role: str = "call") -> None:
        """Conversions of every other page to private, each round after all were made shared again.

        With an IOAS, in which nothing is mapped, or 2 MiB of pages that are not converted.
        """
        machine = pgemu_machine(pool=PAGE_1G, page_size=PAGE_1G)
        gmem = machine.create_guest_memfd(PAGE_1G)
        process = machine.create_process()
        vm = machine.create_vm(process, protected=True)
        assert vm.bind(gmem, 0).status == 0
        offsets = OFFSETS * np.uint64(2)
        assert not gmem.convert_many(offsets, shared=True).status.any()
        start = PAGE_1G - PAGE_2M
        vm.touch(start)
        assert gmem.convert(start, PAGE_2M, shared=True).status == 0
        if policy:
            ioas = machine.create_iommufd().create_ioas(guest_memfd=policy)
            ioas.attach()
            assert not mapped or ioas.map_file(start, PAGE_2M, process, gmem, start).status == 0
        measure(
            "convert to private", lambda: gmem.convert_many(offsets[1:], shared=False),
            lambda: gmem.convert_many(offsets[1:], shared=True), count=PAGES - 1, role=role,
        )  # fmt: skip

    return convert


@pytest.mark.parametrize("policy", POLICIES)
def test_convert_beside_mapped(convert: Callable[..., None], policy: str) -> None:
    convert(policy, mapped=True)


def test_convert(convert: Callable[..., None]) -> None:
    convert("revoke")


def test_control_of_convert(convert: Callable[..., None]) -> None:
    convert(None, role="control")
