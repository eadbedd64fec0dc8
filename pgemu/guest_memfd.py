"""guest_memfd inodes over HugeTLB pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.rows import next_row
from pgemu_kernels import layout as L
from pgemu_kernels.layout import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine import Machine, Result, Results
    from pgemu.stale import StaleEntry
    from pgemu.vm import Vm

Array = np.ndarray[Any, Any]


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
        inode = next_row(machine, L.R_INODES, L.INODES, "inodes")
        state = machine.arrays.state
        blocks = size // config.page_size
        used = machine.register(L.R_BLOCKS)
        subpool = next_row(machine, L.R_SUBPOOLS, L.SUBPOOLS, "subpools")
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
        """fallocate(FALLOC_FL_PUNCH_HOLE) of [offset, offset + length): whole huge pages are freed, parts zeroed.

        0; -EBADF once closed; -EINVAL for what is not aligned to 4K (Config.punch "refuse": to the huge page);
        -EAGAIN (restructure) with the offset of a split huge page of which somebody holds a piece, those before it
        gone; -EBUSY where Linux would wait for the lock. pgemu_kernels.lifetime.punch()
        """
        return self.machine.operate(Operation.PUNCH_HOLE, object_=self.inode, offset=offset, length=length)

    def punch_hole_many(self, offsets: Array, length: int) -> Results:
        """Punch a hole of `length` bytes at each of `offsets` (uint64[n]), in order."""
        return self.machine.run_columns(
            np.uint64(Operation.PUNCH_HOLE), self.inode, 0, offsets, length, count=len(offsets)
        )

    def get_reference(self, offset: int) -> Result:
        """Take a transient reference on the folio at `offset`: 0 with the page's frame number, or -ENOENT."""
        return self.machine.operate(Operation.GET, object_=self.inode, offset=offset)

    def put_reference(self, pfn: int) -> Result:
        """Drop a transient reference by frame number: 0, or -ENOENT where there is none.

        References of pins, LRU batches and faults under way are not dropped.
        """
        return self.machine.operate(Operation.PUT, object_=self.inode, address=pfn << 12)

    def get_reference_many(self, offsets: Array) -> Results:
        """Take a transient reference on the folio at each of `offsets` (uint64[n]), in order."""
        return self.machine.run_columns(np.uint64(Operation.GET), self.inode, 0, offsets, count=len(offsets))

    def put_reference_many(self, pfns: Array) -> Results:
        """Drop a transient reference of each of the frames `pfns` (uint64[n]), in order."""
        addresses = np.asarray(pfns, np.uint64) << np.uint64(12)
        return self.machine.run_columns(np.uint64(Operation.PUT), self.inode, addresses, count=len(addresses))

    def release(self, vm: Vm) -> Result:
        """The VM's guest_memfd file of the inode is closed: 0, -EBADF if it has no slot of it, -EBUSY.

        Its slots stay where they are, without memory: a guest access there is -EFAULT until Vm.unbind(). The memory is
        the inode's and stays; Vm.bind() at other guest addresses opens a new file. virt/kvm/guest_memfd.c:
        kvm_gmem_release(), pgemu_kernels.lifetime.release()
        """
        return self.machine.operate(Operation.RELEASE, vm=vm.vm, object_=self.inode)

    def close(self) -> Result:
        """The VMM goes: mappings and slots of the inode, then the inode and its pages. 0, -EBADF, or -EBUSY.

        What somebody still holds comes back to the pool later: a whole huge page with its last reference, a split one
        as a zombie block through the worker, when nobody holds any of its pieces (`outstanding`). Series rfc2 sends all
        split ones through the worker. pgemu_kernels.lifetime.close()
        """
        return self.machine.operate(Operation.CLOSE, object_=self.inode)

    def outstanding(self, offset: int) -> int:
        """4K pages of the zombie block at `offset` that somebody holds since the inode was closed; 0 of other blocks.

        ValueError outside the inode.
        """
        return self._block(offset, L.B_OUTSTANDING)

    def stale_entries(self) -> list[StaleEntry]:
        """Entries of processes to frames that are not, or no longer, the inode's page there: none on a sound machine.

        In order of mappings and addresses. With the defect "punch-keeps-entries" a hole leaves them behind.
        """
        from pgemu.stale import stale_entries

        return stale_entries(self)

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
