"""Files that a process maps: hugetlbfs, device memory, guest_memfd of 4K folios."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pgemu.machine.arguments import OfMachine, guards_creation
from pgemu.machine.field_rules import number_of
from pgemu.objects.failures import MemoryFailure, fail_page
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.machine.results import Result

# Page attribute bits of a 4K entry by Linux's PAT: bit 3 is PWT, bit 4 PCD. arch/x86/mm/pat/memtype.c
MEMORY_TYPES = {"write-back": 0, "write-combining": 1 << 3, "uncached-minus": 1 << 4, "uncached": 1 << 3 | 1 << 4}
MemoryType = Literal["write-back", "write-combining", "uncached-minus", "uncached"]

_NO_FILE = int(W.NO_INODE) - 1
_INODE = number_of("a file", W.INODES)
_MOST_BYTES = (1 << 63) - 1  # include/linux/fs.h:MAX_LFS_FILESIZE


def _new_inode(machine: Core, size: int, unit: int, fields: dict[np.uint64, int]) -> int:
    """Number of a new inode of an ordinary kind. OSError EINVAL, ENOSPC."""
    if not 0 < size <= _MOST_BYTES or size % unit:
        raise OSError(W.EINVAL, f"size {size}: expected a positive multiple of {unit}, below 2**63")
    state = machine.arrays.state
    inode = _free_row(machine)
    row = int(W.STATE_INODES) + inode * W.I_WORDS
    before = int(state[row + int(W.I_GENERATION)]) if inode < machine.register(W.R_INODES) else -1
    state[row : row + W.I_WORDS] = 0
    fields = {W.I_PAGES: size >> 12, W.I_OPEN: 1, W.I_REFERENCES: 1, W.I_GENERATION: before + 1, **fields}
    for name, value in fields.items():
        state[row + int(name)] = value
    state[W.R_INODES] = max(machine.register(W.R_INODES), inode + 1)
    state[W.R_ORDINARY] = 1
    return inode


def _generation(machine: Core, inode: int) -> int:
    """How many files a row was before the one that it is."""
    return int(machine.arrays.state[int(W.STATE_INODES) + inode * W.I_WORDS + int(W.I_GENERATION)])


def _free_row(machine: Core) -> int:
    """The row of a hugetlbfs file or device that nobody holds any more, or the next unused one. OSError ENOSPC."""
    state = machine.arrays.state
    used = machine.register(W.R_INODES)
    for inode in range(used):
        row = int(W.STATE_INODES) + inode * W.I_WORDS
        unused = state[row + int(W.I_KIND)] in (W.INODE_HUGETLB, W.INODE_DEVICE)
        unused |= bool(state[row + int(W.I_FLAGS)] & W.INODE_SHMEM)
        if unused and not state[row + int(W.I_REFERENCES)]:
            return inode
    if used >= W.INODES:
        raise OSError(W.ENOSPC, f"more than {W.INODES} inodes")
    return used


@guards_creation(inode=_INODE)
@dataclass(frozen=True)
class File(OfMachine):
    """A file of an ordinary kind; `inode` is its number, `size` in bytes.

    Another file may get the number once this one is closed and nobody maps it. Then this one is still closed: -EBADF.
    """

    machine: Core = field(repr=False)
    inode: int
    size: int
    generation: int = field(default=-1, repr=False, kw_only=True)
    _kind: ClassVar[int]

    def __post_init__(self) -> None:
        """A file is the one that has its number now."""
        row = int(W.STATE_INODES) + self.inode * W.I_WORDS
        kind, pages = (int(self.machine.arrays.state[row + int(word)]) for word in (W.I_KIND, W.I_PAGES))
        if kind != self._kind or self.size != pages << 12:
            raise ValueError(f"inode {self.inode} and size {self.size}: expected those of a {type(self).__name__}")
        if self.generation < 0:
            object.__setattr__(self, "generation", _generation(self.machine, self.inode))

    @property
    def number(self) -> int:
        """Its number in operations: `inode`, or one that no file has, once another one has that."""
        return self.inode if _generation(self.machine, self.inode) == self.generation else _NO_FILE

    def _operate(self, op: Operation, offset: int = 0, length: int = 0) -> Result:
        return self.machine.operate(op, object_=self.number, offset=offset, length=length)

    def memory_failure(self, offset: int, *, hardware: bool = False, early_kill: bool = False) -> MemoryFailure:
        """Machine.memory_failure() of the page at an offset. -ENOENT where none is there, -EINVAL past the end and of
        a device.

        >>> file.memory_failure(1 << 40).status  # past its end
        -22
        """
        return fail_page(self.machine, self.number, offset, hardware, early_kill)

    def close(self) -> Result:
        """Close the last descriptor: 0, or -EBADF the second time. The file lives on while it is mapped.

        >>> file.close().name, file.close().name
        ('ok', '-EBADF')
        """
        return self._operate(Operation.CLOSE)


@guards_creation(inode=_INODE)
@dataclass(frozen=True)
class HugetlbFile(File):
    """A file of hugetlbfs. fs/hugetlbfs/inode.c

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20))
    >>> file = machine.create_hugetlb_file(2 << 20)
    >>> file.allocate(0, 2 << 20).name
    'ok'
    """

    page_size: int
    _kind = int(W.INODE_HUGETLB)

    @classmethod
    def create(cls, machine: Core, size: int, page_size: int) -> HugetlbFile:
        """See Machine.create_hugetlb_file.

        >>> HugetlbFile.create(machine, 2 << 20, 2 << 20).page_size
        2097152
        """
        order = W.ORDER_2M if page_size == W.PAGE_2M else W.ORDER_1G
        inode = _new_inode(machine, size, page_size, {W.I_KIND: int(W.INODE_HUGETLB), W.I_ORDER: order})
        return cls(machine, inode, size, page_size=page_size)

    def punch_hole(self, offset: int, length: int) -> Result:
        """fallocate(FALLOC_FL_PUNCH_HOLE): whole huge pages of the range leave every process and the file. 0.

        >>> file.punch_hole(0, 2 << 20).name, machine.hugetlb().free_hugepages
        ('ok', 2)
        """
        return self._operate(Operation.PUNCH_HOLE, offset, length)

    def allocate(self, offset: int, length: int) -> Result:
        """fallocate(): zeroed pages now. 0, -EINVAL past the end, -ENOSPC with the pool empty or reserved.

        >>> file.allocate(0, 2 << 20).name, machine.hugetlb().free_hugepages
        ('ok', 1)
        """
        return self._operate(Operation.ALLOCATE, offset, length)


@guards_creation(inode=_INODE)
@dataclass(frozen=True)
class GuestMemfd4K(File):
    """A guest_memfd of order-0 folios, as merged. virt/kvm/guest_memfd.c

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> file = machine.create_guest_memfd_4k(1 << 20)
    >>> file.allocate(0, 8192).name
    'ok'
    """

    _kind = int(W.INODE_GUEST_MEMFD_4K)

    @classmethod
    def create(cls, machine: Core, size: int, mmap: bool, init_shared: bool) -> GuestMemfd4K:
        """See Machine.create_guest_memfd_4k.

        >>> GuestMemfd4K.create(machine, 4096, True, True).size
        4096
        """
        if (mmap or init_shared) and not formats.KERNELS[machine.config.kernel].guest_memfd_mmap:
            raise OSError(W.EINVAL, f"guest_memfd of {machine.config.kernel} has no flags")
        flags = (int(W.INODE_MMAP) if mmap else 0) | (int(W.INODE_INIT_SHARED) if init_shared else 0)
        fields = {W.I_KIND: int(W.INODE_GUEST_MEMFD_4K), W.I_FLAGS: flags}
        return cls(machine, _new_inode(machine, size, W.PAGE_4K, fields), size)

    def punch_hole(self, offset: int, length: int) -> Result:
        """fallocate(FALLOC_FL_PUNCH_HOLE): 0, -EINVAL unless aligned to pages.

        >>> file.punch_hole(0, 4096).name
        'ok'
        """
        return self._operate(Operation.PUNCH_HOLE, offset, length)

    def allocate(self, offset: int, length: int) -> Result:
        """fallocate(): zeroed folios now. 0, -EINVAL, -ENOMEM with what was done until then.

        >>> file.allocate(0, 1 << 20).name, file.allocate(0, 100).name
        ('ok', '-EINVAL')
        """
        return self._operate(Operation.ALLOCATE, offset, length)


@guards_creation(inode=_INODE)
@dataclass(frozen=True)
class ShmemFile(File):
    """A file of shmem with 4K folios: of memfd_create(), or what mmap(MAP_SHARED | MAP_ANONYMOUS) maps. mm/shmem.c

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20, buddy=2 << 20))
    >>> file = machine.create_memfd(1 << 20)
    """

    _kind = int(W.INODE_GUEST_MEMFD_4K)

    @classmethod
    def create(cls, machine: Core, size: int) -> ShmemFile:
        """OSError EINVAL, ENOSPC past the inodes.

        >>> ShmemFile.create(machine, 4096).size
        4096
        """
        flags = int(W.INODE_MMAP) | int(W.INODE_INIT_SHARED) | int(W.INODE_SHMEM)
        fields = {W.I_KIND: int(W.INODE_GUEST_MEMFD_4K), W.I_FLAGS: flags}
        return cls(machine, _new_inode(machine, size, W.PAGE_4K, fields), size)


@guards_creation(inode=_INODE)
@dataclass(frozen=True)
class Device(File):
    """Memory of a device, such as a PCI BAR: frames without struct pages, mapped as VM_PFNMAP.

    >>> machine = Machine(Config("restructure", pool=2 << 20, page_size=2 << 20))
    >>> file = machine.create_device(0x1000, 16)
    >>> process = machine.create_process()
    >>> process.mmap_device(file, 0x4000_0000).name, process.touch(0x4000_0000).name
    ('ok', 'VM_FAULT_NOPAGE')
    """

    pfn: int
    _kind = int(W.INODE_DEVICE)

    @classmethod
    def create(cls, machine: Core, pfn: int, pages: int, remap: bool, memory_type: MemoryType) -> Device:
        """See Machine.create_device.

        >>> Device.create(machine, 0x2000, 1, False, "write-back").pfn
        8192
        """
        if pfn + pages > 1 << 40:
            raise ValueError(f"pfn {pfn:#x} and pages {pages:#x}: expected frames below 2**40, which is 2**52 bytes")
        fields = {
            W.I_KIND: int(W.INODE_DEVICE),
            W.I_BASE: pfn,
            W.I_FLAGS: int(W.INODE_REMAP) if remap else 0,
            W.I_CACHE_BITS: MEMORY_TYPES[memory_type],
        }
        return cls(machine, _new_inode(machine, pages << 12, W.PAGE_4K, fields), pages << 12, pfn)

    def revoke(self) -> Result:
        """Turn the memory off, as the memory enable bit does: every entry of processes goes, no table; faults end in
        SIGBUS. 0. Of devices, maps of a dma-buf go; what VFIO type1 mapped stays, as in Linux.

        >>> file.revoke().name, process.touch(0x4000_0000).name
        ('ok', 'VM_FAULT_SIGBUS')
        """
        return self._operate(Operation.REVOKE)

    def restore(self) -> Result:
        """Turn it on again; entries come back at their faults. 0.

        >>> file.revoke().name, file.restore().name, process.touch(0x4000_0000).name
        ('ok', 'ok', 'VM_FAULT_NOPAGE')
        """
        return self._operate(Operation.RESTORE)
