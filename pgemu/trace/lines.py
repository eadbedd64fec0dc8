"""Shapes of a log's lines: where task, time and event stand, and what lines hold no event.

Sources: kernel/trace/trace_output.c (trace_print_context(), trace_print_lat_context()), trace-cmd's
tracecmd/trace-read.c:trace_show_data(), tools/perf/builtin-script.c (perf_sample__fprintf_start(), process_event()).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pgemu.trace.forms import form_of, is_quoted

__all__ = (
    "FUNCTION",
    "HEADER",
    "KERNEL_LOG",
    "LOST",
    "STACK",
    "TAIL",
    "Place",
    "event_start",
    "is_name",
    "place",
    "stamp_of",
)

_LINE = re.compile(
    r"(?P<prefix>\s*(?:(?P<comm>(?:\S.*?)?)(?:(?P<dash>-)|\s)\s*)?(?P<pid>\d+|(?:(?<=\s)|(?<=>-))-1)"
    r"(?(dash)|(?:/(?P<tid>-?\d+))?)\s+(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?"
    r"(?:(?P<cpu>\[\d+\])\s+(?:(?:[^\s\d]\S{3,7}|[KUHGgMESp]{1,6})\s+)?)?)"
    r"(?P<stamp>\d+\.(?:\d{9}|\d{6})|(?(cpu)\d+|(?!)))(?P<separator>: ?)"
)
"""A line of ftrace, `trace-cmd report` (no flags) or `perf script` (system prefix, pid/tid, misc; -F without the task's
name or CPU). A thread whose number is not known has -1.

The time stamp is in seconds, or a plain number of a clock that does not count time (counter, uptime, x86-tsc).
"""

_HEAD = 512
"""How far into a line its event begins at most, so that a long line costs no more than a short one to be looked at."""

_GUEST = re.compile(r"VM:\s*\d+ ")
_TASK_COMM_LEN = 16  # with its end; in perf's lines names of kernel threads are longer

# Of printk(), dmesg -T, -H and -d.
_LOG_TIME = r"\[(?:\s*\+?\d+\.\d{6}|\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4}|\w{3} ?\d+ \d\d:\d\d)\]"
_PRINTK = rf"(?:<\d+>)?{_LOG_TIME}(?:\[\s*[CT]\d+\])? ?"
_JOURNAL = r".*? kernel: ?"  # what syslog and the journal print, which keep printk's time or not

_LATENCY = re.compile(
    rf"(?P<prefix>(?:{_JOURNAL})?(?:{_PRINTK})?\s*(?P<comm>(?:\S.*?)?)(?P<dash>-)(?P<pid>\d+)\s+\d+[^\s\d]\S{{2,7}}\s+)"
    r"(?P<stamp>\d+(?:\.(?:\d{9}|\d{6}))?)(?P<separator>(?:us[^\w\s]? ?)?: )"
)
"""A line of the latency format, microseconds and a mark; what the kernel dumps at an oops is in it, behind printk's."""

_PERF_LATENCY = re.compile(
    r"(?P<prefix>(?P<comm>.{8}) (?P<pid>[ \d]{6}\d)(?:/(?P<tid>\d[\d ]{6}))? [ \d]{2}\d \s*)"
    r"(?P<stamp>\d+\.(?:\d{9}|\d{6}))(?P<separator>: ?)"
)
"""A line of `perf script --Latency`: eight characters of the task's name, and the CPU without brackets."""

KERNEL_LOG = re.compile(rf"{_PRINTK}.*|{_JOURNAL}.*|Dumping ftrace buffer:|-{{20,}}")
"""A line of the kernel's log, among which an oops dumps the trace."""

LOST = re.compile(r"CPU:\s*\d+ \[(?:LOST(?: (\d+))? EVENTS|(?:(\d+) )?EVENTS DROPPED)\]\s*")

HEADER = re.compile(r"\s*(?:#.*|(?:cpus|version)\s*=.*|CPU \d+ is empty|CPU:\s*\d+ \[SUBBUFFER START\].*)?")

STACK = re.compile(
    r"\s+(?:[0-9a-f]{3,16}(?:\s.*)?|[0-9a-f]{1,2} \[unknown\] .*|\S+:\d+|\S+\+0x[0-9a-f]+(?:\s.*)?|"
    r"\S+ \(inlined\))| ?=> .*"
)
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
    """Where things stand in a line, None if it holds no event.

    ValueError where a task's name is longer than the kernel's are: another program put something in front of it, or a
    mailer did.
    """
    head = line[:_HEAD]
    if is_quoted(head):
        raise ValueError(form_of(head))
    match = _PERF_LATENCY.match(head) or _LINE.match(head) or _LATENCY.match(head)
    if match is None:
        return None
    found = match.groupdict()
    comm = (found["comm"] or "").strip()
    if found.get("dash") and len(comm.encode("utf-8", "surrogateescape")) >= _TASK_COMM_LEN:
        raise ValueError(
            f"something stands in front of the task's name: {comm[:60]!r}; print one trace alone (trace-cmd report of "
            "one file and no instances), or cut it off"
        )
    if _GUEST.match(comm):
        raise ValueError(f"an event of a guest's own kernel (perf's machine_pid): {comm[:60]!r}, expected the host's")
    # ftrace's column of the process, or perf's pid/tid
    process = found["pid"] if found.get("tid") else found.get("tgid")
    known = int(process) if process is not None and process.strip().isdecimal() else None
    stamp, separator = match["stamp"], match["separator"]
    point, end, whole, unit, ticks = stamp_of(stamp, match.start("stamp"), separator.startswith("us"))
    tid = int(found.get("tid") or match["pid"])
    return Place(match["prefix"], comm or "<...>", tid, known, point, end, whole, unit, ticks, separator)


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


# "name:", "sys_name(field: ...", "sys_name -> ...", and what has no colon; not an address of a call chain.
_NAME = r"(?:(?![0-9a-f]{8,16}:)[A-Za-z_\[][^\s(]{0,126}:|[A-Za-z_]\w{0,126}\(\S*|sys_\w+|PERF_RECORD_\w+|<stack|<user)"
_FIRST = re.compile(_NAME)
_BEHIND_COLUMNS = re.compile(rf"\s*(?:(?!\()(?=\S*\d)\S+\s+|\([^()]*\)\s+)*?(?P<event>{_NAME})(?!\S)")
"""Columns in front of an event's name hold a number: period, weight, difference to the event before."""

TAIL = re.compile(r"(?:[0-9a-f]{1,16}|\[unknown\]|unknown|/\S*|0x[0-9a-f]+/\S*|ABI:\d|ilen:|insn:)(?:\s.*)?")
"""Columns that perf prints behind an event's fields: address, weight, control group, ip, sym, branches, registers."""

FUNCTION = re.compile(r"\S+ <-\S+.*")
"""A line of the function tracer: print_fn_trace()."""


def is_name(token: str) -> bool:
    """Whether the first word behind a time stamp can be an event's name; an address, bare or not, is none."""
    return _FIRST.fullmatch(token) is not None


def event_start(text: str) -> int:
    """Where in the text behind a time stamp the event stands, -1 if it has none that could be a name."""
    match = _BEHIND_COLUMNS.match(text[:_HEAD])
    return -1 if match is None else match.start("event")
