"""One experiment in both designs, through every door and in every mode: 2M are shared and a device's, 4K of them become
private, the device writes where it could before, and everything is given back.

What is asked: does the write land in the private page, and is every reference what it was.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pgemu.objects.devices import IoSpace
from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Flag
from pgemu_kernels.words.rows import NO_INODE

VA, IOVA = 0x7300_0000_0000, 0x40_0000_0000
AT = 0x5000  # of the page that is converted, in the file
SECRET, DMA = b"private!", b"by DMA!!"


@dataclass
class Scene:
    """A guest_memfd of 4M, all shared, mapped by its VMM and reached by the guest; a device over its first 2M."""

    design: str
    unit: Any
    door: str
    kind: Any = "sw"

    def __post_init__(self) -> None:
        self.machine = Machine(
            Config(self.design, pool=8 << 20, page_size=W.PAGE_2M, stage2="npt" if self.kind == "snp" else "ept")
        )
        self.gmem = self.machine.create_guest_memfd(4 << 20, shared=True)
        self.process = self.machine.create_process()
        vm = self.machine.create_vm(self.process, kind=self.kind)
        assert vm.bind(self.gmem, gpa=0).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0
        self.process.touch_many(np.arange(VA, VA + (4 << 20), W.PAGE_4K, np.uint64), write=True)
        self.vm = vm
        self.first = self.pfn
        self.before = self.references()

    @property
    def pfn(self) -> int:
        """The frame of the page."""
        assert self.vm.touch(AT, write=True).status >= 0
        _, pfn = self.gmem.get_reference(AT)
        assert self.gmem.put_reference(pfn).status == 0
        return pfn

    def references(self) -> list[int]:
        """The references of every page of the first 2M."""
        first = self.first - (AT >> 12)
        return [int(self.machine.struct_page(first + i)[6] >> np.uint64(32)) for i in range(512)]

    def open(self) -> tuple[IoSpace, IoDevice, int]:
        """What the device reaches, through a door: the status of the map."""
        door, _, mode = self.door.partition(" ")
        if door == "type1":
            container = self.machine.create_vfio_container(self.unit, policy=mode or "linux")
            device = container.attach()
            return container, device, container.map(IOVA, 2 << 20, self.process, VA).status
        mode = {"vmm": "none", "late": "none", "": "refused"}.get(mode, mode)
        ioas = self.machine.create_iommufd().create_ioas(self.unit, guest_memfd=mode)
        device = ioas.attach()
        if door == "iommufd":
            return ioas, device, ioas.map(IOVA, 2 << 20, self.process, VA).status
        return ioas, device, ioas.map_file(IOVA, 2 << 20, self.process, self.gmem, 0).status

    def convert(self) -> int:
        return self.gmem.convert(AT, W.PAGE_4K, shared=False).status

    def write(self, device: IoDevice) -> bool:
        try:
            device.write(IOVA + AT, DMA)
        except OSError as error:
            if error.errno != W.EFAULT:
                raise
            return False
        return True

    @property
    def stale(self) -> int:
        return self.machine.statistics.event(Event.IOMMU_STALE_PRIVATE)

    def holds(self) -> bytes:
        return self.machine.read_frame(self.first)[:8]


UNITS = pytest.mark.parametrize("unit", ["vtd", "amd"])
DESIGNS = pytest.mark.parametrize("design", ["restructure", "pfnmap"])
# Doors that hold the pages, or would: restructure's conversion waits for them, pfnmap's pages are not theirs to hold.
HOLDS = ("type1", "iommufd", "type1 naive", "type1 tracked")


@DESIGNS
@UNITS
def test_a_guest_memfd_is_no_file_that_iommufd_maps(design: str, unit: Any) -> None:
    scene = Scene(design, unit, "file")
    _, _, status = scene.open()
    assert status == -W.EINVAL
    assert scene.references() == scene.before


@UNITS
@pytest.mark.parametrize("door", HOLDS)
def test_restructure_waits_for_what_a_device_holds(unit: Any, door: str) -> None:
    """Its folios are mapped as any, so policies for VM_PFNMAP change nothing."""
    scene = Scene("restructure", unit, door)
    space, device, status = scene.open()
    assert status == 0
    assert scene.references() == [n + W.GUP_PIN_COUNTING_BIAS for n in scene.before]
    assert scene.convert() == -W.EAGAIN
    assert scene.write(device)
    assert scene.holds() == DMA  # a page that both still share
    assert space.unmap(IOVA, 2 << 20) == (0, 2 << 20)
    assert scene.convert() == 0
    assert not scene.write(device)
    assert scene.gmem.convert(AT, W.PAGE_4K, shared=True).status == 0
    scene.process.touch_many(np.arange(VA, VA + (2 << 20), W.PAGE_4K, np.uint64))
    assert scene.references() == scene.before
    assert scene.machine.check() == 0


@UNITS
@pytest.mark.parametrize("door", ["type1", "iommufd"])
def test_pfnmap_refuses_memory_of_its_vma(unit: Any, door: str) -> None:
    scene = Scene("pfnmap", unit, door)
    _, _, status = scene.open()
    assert status == -W.EFAULT
    assert scene.references() == scene.before
    assert scene.machine.check() == 0


@UNITS
@pytest.mark.parametrize("policy", ["naive", "tracked"])
def test_pfnmap_accepted_by_type1_writes_into_private_memory(unit: Any, policy: str) -> None:
    """And with the check merely removed its unmap gives away references that nobody took."""
    scene = Scene("pfnmap", unit, f"type1 {policy}")
    space, device, status = scene.open()
    assert status == 0
    assert scene.references() == scene.before
    assert scene.convert() == 0
    scene.machine.write_frame(scene.first, SECRET)
    assert scene.write(device)
    assert scene.holds() == DMA
    assert scene.stale == 1
    assert space.unmap(IOVA, 2 << 20) == (0, 2 << 20)
    assert (scene.references() == scene.before) == (policy == "tracked")
    assert (scene.machine.check() == 0) == (policy == "tracked")


@DESIGNS
@UNITS
@pytest.mark.parametrize("mode", ["none", "vmm", "late", "notifier", "revoke", "mirror"])
def test_a_file_without_references(design: str, unit: Any, mode: str) -> None:
    """Who unmaps decides, in either design: nothing else keeps the device out of the private page."""
    scene = Scene(design, unit, f"file {mode}")
    space, device, status = scene.open()
    assert status == 0
    assert scene.references() == scene.before
    assert scene.write(device)
    if mode == "vmm":
        assert space.unmap(IOVA, 2 << 20).status == 0
    assert scene.convert() == 0
    scene.machine.write_frame(scene.first, SECRET)
    reaches = scene.write(device)
    assert reaches == (mode in ("none", "late"))
    assert scene.holds() == (DMA if reaches else SECRET)
    assert scene.stale == reaches
    beside = device.access(IOVA + AT + W.PAGE_4K, write=True).status
    assert beside == (-W.EFAULT if mode in ("vmm", "notifier") else 0)  # the large entry went with the page
    if mode == "vmm":
        assert space.map_file(IOVA, 2 << 20, scene.process, scene.gmem, 0).status == 0
        assert not scene.write(device)
        assert device.access(IOVA + AT + W.PAGE_4K, write=True).status == 0
    done = space.revocations
    kernel = mode in ("notifier", "revoke", "mirror")
    widened = 511 if mode in ("notifier", "revoke") else 0
    assert (done.revoked, done.widened) == ((1 if kernel else 0) + widened, widened)
    assert done.returned == (511 if mode == "revoke" else 0)
    assert done.windows == (1 if mode == "revoke" else 0)
    assert (done.window_ns[0] > 0) == (mode == "revoke")
    assert done.cut == (1 if mode == "mirror" else 0)
    assert scene.gmem.convert(AT, W.PAGE_4K, shared=True).status == 0
    again = device.access(IOVA + AT, write=True).status
    assert again == (-W.EFAULT if mode in ("vmm", "notifier") else 0)
    assert space.revocations.joined == (1 if mode == "mirror" else 0)
    if mode != "notifier":
        assert space.unmap(IOVA, 2 << 20).status == 0
    scene.process.touch_many(np.arange(VA, VA + (2 << 20), W.PAGE_4K, np.uint64))
    assert scene.references() == scene.before
    assert scene.machine.check() == 0


@DESIGNS
@pytest.mark.parametrize(
    ("kind", "unit"), [("plain", "vtd"), ("sw", "vtd"), ("sw", "amd"), ("tdx", "vtd"), ("snp", "amd")]
)
def test_what_a_kind_of_vm_makes_of_it(design: str, kind: str, unit: Any) -> None:
    scene = Scene(design, unit, "file none", kind=kind)
    _, device, _ = scene.open()
    if kind == "plain":
        assert scene.convert() == -W.EINVAL  # it knows no private memory
        return
    assert scene.convert() == 0
    scene.vm.touch(AT, write=True)
    scene.machine.write_frame(scene.first, SECRET)
    with suppress(OSError):  # of SNP
        device.read(IOVA + AT, 8)
    assert scene.machine.machine_checks == 0  # a read poisons nothing
    stale = scene.stale
    assert scene.write(device) == (kind != "snp")
    assert scene.holds() == (SECRET if kind == "snp" else DMA)
    assert scene.machine.machine_checks == (kind == "tdx")
    assert scene.stale == stale + 1


@DESIGNS
@pytest.mark.parametrize("door", ["none", "notifier", "revoke", "mirror"])
@pytest.mark.parametrize("zero", ["folio", "page"])
def test_a_device_finds_zeros_and_its_data_stay(design: Any, door: Any, zero: Any) -> None:
    """A file's memory is zeroed before a device has it: nothing of its last owner is read, nothing is zeroed later."""
    machine = Machine(Config(design, pool=2 << 20, page_size=2 << 20, zero=zero))
    process = machine.create_process()
    first = machine.create_guest_memfd(2 << 20, shared=True)
    first.allocate(0, 2 << 20)
    pfn = first.pfn(0)
    assert pfn is not None
    for page in range(512):
        machine.write_frame(pfn + page, b"SECRET!!")
    first.close()
    gmem, vm = machine.create_guest_memfd(2 << 20, shared=True), machine.create_vm(process, protected=True)
    vm.bind(gmem, 0)
    gmem.allocate(0, 2 << 20)
    ioas = machine.create_iommufd().create_ioas(guest_memfd=door)
    device = ioas.attach()
    assert ioas.map_file(0, 2 << 20, process, gmem, 0).status == 0
    assert device.read(0, 8) == bytes(8)
    device.write(0x5000, b"DMADATA!")
    for address in (0x3000, 0x5000):
        vm.touch(address)
    assert machine.read_frame(pfn + 5)[:8] == b"DMADATA!"
    assert device.read(0x5000, 8) == b"DMADATA!"
    assert gmem.convert(0x5000, 4096, shared=False).status == 0
    vm.touch(0x5000)
    assert machine.read_frame(pfn + 5)[:8] == b"DMADATA!"
    assert machine.check() == 0


