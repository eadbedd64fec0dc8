"""Text of ftrace, `trace-cmd report` and `perf script`: from lines to input rows and counts.

Most lines of a log are outcomes, and begin as the one before: a line costs three slices and two dictionary look-ups
until its event's name says that it is an input; only inputs meet a regular expression. Of long logs a kernel reads
those lines that look like one before (pgemu.trace.fast_lines): what a line means is said here alone.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.beside import belongs_to, complaint
from pgemu.trace.event_rows import EventRows
from pgemu.trace.events import (
    ADVICE,
    IGNORED,
    OUTCOMES,
    event_name,
    line_end,
)
from pgemu.trace.fast_lines import FastLines, wanted
from pgemu.trace.fields import cut_off, is_tail
from pgemu.trace.lines import (
    FUNCTION,
    HEADER,
    LOST,
    Place,
    event_start,
    is_name,
    place,
    stamp_of,
)
from pgemu.trace.log import NAMELESS, Log, Task, by_time
from pgemu.trace.source import Match, Source, open_source, text_of
from pgemu_kernels.words.log_words import ROW_WORDS, EventCode

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"ftrace": "text of ftrace, trace-cmd or perf script"}

_NO_TASK = -1, 0
_BLANK = re.compile(r"\s")  # tabs, and what web pages have for a blank
_BEGINNINGS = 1 << 16  # remembered; there is one for each task and second


def sniff(head: bytes) -> Match:
    """Text may be a log: which lines are none is told with their number, by `read`."""
    return Match.NO if b"\0" in head else Match.POSSIBLE


def read(path: str | os.PathLike[str] | Source, form: str | None = None, *, keep_outcomes: bool = False) -> Log:
    """Read a log.

    :param path: plain or compressed text, or an opened source
    :param form: there is one
    :param keep_outcomes: whether the entries of stage 2 that KVM says it wrote are wanted (`Log.sptes`)
    :raises InputError: unreadable, no event in it, or a line that is malformed (with its number)
    """
    source = path if isinstance(path, Source) else open_source(path, FORMATS["ftrace"])
    parser = _Parser(source.name, keep_outcomes)
    for block in source.byte_blocks():
        parser.read(block)
    return parser.finish()


class _Parser(EventRows):
    """State while a log is read: tasks seen, where things stand in lines, counts so far."""

    def __init__(self, source: str, keep: bool = False) -> None:
        super().__init__(keep)
        self._source = source
        self.line = 0
        self.events = 0
        self._by_tid: dict[int, int] = {}  # thread -> task
        self._about: list[Task] = []
        self._tasks: dict[str, int] = {}  # text before the time stamp -> task
        self._beginnings: dict[str, tuple[int, int]] = {}  # text before the digits that change -> task, whole (ns)
        # Where these digits of the last event begin and end, ns in the last one, what is next.
        self._columns = 0, 0, 0, ": "
        self._ticks = self._no_newline = False
        self._nameless = 0, 0  # lines without an event's name, and which is the first
        self._block = b"", 0  # what is read, and the number of the line before it
        self._skipped: Counter[str] = Counter()

    def feed(self, block: str) -> None:
        """The same of text."""
        self.read(block.encode("utf-8", "surrogateescape"))

    def read(self, block: bytes) -> None:
        """Read lines; a block ends with a newline unless the file's last line lacks it."""
        if self._fast is None and self._is_of_vm() and wanted(self.line, len(block)):
            self._fast = self._begin_fast()
        if self._fast is None or not block.endswith(b"\n"):
            self.feed_slow(block, block, self.line)
        else:
            self._fast.feed(block.replace(b"\r\n", b"\n") if b"\r" in block else block)

    def _is_of_vm(self) -> bool:
        """Whether an event of KVM was seen: a kernel does not read what concerns a process alone."""
        return any("kvm" in token for token in self._handlers)

    def _begin_fast(self) -> FastLines:
        """A kernel's reader, with what was seen so far."""
        fast = FastLines(self, self._rows, self._of_stage2.kept, self._calls.words)
        for prefix, task in self._tasks.items():
            fast.add_prefix(prefix, task)
        for token, handler in self._handlers.items():
            fast.add_token(token, handler is not None)
        for advice in self._advices:
            fast.add_advice(advice)
        for counter in (self._inputs, self._outcomes):
            if counter["kvm_unmap_hva_range"]:
                fast.add_unmap(is_input=counter is self._inputs)
        return fast

    def feed_slow(self, piece: bytes, block: bytes, before: int) -> None:
        """Read lines of a block line by line; `before`: the number of the line before the block."""
        self._block = block, before
        self._feed(text_of(piece))

    def _feed(self, block: str) -> None:
        lines = block.split("\n")
        last = lines.pop()
        handlers, tokens, beginnings = self._handlers, self._tokens, self._beginnings
        point, end, unit, separator = self._columns
        width = len(separator)
        line, number = last, self.line + len(lines) + 1
        events = 0
        try:
            if last:
                self._check_last(last, number)
                lines.append(last)
            number = self.line
            for line in lines:
                number += 1
                task, time = beginnings.get(line[:point], _NO_TASK)
                decimals = line[point:end]
                start = end + width
                if task < 0 or line[end:start] != separator or not decimals.isdecimal():
                    task, time, start = self._unusual(line)
                    if task < 0:
                        continue
                    point, end, unit, separator = self._columns
                    width = len(separator)
                    decimals = line[point:end]
                space = line.find(" ", start)
                token = line[start:space] if space >= 0 else line[start:]
                handler = handlers[token]
                if handler is None:
                    tokens[token] += 1
                else:
                    handler(line[start:], task, time + int(decimals) * unit, number)
                events += 1
        except OverflowError:
            raise InputError(f"a number of more than 64 bits: {line[:120]!r}", self._source, number) from None
        except ValueError as error:
            whole, before = self._block
            around = text_of(whole).split("\n")
            text = complaint(str(error), around, number - before - 1, number == 1, line is last)
            raise InputError(text, self._source, number) from None
        self.line = number
        self.events += events

    def finish(self) -> Log:
        """Classify the events that were only counted."""
        if self.events == 0:
            told = ", ".join(f"{count} {what}" for what, count in self._skipped.items())
            found = f", but {told}" if told else ""
            raise InputError(f"no event in it{found}, expected text of ftrace or trace-cmd", self._source)
        self._add_fast()
        unknown: Counter[str] = Counter()
        for token, count in self._tokens.items():
            name = event_name(token)
            if name in OUTCOMES or name.endswith(" return"):
                self._outcomes[name] += count
            elif name in IGNORED or name.startswith("PERF_RECORD_"):
                self._ignored[name] += count
            else:
                unknown[name] += count
        rows, back = by_time(np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, ROW_WORDS))
        if self._nameless[0]:
            unknown[NAMELESS] = self._nameless[0]
        counters = self._inputs, self._outcomes, self._ignored, unknown
        return Log(
            self._source, rows, self.events, *counters, self._lost, self._skipped, tuple(self._about),
            self._nested.told, (*back, *self._notes()), stage2=self._nested.stage2, sptes=self._of_stage2.rows,
            calls=by_time(self._of_process.rows())[0], called=self._of_process.called, sizes=self._of_process.sizes,
        )  # fmt: skip

    def _add_fast(self) -> None:
        """Add what a kernel counted."""
        if self._fast is None:
            return
        for token, code, count, outcomes in self._fast.counted():
            if not count + outcomes:
                continue
            name = event_name(token)
            if code == EventCode.COUNTED:
                self._tokens[token] += count
            elif code in (EventCode.RETURN, EventCode.SET_SPTE, EventCode.SPTE_CHANGED):
                self._outcomes[name] += count
            else:
                self._inputs[name] += count
                self._outcomes[name] += outcomes
        for advice, count in self._fast.advices().items():
            self._ignored[f"sys_madvise {ADVICE.get(advice, advice)}"] += count
        for counter in (self._inputs, self._outcomes):
            for name in [name for name, count in counter.items() if not count]:
                del counter[name]

    def _notes(self) -> Iterator[str]:
        """What of the text was taken to mean something."""
        count, first = self._nameless
        if count:
            lines = f"{count} line{'s have' if count > 1 else ' has'} no event name"
            yield f"{lines}, the first is line {first} (perf script -F +event prints it)"
        if self._ticks:
            yield "its time stamps are ticks of a clock, only their order counts"
        if self._no_newline:
            yield "its last line has no newline and is taken to be whole"

    def _unusual(self, line: str) -> tuple[int, int, int]:
        """Task, whole seconds (ns) and where the event begins, of a line that does not begin as the one before.

        `_columns` is where its time stamp stands. Task -1 if the line holds no event.
        """
        head, colon, _ = line.partition(": ")
        prefix, _, stamp = head.rpartition(" ")
        task = self._tasks.get(prefix, -1)
        whole = stamp[-7:-6] == "." or stamp[-10:-9] == "."
        if task < 0 or not colon or not whole or not stamp.replace(".", "", 1).isdecimal():
            found = place(line)
            if found is None:
                self._no_event(line)
                return -1, 0, 0
            task = self._task(found)
            point, end, time, unit, self._ticks = *found[4:8], self._ticks or found.ticks
            separator = found.separator
        else:
            point, end, time, unit, _ = stamp_of(stamp, len(prefix) + 1)
            separator = ": "
        self._columns = point, end, unit, separator
        if len(self._beginnings) >= _BEGINNINGS:
            self._beginnings.clear()
        self._beginnings[line[:point]] = task, time
        return task, time, end + len(separator)

    def _task(self, found: Place) -> int:
        """The task of a line, and what the line says of it."""
        task = self._by_tid.setdefault(found.tid, len(self._about))
        if task == len(self._about):
            self._about.append(Task(found.tid, found.process, found.comm))
            self._calls.add_task()
        seen = self._about[task]
        if seen.process is None or seen.name == "<...>":
            name = found.comm if seen.name == "<...>" else seen.name
            self._about[task] = Task(found.tid, found.process if seen.process is None else seen.process, name)
        if found.prefix.endswith(" "):
            self._tasks[found.prefix[:-1]] = task
            if self._fast is not None:
                self._fast.add_prefix(found.prefix[:-1], task)
        return task

    def _no_event(self, line: str) -> None:
        """Count what the line says that was lost, and what belongs to an event; a malformed line is an error."""
        lost = LOST.fullmatch(line)
        if lost is not None:
            self._lost += int(lost[1] or lost[2] or 1)
        elif HEADER.fullmatch(line) is None:
            self._skipped[belongs_to(line)] += 1

    def _check_last(self, line: str, number: int) -> None:
        """The last line lacks its newline: it is taken to be whole unless it is seen to be cut off."""
        found = place(line)
        if found is None:
            return  # as malformed as any other
        event = line[found.start :]
        at = max(event_start(event), 0)
        token, blank, _ = event[at:].partition(" ")
        ends = line_end(event_name(token))
        match = ends.match(event[at:]) if ends else None
        if match:
            whole = match.end() == len(event) - at or is_tail(event[at:], match.end())
        else:
            whole = ends is None and (bool(blank) or token.endswith((":", ")")))
        if not whole:
            text = f"malformed line: {line[-80:]!r}{cut_off(False, True)}"
            raise InputError(text, self._source, number)
        self._no_newline = True

    def displaced(self, event: str, task: int, time: int, line: int) -> None:
        """An event behind padding or other columns; a line where none has a name is counted."""
        if "<-" in event and FUNCTION.fullmatch(event):
            self._ignored["<function>"] += 1
            return
        at = event_start(event)
        event = event[at:] if at >= 0 else ""
        token = event.partition(" ")[0]
        if _BLANK.search(token):
            event = _BLANK.sub(" ", event)
            token = event.partition(" ")[0]
        if not is_name(token):
            self._nameless = self._nameless[0] + 1, self._nameless[1] or line
            return
        handler = self._handlers[token]
        if handler is None:
            self._tokens[token] += 1
        else:
            handler(event, task, time, line)
