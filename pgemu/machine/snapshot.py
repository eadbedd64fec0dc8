"""A machine's arrays in a file, and as other arrays: what of them was ever in use, and nothing else.

The file, little endian; it is no pickle, and tells on other computers what it tells here::

    8 bytes    b"pgemuMAC"
    uint32     version of this form
    uint32     length of the header
    header     JSON: "pgemu" (the version that wrote it), "words" (layout_digest()), "config" (fields of Config),
               "sizes" (elements of each array), and what the machine's owner keeps beside
    one frame of zstd, of each array (ram, state, stats, counts, in this order):
               uint64 n, n times uint64 first and end of a run of elements, then the elements of all runs
    32 bytes   SHA-256 of everything before

Of `ram` it has the frames that were ever handed out: freed ones hold what was last in them, as images show. Whoever
writes the checksum writes the machine: it finds damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from pgemu.errors import InputError
from pgemu.machine.boot import allocate
from pgemu.machine.config import Config
from pgemu.machine.mapped_memory import file_runs
from pgemu.machine.physical import PhysicalMemory
from pgemu.version import version
from pgemu.whole_file import whole_file
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import DTYPES, Machine as Arrays
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from zstandard import ZstdCompressionWriter

__all__ = ("Snapshot", "copied", "in_use", "layout_digest", "read", "write")

Array = np.ndarray[Any, Any]
Runs = Array  # int64[n, 2]: first element and the one behind the last of each run
MAGIC = b"pgemuMAC"
VERSION = 1
_HEAD = struct.Struct("<8sII")
_DIGEST = 32
_LEVEL = 1  # of zstd: entries and struct pages repeat, more takes longer and gains little
_PIECE = 1 << 24  # bytes at a time
_PAGE = 4096
_WHOLE = 1 << 20  # bytes of an array that is looked at whole
_TOUCHED = np.uint64(0b11 << 62)  # of a word of pagemap: present, or swapped out. Documentation/admin-guide/mm/pagemap
_LONGEST = 1 << 24  # bytes of a header


class Snapshot(NamedTuple):
    """A machine out of a file: its configuration, its arrays, and the header's other keys."""

    config: Config
    arrays: Arrays
    header: dict[str, Any]


