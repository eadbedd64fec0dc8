"""Lines of a text that hold no event: what they belong to, or what a message says of them and of the lines around."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pgemu.trace.events import EXPECTED, event_name, pattern
from pgemu.trace.fields import MalformedLineError, cut_off
from pgemu.trace.forms import WHOLE, form_of
from pgemu.trace.lines import HEADER, KERNEL_LOG, STACK, event_start, place

__all__ = ("belongs_to", "complaint")

_CUT_OUT = re.compile(
    r"[^\w\s]{3,}|[\W\d]*(?:[\w ]{0,40}\b)?(?:snip\w*|cut here|trimmed|omitted|elided|skipped)\b[\w ]{0,40}\W*\d*",
    re.I,
)
_STAMP = re.compile(r"\d\.\d{6}")
_FIELD = re.compile(r".*(?:\b0x[0-9a-f]|\w=\w|\b\w+: [0-9a-f]+(?:[,)]|$))", re.I)
_OF_EVENT = re.compile(r"\w_\w+:|\[\d+\]")
_WORD = re.compile(r"[a-z]{2}|[a-z',.] [a-z',.]", re.I)
_SHOWN = 120
_LOOKED_AT = 1000  # characters of a line: more than an event has, and shapes may be tried in as many ways as it is long


def belongs_to(line: str) -> str:
    """What a line without an event is one of. MalformedLineError for any that a log does not have."""
    if any("\udc80" <= character <= "\udcff" for character in line):
        raise MalformedLineError("binary data, expected text of ftrace or trace-cmd")
    if STACK.fullmatch(line):
        return "lines of call chains"
    if KERNEL_LOG.fullmatch(line):
        return "lines of the kernel's log"
    raise MalformedLineError(
        form_of(line) or f"malformed line, expected 'task-pid [cpu] seconds: event: fields': {line[:_SHOWN]!r}"
    )


def complaint(error: str, lines: Sequence[str], at: int, first: bool, last: bool) -> str:
    """What is said of a line that is malformed.

    :param error: why it is
    :param lines: of the text, the line at index `at` among them
    :param first, last: whether the line is the text's
    """
    line, before, after = (lines[i][:_LOOKED_AT] if 0 <= i < len(lines) else "" for i in (at, at - 1, at + 1))
    if _wrapped(line, before, after):
        return (
            f"a line that was wrapped, as mailers do: join it to the next one, or send logs attached: {line[:_SHOWN]!r}"
        )
    if _is_event(line) or not line:
        return f"{error}{cut_off(first, last)}"
    if first and _STAMP.search(line) and _is_event(after):
        return f"malformed line, without its beginning: {line[:_SHOWN]!r}{cut_off(True, False)}"
    if error.startswith("malformed line") and not last:
        if _CUT_OUT.fullmatch(line):
            return f"a mark that lines were cut out here: {line[:_SHOWN]!r}; without them: delete the mark"
        others = (_STAMP, _OF_EVENT, _FIELD)
        if _WORD.search(line) and not any(shape.search(line) for shape in others):
            return f"text that is no log's: {line[:_SHOWN]!r}; cut off what stands before and behind the log"
    return f"{error}{cut_off(first and not error.startswith(WHOLE), last)}"


def _wrapped(line: str, before: str, after: str) -> bool:
    """Whether a line lacks what the next one has, or is what the one before lacks."""
    if _is_event(line):
        return bool(after) and not _is_event(after) and HEADER.fullmatch(after) is None and _joins(line, after)
    return _is_event(before) and not _STAMP.search(line) and _FIELD.match(line) is not None and form_of(line) is None


def _joins(line: str, after: str) -> bool:
    """Whether two lines are one event whose fields are read."""
    found = place(line)
    assert found is not None
    event = line[found.start :]
    event = event[max(event_start(event), 0) :].rstrip()
    name = event_name(event.partition(" ")[0])
    return name in EXPECTED and pattern(name).match(f"{event} {after.strip()}") is not None


def _is_event(line: str) -> bool:
    try:
        return place(line) is not None
    except ValueError:
        return False
