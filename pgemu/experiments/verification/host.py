"""The memory behind a recorded VM's slots, as the process has it in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pgemu.errors import InputError
from pgemu.machine.results import errno_name
from pgemu_kernels.formats.bits import WRITE
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

if TYPE_CHECKING:
    from pgemu.objects.files import GuestMemfd4K, HugetlbFile
    from pgemu.objects.machine import Machine

__all__ = ("Backing", "Host", "Slot", "Span", "spans_of")

Backing = Literal["4K", "thp", "hugetlb-2M", "hugetlb-1G"]
_HUGE: dict[str, int] = {"hugetlb-2M": PAGE_2M, "hugetlb-1G": PAGE_1G}
TASK_SIZE_MAX = (1 << 47) - PAGE_4K
GMEM = 1 << 60  # pages of a guest_memfd among the places


class Slot(NamedTuple):
    """A memory slot of an address space."""

    number: int
    gpa: int
    size: int
    hva: int
    flags: int


class Span(NamedTuple):
    """A range of userspace addresses that slots show, and the memory there."""

    start: int
    end: int
    backing: Backing


def spans_of(slots: Sequence[Slot], backings: dict[int, Backing]) -> list[Span]:
    """The ranges of userspace addresses that slots show, joined where they touch. backings: by position."""
    spans: list[Span] = []
    found = ((slot.hva, slot.hva + slot.size, backings[i]) for i, slot in enumerate(slots) if _is_mappable(slot))
    for start, end, backing in sorted(found):
        if spans and (start < spans[-1].end or (start == spans[-1].end and backing == spans[-1].backing)):
            spans[-1] = Span(spans[-1].start, max(end, spans[-1].end), spans[-1].backing)
        else:
            spans.append(Span(start, end, backing))
    return spans


def _is_mappable(slot: Slot) -> bool:
    """Whether KVM would take a slot's userspace addresses."""
    return slot.size > 0 and (slot.hva | slot.size) % PAGE_4K == 0 and slot.hva + slot.size <= TASK_SIZE_MAX


class Host:
    """A process whose mappings are what the slots show: anonymous memory, or hugetlbfs where that fits."""

    def __init__(self, machine: Machine, spans: Sequence[Span], holes: Sequence[int], source: str) -> None:
        """`holes`: addresses of 2M without memory; `source`: the log, for messages. InputError for bad addresses."""
        self._source = source
        self.machine = machine
        self.process = machine.create_process()
        self.files: list[tuple[int, int, HugetlbFile]] = []
        self.gmem: GuestMemfd4K | None = None
        self.spans = list(spans)
        for start, end, backing in spans:
            self._map(backing, start, end)
        for hole in holes:
            self.process.munmap(hole, PAGE_2M)

    def _map(self, backing: Backing, start: int, end: int) -> None:
        page = _HUGE.get(backing, PAGE_4K)
        if page > PAGE_4K and start % page == 0 and (end - start) % page == 0:
            file = self.machine.create_hugetlb_file(end - start, page)
            status = self.process.mmap_hugetlb(start, end - start, file=file).status
            self.files.append((start, end, file))
        else:
            status = self.process.mmap_anonymous(start, end - start).status
            if backing == "4K":
                self.process.madvise_nohugepage(start, end - start)
        if status:
            what = f"the memory of slots at userspace addresses [{start:#x}, {end:#x}) cannot be mapped"
            raise InputError(f"{what} ({errno_name(-status)})", self._source)

    def holds(self, start: int, end: int) -> bool:
        """Whether some of a range is memory of the slots."""
        return any(low < end and start < high for low, high, _ in self.spans)

    def clipped(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of a range is memory of the slots."""
        parts = [(max(start, low), min(end, high)) for low, high, _ in self.spans]
        return [(low, high) for low, high in parts if low < high]

    def is_writable(self, hva: int) -> bool:
        """Whether a page is there that can be written."""
        return bool(self.process.walk(hva)[-1].entry & WRITE)

    def is_thp(self, hva: int) -> bool:
        """Whether an address may be one of a transparent huge page."""
        return any(start <= hva < end and backing == "thp" for start, end, backing in self.spans)

    def file_at(self, hva: int) -> tuple[int, HugetlbFile] | None:
        """The file that is mapped at an address, and where it begins."""
        return next(((start, file) for start, end, file in self.files if start <= hva < end), None)
