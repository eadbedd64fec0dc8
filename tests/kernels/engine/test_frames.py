"""Frames of the metadata zone, and contents of guest pages."""

from __future__ import annotations

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000


def roots(seed: int, n: int = 32) -> list[int]:
    """Frames of the top tables of the first `n` processes."""
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2, seed=seed))
    return [machine.create_process().root >> 12 for _ in range(n)]


def test_new_frames_ascend_without_a_seed() -> None:
    frames = roots(0)
    assert frames == list(range(frames[0], frames[0] + len(frames)))


def test_a_seed_orders_new_frames_in_its_own_way() -> None:
    frames = roots(5)
    assert len(set(frames)) == len(frames)
    assert 0 not in frames
    assert frames != sorted(frames)
    assert frames == roots(5)
    assert frames != roots(6)


@pytest.mark.parametrize("seed", [0, 7])
def test_every_frame_is_handed_out_once_up_to_the_limit(seed: int) -> None:
    """The frames of contents, page tables and boot are all different, and end at the limit with -ENOMEM."""
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2, seed=seed, frames=100))
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    base = machine.register(W.R_POOL_BASE)
    for i in range(100 - used):
        machine.write_frame(base + i, b"x")
    with pytest.raises(OSError, match="no frame") as error:
        machine.write_frame(base + 100, b"x")
    assert error.value.errno == W.ENOMEM
    with pytest.raises(OSError, match="top table"):
        machine.create_process()
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == 100
    assert machine.check() == 0  # no frame has two owners


def test_boot_without_frames_enough_for_the_vmemmap_fails() -> None:
    with pytest.raises(OSError, match="vmemmap") as error:
        Machine(Config("restructure", pool=8 * M2, page_size=M2, frames=8))
    assert error.value.errno == W.ENOMEM


def test_the_frame_freed_last_comes_back_first() -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    process.touch(VA)
    tables = [process.walk(VA)[i][2] >> 12 & 0xFFFF_FFFF for i in range(3)]  # of level 3, 2, 1
    process.munmap(VA, M2)
    # Freed from the last level up, so that the level-3 table's frame is the next one to be had.
    assert machine.create_process().root >> 12 == tables[0]
    assert machine.create_process().root >> 12 == tables[1]
    assert machine.create_process().root >> 12 == tables[2]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("hvo", [True, False])
def test_frames_are_conserved(design: str, kernel: str, hvo: bool) -> None:
    """After faults, conversions and the end of the VMM exactly the frames of before are in use, and stage 2's tables.

    Of a VM with private memory only leaves are zapped when a slot goes: kvm_mmu_zap_memslot().
    """
    machine = Machine(Config(design, pool=4 * M2, page_size=M2, kernel=kernel, hvo=hvo))  # type: ignore[arg-type]
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    gmem = machine.create_guest_memfd(4 * M2, shared=False)
    vm.bind(gmem, 0)
    process.mmap(gmem, VA)
    vm.touch_many(np.arange(0, 4 * M2, PAGE))
    assert gmem.convert(M2, 2 * M2, shared=True).status == 0
    process.touch_many(np.arange(VA, VA + 4 * M2, PAGE))
    vm.touch_many(np.arange(0, 4 * M2, PAGE))
    assert machine.statistics.gauge(Gauge.FRAMES_USED) > used
    assert machine.check() == 0
    assert gmem.close().status == 0
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == used + machine.statistics.gauge(Gauge.STAGE2_TABLES) - 1
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 4
    assert machine.check() == 0


# --------------------------------------------------------------------------- contents


def test_contents_read_back_and_cost_a_frame_each() -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    pfn = machine.register(W.R_POOL_BASE) + 3
    assert machine.read_frame(pfn) == bytes(PAGE)
    machine.write_frame(pfn, b"abc", offset=4093)
    machine.write_frame(pfn, b"x")
    assert machine.read_frame(pfn) == b"x" + bytes(4092) + b"abc"
    assert machine.read_frame(pfn + 1) == bytes(PAGE)
    assert machine.statistics.gauge(Gauge.CONTENT_FRAMES) == 1
    assert machine.check() == 0


@pytest.mark.parametrize(
    ("frame", "data", "offset"), [(0, bytes(2), 4095), (0, b"a", -1), (-1, b"a", 0), (512, b"a", 0)]
)
def test_contents_outside_a_frame_or_the_pool_are_misuse(frame: int, data: bytes, offset: int) -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    with pytest.raises(ValueError, match="expected"):
        machine.write_frame(machine.register(W.R_POOL_BASE) + frame, data, offset)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("zero", ["folio", "page"])
@pytest.mark.parametrize("page", [0, 77, 511])
def test_a_huge_page_used_again_shows_zeroes(design: str, zero: str, page: int) -> None:
    """Also where one fault maps all of it at once and other pages are never faulted by themselves."""
    machine = Machine(Config(design, pool=M2, page_size=M2, zero=zero))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(M2, shared=False)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    vm.touch(page * PAGE)
    pfn = gmem.pfn(page * PAGE)
    assert pfn is not None
    machine.write_frame(pfn, b"secret")
    assert gmem.punch_hole(0, M2).status == 0
    assert vm.touch(5 * PAGE).detail == 2  # a 2M leaf: the guest sees every page of it
    assert gmem.pfn(page * PAGE) == pfn
    assert machine.read_frame(pfn) == bytes(PAGE)
    assert machine.check() == 0


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("zero", ["folio", "page"])
def test_conversions_keep_contents(design: str, zero: str) -> None:
    machine = Machine(Config(design, pool=M2, page_size=M2, zero=zero))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(M2, shared=False)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    vm.touch(9 * PAGE)
    pfn = gmem.pfn(9 * PAGE)
    assert pfn is not None
    machine.write_frame(pfn, b"kept")
    for shared in (True, False):
        assert gmem.convert(0, M2 if shared else 9 * PAGE, shared=shared).status == 0
        vm.touch(9 * PAGE)
        vm.touch(10 * PAGE)
        assert gmem.pfn(9 * PAGE) == pfn
        assert machine.read_frame(pfn)[:4] == b"kept"


@pytest.mark.parametrize("design", DESIGNS)
def test_a_hole_in_part_of_a_huge_page_zeroes_it(design: str) -> None:
    machine = Machine(Config(design, pool=M2, page_size=M2, punch="zero"))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    process.touch_many(np.arange(VA, VA + M2, PAGE))
    frames = [gmem.pfn(page * PAGE) or 0 for page in range(4)]
    for pfn in frames:
        machine.write_frame(pfn, b"data")
    assert gmem.punch_hole(PAGE, 2 * PAGE).status == 0
    assert [machine.read_frame(pfn)[:4] for pfn in frames] == [b"data", bytes(4), bytes(4), b"data"]
    assert gmem.pfn(PAGE) == frames[1]  # the huge page stays
    assert machine.check() == 0
