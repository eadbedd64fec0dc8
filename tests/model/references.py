"""References that are neither the page cache's nor a mapping's: transient ones, pins, LRU batches."""

from __future__ import annotations

from typing import ClassVar

from model.faults import Faults
from model.outcome import OK, Outcome
from model.parameters import PAGE
from pgemu_kernels import words as W

PINS = 256
TREE_NODE = 512  # frames that one node of a pin's list holds


class References(Faults):
    """GET and PUT, PIN and UNPIN, the draining of LRU caches."""

    FAULT_ERRORS: ClassVar = {W.VM_FAULT_SIGBUS: -W.EFAULT, W.VM_FAULT_HWPOISON: -W.EFAULT, W.VM_FAULT_OOM: -W.ENOMEM}

    def get(self, inode: int, offset: int) -> Outcome:
        if not self.inodes[inode].open:
            return Outcome(-W.EBADF)
        pfn = self.pfn(inode, offset // PAGE)
        if pfn is None:
            return Outcome(-W.ENOENT)
        folio = self.memory.folio_of(pfn)
        assert folio is not None
        folio.held[folio.unit(pfn)] += 1
        return Outcome(0, pfn)

    def put(self, pfn: int) -> Outcome:
        """Only what `get` took: not what pins, LRU batches or faults hold."""
        folio = self.memory.folio_of(pfn)
        if folio is None or not folio.held[folio.unit(pfn)]:
            return Outcome(-W.ENOENT)
        folio.held[folio.unit(pfn)] -= 1
        self.memory.dropped(folio)
        return OK

    def pin(self, space: int, address: int, length: int, pin: int, write: bool) -> Outcome:
        """pin_user_pages(), page by page up to the first that fails: how many, if any."""
        if (address | length) % PAGE or not length or pin >= PINS:
            return Outcome(-W.EINVAL)
        if pin in self.pins:
            return Outcome(-W.EEXIST)
        frames = self.pins[pin] = []
        error = 0
        for page in range(address // PAGE, (address + length) // PAGE):
            error = self.pin_page(space, page, write)
            # Node by node the list of frames grows; a second one has a node above both.
            new = {0: 1, TREE_NODE: 2}.get(len(frames), int(len(frames) % TREE_NODE == 0))
            if not error and not self.memory.frames.take(new):
                error = -W.ENOMEM
            if error:
                break
            entry = self.spaces[space].entries[page]
            folio = self.memory.folio_of(entry.pfn)
            assert folio is not None
            frames.append((folio, folio.unit(entry.pfn)))
            folio.pinned[frames[-1][1]] += 1
        if frames:
            return Outcome(0, len(frames))
        del self.pins[pin]
        return Outcome(error)

    def pin_page(self, space: int, page: int, write: bool) -> int:
        """What of a page keeps it from being pinned: check_vma_flags(), faultin_page(); 0: nothing."""
        vma = next((v for v in self.vmas if v.owner == space and page in v.pages), None)
        if vma is None or self.is_special(vma) or (write and vma.read_only):
            return -W.EFAULT
        if page in self.spaces[space].entries:
            return 0
        return self.FAULT_ERRORS.get(self.host_fault(space, page * PAGE, write).status, 0)

    def unpin(self, pin: int) -> Outcome:
        frames = self.pins.pop(pin, None)
        if frames is None:
            return Outcome(-W.ENOENT)
        for folio, unit in frames:
            folio.pinned[unit] -= 1
            self.memory.dropped(folio)
        self.memory.frames.put(self.pin_nodes(len(frames)))
        return Outcome(0, len(frames))

    @staticmethod
    def pin_nodes(frames: int) -> int:
        """Nodes of a pin's list."""
        leaves = -(-frames // TREE_NODE)
        return leaves + (leaves > 1)

    def drain_lru(self) -> Outcome:
        return Outcome(0, self.memory.lru_drain())
