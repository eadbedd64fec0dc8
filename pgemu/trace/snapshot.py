"""A process as /proc shows it, as records that make it: its mappings, and its pages by faults.

/proc/PID/maps, smaps and pagemap: Documentation/filesystems/proc.rst, Documentation/admin-guide/mm/pagemap.rst,
fs/proc/task_mmu.c (show_map_vma(), show_smap_vma_flags(), pte_to_pagemap_entry()).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pgemu.sizes import size as size_text
from pgemu.trace.log import FileKind
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import Layout
from pgemu.trace.process_areas import ANONYMOUS
from pgemu.trace.process_files import PAGE_OF, Files
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE, TASK_SIZE, VMAS

__all__ = ("Pages", "Vma", "lowered", "parse_vma")

PRESENT, SWAPPED, FILE, GUARD, UFFD_WP, EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 62, 61, 58, 57, 56))
PFN = np.uint64((1 << 55) - 1)
"""Bits of an entry of pagemap."""

_MAPS = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-])([w-])([x-])([ps]) ([0-9a-f]{1,16}) ([0-9a-f]{2,}:[0-9a-f]{2,}) "
    r"(\d{1,20})(?: +(.*))?"
)
_RIGHTS = int(Flag.READ), int(Flag.WRITE), int(Flag.EXEC)
_END = int(TASK_SIZE)
_PAGE = np.uint64(PAGE_4K)
_512 = 512
STANDS_FOR = "pages whose record is that of the page before them (huge pages, runs of guards)"

Words = npt.NDArray[np.uint64]


@dataclass
class Vma:
    """A line of maps, with what smaps says below it.

    Attributes:
        start, end, offset: bytes
        rights: READ, WRITE, EXEC of a record
        shared: mapped shared
        identity: device and inode, "" of anonymous memory
        path: what stands behind them
        flags: two letters each, of VmFlags
        sizes: other fields of smaps, bytes
    """

    start: int
    end: int
    rights: int
    shared: bool
    offset: int
    identity: str
    path: str
    flags: frozenset[str] = frozenset()
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pages:
    """Entries of pagemap that are not 0: first bytes of their pages, by address, and the entries."""

    address: Words
    entry: Words


def parse_vma(line: str) -> Vma | None:
    """A line of /proc/PID/maps, None if it is none."""
    found = _MAPS.fullmatch(line)
    if found is None:
        return None
    start, end, offset = int(found[1], 16), int(found[2], 16), int(found[7], 16)
    if start >= end or (start | end | offset) % PAGE_4K:
        return None
    rights = sum(flag for flag, letter in zip(_RIGHTS, found.group(3, 4, 5), strict=True) if letter != "-")
    identity = "" if found[9] == "0" else f"{found[8]} {found[9]}"
    return Vma(start, end, rights, found[6] == "s", offset, identity, found[10] or "")


def lowered(vmas: list[Vma], pages: Pages | None, source: str, notes: Iterable[str] = ()) -> Lowered:
    """Records that make a process. pages: None: which are present is not known."""
    making = _Making()
    for vma in vmas:
        making.vma(vma, pages)
    return making.result(source, tuple(notes), vmas, pages)


class _Making:
    """Records so far, and what is none."""

    def __init__(self) -> None:
        self.files = Files()
        self._pieces: list[Records] = []
        self._inputs: Counter[str] = Counter()
        self._without: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._areas = 0
        self._extra = 0

    def _emit(self, op: Operation, count: int = 1, **columns: object) -> None:
        columns = {"actor": FIRST_HOST_ACTOR, **columns}
        self._pieces.append(Records.build(count, op=op, **columns))  # type: ignore[arg-type]

    def vma(self, vma: Vma, pages: Pages | None) -> None:
        """A mapping and its pages."""
        self._inputs["area"] += 1
        inside = _of(pages, vma.start, vma.end) if pages is not None else None
        if inside is not None:
            self._inputs["page"] += len(inside.address)
        reason, kind, file, offset = self._place(vma)
        if reason:
            self._without[reason] += 1
            self._without[f"pages of {reason}"] += 0 if inside is None else len(inside.address)
            return
        self._areas += 1
        size = vma.end - vma.start
        rights = vma.rights
        anonymous = inside is not None and bool((_anonymous(inside.entry)).any())
        if kind is None and anonymous:
            rights |= int(Flag.WRITE)  # was written when it could be
        shared = kind == "shmem" or (kind is not None and vma.shared)
        flags = rights | int(Flag.SHARED if shared else Flag.PRIVATE) | int(Flag.NORESERVE) * ("nr" in vma.flags)
        where = {"address": vma.start, "length": size}
        number = int(NO_INODE) if file == ANONYMOUS else file
        self._emit(Operation.MMAP, flags=flags, object=number, offset=offset, **where)
        self._advise(vma, where)
        if inside is not None and len(inside.address):
            self._pages(vma, kind, inside)
        if rights != vma.rights:
            self._extra += 1
            self._emit(Operation.PROTECT, flags=vma.rights, **where)

    def _advise(self, vma: Vma, where: dict[str, int]) -> None:
        advice = (
            ("hg", Operation.ADVISE_HUGE, int(Flag.WRITE)),
            ("nh", Operation.ADVISE_HUGE, 0),
            ("lo", Operation.LOCK, int(Flag.LOCKED)),
            ("dc", Operation.DONTFORK, 0),
        )
        for name, op, flags in advice:
            if name in vma.flags:
                self._extra += 1
                self._emit(op, flags=flags, **where)

    def _place(self, vma: Vma) -> tuple[str, FileKind | None, int, int]:
        """Why a mapping is left out, or ""; the kind and number of its file and the offset there."""
        nothing = None, ANONYMOUS, 0
        if vma.end > _END:
            return "areas beyond user space", *nothing
        if vma.path in ("[vdso]", "[vvar]", "[vvar_vclock]"):
            return "areas of the kernel's own pages ([vdso], [vvar])", *nothing
        if {"pf", "io"} & vma.flags:
            return "areas of VM_PFNMAP, whose device is not known", *nothing
        if self._areas >= VMAS:
            return f"areas beyond {VMAS}, for which a machine has no room", *nothing
        if "ht" in vma.flags:
            kind: FileKind = "hugetlb-1G" if vma.sizes.get("KernelPageSize") == PAGE_1G else "hugetlb-2M"
            page = PAGE_OF[kind]
            if (vma.start | vma.end | vma.offset) % page:
                return "areas of HugeTLB memory that are not aligned", *nothing
        elif vma.shared:
            kind = "shmem"
        else:
            if vma.identity:
                self._told["private mappings of files, as anonymous memory"] += 1
            return "", *nothing
        key = (vma.identity, kind) if vma.identity else ("area", vma.start)
        file = self.files.use(key, kind, vma.offset + vma.end - vma.start)
        if file is None:
            return "areas of files for which a machine has no room", *nothing
        self._told["shared mappings, as files of shmem" if kind == "shmem" else "mappings of HugeTLB memory"] += 1
        return "", kind, file, vma.offset

    # ------------------------------------------------------------------ pages

    def _pages(self, vma: Vma, kind: FileKind | None, inside: Pages) -> None:
        address, entry = inside.address, inside.entry
        present = entry & PRESENT != 0
        self._guards(address[~present & (entry & GUARD != 0)])
        others = ~present & (entry & GUARD == 0)
        swapped = others & (entry & SWAPPED != 0)
        self._without["pages that are swapped out"] += int(swapped.sum())
        self._without["pages that are not present and hold a marker"] += int((others & ~swapped).sum())
        self._told["pages write-protected by userfaultfd, which is not modelled"] += int((entry & UFFD_WP != 0).sum())
        address, entry = address[present], entry[present]
        if kind is not None and kind != "shmem":
            self._huge_tlb(address, PAGE_OF[kind], bool(vma.rights & int(Flag.WRITE)))
            return
        anonymous = _anonymous(entry) if kind is None else np.zeros(len(entry), dtype=bool)
        if kind is None:
            self._told["pages of files, as the zero page"] += int((~anonymous).sum())
            anonymous &= ~self._zero_page(vma, entry, anonymous)
            huge = self._huge(vma, address, entry, anonymous)
            address, anonymous = address[~huge], anonymous[~huge]
        if not vma.rights:
            self._without["pages that are present and cannot be touched (PROT_NONE)"] += int((~anonymous).sum())
            address, anonymous = address[anonymous], anonymous[anonymous]
        if len(address):
            flags = np.where(anonymous, int(Flag.WRITE), 0)
            if vma.rights == int(Flag.EXEC):
                flags |= np.where(anonymous, 0, int(Flag.EXEC))
            self._emit(Operation.HOST_FAULT, len(address), address=address, flags=flags.astype(np.uint8))

    def _zero_page(self, vma: Vma, entry: Words, anonymous: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool[n]: which are the zero page, which Rss does not count and nobody maps exclusively: all such, or none."""
        zero = anonymous & (entry & EXCLUSIVE == 0)
        excess = len(entry) - vma.sizes.get("Rss", len(entry) * PAGE_4K) // PAGE_4K
        found = zero if excess == int(zero.sum()) else np.zeros(len(entry), dtype=bool)
        self._told["pages that are the zero page (not in Rss)"] += int(found.sum())
        return found

    def _guards(self, address: Words) -> None:
        """MADV_GUARD_INSTALL of runs of pages."""
        for start, end in _runs(address):
            self._without[STANDS_FOR] += (end - start) // PAGE_4K - 1
            self._emit(Operation.GUARD_INSTALL, address=start, length=end - start)
        self._told["guard pages"] += len(address)

    def _huge_tlb(self, address: Words, page: int, writable: bool) -> None:
        """A fault for each huge page."""
        heads = np.unique(address // np.uint64(page)) * np.uint64(page)
        self._without[STANDS_FOR] += len(address) - len(heads)
        if len(heads):
            flags = int(Flag.WRITE) if writable else 0
            self._emit(Operation.HOST_FAULT, len(heads), address=heads, flags=flags)

    def _huge(self, vma: Vma, address: Words, entry: Words, anonymous: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool[n]: which pages transparent huge pages map. MADV_POPULATE_WRITE makes each: with huge pages at once.

        They are whole aligned blocks whose frames follow one another; where frames are not shown, any whole block may
        be one, as many as AnonHugePages says.
        """
        wanted = vma.sizes.get("AnonHugePages", 0) // PAGE_2M
        none = np.zeros(len(address), dtype=bool)
        if not wanted or not len(address):
            return none
        blocks = address // np.uint64(PAGE_2M)
        firsts = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
        counts = np.diff(np.append(firsts, len(address)))
        chosen = [
            first for first, count in zip(firsts.tolist(), counts.tolist(), strict=True)
            if count == _512 and anonymous[first : first + _512].all() and _follow(entry[first : first + _512])
        ]  # fmt: skip
        if len(chosen) != wanted:
            self._told[f"areas with {wanted} huge pages, where {len(chosen)} may be some"] += 1
        for first in chosen[:wanted]:
            none[first : first + _512] = True
            self._without[STANDS_FOR] += _512 - 1
            start = int(address[first])
            self._emit(Operation.POPULATE, flags=int(Flag.WRITE), address=start, length=PAGE_2M)
        self._told["huge pages (AnonHugePages)"] += min(wanted, len(chosen))
        return none

    # ------------------------------------------------------------------ result

    def result(self, source: str, notes: tuple[str, ...], vmas: list[Vma], pages: Pages | None) -> Lowered:
        """Everything that was made."""
        records = Records.concatenate(self._pieces)
        if pages is not None:
            outside = len(pages.address) - self._inputs["page"]
            if outside > 0:
                self._inputs["page"] += outside
                self._without["pages outside the areas"] += outside
        told = [f"{what}: {count:,}" for what, count in self._told.items() if count]
        if pages is None:
            rss = sum(vma.sizes.get("Rss", 0) for vma in vmas)
            told.append(f"which pages are present is not in it{f': {size_text(rss)} are' if rss else ''}")
        if self.files.beyond:
            told.append(f"areas left out as a machine has no room for their files: {self.files.beyond}")
        inputs = self._inputs
        accounting = Accounting(
            inputs.total(), +inputs, operations=len(records), extra_pieces=self._extra,
            without_operation=+self._without,
        )  # fmt: skip
        return Lowered(
            records, Layout(0, PAGE_4K, (), ()), "shared", False, accounting, source, notes=(*notes, *told),
            kind="process", processes=1, files=self.files.listed(),
        )  # fmt: skip


def _of(pages: Pages, start: int, end: int) -> Pages:
    """Those of a range."""
    first, last = np.searchsorted(pages.address, np.array([start, end], np.uint64))
    return Pages(pages.address[first:last], pages.entry[first:last])


def _anonymous(entry: Words) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (entry & PRESENT != 0) & (entry & FILE == 0)
    return found


def _runs(address: Words) -> list[tuple[int, int]]:
    """Ranges that pages by address make."""
    if not len(address):
        return []
    breaks = np.flatnonzero(np.diff(address) != _PAGE) + 1
    parts = np.split(address, breaks)
    return [(int(part[0]), int(part[-1]) + PAGE_4K) for part in parts]


def _follow(entry: Words) -> bool:
    """Whether entries are of frames that follow one another from an aligned one on, or of frames that are not shown."""
    pfn = entry & PFN
    if not pfn.any():
        return True
    return int(pfn[0]) % _512 == 0 and bool((np.diff(pfn) == 1).all())
