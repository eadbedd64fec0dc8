"""guest_memfd inodes of the two designs: over HugeTLB pages, or over 4K pages of the page allocator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pgemu.machine.arguments import OfMachine, argument, guards_creation, plain
from pgemu.machine.arrays import Integers
from pgemu.machine.core import run_one
from pgemu.machine.field_rules import amount, checked, choice, number_of
from pgemu.machine.results import Result, Results
from pgemu.machine.rows import next_row
from pgemu.objects.creation import (
    CreateFlags as CreateFlags,
    Creation as Creation,
    Form as Form,
    Rfc2Flags as Rfc2Flags,
    Stat as Stat,
    check_creation as check_creation,
    usual_flags,
)
from pgemu.objects.failures import MemoryFailure, fail_page
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.objects.numa import MemoryPolicy
    from pgemu.objects.stale import StaleEntry, StaleMapping

__all__ = ("CreateFlags", "GuestMemfd", "Rfc2Flags", "Stat", "check_creation", "node_mask", "policy_mode")

# Flag's members take as long to look up as the rest of a call.
_CONVERT, _SHARED, _PRIVATE = Operation.CONVERT, int(Flag.SHARED), int(Flag.PRIVATE)
POLICIES = {
    "default": W.MPOL_DEFAULT, "preferred": W.MPOL_PREFERRED, "bind": W.MPOL_BIND, "interleave": W.MPOL_INTERLEAVE,
}  # fmt: skip
FALLOC_FL_KEEP_SIZE = 1  # include/uapi/linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 2


_MODE = {"mode": choice(POLICIES)}
_MODE_NUMBER = {"mode": amount(0, 255, f"one of {', '.join(POLICIES)}, or an integer from 0 to 255")}


def policy_mode(mode: str | int) -> int:
    """MPOL_* of a name; numbers as they are, for the kernel to refuse. ValueError for another name."""
    return POLICIES[checked("mode", mode, _MODE)] if isinstance(mode, str) else int(checked("mode", mode, _MODE_NUMBER))


def node_mask(nodes: Iterable[int]) -> int:
    """A bit per node. ValueError for a number that has no bit in 64."""
    return sum(1 << node for node in {int(node) for node in argument("nodes", nodes, "Iterable[int]")})


@guards_creation(inode=number_of("a file", W.INODES))
@dataclass(frozen=True)
class GuestMemfd(OfMachine, but=("convert",), signed=("fallocate",)):
    """A guest_memfd inode over the machine's guest memory. virt/kvm/guest_memfd.c

    >>> machine = Machine(Config("restructure", pool=8 << 20, page_size=2 << 20))
    >>> gmem, vm = machine.create_guest_memfd(4 << 20), machine.create_vm(protected=True)
    >>> vm.bind(gmem, gpa=0).name, vm.touch(0x1000).detail
    ('ok', 2)
    >>> gmem.convert(0x1000, 4096, shared=True).name, gmem.is_split(0x1000)
    ('ok', True)
    """

    machine: Core = field(repr=False)
    inode: int
    size: int
    form: Form = "main"

    def __post_init__(self) -> None:
        """An inode has a row."""
        if self._field(W.I_KIND) != W.INODE_GUEST_MEMFD or self.size != self._field(W.I_PAGES) << 12:
            raise ValueError(f"inode {self.inode} and size {self.size}: expected those of a GuestMemfd")

    @classmethod
    def create(
        cls, machine: Core, size: int, shared: bool, flags: int | None, form: Form, page_order: int
    ) -> GuestMemfd:
        """See Machine.create_guest_memfd.

        >>> GuestMemfd.create(machine, 2 << 20, True, None, "main", 0).size
        2097152
        """
        config = machine.config
        if flags is None:
            flags, page_order = usual_flags(config, shared, form)
        elif shared:
            raise ValueError(f"shared True with flags {flags:#x}: expected to be told by the flags")
        creation = check_creation(config, size, flags, form, page_order)
        inode = next_row(machine, W.R_INODES, W.INODES, "inodes")
        state = machine.arrays.state
        blocks = size // config.page_size
        used = machine.register(W.R_BLOCKS)
        if config.page_order and not config.pool_pages:
            raise OSError(W.ENOMEM, f"{blocks} huge pages: a machine with Config(pool=0) cannot reserve any")
        if used + blocks > 4 * config.pool_pages:
            raise OSError(W.ENOSPC, "inodes, closed ones included, of more than four times the pool")
        subpool = cls._reserve(machine, blocks) if config.page_order else 0
        pages = size >> 12
        words, pmds, puds = ((pages + unit - 1) // unit for unit in (64, 512, 1 << 18))
        first = machine.register(W.R_WORDS)
        counts = machine.register(W.R_SHARED) + machine.register(W.R_SHARED_USED)
        row = int(W.STATE_INODES) + inode * W.I_WORDS
        fields = {
            W.I_PAGES: pages,
            W.I_BLOCK: machine.register(W.R_BLOCK_ROWS) + used * W.B_WORDS,
            W.I_BLOCKS: blocks,
            W.I_WORD: machine.register(W.R_WORD_ROWS) + first,
            W.I_ZEROED: machine.register(W.R_ZEROED_ROWS) + first,
            W.I_PMD: counts,
            W.I_PUD: counts + pmds,
            W.I_REGIONS: machine.register(W.R_REGIONS) + machine.register(W.R_REGIONS_USED),
            W.I_GIGABYTES: machine.register(W.R_REGIONS) + machine.register(W.R_REGIONS_USED) + pmds,
            W.I_GUEST_BITS: machine.register(W.R_GUEST_BITS) + first,
            W.I_ASSIGNED: machine.register(W.R_ASSIGNED) + first,
            W.I_ASSIGNED_2M: machine.register(W.R_ASSIGNED_2M) + machine.register(W.R_REGIONS_USED),
            W.I_OPEN: 1,
            W.I_SUBPOOL: subpool,
            W.I_FLAGS: cls._inode_flags(creation, form),
        }
        for name, value in fields.items():
            state[row + int(name)] = value
        if subpool:
            cls._count_subpool(machine, subpool - 1, blocks)
        state[W.R_BLOCKS] += np.uint64(blocks)
        state[W.R_WORDS] += np.uint64(words)
        state[W.R_SHARED_USED] += np.uint64(pmds + puds)
        state[W.R_REGIONS_USED] += np.uint64(pmds + puds)
        state[W.R_INODES] += np.uint64(1)
        if creation.shared:
            cls._share_all(machine, fields)
        return cls(machine, inode, size, form)

    @staticmethod
    def _inode_flags(creation: Creation, form: Form) -> int:
        flags = int(W.INODE_MMAP) if creation.mappable else 0
        flags |= int(W.INODE_INIT_SHARED) if creation.shared else 0
        flags |= int(W.INODE_WHOLE_MAPPINGS) if form == "rfc2" and creation.huge else 0
        return flags | (int(W.INODE_BIND_COMMITS) if form == "next" else 0)

    @staticmethod
    def _reserve(machine: Core, blocks: int) -> int:
        """Row + 1 of the next subpool, with the blocks reserved in the pool.

        OSError ENOMEM if the pool cannot reserve them, ENOSPC past SUBPOOLS.
        """
        subpool = next_row(machine, W.R_SUBPOOLS, W.SUBPOOLS, "subpools")
        hstate = machine.register(W.R_HSTATE)
        state = machine.arrays.state
        if int(state[hstate + int(W.H_RESERVED)]) + blocks <= int(state[hstate + int(W.H_FREE)]):
            state[hstate + int(W.H_RESERVED)] += np.uint64(blocks)
        elif machine.operate(Operation.POOL_RESERVE, object_=machine.config.page_order, length=blocks).status:
            raise OSError(W.ENOMEM, f"{blocks} huge pages: the pool cannot reserve that many")
        return subpool + 1

    @staticmethod
    def _count_subpool(machine: Core, subpool: int, blocks: int) -> None:
        """mm/hugetlb.c:hugepage_new_subpool(): of the inode's size, all of it reserved at once."""
        state = machine.arrays.state
        hstate = machine.register(W.R_HSTATE)
        row = int(W.STATE_SUBPOOLS) + subpool * W.P_WORDS
        reservation = {W.P_LIVE: 1, W.P_HSTATE: hstate, W.P_MAX: blocks, W.P_MIN: blocks, W.P_RESERVED: blocks}
        for name, value in reservation.items():
            state[row + int(name)] = value
        state[W.R_SUBPOOLS] += np.uint64(1)

    @staticmethod
    def _share_all(machine: Core, fields: dict[np.uint64, int]) -> None:
        pages = fields[W.I_PAGES]
        word = fields[W.I_WORD]
        machine.arrays.state[word : word + pages // 64] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        if pages % 64:
            machine.arrays.state[word + pages // 64] = np.uint64((1 << pages % 64) - 1)
        pmd = fields[W.I_PMD]
        machine.arrays.counts[pmd : pmd + pages // 512] = 512
        if pages % 512:
            machine.arrays.counts[pmd + pages // 512] = pages % 512
        for i, first in enumerate(range(0, pages, 1 << 18)):
            machine.arrays.counts[fields[W.I_PUD] + i] = min(1 << 18, pages - first)

    def convert(self, offset: int, length: int, *, shared: bool, actor: int = 0, vm: int = 0) -> Result:
        """Make [offset, offset + length) shared or private: 0, -EAGAIN or -ENOMEM with the failing offset, -EINVAL.

        vm: the number of the VM whose file of the inode is asked. -EINVAL, too, if it has one and knows no private
        memory (Machine.create_vm); the number of no VM is that of a file which none has bound.

        >>> gmem.convert(0x1000, 4096, shared=False).name, gmem.is_split(0x1000)  # merged
        ('ok', False)
        """
        if (
            type(offset) is not int or type(length) is not int or type(actor) is not int or type(vm) is not int
            or offset >> 64 or length >> 64 or actor or vm or type(shared) is not bool
        ):  # fmt: skip
            given = {"offset": offset, "length": length, "shared": shared, "actor": actor, "vm": vm}
            offset, length, shared, actor, vm = plain(GuestMemfd.convert, self, **given)
        flags = _SHARED if shared else _PRIVATE
        return run_one(self.machine, _CONVERT, flags, actor, vm, 0, self.inode, 0, offset, length)

    def convert_many(self, offsets: Integers, length: int = W.PAGE_4K, *, shared: bool) -> Results:
        """Convert `length` bytes at each of `offsets` (uint64[n]), in order.

        >>> gmem.convert_many([0x2000, 0x5000], shared=True).outcomes
        {'ok': 2}
        """
        header = np.uint64(Operation.CONVERT | (Flag.SHARED if shared else Flag.PRIVATE) << 8)
        return self.machine.run_columns(header, self.inode, 0, offsets, length, count=len(offsets))

    def punch_hole(self, offset: int, length: int) -> Result:
        """fallocate(FALLOC_FL_PUNCH_HOLE) of [offset, offset + length): whole huge pages are freed, parts zeroed.

        0; -EBADF once closed; -EINVAL for what is not aligned to 4K (Config.punch "refuse": to the huge page);
        -EAGAIN (restructure) with the offset of a split huge page of which somebody holds a piece, those before it
        gone; -EBUSY where Linux would wait for the lock. pgemu_kernels.gmem.truncation.punch()

        >>> gmem.punch_hole(0x20_0000, 0x20_0000).name
        'ok'
        """
        return self.machine.operate(Operation.PUNCH_HOLE, object_=self.inode, offset=offset, length=length)

    def punch_hole_many(self, offsets: Integers, length: int) -> Results:
        """Punch a hole of `length` bytes at each of `offsets` (uint64[n]), in order.

        >>> gmem.punch_hole_many([0x20_0000], 0x20_0000).names
        ['ok']
        """
        return self.machine.run_columns(
            np.uint64(Operation.PUNCH_HOLE), self.inode, 0, offsets, length, count=len(offsets)
        )

    def allocate(self, offset: int, length: int) -> Result:
        """Have memory under [offset, offset + length), both rounded down to huge pages; nothing is zeroed or mapped.

        fallocate(FALLOC_FL_KEEP_SIZE). 0; -ENOMEM with the offset of the first huge page without memory, those before
        it stay; -EINVAL if empty, not aligned to 4K, or beyond the end; -EBADF; -EBUSY where Linux would wait.

        >>> gmem.allocate(0, 4 << 20).name, gmem.stat().st_blocks
        ('ok', 0)
        """
        return self.machine.operate(Operation.ALLOCATE, object_=self.inode, offset=offset, length=length)

    def fallocate(self, mode: int, offset: int, length: int) -> Result:
        """fallocate() with FALLOC_FL_* bits: `allocate` or `punch_hole`; -EOPNOTSUPP for other modes, -EINVAL.

        virt/kvm/guest_memfd.c:kvm_gmem_fallocate(); an empty or negative range is refused before (vfs_fallocate()).

        >>> gmem.fallocate(3, 0x20_0000, 0x20_0000).name  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        'ok'
        """
        if offset < 0 or length <= 0:
            return Result(-W.EINVAL, 0)
        if not mode & FALLOC_FL_KEEP_SIZE or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            return Result(-W.EOPNOTSUPP, 0)
        return self.punch_hole(offset, length) if mode & FALLOC_FL_PUNCH_HOLE else self.allocate(offset, length)

    def mbind(self, offset: int, length: int, mode: str | int, nodes: Iterable[int] = ()) -> Result:
        """mbind() of a mapping of [offset, offset + length): the NUMA policy of memory allocated there from now on.

        mode: "default" (the faulting task's), "preferred", "bind", "interleave", or a number. 0; -EINVAL for another
        number, nodes that do not exist, nodes with default or none with bind and interleave, a range that is empty or
        not aligned; -EBADF; -ENOMEM past words.POLICIES ranges. mm/mempolicy.c. Split form rfc2 does not ask for it.

        >>> gmem.mbind(0, 4 << 20, "bind", [0]).name
        'ok'
        """
        return self.machine.operate(
            Operation.MEMORY_POLICY,
            flags=policy_mode(mode),
            object_=self.inode,
            address=node_mask(nodes),
            offset=offset,
            length=length,
        )

    def mempolicy(self, offset: int) -> MemoryPolicy:
        """get_mempolicy(MPOL_F_ADDR) at a mapping of the page at `offset`: what mbind() gave it, else "default".

        The task's policy is not asked, so that "default" is told apart: virt/kvm/guest_memfd.c:kvm_gmem_get_policy().
        ValueError outside the inode.

        >>> gmem.mempolicy(0)
        MemoryPolicy(mode='default', nodes=())
        """
        from pgemu.objects.numa import policy_at

        self._check(offset)
        return policy_at(self.machine, self.inode, offset)

    def pread(self, length: int, offset: int) -> Result:
        """pread() of the file, and read(): -EINVAL, as it has no read_iter; -EBADF once closed. fs/read_write.c

        >>> gmem.pread(16, 0).name
        '-EINVAL'
        """
        return self._refuse_io()

    def pwrite(self, data: bytes, offset: int) -> Result:
        """pwrite() of the file, and write(): -EINVAL, as it has no write_iter; -EBADF once closed. fs/read_write.c

        >>> gmem.pwrite(b"hello", 0x1000).name
        '-EINVAL'
        """
        return self._refuse_io()

    def _refuse_io(self) -> Result:
        """vfs_read() and vfs_write() of a file without FMODE_CAN_READ and FMODE_CAN_WRITE, whatever is asked for."""
        return Result(-W.EINVAL if self._field(W.I_OPEN) else -W.EBADF, 0)

    def stat(self) -> Stat:
        """fstat().

        >>> gmem.stat()
        Stat(st_ino=1, st_size=4194304, st_blksize=4096, st_blocks=0)
        """
        used = 0
        if self.form in ("rfc2", "wip"):
            rows = self._field(W.I_BLOCK) + np.arange(self._field(W.I_BLOCKS)) * W.B_WORDS + int(W.B_STATE)
            states = self.machine.arrays.state[rows]
            used = int(np.count_nonzero((states != W.BLOCK_ABSENT) & (states != W.BLOCK_ZOMBIE)))
        return Stat(self.inode + 1, self.size, W.PAGE_4K, used * self.machine.config.page_size // 512)

    def memory_failure(self, offset: int, *, hardware: bool = False, early_kill: bool = False) -> MemoryFailure:
        """Machine.memory_failure() of the page at an offset. -ENOENT where none is allocated, -EINVAL past the end.

        >>> gmem.memory_failure(0x1000).status
        -16
        """
        return fail_page(self.machine, self.inode, offset, hardware, early_kill)

    def get_reference(self, offset: int) -> Result:
        """Take a transient reference on the folio at `offset`: 0 with the page's frame number, or -ENOENT.

        >>> gmem.get_reference(0x1000).name, gmem.convert(0x1000, 4096, shared=False).name
        ('ok', '-EAGAIN')
        """
        return self.machine.operate(Operation.GET, object_=self.inode, offset=offset)

    def put_reference(self, pfn: int) -> Result:
        """Drop a transient reference by frame number: 0, or -ENOENT where there is none.

        References of pins, LRU batches and faults under way are not dropped.

        >>> pfn = gmem.get_reference(0x1000).detail
        >>> gmem.put_reference(pfn).name, gmem.outstanding(0x1000)
        ('ok', 0)
        """
        return self.machine.operate(Operation.PUT, object_=self.inode, address=pfn << 12)

    def get_reference_many(self, offsets: Integers) -> Results:
        """Take a transient reference on the folio at each of `offsets` (uint64[n]), in order.

        >>> gmem.get_reference_many([0x1000, 0x1000]).outcomes, gmem.outstanding(0x1000)
        ({'ok': 2}, 0)
        """
        return self.machine.run_columns(np.uint64(Operation.GET), self.inode, 0, offsets, count=len(offsets))

    def put_reference_many(self, pfns: Integers) -> Results:
        """Drop a transient reference of each of the frames `pfns` (uint64[n]), in order.

        >>> pfns = gmem.get_reference_many([0x1000, 0x1000]).detail
        >>> gmem.put_reference_many(pfns).outcomes
        {'ok': 2}
        """
        addresses = np.asarray(pfns, np.uint64) << np.uint64(12)
        return self.machine.run_columns(np.uint64(Operation.PUT), self.inode, addresses, count=len(addresses))

    def close(self) -> Result:
        """The VMM goes: mappings and slots of the inode, then the inode and its pages. 0, -EBADF, or -EBUSY.

        What somebody still holds comes back to the pool later: a whole huge page with its last reference, a split one
        as a zombie block through the worker, when nobody holds any of its pieces (`outstanding`). Split form rfc2 sends
        all split ones through the worker. pgemu_kernels.gmem.truncation.close()

        >>> gmem.close().name, vm.touch(0x1000).name
        ('ok', 'RET_PF_EMULATE')
        """
        return self.machine.operate(Operation.CLOSE, object_=self.inode)

    def outstanding(self, offset: int) -> int:
        """4K pages of the zombie block at `offset` that somebody holds since the inode was closed; 0 of other blocks.

        ValueError outside the inode.

        >>> gmem.get_reference(0).name, gmem.outstanding(0)
        ('ok', 0)
        """
        return self._block(offset, W.B_OUTSTANDING)

    def stale_entries(self) -> list[StaleEntry]:
        """Entries of processes to frames that are not, or no longer, the inode's page there: none on a sound machine.

        In order of mappings and addresses. With the defect "punch-keeps-entries" a hole leaves them behind.

        >>> gmem.stale_entries()
        []
        """
        from pgemu.objects.stale import stale_entries

        return stale_entries(self.machine, self.inode)

    def stale_mappings(self) -> list[StaleMapping]:
        """Pages of the inode that KVM itself maps (Vm.map_page, Vm.pfn_cache) and may not use: private by now, or gone.

        In order of their numbers. With Config.allow_unsafe_mappings, and before Linux 6.13, pfnmap leaves them behind;
        check() counts them as STALE_MAPPING, accesses by them as MAPPED_STALE_PRIVATE and MAPPED_STALE_FREED.

        >>> gmem.stale_mappings()
        []
        """
        from pgemu.objects.stale import stale_mappings

        return stale_mappings(self.machine, self.inode, self.is_shared)

    def _field(self, name: np.uint64) -> int:
        """A word of the inode's row."""
        return int(self.machine.arrays.state[int(W.STATE_INODES) + self.inode * W.I_WORDS + int(name)])

    def _check(self, offset: int) -> None:
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset:#x}: expected to lie within {self.size:#x}")

    def _block(self, offset: int, name: np.uint64) -> int:
        """A word of the row of the huge page at `offset`. ValueError outside the inode."""
        self._check(offset)
        block = self._field(W.I_BLOCK) + (offset // self.machine.config.page_size) * W.B_WORDS
        return int(self.machine.arrays.state[block + int(name)])

    def pfn(self, offset: int) -> int | None:
        """Frame number of the page at `offset`, or None while nothing is allocated there.

        >>> gmem.pfn(0x1000) - gmem.pfn(0), gmem.pfn(0x20_0000)
        (1, None)
        """
        head = self._block(offset, W.B_PFN)
        return head + (offset % self.machine.config.page_size >> 12) if head else None

    def is_split(self, offset: int) -> bool:
        """Whether the huge page at `offset` is split to 4K folios.

        >>> gmem.is_split(0x1000), gmem.is_split(0x20_0000)
        (True, False)
        """
        return self._block(offset, W.B_STATE) == int(W.BLOCK_SPLIT)

    def is_shared(self, offset: int) -> bool:
        """Shareability of the page at `offset`. ValueError outside the inode.

        >>> gmem.is_shared(0x1000), gmem.is_shared(0x2000)
        (True, False)
        """
        self._check(offset)
        index = offset >> 12
        return bool(int(self.machine.arrays.state[self._field(W.I_WORD) + (index >> 6)]) >> (index & 63) & 1)
