"""What is created on a machine: inodes, processes, VMs, page tables, containers of devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pgemu.machine.results import Result
from pgemu.machine.vm_kinds import KINDS, Kind
from pgemu.objects.devices import Policy, Unit
from pgemu.objects.files import MemoryType
from pgemu.objects.guest_memfd import Form
from pgemu.objects.shared import Shareable
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import PageFormat
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.devices import Iommufd, VfioContainer
    from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.vm import Vm
    from pgemu.tables.page_table import PageTable

__all__ = ("Creating",)


class Creating(Shareable):
    """A machine, as far as something is created on it."""

    def create_guest_memfd(
        self, size: int, *, shared: bool = False, flags: int | None = None, form: Form = "main", page_order: int = 0
    ) -> GuestMemfd:
        """Create a guest_memfd inode over the machine's guest memory, all private or (`shared`) all shared.

        flags: those of KVM_CREATE_GUEST_MEMFD instead, guest_memfd.CreateFlags or (form "rfc2") Rfc2Flags; without
        them the file can be mapped. form: whose checks of creation, mmap and bind: "main", "next" (linux-next: bind is
        prepared, then committed), "rfc2" (May 2025), "wip" (December 2025, with `page_order`). In "main" and "next",
        which know no huge pages, the machine's are used all the same.
        OSError: EINVAL as guest_memfd.check_creation() tells, ENOMEM when the pool cannot reserve the huge pages,
        ENOSPC past words.INODES inodes. ValueError for another form, or huge pages other than the machine's.

        >>> machine.create_guest_memfd(4 << 20, shared=True).is_shared(0)
        True
        """
        from pgemu.objects.guest_memfd import GuestMemfd

        return GuestMemfd.create(self, size, shared, flags, form, page_order)

    def set_mempolicy(self, mode: str | int, nodes: Iterable[int] = ()) -> Result:
        """set_mempolicy() of the tasks that fault memory in, where the inode has no policy; see GuestMemfd.mbind.

        >>> machine.set_mempolicy("bind", [0]).name
        'ok'
        """
        from pgemu.objects.guest_memfd import node_mask, policy_mode

        return self.operate(
            Operation.MEMORY_POLICY, flags=policy_mode(mode), object_=int(W.NO_INODE), address=node_mask(nodes)
        )

    def create_hugetlb_file(self, size: int, page_size: int = W.PAGE_2M) -> HugetlbFile:
        """Create a file of hugetlbfs with pages of 2 MiB or 1 GiB, all absent.

        ValueError for another page size; OSError: EINVAL for a size that is no positive multiple of it, ENOSPC.

        >>> machine.create_hugetlb_file(2 << 20).page_size
        2097152
        """
        from pgemu.objects.files import HugetlbFile

        return HugetlbFile.create(self, size, page_size)

    def create_device(
        self, pfn: int, pages: int, *, remap: bool = False, memory_type: MemoryType = "uncached-minus"
    ) -> Device:
        """Create a device's region of `pages` 4K frames from `pfn` on, without struct pages.

        remap: its mmap enters everything at once (remap_pfn_range()), else pages come at their fault.
        memory_type: "write-back", "write-combining", "uncached-minus" or "uncached".
        ValueError for another memory type or a region beyond 2^52; OSError ENOSPC. From pfn 1 << 30 on no memory lies.

        >>> machine.create_device(0x1000, 16).size
        65536
        """
        from pgemu.objects.files import Device

        return Device.create(self, pfn, pages, remap, memory_type)

    def create_vfio_container(
        self, unit: Unit = "vtd", *, version: Literal[1, 2] = 2, dma_entry_limit: int = 65535,
        memlock: int | None = None, policy: Policy = "linux", **parameters: Any,
    ) -> VfioContainer:  # fmt: skip
        """Create a container of VFIO type1 (version 2: VFIO_TYPE1v2_IOMMU), to which devices of one IOMMU attach.

        unit: "vtd" (second stage) or "amd" (version 1 tables), by the machine's kernel; parameters: of its format (see
        create_page_table). dma_entry_limit: of the module, when the container is made. memlock: RLIMIT_MEMLOCK in
        bytes, None with CAP_IPC_LOCK. policy: what becomes of RAM under VM_PFNMAP: "linux" refuses it (-EFAULT),
        "naive" is that check removed, so that an unmap unpins what was never pinned, "tracked" accepts it without a
        reference and remembers whose it is: a map of more than one file, or of other memory beside, is -EFAULT.
        OSError ENOMEM past words.DOMAINS of them.

        >>> machine.create_vfio_container("amd", memlock=1 << 20).info().ranges
        (Range(0x0, 0xfedfffff), Range(0xfef00000, 0xfcffffffff), Range(0x10000000000, 0xffffffffffff))
        """
        from pgemu.objects.devices import VfioContainer

        return VfioContainer(self, unit, version, dma_entry_limit, memlock, policy, **parameters)

    def create_iommufd(self) -> Iommufd:
        """Open /dev/iommu: create_ioas() of it makes address spaces.

        >>> machine.create_iommufd().create_ioas()
        Ioas(number=0, 'vtd', mappings=0)
        """
        from pgemu.objects.devices import Iommufd

        return Iommufd(self)

    def create_guest_memfd_4k(self, size: int, *, mmap: bool = True, init_shared: bool = True) -> GuestMemfd4K:
        """Create a guest_memfd as merged in Linux 6.8, of 4K folios; the flags are those of 6.18.

        mmap: GUEST_MEMFD_FLAG_MMAP. init_shared: GUEST_MEMFD_FLAG_INIT_SHARED, without which host faults end in
        SIGBUS; before 6.18 there are none. OSError: EINVAL for a size that is no positive multiple of 4096 or for a
        flag that the kernel lacks, ENOSPC.

        >>> machine.create_guest_memfd_4k(1 << 20).allocate(0, 4096).name
        'ok'
        """
        from pgemu.objects.files import GuestMemfd4K

        return GuestMemfd4K.create(self, size, mmap, init_shared)

    def create_memfd(self, size: int) -> ShmemFile:
        """memfd_create(): a file of shmem with 4K folios, all absent. OSError: EINVAL for no size, ENOSPC.

        >>> machine.create_memfd(1 << 20).size
        1048576
        """
        from pgemu.objects.files import ShmemFile

        return ShmemFile.create(self, size)

    def create_process(self) -> AddressSpace:
        """Create a process: an empty page table. OSError ENOMEM or ENOSPC.

        >>> process = machine.create_process()
        >>> process.mmap_anonymous(0x40_0000, 4096).name, process.touch(0x40_0000, write=True).name
        ('ok', 'VM_FAULT_NOPAGE')
        """
        from pgemu.objects.address_space import AddressSpace

        return AddressSpace.create(self)

    def create_vm(
        self, process: AddressSpace | None = None, *, kind: Kind | None = None, protected: bool | None = None
    ) -> Vm:
        """Create a VM of a process.

        kind: "plain", "sw", "snp" or "tdx" (pgemu.machine.vm_kinds); without it, what Config.vm says. protected:
        whether it is to have private memory: True is Config.vm if that has, else "sw"; False is "plain". OSError
        ENOMEM or ENOSPC; ValueError for both, or where kind and stage 2 disagree.

        >>> machine.create_vm(kind="snp"), machine.create_vm(protected=False)
        (Vm(vm=1), Vm(vm=2))
        """
        from pgemu.objects.vm import Vm

        if kind is not None and protected is not None:
            raise ValueError(f"kind {kind!r} and protected {protected}: expected one of them, or none")
        if kind is None:
            kind = self.config.vm
        if protected is not None and protected != KINDS[kind].private:
            kind = "sw" if protected else "plain"
        return Vm.create(self, process, kind)

    def create_page_table(self, fmt: PageFormat | str, **parameters: Any) -> PageTable:
        """Create an empty page table of a format, or of the format of a name (page_format.FORMATS) and its parameters.

        OSError ENOMEM. ValueError for another name or parameter, or past words.FORMATS formats.

        >>> machine.create_page_table("ept").map(0x1000, 0x2000)
        EditResult(status=0, detail=1, flush=None, records=0)
        >>> machine.create_page_table("arm64-s2", ipa_bits=48).format.levels
        4
        """
        from pgemu.tables.page_table import PageTable

        return PageTable.create(self, fmt, **parameters)