def test_a_copy_of_several_areas_is_refused_for_any_of_them() -> None:
    """IOMMU_IOAS_COPY looks at all that it copies: what an IOAS does not take is not handed to it behind others."""
    machine = Machine(Config("pfnmap", pool=4 << 20, page_size=2 << 20))
    process = machine.create_process()
    process.mmap_anonymous(VA, 1 << 20)
    gmem = machine.create_guest_memfd(2 << 20, shared=True)
    gmem.allocate(0, 2 << 20)
    iommufd = machine.create_iommufd()
    takes, refuses = iommufd.create_ioas(guest_memfd="notifier"), iommufd.create_ioas()
    refuses.attach()
    takes.map(0x10000, 4096, process, VA)
    takes.map_file(0x11000, 4096, process, gmem, 0)
    for first, length in ((0x11000, 4096), (0x10000, 8192)):
        assert refuses.copy(0x20000, length, takes, first).status == -W.EINVAL
    assert refuses.copy(0x20000, 4096, takes, 0x10000).status == 0


def test_the_worst_device_operation_is_the_same_in_a_batch() -> None:
    def ran(batch: bool) -> tuple[Any, ...]:
        machine = Machine(Config(pool=4 << 20, page_size=2 << 20))
        process = machine.create_process()
        process.mmap_anonymous(VA, 1 << 20)
        ioas = machine.create_iommufd().create_ioas()
        records = Records.build(
            2, op=[W.Operation.DMA_UNMAP, W.Operation.DMA_MAP], flags=[0, int(Flag.READ)], vm=process.number,
            space=ioas.number, object=[0, int(NO_INODE)], address=0x1000, offset=[0, VA], length=[4096, 0],
        )  # fmt: skip
        for piece in [records] if batch else [records[:1], records[1:]]:
            machine.run(piece)
        return tuple(machine.statistics.worst(op) for op in (W.Operation.DMA_UNMAP, W.Operation.DMA_MAP))

    assert ran(True) == ran(False)


@pytest.mark.parametrize("make", ["ioas", "container"])
def test_a_parameter_that_a_unit_does_not_have_is_named(make: str) -> None:
    machine = Machine(Config())
    create = machine.create_iommufd().create_ioas if make == "ioas" else machine.create_vfio_container
    with pytest.raises(ValueError, match="foo: expected some of levels, kernel"):
        create("vtd", foo=1)  # type: ignore[arg-type]
