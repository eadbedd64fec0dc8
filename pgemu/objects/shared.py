"""A machine in POSIX shared memory: other processes read its memory and walk its tables while it goes on running.

The segment, /dev/shm/NAME, holds a header and the machine's four arrays, in words of the computer's own byte order.
pgemu/include/pgemu_shared.h reads it from C and C++ and needs nothing else of pgemu. The header's words (uint64):

    0       b"pgemuSHM", written last: without it the segment is still being made
    1, 2    VERSION of this layout; bytes of the header, HEADER_WORDS * 8
    3       bytes of the segment
    4       state: LIVE, or CLOSED once its name is gone
    5       sequence: odd within SharedMachine.edit(), even outside; each edit() adds 2
    6       how many times the lists of formats and page tables were written
    7, 8    process id of the owner, and when it started (/proc/PID/stat, word 22): after a crash nobody has both
    9       layout_digest() of the words in the arrays, for those who read more than this header describes
    10      1: the count of what there is one of
    11      of each array (ram, state, stats, counts): byte offset, elements, bytes of an element
    23..25  physical address and bytes of guest memory; byte offset of a uint32 for each 4K page of it: the frame (of
            4096 bytes, in `ram`) that holds its contents, 0 where it is all zeroes
    26..29  formats: byte offset, bytes of a row, room, rows in use
    30..32  sources of roots: byte offset, bytes of a row, rows
    33..37  page tables: byte offset, bytes of a row, room, rows to look at, page tables there are
    40..47  version of pgemu, as text

`ram` is physical memory from address 0 on. A format's row has its name (32 bytes) and then what a walk needs to know,
FORMAT_WORDS below. A source says where rows are that have a root each: SOURCE_WORDS below.

What is promised to readers while the owner edits: every aligned word is one that was stored, never half of two. A walk
whose entries are all the same when it reads them a second time was that of one moment, unless something went away and
came back in between; within one value of an even sequence nothing changed at all, if all edits are within edit().
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.core import Core
from pgemu.machine.field_rules import shown
from pgemu.machine.mapped_memory import put_over
from pgemu.machine.snapshot import in_use, layout_digest
from pgemu.version import version
from pgemu_kernels import words as W

__all__ = ("Segment", "Shareable", "SharedMachine")

Array = np.ndarray[Any, Any]

MAGIC = int.from_bytes(b"pgemuSHM", "little")
VERSION = 1
HEADER_WORDS = 64
LIVE, CLOSED = 1, 2
FORMAT_ROW, SOURCE_ROW, TABLE_ROW = 32, 12, 4  # words
TABLES = 4096  # page tables that there is room to list
FORMAT_WORDS = (
    W.F_LEVELS, W.F_ROOT_BITS, W.F_INPUT_BITS, W.F_SIGN_EXTENDED, W.F_PRESENT, W.F_ADDRESS, W.F_LEAF_MASK,
    W.F_LEAF_VALUE, W.F_PAGE_MASK, W.F_PAGE_VALUE, W.F_LARGEST_LEAF, W.F_SIZED_MASK, W.F_SIZED_LEAF, W.F_TABLE_LEVEL,
    W.F_FAMILY,
)  # fmt: skip
"""What stands in a format's row behind its name, in this order; each is told in pgemu_kernels/words/table_words.py."""
_STATE, _SEQUENCE, _WRITTEN, _ONE, _ARRAYS, _GUEST, _FORMATS, _SOURCES, _TABLES = 4, 5, 6, 10, 11, 23, 26, 30, 33
_VERSION_TEXT = slice(40, 48)
_FOLDER = "/dev/shm"  # where shm_open() of glibc and musl has names
_NAME = re.compile(r"/?([!-.0-~][!-.0-~]{0,199})")
_EXPECTED = "a name of at most 200 printable characters without a slash (one may stand before it), other than . and .."


class Segment:
    """A segment and its header, as its owner has them; it knows no machine, so that it may outlive it."""

    def __init__(self, name: str, file: int, header: Array) -> None:
        self.name = name
        self.header = header
        self.places: list[Callable[[], Any]] = [
            lambda: None
        ] * TABLES  # weak references to the page tables by place in the list
        self._owner = os.getpid()
        status = os.fstat(file)
        self._inode = status.st_ino
        self.size = status.st_size
        os.close(file)

    @property
    def closed(self) -> bool:
        """Whether its name is gone."""
        return int(self.header[_STATE]) == CLOSED

    def close(self) -> None:
        """Take its name away, if it still is this segment's; a process that was forked leaves it to its owner."""
        if self.closed or os.getpid() != self._owner:
            return
        self.header[_STATE] = CLOSED
        path = os.path.join(_FOLDER, self.name)
        with suppress(OSError):
            if os.stat(path).st_ino == self._inode:
                os.unlink(path)


