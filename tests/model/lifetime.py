"""Holes, the release of a VM's file, the end of an inode, and the worker."""

from __future__ import annotations

from model.folio import Folio
from model.machine import State
from model.outcome import OK, Outcome
from model.parameters import PAGE
from model.tables import common
from pgemu_kernels import words as W


class Lifetime(State):
    """How memory leaves an inode."""

    def punch_hole(self, inode: int, offset: int, length: int) -> Outcome:
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-W.EBADF)
        unit = self.parameters.page_size if self.parameters.punch == "refuse" else PAGE
        if (offset | length) % unit or not length:
            return Outcome(-W.EINVAL)
        pages = range(offset // PAGE, min((offset + length) // PAGE, node.pages))
        if not pages:
            return OK
        if not self.restructure:  # truncation would leave special entries alone
            size = self.block_pages
            whole = range(-(-pages.start // size) * size, pages.stop // size * size)
            if whole:
                self.unmap_file(inode, whole)
        if not self.split_private(inode, pages):
            return Outcome(-W.ENOMEM)
        self.zap_file(inode, pages)
        for number in self.blocks_of(pages):
            block = self.block_of(number << self.order)
            folio = node.blocks.get(number)
            if folio is None:
                continue
            part = common(block, pages)
            if part != block:
                self.memory.zero_part(folio, range(part.start - block.start, part.stop - block.start))
                continue
            if not folio.whole or not self.order:
                self.unmap_file(inode, block)
            if not folio.whole and not folio.idle:
                return Outcome(-W.EAGAIN, block.start * PAGE)  # cannot be merged
            self.memory.uncache(node.blocks.pop(number))
            node.unassign(block)
        return OK

    def release(self, vm: int, inode: int) -> Outcome:
        """The VM's file is closed, and released unless its process holds it by mappings; the inode's memory stays."""
        slots = [s for s in self.slots if s.owner == vm and s.inode == inode and not s.released]
        if all(slot.closed for slot in slots):
            return Outcome(-W.EBADF)
        for slot in slots:
            slot.closed = True
            if not self.is_mapped(slot):
                self.release_slot(slot)
        return OK

    def close(self, inode: int) -> Outcome:
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-W.EBADF)
        self.remove_vmas([(v, v.pages) for v in self.vmas if v.inode == inode])
        for slot in [s for s in self.slots if s.inode == inode]:
            self.delete_slot(slot)
        self.spins = [spin for spin in self.spins if spin.unit.inode != inode]
        for number in sorted(node.blocks):
            self.memory.uncache(node.blocks.pop(number), evicted=True)
            node.unassign(self.block_of(number << self.order))
        node.open = False
        return OK

    def work(self) -> Outcome:
        """The worker: returns what nobody refers to any more, merges what waits, is idle and all private."""
        done = 0
        for folio in sorted(self.memory.in_use.values(), key=lambda folio: folio.place):
            if folio.ready:
                self.memory.give_back(folio)
                done += 1
            elif self.parameters.merge == "lazy" and folio.waits and folio.idle and self.is_private(folio):
                self.memory.merge(folio, keep=True)
                done += 1
        return Outcome(0, done)

    def is_private(self, folio: Folio) -> bool:
        """Whether no page of a huge page in use is shared."""
        inode, block = folio.place
        return self.inodes[inode].shared.isdisjoint(self.block_of(block << self.order))
