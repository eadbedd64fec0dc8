"""Devices behind an IOMMU: what they may reach (a VFIO container, an IOAS of iommufd), and what they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.arrays import Integers
from pgemu.machine.field_rules import shown
from pgemu.machine.results import Result, Results
from pgemu.tables.formats import format_of
from pgemu.tables.page_table import PageTable
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile
    from pgemu.objects.guest_memfd import GuestMemfd

__all__ = (
    "Accounts",
    "ContainerInfo",
    "IoDevice",
    "IoSpace",
    "Ioas",
    "Iommufd",
    "Policy",
    "Range",
    "Revocations",
    "Unit",
    "Unmaps",
    "VfioContainer",
)

Unit = Literal["vtd", "amd"]
Policy = Literal["linux", "naive", "tracked"]
Unmaps = Literal["refused", "none", "notifier", "revoke", "mirror"]
_POLICIES = {"linux": W.POLICY_LINUX, "naive": W.POLICY_NAIVE, "tracked": W.POLICY_TRACKED}
_UNMAPS = {
    "refused": W.POLICY_LINUX, "none": W.POLICY_NONE, "notifier": W.POLICY_NOTIFIER, "revoke": W.POLICY_REVOKE,
    "mirror": W.POLICY_MIRROR,
}  # fmt: skip
_NONE = (1 << 64) - 1
_OLD = ("6.1", "6.12")
_FORMATS = {"vtd": "vtd-s2", "amd": "amd-v1"}
INTERRUPTS = 0xFEE0_0000, 0xFEF0_0000  # where a write is an interrupt: reserved by both units
HYPERTRANSPORT = 0xFD_0000_0000, 0x100_0000_0000  # drivers/iommu/amd/iommu.c:amd_iommu_get_resv_regions()


class Range(NamedTuple):
    """I/O addresses [start, last], bytes."""

    start: int
    last: int

    def __repr__(self) -> str:
        return f"Range({self.start:#x}, {self.last:#x})"


class ContainerInfo(NamedTuple):
    """VFIO_IOMMU_GET_INFO: page_sizes is a bitmap, available how many mappings more there may be, ranges the usable
    addresses."""

    page_sizes: int
    available: int
    ranges: tuple[Range, ...]

    def __repr__(self) -> str:
        ranges = ", ".join(map(repr, self.ranges))
        return f"ContainerInfo(page_sizes={self.page_sizes:#x}, available={self.available}, ranges=({ranges}))"


class Accounts(NamedTuple):
    """Pages of a process that devices have: locked by VFIO (of VmLck: mm->locked_vm), pinned by iommufd (VmPin)."""

    locked: int
    pinned: int

    @classmethod
    def of(cls, process: AddressSpace) -> Accounts:
        """Those of a process."""
        row = int(W.STATE_SPACES) + process.space * W.S_WORDS
        state = process.machine.arrays.state
        return cls(*(int(state[row + int(word)]) for word in (W.S_LOCKED_VM, W.S_PINNED_VM)))


class Revocations(NamedTuple):
    """What conversions and holes did to I/O entries over guest_memfd, 4K pages: see Iommufd.create_ioas().

    revoked: unmapped; widened: of them, pages that stay the device's, under a large entry that went whole; returned:
    entered by the kernel, again or because they became shared; lost: to be entered without memory for a table. cut,
    joined: large entries cut, and put together. windows: how often a device faulted meanwhile on pages that it had
    before and after, window_ns: low and high end of how long they were together.
    """

    revoked: int
    widened: int
    returned: int
    lost: int
    cut: int
    joined: int
    windows: int
    window_ns: tuple[float, float]


class _Unit(NamedTuple):
    """What a unit takes: its last address, and what is reserved."""

    last: int
    holes: tuple[tuple[int, int], ...]


def _unit(unit: Unit, kernel: str) -> _Unit:
    """As captured; AMD's of 6.12 and before have no end."""
    if unit == "vtd":
        return _Unit((1 << 48) - 1, (INTERRUPTS,))
    return _Unit(_NONE if kernel in _OLD else (1 << 48) - 1, (INTERRUPTS, HYPERTRANSPORT))


