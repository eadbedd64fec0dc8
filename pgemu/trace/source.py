"""Open a trace, compressed or not, and hand out its text in whole lines.

The compression is told by the first bytes, not by the name. Memory stays bounded whatever the file holds: text leaves
in blocks of some hundred kilobytes, a line is at most 1 MiB, decoders give what they decode in pieces, and data that
grows as no log does is refused.
"""

from __future__ import annotations

import lzma
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import chain
from typing import Any, BinaryIO, Protocol

from pgemu.errors import InputError
from pgemu.trace.watching import tell_of

__all__ = (
    "LONGEST_LINE",
    "MOST_GROWTH",
    "MOST_RECORD_GROWTH",
    "Match",
    "Source",
    "gathered",
    "open_source",
    "records",
    "text_of",
)

LONGEST_LINE = 1 << 20
"""Bytes; the kernel's lines have a page at most (kernel/trace/trace.h: TRACE_SEQ_BUFFER_SIZE, 8 KiB)."""

MOST_GROWTH = 200
"""How much larger than its compressed form a text may be; each line of a log has a time stamp of its own, so that logs
grow 10 to 60 times."""

MOST_RECORD_GROWTH = 1 << 14
"""The same of records of fixed size, mostly zeros and repetitions; behind it is a reader that refuses what is none."""

_CHUNK = 1 << 16
_FEED = 1 << 12  # compressed bytes at once: what follows a stream is copied, and a file may be many short ones
_BLOCK = 1 << 18  # bytes that leave at once, at most
_RECORD_BLOCK = 1 << 20  # bytes of records at once
_FREE_GROWTH = 64 << 20  # bytes of text that need no reason
_DECODER_MEMORY = 256 << 20  # xz -9 takes 65 MiB
_ZSTD_WINDOW = 128 << 20  # zstd -19 --long, what its own program takes without being told
_ZSTD_PIECE = 1 << 10  # bytes; at most 256 blocks, of 128 KiB each (RFC 8878, 3.1.1.2)
_MOST_COPIED = 16 << 30  # bytes of what is compressed or piped and has to be read at any place
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell's > writes
_BOM = b"\xef\xbb\xbf"


