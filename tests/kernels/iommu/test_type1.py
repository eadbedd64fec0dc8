"""VFIO type1: every error, what is pinned and accounted, what stays when the mapping goes; the two what-ifs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.devices import Accounts, Policy, VfioContainer
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge

PAGE, M2, GIB = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7000_0000_0000
IOVA = 0x1_0000_0000
READ_WRITE = 3
Version = Literal[1, 2]


class Scene:
    """A process with 4 MiB of memory and a container with one device."""

    def __init__(self, unit: Any = "vtd", version: Version = 2, memory: int = 4 << 20, **parameters: Any) -> None:
        kernel = parameters.pop("kernel", "7.3")
        self.machine = Machine(Config(pool=8 * M2, page_size=M2, buddy=16 * M2, kernel=kernel, thp="madvise"))
        self.process: AddressSpace = self.machine.create_process()
        self.process.mmap_anonymous(VA, memory, READ_WRITE)
        self.container: VfioContainer = self.machine.create_vfio_container(unit, version=version, **parameters)
        self.device = self.container.attach()

    def map(self, iova: int, size: int, vaddr: int = VA, **rights: bool) -> int:
        return self.container.map(iova, size, self.process, vaddr, **rights).status

    @property
    def locked(self) -> int:
        return Accounts.of(self.process).locked

    def pinned(self) -> int:
        return self.machine.statistics.gauge(Gauge.PAGES_PINNED)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.findings


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize("unit", ["vtd", "amd"])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_what_a_map_refuses(unit: str, kernel: str) -> None:
    s = Scene(unit, kernel=kernel)
    wraps = -W.EINVAL if kernel == "6.12" else -W.EOVERFLOW
    assert s.map(IOVA, 4 * PAGE) == 0
    expected = [
        ((IOVA, PAGE, VA + M2), -W.EEXIST),
        ((IOVA + 3 * PAGE, 2 * PAGE, VA + M2), -W.EEXIST),
        ((IOVA + 2048, PAGE, VA), -W.EINVAL),
        ((2 * IOVA, PAGE, VA + 2048), -W.EINVAL),
        ((2 * IOVA, 2048, VA), -W.EINVAL),
        ((2 * IOVA, 0, VA), -W.EINVAL),
        ((0xFEE0_0000, PAGE, VA), -W.EINVAL),
        ((0xFEDF_F000, 2 * PAGE, VA), -W.EINVAL),
        (((1 << 64) - PAGE, 2 * PAGE, VA), wraps),
        ((2 * IOVA, 2 * PAGE, (1 << 64) - PAGE), wraps),
        ((2 * IOVA, PAGE, VA - PAGE), -W.EFAULT),
        ((2 * IOVA, 8 << 20, VA), -W.EFAULT),
    ]
    assert [s.map(*arguments) for arguments, _ in expected] == [status for _, status in expected]
    assert s.map(2 * IOVA, PAGE, read=False, write=False) == -W.EINVAL
    far = s.map(1 << 48, PAGE)
    assert far == (0 if unit == "amd" and kernel == "6.12" else -W.EINVAL)
    assert s.locked == s.pinned() == 4 + (far == 0)
    s.sound()


def test_memory_that_may_not_be_written() -> None:
    s = Scene()
    s.process.mmap_anonymous(VA + GIB, M2, 1)
    assert s.map(IOVA, PAGE, VA + GIB) == -W.EFAULT
    assert s.map(IOVA, PAGE, VA + GIB, write=False) == 0
    s.process.mmap_anonymous(VA + 2 * GIB, PAGE, 0)
    assert s.map(2 * IOVA, PAGE, VA + 2 * GIB, write=False) == -W.EFAULT
    s.sound()


def test_the_entry_limit_gives_one_for_another() -> None:
    s = Scene(dma_entry_limit=3)
    assert [s.map(IOVA + i * 2 * PAGE, PAGE) for i in range(5)] == [0, 0, 0, -W.ENOSPC, -W.ENOSPC]
    assert s.container.info().available == 0
    assert s.container.unmap(IOVA, 2 * PAGE) == (0, PAGE)
    assert s.container.info().available == 1
    assert [s.map(IOVA + GIB, M2), s.map(IOVA + 2 * GIB, PAGE)] == [0, -W.ENOSPC]
    s.sound()


def test_the_mlock_limit_undoes_all_of_a_map() -> None:
    s = Scene(memlock=10 * PAGE)
    assert s.map(IOVA, 8 * PAGE) == 0
    assert s.map(IOVA + GIB, 3 * PAGE) == -W.ENOMEM
    assert (s.locked, s.pinned(), s.container.mappings) == (8, 8, 1)
    assert s.map(IOVA + GIB, 2 * PAGE) == 0  # memory mapped twice counts twice
    assert s.locked == 10
    s.sound()


@pytest.mark.parametrize("unit", ["vtd", "amd"])
def test_unmaps_of_version_2(unit: str) -> None:
    s = Scene(unit)
    assert s.map(IOVA, 16 * PAGE) == 0
    assert s.map(IOVA + 16 * PAGE, 16 * PAGE, VA + M2) == 0
    for start, size in ((0, 1), (8, 16), (0, 24), (8, 8)):
        assert s.container.unmap(IOVA + start * PAGE, size * PAGE) == (-W.EINVAL, 0)
    assert s.container.unmap(IOVA - GIB, PAGE) == (0, 0)
    for iova, size in ((IOVA, 0), (IOVA + 8, PAGE), (IOVA, 100)):
        assert s.container.unmap(iova, size) == (-W.EINVAL, 0)
    assert s.locked == s.pinned() == 32
    assert s.container.unmap(IOVA, 16 * PAGE) == (0, 16 * PAGE)
    assert s.map(IOVA - 64 * PAGE, PAGE) == 0
    assert s.container.unmap(IOVA - GIB, 2 * GIB) == (0, 17 * PAGE)
    assert (s.locked, s.pinned(), s.container.mappings) == (0, 0, 0)
    assert s.map(IOVA, M2) == 0
    assert s.container.unmap_all() == (0, M2)
    s.sound()


def test_unmaps_of_version_1_take_whole_mappings_that_begin_there() -> None:
    s = Scene(version=1)
    assert s.map(IOVA, 256 * PAGE) == 0
    assert s.container.unmap(IOVA + PAGE, PAGE) == (0, 0)
    assert s.container.unmap(IOVA, PAGE) == (0, 256 * PAGE)
    assert s.container.unmap(IOVA, 256 * PAGE) == (0, 0)
    assert s.map(IOVA, 256 * PAGE) == 0
    assert s.container.unmap(IOVA - GIB, 2 * GIB) == (0, 256 * PAGE)
    s.sound()


# --------------------------------------------------------------------------- what is pinned


@pytest.mark.parametrize("unit", ["vtd", "amd"])
def test_two_devices_share_a_domain_and_the_last_one_takes_it_along(unit: str) -> None:
    s = Scene(unit)
    root = s.container.root
    other = s.container.attach()
    assert (s.container.root, s.container.devices) == (root, 2)
    assert s.map(IOVA, 4 * PAGE) == 0
    assert other.access(IOVA) == s.device.access(IOVA)
    s.device.detach()
    assert other.access(IOVA).status == 0
    other.detach()
    assert (s.container.root, s.container.mappings, s.locked, s.pinned()) == (0, 0, 0, 0)
    s.sound()


@pytest.mark.parametrize(("unit", "tables"), [("vtd", 3), ("amd", 2)])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_6_12_tries_a_new_domain_whose_tables_stay(unit: Any, tables: int, kernel: Any) -> None:
    """As captured. The first thing that a machine does counts in no gauge that it should not."""
    machine = Machine(Config(pool=M2, page_size=M2, kernel=kernel))
    container = machine.create_vfio_container(unit)
    container.attach()
    pages = sum(len(found) for found in container.table.table_pages().values())
    assert pages == 1 + (tables if kernel == "6.12" else 0)
    assert machine.check() == 0, machine.findings


def test_what_is_mapped_before_a_device_is_pinned_with_it() -> None:
    s = Scene()
    container = s.machine.create_vfio_container()
    assert container.map(IOVA, 4 * PAGE, s.process, VA).status == 0
    assert s.pinned() == 0
    container.attach()
    assert s.pinned() == s.locked == 4
    container.close()
    assert s.pinned() == s.locked == 0
    s.sound()


def test_a_device_goes_on_with_the_old_page() -> None:
    s = Scene()
    assert s.map(IOVA, 4 * PAGE) == 0
    s.device.write(IOVA + PAGE, b"before")
    old = s.device.access(IOVA + PAGE).detail
    s.process.madvise_dontneed(VA, 4 * PAGE)
    s.process.touch(VA + PAGE, write=True)
    s.device.write(IOVA + PAGE, b"after!")
    assert s.device.access(IOVA + PAGE).detail == old
    level, _, entry = s.process.walk(VA + PAGE)[-1]
    new = entry & 0xF_FFFF_FFFF_F000
    assert level == 1
    assert new != old
    assert not s.machine.arrays.ram[new // 8]
    assert s.device.read(IOVA + PAGE, 6) == b"after!"
    s.sound()
    assert s.container.unmap_all().status == 0
    with pytest.raises(OSError, match="read at") as error:
        s.device.read(IOVA + PAGE, 6)
    assert error.value.errno == W.EFAULT
    s.sound()


def test_rights() -> None:
    s = Scene()
    assert s.map(IOVA, PAGE, write=False) == 0
    assert s.map(IOVA + PAGE, PAGE, VA + PAGE, read=False) == 0
    read, write = (
        s.device.access_many(np.array([IOVA, IOVA + PAGE], np.uint64), write=w).status.tolist() for w in (False, True)
    )
    assert (read, write) == ([0, -W.EFAULT], [-W.EFAULT, 0])


@pytest.mark.parametrize("write", [False, True])
def test_a_batch_stores_words_where_the_entries_point(write: bool) -> None:
    s = Scene(memory=M2)
    s.process.madvise_hugepage(VA, M2)
    assert s.map(IOVA, M2) == 0
    iovas = np.arange(IOVA, IOVA + M2, 64 * PAGE, dtype=np.uint64)
    done = s.device.access_many(iovas, write=write, value=77)
    physical = s.device.access(IOVA).detail
    assert (done.detail - physical == iovas - IOVA).all()
    assert s.device.read(IOVA + 64 * PAGE, 8) == (77 * write).to_bytes(8, "little")
    s.sound()


# --------------------------------------------------------------------------- VM_PFNMAP


def test_a_bar_is_mapped_without_pins_and_stays() -> None:
    s = Scene()
    bar = s.machine.create_device(1 << 30, 1 << 18)
    s.process.mmap_device(bar, VA + GIB, GIB, READ_WRITE)
    assert s.map(IOVA, 16 * PAGE, VA + GIB) == 0
    assert s.map(2 * IOVA, M2, VA + GIB + M2) == 0
    assert s.map(3 * IOVA, M2, VA + GIB + 2 * M2, write=False) == 0
    assert (s.locked, s.pinned()) == (0, 0)
    assert s.device.access(2 * IOVA).detail == (1 << 42) + M2
    s.process.munmap(VA + GIB, GIB)
    assert bar.revoke().status == 0
    assert s.device.access(IOVA).detail == 1 << 42
    s.sound()
    assert s.container.unmap_all() == (0, 2 * M2 + 16 * PAGE)
    s.process.mmap_device(bar, VA + GIB, GIB, READ_WRITE)
    assert s.map(IOVA, PAGE, VA + GIB) == -W.EFAULT  # the memory is off: SIGBUS
    s.sound()


@pytest.mark.parametrize(("rights", "write", "status"), [(0, False, -W.EFAULT), (1, True, -W.EFAULT), (1, False, 0)])
def test_a_bar_is_faulted_in_as_far_as_its_mapping_allows(rights: int, write: bool, status: int) -> None:
    """mm/gup.c:vma_permits_fault()"""
    s = Scene()
    s.process.mmap_device(s.machine.create_device(1 << 30, 512), VA + GIB, M2, READ_WRITE)
    assert s.process.protect(VA + GIB, M2, rights).status == 0
    assert s.map(IOVA, PAGE, VA + GIB, write=write) == status
    s.sound()


class Slides:
    """A pfnmap machine with a guest_memfd of one huge page, mapped."""

    def __init__(self, policy: Policy) -> None:
        self.machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
        self.gmem = self.machine.create_guest_memfd(M2, shared=True)
        self.process = self.machine.create_process()
        self.process.mmap(self.gmem, VA)
        self.container = self.machine.create_vfio_container(policy=policy)
        self.device = self.container.attach()

    def map(self) -> int:
        return self.container.map(IOVA, 16 * PAGE, self.process, VA).status

    def references(self) -> int:
        pfn = self.gmem.pfn(0)
        assert pfn is not None
        return int(self.machine.struct_page(pfn)[6]) >> 32


def test_ram_under_pfnmap_is_refused() -> None:
    s = Slides("linux")
    assert s.map() == -W.EFAULT
    assert s.machine.check() == 0


def test_without_the_check_an_unmap_unpins_what_was_never_pinned() -> None:
    """The huge page has the 512 references of its page cache; 16 go that nobody took."""
    s = Slides("naive")
    assert s.map() == 0
    assert s.references() == 512
    assert s.machine.check() > 0  # an I/O entry of RAM that nobody holds
    assert s.container.unmap_all() == (0, 16 * PAGE)
    assert s.references() == 512 - 16
    assert s.machine.check() > 0
    assert W.Broken.REFERENCES in {finding.rule for finding in s.machine.findings}


def test_tracked_memory_is_neither_pinned_nor_unpinned_and_goes_stale() -> None:
    s = Slides("tracked")
    assert s.map() == 0
    assert s.machine.check() == 0, s.machine.findings
    assert s.gmem.convert(0, PAGE, shared=False).status == 0
    assert s.device.access(IOVA, write=True).status == 0
    stale = (Event.IOMMU_STALE_PRIVATE, Event.IOMMU_STALE_FREED)
    assert [s.machine.statistics.event(event) for event in stale] == [1, 0]
    s.gmem.close()
    assert s.device.access(IOVA + PAGE).status == 0
    assert [s.machine.statistics.event(event) for event in stale] == [1, 1]
    assert s.container.unmap_all() == (0, 16 * PAGE)
    assert s.machine.check() == 0, s.machine.findings


@pytest.mark.parametrize("start", [-4, M2 // PAGE - 4], ids=["anonymous memory first", "guest_memfd first"])
def test_tracked_memory_is_all_of_one_mapping_or_none(start: int) -> None:
    """An unmap could not tell what it has to unpin."""
    s = Slides("tracked")
    s.process.mmap_anonymous(VA - M2, M2, READ_WRITE)
    s.process.mmap_anonymous(VA + M2, M2, READ_WRITE)
    at = VA + start * PAGE
    assert s.container.map(IOVA, 8 * PAGE, s.process, at).status == -W.EFAULT
    assert [s.container.map(IOVA + i * M2, 4 * PAGE, s.process, at + 4 * i * PAGE).status for i in range(2)] == [0, 0]
    assert (Accounts.of(s.process).locked, s.machine.statistics.gauge(Gauge.PAGES_PINNED)) == (4, 4)
    assert s.references() == 512
    assert s.container.unmap_all() == (0, 8 * PAGE)
    assert s.references() == 512
    assert (Accounts.of(s.process).locked, s.machine.statistics.gauge(Gauge.PAGES_PINNED)) == (0, 0)
    assert s.machine.check() == 0, s.machine.findings


def test_pins_of_a_container_make_conversions_wait() -> None:
    machine = Machine(Config(pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    container = machine.create_vfio_container()
    container.attach()
    assert container.map(IOVA, 4 * PAGE, process, VA).status == 0
    assert Accounts.of(process) == (4, 0)
    assert gmem.convert(0, M2, shared=False) == (-W.EAGAIN, 0)
    assert machine.check() == 0, machine.findings
    assert container.unmap_all().status == 0
    assert gmem.convert(0, M2, shared=False).status == 0
    assert machine.check() == 0, machine.findings


# --------------------------------------------------------------------------- many


def test_65535_mappings() -> None:
    s = Scene()
    count = 65535
    iovas = np.arange(count, dtype=np.uint64) * np.uint64(2 * PAGE) + np.uint64(1 << 40)
    order = np.random.default_rng(0).permutation(count)
    vaddrs = np.full(1, VA, np.uint64)
    done = s.container.map_many(iovas[order], PAGE, s.process, vaddrs)
    assert not done.status.any()
    assert s.map(IOVA, PAGE) == -W.ENOSPC
    assert (s.locked, s.container.mappings) == (count, count)
    assert s.container.unmap(int(iovas[777]), PAGE) == (0, PAGE)
    assert s.container.unmap_all() == (0, (count - 1) * PAGE)
    assert s.pinned() == 0
    s.sound()
