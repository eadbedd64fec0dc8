"""Objects over a machine's rows: guest_memfd inodes, processes, virtual machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu_kernels import layout as L
from pgemu_kernels.formats import ADDRESS, HOST_X86_64, LARGE, PRESENT
from pgemu_kernels.layout import Flag, Operation

if TYPE_CHECKING:
    from pgemu.files import Device, GuestMemfd4K, HugetlbFile
    from pgemu.machine import Machine, Result, Results
    from pgemu.stage2 import Stage2
    from pgemu.translation import Access, Kind, NestedTranslation, Translation

Array = np.ndarray[Any, Any]


def _row(machine: Machine, counter: np.uint64, limit: int, what: str) -> int:
    """The next unused row number of a kind."""
    number = machine.register(counter)
    if number >= limit:
        raise OSError(L.ENOSPC, f"more than {limit} {what}")
    return number


@dataclass(frozen=True)
class GuestMemfd:
    """A guest_memfd inode over the machine's HugeTLB pool. virt/kvm/guest_memfd.c"""

    machine: Machine
    inode: int
    size: int

    @classmethod
    def create(cls, machine: Machine, size: int, shared: bool) -> GuestMemfd:
        """See Machine.create_guest_memfd."""
        config = machine.config
        if size <= 0 or size % config.page_size:
            raise OSError(L.EINVAL, f"size {size}: expected a positive multiple of the huge page, {config.page_size}")
        inode = _row(machine, L.R_INODES, L.INODES, "inodes")
        state = machine.arrays.state
        blocks = size // config.page_size
        used = machine.register(L.R_BLOCKS)
        subpool = _row(machine, L.R_SUBPOOLS, L.SUBPOOLS, "subpools")
        hstate = machine.register(L.R_HSTATE)
        reserved = int(state[hstate + int(L.H_RESERVED)]) + blocks
        if reserved > int(state[hstate + int(L.H_FREE)]):
            raise OSError(L.ENOMEM, f"{blocks} huge pages: the pool cannot reserve that many")
        if used + blocks > 4 * config.pool_pages:
            raise OSError(L.ENOSPC, "inodes, closed ones included, of more than four times the pool")
        pages = size >> 12
        words = machine.register(L.R_WORDS)
        counts = machine.register(L.R_SHARED) + machine.register(L.R_SHARED_USED)
        puds = (pages + (1 << 18) - 1) >> 18
        row = int(L.STATE_INODES) + inode * L.I_WORDS
        fields = {
            L.I_PAGES: pages,
            L.I_BLOCK: machine.register(L.R_BLOCK_ROWS) + used * L.B_WORDS,
            L.I_BLOCKS: blocks,
            L.I_WORD: machine.register(L.R_WORD_ROWS) + words,
            L.I_ZEROED: machine.register(L.R_ZEROED_ROWS) + words,
            L.I_PMD: counts,
            L.I_PUD: counts + pages // 512,
            L.I_OPEN: 1,
            L.I_SUBPOOL: subpool + 1,
        }
        for name, value in fields.items():
            state[row + int(name)] = value
        # mm/hugetlb.c:hugepage_new_subpool(): of the inode's size, all of it reserved at once.
        row = int(L.STATE_SUBPOOLS) + subpool * L.P_WORDS
        reservation = {L.P_LIVE: 1, L.P_HSTATE: hstate, L.P_MAX: blocks, L.P_MIN: blocks, L.P_RESERVED: blocks}
        for name, value in reservation.items():
            state[row + int(name)] = value
        state[hstate + int(L.H_RESERVED)] = reserved
        state[L.R_SUBPOOLS] += np.uint64(1)
        state[L.R_BLOCKS] += np.uint64(blocks)
        state[L.R_WORDS] += np.uint64(pages // 64)
        state[L.R_SHARED_USED] += np.uint64(pages // 512 + puds)
        state[L.R_INODES] += np.uint64(1)
        if shared:
            cls._share_all(machine, fields)
        return cls(machine, inode, size)

    @staticmethod
    def _share_all(machine: Machine, fields: dict[np.uint64, int]) -> None:
        pages = fields[L.I_PAGES]
        word = fields[L.I_WORD]
        machine.arrays.state[word : word + pages // 64] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        pmd = fields[L.I_PMD]
        machine.arrays.counts[pmd : pmd + pages // 512] = 512
        for i, first in enumerate(range(0, pages, 1 << 18)):
            machine.arrays.counts[fields[L.I_PUD] + i] = min(1 << 18, pages - first)

    def convert(self, offset: int, length: int, *, shared: bool, actor: int = 0) -> Result:
        """Make [offset, offset + length) shared or private: 0, -EAGAIN or -ENOMEM with the failing offset, -EINVAL."""
        flags = Flag.SHARED if shared else Flag.PRIVATE
        return self.machine.operate(
            Operation.CONVERT, flags=flags, actor=actor, object_=self.inode, offset=offset, length=length
        )

    def convert_many(self, offsets: Array, length: int = L.PAGE_4K, *, shared: bool) -> Results:
        """Convert `length` bytes at each of `offsets` (uint64[n]), in order."""
        header = np.uint64(Operation.CONVERT | (Flag.SHARED if shared else Flag.PRIVATE) << 8)
        return self.machine.run_columns(header, self.inode, 0, offsets, length, count=len(offsets))

    def punch_hole(self, offset: int, length: int) -> Result:
        """fallocate(FALLOC_FL_PUNCH_HOLE): 0, -EINVAL, or -EAGAIN with the failing offset."""
        return self.machine.operate(Operation.PUNCH_HOLE, object_=self.inode, offset=offset, length=length)

    def get_reference(self, offset: int) -> Result:
        """Take a transient reference on the folio at `offset`: 0 with the page's frame number, or -ENOENT."""
        return self.machine.operate(Operation.GET, object_=self.inode, offset=offset)

    def put_reference(self, pfn: int) -> Result:
        """Drop a reference by frame number: 0 or -ENOENT."""
        return self.machine.operate(Operation.PUT, object_=self.inode, address=pfn << 12)

    def close(self) -> Result:
        """The VMM goes: mappings and slots of the inode, then the inode. 0 or -EBADF."""
        return self.machine.operate(Operation.CLOSE, object_=self.inode)

    def _field(self, name: np.uint64) -> int:
        """A word of the inode's row."""
        return int(self.machine.arrays.state[int(L.STATE_INODES) + self.inode * L.I_WORDS + int(name)])

    def _check(self, offset: int) -> None:
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset:#x}: expected to lie within {self.size:#x}")

    def _block(self, offset: int, name: np.uint64) -> int:
        """A word of the row of the huge page at `offset`. ValueError outside the inode."""
        self._check(offset)
        block = self._field(L.I_BLOCK) + (offset // self.machine.config.page_size) * L.B_WORDS
        return int(self.machine.arrays.state[block + int(name)])

    def pfn(self, offset: int) -> int | None:
        """Frame number of the page at `offset`, or None while nothing is allocated there."""
        head = self._block(offset, L.B_PFN)
        return head + (offset % self.machine.config.page_size >> 12) if head else None

    def is_split(self, offset: int) -> bool:
        """Whether the huge page at `offset` is split to 4K folios."""
        return self._block(offset, L.B_STATE) == int(L.BLOCK_SPLIT)

    def is_shared(self, offset: int) -> bool:
        """Shareability of the page at `offset`. ValueError outside the inode."""
        self._check(offset)
        index = offset >> 12
        return bool(int(self.machine.arrays.state[self._field(L.I_WORD) + (index >> 6)]) >> (index & 63) & 1)


class TablePages(NamedTuple):
    """Table pages of a process below its top one, by the kernel's names; shared ones count in each process."""

    pud: int
    pmd: int
    pte: int

    @property
    def kib(self) -> int:
        """VmPTE of /proc/PID/status without transparent huge pages, in KiB: mm->pgtables_bytes."""
        return 4 * sum(self)


PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
_READ_WRITE = PROT_READ | PROT_WRITE
_PROTECTIONS = {PROT_READ: Flag.READ, PROT_WRITE: Flag.WRITE, PROT_EXEC: Flag.EXEC}


def _protection(prot: int) -> int:
    """Flags of a record for PROT_* bits."""
    if not 0 <= prot <= PROT_READ | PROT_WRITE | PROT_EXEC:
        raise ValueError(f"protection {prot}: expected PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4 or a sum of them")
    return sum(flag for bit, flag in _PROTECTIONS.items() if prot & bit)


@dataclass(frozen=True)
class AddressSpace:
    """A process: its page tables and its mappings.

    Addresses and lengths are bytes; `prot` is a sum of PROT_READ, PROT_WRITE and PROT_EXEC. Mappings go where they are
    asked for and never over others (MAP_FIXED_NOREPLACE). Results are those of the system calls: 0 or -errno.
    """

    machine: Machine
    space: int

    @classmethod
    def create(cls, machine: Machine) -> AddressSpace:
        """See Machine.create_process."""
        from pgemu_kernels.boot import PROCESS_ROOT, provide

        space = cls._free_row(machine)
        row = int(L.STATE_SPACES) + space * L.S_WORDS
        if provide(machine.descriptor, PROCESS_ROOT, np.uint64(row)) != 0:
            raise OSError(L.ENOMEM, "no frame for a top table")
        machine.arrays.state[row + int(L.S_LIVE)] = 1
        if space == machine.register(L.R_SPACES):
            machine.arrays.state[L.R_SPACES] += np.uint64(1)
        return cls(machine, space)

    @staticmethod
    def _free_row(machine: Machine) -> int:
        """The row of a process that ended, or the next unused one."""
        for space in range(machine.register(L.R_SPACES)):
            row = int(L.STATE_SPACES) + space * L.S_WORDS
            if not machine.arrays.state[row + int(L.S_ROOT)]:
                return space
        return _row(machine, L.R_SPACES, L.SPACES, "processes")

    def _word(self, name: np.uint64) -> int:
        return int(self.machine.arrays.state[int(L.STATE_SPACES) + self.space * L.S_WORDS + int(name)])

    def _operate(self, op: Operation, address: int = 0, length: int = 0, flags: int = 0) -> Result:
        return self.machine.operate(op, flags=flags, space=self.space, address=address, length=length)

    @property
    def root(self) -> int:
        """Physical address of the top table; with page-table isolation that of the kernel's copy. 0 after `exit`."""
        return self._word(L.S_ROOT)

    @property
    def user_root(self) -> int:
        """Physical address of the top table in user mode; the same as `root` without page-table isolation."""
        return self._word(L.S_USER_ROOT) or self.root

    @property
    def minor_faults(self) -> int:
        """Faults that succeeded, those of populating included: min_flt of mm/memory.c:mm_account_fault()."""
        return self._word(L.S_MINOR_FAULTS)

    @property
    def rss(self) -> int:
        """4K pages of anonymous and guest_memfd memory mapped; the zero page, HugeTLB and devices do not count."""
        return self._word(L.S_RSS)

    @property
    def table_pages(self) -> TablePages:
        """Table pages below the top one."""
        ram = self.machine.arrays.ram
        tables = np.array([self.root >> 3], dtype=np.int64)
        counts = []
        for _ in range(3):
            entries = ram[(tables[:, None] + np.arange(512)).reshape(-1)]
            entries = entries[(entries & np.uint64(PRESENT | LARGE)) == np.uint64(PRESENT)]
            tables = ((entries & np.uint64(ADDRESS)) >> np.uint64(3)).astype(np.int64)
            counts.append(len(tables))
        return TablePages(*counts)

    # ------------------------------------------------------------------ mappings

    def _mmap(
        self, inode: int, address: int, offset: int, length: int, prot: int, *,
        shared: bool, populate: bool, locked: bool, noreserve: bool,
    ) -> Result:  # fmt: skip
        flags = _protection(prot) | (Flag.SHARED if shared else Flag.PRIVATE)
        flags |= Flag.POPULATE if populate else 0
        flags |= (Flag.LOCKED if locked else 0) | (Flag.NORESERVE if noreserve else 0)
        self.machine.arrays.state[L.R_ORDINARY] = 1
        return self.machine.operate(
            Operation.MMAP, flags=flags, space=self.space, object_=inode, address=address, offset=offset, length=length
        )

    def mmap_anonymous(
        self, address: int, length: int, prot: int = _READ_WRITE, *,
        populate: bool = False, locked: bool = False, noreserve: bool = False,
    ) -> Result:  # fmt: skip
        """mmap(MAP_PRIVATE | MAP_ANONYMOUS), without transparent huge pages. mm/mmap.c:do_mmap().

        0; -EINVAL for an unaligned address or no length, -EEXIST over another mapping, -ENOMEM beyond
        2^47 - 4096 or past layout.VMAS mappings. populate, locked: MAP_POPULATE, MAP_LOCKED, whose faults may
        fail unseen.
        """
        inode = int(L.NO_INODE)
        return self._mmap(
            inode, address, 0, length, prot, shared=False, populate=populate, locked=locked, noreserve=noreserve
        )

    def mmap_hugetlb(
        self, address: int, length: int | None = None, prot: int = _READ_WRITE, *, file: HugetlbFile | None = None,
        page_size: int = L.PAGE_2M, offset: int = 0, shared: bool = True,
        populate: bool = False, locked: bool = False, noreserve: bool = False,
    ) -> Result:  # fmt: skip
        """Map a hugetlbfs file, or without one MAP_ANONYMOUS | MAP_HUGETLB memory of `page_size`.

        The length is rounded up to huge pages; None is the rest of the file. 0; -EINVAL for an address or offset
        that is not aligned to them, -EEXIST, -ENOMEM where the pool cannot reserve the pages (not asked with
        noreserve). mm/mmap.c:ksys_mmap_pgoff(), fs/hugetlbfs/inode.c:hugetlbfs_file_mmap(),
        mm/hugetlb.c:hugetlb_reserve_pages().
        """
        if file is None:
            if length is None:
                raise ValueError("mmap_hugetlb: expected a length or a file")
            if length == 0:
                return self._mmap(
                    int(L.NO_INODE), address, 0, 0, prot, shared=shared, populate=False, locked=False, noreserve=False
                )
            rounded = -(-length // page_size) * page_size
            own = self.machine.create_hugetlb_file(rounded, page_size)
            offset = 0
        else:
            own = file
            rounded = max(file.size - offset, 0) if length is None else length
        result = self._mmap(
            own.inode,
            address,
            offset,
            rounded,
            prot,
            shared=shared,
            populate=populate,
            locked=locked,
            noreserve=noreserve,
        )
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
        """
        size = max(device.size - offset, 0) if length is None else length
        return self._mmap(
            device.inode, address, offset, size, prot, shared=True, populate=False, locked=False, noreserve=False
        )

    def mmap(
        self,
        gmem: GuestMemfd | GuestMemfd4K,
        address: int,
        *,
        offset: int = 0,
        length: int | None = None,
        read_only: bool = False,
        populate: bool = False,
    ) -> Result:
        """mmap(MAP_SHARED) of a guest_memfd at a fixed address: 0, -EEXIST, -EINVAL, -EBADF, -ENODEV without its flag.

        populate: of a guest_memfd of 4K folios only.
        """
        size = gmem.size - offset if length is None else length
        if isinstance(gmem, GuestMemfd):
            if populate:
                raise ValueError("populate: expected a guest_memfd of 4K folios")
            return self.machine.operate(
                Operation.MMAP,
                flags=Flag.READ_ONLY if read_only else 0,
                space=self.space,
                object_=gmem.inode,
                address=address,
                offset=offset,
                length=size,
            )
        prot = PROT_READ if read_only else PROT_READ | PROT_WRITE
        return self._mmap(
            gmem.inode, address, offset, size, prot, shared=True, populate=populate, locked=False, noreserve=False
        )

    def munmap(self, address: int, length: int) -> Result:
        """munmap(): 0, -EINVAL (also for a cut through a HugeTLB page), -ENOMEM for one mapping too many.

        Tables that no mapping needs any more are freed. mm/vma.c:do_vmi_munmap().
        """
        return self._operate(Operation.MUNMAP, address, length)

    def protect(self, address: int, length: int, prot: int) -> Result:
        """mprotect(): 0, -EINVAL, -ENOMEM at the first hole, after what lies before it was changed. mm/mprotect.c

        -EOPNOTSUPP at a mapping of a guest_memfd of the two designs, where it is not modelled.
        """
        return self._operate(Operation.PROTECT, address, length, _protection(prot))

    def madvise_dontneed(self, address: int, length: int) -> Result:
        """madvise(MADV_DONTNEED): 0, -EINVAL for PFN and locked mappings, -ENOMEM over a hole, after all was done.

        From 6.14 on a last-level table that one call covers whole is freed. mm/madvise.c
        """
        return self._operate(Operation.ZAP, address, length, Flag.MADVISE)

    def populate(self, address: int, length: int, *, write: bool = False) -> Result:
        """madvise(MADV_POPULATE_READ) or _WRITE: 0, -ENOMEM, -EINVAL where it is not allowed, -EFAULT. mm/madvise.c

        A mapping of a guest_memfd of the two designs is not populated: -EINVAL.
        """
        return self._operate(Operation.POPULATE, address, length, Flag.WRITE if write else 0)

    def remap(self, address: int, length: int, new_length: int, new_address: int = 0) -> Result:
        """mremap() of anonymous memory: in place, or with MREMAP_FIXED to `new_address`, where what is mapped goes.

        0, -EINVAL, -EFAULT, -ENOMEM; -EOPNOTSUPP for other memory, which is not modelled. Tables move whole where old
        and new place are aligned alike. ValueError beyond 16 TiB. mm/mremap.c:move_page_tables()
        """
        if not 0 <= new_length < 1 << 44:
            raise ValueError(f"length {new_length}: expected less than 16 TiB")
        return self.machine.operate(
            Operation.REMAP,
            space=self.space,
            address=address,
            length=length,
            object_=-(-new_length // L.PAGE_4K),
            offset=new_address,
        )

    def guard_install(self, address: int, length: int) -> Result:
        """madvise(MADV_GUARD_INSTALL), 6.13 and later: pages go, every access ends in SIGSEGV; no mapping is cut.

        0, -EINVAL for anything but anonymous memory that is not locked, -ENOMEM over a hole. mm/madvise.c
        """
        return self._operate(Operation.GUARD_INSTALL, address, length)

    def guard_remove(self, address: int, length: int) -> Result:
        """madvise(MADV_GUARD_REMOVE): guards go, the pages are empty. 0, -EINVAL, -ENOMEM. mm/madvise.c"""
        return self._operate(Operation.GUARD_REMOVE, address, length)

    def read_smaps(self) -> Result:
        """What reading /proc/PID/smaps does: 1G entries of PFN mappings are dropped, as captured. fs/proc/task_mmu.c"""
        return self._operate(Operation.READ_SMAPS)

    def fork(self) -> AddressSpace:
        """fork(): the child. Private pages are shared until written; shared memory is faulted in anew.

        OSError: EAGAIN past layout.SPACES processes, ENOMEM. kernel/fork.c:dup_mmap(), mm/memory.c:copy_page_range()
        """
        result = self._operate(Operation.FORK)
        if result.status:
            raise OSError(-result.status, "fork")
        return AddressSpace(self.machine, result.detail)

    def exit(self) -> Result:
        """The process ends: its mappings, its tables. 0. mm/mmap.c:exit_mmap()"""
        return self._operate(Operation.EXIT)

    def zap(self, address: int, length: int, *, madvise: bool = False) -> Result:
        """Clear the entries of a range; with `madvise` as MADV_DONTNEED, which VM_PFNMAP refuses (-EINVAL)."""
        return self._operate(Operation.ZAP, address, length, Flag.MADVISE if madvise else 0)

    def zap_many(self, addresses: Array, length: int = L.PAGE_4K) -> Results:
        """Zap `length` bytes at each of `addresses` (uint64[n]), in order."""
        header = np.uint64(Operation.ZAP | self.space << 48)
        return self.machine.run_columns(header, 0, addresses, 0, length, count=len(addresses))

    # ------------------------------------------------------------------ accesses

    def touch(self, address: int, *, write: bool = False, execute: bool = False) -> Result:
        """Access a byte from user mode: 0 if its entry allowed it, else the fault's result; detail is the leaf's level.

        VM_FAULT_NOPAGE or VM_FAULT_LOCKED after a fault that succeeded; VM_FAULT_SIGSEGV, SIGBUS or OOM.
        The processor sets the accessed and, on a write, the dirty bit. (Anonymous and HugeTLB faults return 0 in
        Linux; here 0 stands for "no fault".) mm/memory.c:handle_mm_fault(), mm/hugetlb.c:hugetlb_fault()
        """
        flags = (Flag.WRITE if write else 0) | (Flag.EXEC if execute else 0)
        return self._operate(Operation.HOST_FAULT, address, flags=flags)

    def touch_many(self, addresses: Array, *, write: bool = False, execute: bool = False) -> Results:
        """Access the bytes at `addresses` (uint64[n]), in order."""
        flags = (Flag.WRITE if write else 0) | (Flag.EXEC if execute else 0)
        header = np.uint64(Operation.HOST_FAULT | flags << 8 | self.space << 48)
        return self.machine.run_columns(header, 0, addresses, count=len(addresses))

    def walk(self, address: int) -> list[tuple[int, int, int]]:
        """[(level, entry address, entry)] of a virtual address."""
        return self.machine.walk(self.root, address >> 12)

    def translate(
        self, addresses: Array, kinds: Kind | Array | None = None, access: Access | None = None
    ) -> Translation:
        """Translate virtual addresses (uint64[n]) through the tables as they are; see pgemu.translation.translate."""
        from pgemu.translation import translate

        return translate(self.machine, HOST_X86_64, self.root, addresses, kinds, access)


@dataclass(frozen=True)
class Vm:
    """A virtual machine: its stage-2 tables and its memory slots."""

    machine: Machine
    vm: int

    @classmethod
    def create(cls, machine: Machine, process: AddressSpace | None, protected: bool) -> Vm:
        """See Machine.create_vm."""
        from pgemu_kernels.boot import STAGE2_ROOT, provide

        vm = _row(machine, L.R_VMS, L.VMS, "VMs")
        row = int(L.STATE_VMS) + vm * L.V_WORDS
        if provide(machine.descriptor, STAGE2_ROOT, np.uint64(row)) != 0:
            raise OSError(L.ENOMEM, "no frame for a stage-2 root")
        # Without a process no mapping of the inode is the VM's own: none of them notifies it.
        machine.arrays.state[row + int(L.V_SPACE)] = process.space if process else (1 << 64) - 1
        machine.arrays.state[row + int(L.V_PROTECTED)] = protected
        machine.arrays.state[row + int(L.V_LIVE)] = 1
        machine.arrays.state[row + int(L.V_UNLOADED)] = 1
        machine.arrays.state[L.R_VMS] += np.uint64(1)
        return cls(machine, vm)

    def _field(self, name: np.uint64) -> int:
        """A word of the VM's row."""
        return int(self.machine.arrays.state[int(L.STATE_VMS) + self.vm * L.V_WORDS + int(name)])

    @property
    def root(self) -> int:
        """Physical address of the stage-2 root; 0 once the VM is closed."""
        return self._field(L.V_ROOT)

    # ------------------------------------------------------------------ memory slots

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size: int,
        userspace_addr: int = 0,
        *,
        read_only: bool = False,
        log_dirty_pages: bool = False,
        gmem: GuestMemfd4K | None = None,
        gmem_offset: int = 0,
    ) -> Result:
        """KVM_SET_USER_MEMORY_REGION2: create, move, change or (size 0) delete memory slot number `slot`.

        The slot shows the process's memory from `userspace_addr` on; with `gmem`, private pages (or all, if the file
        can be mapped) come from there. 0; -EINVAL for what is not aligned, too large, past 48 bits of guest address
        or the process's addresses, for a change of size, userspace address or read-only, for deleting what is not
        there, for a VM without a process; -EEXIST over another slot; -EBADF for a closed file or VM; -ENOSPC past
        layout.MEMSLOTS. Deleting or moving one drops the whole stage-2 tree, of a protected VM only the slot's
        leaves. Dirty logging switched on splits large leaves to 4K and write-protects; switched off, large leaves
        come back (6.12: at the next access). virt/kvm/kvm_main.c:kvm_set_memory_region()
        """
        flags = Flag.READ_ONLY if read_only else 0
        flags |= Flag.LOG_DIRTY_PAGES if log_dirty_pages else 0
        self._make_ordinary()
        if gmem is not None:
            flags |= Flag.PRIVATE
            named = self.machine.operate(Operation.BIND, vm=self.vm, object_=gmem.inode, offset=gmem_offset)
            if named.status != 0:
                return named
        return self.machine.operate(
            Operation.MEMSLOT,
            flags=flags,
            vm=self.vm,
            object_=slot,
            address=gpa,
            offset=userspace_addr,
            length=size,
        )

    def _make_ordinary(self) -> None:
        """Have the VM's operations sorted by what they touch."""
        state = self.machine.arrays.state
        state[L.R_ORDINARY] = 1
        state[int(L.STATE_VMS) + self.vm * L.V_WORDS + int(L.V_ORDINARY)] = 1

    def set_attributes(self, gpa: int, size: int, *, private: bool) -> Result:
        """KVM_SET_MEMORY_ATTRIBUTES: make guest memory private or shared.

        0; -EINVAL if not aligned, empty, or private in a VM that is not protected; -ENOMEM with nothing changed.
        If anything changes the whole range loses its leaves. virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes()
        """
        flags = Flag.PRIVATE if private else Flag.SHARED
        return self.machine.operate(Operation.ATTRIBUTES, flags=flags, vm=self.vm, address=gpa, length=size)

    def prefault(self, gpa: int, size: int) -> Result:
        """KVM_PRE_FAULT_MEMORY: map [gpa, gpa + size) without an access; accessed stays clear.

        0 with the bytes populated in `detail`, less than `size` where a later page failed; -ENOENT if the first page
        has no slot, -EFAULT, -ENOMEM, -EINVAL. virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()
        """
        return self.machine.operate(Operation.PREFAULT, vm=self.vm, address=gpa, length=size)

    def dirty_log(self, slot: int) -> tuple[int, Array]:
        """KVM_GET_DIRTY_LOG: (0, -ENOENT or -EINVAL; uint64[n], guest physical addresses written since the last call).

        The pages are write-protected again. virt/kvm/kvm_main.c:kvm_get_dirty_log_protect()
        """
        pages = self._dirty_pages(slot)
        result = self.machine.operate(Operation.DIRTY_LOG, vm=self.vm, object_=slot)
        return result.status, pages if result.status == 0 else pages[:0]

    def _dirty_pages(self, slot: int) -> Array:
        """Guest physical addresses in a slot's dirty bitmap."""
        from pgemu.stage2 import radix_tree

        rows = self.machine.arrays.state[int(L.STATE_MEMSLOTS) :][: L.MEMSLOTS * L.M_WORDS]
        rows = rows.reshape(-1, L.M_WORDS)
        kind = (rows[:, L.M_LIVE] != 0) & (rows[:, L.M_KIND] == L.SLOT_USER)
        found = np.flatnonzero(kind & (rows[:, L.M_VM] == self.vm) & (rows[:, L.M_ID] == slot))
        if found.size == 0:
            return np.empty(0, np.uint64)
        row = rows[found[0]]
        index, words = radix_tree(self.machine.arrays.ram, int(row[L.M_DIRTY]))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        word, bit = np.nonzero(bits)
        page = index[word] * np.uint64(64) + bit.astype(np.uint64)
        return np.asarray((row[L.M_BASE_GFN] + page) << np.uint64(12))

    def close(self) -> Result:
        """Drop the last reference: slots, tables and attributes go. 0, or -EBADF if it was closed before.

        virt/kvm/kvm_main.c:kvm_destroy_vm()
        """
        self._make_ordinary()
        return self.machine.operate(Operation.VM_EXIT, vm=self.vm)

    # ------------------------------------------------------------------ the designs' slots

    def bind(self, gmem: GuestMemfd, gpa: int, *, offset: int = 0, length: int | None = None) -> Result:
        """Make a memory slot of the inode's range: 0, -EEXIST, -EINVAL, -EBADF, -ENOSPC."""
        return self.machine.operate(
            Operation.BIND,
            vm=self.vm,
            object_=gmem.inode,
            address=gpa,
            offset=offset,
            length=gmem.size - offset if length is None else length,
        )

    def unbind(self, gpa: int) -> Result:
        """Delete the slot that begins at `gpa`: 0 or -ENOENT."""
        return self.machine.operate(Operation.UNBIND, vm=self.vm, address=gpa)

    def touch(self, gpa: int, *, write: bool = False, execute: bool = False, actor: int = 0) -> Result:
        """Guest access: RET_PF_FIXED or RET_PF_SPURIOUS with the leaf level, RETRY, EMULATE, -EFAULT, -ENOMEM.

        EMULATE is an exit to userspace as MMIO: no slot, or a write to a read-only one. -EFAULT is a memory fault
        exit: nothing in the process's memory that the access may use, or memory of the other kind.
        """
        flags = (Flag.WRITE if write else 0) | (Flag.EXEC if execute else 0)
        return self.machine.operate(Operation.GUEST_FAULT, flags=flags, actor=actor, vm=self.vm, address=gpa)

    def touch_many(self, gpas: Iterable[int] | Array, *, write: bool = False) -> Results:
        """Guest accesses to `gpas` (uint64[n]), in order."""
        addresses = gpas if isinstance(gpas, np.ndarray | Sequence) else list(gpas)
        header = np.uint64(Operation.GUEST_FAULT | (Flag.WRITE if write else 0) << 8 | self.vm << 32)
        return self.machine.run_columns(header, 0, addresses, count=len(addresses))

    def walk(self, gpa: int) -> list[tuple[int, int, int]]:
        """[(level, entry address, entry)] of a guest physical address."""
        return self.machine.walk(self.root, gpa >> 12)

    def translate(self, gpas: Array, kinds: Kind | Array | None = None, access: Access | None = None) -> Translation:
        """Translate guest physical addresses (uint64[n]) through stage 2; see pgemu.translation.translate."""
        from pgemu.translation import translate

        return translate(self.machine, self.machine.register(L.R_STAGE2_FORMAT), self.root, gpas, kinds, access)

    def translate_virtual(
        self, guest_root: int, addresses: Array, kinds: Kind | Array, access: Access | None = None
    ) -> NestedTranslation:
        """Translate a guest's virtual addresses (uint64[n]) through its x86-64 tables and stage 2.

        `guest_root`: guest physical address of its top table; see pgemu.translation.translate_nested.
        """
        from pgemu.translation import translate_nested

        stage2 = self.machine.register(L.R_STAGE2_FORMAT)
        return translate_nested(self.machine, HOST_X86_64, guest_root, stage2, self.root, addresses, kinds, access)

    # ------------------------------------------------------------------ looking

    def stage2(self) -> Stage2:
        """The stage-2 tree as it stands, read from the tables; no root before the first run, or after a drop of it."""
        from pgemu.stage2 import read_stage2

        tree = read_stage2(self.machine, self.root)
        if self._field(L.V_UNLOADED) and not len(tree.tables):
            return read_stage2(self.machine, 0)
        return tree

    def leaves(self) -> tuple[int, int, int]:
        """Leaves of 4K, 2M and 1G: KVM's pages_4k, pages_2m, pages_1g."""
        return self.stage2().leaf_counts()

    @property
    def table_pages(self) -> int:
        """Stage-2 table pages but the root: KVM's part of nr_sec_page_table_pages."""
        return len(self.stage2().tables)
