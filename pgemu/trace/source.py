"""Open a trace, compressed or not, and hand out its text in whole lines.

The compression is told by the first bytes, not by the name. Memory stays bounded: text leaves in blocks of
some hundred kilobytes.
"""

from __future__ import annotations

import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import chain
from typing import BinaryIO, Protocol

from pgemu.errors import InputError

__all__ = ("Match", "Source", "open_source")

_CHUNK = 1 << 16
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell's > writes
_BOM = b"\xef\xbb\xbf"


class _Decompressor(Protocol):
    """What lzma, zlib and zstandard have in common: decodes one stream, remembers what follows it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> _Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _gzip() -> _Decompressor:
    return zlib.decompressobj(zlib.MAX_WBITS | 16)


_FORMATS: tuple[tuple[bytes, str, Callable[[], _Decompressor]], ...] = (
    (b"\xfd7zXZ\x00", "xz", lzma.LZMADecompressor),
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


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
    """

    def __init__(self, name: str, path: str | None, stream: BinaryIO, start: bytes) -> None:
        self.name = name
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
        """Yield the text in blocks that end with a newline; only the last one may lack it.

        :raises InputError: the compressed stream is damaged or ends early, or the data is no text
        """
        rest = b""
        with self._stream:
            for data in chain((self.head,), self._pieces):
                if b"\0" in data:
                    raise InputError("binary data, expected text of ftrace or trace-cmd", self.name)
                cut = data.rfind(b"\n") + 1
                if cut:
                    yield _text(rest + data[:cut])
                    rest = data[cut:]
                else:
                    rest += data
        if rest:
            yield _text(rest)

    @property
    def _compression(self) -> tuple[str, Callable[[], _Decompressor]] | None:
        return next(((name, make) for magic, name, make in _FORMATS if self._start.startswith(magic)), None)

    def _decoded(self) -> Iterator[bytes]:
        if self._compression:
            yield from self._decompressed(*self._compression)
            return
        yield self._start
        while data := self._read():
            yield data

    def _decompressed(self, name: str, make: Callable[[], _Decompressor]) -> Iterator[bytes]:
        decoder: _Decompressor | None = make()
        data = self._start
        while data:
            while data:
                decoder = decoder or make()
                yield self._decompress(decoder, data, name)
                data = b""
                if decoder.eof:
                    # Streams may follow one another; xz pads between them with zeros.
                    data = decoder.unused_data.lstrip(b"\0")
                    decoder = None
            data = self._read()
        if decoder is not None:
            raise InputError(f"truncated: the {name} stream ends early", self.name)

    def _decompress(self, decoder: _Decompressor, data: bytes, name: str) -> bytes:
        try:
            return decoder.decompress(data)
        except (lzma.LZMAError, zlib.error, EOFError) as error:
            raise InputError(f"damaged {name} stream ({error})", self.name) from None
        except Exception as error:
            # zstandard is imported only where it is needed, so its error class cannot be named above.
            if type(error).__name__ != "ZstdError":
                raise
            raise InputError(f"damaged {name} stream ({error})", self.name) from None

    def _read(self) -> bytes:
        try:
            return self._stream.read(_CHUNK)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", self.name) from None


def _text(data: bytes) -> str:
    """Decode; thread names may hold any byte (the kernel cuts them at 15), so none is an error here."""
    text = data.decode("utf-8", errors="surrogateescape")
    return text.replace("\r\n", "\n") if "\r" in text else text


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a trace; "-" is standard input.

    :raises InputError: missing, a directory, unreadable, empty, or damaged at its beginning
    """
    name = os.fspath(path)
    file = None if name == "-" else name
    try:
        if file is None and sys.stdin is None:
            raise InputError("is closed, expected a trace", "<stdin>")
        if file is None:
            name, stream = "<stdin>", sys.stdin.buffer
        else:
            stream = open(file, "rb")  # noqa: SIM115 (closed by blocks() or by close())
        start = stream.read(_CHUNK)
    except IsADirectoryError:
        raise InputError("is a directory, expected a trace", name) from None
    except FileNotFoundError:
        raise InputError("no such file", name) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", name) from None
    try:
        if not start:
            raise InputError("empty file, expected a trace", name)
        return Source(name, file, stream, start)
    except InputError:
        stream.close()
        raise
