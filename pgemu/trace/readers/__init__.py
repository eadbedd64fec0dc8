"""Formats of traces: a module each, with `sniff()` and `read()`; this is the one place that asks them.

    def sniff(head: bytes) -> Match    whether a file that begins so, decompressed, is of this format
    def read(source: Source) -> Log    what it asks for, yet to be laid over guest_memfd; what is so already: Lowered;
                                       or operations of which it is not said where their memory lies: Unplaced

Every module of this folder is asked, so none imports at its top what only `read` needs.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pgemu.errors import InputError
from pgemu.trace.log import Log
from pgemu.trace.lowered import Lowered
from pgemu.trace.source import Match, Source
from pgemu.trace.unplaced import Unplaced

__all__ = ("read", "read_log", "readers")

_RECORDINGS = {
    b"PERFILE2": "a recording of perf: print it with perf script -i FILE -F comm,pid,tid,cpu,time,event,trace",
    b"\x17\x08\x44tracing": "a recording of trace-cmd: print it with trace-cmd report",
}
"""Binary files of those whose text is read, by how they begin: tools/perf/util/header.c, trace-cmd.dat(5)."""


def readers() -> Iterator[Any]:
    """Yield the module of each format."""
    for found in pkgutil.iter_modules(__path__):
        yield import_module(f"{__name__}.{found.name}")


def _refuse_recording(source: Source) -> None:
    for magic, what in _RECORDINGS.items():
        if source.head.startswith(magic):
            source.close()
            raise InputError(what, source.name)


def read_log(source: Source) -> Log:
    """Read the text of a log with what KVM said it wrote (`Log.sptes`).

    :raises InputError: no text, no event in it, or a malformed line (with its number)
    """
    from pgemu.trace.readers import ftrace

    _refuse_recording(source)
    if ftrace.sniff(source.head) is Match.NO:
        source.close()
        raise InputError("binary data, expected text of ftrace or trace-cmd", source.name)
    return ftrace.read(source, keep_outcomes=True)


def read(source: Source) -> Log | Lowered | Unplaced:
    """Read a trace by the reader that is the surest to know its format.

    :raises InputError: none knows it, or what that reader says of a file that it cannot read
    """
    _refuse_recording(source)
    sure, reader = max(((module.sniff(source.head), module) for module in readers()), key=lambda found: found[0])
    if sure is Match.NO:
        source.close()
        raise InputError("binary data, expected text of ftrace or trace-cmd, or Parquet", source.name)
    found: Log | Lowered | Unplaced = reader.read(source)
    return found
