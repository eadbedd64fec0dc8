"""What the events of a log do to the areas of its processes, one after the other.

Who plays them says what becomes of it (Player's last methods): they are played twice, first to find out what stood
before the log, then to make records.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import ADVICE, Input
from pgemu.trace.log import FileKind, Log
from pgemu.trace.lowered import LoweringOptions
from pgemu.trace.process_areas import ANONYMOUS, Area, Areas
from pgemu.trace.process_files import PAGE_OF, Files
from pgemu.trace.process_memories import NONE, Memories
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import TASK_SIZE

__all__ = ("ANYTHING", "FORBIDDEN", "HUGETLB_FILE", "PRIVATE_FILE", "SHARED_FILE", "Player", "rounded")

_READ, _WRITE, _EXEC = int(Flag.READ), int(Flag.WRITE), int(Flag.EXEC)
ANYTHING = _READ | _WRITE
"""Rights of an area of which only that it is there is known."""

_MAP_TYPE, _PRIVATE = 0xF, 2  # include/uapi/linux/mman.h
_ANONYMOUS_MAP, _LOCKED, _NORESERVE, _POPULATE, _HUGETLB = 0x20, 0x2000, 0x4000, 0x8000, 0x40000
_HUGE_SHIFT = 26  # log2 of the size of the huge pages, in the flags
_DONTUNMAP = 4
_FUTURE, _CURRENT, _ONFAULT = 2, 1, 4  # MCL_*
_PUNCH, _KNOWN_MODES = 2, 3  # FALLOC_FL_PUNCH_HOLE; with FALLOC_FL_KEEP_SIZE
_END = int(TASK_SIZE)

FAILED = "the call failed"
NO_RETURN = "its return is not in the log"
NO_USER = "no address of user space"
NO_ROOM = "no room in the machine"
ENDED = "of a process that has ended"
NOTHING_THERE = "nothing is known to be there"
PRIVATE_FILE = "private mappings of files, as anonymous memory"
SHARED_FILE = "shared mappings, as files of shmem"
HUGETLB_FILE = "mappings of HugeTLB memory"
FORBIDDEN = "faults that the rights of their area forbid"

_ADVICE: Mapping[int, tuple[Operation, int]] = {
    4: (Operation.ZAP, int(Flag.MADVISE)),
    24: (Operation.ZAP, int(Flag.MADVISE | Flag.LOCKED_TOO)),
    10: (Operation.DONTFORK, 0),
    11: (Operation.DOFORK, 0),
    14: (Operation.ADVISE_HUGE, int(Flag.WRITE)),
    15: (Operation.ADVISE_HUGE, 0),
    22: (Operation.POPULATE, 0),
    23: (Operation.POPULATE, int(Flag.WRITE)),
    25: (Operation.COLLAPSE, 0),
    102: (Operation.GUARD_INSTALL, 0),
    103: (Operation.GUARD_REMOVE, 0),
}
"""What advice of madvise() that changes entries is, or will be of faults."""


def rounded(length: int, page: int = PAGE_4K) -> int:
    """A length rounded up to pages."""
    return -(-length // page) * page


def _rights(prot: int) -> int:
    """Flags of a record for PROT_*."""
    return _READ * (prot & 1) | _WRITE * (prot >> 1 & 1) | _EXEC * (prot >> 2 & 1)


class Player:
    """The areas of each memory as the events so far made them.

    :param rows: uint64[n, 10], events in their order, as of Log.rows and Log.calls
    """

    def __init__(
        self, log: Log, rows: npt.NDArray[np.uint64], memories: Memories, files: Files, options: LoweringOptions
    ) -> None:
        self.log, self.rows, self.memories, self.files, self.options = log, rows, memories, files, options
        self.areas: dict[int, Areas] = {}
        self._breaks: dict[int, int] = {}
        self._locked: set[int] = set()  # memories whose new areas are locked: MCL_FUTURE
        self._play: dict[int, Callable[[int, int, list[int]], str | None]] = {
            Input.HOST_FAULT: self._fault,
            Input.MMAP: self._mmap,
            Input.MUNMAP: self._munmap,
            Input.MADVISE: self._madvise,
            Input.PROTECT: self._protect,
            Input.REMAP: self._remap,
            Input.BREAK: self._break,
            Input.LOCK: self._lock,
            Input.LOCK_ALL: self._lock_all,
            Input.FORK: self._fork,
            Input.EXEC: self._exec,
            Input.EXIT: self._exit,
            Input.FALLOCATE: self._fallocate,
            Input.HUGETLBFS_FALLOCATE: self._fallocate,
            Input.HUGETLBFS_EVICT: self._evict,
        }

    def run(self) -> None:
        """Play all of it."""
        of_event = self.memories.of_event.tolist()
        for at, (row, memory) in enumerate(zip(self.rows.tolist(), of_event, strict=True)):
            reason = self._event(at, memory, row)
            if reason is not None:
                self.without(at, reason)

    def _event(self, at: int, memory: int, row: list[int]) -> str | None:
        """Play an event; why it is no operation, None: it is one or more."""
        kind, state = row[0], row[9]
        play = self._play.get(kind)
        if play is None:
            return "of a VM"
        if kind == Input.HUGETLBFS_EVICT:  # which may come behind the end of the process
            return self._evict(at, memory, row)
        if memory == NONE:
            return ENDED
        if state:
            return FAILED
        if memory not in self.areas and not self.begin(at, memory):
            return NO_ROOM
        return play(at, memory, row)

    # ------------------------------------------------------------------ faults and mappings

    def _fault(self, at: int, memory: int, row: list[int]) -> str | None:
        address, code, untold = row[4:7]
        if address >= _END:
            return NO_USER
        page = address & -PAGE_4K
        flags = _WRITE * (code >> 1 & 1) | _EXEC * (code >> 4 & 1)
        rights = _READ | flags
        areas = self.areas[memory]
        found = areas.at(page)
        if untold:
            rights = found.rights if found else ANYTHING
            is_write = self.options.fault_kind == "write" and not self.faults_again(memory, page)
            flags = _WRITE if is_write and rights & _WRITE else flags
        if found is None and not self.need(at, memory, page, page + PAGE_4K, rights):
            return NO_ROOM
        if found and (not found.rights or flags & ~found.rights):
            self.told(FORBIDDEN)
        self.emit(at, Operation.HOST_FAULT, memory, flags=flags, address=address)
        return None

    def _range(self, start: int, length: int) -> tuple[int, int] | None:
        """The pages of a range, None: it is none of user space."""
        end = start + rounded(length)
        return (start, end) if length and start % PAGE_4K == 0 and end <= _END else None

    def _mmap(self, at: int, memory: int, row: list[int]) -> str | None:
        address, length, number, offset, word = row[4:9]
        flags, rights = word & 0xFFFFFFFF, _rights(word >> 32)
        if not address:
            return NO_RETURN
        found = self._range(address, length)
        if found is None:
            return NO_USER
        kind, key = self._file_of(at, flags, number)
        start, end = found
        if kind is None:
            area = Area(start, end, rights)
            if not flags & _ANONYMOUS_MAP:
                self.told(PRIVATE_FILE)
        else:
            page = PAGE_OF[kind]
            end = start + rounded(length, page)
            begins = 0 if flags & _ANONYMOUS_MAP else offset
            file = self.files.use(key, kind, begins + end - start)
            if start % page or begins % page:
                return "not aligned to its huge pages"
            if file is None:
                return "no room for its file in the machine"
            area = Area(start, end, rights, file, begins)
            self.told(SHARED_FILE if kind == "shmem" else HUGETLB_FILE)
        shared = kind == "shmem" or (kind is not None and flags & _MAP_TYPE != _PRIVATE)
        options = int(Flag.SHARED if shared else Flag.PRIVATE) | rights
        options |= int(Flag.POPULATE) * bool(flags & _POPULATE) | int(Flag.NORESERVE) * bool(flags & _NORESERVE)
        options |= int(Flag.LOCKED) * bool(flags & _LOCKED or memory in self._locked)
        return self._map(at, memory, area, options)

    def _file_of(self, at: int, flags: int, number: int) -> tuple[FileKind | None, Hashable]:
        """What is mapped: the kind of its file and what tells it from others; None: what is modelled as anonymous."""
        named = self.log.files.get(number) if not flags & _ANONYMOUS_MAP else None
        if flags & _ANONYMOUS_MAP and flags & _HUGETLB:
            return ("hugetlb-1G" if flags >> _HUGE_SHIFT & 0x3F == 30 else "hugetlb-2M"), ("mmap", at)
        if named is not None and named != "shmem":
            return named, ("file", number)
        inode = self.hugetlbfs_of(at)
        if inode is not None:
            return "hugetlb-2M", ("hugetlbfs", inode)
        if flags & _MAP_TYPE == _PRIVATE:
            return None, None
        return "shmem", ("file", number) if named is not None else ("mmap", at)

    def _map(self, at: int, memory: int, area: Area, flags: int) -> str | None:
        """Map an area over whatever is there, which MAP_FIXED unmaps."""
        areas = self.areas[memory]
        if not self.has_room(1 + areas.cuts(area.start, area.end)):
            return NO_ROOM
        if areas.parts(area.start, area.end):
            self.emit(at, Operation.MUNMAP, memory, address=area.start, length=area.end - area.start)
        areas.add(area)
        self.mapped(memory, area)
        self.emit_map(at, memory, area, flags)
        return None

    def _munmap(self, at: int, memory: int, row: list[int]) -> str | None:
        found = self._range(row[4], row[5])
        if found is None:
            return NO_USER
        areas = self.areas[memory]
        if not areas.parts(*found):
            return NOTHING_THERE
        if not self.has_room(areas.cuts(*found)):
            return NO_ROOM
        areas.remove(*found)
        self.emit(at, Operation.MUNMAP, memory, address=found[0], length=found[1] - found[0])
        return None

    def _over(self, at: int, memory: int, row: list[int], op: Operation, flags: int = 0) -> str | None:
        """An operation on a range that is mapped, and may be cut by it."""
        found = self._range(row[4], row[5])
        if found is None:
            return NO_USER
        if not self.need(at, memory, *found, ANYTHING) or not self.has_room(self.areas[memory].cuts(*found)):
            return NO_ROOM
        if op is Operation.PROTECT:
            self.areas[memory].change(*found, rights=flags)
        elif op in (Operation.DONTFORK, Operation.DOFORK):
            self.areas[memory].change(*found, dontfork=op is Operation.DONTFORK)
        self.emit(at, op, memory, flags=flags, address=found[0], length=found[1] - found[0])
        return None

    def _protect(self, at: int, memory: int, row: list[int]) -> str | None:
        return self._over(at, memory, row, Operation.PROTECT, _rights(row[6]))

    def _lock(self, at: int, memory: int, row: list[int]) -> str | None:
        start, inside = row[4] & -PAGE_4K, row[4] % PAGE_4K  # mm/mlock.c:do_mlock() takes any address
        row = [*row[:4], start, row[5] + inside, *row[6:]]
        flags = (0, Flag.LOCKED | Flag.POPULATE, Flag.LOCKED)[min(row[6], 2)]
        return self._over(at, memory, row, Operation.LOCK, int(flags))

    def _lock_all(self, at: int, memory: int, row: list[int]) -> str | None:
        which = row[4]
        (self._locked.add if which & _FUTURE else self._locked.discard)(memory)
        areas = self.areas[memory]
        if not len(areas) or (which and not which & _CURRENT):
            return "nothing to be locked now"
        for area in list(areas):
            # mlockall() ignores what cannot be populated: mm/mlock.c, mm_populate().
            populate = not which & _ONFAULT and area.rights != 0
            flags = int(Flag.LOCKED | (Flag.POPULATE if populate else 0)) if which else 0
            self.emit(at, Operation.LOCK, memory, flags=flags, address=area.start, length=area.end - area.start)
        return None

    def _madvise(self, at: int, memory: int, row: list[int]) -> str | None:
        advice = row[6]
        if advice == 9:
            return self._remove(at, memory, row)
        if advice not in _ADVICE:
            return f"madvise {ADVICE.get(advice, advice)}, which is not modelled or changes no entry"
        return self._over(at, memory, row, *_ADVICE[advice])

    def _remove(self, at: int, memory: int, row: list[int]) -> str | None:
        """MADV_REMOVE: a hole in the files that a range shows."""
        found = self._range(row[4], row[5])
        parts = self.areas[memory].parts(*found) if found else []
        holes = [area for area in parts if area.file != ANONYMOUS]
        for area in holes:
            size = area.end - area.start
            self.emit(at, Operation.PUNCH_HOLE, memory, object=area.file, offset=area.offset, length=size)
        return None if holes else NOTHING_THERE

    def _break(self, at: int, memory: int, row: list[int]) -> str | None:
        asked, new = row[4:6]
        if not new or new > _END:
            return NO_RETURN
        old = rounded(self._breaks.get(memory, new))
        unknown = memory not in self._breaks
        self._breaks[memory] = new
        if unknown or not asked:
            return "brk that only tells where the break is"
        new = rounded(new)
        if new > old:
            flags = int(Flag.PRIVATE) | ANYTHING
            return self._map(at, memory, Area(old, new, ANYTHING), flags)
        if new == old:
            return "brk that moves over no page"
        return self._munmap(at, memory, [*row[:4], new, old - new, 0])

    def _remap(self, at: int, memory: int, row: list[int]) -> str | None:
        old, length, wanted, flags, new = row[4:9]
        if not new:
            return NO_RETURN
        source, target = self._range(old, length), self._range(new, wanted)
        if source is None or target is None:
            return NO_USER
        if flags & _DONTUNMAP:
            return "mremap with MREMAP_DONTUNMAP, which is not modelled"
        if not self.need(at, memory, *source, ANYTHING) or not self.has_room(2):
            return NO_ROOM
        areas = self.areas[memory]
        parts = areas.parts(*source)
        if any(self.files.page(area.file) > PAGE_4K for area in parts):
            return "mremap of HugeTLB memory, which is not modelled"
        return self._move(at, memory, source, target, parts)

    def _move(
        self, at: int, memory: int, source: tuple[int, int], target: tuple[int, int], parts: list[Area]
    ) -> str | None:
        """An area in place, as large as asked for, or somewhere else."""
        areas = self.areas[memory]
        in_place = source[0] == target[0]
        grown = (max(source[1], target[0]), target[1]) if in_place else target
        if grown[0] < grown[1] and areas.parts(*grown):
            areas.remove(*grown)
            if in_place:
                self.emit(at, Operation.MUNMAP, memory, address=grown[0], length=grown[1] - grown[0])
        areas.remove(*source)
        for number, area in enumerate(parts):
            last = number == len(parts) - 1
            start = target[0] + area.start - source[0]
            end = target[1] if last else min(target[1], start + area.end - area.start)
            if start < end:
                areas.add(area._replace(start=start, end=end))
                self.mapped(memory, area._replace(start=start, end=end))
        self.emit(
            at, Operation.REMAP, memory, address=source[0], length=source[1] - source[0],
            object=(target[1] - target[0]) // PAGE_4K, offset=0 if in_place else target[0],
        )  # fmt: skip
        return None

    # ------------------------------------------------------------------ files

    def _fallocate(self, at: int, memory: int, row: list[int]) -> str | None:
        """Of a file that is mapped: a hole, or memory."""
        number, mode, offset, length = row[4:8]
        key = ("hugetlbfs", number) if row[0] == Input.HUGETLBFS_FALLOCATE else ("file", number)
        file = self.files.number(key)
        if file is None:
            return "fallocate of a file that is not known to be mapped"
        if mode & ~_KNOWN_MODES:
            return "fallocate in a mode that is not modelled"
        page = self.files.page(file)
        op = Operation.PUNCH_HOLE if mode & _PUNCH else Operation.ALLOCATE
        if op is Operation.PUNCH_HOLE:
            start, end = rounded(offset, page), (offset + length) // page * page
        else:
            start, end = offset // page * page, rounded(offset + length, page)
        if start >= end or end > 1 << 63:
            return "fallocate of less than a page"
        self.emit(at, op, memory, object=file, offset=start, length=end - start)
        return None

    def _evict(self, at: int, memory: int, row: list[int]) -> str | None:
        """The last reference to a file of hugetlbfs is gone: nobody has it mapped any more."""
        file = self.files.number(("hugetlbfs", row[4]))
        if file is None:
            return "of a file that is not known to be mapped"
        for one, areas in self.areas.items():
            for area in [area for area in areas if area.file == file]:
                areas.remove(area.start, area.end)
                self.emit(at, Operation.MUNMAP, one, address=area.start, length=area.end - area.start)
        self.emit(at, Operation.CLOSE, memory, object=file)
        return None

    # ------------------------------------------------------------------ processes

    def _fork(self, at: int, memory: int, row: list[int]) -> str | None:
        child = self.memories.made.get(at)
        if child is None:
            return "of a thread, or of a child that is not in the log"
        areas = self.areas[memory].child()
        if not self.has_room(len(areas)) or not self.fork(at, memory, child):
            return NO_ROOM
        self.areas[child] = areas
        if memory in self._breaks:
            self._breaks[child] = self._breaks[memory]
        return None

    def _exec(self, at: int, memory: int, row: list[int]) -> str | None:
        """A new program: what was mapped is gone (`begin` did that)."""
        return None

    def _exit(self, at: int, memory: int, row: list[int]) -> str | None:
        if self.memories.ended.get(at) != memory:
            return "of a thread"
        self.end(at, memory)
        del self.areas[memory]
        return None

    # ------------------------------------------------------------------ what is for a subclass to say

    def begin(self, at: int, memory: int) -> bool:
        """A memory without areas so far: whether there is room for it. `areas` has it then."""
        raise NotImplementedError

    def need(self, at: int, memory: int, start: int, end: int, rights: int) -> bool:
        """A range has to be mapped: whether it is, or can be."""
        raise NotImplementedError

    def emit(self, at: int, op: Operation, memory: int, **columns: int) -> None:
        """An operation."""

    def emit_map(self, at: int, memory: int, area: Area, flags: int) -> None:
        """mmap() of an area."""

    def without(self, at: int, reason: str) -> None:
        """An event is no operation."""

    def told(self, what: str) -> None:
        """Something of an event is modelled as something else, or is at odds with what came before."""

    def has_room(self, more: int) -> bool:
        """Whether there may be so many more areas."""
        return True

    def mapped(self, memory: int, area: Area) -> None:
        """A call of the log maps an area."""

    def faults_again(self, memory: int, page: int) -> bool:
        """Whether a page of which a fault does not say its kind has another such one later."""
        return False

    def hugetlbfs_of(self, at: int) -> int | None:
        """The inode of hugetlbfs that an mmap maps, None: none is known."""
        return None

    def fork(self, at: int, memory: int, child: int) -> bool:
        """A child: whether there is room for it."""
        return True

    def end(self, at: int, memory: int) -> None:
        """A process has ended."""