class _Table(PageTable, but=("__init__",)):
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
        from pgemu.tables.formats import add_formats

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
        self.table = _Table(self, formats)

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
        """
        from pgemu_kernels.words.requests import ATTACH

        status = self._arrange(ATTACH)
        if status:
            raise OSError(-status, f"attaching a device to {self!r}")
        if self.table not in self.machine.tables_made:  # without a root it is none of the machine's
            self.machine.tables_made.append(self.table)
        return IoDevice(self)

    def ranges(self) -> tuple[Range, ...]:
        """Usable I/O addresses: VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, IOMMU_IOAS_IOVA_RANGES; none once closed."""
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
        """
        return self._operate(Operation.DMA_UNMAP, address=iova, length=size)

    def unmap_all(self) -> Result:
        """Unmap everything: 0 with the bytes that went."""
        return self._operate(Operation.DMA_UNMAP, length=_NONE)

    def _operate(self, op: Operation, **columns: int) -> Result:
        return self.machine.operate(op, space=W.DOMAINS if self._closed else self.number, **columns)

    def _map(self, process: AddressSpace, iova: int, size: int, start: int, flags: int, inode: int) -> Result:
        return self._operate(
            Operation.DMA_MAP, flags=flags, vm=process.number, address=iova, length=size, offset=start, object_=inode
        )


def _rights(read: bool, write: bool) -> int:
    return (Flag.READ if read else 0) | (Flag.WRITE if write else 0)


class VfioContainer(IoSpace):
    """A container of VFIO type1. drivers/vfio/vfio_iommu_type1.c. Made by Machine.create_vfio_container()."""

    def __init__(
        self, machine: Core, unit: Unit, version: Literal[1, 2], limit: int, memlock: int | None, policy: Policy,
        **parameters: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            machine, unit, int(W.DOMAIN_TYPE1 if version == 1 else W.DOMAIN_TYPE1V2), parameters, D_LIMIT=limit,
            D_MEMLOCK=_NONE if memlock is None else memlock >> 12, D_POLICY=int(_POLICIES[policy]),
            D_WRAP_ERROR=W.EINVAL if machine.config.kernel in _OLD else W.EOVERFLOW,
            D_TRIAL=machine.config.kernel in _OLD,
        )  # fmt: skip

    def map(
        self, iova: int, size: int, process: AddressSpace, vaddr: int, *, read: bool = True, write: bool = True
    ) -> Result:
        """VFIO_IOMMU_MAP_DMA: pin a process's memory (VmLck) and enter it. 0, or -errno with nothing changed.

        -EINVAL: iova, vaddr or size not a multiple of 4096, no size, no rights, beyond the unit or reserved;
        -EOVERFLOW (6.12: -EINVAL): it wraps; -EEXIST: over a mapping; -ENOSPC: dma_entry_limit; -EFAULT: no memory
        there, none that may be written, or RAM under VM_PFNMAP; -ENOMEM, also above the mlock limit.
        """
        return self._map(process, iova, size, vaddr, _rights(read, write), int(W.NO_INODE))

    def map_many(
        self,
        iovas: Integers,
        size: int,
        process: AddressSpace,
        vaddrs: Integers,
        *,
        read: bool = True,
        write: bool = True,
    ) -> Results:
        """map() of `size` bytes at each of `iovas` (uint64[n]) from `vaddrs` (uint64[n])."""
        if len(vaddrs) not in (1, len(iovas)):
            raise ValueError(f"vaddrs of {len(vaddrs)} elements: expected {len(iovas)} or 1, as of iovas")
        flags = _rights(read, write)
        header = np.uint64(Operation.DMA_MAP | flags << 8 | process.number << 32 | self.number << 48)
        return self.machine.run_columns(header, W.NO_INODE, iovas, vaddrs, size, count=len(iovas))

    def info(self) -> ContainerInfo:
        """VFIO_IOMMU_GET_INFO."""
        available = max(self._word(W.D_LIMIT) - self.mappings, 0)
        return ContainerInfo(self.table.format.page_sizes, available, self.ranges())

    def close(self) -> None:
        """The last descriptor goes: every mapping is unmapped and unpinned, the domain is freed."""
        from pgemu_kernels.words.requests import CLOSE_DOMAIN

        self._arrange(CLOSE_DOMAIN)


