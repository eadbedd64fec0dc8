"""Formats of traces: a module each; this is the one place that asks them.

    FORMATS: Mapping[str, str]         the names of its formats, as --format has them, and what a message calls them
    def sniff(head: bytes) -> Match    whether a file that begins so, decompressed, is of this format
    def read(source: Source, form: str | None) -> Found
                                       `form`: one of FORMATS that the user names, None: as its content says. A log's
                                       requests, yet to be laid over guest_memfd (Log); what is so already (Lowered);
                                       operations of which it is not said where their memory lies (Unplaced); a
                                       program's accesses (AccessStream)

Every module of this folder is asked, so none imports at its top what only `read` needs.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pgemu.errors import InputError
from pgemu.trace.accesses import AccessStream
from pgemu.trace.log import Log
from pgemu.trace.lowered import Lowered
from pgemu.trace.source import Match, Source
from pgemu.trace.unplaced import Unplaced

__all__ = ("Found", "formats", "read", "read_log", "readers")

Found = Log | Lowered | Unplaced | AccessStream

_RECORDINGS = {
    b"PERFILE2": "a recording of perf: print it with perf script -i FILE -F comm,pid,tid,cpu,time,event,trace",
    b"\x17\x08\x44tracing": "a recording of trace-cmd: print it with trace-cmd report",
}
"""Binary files of those whose text is read, by how they begin: tools/perf/util/header.c, trace-cmd.dat(5)."""


def readers() -> Iterator[Any]:
    """Yield the module of each format."""
    for found in pkgutil.iter_modules(__path__):
        yield import_module(f"{__name__}.{found.name}")


def formats() -> dict[str, str]:
    """Every format by name, and what messages call it."""
    return {name: title for module in readers() for name, title in module.FORMATS.items()}


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
    sure, name = _surest(source)
    if sure is Match.SURE and name not in ftrace.FORMATS:
        source.close()
        raise InputError(f"this is {formats()[name]}, expected text of ftrace or trace-cmd", source.name)
    if ftrace.sniff(source.head) is Match.NO:
        source.close()
        raise InputError("binary data, expected text of ftrace or trace-cmd", source.name)
    return ftrace.read(source, keep_outcomes=True)


def _surest(source: Source) -> tuple[Match, str]:
    """How sure the surest reader is, and the name of its first format."""
    return max((module.sniff(source.head), next(iter(module.FORMATS))) for module in readers())


def read(source: Source, form: str | None = None) -> Found:
    """Read a trace by the reader that is the surest to know its format, or by the one that is named.

    :param form: a name of formats(), None: as the content says
    :raises InputError: none knows it, or what that reader says of a file that it cannot read
    """
    if form is not None:
        reader = next((module for module in readers() if form in module.FORMATS), None)
        if reader is None:
            source.close()
            raise InputError(f"format {form!r}: expected one of {', '.join(sorted(formats()))}", source.name)
        named: Found = reader.read(source, form)
        return named
    _refuse_recording(source)
    sure, reader = max(((module.sniff(source.head), module) for module in readers()), key=lambda found: found[0])
    if sure is Match.NO:
        source.close()
        raise InputError(f"binary data, expected {'; '.join(formats().values())}", source.name)
    found: Found = reader.read(source, None)
    return found
