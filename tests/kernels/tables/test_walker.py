"""Page-table entries as real kernels write them, and which table pages come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

M2 = W.PAGE_2M
G1 = W.PAGE_1G
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
FRAME = 0x000F_FFFF_FFFF_F000


def make(design: str, *, shared: bool, size: int = 2 * M2, page_size: int = M2, **parameters: Any) -> tuple[
    Machine, GuestMemfd, AddressSpace, Vm
]:  # fmt: skip
    """A machine with one inode over its whole pool, bound at guest address 0; nothing is mapped."""
    machine = Machine(Config(design, pool=size, page_size=page_size, **parameters))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(size, shared=shared)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert vm.bind(gmem, 0).status == 0
    return machine, gmem, process, vm


def bits(walk: list[tuple[int, int, int]]) -> list[int]:
    """The entries of a walk without their frames, from the top."""
    return [entry & ~FRAME for _, _, entry in walk]


# --------------------------------------------------------------------------- entries of a process


@pytest.mark.parametrize(("design", "read_only", "write", "leaf"), [
    ("restructure", False, False, 0x8000_0000_0000_0027),
    ("restructure", False, True, 0x8000_0000_0000_0867),
    ("restructure", True, False, 0x8000_0000_0000_0025),
    ("pfnmap", False, False, 0x8000_0000_0000_0227),
    ("pfnmap", False, True, 0x8000_0000_0000_0267),
    ("pfnmap", True, False, 0x8000_0000_0000_0225),
])  # fmt: skip
def test_host_entries(design: str, read_only: bool, write: bool, leaf: int) -> None:
    _, gmem, process, _ = make(design, shared=True)
    process.mmap(gmem, VA, read_only=read_only)
    process.touch(VA + 3 * PAGE, write=write)
    walk = process.walk(VA + 3 * PAGE)
    assert bits(walk) == [0x67, 0x67, 0x67, leaf]
    assert (walk[-1][2] & FRAME) >> 12 == gmem.pfn(3 * PAGE)


@pytest.mark.parametrize(("design", "clean", "dirty", "written"), [
    ("restructure", 0x027, 0x067, 0x867), ("pfnmap", 0x227, 0x267, 0x227),
])  # fmt: skip
def test_what_was_read_becomes_dirty_by_a_write_and_its_folio_by_losing_the_entry(
    design: str, clean: int, dirty: int, written: int
) -> None:
    _, gmem, process, _ = make(design, shared=True)
    process.mmap(gmem, VA)
    for write, bits_ in ((False, clean), (True, dirty), (False, dirty)):
        process.touch(VA, write=write)
        assert process.walk(VA)[-1][2] & 0xFFF == bits_
    process.zap(VA, PAGE)
    process.touch(VA)
    assert process.walk(VA)[-1][2] & 0xFFF == written


# --------------------------------------------------------------------------- entries of stage 2

STAGE2 = [
    # stage 2, kernel, iTLB-multihit mitigation, table, 4K, 2M and 1G
    ("npt", "6.12", False, 0x827, 0xE67, 0xEE7),
    ("npt", "6.18", False, 0x827, 0xE67, 0xEE7),
    ("npt", "7.3", False, 0x827, 0xE67, 0xEE7),
    ("ept", "6.12", False, 0x8000_0000_0000_0907, 0x8600_0000_0000_0B77, 0x8600_0000_0000_0BF7),
    ("ept", "6.18", False, 0x8000_0000_0000_0907, 0x8600_0000_0000_0B77, 0x8600_0000_0000_0BF7),
    ("ept", "7.3", False, 0x8000_0000_0000_0D07, 0x80A0_0000_0000_0F77, 0x80A0_0000_0000_0FF7),
    ("ept", "6.18", True, 0x8000_0000_0000_0907, 0x8600_0000_0000_0B77, 0x8600_0000_0000_0BF3),
    ("ept", "7.3", True, 0x8000_0000_0000_0D07, 0x80A0_0000_0000_0F77, 0x80A0_0000_0000_0BF3),
]


@pytest.mark.parametrize(("stage2", "kernel", "mitigation", "table", "small", "large"), STAGE2)
def test_stage2_entries(stage2: str, kernel: str, mitigation: bool, table: int, small: int, large: int) -> None:
    machine, gmem, _, vm = make(
        "pfnmap",
        shared=False,
        size=2 * G1,
        page_size=G1,
        stage2=stage2,
        kernel=kernel,
        nx_huge_pages=mitigation,
        punch="zero",
    )
    gmem.convert(PAGE, PAGE, shared=True)
    for gpa, level in ((PAGE, 1), (M2, 2), (G1 + 5 * PAGE, 3)):
        assert vm.touch(gpa) == (W.RET_PF_FIXED, level)
        walk = vm.walk(gpa)
        assert bits(walk) == [table] * (4 - level) + [small if level == 1 else large]
        inside = (1 << 9 * (level - 1)) - 1
        assert (walk[-1][2] & FRAME) >> 12 == (gmem.pfn(gpa) or 0) & ~inside
    assert vm.walk(2 * PAGE)[-1][2] == 0x8000_0000_0000_0000  # never used
    gmem.punch_hole(PAGE, PAGE)
    assert vm.walk(PAGE)[-1][2] == 0x8000_0000_0000_0000  # dropped
    assert machine.check() == 0


def test_every_page_below_a_leaf_translates_to_its_frame() -> None:
    _, gmem, _, vm = make("restructure", shared=False)
    vm.touch(M2 + 7 * PAGE)
    for page in (512, 519, 1023):
        level, _, entry = vm.walk(page * PAGE)[-1]
        assert level == 2
        assert ((entry & FRAME) >> 12) + page % 512 == gmem.pfn(page * PAGE)


# --------------------------------------------------------------------------- tables of a process


def test_host_tables_by_distance() -> None:
    """Below the top table: three for the first page; then one, two or three where a 2M, 1G or 512G differs."""
    machine, gmem, process, _ = make("pfnmap", shared=True)
    for address, tables in ((VA, 1 + 3), (VA + M2, 5), (VA + G1, 7), (VA - (512 << 30), 10), (VA + 2 * PAGE, 10)):
        process.mmap(gmem, address, offset=0, length=PAGE)
        process.touch(address)
        assert machine.statistics.gauge(Gauge.HOST_TABLES) == tables, hex(address)


@pytest.mark.parametrize("design", DESIGNS)
def test_unmapping_keeps_tables_and_munmap_frees_them(design: str) -> None:
    machine, gmem, process, _ = make(design, shared=True)
    process.mmap(gmem, VA)
    process.touch_many(np.arange(VA, VA + 2 * M2, PAGE))
    process.zap(VA, 2 * M2)
    assert machine.statistics.gauge(Gauge.HOST_LEAVES_4K) == 0
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == 1 + 2 + 2
    process.munmap(VA, 2 * M2)
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == 1
    assert bits(process.walk(VA)) == [0]
    assert machine.check() == 0


def test_munmap_spares_tables_that_a_neighbour_needs() -> None:
    """[VA, VA + 2M) and one page after it share their level-2 table; one page within, the level-1 table too."""
    machine, gmem, process, _ = make("pfnmap", shared=True)
    process.mmap(gmem, VA, length=M2)
    process.mmap(gmem, VA + M2, offset=M2, length=PAGE)
    for address in (VA, VA + M2):
        process.touch(address)
    process.munmap(VA + PAGE, M2 - PAGE)
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == 1 + 2 + 2  # page VA needs the first level-1 table
    process.munmap(VA, PAGE)
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == 1 + 2 + 1
    assert process.walk(VA + M2)[-1][2] & 1
    process.munmap(VA + M2, PAGE)
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == 1
    assert machine.check() == 0


@pytest.mark.parametrize(("kernel", "tables"), [("6.12", 1), ("6.18", 0), ("7.3", 0)])
def test_dontneed_over_a_whole_last_level_table(kernel: str, tables: int) -> None:
    """From 6.14 on (CONFIG_PT_RECLAIM) it frees the table; two halves, one after the other, do not."""
    machine, gmem, process, _ = make("restructure", shared=True, kernel=kernel)
    process.mmap(gmem, VA)
    process.touch(VA)
    before = machine.statistics.gauge(Gauge.HOST_TABLES)
    process.zap(VA, M2 // 2, madvise=True)
    process.zap(VA + M2 // 2, M2 // 2, madvise=True)
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == before
    assert process.zap(VA, M2, madvise=True).status == 0
    assert machine.statistics.gauge(Gauge.HOST_TABLES) == before - 1 + tables
    assert process.touch(VA).status == W.VM_FAULT_LOCKED
    assert machine.check() == 0


# --------------------------------------------------------------------------- tables of stage 2


@pytest.mark.parametrize("zap", ["punch", "dontneed"])
def test_zapping_stage2_keeps_tables(zap: str) -> None:
    machine, gmem, process, vm = make("restructure", shared=True)
    process.mmap(gmem, VA)
    vm.touch_many(np.arange(0, M2, PAGE))
    tables = machine.statistics.gauge(Gauge.STAGE2_TABLES)
    assert tables == 1 + 3
    if zap == "punch":
        gmem.punch_hole(0, M2)
    else:
        process.zap(VA, M2, madvise=True)
    assert machine.statistics.gauge(Gauge.STAGE2_LEAVES_4K) == 0
    assert machine.statistics.gauge(Gauge.STAGE2_TABLES) == tables
    assert machine.check() == 0


def test_a_huge_leaf_goes_whole_for_one_page() -> None:
    machine, gmem, _, vm = make("pfnmap", shared=False)
    vm.touch(0)
    vm.touch(M2)
    gmem.convert(7 * PAGE, PAGE, shared=True)
    assert machine.statistics.gauge(Gauge.STAGE2_LEAVES_2M) == 1
    assert vm.walk(0)[-1][2] & 1 == 0
    assert vm.walk(M2)[-1][2] & 1


@pytest.mark.parametrize("design", DESIGNS)
def test_a_leaf_over_a_table_frees_the_subtree(design: str) -> None:
    """1 GiB in 4K leaves has a level-2 and 512 level-1 tables; the 1G leaf takes the place of all 513."""
    machine, gmem, _, vm = make(design, shared=False, size=G1, page_size=G1)
    gmem.convert(5 * PAGE, PAGE, shared=True)
    vm.touch_many(np.arange(0, G1, PAGE))
    small = machine.statistics.gauge(Gauge.STAGE2_TABLES)
    assert small == 2 + (513 if design == "restructure" else 2)
    gmem.convert(5 * PAGE, PAGE, shared=False)
    assert machine.statistics.gauge(Gauge.STAGE2_TABLES) == small
    assert vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 3)
    assert machine.statistics.gauge(Gauge.STAGE2_TABLES) == 2
    leaves = [machine.statistics.gauge(Gauge(Gauge.STAGE2_LEAVES_4K + i)) for i in range(3)]
    assert leaves == [0, 0, 1]
    assert machine.check() == 0


@pytest.mark.parametrize(("gpa", "offset", "pages", "levels"), [
    (0, 0, 1024, [2, 2]),  # aligned alike
    (PAGE, 0, 1024, [1, 1]),  # guest and file offsets differ modulo 2M
    (M2 + PAGE, PAGE, 1023, [1, 2]),  # alike, but the first 2M block is not all in the slot
])  # fmt: skip
@pytest.mark.parametrize("design", DESIGNS)
def test_the_slot_limits_the_level(design: str, gpa: int, offset: int, pages: int, levels: list[int]) -> None:
    machine = Machine(Config(design, pool=2 * M2, page_size=M2))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(2 * M2, shared=False)
    vm = machine.create_vm()
    assert vm.bind(gmem, gpa, offset=offset, length=pages * PAGE).status == 0
    # One page of each of the file's 2M blocks.
    assert [vm.touch(gpa - offset + index * PAGE).detail for index in (9, 700)] == levels
    assert machine.check() == 0


def test_deleting_a_slot_of_an_ordinary_vm_drops_its_whole_tree() -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(2 * M2)
    vm = machine.create_vm(protected=False)
    for i in range(2):
        vm.bind(gmem, i * G1, offset=i * M2, length=M2)
        vm.touch(i * G1)
    assert vm.unbind(0).status == 0
    assert machine.statistics.gauge(Gauge.STAGE2_TABLES) == 1
    assert vm.walk(G1)[-1][2] & 1 == 0
    assert vm.touch(0).status == W.RET_PF_EMULATE
    assert machine.check() == 0


def test_deleting_a_slot_of_a_protected_vm_drops_its_own_leaves_only() -> None:
    """Neither the VM's other slot nor another VM with the same pages loses anything."""
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(2 * M2)
    vms = [machine.create_vm(protected=True) for _ in range(2)]
    for vm in vms:
        for i in range(2):
            vm.bind(gmem, i * G1, offset=i * M2, length=M2)
            vm.touch(i * G1)
    tables = machine.statistics.gauge(Gauge.STAGE2_TABLES)
    assert vms[0].unbind(0).status == 0
    assert [vm.walk(gpa)[-1][2] & 1 for vm in vms for gpa in (0, G1)] == [0, 1, 1, 1]
    assert machine.statistics.gauge(Gauge.STAGE2_TABLES) == tables
    assert machine.check() == 0