class Ioas(IoSpace):
    """An IOAS of iommufd: memory is pinned (VmPin) while a device is attached. Made by Machine.create_iommufd().

    drivers/iommu/iommufd/ioas.c. Addresses are whole pages, also without a device.

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> process, ioas = machine.create_process(), machine.create_iommufd().create_ioas()
    >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
    'ok'
    >>> device = ioas.attach()
    >>> ioas.map(0x10000, 8192, process, 0x80_0000).name
    'ok'
    """

    def __init__(self, machine: Core, unit: Unit, guest_memfd: Unmaps, **parameters: Any) -> None:
        if guest_memfd not in _UNMAPS:
            raise ValueError(f"guest_memfd {guest_memfd!r}: expected one of {', '.join(_UNMAPS)}")
        from pgemu_kernels.engine.handle import TELL_DEVICES
        from pgemu_kernels.run.entries import tell_devices

        machine.descriptor[TELL_DEVICES] = tell_devices.address()
        super().__init__(
            machine, unit, int(W.DOMAIN_IOAS), parameters, D_POLICY=int(_UNMAPS[guest_memfd]),
            D_TAKES_DMABUF=machine.config.kernel not in (*_OLD, "6.18"),
        )  # fmt: skip

    def map(
        self, iova: int | None, size: int, process: AddressSpace, vaddr: int, *, read: bool = True, write: bool = True
    ) -> Result:
        """IOMMU_IOAS_MAP: 0 with the address; iova None: the lowest free one that is aligned as the memory is.

        -EINVAL, -EEXIST, -EOVERFLOW, -ENOSPC, -ENOMEM; -EFAULT where a device is attached and memory cannot be pinned.
        """
        return self._place(process, iova, size, vaddr, _rights(read, write), int(W.NO_INODE))

    def map_file(
        self, iova: int | None, size: int, process: AddressSpace,
        file: GuestMemfd | GuestMemfd4K | HugetlbFile | ShmemFile | Device, offset: int, *, read: bool = True,
        write: bool = True,
    ) -> Result:  # fmt: skip
        """IOMMU_IOAS_MAP_FILE of shmem or hugetlbfs: as map(); -EINVAL for others (a guest_memfd), and past its end.

        A device's memory (kernel 7.3) is its dma-buf: no pins, -ENODEV while it is revoked; Device.revoke() takes it
        from every domain, for good: restore() brings no entry back, user space unmaps and maps again. A guest_memfd of
        the designs where create_ioas() says so: what is backed and shared, without pins or accounts.
        """
        return self._place(process, iova, size, offset, _rights(read, write), file.inode)

    def copy(
        self, iova: int | None, size: int, source: Ioas, source_iova: int, *, read: bool = True, write: bool = True
    ) -> Result:
        """IOMMU_IOAS_COPY: the same pages here, too, which are pinned once. 0 with the address.

        -ENOENT where the source's areas do not cover the range, -EPERM to write what was mapped to be read, and as map.
        """
        flags = _rights(read, write) | Flag.COPY | (Flag.IOVA_ANY if iova is None else 0)
        return self._operate(
            Operation.DMA_MAP, flags=flags, address=iova or 0, length=size, object_=source.number, offset=source_iova
        )

    @property
    def revocations(self) -> Revocations:
        """What conversions and holes of guest_memfd did to its entries so far."""
        names = ("REVOKED", "WIDENED", "RETURNED", "LOST", "CUT", "JOINED", "WINDOWS", "WINDOW_LOW", "WINDOW_HIGH")
        *counts, low, high = (self._word(getattr(W, f"D_{name}")) for name in names)
        return Revocations._make((*counts, (low / 1000, high / 1000)))

    def _place(self, process: AddressSpace, iova: int | None, size: int, start: int, flags: int, inode: int) -> Result:
        return self._map(process, iova or 0, size, start, flags | (Flag.IOVA_ANY if iova is None else 0), inode)

    def destroy(self) -> Result:
        """IOMMU_DESTROY: 0, or -EBUSY with a device attached."""
        from pgemu_kernels.words.requests import CLOSE_DOMAIN

        return Result(self._arrange(CLOSE_DOMAIN), 0)


