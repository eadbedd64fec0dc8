"""A TLB and a page-table walker with the shape of gem5's, for simulators written in Python.

The names and the roles are those of gem5's src/arch/generic/tlb.hh (BaseTLB: translateFunctional(), translateAtomic(),
translateTiming(), flushAll(), demapPage()) and src/arch/x86/pagetable_walker.hh (Walker: start(), startFunctional());
the tables are pgemu's. gem5 itself was never run with them: they take and give plain Python objects, no packets. A
simulator sends the reads of a walk to its caches, in order, and calls finish() when the last one is back.

>>> from pgemu import Config, Machine
>>> from pgemu.adapters.gem5 import Mode, Request, Tlb, Walker
>>> table = Machine(Config()).create_page_table("x86-64")
>>> table.map_range(0x4000_0000, physical=0x8000_0000, length=4 << 20).detail
2
>>> tlb = Tlb(Walker(table), entries=64)
>>> request = Request(0x4000_1234)
>>> walk = tlb.translate_timing(request, Mode.READ)  # a miss: what the walk reads
>>> [hex(read.address) for read in walk.reads], walk.finish(), hex(request.paddr)
(['0x2000', '0x3008', '0x4000'], None, '0x80001234')
>>> tlb.translate_timing(Request(0x4000_5678), Mode.READ) is None  # a hit, in the same 2M
True
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.vm import Vm
from pgemu.tables.page_table import PageTable
from pgemu.tables.translation import Access, Kind, Translation, WalkStatus, translate
from pgemu_kernels import words as W

__all__ = ("Fault", "Mode", "PhysicalRead", "Request", "TimingWalk", "Tlb", "TlbEntry", "Walker")


class Mode(IntEnum):
    """BaseMMU::Mode."""

    READ = 0
    WRITE = 1
    EXECUTE = 2


_KINDS = {
    (Mode.READ, False): Kind.READ, (Mode.WRITE, False): Kind.WRITE, (Mode.EXECUTE, False): Kind.FETCH,
    (Mode.READ, True): Kind.USER_READ, (Mode.WRITE, True): Kind.USER_WRITE, (Mode.EXECUTE, True): Kind.USER_FETCH,
}  # fmt: skip


@dataclass
class Request:
    """A request of a virtual address, whose physical address a translation fills in; user: from user mode."""

    vaddr: int
    size: int = 8
    user: bool = True
    paddr: int | None = None


class Fault(NamedTuple):
    """Why there is no translation: status, and the error word as the hardware gives it (of x86 the error code)."""

    vaddr: int
    status: WalkStatus
    error: int


class PhysicalRead(NamedTuple):
    """A read of 8 bytes of a walk: the physical address of an entry; write: it is written (accessed or dirty bit)."""

    address: int
    write: bool = False


class TlbEntry(NamedTuple):
    """A translation: virtual and physical address of its page, bytes of the page."""

    vaddr: int
    paddr: int
    size: int


@dataclass
class TimingWalk:
    """A walk under way: what it reads, in order, and then writes. finish() ends it."""

    request: Request
    mode: Mode
    reads: list[PhysicalRead]
    entry: TlbEntry | None
    fault: Fault | None
    _tlb: Tlb | None = field(default=None, repr=False)

    def finish(self) -> Fault | None:
        """The last read is back: fill the TLB and the request's physical address, or return the fault."""
        if self.entry is not None:
            if self._tlb is not None:
                self._tlb.insert(self.entry, self.mode, self.request.user)
            self.request.paddr = self.entry.paddr + self.request.vaddr - self.entry.vaddr
        return self.fault


