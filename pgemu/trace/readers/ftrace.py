"""Text of ftrace, `trace-cmd report` and `perf script`: from lines to input rows and counts.

Most lines of a log are outcomes, and begin as the one before: a line costs three slices and two dictionary look-ups
until its event's name says that it is an input; only inputs meet a regular expression.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.beside import belongs_to, complaint
from pgemu.trace.events import (
    ADVICE,
    CALLS,
    IGNORED,
    OUTCOMES,
    Input,
    event_name,
    line_end,
)
from pgemu.trace.fast_lines import FastLines, wanted
from pgemu.trace.fields import MalformedLineError, cut_off, fields_of, is_tail
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
from pgemu.trace.log import NAMELESS, NO_VCPU, Log, Task
from pgemu.trace.nested import NESTED, NestedGuests
from pgemu.trace.outcomes import SET_SPTE, SPTE_CHANGED, Outcomes
from pgemu.trace.source import Match, Source, open_source, text_of
from pgemu.trace.task_calls import TaskCalls
from pgemu_kernels.words.log_words import EventCode

__all__ = ("read", "sniff")

_WORDS = 10
_TIME, _LINE = 1, 3
_STATE = 9
_GUEST_FAULT = int(Input.GUEST_FAULT)
_FAILED = 1
_PADDING = tuple((0,) * (_WORDS - 4 - words) for words in range(_WORDS - 4))
_ADDRESSES = 1 << 64
_FIRST_ERROR = (1 << 64) - 4095  # IS_ERR_VALUE()

_DISCARDING = {4, 9, 24}  # MADV_DONTNEED, MADV_REMOVE, MADV_DONTNEED_LOCKED
_NO_TASK = -1, 0
_MAP_GPA_RANGE = " nr 0xc "  # KVM_HC_MAP_GPA_RANGE, include/uapi/linux/kvm_para.h
_BLANK = re.compile(r"\s")  # tabs, and what web pages have for a blank
_BEGINNINGS = 1 << 16  # remembered; there is one for each task and second

_Handler = Callable[[str, int, int, int], None]


def sniff(head: bytes) -> Match:
    """Text may be a log: which lines are none is told with their number, by `read`."""
    return Match.NO if b"\0" in head else Match.POSSIBLE


def read(path: str | os.PathLike[str] | Source, *, keep_outcomes: bool = False) -> Log:
    """Read a log.

    :param path: plain or compressed text, or an opened source
    :param keep_outcomes: whether the entries of stage 2 that KVM says it wrote are wanted (`Log.sptes`)
    :raises InputError: unreadable, no event in it, or a line that is malformed (with its number)
    """
    source = path if isinstance(path, Source) else open_source(path)
    parser = _Parser(source.name, keep_outcomes)
    for block in source.byte_blocks():
        parser.read(block)
    return parser.finish()


class _Handlers(dict[str, _Handler | None]):
    """First word of an event -> who parses it; None for events that are only counted."""

    def __init__(self, parser: _Parser) -> None:
        super().__init__()
        self._parser = parser
        self._by_name: dict[str, _Handler | None] = {
            "page_fault_user": parser.page_fault_user,
            "kvm_page_fault": parser.kvm_page_fault,
            "kvm_vm_set_mem_attributes": parser.kvm_vm_set_mem_attributes,
            "kvm_hypercall": parser.kvm_hypercall,
            "kvm_unmap_hva_range": parser.kvm_unmap_hva_range,
            "kvm_memslot": parser.kvm_memslot,
            "sys_madvise": parser.sys_madvise,
            "sys_munmap": parser.sys_munmap,
            "sys_mmap": parser.sys_mmap,
            "sys_mprotect": parser.other_call,
            "sys_mremap": parser.other_call,
            "sys_fallocate": parser.sys_fallocate,
            "hugetlbfs_fallocate": parser.hugetlbfs_fallocate,
            SET_SPTE: parser.kvm_mmu_set_spte,
            **parser.outcomes(),
            **dict.fromkeys(("PERF_RECORD_LOST", "PERF_RECORD_LOST_SAMPLES"), parser.perf_record_lost),
            **dict.fromkeys((*NESTED, "kvm_exit"), parser.nested),
        }
        self._call_return = parser.call_return
        self._displaced = parser.displaced

    def __missing__(self, token: str) -> _Handler | None:
        if not is_name(token):  # and the next one may be another number, so it is not kept
            return self._displaced
        name = event_name(token)
        is_return = name.removesuffix(" return") in CALLS and name.endswith(" return")
        handler = self._by_name.get(name, self._call_return if is_return else None)
        self[token] = handler
        self._parser.token(token, handler is not None)
        return handler

    def only_count(self, name: str) -> None:
        """From now on an event is counted, and not parsed."""
        if self._by_name.pop(name, None) is not None:
            self._forget(name)

    def parse(self, name: str, handler: _Handler | None) -> None:
        """From now on an event is parsed, or only counted (None)."""
        if self._by_name.get(name) is not handler:
            self._by_name[name] = handler
            self._forget(name)

    def _forget(self, name: str) -> None:
        forgotten = [token for token in self if event_name(token) == name]
        for token in forgotten:
            del self[token]
        self._parser.forget(forgotten)


class _Parser:
    """State while a log is read: tasks seen, calls that have not returned, rows and counts so far."""

    def __init__(self, source: str, keep: bool = False) -> None:
        self._source = source
        self._keep = keep
        self._rows = array("Q")
        self.line = 0
        self.events = 0
        self._lost = 0
        self._by_tid: dict[int, int] = {}  # thread -> task
        self._about: list[Task] = []
        self._tasks: dict[str, int] = {}  # text before the time stamp -> task
        self._beginnings: dict[str, tuple[int, int]] = {}  # text before the digits that change -> task, whole (ns)
        # Where these digits of the last event begin and end, ns in the last one, what is next.
        self._columns = 0, 0, 0, ": "
        self._ticks = self._no_newline = False
        self._back = 0, 0  # how often time goes back, and the first line where it does
        self._nameless = 0, 0  # lines without an event's name, and which is the first
        self._nested = NestedGuests()
        self._calls = TaskCalls()
        self._fast: FastLines | None = None
        self._block = b"", 0  # what is read, and the number of the line before it
        self._advices: set[int] = set()  # that madvise() was given
        self._tokens: Counter[str] = Counter()  # events that are only counted, by their first word
        self._inputs: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._of_stage2 = Outcomes(self._rows, self._calls, self._outcomes, keep=keep)
        self._handlers = _Handlers(self)

    def read(self, block: bytes) -> None:
        """Read lines; a block ends with a newline unless the file's last line lacks it."""
        if self._fast is None and wanted(self.line):
            self._fast = self._begin_fast()
        if self._fast is None or not block.endswith(b"\n"):
            self.feed_slow(block, block, self.line)
        else:
            self._fast.feed(block.replace(b"\r\n", b"\n") if b"\r" in block else block)

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
            raise InputError("no event in it, expected text of ftrace or trace-cmd", self._source)
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
        rows = self._in_order(np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, _WORDS))
        if self._nameless[0]:
            unknown[NAMELESS] = self._nameless[0]
        counters = self._inputs, self._outcomes, self._ignored, unknown
        return Log(
            self._source, rows, self.events, *counters, self._lost, self._skipped, tuple(self._about),
            self._nested.told, tuple(self._notes()), stage2=self._nested.stage2, sptes=self._of_stage2.rows,
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

    def _in_order(self, rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The inputs by time: buffers of several CPUs may follow one another (per_cpu/cpu*/trace)."""
        times = rows[:, _TIME]
        back = np.flatnonzero(times[1:] < times[:-1])
        if not back.size:
            return rows
        self._back = len(back), int(rows[back[0] + 1, _LINE])
        return rows[np.argsort(times, kind="stable")]

    def _notes(self) -> Iterator[str]:
        """What of the text was taken to mean something."""
        count, first = self._back
        if count:
            times = f"{count} times, first" if count > 1 else "once,"
            yield f"its time goes back {times} at line {first}: inputs are taken by time (of two logs, cut one off)"
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

    def token(self, token: str, is_parsed: bool) -> None:
        """An event's first word was seen."""
        if self._fast is not None:
            self._fast.add_token(token, is_parsed)

    def forget(self, tokens: list[str]) -> None:
        """What is done with events has changed."""
        if self._fast is not None:
            self._fast.drop_tokens(tokens)

    def outcomes(self) -> dict[str, _Handler]:
        """Who parses which outcomes: most of them only where they are kept."""
        of_stage2 = self._of_stage2
        handlers: dict[str, _Handler] = {SPTE_CHANGED: of_stage2.spte_changed}
        if self._keep:
            handlers |= {
                "kvm_mmu_zap_all_fast": of_stage2.zap_all,
                "fast_page_fault": of_stage2.fast_page_fault,
                "kvm_mmu_get_page": of_stage2.get_page,
            }
        return handlers

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

    def perf_record_lost(self, event: str, task: int, time: int, line: int) -> None:
        """tools/perf/util/event.c:perf_event__fprintf_lost(), also of PERF_RECORD_LOST_SAMPLES."""
        count = event.rpartition(" ")[2]
        self._lost += int(count) if count.isdecimal() else 1
        self._ignored[event_name(event.partition(" ")[0])] += 1

    def nested(self, event: str, task: int, time: int, line: int) -> None:
        """What a vCPU does on its way to and from an L2 guest, and exits until one told whose stage 2 there is."""
        name = event_name(event.partition(" ")[0])
        self._ignored[name] += 1
        self._nested.event(name, event, task)
        self._calls.note_l2(task, self._nested.is_l2(task))
        for other, is_wanted in self._nested.wanted.items():
            self._handlers.parse(other, self.nested if is_wanted else None)

    def _add(self, name: str, kind: Input, time: int, task: int, line: int, *words: int) -> int:
        """Append an input row; return its position."""
        position = len(self._rows)
        self._rows.extend((kind, time, task, line, *words, *_PADDING[len(words)]))
        self._inputs[name] += 1
        return position

    def page_fault_user(self, event: str, task: int, time: int, line: int) -> None:
        address, code = fields_of("page_fault_user", event)
        self._calls.end(task)  # the task is in user mode, so its call is over
        self._add("page_fault_user", Input.HOST_FAULT, time, task, line, int(address, 16), int(code, 16))

    def kvm_page_fault(self, event: str, task: int, time: int, line: int) -> None:
        vcpu, address, code = fields_of("kvm_page_fault", event)
        self._calls.note_fault(task, len(self._rows))
        number = NO_VCPU if vcpu is None else int(vcpu)
        # As _add() does it, written out: most inputs of a log are these.
        l2 = self._nested.is_l2(task)
        self._rows.extend((_GUEST_FAULT, time, task, line, int(address, 16), int(code, 16), number, 0, l2, 0))
        self._inputs["kvm_page_fault"] += 1

    def kvm_mmu_set_spte(self, event: str, task: int, time: int, line: int) -> None:
        if self._of_stage2.set_spte(event, task, time, line) and not self._keep:
            self._handlers.only_count(SPTE_CHANGED)  # which says the same of a fault, and more that nobody asks for

    def kvm_vm_set_mem_attributes(self, event: str, task: int, time: int, line: int) -> None:
        words = [int(field, 16) for field in fields_of("kvm_vm_set_mem_attributes", event)]
        self._calls.end(task)
        self._add("kvm_vm_set_mem_attributes", Input.ATTRIBUTES, time, task, line, *words)

    def kvm_hypercall(self, event: str, task: int, time: int, line: int) -> None:
        if _MAP_GPA_RANGE not in event:
            self._ignored["kvm_hypercall"] += 1
            return
        gpa, pages, attributes, _ = (int(field, 16) for field in fields_of("kvm_hypercall", event))
        self._add("kvm_hypercall", Input.MAP_GPA_RANGE, time, task, line, gpa, pages, attributes)

    def kvm_unmap_hva_range(self, event: str, task: int, time: int, line: int) -> None:
        start, end = (int(field, 16) for field in fields_of("kvm_unmap_hva_range", event))
        name, position = self._calls.current(task)
        if self._fast is not None:
            self._fast.add_unmap(is_input=not name)
        if not name:
            self._add("kvm_unmap_hva_range", Input.UNMAP, time, task, line, start, end)
            return
        self._outcomes["kvm_unmap_hva_range"] += 1
        if name == "sys_fallocate" and self._rows[position + 8] == 0:
            self._rows[position + 8] = start

    def kvm_memslot(self, event: str, task: int, time: int, line: int) -> None:
        hexadecimal, decimal, *rest = fields_of("kvm_memslot", event)
        slot = int(hexadecimal, 16) if hexadecimal else int(decimal)
        flags, gpa, size, hva = (int(field, 16) for field in rest)
        if max(gpa, hva) + size > _ADDRESSES:
            raise MalformedLineError(f"memory slot that ends beyond 64 bits: {event[:120]!r}")
        self._calls.end(task)
        self._add("kvm_memslot", Input.MEMSLOT, time, task, line, slot, flags, gpa, size, hva)

    def sys_madvise(self, event: str, task: int, time: int, line: int) -> None:
        start, length, behavior = fields_of("sys_madvise", event)
        advice = int(behavior, 16)
        position = -1
        if advice in _DISCARDING:
            words = int(start, 16), int(length, 16), advice
            position = self._add("sys_madvise", Input.MADVISE, time, task, line, *words)
        else:
            self._ignored[f"sys_madvise {ADVICE.get(advice, advice)}"] += 1
        self._calls.begin(task, "sys_madvise", position)
        self._advices.add(advice)
        if self._fast is not None:
            self._fast.add_advice(advice)

    def sys_munmap(self, event: str, task: int, time: int, line: int) -> None:
        start, length = (int(field, 16) for field in fields_of("sys_munmap", event))
        position = self._add("sys_munmap", Input.MUNMAP, time, task, line, start, length)
        self._calls.begin(task, "sys_munmap", position)

    def sys_mmap(self, event: str, task: int, time: int, line: int) -> None:
        address, length, flags, fd, offset = (int(field, 16) for field in fields_of("sys_mmap", event))
        position = self._add("sys_mmap", Input.MMAP, time, task, line, address, length, fd, offset, flags)
        self._calls.begin(task, "sys_mmap", position)

    def other_call(self, event: str, task: int, time: int, line: int) -> None:
        """sys_mprotect, sys_mremap: not inputs, but what they unmap is their outcome."""
        name = event_name(event.partition(" ")[0])
        self._ignored[name] += 1
        self._calls.begin(task, name, -1)

    def sys_fallocate(self, event: str, task: int, time: int, line: int) -> None:
        words = [int(field, 16) for field in fields_of("sys_fallocate", event)]
        position = self._add("sys_fallocate", Input.FALLOCATE, time, task, line, *words)
        self._calls.begin(task, "sys_fallocate", position)

    def hugetlbfs_fallocate(self, event: str, task: int, time: int, line: int) -> None:
        inode, mode, offset, length, _, result = fields_of("hugetlbfs_fallocate", event)
        if self._calls.current(task)[0] == "sys_fallocate":
            self._outcomes["hugetlbfs_fallocate"] += 1
            return
        words = int(inode), int(mode or "0", 8), int(offset), int(length)
        position = self._add("hugetlbfs_fallocate", Input.HUGETLBFS_FALLOCATE, time, task, line, *words)
        if int(result) < 0:
            self._rows[position + _STATE] = _FAILED

    def call_return(self, event: str, task: int, time: int, line: int) -> None:
        # "sys_x -> 0x0" or "sys_exit_x: 0x0", and behind it what columns perf has.
        try:
            value = int(event.replace(" -> ", " ", 1).split(maxsplit=2)[1], 16)
        except (ValueError, IndexError):
            raise MalformedLineError(f"malformed return of a system call, expected a number: {event[:120]!r}") from None
        name = event_name(event.partition(" ")[0])
        self._outcomes[name] += 1
        call, position = self._calls.end(task)
        if position < 0 or not name.startswith(call):
            return
        if value < 0 or value >= _FIRST_ERROR:
            self._rows[position + _STATE] = _FAILED
        elif call == "sys_mmap":
            self._rows[position + 4] = value
