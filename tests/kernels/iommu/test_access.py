"""What a device reaches through an entry that outlived what it was made for: counted as what it is by now."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

VA, IOVA = 0x7300_0000_0000, 0x40_0000_0000
SIZE, PAGES = W.PAGE_2M, 4
DOORS = [("restructure", "none"), ("pfnmap", "none"), ("pfnmap", "tracked")]


class Scene:
    """A guest_memfd of four huge pages, all shared and allocated, that a device has without references; and another."""

    def __init__(self, design: str, door: str, unit: Any = "vtd", kind: Any = "sw") -> None:
        self.machine = Machine(
            Config(design, pool=2 * PAGES * SIZE, page_size=SIZE, vm=kind, stage2="npt" if kind == "snp" else "ept")
        )
        self.gmem, self.other = (self.machine.create_guest_memfd(PAGES * SIZE, shared=True) for _ in range(2))
        process = self.machine.create_process()
        process.mmap(self.gmem, VA)
        self.vm = self.machine.create_vm(process)
        assert self.vm.bind(self.other, 0).status == 0
        assert self.gmem.allocate(0, self.gmem.size).status == 0
        self.named = [self.gmem.pfn(i * SIZE) for i in range(PAGES)]
        self.device: IoDevice
        if door == "tracked":
            container = self.machine.create_vfio_container(unit, policy="tracked")
            self.device = container.attach()
            assert container.map(IOVA, self.gmem.size, process, VA).status == 0
        else:
            ioas = self.machine.create_iommufd().create_ioas(unit, guest_memfd="none")
            self.device = ioas.attach()
            assert ioas.map_file(IOVA, self.gmem.size, process, self.gmem, 0).status == 0

    def access(self, page: int) -> tuple[int, int, int]:
        """A write: its status, how much it counts as stale private, as stale freed."""
        events = Event.IOMMU_STALE_PRIVATE, Event.IOMMU_STALE_FREED
        before = [self.machine.statistics.event(event) for event in events]
        status = self.device.access(IOVA + page * SIZE, write=True).status
        private, freed = (self.machine.statistics.event(event) - n for event, n in zip(events, before, strict=True))
        return status, private, freed


@pytest.mark.parametrize("unit", ["vtd", "amd"])
@pytest.mark.parametrize(("design", "door"), DOORS)
def test_a_frame_that_another_file_shares_by_now(design: str, door: str, unit: Any) -> None:
    scene = Scene(design, door, unit)
    assert scene.access(1) == (0, 0, 0)
    assert scene.gmem.punch_hole(SIZE, SIZE).status == 0
    assert scene.access(1) == (0, 0, 1)
    assert scene.other.allocate(0, scene.other.size).status == 0
    assert scene.named[1] in [scene.other.pfn(i * SIZE) for i in range(PAGES)]
    assert scene.access(1) == (0, 0, 1)
    assert scene.access(0) == (0, 0, 0)


def test_another_page_of_the_same_file() -> None:
    """An IOAS knows the page, a container the file."""
    for design, door in DOORS:
        scene = Scene(design, door)
        scene.other.allocate(0, scene.other.size)  # nothing is free
        scene.gmem.punch_hole(0, 2 * SIZE)
        assert scene.gmem.allocate(SIZE, SIZE).status == scene.gmem.allocate(0, SIZE).status == 0
        assert [scene.gmem.pfn(SIZE), scene.gmem.pfn(0)] in (scene.named[:2], scene.named[1::-1])
        moved = scene.gmem.pfn(0) != scene.named[0]
        assert scene.access(0) == (0, 0, int(moved and door == "none"))


@pytest.mark.parametrize("kind", ["sw", "snp", "tdx"])
@pytest.mark.parametrize(("design", "door"), DOORS)
def test_what_comes_of_it_is_the_new_owner_s(design: str, door: str, kind: Any) -> None:
    """Another VM's private page: the RMP refuses, TDX gets a machine check, others do not notice."""
    scene = Scene(design, door, kind=kind)
    scene.gmem.punch_hole(0, scene.gmem.size)
    scene.other.allocate(0, scene.other.size)
    assert scene.other.convert(0, scene.other.size, shared=False).status == 0
    for gpa in range(0, scene.other.size, SIZE):
        scene.vm.touch(gpa, write=True)
    assert scene.access(0) == (-W.EFAULT if kind == "snp" else 0, 0, 1)
    assert scene.machine.machine_checks == (kind == "tdx")


@pytest.mark.parametrize("seed", range(12))
def test_random_holes_and_conversions_of_two_files(seed: int) -> None:
    """What an access counts as follows from whose page the frame is, as the files themselves say it."""
    draw = random.Random(seed)
    design, door = DOORS[seed % len(DOORS)]
    scene = Scene(design, door, draw.choice(["vtd", "amd"]))
    for _ in range(60):
        file, at = draw.choice([scene.gmem, scene.other]), draw.randrange(PAGES) * SIZE
        if draw.random() < 0.4:
            assert file.punch_hole(at, SIZE).status == 0
        elif draw.random() < 0.5:
            file.allocate(at, SIZE)
        else:
            file.convert(at, SIZE, shared=draw.random() < 0.5)
        for page in range(PAGES):
            assert scene.access(page) == (0, *_expected(scene, page, by_page=door == "none"))


def _expected(scene: Scene, page: int, *, by_page: bool) -> tuple[int, int]:
    pfn = scene.named[page]
    has = [i for i in range(PAGES) if scene.gmem.pfn(i * SIZE) == pfn]
    if not has or (by_page and has != [page]):
        return 0, 1
    return int(not scene.gmem.is_shared(has[0] * SIZE)), 0
