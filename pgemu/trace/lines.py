"""Shapes of a log's lines: where task, time and event stand, what lines hold no event, and forms that have no events.

Sources: kernel/trace/trace_output.c (trace_print_context(), trace_print_lat_context()), trace-cmd's
tracecmd/trace-read.c, tools/perf/builtin-script.c (process_event()).
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = (
    "HEADER",
    "KERNEL_LOG",
    "LOST",
    "STACK",
    "Place",
    "event_start",
    "form_of",
    "is_name",
    "place",
    "raw_fields",
    "stamp_of",
)

_LINE = re.compile(
    r"(?P<prefix>\s*(?P<comm>\S.*?)[- ]\s*(?P<pid>\d+)(?:/(?P<tid>\d+))?\s+(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?"
    r"(?:(?P<cpu>\[\d+\])\s+(?:(?:[^\s\d]\S{3,7}|[A-Z]{1,3})\s+)?)?)"
    r"(?P<stamp>\d+\.(?:\d{9}|\d{6})|(?(cpu)\d+|(?!)))(?P<separator>: ?)"
)
"""A line of ftrace, `trace-cmd report` (no flags) or `perf script` (system prefix, pid/tid, -F without CPU).

The time stamp is in seconds, or a plain number of a clock that does not count time (counter, uptime, x86-tsc).
"""

_HEAD = 512
"""How far into a line its event begins at most, so that a long line costs no more than a short one to be looked at."""

_PRINTK = r"(?:.*? kernel: ?)?(?:<\d+>)?\[\s*\d+\.\d{6}\](?:\[\s*[CT]\d+\])? ?"

_LATENCY = re.compile(
    rf"(?P<prefix>(?:{_PRINTK})?\s*(?P<comm>\S.*?)-(?P<pid>\d+)\s+\d+[^\s\d]\S{{2,7}}\s+)"
    r"(?P<stamp>\d+(?:\.\d{6})?)(?P<separator>(?:us[^\w\s]? ?)?: )"
)
"""A line of the latency format, microseconds and a mark; what the kernel dumps at an oops is in it, behind printk's."""

KERNEL_LOG = re.compile(rf"{_PRINTK}.*|Dumping ftrace buffer:|-{{20,}}")
"""A line of the kernel's log, among which an oops dumps the trace."""

LOST = re.compile(r"CPU:\s*\d+ \[(?:LOST(?: (\d+))? EVENTS|(\d+) EVENTS DROPPED)\]\s*")

HEADER = re.compile(r"\s*(?:#.*|(?:cpus|version)\s*=.*|CPU \d+ is empty)?")

STACK = re.compile(r"\s+(?:[0-9a-f]{3,16}(?:\s.*)?|\S+:\d+|\S+\+0x[0-9a-f]+(?:\s.*)?|\S+ \(inlined\))| ?=> .*")
"""A line of a call chain, below its event."""


class Place(NamedTuple):
    """Where things stand in a line, and what they say.

    Attributes:
        prefix: the text in front of the time stamp
        comm: name of the task, "<...>" where it is not known
        tid: of the thread
        process: of the task, None where the line does not say
        point: where the digits of the time stamp begin that change from line to line
        end: where they, and the time stamp, end
        whole: what the digits before them count, nanoseconds
        unit: what the last digit counts, nanoseconds
        ticks: the time stamp is of a clock that does not count time; whole and unit are in its ticks
        separator: the text between time stamp and event
    """

    prefix: str
    comm: str
    tid: int
    process: int | None
    point: int
    end: int
    whole: int
    unit: int
    ticks: bool
    separator: str

    @property
    def start(self) -> int:
        """Where the event begins, or a column in front of it."""
        return self.end + len(self.separator)


def place(line: str) -> Place | None:
    """Where things stand in a line, None if it holds no event."""
    head = line[:_HEAD]
    match = _LINE.match(head)
    if match is not None:
        tid, process = match["tid"], match["pid"] if match["tid"] else match["tgid"]
        known = int(process) if process is not None and process.isdecimal() else None
        return _place(match, int(tid or match["pid"]), known)
    match = _LATENCY.match(head)
    return None if match is None else _place(match, int(match["pid"]), None)


def _place(match: re.Match[str], tid: int, process: int | None) -> Place:
    stamp, separator = match["stamp"], match["separator"]
    point, end, whole, unit, ticks = stamp_of(stamp, match.start("stamp"), separator.startswith("us"))
    return Place(match["prefix"], match["comm"], tid, process, point, end, whole, unit, ticks, separator)


