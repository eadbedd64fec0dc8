"""What a process maps, changes and unmaps: mmap(), munmap(), mprotect(), mlock(), mremap(). mm/mmap.c, mm/vma.c"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu.objects.advice import Advice
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.machine.results import Result
    from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile

__all__ = ("PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "Mappings")

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
_READ_WRITE = PROT_READ | PROT_WRITE
_MOST_BYTES = (1 << 63) - W.PAGE_1G  # of a file, rounded up: include/linux/fs.h:MAX_LFS_FILESIZE
_PROTECTIONS = {PROT_READ: Flag.READ, PROT_WRITE: Flag.WRITE, PROT_EXEC: Flag.EXEC}


def _protection(prot: int) -> int:
    """Flags of a record for PROT_* bits."""
    return sum(flag for bit, flag in _PROTECTIONS.items() if prot & bit)


class Mappings(Advice):
    """The mappings of whatever has memory: a process."""

    machine: Core

    def _mmap(
        self, inode: int, address: int, offset: int, length: int, prot: int, *,
        shared: bool, populate: bool, locked: bool, noreserve: bool,
    ) -> Result:  # fmt: skip
        flags = _protection(prot) | (Flag.SHARED if shared else Flag.PRIVATE)
        flags |= Flag.POPULATE if populate else 0
        flags |= (Flag.LOCKED if locked else 0) | (Flag.NORESERVE if noreserve else 0)
        self.machine.arrays.state[W.R_ORDINARY] = 1
        return self._operate(Operation.MMAP, address, length, flags, object_=inode, offset=offset)

    def mmap_anonymous(
        self, address: int, length: int, prot: int = _READ_WRITE, *,
        shared: bool = False, populate: bool = False, locked: bool = False, noreserve: bool = False,
    ) -> Result:  # fmt: skip
        """mmap(MAP_PRIVATE | MAP_ANONYMOUS), whose faults get huge pages by Config.thp. mm/mmap.c:do_mmap().

        shared: MAP_SHARED, which maps a file of shmem of its own; OSError ENOSPC past words.INODES.

        0; -EINVAL for an unaligned address or no length, -EEXIST over another mapping, -ENOMEM beyond
        2^47 - 4096 or past words.VMAS mappings. populate, locked: MAP_POPULATE, MAP_LOCKED, whose faults may
        fail unseen.

        >>> process.mmap_anonymous(0x100_0000, 8192, populate=True).name, process.touch(0x100_1000).name
        ('ok', 'present')
        """
        options = {"populate": populate, "locked": locked, "noreserve": noreserve}
        if not shared or not 0 < length <= _MOST_BYTES:
            return self._mmap(int(W.NO_INODE), address, 0, length, prot, shared=False, **options)
        from pgemu.objects.files import ShmemFile

        own = ShmemFile.create(self.machine, -(-length // W.PAGE_4K) * W.PAGE_4K)
        result = self._mmap(own.inode, address, 0, length, prot, shared=True, **options)
        own.close()
        return result

    def mmap_hugetlb(
        self, address: int, length: int | None = None, prot: int = _READ_WRITE, *, file: HugetlbFile | None = None,
        page_size: int = W.PAGE_2M, offset: int = 0, shared: bool = True,
        populate: bool = False, locked: bool = False, noreserve: bool = False,
    ) -> Result:  # fmt: skip
        """Map a hugetlbfs file, or without one MAP_ANONYMOUS | MAP_HUGETLB memory of `page_size`.

        The length is rounded up to huge pages; None is the rest of the file. 0; -EINVAL for an address or offset
        that is not aligned to them, -EEXIST, -ENOMEM where the pool cannot reserve the pages (not asked with
        noreserve). mm/mmap.c:ksys_mmap_pgoff(), fs/hugetlbfs/inode.c:hugetlbfs_file_mmap(),
        mm/hugetlb.c:hugetlb_reserve_pages().

        >>> process.mmap_hugetlb(0x6000_0000, 2 << 20).name, process.touch(0x6000_0000, write=True).name
        ('ok', 'VM_FAULT_NOPAGE')
        """
        if file is None:
            if length is None:
                raise ValueError("length None and file None: expected one of them")
            rounded = -(-length // page_size) * page_size
            if not 0 < rounded <= _MOST_BYTES:  # there is no such file, and nothing is mapped
                none = int(W.NO_INODE)
                rounded %= 1 << 64
                return self._mmap(
                    none, address, 0, rounded, prot, shared=shared, populate=False, locked=False, noreserve=False
                )
            from pgemu.objects.files import HugetlbFile

            own = HugetlbFile.create(self.machine, rounded, page_size)
            offset = 0
        else:
            own = file
            rounded = max(file.size - offset, 0) if length is None else length
        options = {"shared": shared, "populate": populate, "locked": locked, "noreserve": noreserve}
        result = self._mmap(own.number, address, offset, rounded, prot, **options)
        if file is None:
            own.close()
        return result

    def mmap_device(
        self,
        device: Device,
        address: int,
        length: int | None = None,
        prot: int = _READ_WRITE,
        *,
        offset: int = 0,
    ) -> Result:
        """Map device memory shared, as VM_PFNMAP; everything at once or page by page is the device's choice.

        0, -EINVAL beyond its end, -EEXIST, -ENOMEM. mm/memory.c:remap_pfn_range(), vmf_insert_pfn();
        mm/huge_memory.c:vmf_insert_pfn_pmd(), vmf_insert_pfn_pud(). Private device mappings are not modelled.

        >>> process.mmap_device(machine.create_device(0x1000, 4), 0x200_0000).name, process.touch(0x200_0000).name
        ('ok', 'VM_FAULT_NOPAGE')
        """
        size = max(device.size - offset, 0) if length is None else length
        return self._mmap(
            device.number, address, offset, size, prot, shared=True, populate=False, locked=False, noreserve=False
        )

    def mmap(
        self,
        gmem: GuestMemfd | GuestMemfd4K | ShmemFile,
        address: int,
        *,
        offset: int = 0,
        length: int | None = None,
        read_only: bool = False,
        populate: bool = False,
        locked: bool = False,
        private: bool = False,
        counted: bool = False,
    ) -> Result:
        """mmap(MAP_SHARED) of a guest_memfd, or a memfd, at a fixed address.

        0, -EEXIST, -EINVAL, -EBADF, -ENODEV without its flag.

        populate, locked: MAP_POPULATE, MAP_LOCKED, which do nothing to VM_PFNMAP. private: MAP_PRIVATE, which
        guest_memfd refuses (-EINVAL).
        counted: map it as merged, by entries that its folios count, also where the design would be VM_PFNMAP: both
        kinds of mapping of one file were captured side by side (the parameter kvm.gmem_pfnmap decided at mmap).

        >>> process.mmap(gmem, 0x5000_0000, offset=0x1000, length=0x1000).name
        'ok'
        """
        size = gmem.size - offset if length is None else length
        if isinstance(gmem, GuestMemfd):
            flags = (Flag.READ_ONLY if read_only else 0) | (Flag.PRIVATE if private else 0)
            flags |= (Flag.COUNTED if counted else 0) | (Flag.POPULATE if populate else 0)
            flags |= Flag.LOCKED if locked else 0
            return self._operate(Operation.MMAP, address, size, flags, object_=gmem.inode, offset=offset)
        prot = PROT_READ if read_only else PROT_READ | PROT_WRITE
        return self._mmap(
            gmem.number,
            address,
            offset,
            size,
            prot,
            shared=not private,
            populate=populate,
            locked=locked,
            noreserve=False,
        )

    def munmap(self, address: int, length: int) -> Result:
        """munmap(): 0, -EINVAL (also for a cut through a HugeTLB page), -ENOMEM for one mapping too many.

        Tables that no mapping needs any more are freed. mm/vma.c:do_vmi_munmap().

        >>> process.munmap(0x80_0000, 4096).name, process.touch(0x80_0000).name
        ('ok', 'VM_FAULT_SIGSEGV')
        """
        return self._operate(Operation.MUNMAP, address, length)

    def protect(self, address: int, length: int, prot: int) -> Result:
        """mprotect(): 0, -EINVAL, -ENOMEM at the first hole, after what lies before it was changed. mm/mprotect.c

        -EACCES for PROT_EXEC of a guest_memfd of the two designs.

        >>> process.protect(0x80_0000, 4096, 1).name, process.touch(0x80_0000, write=True).name
        ('ok', 'VM_FAULT_SIGSEGV')
        """
        return self._operate(Operation.PROTECT, address, length, _protection(prot))

    def mlock(self, address: int, length: int, *, on_fault: bool = False) -> Result:
        """mlock(), with `on_fault` mlock2(MLOCK_ONFAULT): 0, -EAGAIN, -ENOMEM over a hole or where no page can be had.

        VM_PFNMAP and HugeTLB mappings are accepted and left as they are. mm/mlock.c:mlock_fixup()

        >>> process.mlock(0x80_0000, 16384).name, process.touch(0x80_3000).name
        ('ok', 'present')
        """
        return self._operate(Operation.LOCK, address, length, Flag.LOCKED | (0 if on_fault else Flag.POPULATE))

    def munlock(self, address: int, length: int) -> Result:
        """munlock(): 0 or -ENOMEM over a hole. mm/mlock.c

        >>> process.mlock(0x80_0000, 4096).name, process.munlock(0x80_0000, 4096).name
        ('ok', 'ok')
        """
        return self._operate(Operation.LOCK, address, length)

    def remap(self, address: int, length: int, new_length: int, new_address: int = 0) -> Result:
        """mremap(): in place, or with MREMAP_FIXED to `new_address`, where what is mapped goes.

        0, -EINVAL, -EFAULT (also for VM_PFNMAP that would grow), -ENOMEM; -EOPNOTSUPP for HugeTLB memory, which is not
        modelled. Length 0 maps shared memory once more. Since 6.17 one call moves every mapping of a range. Tables move
        whole where old and new place are aligned alike. ValueError beyond 16 TiB. mm/mremap.c:move_page_tables()

        >>> process.remap(0x80_0000, 4096, 4096, 0xC0_0000).name, process.touch(0xC0_0000).name
        ('ok', 'present')
        """
        pages = -(-new_length // W.PAGE_4K)
        return self._operate(Operation.REMAP, address, length, object_=pages, offset=new_address)
