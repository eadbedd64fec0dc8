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
from pgemu.trace.foreign import foreign
from pgemu.trace.log import Log
from pgemu.trace.lowered import Lowered
from pgemu.trace.recordings import printed, recording_of
from pgemu.trace.source import Match, Source
from pgemu.trace.unplaced import Unplaced

__all__ = ("Found", "formats", "read", "read_log", "readers")

Found = Log | Lowered | Unplaced | AccessStream

_PRINTED = "ftrace", "damon", "damon-counted"  # what tools print of their recordings
_TEXT = "expected text of ftrace or trace-cmd"


def readers() -> Iterator[Any]:
    """Yield the module of each format."""
    for found in pkgutil.iter_modules(__path__):
        yield import_module(f"{__name__}.{found.name}")


def formats() -> dict[str, str]:
    """Every format by name, and what messages call it."""
    return {name: title for module in readers() for name, title in module.FORMATS.items()}


def _refused(source: Source, what: str) -> InputError:
    """What is said of a file that none reads."""
    source.close()
    return InputError(foreign(source.head) or what, source.name)


def read_log(source: Source) -> Log:
    """Read the text of a log with what KVM said it wrote (`Log.sptes`).

    :raises InputError: no text, no event in it, or a malformed line (with its number)
    """
    from pgemu.trace.readers import ftrace

    source = printed(source)
    sure, name = _surest(source)
    if sure is Match.SURE and name not in ftrace.FORMATS:
        source.close()
        raise InputError(f"this is {formats()[name]}, {_TEXT} with KVM's events", source.name)
    if (sure is not Match.SURE and foreign(source.head)) or ftrace.sniff(source.head) is Match.NO:
        raise _refused(source, f"binary data, {_TEXT}")
    source.expected = _TEXT.removeprefix("expected ")
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
        return _read_as(source, reader, form)
    source = printed(source)
    sure, reader = max(((module.sniff(source.head), module) for module in readers()), key=lambda found: found[0])
    if (sure is not Match.SURE and foreign(source.head)) or sure is Match.NO:
        raise _refused(source, f"binary data, {_TEXT}, or Parquet")
    source.expected = next(iter(reader.FORMATS.values()))
    found: Found = reader.read(source, None)
    return found


def _read_as(source: Source, reader: Any, form: str) -> Found:
    """Read a file by the reader that is named. What it does not know is told by the name of what it is, if any is."""
    source.expected = expected = reader.FORMATS[form]
    if form in _PRINTED:
        source = printed(source)
        source.expected = expected
    elif recording := recording_of(source.head):
        source.close()
        raise InputError(f"this is {recording}, expected {expected}", source.name)
    match, (sure, other) = reader.sniff(source.head), _surest(source)
    what = f"this is {formats()[other]}, expected {expected}" if sure is Match.SURE and match is not Match.SURE else ""
    what = what or ("" if match is Match.SURE else foreign(source.head, expected) or "")
    if what and match is Match.NO:
        source.close()
        raise InputError(what, source.name)
    try:
        found: Found = reader.read(source, form)
    except InputError as error:
        # Any text may be a log of ftrace: what it is helps more than which line is none.
        if what and (sure is Match.SURE or form == "ftrace"):
            raise InputError(what, source.name) from error
        raise
    return found