def stamp_of(stamp: str, start: int, microseconds: bool = False) -> tuple[int, int, int, int, bool]:
    """point, end, whole, unit and ticks (see Place) of a time stamp that stands at `start`.

    :param microseconds: of a time stamp without a point, that it counts these; else it counts ticks
    """
    end = start + len(stamp)
    seconds, dot, decimals = stamp.partition(".")
    if dot:
        return end - len(decimals), end, int(seconds) * 10**9, 10 ** (9 - len(decimals)), False
    unit = 1000 if microseconds else 1
    return max(start, end - 6), end, int(stamp[:-6] or 0) * 10**6 * unit, unit, not microseconds


_NAME = r"(?![0-9a-f]{8,16}(?:\s|:|$))[A-Za-z_<\[]\S{0,127}"
_FIRST = re.compile(_NAME)
_BEHIND_COLUMNS = re.compile(rf"\s*(?:(?!\()(?=\S*\d)\S+\s+|\([^()]*\)\s+)*?(?P<event>{_NAME})(?!\S)")
"""Columns in front of an event's name hold a number: period, weight, difference to the event before."""


def is_name(token: str) -> bool:
    """Whether the first word behind a time stamp can be an event's name; an address, bare or not, is none."""
    return _FIRST.fullmatch(token) is not None


def event_start(text: str) -> int:
    """Where in the text behind a time stamp the event stands, -1 if it has none that could be a name."""
    match = _BEHIND_COLUMNS.match(text[:_HEAD])
    return -1 if match is None else match.start("event")


# --------------------------------------------------------------------------- forms that have no events in lines

_SCRIPT = "print with perf script -F comm,pid,tid,cpu,time,event,trace"
_FORMS = tuple(
    (re.compile(shape), name, help_)
    for shape, name, help_ in (
        (
            r"(?:\s*[\d.]+ \|)?\s*\d+\)(?:\s.*)?[|=>].*| ?-{20,}",
            "output of the function_graph tracer",
            "select no tracer: echo nop > current_tracer",
        ),
        (
            r"\s*(?:\d+\.\d{3}|\?) \(.*?\): .*|\s*\d+\.\d{3} .*[\w:]+\(.*\)(?: = .*)?",
            "output of perf trace",
            "record with perf record -a -e 'kvm:*', print with perf script",
        ),
        (r"\s*\[?\d*\]?\s*\d+\.\d{6,9}:\s+\S.*", "output of perf script without its task", _SCRIPT),
        (
            r"\s*\S.*?\s+\d+(?:/\d+)?\s+(?:\[\d+\]\s+)?[\w-]+:[\w-]+:\s.*",
            "output of perf script without its time stamps",
            _SCRIPT,
        ),
        (
            r"\s*\S.*\s\d+\s+\d+ \d+ [0-9a-f]{8} [0-9a-f]{8,} \[[0-9a-f]{8,16}\] .*",
            "the verbose latency format",
            "print without it: echo noverbose > trace_options",
        ),
        (
            r"(?:\[pid\s+\d+\] |\d+ +)?(?:[\d:.]+ )?\w+\(.*(?:\) += .*|<unfinished \.\.\.>)",
            "output of strace, which has system calls only",
            "record the events of KVM with ftrace, trace-cmd or perf",
        ),
        (
            r"(?:kvm|sys|page_fault|hugetlbfs|tlb)_\w+(?::|\().*",
            "ftrace's events without task and time",
            "print them: echo context-info > trace_options",
        ),
    )
)


def form_of(line: str) -> str | None:
    """What a line that holds no event is of, with what helps, as a message says it; None for no known form."""
    for shape, name, help_ in _FORMS:
        if shape.fullmatch(line[:_HEAD]):
            return f"{name}: {help_}"
    return None


_RAW = re.compile(r"\S+\s+(?:\w+=\S*(?:\s+|$))+")


def raw_fields(event: str) -> str | None:
    """What an event is whose fields are not printed as the kernel's format says, with what helps; None if they are."""
    if len(event.split()) < 2:
        return "an event without its fields: print them (perf script -F +trace)"
    return "raw fields: print without -R, or echo noraw > trace_options" if _RAW.fullmatch(event) else None
