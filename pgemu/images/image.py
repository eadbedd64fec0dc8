"""Images of physical memory: those that others made, mapped read-only, and those of a machine, written.

An image is an ELF64 core (QEMU's dump-guest-memory, an uncompressed vmcore of kdump, Machine.write_image) or raw
memory, where the offset in the file is the physical address.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import numpy as np

from pgemu.errors import InputError
from pgemu.images import elf
from pgemu.images.elf import Root
from pgemu.machine.arguments import guards, guards_methods
from pgemu.machine.arrays import U64, Bools, Integers
from pgemu.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from pgemu.machine.core import Core

__all__ = ("Format", "Image", "Range", "Root", "open_image", "release_of", "write_image")

Array = np.ndarray[Any, Any]
Format = Literal["elf", "raw"]

_ZEROES = -1  # "offset" of memory that the file leaves out because it is zero
_FOREIGN = {
    b"KDUMP   ": "a compressed kdump",
    b"DISKDUMP": "a diskdump",
    b"EMiL": "a LiME dump",
    b"PAGEDU": "a Windows crash dump",
    b"QEVM": "a saved state of QEMU",
    b"\x1f\x8b": "a gzip file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
}


class Range(NamedTuple):
    """Physical addresses [start, end)."""

    start: int
    end: int


class _Part(NamedTuple):
    """Physical addresses [start, end) that lie in the file at `offset`, or are zero."""

    start: int
    end: int
    offset: int


@guards_methods
class Image:
    """A read-only image of physical memory; made by `open_image`.

    path: the file's name. ranges: what it holds, ascending, as long as can be. roots: top tables that its notes
    name (elf.Root). sme_mask: SME's bit in entries of the host's tables, 0 for none. problems: what of the file was
    left out because it was not understood, a line each. kernel, configuration: of the kernel whose memory it is, where
    its notes say ("6.12.107-amd64"; "7.3" and "debian" of a machine's), else "". Not to be used after the file was made
    shorter: the system then ends the process.

    >>> import tempfile
    >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     machine.write_image(f"{folder}/m.elf")
    ...     image = open_image(f"{folder}/m.elf")
    >>> root = image.roots[0]
    >>> root.name, root.format
    ('kernel', 'x86-64')
    """

    def __init__(
        self, path: str, data: memoryview, parts: list[_Part], roots: list[Root] | None = None, sme_mask: int = 0,
        problems: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.roots = roots or []
        self.sme_mask = sme_mask
        self.problems = problems or []
        self.kernel = self.configuration = ""
        self._data = data
        self._parts = parts
        self._starts = [part.start for part in parts]
        self.ranges = _merged(parts)
        table = np.array(parts, dtype=np.object_).reshape(-1, 3)
        self._part_starts = table[:, 0].astype(np.uint64)
        self._part_sizes = (table[:, 1] - table[:, 0]).astype(np.uint64)
        self._part_zero = table[:, 2] == _ZEROES
        self._part_offsets = np.where(self._part_zero, 0, table[:, 2]).astype(np.uint64)
        self._range_starts = np.array([r.start for r in self.ranges], np.uint64)
        self._range_sizes = np.array([r.end - r.start for r in self.ranges], np.uint64)

    def __repr__(self) -> str:
        return f"Image({self.path!r}, {len(self.ranges)} ranges, {sum(e - s for s, e in self.ranges):#x} bytes)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """TypeError: what copy, deepcopy and pickle call."""
        raise TypeError(f"Image cannot be copied or pickled: it stands on a mapped file; open {self.path} again")

    # ------------------------------------------------------------------ reading

    def read(self, address: int, count: int) -> bytes:
        """`count` bytes at a physical address. ValueError if the image does not hold them all.

        >>> image.read(root.address, 8) == image.words(root.address, 1).tobytes()
        True
        """
        pieces = []
        end = address + count
        while address < end:
            part = self._part_of(address)
            if part is None:
                raise ValueError(f"address {address:#x}: not in {self.path}, expected a physical address that it holds")
            upto = min(end, part.end)
            at = address - part.start + part.offset
            zero = part.offset == _ZEROES
            pieces.append(bytes(upto - address) if zero else bytes(self._data[at : at + upto - address]))
            address = upto
        return b"".join(pieces)

    def words(self, address: int, count: int) -> U64:
        """uint64[count] at a physical address, read-only. ValueError if the image does not hold them all.

        >>> image.words(root.address, 512).size
        512
        """
        part = self._part_of(address)
        if part is not None and part.offset != _ZEROES and 0 <= count * 8 <= part.end - address:
            return np.frombuffer(self._data, "<u8", count, part.offset + address - part.start)
        return np.frombuffer(self.read(address, count * 8), "<u8")

    def holds(self, addresses: Integers) -> Bools:
        """bool[n]: whether the image holds the word at each physical address (uint64[n]).

        >>> image.holds([root.address, 1 << 50]).tolist()
        [True, False]
        """
        return self._find(np.asarray(addresses, np.uint64), self._range_starts, self._range_sizes)[1]

    def load(self, addresses: Integers) -> U64:
        """uint64[n]: the words at physical addresses (uint64[n]). ValueError if the image does not hold them all.

        >>> hex(image.load([root.address + 8 * 273])[0] & 0xFFF)
        '0x0'
        """
        if not self._parts:
            raise ValueError(f"image {self.path}: it is closed, expected one that is not")
        given = np.asarray(addresses, np.uint64)
        part, inside = self._find(given, self._part_starts, self._part_sizes)
        found = np.zeros(given.shape, np.uint64)
        stored = inside & ~self._part_zero[part]
        offsets = given - self._part_starts[part] + self._part_offsets[part]
        for unaligned in np.unique(offsets[stored] & np.uint64(7)).tolist():
            of_these = stored & (offsets & np.uint64(7) == unaligned)
            words = np.frombuffer(self._data, "<u8", (len(self._data) - unaligned) // 8, unaligned)
            found[of_these] = words[offsets[of_these] >> np.uint64(3)]
        for at in np.flatnonzero(~inside).tolist():  # outside, or across the seam of two parts
            found[at] = int.from_bytes(self.read(int(given[at]), 8), "little")
        return found

    def _part_of(self, address: int) -> _Part | None:
        index = bisect_right(self._starts, address) - 1
        return self._parts[index] if index >= 0 and address < self._parts[index].end else None

    @staticmethod
    def _find(addresses: U64, starts: Array, sizes: Array) -> tuple[Array, Array]:
        """(intp[n] index of an interval, bool[n] whether it holds the whole word) for ascending intervals."""
        if not starts.size:
            return np.zeros(addresses.shape, np.intp), np.zeros(addresses.shape, np.bool_)
        index = (np.searchsorted(starts, addresses, side="right") - 1).clip(0)
        within = addresses - starts[index]  # huge below the first interval
        return index, (within < sizes[index]) & (sizes[index] - within >= np.uint64(8))

    # ------------------------------------------------------------------ closing

    def close(self) -> None:
        """Forget the file. Arrays that `words` returned stay valid and keep it mapped.

        >>> image.close()
        >>> image.ranges
        []
        """
        self._data = memoryview(b"")
        self._parts, self._starts, self.ranges = [], [], []
        self._part_starts = self._part_sizes = self._range_starts = self._range_sizes = np.zeros(0, np.uint64)
        self._part_zero, self._part_offsets = np.zeros(0, np.bool_), np.zeros(0, np.uint64)

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --------------------------------------------------------------------------- opening


@guards()
def open_image(path: str | os.PathLike[str], format: Format | None = None) -> Image:
    """Map an image of physical memory read-only.

    format: "elf", "raw", or None to look at the file's first bytes. Where PT_LOADs overlap, the one that begins
    first counts; memory past a segment's bytes in the file is zero, and a segment without bytes in the file is a hole.
    TypeError or ValueError for another format and for what names no file.

    :raises InputError: the file cannot be read, is no image, or is not whole

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Machine(Config()).write_image(f"{folder}/m.elf")
    ...     image = open_image(f"{folder}/m.elf")
    >>> image.roots[0].name
    'kernel'
    """
    name = os.fspath(path)
    data = _map(name)
    if format is None:
        for magic, what in _FOREIGN.items():
            if data[: len(magic)] == magic:
                raise InputError(f"{what}: expected an uncompressed ELF core or raw memory", name)
    is_elf = data[:4] == elf.MAGIC
    if format == "elf" and not is_elf:
        raise InputError("no ELF header: expected an ELF core", name)
    if format == "raw" or not is_elf:
        if len(data) % elf.PAGE:
            raise InputError(
                f"neither an ELF core nor raw memory: {len(data)} bytes, expected a multiple of {elf.PAGE}", name
            )
        return Image(name, data, [_Part(0, len(data), 0)])
    contents = elf.parse(data, name)
    segments, problems = contents.segments, contents.problems
    problems += _repeated(contents.roots)
    if beyond := sum(s.address + s.size > 1 << 64 for s in segments):
        problems.append(f"{beyond} PT_LOAD{'s' * (beyond > 1)} without a physical address: left out")
    image = Image(name, data, _disjoint(segments, name), contents.roots, contents.sme_mask, problems)
    image.kernel, image.configuration = contents.kernel, contents.configuration
    return image


def release_of(image: Image, known: Sequence[str]) -> str | None:
    """Which of `known` ("6.12", ..., ascending) is the image's kernel, or the last one before it.

    None where the notes name no kernel; the first one of an older kernel.
    """
    numbers = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", image.kernel)
    if numbers is None:
        return None
    mine = int(numbers[1]), int(numbers[2])
    return max((one for one in known if _numbers(one) <= mine), key=_numbers, default=known[0])


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _map(name: str) -> memoryview:
    try:
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is refused, not waited for
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}", name) from None
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise InputError("not a regular file: expected an ELF core or raw memory", name)
        if about.st_size == 0:
            raise InputError("empty: expected an ELF core or raw memory", name)
        return memoryview(mmap.mmap(file, about.st_size, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InputError(f"cannot be mapped: {error.strerror}", name) from None
    finally:
        os.close(file)


def _repeated(roots: list[Root]) -> list[str]:
    """Roots of one name that are not the same."""
    named = {root.name: root for root in reversed(roots)}
    return [
        f"root {root.name} {root.address:#x}: another of its name is {named[root.name].address:#x}"
        for root in roots
        if root != named[root.name]
    ]


def _disjoint(segments: list[elf.Segment], name: str) -> list[_Part]:
    """Parts, ascending and without overlap: what the file holds, and zeroes where it does not."""
    given = [s for s in segments if s.address + s.size <= 1 << 64]  # others have no physical address
    if not given:
        raise InputError("no PT_LOAD with memory: expected a core of physical memory", name)
    if len(given) > 1 and not any(s.address for s in given):
        raise InputError(
            "every PT_LOAD is at physical address 0: expected a core of physical memory, not of a process", name
        )
    stored = sorted(_Part(s.address, s.address + s.file_size, s.offset) for s in given)
    zero = sorted(_Part(s.address + s.file_size, s.address + s.size, _ZEROES) for s in given if s.size > s.file_size)
    parts: list[_Part] = []
    end = 0
    for part in stored:
        start = max(part.start, end)
        if start < part.end:
            parts.append(_Part(start, part.end, part.offset + start - part.start))
            end = part.end
    return sorted(parts + _between(zero, parts)) if zero else parts


def _between(zero: list[_Part], parts: list[_Part]) -> list[_Part]:
    """What of `zero` lies outside `parts`, without overlap; both ascending."""
    found = []
    starts = [part.start for part in parts]
    end = 0
    for part in zero:
        start = max(part.start, end)
        while start < part.end:
            index = bisect_right(starts, start)
            if index and start < parts[index - 1].end:
                start = parts[index - 1].end
                continue
            upto = min(part.end, starts[index] if index < len(starts) else part.end)
            found.append(_Part(start, upto, _ZEROES))
            start = upto
        end = max(end, part.end)
    return found


def _merged(parts: list[_Part]) -> list[Range]:
    """Ranges of parts, those that touch as one."""
    ranges: list[Range] = []
    for part in parts:
        if ranges and ranges[-1].end == part.start:
            ranges[-1] = Range(ranges[-1].start, part.end)
        else:
            ranges.append(Range(part.start, part.end))
    return ranges


# --------------------------------------------------------------------------- writing


def write_image(core: Core, roots: list[Root], path: str | os.PathLike[str], format: Format = "elf") -> None:
    """Write a machine's physical memory, with the top tables that the note names; see Machine.write_image."""
    name = os.fspath(path)
    ranges = core.memory.ranges()
    if format == "elf":
        head, offsets = elf.prologue(ranges, roots, core.config.kernel, core.config.configuration)
        size = offsets[-1] + ranges[-1][1] - ranges[-1][0]
    else:
        head, offsets = b"", [start for start, _ in ranges]
        size = ranges[-1][1]

    def pieces() -> Iterable[tuple[int, Any]]:
        yield 0, head
        for (start, end), offset in zip(ranges, offsets, strict=True):
            for address, words in core.memory.pieces(start, end):
                yield offset + address - start, words

    _write(name, size, pieces)


def _write(name: str, size: int, pieces: Callable[[], Iterable[tuple[int, Any]]]) -> None:
    """Write (offset, bytes) pieces to a sparse file."""
    with whole_file(name) as file:
        os.ftruncate(file.fileno(), size)
        for offset, piece in pieces():
            _write_all(file.fileno(), offset, piece)


def _write_all(file: int, offset: int, piece: Any) -> None:
    data = memoryview(piece).cast("B")
    while data:
        done = os.pwrite(file, data, offset)
        data = data[done:]
        offset += done
