"""Address spaces of devices, whoever made them, and the devices that are attached to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.arrays import Integers
from pgemu.machine.field_rules import shown
from pgemu.machine.results import Result, Results
from pgemu.objects.device_values import Range
from pgemu.tables.formats import add_formats, format_of
from pgemu.tables.page_table import PageTable
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.objects.address_space import AddressSpace

__all__ = ("HYPERTRANSPORT", "INTERRUPTS", "DomainTable", "IoDevice", "IoSpace", "Unit", "rights_of")

Unit = Literal["vtd", "amd"]
_NONE = (1 << 64) - 1
_OLD = ("6.1", "6.12")
_FORMATS = {"vtd": "vtd-s2", "amd": "amd-v1"}
INTERRUPTS = 0xFEE0_0000, 0xFEF0_0000  # where a write is an interrupt: reserved by both units
HYPERTRANSPORT = 0xFD_0000_0000, 0x100_0000_0000  # drivers/iommu/amd/iommu.c:amd_iommu_get_resv_regions()


class _Unit(NamedTuple):
    """What a unit takes: its last address, and what is reserved."""

    last: int
    holes: tuple[tuple[int, int], ...]


def _unit(unit: Unit, kernel: str) -> _Unit:
    """As captured; AMD's of 6.12 and before have no end."""
    if unit == "vtd":
        return _Unit((1 << 48) - 1, (INTERRUPTS,))
    return _Unit(_NONE if kernel in _OLD else (1 << 48) - 1, (INTERRUPTS, HYPERTRANSPORT))


class DomainTable(PageTable, but=("__init__",)):
    """The I/O page table of an address space: the kernels say where its root is."""

    def __init__(self, space: IoSpace, formats: dict[int, Any]) -> None:
        self.machine = space.machine
        self._request = np.zeros(W.E_WORDS, np.uint64)
        self._formats = formats
        self._space = space

    @property
    def _root(self) -> int:  # type: ignore[override]
        return self._space.root

    @property
    def _row(self) -> int:  # type: ignore[override]
        return self._space._word(W.D_FORMAT) or next(iter(self._formats))


class IoSpace(OfMachine):
    """What a device may reach: a row of the machine, and an I/O page table while a device is attached."""

    machine: Core
    number: int
    unit: Unit
    table: PageTable

    def __init__(self, machine: Core, unit: Unit, kind: int, parameters: Mapping[str, Any], **words: int) -> None:

        state = machine.arrays.state
        used = machine.register(W.R_DOMAINS)
        rows = state[int(W.STATE_DOMAINS) :][: W.DOMAINS * W.D_WORDS].reshape(-1, W.D_WORDS)
        free = [number for number in range(used) if not rows[number, W.D_KIND]]
        if not free and used == W.DOMAINS:
            raise OSError(W.ENOMEM, f"{used} address spaces of devices: expected fewer")
        self.machine = machine
        self.number = free[0] if free else used
        self.unit = unit
        state[W.R_DOMAINS] = max(used, self.number + 1)
        formats = add_formats(machine, format_of(_FORMATS[unit], {"kernel": machine.config.kernel, **parameters}))
        last, holes = _unit(unit, machine.config.kernel)
        row = rows[self.number]
        row[:] = 0
        row[W.D_EMPTY_FORMAT] = row[W.D_FORMAT] = next(iter(formats))
        row[W.D_LAST] = last
        for i, (start, end) in enumerate(holes):
            row[int(W.D_HOLES) + 2 * i : int(W.D_HOLES) + 2 * i + 2] = start, end
        row[W.D_MEMLOCK] = _NONE
        for name, value in words.items():
            row[int(getattr(W, name))] = value
        row[W.D_KIND] = kind
        self._closed = False
        self.table = DomainTable(self, formats)

    def _word(self, word: np.uint64) -> int:
        if self._closed:  # the row may be another one's by now
            return 0
        return int(self.machine.arrays.state[int(W.STATE_DOMAINS) + self.number * W.D_WORDS + int(word)])

    def _arrange(self, what: int) -> int:
        from pgemu_kernels.words.requests import CLOSE_DOMAIN

        if self._closed:
            return -W.EBADF
        status = self.machine._call_devices(what, self.number)
        self._closed = what == CLOSE_DOMAIN and status == 0
        return status

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"{type(self).__name__}(number={self.number}, {self.unit!r}, mappings={self.mappings}{closed})"

    @property
    def mappings(self) -> int:
        """How many mappings, or areas, it has."""
        return self._word(W.D_COUNT)

    @property
    def devices(self) -> int:
        """How many devices are attached; they share one domain and one root."""
        return self._word(W.D_DEVICES)

    @property
    def root(self) -> int:
        """Physical address of the I/O page table's root; 0 without a device."""
        return self._word(W.D_ROOT)

    def attach(self) -> IoDevice:
        """Attach a device: the first one brings the domain, and what is mapped is pinned and entered then.

        OSError: ENOMEM, or EFAULT where memory is gone that was mapped before.

        >>> type(space.attach()).__name__, space.devices
        ('IoDevice', 2)
        """
        from pgemu_kernels.words.requests import ATTACH

        status = self._arrange(ATTACH)
        if status:
            raise OSError(-status, f"attaching a device to {self!r}")
        if self.table not in self.machine.tables_made:  # without a root it is none of the machine's
            self.machine.tables_made.append(self.table)
        return IoDevice(self)

    def ranges(self) -> tuple[Range, ...]:
        """Usable I/O addresses: VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, IOMMU_IOAS_IOVA_RANGES; none once closed.

        >>> space.ranges()
        (Range(0x0, 0xfedfffff), Range(0xfef00000, 0xffffffffffff))
        """
        if self._closed:
            return ()
        last = self._word(W.D_LAST)
        found, start = [], 0
        for i in range(2):
            hole, end = (self._word(np.uint64(int(W.D_HOLES) + 2 * i + k)) for k in range(2))
            if end:
                found.append(Range(start, hole - 1))
                start = end
        return (*found, Range(start, last))

    def unmap(self, iova: int, size: int) -> Result:
        """Unmap [iova, iova + size): 0 with the bytes that went. VFIO_IOMMU_UNMAP_DMA, IOMMU_IOAS_UNMAP.

        type1: -EINVAL for what is not aligned or empty, or would cut a mapping at either end; a hole is 0. Version 1
        removes whole what begins at iova, else nothing. iommufd: -ENOENT where an area would be cut, or nothing is
        there; -EINVAL, -EOVERFLOW.

        >>> space.unmap(0x10000, 8192)
        Result(status=0, detail=8192)
        """
        return self._operate(Operation.DMA_UNMAP, address=iova, length=size)

    def unmap_all(self) -> Result:
        """Unmap everything: 0 with the bytes that went.

        >>> space.unmap_all()
        Result(status=0, detail=8192)
        """
        return self._operate(Operation.DMA_UNMAP, length=_NONE)

    def _operate(self, op: Operation, **columns: int) -> Result:
        return self.machine.operate(op, space=W.DOMAINS if self._closed else self.number, **columns)

    def _map(self, process: AddressSpace, iova: int, size: int, start: int, flags: int, inode: int) -> Result:
        return self._operate(
            Operation.DMA_MAP, flags=flags, vm=process.number, address=iova, length=size, offset=start, object_=inode
        )