class Iommufd(OfMachine):
    """/dev/iommu: a file of which address spaces are made. Made by Machine.create_iommufd()."""

    machine: Core

    def __init__(self, machine: Core) -> None:
        self.machine = machine

    def __repr__(self) -> str:
        return "Iommufd()"

    def create_ioas(self, unit: Unit = "vtd", *, guest_memfd: Unmaps = "refused", **parameters: Any) -> Ioas:
        """IOMMU_IOAS_ALLOC: an address space for devices of one unit; parameters: of the unit's format.

        guest_memfd: whether map_file() takes a guest_memfd of the designs, and who unmaps it from devices when pages
        are converted to private, or go with a hole or their file. "refused": Linux. What-ifs, all without references:
        "none": nobody but user space. "notifier": the kernel unmaps what goes, with all of a large I/O entry that it is
        a part of. "revoke": and enters again at the end what of it is still backed and shared, and what became shared
        (iommufd with revocable providers, RFCs of 2026). "mirror": the same, but large entries are cut first, so that
        nothing else goes, and put together again where all of one is shared (asked for in 2026, posted for no
        guest_memfd).
        What is entered is zeroed before, unless it was used: an inference, as whoever hands pages out has to.
        One flush for each address space and operation. Ioas.revocations counts.
        OSError ENOMEM past words.DOMAINS of them. ValueError for another word.
        """
        return Ioas(self.machine, unit, guest_memfd, **parameters)


class IoDevice(OfMachine, but=("__init__",)):
    """A device that is attached to an address space, and reads and writes memory through it."""

    machine: Core

    def __init__(self, space: IoSpace) -> None:
        if not isinstance(space, IoSpace):
            raise TypeError(f"space {shown(space)} ({type(space).__name__}): expected an address space of devices")
        self.machine = space.machine
        self._space: IoSpace | None = space

    def __repr__(self) -> str:
        return f"IoDevice({self._space or 'detached'})"

    def detach(self) -> None:
        """Detach it: the last one takes the domain along, and the pins. ValueError if it is not attached."""
        from pgemu_kernels.words.requests import DETACH

        space, self._space = self._attached(), None
        space._arrange(DETACH)

    def _attached(self) -> IoSpace:
        if self._space is None:
            raise ValueError("the device was detached: expected one that is attached")
        return self._space

    def access(self, iova: int, length: int = 8, *, write: bool = False) -> Result:
        """One access: 0 with the physical address, or -EFAULT (the unit refuses) with the bytes that came before."""
        flags = Flag.WRITE if write else 0
        return self._attached()._operate(Operation.DMA_ACCESS, flags=flags, address=iova, length=length)

    def access_many(self, iovas: Integers, length: int = 8, *, write: bool = False, value: int = 0) -> Results:
        """access() of `length` bytes at each of `iovas` (uint64[n]). value: the word that writes store, if not 0."""
        space = self._attached()
        header = np.uint64(Operation.DMA_ACCESS | (Flag.WRITE if write else 0) << 8 | space.number << 48)
        return self.machine.run_columns(header, 0, iovas, value, length, count=len(iovas))

    def read(self, iova: int, length: int) -> bytes:
        """The bytes that a device reads. OSError EFAULT where the unit refuses."""
        return b"".join(
            self._page(physical >> 12)[physical & 4095 : (physical & 4095) + size]
            for physical, size in self._pieces(iova, length, False)
        )

    def write(self, iova: int, data: bytes) -> None:
        """Write bytes into the frames that the I/O entries name, whoever has them by now. OSError EFAULT, ENOMEM."""
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
