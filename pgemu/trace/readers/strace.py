"""Text of strace: memory calls of processes, and what they ask of KVM.

`strace -f -ttt -e trace=%memory,%process,ioctl,%desc`; times (-t, -tt, -ttt, -r) and thread numbers (-f, [pid N] or the
number alone) may be missing. A call is one row, where it ends; munmap, madvise and what makes a thread, where they
begin, for what happens meanwhile comes after.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from typing import NamedTuple

import numpy as np

from pgemu.errors import InputError, printable
from pgemu.trace.events import Input
from pgemu.trace.log import Doubt, Log, Task
from pgemu.trace.source import Match, Source, open_source
from pgemu.trace.strace_rows import Call, Rows

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"strace": "text of strace"}

_HEAD = re.compile(
    r"(?:\[pid\s+(?P<bracketed>\d{1,10})(?:<[^>]*>)?\] |(?P<pid>\d{1,10})(?:<[^>]*>)? +(?=\S))?"
    r"(?: *(?:(?P<clock>\d\d:\d\d:\d\d)(?P<parts>\.\d{1,9})?|(?P<seconds>\d{1,12})\.(?P<decimals>\d{3,9}))"
    r"(?: \(\+ *[\d.]+\))? )?"
    r"(?:\[[0-9a-f?]{8,16}\] )?"
    r"(?P<rest>[a-z_][a-z0-9_]*\(.*|<\.\.\. .*|(?:---|\+\+\+) .*)"
)
_CALL = re.compile(r"(?P<name>[a-z_][a-z0-9_]*)\((?P<rest>.*)")
# Lines can be long, and hold whatever a program writes: no pattern may go through one from each of its characters.
_RESULT = re.compile(r"\)\s+= (?P<result>-?(?:0x[0-9a-f]+|\d+)|\?)(?=[ <]|$)")
_MORE = re.compile(r"(?:<.*>(?:\(deleted\))?)?(?: .*)?")
_TRIED = 8  # what looks like a result, from the last one on
_UNFINISHED = ("<unfinished ...>", "<detached ...>")
_RESUMED = re.compile(r"<\.\.\. (?P<name>[a-z_][a-z0-9_]*) resumed>,? *(?P<rest>.*)")
_GONE = re.compile(
    r"\+\+\+ (?:exited with \d+|killed by \S+(?: \(core dumped\))?|superseded by execve in pid \d+) \+\+\+"
)
_SIGNAL = re.compile(r"--- .* ---")
_ATTACHED = re.compile(r"(?P<before>.*?)strace: Process (?P<pid>\d{1,10}) attached")
_CHATTER = re.compile(r"(?:strace: Process \d+ (?:attached|detached).*|strace: .*|\[ Process PID=\d+ runs in .*|\s*)")
_LIKE = re.compile(r"[a-z_][a-z0-9_]*\(.*(?:\)\s+= (?:-?\d|0x|\?).*|<unfinished \.\.\.>)|<\.\.\. \w+ resumed>.*")
_LINES_SEEN = 40  # of a beginning, to say whether it is strace's
_DAY = 86400 * 10**9
_NO_TID = 0
_SHOWN = 3


def _unfinished(rest: str) -> str | None:
    """The arguments so far of a call that was interrupted; None of one that ends."""
    for mark in _UNFINISHED:
        if rest.endswith(mark):
            return rest.removesuffix(mark).rstrip(" ").removesuffix(",")
    return None


def _end(rest: str) -> re.Match[str] | None:
    """Where a call's arguments end: the last thing that looks like a result, with nothing but what may follow one."""
    last = deque(_RESULT.finditer(rest), _TRIED)
    return next((found for found in reversed(last) if _MORE.fullmatch(rest, found.end())), None)


def sniff(head: bytes) -> Match:
    """Whether a line of the first ones is a whole call, and most of them can be strace's."""
    if b"\0" in head:
        return Match.NO
    lines = [line for line in head.decode("utf-8", "replace").splitlines()[:_LINES_SEEN] if line.strip()]
    calls = others = 0
    for line in lines:
        found = _HEAD.fullmatch(line)
        if found is not None and _LIKE.fullmatch(found["rest"]):
            calls += 1
        elif not _CHATTER.fullmatch(line) and found is None:
            others += 1
    return Match.SURE if calls > others else Match.NO


