"""The fields of an event whose shape is known, and what may stand behind them."""

from __future__ import annotations

from pgemu.trace.events import EXPECTED, pattern
from pgemu.trace.forms import raw_fields
from pgemu.trace.lines import TAIL

__all__ = ("MalformedLineError", "cut_off", "fields_of", "is_tail")


class MalformedLineError(ValueError):
    """A line whose shape or fields do not parse; the reader adds where it is."""


def fields_of(name: str, event: str) -> tuple[str, ...]:
    """The fields of an event, as pattern() names them. MalformedLineError where they are others."""
    match = pattern(name).match(event)
    if match is None or (match.end() < len(event) and not is_tail(event, match.end())):
        # Some events' own fields look like raw ones.
        raw = None if "=" in EXPECTED[name] else raw_fields(event)
        raise MalformedLineError(f"malformed {name}, {raw or f'expected {EXPECTED[name]}'}: {event[:120]!r}")
    return match.groups()


def is_tail(event: str, at: int) -> bool:
    """Whether what stands at a position behind the fields of an event are other columns: perf prints them there, and it
    alone prints the event's system."""
    token = event.partition(" ")[0]
    return ":" in token[:-1] and event[at - 1].isspace() and TAIL.fullmatch(event, at) is not None


def cut_off(first: bool, last: bool) -> str:
    """What helps against a malformed line that may be the rest of one, or the beginning of one without its newline."""
    if last:
        return "; if it is cut off: leave it out (head -n -1)"
    return "; if it is the rest of one: cut it off (tail -n +2)" if first else ""