def rights_of(read: bool, write: bool) -> int:
    return (Flag.READ if read else 0) | (Flag.WRITE if write else 0)


class IoDevice(OfMachine, but=("__init__",)):
    """A device that is attached to an address space, and reads and writes memory through it.

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> process, container = machine.create_process(), machine.create_vfio_container()
    >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
    'ok'
    >>> device = container.attach()
    >>> container.map(0, 8192, process, 0x80_0000).name
    'ok'
    """

    machine: Core

    def __init__(self, space: IoSpace) -> None:
        if not isinstance(space, IoSpace):
            raise TypeError(f"space {shown(space)} ({type(space).__name__}): expected an address space of devices")
        self.machine = space.machine
        self._space: IoSpace | None = space

    def __repr__(self) -> str:
        return f"IoDevice({self._space or 'detached'})"

    def detach(self) -> None:
        """Detach it: the last one takes the domain along, and the pins. ValueError if it is not attached.

        >>> device.detach()
        >>> container.devices
        0
        """
        from pgemu_kernels.words.requests import DETACH

        space, self._space = self._attached(), None
        space._arrange(DETACH)

    def _attached(self) -> IoSpace:
        if self._space is None:
            raise ValueError("the device was detached: expected one that is attached")
        return self._space

    def access(self, iova: int, length: int = 8, *, write: bool = False) -> Result:
        """One access: 0 with the physical address, or -EFAULT (the unit refuses) with the bytes that came before.

        >>> device.access(0x1000, write=True).name, device.access(0x9000).name
        ('ok', '-EFAULT')
        """
        flags = Flag.WRITE if write else 0
        return self._attached()._operate(Operation.DMA_ACCESS, flags=flags, address=iova, length=length)

    def access_many(self, iovas: Integers, length: int = 8, *, write: bool = False, value: int = 0) -> Results:
        """access() of `length` bytes at each of `iovas` (uint64[n]). value: the word that writes store, if not 0.

        >>> device.access_many([0, 0x1000, 0x9000]).names
        ['ok', 'ok', '-EFAULT']
        """
        space = self._attached()
        header = np.uint64(Operation.DMA_ACCESS | (Flag.WRITE if write else 0) << 8 | space.number << 48)
        return self.machine.run_columns(header, 0, iovas, value, length, count=len(iovas))

    def read(self, iova: int, length: int) -> bytes:
        """The bytes that a device reads. OSError EFAULT where the unit refuses.

        >>> device.write(0x10, b"hello")
        >>> device.read(0x10, 5)
        b'hello'
        """
        return b"".join(
            self._page(physical >> 12)[physical & 4095 : (physical & 4095) + size]
            for physical, size in self._pieces(iova, length, False)
        )

    def write(self, iova: int, data: bytes) -> None:
        """Write bytes into the frames that the I/O entries name, whoever has them by now. OSError EFAULT, ENOMEM.

        >>> device.write(0xFFC, b"over two pages")
        >>> device.read(0x1000, 3)
        b' tw'
        """
        done = 0
        for physical, size in self._pieces(iova, len(data), True):
            self._store(physical, data[done : done + size])
            done += size

    def _pieces(self, iova: int, length: int, write: bool) -> list[tuple[int, int]]:
        found, at = [], iova
        while at < iova + length:
            size = min(iova + length, (at | 4095) + 1) - at
            status, physical = self.access(at, size, write=write)
            if status:
                raise OSError(-status, f"a device's {'write' if write else 'read'} at {at:#x}")
            found.append((physical, size))
            at += size
        return found

    def _is_small(self, pfn: int) -> bool:
        return pfn < self.machine.arrays.ram.size // 512

    def _page(self, pfn: int) -> bytes:
        if self._is_small(pfn):
            return self.machine.arrays.ram[pfn * 512 : (pfn + 1) * 512].tobytes()
        return self.machine.read_frame(pfn)

    def _store(self, physical: int, data: bytes) -> None:
        pfn, offset = physical >> 12, physical & 4095
        if self._is_small(pfn):
            words = self.machine.arrays.ram[pfn * 512 : (pfn + 1) * 512].view(np.uint8)
            words[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        else:
            self.machine.write_frame(pfn, data, offset)
