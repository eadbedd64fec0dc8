"""What an edit had flushed."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("Flush",)


class Flush(NamedTuple):
    """What an edit had flushed: input addresses [start, end), bytes; the smallest level of a leaf among it.

    `freed_tables`: tables went, so paging-structure caches must forget them, too. The rule of the format says
    what the kernel makes of it: x86 KVM flushes the whole VM, a process 33 pages at most one by one.
    """

    start: int
    end: int
    level: int
    freed_tables: bool

    def __repr__(self) -> str:
        freed = ", freed_tables=True" if self.freed_tables else ""
        return f"Flush({self.start:#x}, {self.end:#x}, level={self.level}{freed})"
