"""How far a trace has been read, told to whoever shows it: readers need not know whether somebody looks on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import BinaryIO

from pgemu.errors import InputError

__all__ = ("limited", "tell", "tell_of", "watched")

_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("_watcher", default=None)


@contextmanager
def watched(watcher: Callable[[int, int], None]) -> Iterator[None]:
    """Have `watcher` told of every trace that is read within.

    :param watcher: called with what has been read and all there is, 0 where nobody knows: bytes of a file of text as it
        lies there, records of Parquet
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def limited(watcher: Callable[[int, int], None], most: int | None) -> Callable[[int, int], None]:
    """The same watcher, which stops whoever reads when this process takes more memory.

    :param most: bytes of resident memory; None: as much as there is
    """
    if most is None:
        return watcher
    import resource

    def watching(done: int, total: int) -> None:
        if (taken := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) > most:
            raise InputError(f"reading takes more than --max-memory {most >> 20} MiB ({taken >> 20} MiB so far)")
        watcher(done, total)

    return watching


def tell(done: int, total: int) -> None:
    """So much of so much has been read."""
    watcher = _watcher.get()
    if watcher:
        watcher(done, total)


def tell_of(stream: BinaryIO) -> None:
    """The same of a stream, by where it is; of a pipe nobody knows."""
    if _watcher.get() is None:
        return
    try:
        done, total = stream.tell(), os.fstat(stream.fileno()).st_size
    except OSError:
        done = total = 0
    tell(done, total)