class SharedMachine(OfMachine):
    """A machine whose arrays lie in a segment of shared memory. Made by Machine.share(); leaving a `with` closes it.

    The machine is used as before, and goes on after close(): only the name is gone, for new readers. A process that is
    forked writes to the same memory, not to a copy.

    >>> import os
    >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
    >>> shared = machine.share(f"pgemu-{os.getpid()}", replace=True, reserve=False)
    >>> os.path.getsize(f"/dev/shm{shared.name}") == shared.size
    True
    """

    machine: Core

    def __init__(self, machine: Core, segment: Segment) -> None:
        if not isinstance(segment, Segment):
            raise TypeError(f"segment {shown(segment)} ({type(segment).__name__}): expected one of Machine.share()")
        self.machine = machine
        self._segment = segment

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"SharedMachine({self.name!r}, {self.size:,} bytes{closed})"

    @property
    def name(self) -> str:
        """The name, with the slash that shm_open() takes."""
        return f"/{self._segment.name}"

    @property
    def size(self) -> int:
        """Bytes of the segment."""
        return self._segment.size

    @property
    def closed(self) -> bool:
        """Whether its name is gone."""
        return self._segment.closed

    @property
    def sequence(self) -> int:
        """Word 5 of the header: odd within edit()."""
        return int(self._segment.header[_SEQUENCE])

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Tell readers that what is done inside belongs together: the sequence is odd meanwhile, and 2 more after it.

        ValueError within another one.

        >>> table = machine.create_page_table("ept")
        >>> with shared.edit():
        ...     table.map(0x1000, 0x8000).name, table.map(0x2000, 0x9000).name, shared.sequence % 2
        ('ok', 'ok', 1)
        >>> shared.sequence % 2
        0
        """
        header = self._segment.header
        if int(header[_SEQUENCE]) & 1:
            raise ValueError("machine: an edit() of it is under way, expected none")
        header[_SEQUENCE] += np.uint64(1)
        try:
            yield
        finally:
            header[_SEQUENCE] += np.uint64(1)

    def close(self) -> None:
        """Take the name away (shm_unlink()): whoever has it open keeps it, nobody opens it any more.

        >>> shared.close()
        >>> shared.closed, os.path.exists(f"/dev/shm{shared.name}"), machine.work().name
        (True, False, 'ok')
        """
        self._segment.close()

    def __enter__(self) -> SharedMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --------------------------------------------------------------------------- making one


class Shareable(Core):
    """What Machine adds to Core for other processes."""

    _segment: Segment | None = None

    def share(self, name: str, *, replace: bool = False, reserve: bool = True) -> SharedMachine:
        """Put the machine's arrays into POSIX shared memory, for other processes to read: pgemu/objects/shared.py.

        They are copied there, and mapped where they are: every view and descriptor stays valid, the machine goes on as
        it is. Nothing else may use it meanwhile. pgemu/include/pgemu_shared.h walks its tables from C and C++.
        name: as for shm_open(), with or without the slash. replace: take the place of what has that name, such as the
        segment of a process that crashed. reserve: take all the memory now; without it only as it is used, and the
        system ends the process (SIGBUS) when /dev/shm is full. The name goes with close(), with the machine, or when
        the process exits; that of a process that is killed stays.
        FileExistsError where the name exists, OSError ENOSPC where there is no room, ValueError for another name or
        a machine that is shared already.

        >>> import os
        >>> with machine.share(f"example-{os.getpid()}", reserve=False) as shared:
        ...     os.path.exists(f"/dev/shm{shared.name}")
        True
        >>> shared.closed, os.path.exists(f"/dev/shm{shared.name}"), vm.touch(0x1234).name
        (True, False, 'RET_PF_SPURIOUS')
        """
        return _share(self, name, replace, reserve)


def _share(machine: Shareable, name: str, replace: bool, reserve: bool) -> SharedMachine:
    found = _NAME.fullmatch(name)
    if found is None or found[1] in (".", ".."):
        raise ValueError(f"name {shown(name)}: expected {_EXPECTED}")
    if machine._segment is not None and not machine._segment.closed:
        raise ValueError(
            f"name {shown(name)}: the machine is shared as /{machine._segment.name}, expected one that is not"
        )
    plain = found[1]
    path = os.path.join(_FOLDER, plain)
    file = _create(path, replace)
    try:
        header, offsets = _lay_out(machine, file, path, reserve)
        _fill(machine, file, header, offsets)
        for array, offset in zip(machine.arrays, offsets, strict=True):
            put_over(array, file, offset)
    except BaseException:
        os.close(file)
        with suppress(OSError):
            os.unlink(path)
        raise
    segment = Segment(plain, file, header)
    machine._segment = segment
    machine._tables_changed = lambda: publish(machine, segment)
    weakref.finalize(machine, segment.close)
    publish(machine, segment)
    header[_STATE] = LIVE
    header[0] = MAGIC
    return SharedMachine(machine, segment)


def _create(path: str, replace: bool) -> int:
    """A new file in the folder of shared memory."""
    if replace:
        with suppress(FileNotFoundError):
            os.unlink(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, f"{_left_by(path)}; replace=True takes its place", path) from None


def _left_by(path: str) -> str:
    """Whose segment stands under a name."""
    if not os.path.isfile(path):  # of a pipe nobody may write to the other end
        return "the name exists"
    with suppress(OSError, ValueError), open(path, "rb") as file:
        words = np.frombuffer(file.read(9 * 8), np.uint64)
        if words.size == 9 and int(words[0]) == MAGIC:
            owner, began = int(words[7]), int(words[8])
            alive = _began(owner) == began
            return f"a machine of process {owner} is shared under that name" + ("" if alive else ", which has ended")
    return "the name exists"


def _began(process: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none. proc_pid_stat(5), word 22."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{process}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
    return 0


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _lay_out(machine: Core, file: int, path: str, reserve: bool) -> tuple[Array, list[int]]:
    """The header, mapped and zero but for where things are, and the byte offset of each array.

    OSError ENOSPC where there is no room.
    """
    rows = (FORMAT_ROW * W.FORMATS, SOURCE_ROW * len(_sources(machine, [0] * 4)), TABLE_ROW * TABLES)
    begins = [HEADER_WORDS * 8]
    for words in rows:
        begins.append(begins[-1] + words * 8)
    offsets = [_pages(begins[-1])]
    for array in machine.arrays:
        offsets.append(offsets[-1] + _pages(array.nbytes))
    size = offsets.pop()
    try:
        os.ftruncate(file, size)
        if reserve:
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise OSError(error.errno, f"{size:,} bytes of shared memory: {error.strerror}", path) from None
    header = np.frombuffer(mmap.mmap(file, offsets[0]), np.uint64)
    state = machine.arrays.state
    header[1:4] = VERSION, HEADER_WORDS * 8, size
    header[7:11] = os.getpid(), _began(os.getpid()), int(layout_digest(), 16), 1
    for i, (array, offset) in enumerate(zip(machine.arrays, offsets, strict=True)):
        header[_ARRAYS + 3 * i : _ARRAYS + 3 * i + 3] = offset, array.size, array.itemsize
    header[_GUEST : _GUEST + 3] = (
        int(state[W.R_POOL_BASE]) << 12, int(state[W.R_GUEST_PAGES]) << 12, offsets[3] + int(state[W.R_CONTENTS]) * 4
    )  # fmt: skip
    header[_FORMATS : _FORMATS + 3] = begins[0], FORMAT_ROW * 8, W.FORMATS
    header[_SOURCES : _SOURCES + 3] = begins[1], SOURCE_ROW * 8, rows[1] // SOURCE_ROW
    header[_TABLES : _TABLES + 3] = begins[2], TABLE_ROW * 8, TABLES
    text = version().encode()[:63]
    header[_VERSION_TEXT] = np.frombuffer(text + bytes(64 - len(text)), np.uint64)
    sources = np.array(_sources(machine, offsets), np.uint64)
    header[begins[1] // 8 : begins[2] // 8] = sources.reshape(-1)
    return header, offsets


# What has a root: kind, first word of the rows in `state`, words of a row, register that counts them, most of them,
# word of the root, word that says "none" where it is equal (or None), register or word of the format's row, word of
# the generation (or None).
_ROWS = (
    (1, W.R_KERNEL_ROOT, 1, None, 1, 0, None, W.R_HOST_FORMAT, None, None),
    (2, W.STATE_SPACES, W.S_WORDS, W.R_SPACES, W.SPACES, W.S_ROOT, None, W.R_HOST_FORMAT, None, W.S_GENERATION),
    (3, W.STATE_SPACES, W.S_WORDS, W.R_SPACES, W.SPACES, W.S_USER_ROOT, W.S_ROOT, W.R_HOST_FORMAT, None,
     W.S_GENERATION),
    (4, W.STATE_VMS, W.V_WORDS, W.R_VMS, W.VMS, W.V_ROOT, None, W.R_STAGE2_FORMAT, None, None),
    (5, W.STATE_VMS, W.V_WORDS, W.R_VMS, W.VMS, W.V_PRIVATE_ROOT, W.V_ROOT, W.R_STAGE2_FORMAT, None, None),
    (6, W.STATE_DOMAINS, W.D_WORDS, W.R_DOMAINS, W.DOMAINS, W.D_ROOT, None, None, W.D_FORMAT, None),
)  # fmt: skip
_OF_TABLES = 7


def _sources(machine: Core, offsets: list[int]) -> list[list[int]]:
    """Rows of SOURCE_ROW words; of places in a row the byte offset and one, 0 for none; of others the byte offset.

    kind, rows, bytes of a row, count, most, root, none if equal to, format of all, format in the row, generation.
    """

    def place(word: Any) -> int:
        return 0 if word is None else int(word) * 8 + 1

    def register(word: Any) -> int:
        return offsets[1] + int(word) * 8

    found = []
    for kind, rows, words, count, most, root, none, fmt, own, generation in _ROWS:
        found.append([
            kind, register(rows), int(words) * 8, _ONE * 8 if count is None else register(count), int(most),
            place(root), place(none), 0 if fmt is None else register(fmt), place(own), place(generation), 0, 0,
        ])  # fmt: skip
    tables = (HEADER_WORDS + FORMAT_ROW * W.FORMATS + SOURCE_ROW * (len(found) + 1)) * 8
    found.append([_OF_TABLES, tables, TABLE_ROW * 8, (_TABLES + 3) * 8, TABLES, 1, 0, 0, 9, 17, 0, 0])
    return found


def _fill(machine: Core, file: int, header: Array, offsets: list[int]) -> None:
    """Copy what was ever in use of the arrays; all else of the segment is zero."""
    for array, offset, runs in zip(machine.arrays, offsets, in_use(machine.arrays), strict=True):
        if not array.size:
            continue
        target = np.frombuffer(mmap.mmap(file, _pages(array.nbytes), offset=offset), array.dtype, array.size)
        for first, end in runs.tolist():
            target[first:end] = array[first:end]


# --------------------------------------------------------------------------- lists


def publish(machine: Core, segment: Segment) -> None:
    """Write the lists of formats and of page tables again: some came, went, or have another root.

    Rows that stay a table's keep their place; one that another table gets has another generation.
    """
    header = segment.header
    within = int(header[_SEQUENCE]) & 1
    header[_SEQUENCE] += np.uint64(1 - within)
    used = machine.register(W.R_FORMATS)
    first = int(header[_FORMATS]) // 8
    formats = header[first : first + W.FORMATS * FORMAT_ROW].reshape(-1, FORMAT_ROW)
    for row in range(used):
        _write_format(formats[row], _name_of(machine, row), machine.format_row(row))
    header[_FORMATS + 3] = used
    first = int(header[_TABLES]) // 8
    rows = header[first : first + TABLES * TABLE_ROW].reshape(-1, TABLE_ROW)
    given = {id(table): table for table in machine.tables_made if table.root and not hasattr(table, "_space")}
    for place, known in enumerate(segment.places):  # those that have a place
        table = given.pop(id(known()), None)
        if table is not None:
            rows[place, :2] = table.root, table.row
        else:
            rows[place, 0] = 0
    free = np.flatnonzero(rows[:, 0] == 0).tolist()
    for place, fresh in zip(free, given.values(), strict=False):
        segment.places[place] = weakref.ref(fresh)
        rows[place, :3] = fresh.root, fresh.row, rows[place, 2] + np.uint64(1)
    listed = np.flatnonzero(rows[:, 0])
    header[_TABLES + 3 : _TABLES + 5] = listed.max(initial=-1) + 1, listed.size + max(len(given) - len(free), 0)
    header[_WRITTEN] += np.uint64(1)
    header[_SEQUENCE] += np.uint64(1 - within)


def _name_of(machine: Core, row: int) -> str:
    own = machine._formats
    return own[row].name if row < len(own) else machine.formats_made[row].name


def _write_format(row: Array, name: str, words: Array) -> None:
    text = name.encode()[:31]
    row[:4] = np.frombuffer(text + bytes(32 - len(text)), np.uint64)
    row[4 : 4 + len(FORMAT_WORDS)] = words[[int(word) for word in FORMAT_WORDS]]
