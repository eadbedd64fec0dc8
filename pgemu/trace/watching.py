"""How far a trace has been read, told to whoever shows it: readers need not know whether somebody looks on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import BinaryIO

__all__ = ("tell", "tell_of", "watched")

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
