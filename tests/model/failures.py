"""Memory failure: which page is bad, who loses it, and what it takes to have it back.

A folio is poisoned while any page of it is bad, and guests do not get its pages. What memory failure has handled it
keeps a reference of.
"""

from __future__ import annotations

from model.folio import Folio
from model.machine import State
from model.outcome import OK, Outcome
from model.parameters import PAGE
from pgemu_kernels import words as W

IGNORED, FAILED, DELAYED, RECOVERED, NONE = range(5)


class Failures(State):
    """memory_failure() and unpoison_memory()."""

    def memory_failure(self, inode: int, offset: int) -> Outcome:
        """detail: the recovery action."""
        index = offset // PAGE
        if not self.inodes[inode].open:
            return Outcome(-W.EBADF)
        if index >= self.inodes[inode].pages:
            return Outcome(-W.EINVAL)
        pfn = self.pfn(inode, index)
        if pfn is None:
            return Outcome(-W.ENOENT)
        folio = self.memory.folio_of(pfn)
        assert folio is not None
        unit = folio.unit(pfn)
        before = folio.poisoned(unit)
        folio.bad.add(pfn - folio.head)
        if before:
            return Outcome(-W.EHWPOISON, NONE)
        if self.order and self.parameters.memory_failure == "marked":
            return Outcome(-W.EBUSY, IGNORED)
        size = folio.size(unit)
        if size == 1:
            self.memory.lru_drain()
        folio.failed.add(unit)
        first = index - index % size if size > 1 else index
        if size == 1:
            self.replace_entries(inode, index, folio, unit)
        self.zap_file(inode, range(first, first + size))
        others = folio.references(pfn) - size - 1
        if self.parameters.mf_delayed and not others:
            return Outcome(0, DELAYED)
        return Outcome(-W.EBUSY, FAILED)

    def replace_entries(self, inode: int, index: int, folio: Folio, unit: int) -> None:
        """try_to_unmap(): entries that the folio counts say from now on that the page is bad."""
        for vma in self.vmas:
            for page in vma.showing(inode, range(index, index + 1)):
                host = self.spaces[vma.owner]
                entry = host.entries.get(page)
                if entry is not None and not entry.special:
                    self.notify(vma, range(page, page + 1))
                    del host.entries[page]
                    host.poisoned.add(page)
                    folio.mapped[unit] -= 1

    def unpoison(self, pfn: int) -> Outcome:
        """Only memory failure may have the page, and no file."""
        folio = self.memory.folio_of(pfn)
        if folio is None:
            head = pfn & ~(self.memory.pages - 1)
            return OK if self.memory.bad.pop(head, None) else Outcome(-W.EBUSY)
        unit = folio.unit(pfn)
        if not folio.poisoned(unit) or folio.cached or folio.references(pfn) > 1 or folio.mapped[unit]:
            return Outcome(-W.EBUSY)
        folio.bad.difference_update(range(unit, unit + folio.size(unit)))
        if unit in folio.failed:
            folio.failed.remove(unit)
            self.memory.dropped(folio)
        return OK
