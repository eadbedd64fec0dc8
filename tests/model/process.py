"""Process memory as nested dictionaries: a table is a dict from index to a table or a leaf; no code of the kernels.

Only what can be asked about: which page an address shows at which level, whether it may be written, which tables
exist, what calls return. Bits of entries are for the captures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

PAGE, M2, G1 = 4096, 1 << 21, 1 << 30
SPAN = {1: PAGE, 2: M2, 3: G1, 4: G1 * 512}
READ, WRITE, EXEC = 1, 2, 4
TASK_SIZE = (1 << 47) - PAGE
EEXIST, EINVAL, ENOMEM = 17, 22, 12
OK, NOPAGE, LOCKED, SIGBUS, SIGSEGV = 0, 0x100, 0x200, 0x2, 0x40


class Page:
    """A page of memory or a frame of a device; equal only to itself."""

    def __init__(self, frame: int | None = None, pool: Pool | None = None) -> None:
        self.frame = frame  # of a device, in 4K pages
        self.pool = pool  # of a HugeTLB page
        self.mapped = 0
        self.exclusive = False
        self.file: File | None = None


ZERO = Page()


@dataclass
class Leaf:
    page: Page
    writable: bool
    none: bool = False  # protection-none


class Table(dict[int, Any]):
    """A page of a process's tables; `sharers` is how many level-3 entries point to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sharers = 1


@dataclass(eq=False)
class File:
    kind: str  # "huge", "gmem", "device"
    pages: int
    unit: int = PAGE
    base: int = 0
    cache: dict[int, Page] = field(default_factory=dict)
    alive: bool = True


@dataclass
class Area:
    start: int
    end: int
    prot: int
    kind: str
    shared: bool
    file: File | None
    offset: int  # in bytes; of anonymous memory the address it was made at
    account: bool = False  # VM_ACCOUNT: private and writable, or it was and something was written
    anon_vma: object | None = None
    cloned: bool = False

    @property
    def unit(self) -> int:
        return self.file.unit if self.file is not None else PAGE

    def at(self, address: int) -> int:
        """Offset in the file."""
        return self.offset + address - self.start


@dataclass(eq=False)
class Pool:
    """HugeTLB pages; mappings here never reserve."""

    free: int