@cache
def layout_digest() -> str:
    """What all words, registers, rows and events of this version are called and count as, in 16 hexadecimal digits."""
    named = {name: value for name, value in vars(W).items() if name.isupper() and isinstance(value, int | np.integer)}
    numbered = {f"{kind.__name__}.{one.name}": one for kind in (Event, Gauge, Operation) for one in kind}
    lines = [f"{name}={int(value)}" for name, value in sorted({**named, **numbered}.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- what was ever in use


def _runs(flags: Array) -> Runs:
    """Where bool[n] is true."""
    padded = np.zeros(flags.size + 2, np.int8)
    padded[1:-1] = flags
    return np.flatnonzero(np.diff(padded)).reshape(-1, 2)


def _frames(arrays: Arrays) -> Runs:
    """Runs of `ram`: every frame that was ever handed out."""
    frames = PhysicalMemory(arrays).metadata_frames()
    if not frames.size:
        return np.zeros((0, 2), np.int64)
    cuts = np.flatnonzero(np.diff(frames) > 1) + 1
    starts, ends = frames[np.append(0, cuts)], frames[np.append(cuts - 1, frames.size - 1)] + 1
    found: Runs = np.stack([starts, ends], axis=1) * 512
    return found


def _touched(array: Array) -> Runs:
    """Runs of an array, whole pages of memory that anybody ever wrote or read; all of it where nobody tells."""
    in_file = file_runs(array)
    if in_file is not None:  # of a file's pages pagemap tells only those that this process has mapped
        return np.array(in_file, np.int64).reshape(-1, 2) // array.itemsize
    first = array.ctypes.data // _PAGE
    count = -(-(array.ctypes.data + array.nbytes) // _PAGE) - first
    everything = np.array([[0, array.size]])
    if array.nbytes <= _WHOLE:
        return everything
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            told = np.frombuffer(os.pread(pagemap.fileno(), count * 8, first * 8), np.uint64)
    except OSError:
        return everything
    if told.size != count:
        return everything
    pages = _runs(told & _TOUCHED != 0) + first
    found: Runs = np.clip((pages * _PAGE - array.ctypes.data) // array.itemsize, 0, array.size)
    return found


def _written(array: Array) -> Iterator[tuple[int, int]]:
    """Runs of an array that hold anything but zeroes, pages of 4096 bytes at a time."""
    unit = _PAGE // array.itemsize
    for first, end in _touched(array).tolist():
        start = first // unit * unit
        whole = (end - start) // unit * unit
        pages = array[start : start + whole].reshape(-1, unit)
        for begin, stop in _runs(np.asarray(pages.any(axis=1))).tolist():
            yield start + begin * unit, start + stop * unit
        if array[start + whole : end].any():
            yield start + whole, end


def in_use(arrays: Arrays) -> Iterator[Runs]:
    """Of each array the runs that have to be kept; all else is zero."""
    for name, array in zip(arrays._fields, arrays, strict=True):
        if name == "ram":
            yield _frames(arrays)
        else:
            yield np.array(list(_written(array)), np.int64).reshape(-1, 2)


def copied(config: Config, arrays: Arrays) -> Arrays:
    """Other arrays that hold the same. OSError ENOMEM where this computer cannot hold them."""
    made = allocate(config)
    for source, target, runs in zip(arrays, made, in_use(arrays), strict=True):
        for first, end in runs.tolist():
            target[first:end] = source[first:end]
    return made


# --------------------------------------------------------------------------- the file


class _Hashed:
    """A file that is written and hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)


def write(
    path: str | os.PathLike[str], config: Config, arrays: Arrays, beside: Mapping[str, Any] | None = None
) -> None:
    """Write a machine to a file, which appears whole or not at all. OSError where it cannot be written.

    :param beside: further keys of the header, as JSON has them
    """
    import zstandard

    document = {
        "pgemu": version(),
        "words": layout_digest(),
        "config": asdict(config),
        "sizes": [array.size for array in arrays],
        **(beside or {}),
    }
    header = json.dumps(document).encode()
    with whole_file(path) as file:
        hashed = _Hashed(file)
        hashed.write(_HEAD.pack(MAGIC, VERSION, len(header)) + header)
        with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(hashed, closefd=False) as stream:  # type: ignore[arg-type]
            for array, runs in zip(arrays, in_use(arrays), strict=True):
                _write_array(stream, array, runs)
        file.write(hashed.hash.digest())


def _write_array(stream: ZstdCompressionWriter, array: Array, runs: Runs) -> None:
    stream.write(np.uint64(len(runs)).tobytes() + runs.astype("<u8").tobytes())
    for first, end in runs.tolist():
        for begin in range(first, end, _PIECE // array.itemsize):
            piece = array[begin : min(begin + _PIECE // array.itemsize, end)]
            stream.write(piece.astype(piece.dtype.newbyteorder("<"), copy=False).data)


def read(path: str | os.PathLike[str]) -> Snapshot:
    """Read a machine.

    :raises InputError: it cannot be read, is none that pgemu wrote, is damaged, is of another version, or this computer
        cannot hold it
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            return _read(file, name)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", name) from None


def _read(file: BinaryIO, name: str) -> Snapshot:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(MAGIC):
        raise InputError("no machine in it, expected a file that Machine.save() or a checkpoint of pgemu wrote", name)
    _, form, length = _HEAD.unpack(head)
    if form != VERSION:
        raise InputError(f"a machine in form {form}, expected form {VERSION}: another version of pgemu wrote it", name)
    body = _checked(file, name)
    header = _header(file.read(min(length, _LONGEST)), name)
    if header["words"] != layout_digest():
        raise InputError(
            f"a machine of pgemu {header['pgemu']} with words {header['words']}, expected those of pgemu {version()}, "
            f"{layout_digest()}",
            name,
        )
    try:
        config = Config(**header["config"])
        arrays = allocate(config)
    except (TypeError, ValueError, InputError) as error:
        raise InputError(f"the machine's configuration cannot be used ({error})", name) from None
    except OSError as error:
        raise InputError(f"{error.strerror or error}", name) from None
    if header["sizes"] != [array.size for array in arrays]:
        raise InputError(f"arrays of {header['sizes']} elements, expected those of {config}", name)
    _read_arrays(file, body, arrays, name)
    return Snapshot(config, arrays, header)


def _checked(file: BinaryIO, name: str) -> int:
    """Where the checksum begins, which is right; the file stands behind its head again."""
    size = os.fstat(file.fileno()).st_size
    found = hashlib.sha256()
    file.seek(0)
    left = max(size - _DIGEST, 0)
    while left and (piece := file.read(min(left, _PIECE))):
        found.update(piece)
        left -= len(piece)
    if file.read(_DIGEST + 1) != found.digest():
        raise InputError("damaged or cut off: its checksum is another one", name)
    file.seek(_HEAD.size)
    return size - _DIGEST


def _header(text: bytes, name: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        for key, kind in (("pgemu", str), ("words", str), ("config", dict), ("sizes", list)):
            if not isinstance(header[key], kind):
                raise ValueError(f"{key} is no {kind.__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the header of the machine cannot be used ({str(error)[:100]})", name) from None
    found: dict[str, Any] = header
    return found


def _read_arrays(file: BinaryIO, end: int, arrays: Arrays, name: str) -> None:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as stream:
            for array in arrays:
                _read_array(stream, array)
    except (zstandard.ZstdError, ValueError, EOFError) as error:
        raise InputError(f"the arrays of the machine cannot be used ({error})", name) from None
    if file.tell() < end:
        raise InputError("the arrays of the machine cannot be used (there is more behind them)", name)


def _read_array(stream: Any, array: Array) -> None:
    count = int(np.frombuffer(_exactly(stream, 8), "<u8")[0])
    if count > array.size:
        raise ValueError(f"{count} runs of {array.size} elements")
    runs = np.frombuffer(_exactly(stream, 16 * count), "<u8").reshape(-1, 2)
    flat = runs.reshape(-1)
    if count and (int(flat[-1]) > array.size or (flat[1:] < flat[:-1]).any()):
        raise ValueError("runs beyond the array, or in no order")
    for first, end in runs.tolist():
        for begin in range(first, end, _PIECE // array.itemsize):
            stop = min(begin + _PIECE // array.itemsize, end)
            data = _exactly(stream, (stop - begin) * array.itemsize)
            array[begin:stop] = np.frombuffer(data, array.dtype.newbyteorder("<"))


def _exactly(stream: Any, size: int) -> bytes:
    pieces = []
    while size:
        piece = stream.read(size)
        if not piece:
            raise EOFError("cut off")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


assert tuple(DTYPES) == Arrays._fields