class Walker:
    """The page-table walker of one stage: of a page table, a process, or a VM's stage 2 (private memory's, too).

    :param tables: whose tables, as they are at each walk
    :param access: control registers under which an access is judged
    """

    def __init__(self, tables: PageTable | AddressSpace | Vm, access: Access | None = None) -> None:
        self.tables = tables
        self.access = access or Access()

    def _translate(self, address: int, kind: Kind | None, *, references: bool) -> Translation:
        tables = self.tables
        if isinstance(tables, PageTable):
            row = tables.row
        else:
            row = tables.machine.register(W.R_STAGE2_FORMAT if isinstance(tables, Vm) else W.R_HOST_FORMAT)
        access = None if kind is None else self.access
        return translate(tables.machine, row, tables.root, [address], kind, access, references=references)

    def start(self, request: Request, mode: Mode) -> TimingWalk:
        """Begin a walk for a request: every check is made, accessed and dirty bits are set as the hardware does."""
        kind = _KINDS[mode, request.user]
        found = self._translate(request.vaddr, kind, references=True)
        listed = found.references
        assert listed is not None
        reads = [PhysicalRead(int(at)) for at in listed.reads[0, : int(listed.read_counts[0])]]
        reads += [PhysicalRead(int(at), True) for at in listed.writes[0, : int(listed.write_counts[0])]]
        status = WalkStatus(int(found.status[0]))
        if status is not WalkStatus.OK:
            return TimingWalk(request, mode, reads, None, Fault(request.vaddr, status, int(found.error[0])))
        size = 4096 << 9 * (int(found.level[0]) - 1)
        inside = request.vaddr & size - 1
        return TimingWalk(
            request, mode, reads, TlbEntry(request.vaddr - inside, int(found.physical[0]) - inside, size), None
        )

    def start_functional(self, request: Request) -> Fault | None:
        """Fill in the physical address without a check, a bit that is set, or a reference."""
        found = self._translate(request.vaddr, None, references=False)
        if found.status[0] != WalkStatus.OK:
            return Fault(request.vaddr, WalkStatus(int(found.status[0])), 0)
        request.paddr = int(found.physical[0])
        return None


class Tlb:
    """A fully associative TLB of pages of any size, with the entry that was used last going last.

    Rights are judged when an entry is filled and when a page is first written or executed: an entry is kept for each
    mode. What edits of a table return as `flush` is for the caller to give to demap().

    :param entries: how many it holds, of each mode
    """

    def __init__(self, walker: Walker, entries: int = 64) -> None:
        if entries < 1:
            raise ValueError(f"entries {entries}: expected at least 1")
        self.walker = walker
        self.entries = entries
        self.hits = self.misses = 0
        self._held: dict[tuple[Mode, bool], OrderedDict[tuple[int, int], TlbEntry]] = {
            key: OrderedDict() for key in _KINDS
        }

    # ------------------------------------------------------------------ BaseTLB

    def translate_functional(self, request: Request) -> Fault | None:
        """translateFunctional(): nothing is counted, filled or checked."""
        return self.walker.start_functional(request)

    def translate_atomic(self, request: Request, mode: Mode) -> Fault | None:
        """translateAtomic(): all at once; the physical address is in the request."""
        walk = self.translate_timing(request, mode)
        return walk.finish() if walk is not None else None

    def translate_timing(self, request: Request, mode: Mode) -> TimingWalk | None:
        """translateTiming(): None on a hit, whose physical address is in the request, else the walk to be finished."""
        held = self._held[mode, request.user]
        for size in (1 << 12, 1 << 21, 1 << 30):
            key = (request.vaddr & -size, size)
            if entry := held.get(key):
                held.move_to_end(key)
                self.hits += 1
                request.paddr = entry.paddr + request.vaddr - entry.vaddr
                return None
        self.misses += 1
        walk = self.walker.start(request, mode)
        walk._tlb = self
        return walk

    def insert(self, entry: TlbEntry, mode: Mode = Mode.READ, user: bool = True) -> None:
        """insert(): the entry that was not used for the longest time makes room."""
        held = self._held[mode, user]
        held[entry.vaddr, entry.size] = entry
        held.move_to_end((entry.vaddr, entry.size))
        if len(held) > self.entries:
            held.popitem(last=False)

    def flush_all(self) -> None:
        """flushAll()."""
        for held in self._held.values():
            held.clear()

    def demap(self, start: int, end: int) -> None:
        """demapPage() of every page that touches [start, end): what Flush(start, end, ...) of an edit says."""
        for held in self._held.values():
            for key in [key for key in held if key[0] < end and start < key[0] + key[1]]:
                del held[key]
