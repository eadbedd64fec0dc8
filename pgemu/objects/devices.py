"""Devices behind an IOMMU: what they may reach (a VFIO container, an IOAS of iommufd), and what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.arrays import Integers
from pgemu.machine.results import Result, Results
from pgemu.objects.device_values import (
    Accounts as Accounts,
    ContainerInfo as ContainerInfo,
    Range as Range,
    Revocations as Revocations,
)
from pgemu.objects.io_space import IoSpace as IoSpace, Unit as Unit, rights_of
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


class VfioContainer(IoSpace):
    """A container of VFIO type1. drivers/vfio/vfio_iommu_type1.c. Made by Machine.create_vfio_container().

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> process, container = machine.create_process(), machine.create_vfio_container()
    >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
    'ok'
    >>> device = container.attach()
    >>> container.map(0x10000, 8192, process, 0x80_0000).name
    'ok'
    >>> space = container
    """

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

        >>> container.map(1 << 20, 4096, process, 0x80_0000), container.map(0x10000, 4096, process, 0x80_0000).name
        (Result(status=0, detail=0), '-EEXIST')
        """
        return self._map(process, iova, size, vaddr, rights_of(read, write), int(W.NO_INODE))

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
        """map() of `size` bytes at each of `iovas` (uint64[n]) from `vaddrs` (uint64[n]).

        >>> container.map_many([1 << 20, 2 << 20], 4096, process, [0x80_0000, 0x80_1000]).names
        ['ok', 'ok']
        """
        if len(vaddrs) not in (1, len(iovas)):
            raise ValueError(f"vaddrs of {len(vaddrs)} elements: expected {len(iovas)} or 1, as of iovas")
        flags = rights_of(read, write)
        header = np.uint64(Operation.DMA_MAP | flags << 8 | process.number << 32 | self.number << 48)
        return self.machine.run_columns(header, W.NO_INODE, iovas, vaddrs, size, count=len(iovas))

    def info(self) -> ContainerInfo:
        """VFIO_IOMMU_GET_INFO.

        >>> container.info().available
        65534
        """
        available = max(self._word(W.D_LIMIT) - self.mappings, 0)
        return ContainerInfo(self.table.format.page_sizes, available, self.ranges())

    def close(self) -> None:
        """The last descriptor goes: every mapping is unmapped and unpinned, the domain is freed.

        >>> container.close(), container.unmap(0x10000, 8192).name
        (None, '-ENODEV')
        """
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
    >>> space = ioas
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

        >>> hex(ioas.map(None, 4096, process, 0x80_2000).detail)
        '0x1000'
        """
        return self._place(process, iova, size, vaddr, rights_of(read, write), int(W.NO_INODE))

    def map_file(
        self, iova: int | None, size: int, process: AddressSpace,
        file: GuestMemfd | GuestMemfd4K | HugetlbFile | ShmemFile | Device, offset: int, *, read: bool = True,
        write: bool = True,
    ) -> Result:  # fmt: skip
        """IOMMU_IOAS_MAP_FILE of shmem or hugetlbfs: as map(); -EINVAL for others (a guest_memfd), and past its end.

        A device's memory (kernel 7.3) is its dma-buf: no pins, -ENODEV while it is revoked; Device.revoke() takes it
        from every domain, for good: restore() brings no entry back, user space unmaps and maps again. A guest_memfd of
        the designs where create_ioas() says so: what is backed and shared, without pins or accounts.

        >>> ioas.map_file(0x4000_0000, 4096, process, machine.create_memfd(1 << 20), 0).name
        'ok'
        """
        return self._place(process, iova, size, offset, rights_of(read, write), file.inode)

    def copy(
        self, iova: int | None, size: int, source: Ioas, source_iova: int, *, read: bool = True, write: bool = True
    ) -> Result:
        """IOMMU_IOAS_COPY: the same pages here, too, which are pinned once. 0 with the address.

        -ENOENT where the source's areas do not cover the range, -EPERM to write what was mapped to be read, and as map.

        >>> ioas.copy(0x4000_0000, 4096, ioas, 0x10000).name
        'ok'
        """
        flags = rights_of(read, write) | Flag.COPY | (Flag.IOVA_ANY if iova is None else 0)
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
        """IOMMU_DESTROY: 0, or -EBUSY with a device attached.

        >>> ioas.destroy().name, device.detach(), ioas.destroy().name
        ('-EBUSY', None, 'ok')
        """
        from pgemu_kernels.words.requests import CLOSE_DOMAIN

        return Result(self._arrange(CLOSE_DOMAIN), 0)


class Iommufd(OfMachine):
    """/dev/iommu: a file of which address spaces are made. Made by Machine.create_iommufd().

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> iommufd = machine.create_iommufd()
    """

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

        >>> iommufd.create_ioas("amd").mappings
        0
        """
        return Ioas(self.machine, unit, guest_memfd, **parameters)
