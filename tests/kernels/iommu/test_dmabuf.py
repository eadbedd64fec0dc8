"""iommufd over the dma-buf of a device's memory, and what holds the files that it maps."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.objects.devices import Accounts, Ioas
from pgemu.objects.files import Device, HugetlbFile, ShmemFile
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
BAR = 0xF_C000_0000  # physical address
IOVA = 0x1_0000_0000


class Scene:
    """A BAR of 8 MiB, and an IOAS with a device."""

    def __init__(self, unit: Any = "vtd", kernel: Any = "7.3", **parameters: Any) -> None:
        self.machine = Machine(Config(pool=8 * M2, page_size=M2, kernel=kernel))
        self.process = self.machine.create_process()
        self.bar: Device = self.machine.create_device(BAR >> 12, 2048)
        self.ioas: Ioas = self.machine.create_iommufd().create_ioas(unit, **parameters)
        self.device = self.ioas.attach()

    def map(self, size: int = 8 << 20, offset: int = 0, iova: int = IOVA, ioas: Ioas | None = None) -> int:
        return (ioas or self.ioas).map_file(iova, size, self.process, self.bar, offset).status

    def reaches(self, at: int = 0) -> int:
        """The physical address behind an I/O address, or -errno."""
        status, detail = self.device.access(IOVA + at, write=True)
        return status or detail

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.findings


UNITS = pytest.mark.parametrize("unit", ["vtd", "amd"])


@UNITS
def test_memory_of_a_device_is_mapped_without_pins(unit: Any) -> None:
    s = Scene(unit)
    assert s.map(4 << 20, 1 << 20) == 0
    assert s.reaches(0x5000) == BAR + (1 << 20) + 0x5000
    assert Accounts.of(s.process) == (0, 0)
    assert s.machine.statistics.gauge(Gauge.IOMMU_PAGES) == 1024
    assert s.ioas.unmap(IOVA, 4 << 20) == (0, 4 << 20)
    assert s.reaches() == -W.EFAULT
    assert s.machine.statistics.gauge(Gauge.IOMMU_PAGES) == 0
    s.sound()


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_older_kernels_know_no_dma_buf(kernel: str) -> None:
    assert Scene(kernel=kernel).map() == -W.EINVAL


def test_what_a_map_refuses() -> None:
    s = Scene()
    assert s.map(8 << 20, PAGE) == -W.EINVAL  # past its end
    assert s.map(PAGE, 2048) == -W.EINVAL
    assert s.bar.revoke().status == 0
    assert s.map() == -W.ENODEV
    assert s.bar.restore().status == 0
    assert s.map() == 0
    s.sound()


@UNITS
def test_revocation_takes_it_from_every_domain_for_good(unit: Any) -> None:
    s = Scene(unit)
    other = s.machine.create_iommufd().create_ioas("amd" if unit == "vtd" else "vtd")
    device = other.attach()
    assert s.map(4 << 20) == 0
    assert other.copy(IOVA, 4 << 20, s.ioas, IOVA).status == 0
    assert s.map(4 << 20, 4 << 20, IOVA + (4 << 20), other) == 0
    assert device.access(IOVA + (6 << 20)) == (0, BAR + (6 << 20))
    assert s.bar.revoke().status == 0
    assert s.reaches() == -W.EFAULT
    assert device.access(IOVA).status == device.access(IOVA + (6 << 20)).status == -W.EFAULT
    assert (s.ioas.mappings, other.mappings) == (1, 2)  # the areas stay
    assert (s.ioas.revocations.revoked, other.revocations.revoked) == (1024, 2048)
    assert s.bar.restore().status == 0
    assert s.reaches() == -W.EFAULT  # nothing enters it again,
    device.detach()
    device = other.attach()
    assert device.access(IOVA).status == -W.EFAULT  # ... not even a new domain,
    assert s.ioas.unmap(IOVA, 4 << 20) == (0, 4 << 20)
    assert s.map(4 << 20) == 0  # ... but user space that maps anew
    assert s.reaches() == BAR
    assert s.bar.revoke().status == s.bar.revoke().status == 0  # the second time nothing is left
    assert s.ioas.revocations.revoked == 2048
    s.sound()


def test_a_dma_buf_holds_its_device() -> None:
    """The row of a closed file is another file's as soon as nothing holds it."""
    s = Scene()
    assert s.map() == 0
    assert s.bar.close().status == 0
    assert s.machine.create_hugetlb_file(M2).inode != s.bar.inode
    assert s.reaches() == BAR
    assert s.ioas.unmap_all().status == 0
    assert s.machine.create_device(BAR >> 12, 1).inode == s.bar.inode
    s.sound()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", ["hugetlb", "shmem"])
def test_an_area_holds_its_file(kind: str, attached: bool) -> None:
    s = Scene()
    if not attached:
        s.device.detach()
    file: HugetlbFile | ShmemFile = (
        s.machine.create_hugetlb_file(2 * M2) if kind == "hugetlb" else s.machine.create_memfd(2 * M2)
    )
    assert s.ioas.map_file(IOVA, M2, s.process, file, 0).status == 0
    free = s.machine.hugetlb(M2).free_hugepages
    assert file.close().status == 0
    assert s.machine.hugetlb(M2).free_hugepages == free
    assert s.machine.create_device(BAR >> 12, 1).inode != file.inode
    copy = s.machine.create_iommufd().create_ioas()
    assert copy.copy(IOVA, M2, s.ioas, IOVA).status == 0
    assert s.ioas.unmap(IOVA, M2).status == 0
    assert s.machine.create_device(BAR >> 12, 1).inode != file.inode  # a copy holds it, too
    assert copy.attach().access(IOVA).status == 0
    s.sound()
    assert copy.unmap_all().status == 0
    s.sound()


def test_a_closed_guest_memfd_is_held_by_nobody() -> None:
    """The what-ifs are about maps without references: its pages go, and the entries as the mode says."""
    for way, reached in (("none", True), ("revoke", False)):
        s = Scene(guest_memfd=way)
        gmem = s.machine.create_guest_memfd(M2, shared=True)
        assert gmem.allocate(0, M2).status == 0
        assert s.ioas.map_file(IOVA, M2, s.process, gmem, 0).status == 0
        assert gmem.close().status == 0
        assert (s.reaches() >= 0) == reached
        assert s.machine.statistics.event(W.Event.IOMMU_STALE_FREED) == reached
        s.sound()


def test_a_memfd_is_mapped_by_processes_too() -> None:
    s = Scene()
    memfd = s.machine.create_memfd(4 * PAGE)
    assert s.process.mmap(memfd, 1 << 40).status == 0
    assert s.ioas.map_file(IOVA, 4 * PAGE, s.process, memfd, 0).status == 0
    assert s.process.touch((1 << 40) + PAGE, write=True).status >= 0
    *_, (_, _, entry) = s.process.walk((1 << 40) + PAGE)
    assert s.reaches(PAGE) == int(entry) & 0xF_FFFF_FFFF_F000
    s.device.write(IOVA + PAGE, b"seen by both")
    assert s.device.read(IOVA + PAGE, 12) == b"seen by both"
    s.sound()
