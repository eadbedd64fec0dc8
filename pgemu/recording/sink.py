"""Text that is written to a file, compressed as its name says."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pgemu.errors import InputError
from pgemu.whole_file import whole_file

__all__ = ("Sink", "opened")


def _zstd(file: BinaryIO) -> Any:
    import zstandard

    return zstandard.ZstdCompressor().stream_writer(file, closefd=False)


_COMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".xz": lambda file: lzma.LZMAFile(file, "wb"),  # noqa: SIM115 (closed by opened())
    ".gz": lambda file: gzip.GzipFile("", "wb", fileobj=file, mtime=0),
    ".zst": _zstd,
}


class Sink:
    """Where text goes.

    Attributes:
        lines: how many have been written
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lines = 0

    def write(self, data: bytes) -> None:
        """Write a piece, which ends anywhere. OSError where the disk is full."""
        self.lines += data.count(b"\n")
        self._stream.write(data)


@contextmanager
def opened(path: str) -> Iterator[Sink]:
    """Open a file for text, compressed by its suffix (.xz, .gz, .zst); it appears whole or not at all.

    :raises InputError: it cannot be written
    """
    compress = _COMPRESSORS.get(os.path.splitext(path)[1])
    try:
        with whole_file(path) as file:
            if compress is None:
                yield Sink(file)
                return
            with compress(file) as stream:
                yield Sink(stream)
    except OSError as error:
        if error.filename != path:
            raise
        raise InputError(f"cannot be written: {error.strerror}", path) from None
