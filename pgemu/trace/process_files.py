"""Files that processes of a log map: what the machine has for each, and how large it has to be."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, get_args

from pgemu.trace.log import FileKind
from pgemu.trace.lowered import ProcessFile
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K
from pgemu_kernels.words.rows import INODES

__all__ = ("KINDS", "PAGE_OF", "Files")

KINDS: tuple[FileKind, ...] = get_args(FileKind)
PAGE_OF: dict[str, int] = {"shmem": PAGE_4K, "hugetlb-2M": PAGE_2M, "hugetlb-1G": PAGE_1G}


class _File(NamedTuple):
    kind: FileKind
    size: int


class Files:
    """Files by whatever tells one from another, numbered in the order in which they are mapped."""

    def __init__(self) -> None:
        self._files: dict[Hashable, _File] = {}
        self._numbers: dict[Hashable, int] = {}
        self.beyond = 0  # files for which a machine has no room

    def use(self, key: Hashable, kind: FileKind, end: int) -> int | None:
        """The number of a file of which bytes up to `end` are used; None: there is no room for it."""
        file = self._files.get(key)
        if file is None:
            if len(self._files) >= INODES:
                self.beyond += 1
                return None
            self._numbers[key] = len(self._numbers)
            file = _File(kind, 0)
        page = PAGE_OF[file.kind]
        self._files[key] = file._replace(size=max(file.size, -(-end // page) * page))
        return self._numbers[key]

    def number(self, key: Hashable) -> int | None:
        """The number of a file that is mapped, None: none is."""
        return self._numbers.get(key)

    def page(self, number: int) -> int:
        """Bytes of a page of a file; of anonymous memory (a negative number) 4 KiB."""
        return PAGE_4K if number < 0 else PAGE_OF[list(self._files.values())[number].kind]

    def listed(self) -> tuple[ProcessFile, ...]:
        """All of them, by number."""
        return tuple(ProcessFile(file.kind, file.size) for file in self._files.values())