def read(path: str | os.PathLike[str] | Source, form: str | None = None) -> Log:
    """Read the text of strace.

    :raises InputError: unreadable, or no call in it
    """
    source = path if isinstance(path, Source) else open_source(path, FORMATS["strace"])
    parser = _Parser(source.name)
    for block in source.blocks():
        for line in block.removesuffix("\n").split("\n"):
            parser.line(line)
    return parser.finish()


class _Open(NamedTuple):
    """A call that is not finished."""

    name: str
    arguments: str
    time: int
    line: int


class _Parser:
    """State while text is read."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._number = 0
        self._clock = _Clock()
        self._tasks: dict[int, int] = {}  # number of a thread -> task
        self._tid = _NO_TID  # of the line that is read
        self._rows = Rows(self._tasks)
        self._threads = 0
        self._open: dict[int, _Open] = {}
        self._cut = ""  # the beginning of a line into which a message came
        self._alive: set[int] = set()  # threads that are there, by number
        self._children: set[int] = set()  # threads that were said to be new
        self._skipped: Counter[str] = Counter()
        self._first: list[str] = []
        self._outcomes: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()

    def line(self, line: str) -> None:
        """Read a line."""
        self._number += 1
        if attached := _ATTACHED.fullmatch(line):
            self._children.add(int(attached["pid"]))
            self._alive.add(int(attached["pid"]))
            self._cut += attached["before"]
            return
        head = _HEAD.fullmatch(line)
        if head is None and self._cut:
            line = self._cut + line
            head = _HEAD.fullmatch(line)
            self._cut = ""
        if head is None:
            if not _CHATTER.fullmatch(line):
                self._skip("lines that are not understood", line)
            return
        task = self._task(head)
        time = self._clock.time(head, self._number)
        rest = head["rest"]
        if rest.startswith("<... "):
            self._resumed(rest, task, time, line)
        elif rest.startswith("+++ ") and _GONE.fullmatch(rest):
            self._rows.add("exited", Input.EXIT, time, task, self._number, 0)
            self._alive -= {tid for tid, number in self._tasks.items() if number == task}
        elif rest.startswith("---") and _SIGNAL.fullmatch(rest):
            self._ignored["<signal>"] += 1
        else:
            self._begins(rest, task, time, line)

    def _task(self, head: re.Match[str]) -> int:
        """Whose line it is: without a number that of the only thread there is, which was the first one at first."""
        tid = int(head["bracketed"] or head["pid"] or _NO_TID) % (1 << 32)
        if tid == _NO_TID and _NO_TID in self._tasks and len(self._alive) == 1:
            (tid,) = self._alive
        elif head["bracketed"] and tid not in self._tasks and tid not in self._children and _NO_TID in self._tasks:
            self._tasks[tid] = self._tasks[_NO_TID]
            self._alive.discard(_NO_TID)
        if tid != _NO_TID or tid not in self._tasks:
            self._alive.add(tid)
        self._tid = tid
        if tid not in self._tasks:
            self._tasks[tid] = self._threads
            self._threads += 1
        return self._tasks[tid]

    def _skip(self, what: str, line: str) -> None:
        self._skipped[what] += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"line {self._number}: {printable(line[:80])}")

    def _begins(self, text: str, task: int, time: int, line: str) -> None:
        call = _CALL.fullmatch(text)
        if call is None:
            self._skip("lines that are not understood", line)
            return
        name, rest = call["name"], call["rest"]
        if (arguments := _unfinished(rest)) is not None:
            self._give_up(task)
            self._open[task] = _Open(name, arguments, time, self._number)
            return
        self._ends(_Open(name, "", time, self._number), rest, task, time, line)

    def _resumed(self, text: str, task: int, time: int, line: str) -> None:
        resumed = _RESUMED.fullmatch(text)
        begun = self._open.pop(task, None)
        if resumed is None or begun is None or begun.name != resumed["name"]:
            self._give_up(task, begun)
            self._skip("ends of calls that do not begin", line)
            return
        if (again := _unfinished(resumed["rest"])) is not None:
            self._open[task] = begun._replace(arguments=_joined(begun.arguments, again))
        elif self._ends(begun, resumed["rest"], task, time, line):
            self._outcomes[f"sys_{begun.name} return"] += 1

    def _ends(self, begun: _Open, rest: str, task: int, time: int, line: str) -> bool:
        """A call is whole: whether it was understood."""
        end = _end(rest)
        if end is None:
            self._skip("lines that are not understood", line)
            return False
        arguments = _joined(begun.arguments, rest[: end.start()])
        result, more = end["result"], rest[end.end() :]
        call = Call(begun.name, arguments, result, more, (begun.time, begun.line), (time, self._number))
        if problem := self._rows.call(task, self._tid, call):
            self._first += [f"line {self._number}: {problem}"][: _SHOWN - len(self._first)]
        return True

    def _give_up(self, task: int, begun: _Open | None = None) -> None:
        """A call whose end is not in the text."""
        begun = self._open.pop(task, begun)
        if begun is not None:
            self._ignored[f"sys_{begun.name} without its end"] += 1

    def finish(self) -> Log:
        """What was read."""
        for task in list(self._open):
            self._give_up(task)
        rows = self._rows
        ignored, outcomes = self._ignored + rows.ignored, self._outcomes
        counters = (rows.inputs, outcomes, ignored, rows.unknown)
        events = sum(counter.total() for counter in counters)
        if not events:
            shown = f" ({self._first[0]})" if self._first else ""
            raise InputError(f"no system call in it, expected text of strace{shown}", self._source)
        notes = [*self._clock.notes()]
        if self._first:
            notes.append(f"not understood: {'; '.join(self._first)}")
        doubts: tuple[Doubt, ...] = ()
        if rows.pointers:
            which = ", ".join(f"{count} {name}" for name, count in rows.pointers.items())
            doubts = (Doubt(f"only a pointer is printed of {which}: what they ask for is not known (a newer strace)"),)
        tids = {task: tid for tid, task in self._tasks.items()}
        tasks = tuple(Task(tids[task], None, "") for task in range(len(tids)))
        return Log(
            self._source, _array(rows.rows), events, *counters, 0, self._skipped, tasks, notes=tuple(notes),
            doubts=doubts, calls=_array(rows.calls), called=rows.called, files=rows.files,
        )  # fmt: skip


def _joined(first: str, second: str) -> str:
    """Arguments that were printed in two parts."""
    return f"{first}, {second}" if first and second else first or second


def _array(rows: list[tuple[int, ...]]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """Rows in the order of their lines."""
    return np.array(sorted(rows, key=lambda row: row[3]), np.uint64).reshape(-1, 10)


class _Clock:
    """Times of lines, ns, which never go back."""

    def __init__(self) -> None:
        self._last = 0
        self._back = self._untimed = 0
        self._day = 0

    def time(self, head: re.Match[str], line: int) -> int:
        """The time of a line."""
        if head["clock"]:
            hours, minutes, seconds = map(int, head["clock"].split(":"))
            now = self._day + (hours * 3600 + minutes * 60 + seconds) * 10**9 + _decimals(head["parts"])
            if now + _DAY // 2 < self._last:  # midnight
                self._day += _DAY
                now += _DAY
        elif head["seconds"]:
            now = int(head["seconds"]) * 10**9 + _decimals("." + head["decimals"])
            if self._is_relative(now):
                now += self._last
        else:
            self._untimed += 1
            now = self._last + 1
        self._back += now < self._last
        self._last = min(max(now, self._last), (1 << 63) - 1)
        return self._last

    def _is_relative(self, now: int) -> bool:
        """-r prints the time since the line before: less than any other clock has, from the first line on."""
        return now < 10**8 * 10**9 and self._last < 10**8 * 10**9

    def notes(self) -> list[str]:
        """What was taken to be so."""
        told = []
        if self._untimed:
            told.append(f"{self._untimed} lines have no time, only their order counts")
        if self._back:
            told.append(f"its time goes back {self._back} times: lines are taken in their order")
        return told


def _decimals(text: str | None) -> int:
    """Nanoseconds of a fraction, with its point."""
    return int((text or ".0")[1:].ljust(9, "0"))
