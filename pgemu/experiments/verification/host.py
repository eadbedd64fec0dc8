"""The memory behind a recorded VM's slots, as the process has it in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

if TYPE_CHECKING:
    from pgemu.objects.files import GuestMemfd4K, HugetlbFile
    from pgemu.objects.machine import Machine

__all__ = ("Backing", "Host", "Slot", "spans_of")

Backing = Literal["4K", "thp", "hugetlb-2M", "hugetlb-1G"]
_HUGE: dict[str, int] = {"hugetlb-2M": PAGE_2M, "hugetlb-1G": PAGE_1G}
GMEM = 1 << 60  # pages of a guest_memfd among the places


class Slot(NamedTuple):
    """A memory slot of an address space."""

    number: int
    gpa: int
    size: int
    hva: int
    flags: int


def spans_of(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """The ranges of userspace addresses that slots show, joined where they touch."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted((slot.hva, slot.hva + slot.size) for slot in slots if slot.size):
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    return spans


class Host:
    """A process whose mappings are what the slots show: anonymous memory, or hugetlbfs where that fits."""

    def __init__(self, machine: Machine, backing: Backing, spans: Sequence[tuple[int, int]]) -> None:
        self.machine = machine
        self.process = machine.create_process()
        self.files: list[tuple[int, int, HugetlbFile]] = []
        self.gmem: GuestMemfd4K | None = None
        self.spans = list(spans)
        for start, end in spans:
            self._map(backing, start, end)

    def _map(self, backing: Backing, start: int, end: int) -> None:
        page = _HUGE.get(backing, PAGE_4K)
        if page > PAGE_4K and start % page == 0 and (end - start) % page == 0:
            file = self.machine.create_hugetlb_file(end - start, page)
            status = self.process.mmap_hugetlb(start, end - start, file=file).status
            self.files.append((start, end, file))
        else:
            status = self.process.mmap_anonymous(start, end - start).status
        if status:
            raise AssertionError(f"memory [{start:#x}, {end:#x}): {status}")

    def holds(self, start: int, end: int) -> bool:
        """Whether some of a range is memory of the slots."""
        return any(low < end and start < high for low, high in self.spans)

    def clipped(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of a range is memory of the slots."""
        parts = [(max(start, low), min(end, high)) for low, high in self.spans]
        return [(low, high) for low, high in parts if low < high]

    def file_at(self, hva: int) -> tuple[int, HugetlbFile] | None:
        """The file that is mapped at an address, and where it begins."""
        return next(((start, file) for start, end, file in self.files if start <= hva < end), None)
