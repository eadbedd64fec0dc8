"""iommufd: areas, copies, what is pinned while a device is attached; every error."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.devices import Accounts, Ioas
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

PAGE, M2, GIB = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7200_0000_0000
IOVA = 0x1_0000_0000


class Scene:
    """A process with 8 MiB of memory and an IOAS, with a device unless it is to come later."""

    def __init__(self, unit: Any = "vtd", *, attached: bool = True, thp: Any = "never") -> None:
        self.machine = Machine(Config(pool=8 * M2, page_size=M2, buddy=16 * M2, thp=thp))
        self.process: AddressSpace = self.machine.create_process()
        self.process.mmap_anonymous(VA, 8 << 20, 3)
        self.iommufd = self.machine.create_iommufd()
        self.ioas: Ioas = self.iommufd.create_ioas(unit)
        self.device = self.ioas.attach() if attached else None

    def map(self, iova: int | None, size: int, vaddr: int = VA, **rights: bool) -> tuple[int, int]:
        return tuple(self.ioas.map(iova, size, self.process, vaddr, **rights))

    @property
    def pinned(self) -> int:
        assert Accounts.of(self.process).pinned == self.machine.statistics.gauge(Gauge.PAGES_PINNED)
        return Accounts.of(self.process).pinned

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.findings


@pytest.mark.parametrize("unit", ["vtd", "amd"])
def test_what_a_map_refuses(unit: str) -> None:
    s = Scene(unit)
    assert s.map(IOVA, 4 * PAGE) == (0, IOVA)
    expected = [
        ((IOVA, PAGE, VA + M2), -W.EEXIST),
        ((IOVA + 3 * PAGE, 2 * PAGE, VA + M2), -W.EEXIST),
        ((IOVA + 2048, PAGE, VA), -W.EINVAL),
        ((2 * IOVA, PAGE, VA + 2048), -W.EINVAL),
        ((2 * IOVA, 2048, VA), -W.EINVAL),
        ((2 * IOVA, 0, VA), -W.EINVAL),
        ((2 * IOVA, PAGE, VA - PAGE), -W.EFAULT),
        ((0xFEE0_0000, PAGE, VA), -W.EINVAL),
        (((1 << 64) - PAGE, 2 * PAGE, VA), -W.EOVERFLOW),
        ((2 * IOVA, 2 * PAGE, (1 << 64) - PAGE), -W.EOVERFLOW),
        ((None, 0, VA), -W.EINVAL),
    ]
    assert [s.map(*arguments) for arguments, _ in expected] == [(status, 0) for _, status in expected]
    assert s.map(2 * IOVA, PAGE, read=False, write=False) == (-W.EINVAL, 0)
    assert (s.pinned, s.ioas.mappings) == (4, 1)
    s.sound()


def test_an_address_is_found_as_aligned_as_the_memory() -> None:
    s = Scene()
    assert s.map(None, 64 << 10, VA + (1 << 20)) == (0, 0x10000)
    assert s.map(None, 2 << 20, VA + M2) == (0, 0x200000)
    assert s.map(None, 64 << 10, VA + (1 << 20)) == (0, 0x20000)
    assert s.map(None, PAGE, VA + PAGE) == (0, PAGE)
    s.sound()


def test_unmaps() -> None:
    s = Scene()
    assert s.map(IOVA, 16 * PAGE) == (0, IOVA)
    assert s.map(IOVA + 16 * PAGE, 16 * PAGE, VA + M2) == (0, IOVA + 16 * PAGE)
    for start, size in ((0, 1), (1, 1), (8, 16), (-16, 1)):
        assert s.ioas.unmap(IOVA + start * PAGE, size * PAGE) == (-W.ENOENT, 0)
    assert s.ioas.unmap(IOVA, 0) == (-W.EINVAL, 0)
    assert s.ioas.unmap((1 << 64) - PAGE, 2 * PAGE) == (-W.EOVERFLOW, 0)
    assert s.pinned == 32
    # The first area goes before the second one is found to be cut.
    assert s.ioas.unmap(IOVA, 24 * PAGE) == (-W.ENOENT, 0)
    assert (s.pinned, s.ioas.mappings) == (16, 1)
    assert s.ioas.unmap(IOVA, GIB) == (0, 16 * PAGE)
    assert s.ioas.unmap_all() == (0, 0)
    assert s.pinned == 0
    s.sound()


def test_pins_come_with_the_first_device_and_go_with_the_last() -> None:
    s = Scene(attached=False)
    assert s.map(IOVA, 16 * PAGE) == (0, IOVA)
    assert s.map(2 * IOVA, PAGE, VA - PAGE) == (0, 2 * IOVA)  # nothing is looked at yet
    assert s.pinned == 0
    with pytest.raises(OSError, match="attaching") as error:
        s.ioas.attach()
    assert error.value.errno == W.EFAULT
    assert (s.pinned, s.ioas.root) == (0, 0)
    assert s.ioas.unmap(2 * IOVA, PAGE) == (0, PAGE)
    one, other = s.ioas.attach(), s.ioas.attach()
    assert s.pinned == 16
    assert s.ioas.destroy().status == -W.EBUSY
    one.detach()
    assert s.pinned == 16
    other.detach()
    assert (s.pinned, s.ioas.mappings) == (0, 1)
    s.sound()
    again = s.ioas.attach()
    assert again.access(IOVA + 3 * PAGE).status == 0
    s.sound()
    again.detach()
    assert s.ioas.destroy().status == 0
    assert s.ioas.destroy().status == -W.EBADF
    s.sound()


def test_copies_are_pinned_once_and_outlive_the_source() -> None:
    s = Scene()
    other = s.iommufd.create_ioas()
    device = other.attach()
    assert s.map(IOVA, 16 * PAGE) == (0, IOVA)
    assert other.copy(2 * IOVA, 16 * PAGE, s.ioas, IOVA) == (0, 2 * IOVA)
    assert other.copy(None, 4 * PAGE, s.ioas, IOVA + 8 * PAGE, write=False).status == 0
    assert s.ioas.copy(3 * IOVA, 2 * PAGE, s.ioas, IOVA + PAGE) == (0, 3 * IOVA)
    assert s.pinned == 16
    assert device.access(2 * IOVA + 5 * PAGE).detail == s.device.access(IOVA + 5 * PAGE).detail
    s.sound()
    for size, at, status in ((32, IOVA, -W.ENOENT), (1, 9 * IOVA, -W.ENOENT), (0, IOVA, -W.EINVAL)):
        assert other.copy(5 * IOVA, size * PAGE, s.ioas, at) == (status, 0)
    assert other.copy(2 * IOVA, PAGE, s.ioas, IOVA) == (-W.EEXIST, 0)
    assert s.map(4 * IOVA, PAGE, VA + M2, write=False) == (0, 4 * IOVA)
    assert other.copy(5 * IOVA, PAGE, s.ioas, 4 * IOVA) == (-W.EPERM, 0)
    assert s.ioas.unmap(IOVA, 16 * PAGE).status == 0
    assert s.pinned == 17
    assert device.access(2 * IOVA).status == 0
    assert other.unmap(2 * IOVA, 16 * PAGE).status == 0
    assert s.pinned == 4 + 2 + 1  # pages 8 to 11, 1 and 2, and what is only read
    s.sound()
    assert other.unmap_all().status == s.ioas.unmap_all().status == 0
    assert s.pinned == 0
    s.sound()


def test_a_copy_goes_over_areas_that_follow_one_another() -> None:
    s = Scene()
    assert s.map(IOVA, 2 * PAGE) == (0, IOVA)
    assert s.map(IOVA + 2 * PAGE, 2 * PAGE, VA + M2) == (0, IOVA + 2 * PAGE)
    other = s.iommufd.create_ioas()
    device = other.attach()
    assert other.copy(2 * IOVA, 2 * PAGE, s.ioas, IOVA + PAGE) == (0, 2 * IOVA)
    found = [device.access(2 * IOVA + i * PAGE).detail for i in range(2)]
    assert found == [s.device.access(IOVA + i * PAGE).detail for i in (1, 2)]
    assert other.mappings == 2
    s.sound()


def test_files() -> None:
    s = Scene()
    huge = s.machine.create_hugetlb_file(2 * M2)
    gmem = s.machine.create_guest_memfd_4k(4 * PAGE)
    assert s.ioas.map_file(IOVA, 2 * M2, s.process, huge, 0) == (0, IOVA)
    assert s.pinned == 1024
    assert s.ioas.map_file(2 * IOVA, M2, s.process, huge, 2 * M2) == (-W.EINVAL, 0)
    assert s.ioas.map_file(2 * IOVA, PAGE, s.process, huge, 100) == (-W.EINVAL, 0)
    assert s.ioas.map_file(2 * IOVA, PAGE, s.process, gmem, 0) == (-W.EINVAL, 0)
    s.sound()
    head = s.device.access(IOVA).detail >> 12
    page = s.machine.struct_page(head)
    assert int(page[6]) >> 32 == 512 + 512  # of the page cache and of the pins
    assert huge.punch_hole(0, 2 * M2).status == 0
    assert int(s.machine.struct_page(head)[6]) >> 32 == 512
    s.sound()
    free = s.machine.hugetlb(M2).free_hugepages
    assert s.ioas.unmap_all() == (0, 2 * M2)
    assert s.machine.hugetlb(M2).free_hugepages == free + 2
    s.sound()


@pytest.mark.parametrize("unit", ["vtd", "amd"])
def test_huge_pages_are_mapped_whole_and_the_hole_is_nobodys(unit: str) -> None:
    s = Scene(unit, thp="always")
    assert s.map(IOVA, 4 * M2) == (0, IOVA)
    head = s.device.access(IOVA).detail >> 12
    assert int(s.machine.struct_page(head)[6]) >> 32 == 513
    s.process.munmap(VA, 8 << 20)
    assert int(s.machine.struct_page(head)[6]) >> 32 == 512
    s.device.write(IOVA + 3 * PAGE, b"device")
    assert s.device.read(IOVA + 3 * PAGE, 6) == b"device"
    s.sound()
    assert s.ioas.unmap_all() == (0, 4 * M2)
    s.sound()


def test_ram_under_pfnmap_and_bars_are_refused() -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    bar = machine.create_device(1 << 30, 512)
    process.mmap_device(bar, VA + GIB, M2, 3)
    ioas = machine.create_iommufd().create_ioas()
    ioas.attach()
    for at in (VA, VA + GIB):
        assert ioas.map(IOVA, PAGE, process, at) == (-W.EFAULT, 0)
    assert ioas.map_file(IOVA, PAGE, process, gmem, 0) == (-W.EINVAL, 0)
    assert machine.check() == 0, machine.findings


def test_an_area_may_end_at_the_last_address() -> None:
    """6.12's AMD units take any; behind such an area there is none."""
    machine = Machine(Config(pool=8 * M2, page_size=M2, kernel="6.12"))
    process = machine.create_process()
    assert process.mmap_anonymous(VA, M2, 3).status == 0
    ioas = machine.create_iommufd().create_ioas("amd", guest_memfd="mirror")
    device = ioas.attach()
    top = (1 << 64) - PAGE
    assert ioas.map(top, PAGE, process, VA) == (0, top)
    assert ioas.map(None, PAGE, process, VA).status == 0
    gmem = machine.create_guest_memfd(M2, shared=True)
    assert gmem.allocate(0, M2).status == 0
    assert ioas.map_file(1 << 40, M2, process, gmem, 0).status == 0
    assert device.access(top).status == device.access(1 << 40).status == 0
    assert gmem.convert(0, PAGE, shared=False).status == 0
    device.detach()
    device = ioas.attach()
    assert device.access(top).status == 0
    assert ioas.unmap(top, PAGE) == (0, PAGE)
    assert ioas.map_file(top - PAGE, 2 * PAGE, process, gmem, 0).status == -W.EINVAL  # a what-if's may not
    assert ioas.unmap_all().status == 0
    assert machine.check() == 0, machine.findings


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("unit", ["vtd", "amd"])
def test_an_attach_that_fails_counts_nothing(unit: Any, kernel: Any) -> None:
    machine = Machine(Config(pool=8 * M2, page_size=M2, kernel=kernel))
    process = machine.create_process()
    ioas = machine.create_iommufd().create_ioas(unit)
    assert ioas.map(4 << 20, PAGE, process, VA).status == 0  # where no memory is
    with pytest.raises(OSError, match="attaching"):
        ioas.attach()
    assert process.mmap_anonymous(VA, 8 << 20, 3).status == 0
    assert ioas.map(8 << 20, M2, process, VA).status == 0
    for free in (0, 1, 50):
        machine.limit_frames(free)
        with pytest.raises(OSError, match="attaching"):
            ioas.attach()
        machine.limit_frames(None)
        assert machine.statistics.gauge(Gauge.IOMMU_PAGES) == 0
        assert Accounts.of(process) == (0, 0)
    assert ioas.attach().access(4 << 20).status == 0
    assert machine.statistics.gauge(Gauge.IOMMU_PAGES) == 513
    assert machine.check() == 0, machine.findings


@pytest.mark.parametrize("door", ["vfio", "iommufd"])
@pytest.mark.parametrize("attached", [False, True])
def test_a_device_holds_the_mm_of_a_process_that_ended(door: str, attached: bool) -> None:
    """Another process gets another row, and begins without what the first one's devices have."""
    machine = Machine(Config(pool=M2, page_size=M2))
    process = machine.create_process()
    assert process.mmap_anonymous(VA, 1 << 20, 3).status == 0
    space = machine.create_vfio_container() if door == "vfio" else machine.create_iommufd().create_ioas()
    device = space.attach() if attached else None
    assert space.map(1 << 20, 1 << 16, process, VA).status == 0
    ended = process.space
    assert process.exit().status == 0
    other = machine.create_process()
    assert other.space != ended
    assert other.mmap_anonymous(VA, 1 << 20, 3).status == 0
    if device is None:
        with pytest.raises(OSError, match="attaching"):
            space.attach()
    assert space.unmap_all().status == 0
    assert Accounts.of(other) == (0, 0)
    assert machine.create_process().space == ended
    assert machine.check() == 0, machine.findings