class _Decoder(Protocol):
    """Decodes one stream, and remembers what follows it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decode(self, data: bytes, /) -> Iterator[bytes]:
        """Yield what some bytes of the stream decode to, in pieces of bounded size."""


class _OfLibrary:
    """What the decoders of lzma and zlib have in common."""

    _decoder: Any

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decoder.unused_data)


class _Xz(_OfLibrary):
    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DECODER_MEMORY)

    def decode(self, data: bytes, /) -> Iterator[bytes]:
        yield self._decoder.decompress(data, _BLOCK)
        while not (self._decoder.eof or self._decoder.needs_input):
            yield self._decoder.decompress(b"", _BLOCK)


class _Gzip(_OfLibrary):
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def decode(self, data: bytes, /) -> Iterator[bytes]:
        while data and not self._decoder.eof:
            yield self._decoder.decompress(data, _BLOCK)
            data = self._decoder.unconsumed_tail
        while not self._decoder.eof and (piece := self._decoder.decompress(b"", _BLOCK)):
            yield piece


class _Zstd:
    """Its decoder knows no most of what it gives, so it gets little at a time."""

    def __init__(self) -> None:
        import zstandard

        self._decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        self._rest = b""

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data + self._rest

    def decode(self, data: bytes, /) -> Iterator[bytes]:
        for number, piece in enumerate(_sliced(data, _ZSTD_PIECE), 1):
            yield self._decoder.decompress(piece)
            if self._decoder.eof:
                self._rest = data[number * _ZSTD_PIECE :]
                return


_FORMATS: tuple[tuple[bytes, str, Callable[[], _Decoder]], ...] = (
    (b"\xfd7zXZ\x00", "xz", _Xz),
    (b"\x1f\x8b", "gzip", _Gzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _Zstd),
    *((bytes([low]) + b"\x2a\x4d\x18", "zstd", _Zstd) for low in range(0x50, 0x60)),  # a frame to be skipped
)

_LONGEST_MAGIC = max(len(magic) for magic, _, _ in _FORMATS)
_SHOWN = 16  # bytes


class Match(IntEnum):
    """How sure a reader is that a file is of its format."""

    NO = 0
    POSSIBLE = 1  # nothing speaks against it
    SURE = 2


class Source:
    """An opened trace.

    Attributes:
        name: as messages show it, "<stdin>" for standard input
        path: of a file that is not compressed, for those who read it themselves; else None
        head: how it begins, decompressed
        expected: what it should be, as messages say it; who knows the format may set it
    """

    def __init__(self, name: str, path: str | None, stream: BinaryIO, start: bytes, expected: str = "a trace") -> None:
        self.name = name
        self.expected = expected
        self._most_growth = MOST_GROWTH
        self._stream = stream
        self._start = start
        self.path = None if self._compression else path
        self._pieces = self._decoded()
        self.head = next((piece for piece in self._pieces if piece), b"").removeprefix(_BOM)
        if self.head.startswith(_UTF_16):
            raise InputError("text in UTF-16, expected UTF-8: convert it with iconv -f UTF-16 -t UTF-8", name)

    def close(self) -> None:
        """Close the file, of which nothing more is wanted."""
        self._stream.close()

    def blocks(self) -> Iterator[str]:
        """The same as text."""
        return map(text_of, self.byte_blocks())

    def byte_blocks(self) -> Iterator[bytes]:
        """Yield the text in blocks that end with a newline; only the last one may lack it.

        :raises InputError: the compressed stream is damaged, ends early or grows too much, the data is no text, or a
            line is longer than LONGEST_LINE
        """
        parts: list[bytes] = []  # of a line whose end is yet to come
        waiting = lines = 0
        with self._stream:
            for data in self._slices():
                if b"\0" in data:
                    raise InputError(f"binary data, expected {self.expected}", self.name)
                first = data.find(b"\n")
                if waiting + (len(data) if first < 0 else first) > LONGEST_LINE:
                    text = f"a line of more than {LONGEST_LINE} bytes, expected {self.expected}"
                    raise InputError(text, self.name, lines + 1)
                if first < 0:
                    parts.append(data)
                    waiting += len(data)
                    continue
                cut = data.rfind(b"\n") + 1
                lines += data.count(b"\n")
                yield b"".join([*parts, data[:cut]])
                parts = [data[cut:]]
                waiting = len(data) - cut
        if waiting:
            yield b"".join(parts)

    def raw_blocks(self) -> Iterator[bytes]:
        """Yield the data as it is, decompressed, in blocks of bounded size that end anywhere.

        :raises InputError: the compressed stream is damaged, ends early or grows too much
        """
        self._most_growth = MOST_RECORD_GROWTH
        with self._stream:
            yield from self._slices()

    @contextmanager
    def whole(self) -> Iterator[BinaryIO]:
        """Open the data to be read at any place: the file, or a copy of what is compressed or comes from a pipe.

        :raises InputError: as of raw_blocks(); the copy is larger than _MOST_COPIED bytes, or has no room
        """
        if self.path is not None:
            self.close()
            with self._failing(), open(self.path, "rb") as file:
                yield file
            return
        with self._failing(), tempfile.TemporaryFile() as copy:
            for block in self.raw_blocks():
                if copy.tell() > _MOST_COPIED:
                    raise InputError(f"more than {_MOST_COPIED >> 30} GiB, give the file itself", self.name)
                copy.write(block)
            copy.seek(0)
            yield copy

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Name the trace where its file or a copy fails."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", self.name) from None

    def _slices(self) -> Iterator[bytes]:
        """The data in slices of at most _BLOCK bytes."""
        for data in chain((self.head,), self._pieces):
            yield from _sliced(data, _BLOCK)

    @property
    def _compression(self) -> tuple[str, Callable[[], _Decoder]] | None:
        return next(((name, make) for magic, name, make in _FORMATS if self._start.startswith(magic)), None)

    def _decoded(self) -> Iterator[bytes]:
        if self._compression:
            yield from self._decompressed(*self._compression)
            return
        yield self._start
        while data := self._read():
            yield data

    def _decompressed(self, name: str, make: Callable[[], _Decoder]) -> Iterator[bytes]:
        decoder: _Decoder | None = make()
        taken = given = padding = 0
        kept = b""  # behind a stream, too little to tell what it is
        for more in self._compressed():
            data = kept + more
            taken += len(more)
            kept = b""
            while data:
                if decoder is None:  # streams may follow one another, with zeros between them
                    behind = data.lstrip(b"\0")
                    padding += len(data) - len(behind)
                    if len(behind) < _LONGEST_MAGIC:
                        kept = behind
                        break
                    self._check_behind(name, behind)
                    self._check_padding(name, padding)
                    data, padding, decoder = behind, 0, make()
                for piece in self._pieces_of(decoder, data, name):
                    given += len(piece)
                    if given > _FREE_GROWTH and given > self._most_growth * taken:
                        text = f"grows to more than {self._most_growth} times its size, as no log does"
                        raise InputError(f"{text}; if it is one, give what it decompresses to", self.name)
                    yield piece
                data = b""
                if decoder.eof:
                    data = decoder.unused_data
                    decoder = None
        if kept:
            self._check_behind(name, kept)
        if kept or decoder is not None:
            raise InputError(f"truncated: the {name} stream ends early", self.name)
        self._check_padding(name, padding)

    def _check_behind(self, name: str, data: bytes) -> None:
        """Refuse what stands behind a stream and is no other one of its kind, nor the beginning of one that is cut."""
        for magic, other, _ in _FORMATS:
            if data.startswith(magic[: len(data)]):
                if other == name:
                    return
                what = f"what stands behind the {name} stream is one of {other}, expected one kind"
                raise InputError(what, self.name)
        what = f"something else stands behind the {name} stream ({data[:_SHOWN]!r}), expected its end"
        raise InputError(f"{what} or another one", self.name)

    def _check_padding(self, name: str, size: int) -> None:
        """Refuse zeros behind an xz stream that are no multiple of four bytes (The .xz File Format, 2.2)."""
        if name == "xz" and size % 4:
            raise InputError(f"damaged xz stream ({size} bytes of padding, expected a multiple of 4)", self.name)

    def _compressed(self) -> Iterator[bytes]:
        """What the file holds, in pieces of at most _FEED bytes."""
        yield from _sliced(self._start, _FEED)
        while data := self._read():
            yield from _sliced(data, _FEED)

    def _pieces_of(self, decoder: _Decoder, data: bytes, name: str) -> Iterator[bytes]:
        try:
            yield from decoder.decode(data)
        except (lzma.LZMAError, zlib.error, EOFError) as error:
            raise InputError(f"damaged {name} stream ({error})", self.name) from None
        except Exception as error:
            # zstandard is imported only where it is needed, so its error class cannot be named above.
            if type(error).__name__ != "ZstdError":
                raise
            raise InputError(f"damaged {name} stream ({error})", self.name) from None

    def _read(self) -> bytes:
        try:
            tell_of(self._stream)
            return self._stream.read(_CHUNK)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", self.name) from None


def _sliced(data: bytes, most: int) -> Iterator[bytes]:
    """The data in slices of at most `most` bytes."""
    for first in range(0, len(data), most):
        yield data[first : first + most]


def gathered(blocks: Iterable[bytes], least: int, multiple: int = 1) -> Iterator[bytes]:
    """Yield blocks joined to at least `least` bytes each, a multiple of `multiple`; the last one is what is left."""
    parts: list[bytes] = []
    waiting = 0
    for block in blocks:
        parts.append(block)
        waiting += len(block)
        if waiting >= least:
            whole = b"".join(parts)
            cut = waiting - waiting % multiple
            yield whole[:cut] if cut < waiting else whole
            parts, waiting = [whole[cut:]], waiting - cut
    if waiting:
        yield b"".join(parts)


def records(
    blocks: Iterable[bytes], size: int, source: Source, check: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """Yield blocks of whole records of a size, some thousand at a time.

    :param source: of which the blocks are
    :param check: called before the complaint, of records that may be none at all
    :raises InputError: the last record is cut (with its number), after those before it
    """
    done = 0
    for block in gathered(blocks, _RECORD_BLOCK, size):
        left = len(block) % size
        done += len(block) // size
        if len(block) >= size:
            yield block[: len(block) - left] if left else block
        if left:
            check()
            what = f"truncated: record {done + 1:,} has {left} bytes, expected {size}, of {source.expected}"
            raise InputError(what, source.name)


def text_of(data: bytes) -> str:
    """Decode; thread names may hold any byte (the kernel cuts them at 15), so none is an error here."""
    text = data.decode("utf-8", errors="surrogateescape")
    return text.replace("\r\n", "\n") if "\r" in text else text


def open_source(path: str | os.PathLike[str], expected: str = "a trace") -> Source:
    """Open a trace; "-" is standard input.

    :param expected: what it should be, as messages say it
    :raises InputError: missing, a directory, unreadable, empty, or damaged at its beginning
    """
    name = os.fspath(path)
    file = None if name == "-" else name
    try:
        if file is None and sys.stdin is None:
            raise InputError(f"is closed, expected {expected}", "<stdin>")
        if file is None:
            name, stream = "<stdin>", sys.stdin.buffer
        else:
            stream = open(file, "rb")  # noqa: SIM115 (closed by blocks() or by close())
        start = stream.read(_CHUNK)
    except IsADirectoryError:
        raise InputError(f"is a directory, expected {expected}", name) from None
    except FileNotFoundError:
        raise InputError("no such file", name) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", name) from None
    try:
        if not start:
            raise InputError(f"empty file, expected {expected}", name)
        # A pipe is read once: what it gave cannot be found again under its name.
        return Source(name, file if stream.seekable() else None, stream, start, expected)
    except InputError:
        stream.close()
        raise
