"""Objects over a machine's rows: guest_memfd inodes, processes, virtual machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu_kernels import layout as L
from pgemu_kernels.layout import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine import Machine, Result, Results
    from pgemu.stage2 import Stage2

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
        if blocks > cls._unreserved(machine):
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
        }
        for name, value in fields.items():
            state[row + int(name)] = value
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

    @staticmethod
    def _unreserved(machine: Machine) -> int:
        """Huge pages of the pool that no open inode has reserved and no zombie holds back."""
        state = machine.arrays.state
        rows = [int(L.STATE_INODES) + i * L.I_WORDS for i in range(machine.register(L.R_INODES))]
        reserved = sum(int(state[r + int(L.I_BLOCKS)]) for r in rows if state[r + int(L.I_OPEN)])
        return machine.config.pool_pages - reserved - machine.statistics.gauge(L.Gauge.BLOCKS_ZOMBIE)

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


@dataclass(frozen=True)
class AddressSpace:
    """A process: its page tables and its mappings of guest_memfd inodes."""

    machine: Machine
    space: int

    @classmethod
    def create(cls, machine: Machine) -> AddressSpace:
        """See Machine.create_process."""
        from pgemu_kernels.boot import new_root

        space = _row(machine, L.R_SPACES, L.SPACES, "processes")
        row = int(L.STATE_SPACES) + space * L.S_WORDS
        if new_root(machine.descriptor, np.uint64(row), False) != 0:
            raise OSError(L.ENOMEM, "no frame for a top table")
        machine.arrays.state[L.R_SPACES] += np.uint64(1)
        return cls(machine, space)

    @property
    def root(self) -> int:
        """Physical address of the top table."""
        return int(self.machine.arrays.state[int(L.STATE_SPACES) + self.space * L.S_WORDS + int(L.S_ROOT)])

    def mmap(
        self, gmem: GuestMemfd, address: int, *, offset: int = 0, length: int | None = None, read_only: bool = False
    ) -> Result:
        """mmap(MAP_SHARED) of the inode at a fixed address: 0, -EEXIST, -EINVAL, -EBADF."""
        return self.machine.operate(
            Operation.MMAP,
            flags=Flag.READ_ONLY if read_only else 0,
            space=self.space,
            object_=gmem.inode,
            address=address,
            offset=offset,
            length=gmem.size - offset if length is None else length,
        )

    def munmap(self, address: int, length: int) -> Result:
        """munmap(): 0, -EINVAL, -ENOMEM."""
        return self.machine.operate(Operation.MUNMAP, space=self.space, address=address, length=length)

    def zap(self, address: int, length: int, *, madvise: bool = False) -> Result:
        """Clear the entries of a range; with `madvise` as MADV_DONTNEED, which VM_PFNMAP refuses (-EINVAL)."""
        flags = Flag.MADVISE if madvise else 0
        return self.machine.operate(Operation.ZAP, flags=flags, space=self.space, address=address, length=length)

    def zap_many(self, addresses: Array, length: int = L.PAGE_4K) -> Results:
        """Zap `length` bytes at each of `addresses` (uint64[n]), in order."""
        header = np.uint64(Operation.ZAP | self.space << 48)
        return self.machine.run_columns(header, 0, addresses, 0, length, count=len(addresses))

    def touch(self, address: int, *, write: bool = False) -> Result:
        """Fault in the page at `address`: VM_FAULT_LOCKED or VM_FAULT_NOPAGE, 0 if present, SIGBUS, SIGSEGV, OOM."""
        flags = Flag.WRITE if write else 0
        return self.machine.operate(Operation.HOST_FAULT, flags=flags, space=self.space, address=address)

    def touch_many(self, addresses: Array, *, write: bool = False) -> Results:
        """Fault in the pages at `addresses` (uint64[n]), in order."""
        flags = Flag.WRITE if write else 0
        header = np.uint64(Operation.HOST_FAULT | flags << 8 | self.space << 48)
        return self.machine.run_columns(header, 0, addresses, count=len(addresses))

    def walk(self, address: int) -> list[tuple[int, int, int]]:
        """[(level, entry address, entry)] of a virtual address."""
        return self.machine.walk(self.root, address >> 12)


@dataclass(frozen=True)
class Vm:
    """A virtual machine: its stage-2 tables and its memory slots."""

    machine: Machine
    vm: int

    @classmethod
    def create(cls, machine: Machine, process: AddressSpace | None, protected: bool) -> Vm:
        """See Machine.create_vm."""
        from pgemu_kernels.boot import new_root

        vm = _row(machine, L.R_VMS, L.VMS, "VMs")
        row = int(L.STATE_VMS) + vm * L.V_WORDS
        if new_root(machine.descriptor, np.uint64(row), True) != 0:
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
        gmem: GuestMemfd | None = None,
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
        addresses = np.asarray(gpas, dtype=np.uint64)
        header = np.uint64(Operation.GUEST_FAULT | (Flag.WRITE if write else 0) << 8 | self.vm << 32)
        return self.machine.run_columns(header, 0, addresses, count=len(addresses))

    def walk(self, gpa: int) -> list[tuple[int, int, int]]:
        """[(level, entry address, entry)] of a guest physical address."""
        return self.machine.walk(self.root, gpa >> 12)

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