class Process:
    """One process; `others` are all processes of the machine, this one included."""

    def __init__(
        self, others: list[Process], pools: dict[int, Pool], reclaims: bool, merges_unfaulted: bool = True
    ) -> None:
        self.others, self.pools, self.reclaims, self.merges_unfaulted = others, pools, reclaims, merges_unfaulted
        self.areas: list[Area] = []
        self.root = Table()
        others.append(self)

    # ------------------------------------------------------------------ tables

    def path(self, address: int, level: int) -> Table:
        """The table of `level` for an address, made if need be."""
        table = self.root
        for above in range(4, level, -1):
            table = table.setdefault(address // SPAN[above] % 512, Table())
        return table

    def find(self, address: int) -> tuple[Table, int, int]:
        """Walk as far as tables go: table, index, level."""
        table, level = self.root, 4
        while True:
            index = address // SPAN[level] % 512
            below = table.get(index)
            if not isinstance(below, Table):
                return table, index, level
            table, level = below, level - 1

    def leaf(self, address: int) -> tuple[Leaf | None, int]:
        table, index, level = self.find(address)
        return table.get(index), level

    def walk(self) -> Iterator[tuple[int, int, Any]]:
        """(address, level, table or leaf) of every entry."""

        def visit(table: Table, level: int, base: int) -> Iterator[tuple[int, int, Any]]:
            for index in sorted(table):
                address = base + index * SPAN[level]
                yield address, level, table[index]
                if isinstance(table[index], Table):
                    yield from visit(table[index], level - 1, address)

        yield from visit(self.root, 4, 0)

    def free_tables(self, start: int, end: int) -> None:
        """Free each table of a range that no area reaches into."""

        def visit(table: Table, level: int, base: int) -> None:
            for index in list(table):
                address = base + index * SPAN[level]
                below = table[index]
                if not isinstance(below, Table) or address >= end or address + SPAN[level] <= start:
                    continue
                visit(below, level - 1, address)
                if not any(a.start < address + SPAN[level] and address < a.end for a in self.areas):
                    assert not below
                    del table[index]

        visit(self.root, 4, 0)

    # ------------------------------------------------------------------ areas

    def area(self, address: int) -> Area | None:
        return next((a for a in self.areas if a.start <= address < a.end), None)

    def inside(self, start: int, end: int) -> list[Area]:
        return sorted((a for a in self.areas if a.start < end and start < a.end), key=lambda a: a.start)

    def cut(self, area: Area, address: int) -> int:
        if address % area.unit:
            return -EINVAL
        if area.kind == "device":
            self.drop_partial(area, address)
        region = address // G1 * G1
        if area.kind == "huge" and address != region and area.start <= region and region + G1 <= area.end:
            self.unshare(region)
        self.areas.append(replace(area, start=address, offset=area.at(address)))
        area.end = address
        return 0

    def drop_partial(self, area: Area, address: int) -> None:
        """A large leaf that is cut goes whole."""
        table, index, level = self.find(address)
        if level > 1 and index in table and address % SPAN[level]:
            self.drop(table, index)

    def cut_to(self, start: int, end: int) -> int:
        for address in (start, end):
            area = self.area(address)
            if area is not None and area.start < address < area.end and (status := self.cut(area, address)):
                return status
        return 0

    def merge(self, area: Area) -> None:
        """Join an area with its neighbours, if they differ in nothing; the lower one first where only one will do."""
        low = next((a for a in self.areas if a.end == area.start), None)
        high = next((a for a in self.areas if a.start == area.end), None)
        if low is not None and not (alike(low, area) and self.may_share(area, low)):
            low = None
        if high is not None and not (alike(area, high) and self.may_share(area, high)):
            high = None
        if low is not None and high is not None and len({low.anon_vma, high.anon_vma} - {None}) == 2:
            high = None
        for other in (low, high):
            if other is not None:
                self.areas.remove(other)
                area.offset -= max(0, area.start - other.start)
                area.start, area.end = min(area.start, other.start), max(area.end, other.end)
                if area.anon_vma is None:
                    area.anon_vma, area.cloned = other.anon_vma, other.cloned

    def may_share(self, area: Area, other: Area) -> bool:
        """Whether an area can have the anon_vma of another that it is to join, or give it its own."""
        if area.anon_vma is None or area.anon_vma is other.anon_vma:
            return area.anon_vma is other.anon_vma or not other.cloned
        return other.anon_vma is None and not area.cloned and self.merges_unfaulted

    def prepare(self, area: Area) -> None:
        """An anon_vma for an area: a neighbour's, if only permissions keep them apart."""
        if area.anon_vma is not None:
            return
        for other in sorted(self.areas, key=lambda a: -a.start):
            touching = other.start == area.end or other.end == area.start
            touching &= other.offset - other.start == area.offset - area.start and not other.cloned
            touching &= other.account == area.account
            if area.kind == "anon" and other.kind == "anon" and touching and other.anon_vma is not None:
                area.anon_vma = other.anon_vma
                return
        area.anon_vma = object()

    # ------------------------------------------------------------------ calls

    def mmap(
        self, address: int, length: int, prot: int, kind: str, shared: bool, file: File | None, offset: int
    ) -> int:
        unit = file.unit if file is not None else PAGE
        length = -(-length // unit) * unit
        if address + length > TASK_SIZE:
            return -ENOMEM
        if self.inside(address, address + length):
            return -EEXIST
        if (address | offset) % unit:
            return -EINVAL
        if kind == "device" and offset + length > file.pages * PAGE:
            return -EINVAL
        account = kind == "anon" and bool(prot & WRITE)
        place = address if kind == "anon" else offset
        area = Area(address, address + length, prot, kind, shared, file, place, account)
        self.areas.append(area)
        self.merge(area)
        return 0

    def munmap(self, start: int, length: int) -> int:
        end = start + length
        if status := self.cut_to(start, end):
            return status
        gone = self.inside(start, end)
        for area in gone:
            self.zap(area, area.start, area.end)
            self.areas.remove(area)
        if gone:
            self.free_tables(gone[0].start, gone[-1].end)
        return 0

    def mprotect(self, start: int, length: int, prot: int) -> int:
        address, end = start, start + length
        while address < end:
            area = self.area(address)
            if area is None:
                return -ENOMEM
            last = min(end, area.end)
            if area.prot != prot:
                if status := self.cut_to_area(area, address, last):
                    return status
                area = self.area(address)
                area.prot = prot
                if area.kind == "anon":
                    area.account = bool(prot & WRITE) or (area.account and area.anon_vma is not None)
                self.merge(area)
                self.change(area, address, last)
            address = last
        return 0

    def cut_to_area(self, area: Area, start: int, end: int) -> int:
        if area.start < start and (status := self.cut(area, start)):
            return status
        area = self.area(start)
        return self.cut(area, end) if area.end > end else 0

    def change(self, area: Area, start: int, end: int) -> None:
        for address, level, entry in list(self.walk()):
            if isinstance(entry, Table) or not start < address + SPAN[level] or not address < end:
                continue
            if area.kind == "huge" and self.unshare(address // G1 * G1):
                continue
            leaf, at = self.leaf(address)
            if leaf is None or at != level:
                continue
            leaf.none = area.prot == 0
            leaf.writable = bool(area.prot & WRITE) and (
                area.shared or (area.kind == "anon" and leaf.page is not ZERO and leaf.page.exclusive)
            )
        if area.kind == "huge":
            for region in range(start // G1 * G1, end, G1):
                self.unshare(region)

    def dontneed(self, start: int, length: int) -> int:
        address, end, hole = start, start + length, False
        for area in self.inside(start, end):
            hole |= area.start > address
            first, address = max(address, area.start), min(end, area.end)
            last = address
            if area.kind == "device":
                return -EINVAL
            if area.kind == "huge":
                if first % area.unit:
                    return -EINVAL
                last = last // area.unit * area.unit
            if first < last:
                self.zap(area, first, last)
                if self.reclaims and area.kind != "huge":
                    for base in range(-(-first // M2) * M2, last - M2 + 1, M2):
                        table, _, level = self.find(base)
                        if level == 1 and not table:
                            del self.path(base, 2)[base // M2 % 512]
        return -ENOMEM if hole or address < end else 0

    # ------------------------------------------------------------------ clearing

    def drop(self, table: Table, index: int) -> None:
        release(table.pop(index).page)

    def unshare(self, region: int) -> bool:
        """Let go of a level-2 table that others have too."""
        above = self.root.get(region // SPAN[4] % 512)
        if not isinstance(above, Table):
            return False
        below = above.get(region // G1 % 512)
        if not isinstance(below, Table) or below.sharers == 1:
            return False
        below.sharers -= 1
        del above[region // G1 % 512]
        return True

    def zap(self, area: Area, start: int, end: int) -> None:
        for address, level, entry in list(self.walk()):
            if isinstance(entry, Table) or not start < address + SPAN[level] or not address < end:
                continue
            if area.kind == "huge" and self.unshare(address // G1 * G1):
                continue
            table, index, at = self.find(address)
            if at == level and index in table:
                self.drop(table, index)
        if area.kind == "huge":
            for region in range(start // G1 * G1, end, G1):
                self.unshare(region)

    # ------------------------------------------------------------------ accesses

    def touch(self, address: int, write: bool) -> int:
        leaf, _ = self.leaf(address)
        if leaf is not None and not leaf.none and (leaf.writable or not write):
            return OK
        area = self.area(address)
        if area is None or not area.prot or (write and not area.prot & WRITE):
            return SIGSEGV
        return getattr(self, f"fault_{area.kind}")(area, address // PAGE * PAGE, write)

    def fault_anon(self, area: Area, address: int, write: bool) -> int:
        table, index = self.path(address, 1), address // PAGE % 512
        leaf = table.get(index)
        if leaf is None and not write:
            table[index] = Leaf(ZERO, False)
            return NOPAGE
        self.prepare(area)
        if leaf is not None and leaf.page is not ZERO and (leaf.page.exclusive or leaf.page.mapped == 1):
            leaf.page.exclusive = leaf.writable = True
            return NOPAGE
        if leaf is not None:
            self.drop(table, index)
        page = Page()
        page.mapped, page.exclusive = 1, True
        table[index] = Leaf(page, True)
        return NOPAGE

    def fault_gmem(self, area: Area, address: int, write: bool) -> int:
        index = area.at(address) // PAGE
        self.path(address, 2)
        if index >= area.file.pages:
            return SIGBUS
        page = area.file.cache.setdefault(index, Page())
        page.file = area.file
        page.mapped += 1
        self.path(address, 1)[address // PAGE % 512] = Leaf(page, bool(area.prot & WRITE))
        return LOCKED

    def fault_device(self, area: Area, address: int, write: bool) -> int:
        frame = area.file.base + area.at(address) // PAGE
        for level in (3, 2, 1):
            if level == 1 and not area.file.alive:
                return SIGBUS
            table, index = self.path(address, level), address // SPAN[level] % 512
            first = address // SPAN[level] * SPAN[level]
            start = frame - (address - first) // PAGE
            fits = area.start <= first and first + SPAN[level] <= area.end and start % (SPAN[level] // PAGE) == 0
            if index not in table and fits:
                if not area.file.alive:
                    return SIGBUS
                page = Page(start)
                page.mapped = 1
                table[index] = Leaf(page, bool(area.prot & WRITE))
                return NOPAGE
        raise AssertionError("a page of 4K always fits")

    def fault_huge(self, area: Area, address: int, write: bool) -> int:
        address = address // area.unit * area.unit
        level = 2 if area.unit == M2 else 3
        if level == 2 and area.shared:
            self.share(area, address)
        table, index = self.path(address, level), address // SPAN[level] % 512
        number = area.at(address) // area.unit
        if index not in table:
            if number * area.unit >= area.file.pages * PAGE:
                return SIGBUS
            page = area.file.cache.get(number)
            if page is None:
                if not area.shared:
                    self.prepare(area)
                page = self.take(area.unit)
                if page is None:
                    return SIGBUS
                if area.shared:
                    page.file = area.file
                    area.file.cache[number] = page
            page.mapped += 1
            table[index] = Leaf(page, area.shared and bool(area.prot & WRITE))
        leaf = table[index]
        if write and not leaf.writable:
            if leaf.page.file is None and leaf.page.mapped == 1:
                leaf.writable = True
                return NOPAGE
            self.prepare(area)
            page = self.take(area.unit)
            if page is None:
                return SIGBUS
            self.drop(table, index)
            page.mapped = 1
            table[index] = Leaf(page, True)
        return NOPAGE

    def take(self, unit: int) -> Page | None:
        """A page from the pool of its size."""
        pool = self.pools[unit]
        if pool.free == 0:
            return None
        pool.free -= 1
        return Page(pool=pool)

    def share(self, area: Area, address: int) -> None:
        """Use another mapping's table of the same aligned 1G of the same file."""
        region = address // G1 * G1
        if region < area.start or region + G1 > area.end:
            return
        above = self.path(address, 3)
        if region // G1 % 512 in above:
            return
        offset = area.at(region)
        for process in self.others:
            for other in process.areas:
                if other is area or other.file is not area.file or not other.shared or other.prot != area.prot:
                    continue
                there = other.start + offset - other.offset
                if there % G1 or there < other.start or there + G1 > other.end:
                    continue
                entry = process.path(there, 3).get(there // G1 % 512) if process.has(there) else None
                if isinstance(entry, Table):
                    entry.sharers += 1
                    above[region // G1 % 512] = entry
                    return

    def has(self, address: int) -> bool:
        """Whether there is a level-3 table for an address."""
        return isinstance(self.root.get(address // SPAN[4] % 512), Table)

    # ------------------------------------------------------------------ fork and exit

    def fork(self) -> Process:
        child = Process(self.others, self.pools, self.reclaims, self.merges_unfaulted)
        for area in sorted(self.areas, key=lambda a: a.start):
            copy = replace(area)
            if area.anon_vma is not None:
                copy.anon_vma, copy.cloned = object(), True
            child.areas.append(copy)
            if area.kind == "device" or area.anon_vma is not None:
                self.copy(area, child)
        return child

    def copy(self, area: Area, child: Process) -> None:
        """The child gets each table that the parent has there, and each leaf, neither writable if private."""
        lowest = {"huge": 3 if area.unit == G1 else 2}.get(area.kind, 1)
        for address, level, entry in list(self.walk()):
            if not area.start < address + SPAN[level] or not address < area.end:
                continue
            if isinstance(entry, Table):
                if level == lowest + 1 or (area.kind != "huge" and level > lowest):
                    child.path(max(address, area.start), level - 1)
                continue
            if not area.shared:
                entry.writable = False
                entry.page.exclusive = False
            entry.page.mapped += 1
            child.path(address, level)[address // SPAN[level] % 512] = replace(entry)

    def exit(self) -> None:
        for area in self.areas:
            self.zap(area, area.start, area.end)
        self.areas = []
        self.free_tables(0, 1 << 47)
        self.others.remove(self)


def alike(low: Area, high: Area) -> bool:
    """Whether two areas that touch differ in nothing, anon_vmas apart."""
    anonymous = low.kind == high.kind == "anon"
    return anonymous and (low.prot, low.account, low.at(low.end)) == (high.prot, high.account, high.offset)


def release(page: Page) -> None:
    """One mapping of a page less."""
    if page is ZERO:
        return
    page.mapped -= 1
    if page.mapped == 0 and page.file is None and page.pool is not None:
        page.pool.free += 1


def punch(processes: list[Process], file: File, start: int, end: int) -> None:
    """Whole pages of bytes [start, end) of a file leave every process and the file."""
    first, last = -(-start // file.unit), end // file.unit
    for process in processes:
        for area in list(process.areas):
            low = max(area.offset, first * file.unit)
            high = min(area.at(area.end), last * file.unit)
            if area.file is file and low < high:
                process.zap(area, area.start + low - area.offset, area.start + high - area.offset)
    for index in range(first, last):
        page = file.cache.pop(index, None)
        if page is not None:
            page.file = None
            if page.pool is not None and page.mapped == 0:
                page.pool.free += 1
