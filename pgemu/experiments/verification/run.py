"""Verifies a log: takes it apart, replays each VM of it, and says what agreed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from pgemu.errors import InputError
from pgemu.experiments.verification.host import Host, Span, spans_of
from pgemu.experiments.verification.matching import Difference, Line, Matching
from pgemu.experiments.verification.recording import Options, Part, Recording, slot_of, take_apart
from pgemu.experiments.verification.replay import SMM_SLOTS, Replay
from pgemu.experiments.verification.tree import Format
from pgemu.objects.machine import Config, Machine
from pgemu.trace.events import Input
from pgemu.trace.log import Log
from pgemu.trace.outcomes import SET_SPTE, SPTE_CHANGED, Kept
from pgemu.trace.readers import read_log
from pgemu.trace.source import open_source
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

__all__ = ("Verification", "document", "verify", "verify_log")

_AHEAD = 64  # events in which the end of a fault is looked for
_TOP = 4  # level of the entries of a root
_PUNCH = 2  # FALLOC_FL_PUNCH_HOLE
_TABLES = 256 << 20  # bytes for page tables, beside what guests use
_KHUGEPAGED = "khugepaged"
_ELSEWHERE = 1 << 45  # where a VM without a slot has memory
_ENDED = "entries that KVM was yet to write when the log ended"
_L2 = "faults of L2 guests"
_WRITES = "writes to memory by the kernel, or before the log began"


@dataclass
class Verification:
    """What agreed of a log.

    Attributes:
        source: name of the file
        configuration: what the model was, by name of the option or field
        said: what was inferred of it, in words
        lines: by event, how many lines of it the log has
        compared: by event, how many of these were compared
        agreed: by event, how many did
        differences: by event, kind and cause ("": not known), how many did not; those that the log lacks are in none of
            the above
        first: the first of them
        inferred: inputs that the log has no event for and that were taken to have happened
        refused: inputs that KVM would have refused
        left_out: lines that were neither replayed nor compared, by reason
    """

    source: str
    configuration: dict[str, Any]
    said: tuple[str, ...]
    lines: Counter[str]
    compared: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    differences: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    first: list[Difference] = field(default_factory=list)
    inferred: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def entries(self) -> int:
        """How many entries were compared: lines of the log, and what the model wrote that the log lacks."""
        return sum(self.agreed.values()) + self.differing

    @property
    def differing(self) -> int:
        """How many entries differ, those included that the log lacks."""
        return sum(self.differences.values())


def verify(
    path: str | os.PathLike[str],
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Replay a log of KVM's events, and compare every entry that it says KVM wrote with the model's.

    :param path: text of ftrace, trace-cmd or perf script, plain or compressed, with kvm_page_fault and kvmmmu:*
    :param progress: called with what is done, and how many events of how many are
    :raises InputError: unreadable, malformed, or without these events

    >>> from pgemu import trace
    >>> found = verify(trace.shipped())
    >>> found.entries, found.differing
    (50559, 0)
    """
    import_module("pgemu_kernels.run.entries")  # the model needs them in any case: with them a log is read faster
    return verify_log(read_log(open_source(path)), options or Options(), progress)


def verify_log(log: Log, options: Options, progress: Callable[[str, int, int], None] | None = None) -> Verification:
    """The same of a log that was read with its outcomes."""
    recording = take_apart(log, options)
    names = ("kernel", "stage2", "prove_mmu", "nx_huge_pages", "l1tf")
    about = {name: getattr(recording, name) for name in names}
    about["backing"] = sorted({backing for part in recording.parts for backing in part.backings.values()})
    lines = Counter({name: log.outcomes[name] for name in (SPTE_CHANGED, SET_SPTE)})
    found = Verification(log.source, about, recording.said, lines)
    total = sum(len(part.events) for part in recording.parts)
    done = 0
    for part in recording.parts:
        run = _Run(recording, part, options)
        run.replay(partial(_progress, progress, done, total))
        run.add_to(found)
        done += len(part.events)
    for name in (SPTE_CHANGED, SET_SPTE):
        found.left_out[f"lines of {name} that were not understood"] += log.outcomes[f"{name} (not understood)"]
    others = sum((found.lines - found.compared).values()) - found.left_out["lines of an address space without slots"]
    found.left_out["lines of VMs of which no fault is in the log"] += others
    found.left_out = +found.left_out
    return found


class _Run:
    """One VM of a log."""

    def __init__(self, recording: Recording, part: Part, options: Options) -> None:
        self._recording = recording
        self._part = part
        self._options = options
        spans = spans_of(part.slots, part.backings) or [Span(_ELSEWHERE, _ELSEWHERE + PAGE_2M, "4K")]
        faults = sum(1 for kept, row in part.events if not kept and row[0] in (Input.GUEST_FAULT, Input.HOST_FAULT))
        machine = _machine(recording, spans, faults + len(part.slots))
        fmt = Format.of(machine)
        self._fmt = fmt
        self.matching = Matching(fmt, slots_known=not part.inferred)
        two = any(slot.number >= SMM_SLOTS for slot in part.slots)
        host = Host(machine, spans, part.holes, recording.log.source)
        self._replay = Replay(
            machine, host, self.matching, sides=2 if two else 1, protected=part.protected, prove=recording.prove_mmu,
            sets=recording.sets,
        )  # fmt: skip
        self._inferred: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._done: set[int] = set()  # unmaps that were done with the one before
        self._compared: Counter[str] = Counter()
        self._last_input = max(
            (
                i
                for i, (kept, row) in enumerate(part.events)
                if not kept and row[0] in (Input.GUEST_FAULT, Input.MEMSLOT)
            ),
            default=-1,
        )
        roots = (i for i, (kept, row) in enumerate(part.events) if kept and row[0] == Kept.CHANGED and row[6] == _TOP)
        self._last_root = max((i for i in roots if not part.events[i][1][8] & fmt.present), default=-1)
        self._names = [task.name for task in recording.log.tasks]

    def replay(self, progress: Callable[[int], None]) -> None:
        """Go through the VM's events."""
        if self._part.inferred:
            for slot in self._part.slots:
                self._replay.memslot(slot)
        for i, (kept, row) in enumerate(self._part.events):
            if kept:
                self._outcome(i, row)
            else:
                self._input(i, row)
            if i % 4096 == 0:
                progress(i)
        behind = {row[2]: (kept, row[3]) for kept, row in self._part.events}  # what each task has last
        unanswered = {line for kept, line in behind.values() if not kept}
        self._replay.finish(unanswered)
        self._left_out[_ENDED] += self.matching.finish(unanswered)

    def add_to(self, found: Verification) -> None:
        """Add what was found."""
        found.compared += self._compared
        found.agreed += self.matching.agreed
        found.differences += self.matching.differences
        found.first += [one._replace(vm=self._part.name) for one in self.matching.first]
        found.inferred += self._inferred
        found.left_out += self._left_out
        found.refused += self._replay.refused

    # ------------------------------------------------------------------ inputs

    def _input(self, i: int, row: list[int]) -> None:
        replay, kind, failed = self._replay, row[0], row[9]
        self.matching.now = row[3]
        if kind == Input.GUEST_FAULT:
            if row[8]:
                self._left_out[_L2] += 1
            else:
                self._guest_fault(i, row)
        elif kind == Input.HOST_FAULT:
            replay.host_fault(row)
        elif kind == Input.MEMSLOT:
            replay.memslot(slot_of(row))
        elif kind == Input.ATTRIBUTES:
            replay.set_attributes(*row[4:7])
        elif kind == Input.UNMAP:
            self._unmap(i, row)
        elif kind in (Input.MADVISE, Input.MUNMAP) and not failed:
            replay.unmap(row[4], row[4] + row[5], advised=kind == Input.MADVISE)
        elif kind == Input.FALLOCATE and row[5] & _PUNCH and not failed:
            replay.punch(row[6], row[7], row[8])

    def _unmap(self, i: int, row: list[int]) -> None:
        if i in self._done or self._replay.is_copy(row) or self._is_split(i, row):
            return
        if self._names[row[2]] == _KHUGEPAGED:
            self._replay.collapse(row[4], row[5])
        else:
            self._replay.unmap(row[4], row[5])

    def _is_split(self, i: int, row: list[int]) -> bool:
        """Whether an unmap of 2M is that of a huge page which is split for what the task unmaps next to it of it:
        mm/huge_memory.c:__split_huge_pmd()."""
        start, end = row[4], row[5]
        if start % PAGE_2M or end - start != PAGE_2M or not self._replay.host.is_thp(start):
            return False
        events = self._part.events
        for step in (-1, 1):
            near = (j for j in _near(i, step, len(events)) if not events[j][0])
            at = next((j for j in near if events[j][1][2] == row[2]), -1)
            other = events[at][1]
            if at < 0 or other[0] != Input.UNMAP or not (start <= other[4] and other[5] <= end):
                continue
            if other[5] - other[4] < PAGE_2M:
                if step > 0:  # the split comes first: what it is for is done with it
                    self._replay.unmap(other[4], other[5])
                    self._done.add(at)
                return True
        return False

    def _guest_fault(self, i: int, row: list[int]) -> None:
        """A fault, with what no input says of it: the address space, and whether its page was written before."""
        replay, space = self._replay, 0
        made = self._made(i, row[2])
        if made is not None and self._options.inferred_inputs:
            space = min(made[4], len(replay.sides) - 1)
            self._inferred["faults in system management mode"] += space
            leaf = self._fmt.is_leaf(made[8], made[6])
            read = not row[5] & 2 and leaf and bool(made[8] & self._fmt.write)
            if read and not replay.is_writable(space, row[4]):
                self._inferred[_WRITES] += replay.write(space, row[4])
        replay.guest_fault(row, space)

    def _made(self, i: int, task: int) -> list[int] | None:
        """The last entry that a task's fault made, None: none."""
        found = None
        events = self._part.events
        for j in range(i + 1, min(i + _AHEAD, len(events))):
            kept, row = events[j]
            if row[2] == task:
                if not kept:
                    break
                if row[0] == Kept.CHANGED and row[8] & self._fmt.present and not row[7] & self._fmt.present:
                    found = row
        return found

    # ------------------------------------------------------------------ outcomes

    def _outcome(self, i: int, row: list[int]) -> None:
        if row[0] == Kept.CHANGED:
            self._changed(i, row)
        elif row[0] == Kept.SET:
            self._compared[SET_SPTE] += 1
            self._replay.set_spte(row)
        elif row[0] == Kept.ZAP_ALL and self._part.inferred:
            self._replay.drop_trees()
            self.matching.pages.clear()  # what memory the slots show from here on is not told

    def _changed(self, i: int, row: list[int]) -> None:
        line = Line(row[3], (row[4], row[6], row[5]), row[7], row[8])
        if row[4] >= len(self._replay.sides):
            self._left_out["lines of an address space without slots"] += 1
            return
        self._compared[SPTE_CHANGED] += 1
        if not self.matching.is_expected(line) and self._options.inferred_inputs:
            self._infer(i, line)
        self.matching.line(line)

    def _infer(self, i: int, line: Line) -> None:
        """An entry that nothing so far explains: what has no event may have happened."""
        fmt, replay = self._fmt, self._replay
        level = line.key[1]
        if not fmt.is_present(line.new) and self._last_input < i <= self._last_root and not replay.ended:
            replay.end()
            self._inferred["the end of a VM"] += 1
        elif fmt.is_leaf(line.old, level) and line.old & ~line.new == fmt.write and not line.new & ~line.old:
            if self._part.inferred and replay.log_dirty(line.key, True):
                self._inferred["dirty logging switched on"] += 1
            else:
                self._inferred["reads of a slot's dirty log"] += replay.read_dirty_log(line.key)
        elif line.old == fmt.empty and fmt.is_leaf(line.new, level) and not line.new & fmt.accessed:
            if line.new & fmt.write and not replay.is_writable(line.key[0], line.key[2] << 12):
                self._inferred[_WRITES] += replay.write(line.key[0], line.key[2] << 12)
            self._inferred["prefaults of a page"] += replay.prefault(line.key)
        elif self._part.inferred and fmt.is_leaf(line.old, level) and fmt.is_table(line.new, level):
            self._inferred["dirty logging switched on"] += replay.log_dirty(line.key, True)
        elif self._part.inferred and (fmt.is_leaf(line.new, level) or line.new == fmt.frozen):
            self._inferred["dirty logging switched off"] += replay.log_dirty(line.key, False)


def document(found: Verification) -> dict[str, Any]:
    """What was found, as JSON has it. Addresses and entries are numbers."""
    return {
        "source": found.source,
        "configuration": found.configuration,
        "said": list(found.said),
        "inferred_inputs": dict(found.inferred),
        "refused": dict(found.refused),
        "left_out": dict(found.left_out),
        "compared": found.entries,
        "agreed": sum(found.agreed.values()),
        "events": {
            name: {"lines": found.lines[name], "compared": found.compared[name], "agreed": found.agreed[name]}
            for name in found.lines
        },
        "differences": [
            {"event": event, "kind": kind, "cause": cause or None, "entries": count}
            for (event, kind, cause), count in found.differences.most_common()
        ],
        "first": [_shown(one) for one in found.first],
    }


def _shown(one: Difference) -> dict[str, Any]:
    space, level, gfn = one.key
    values = {
        name: None if pair is None else {"old": pair[0], "new": pair[1]}
        for name, pair in (("log", one.log), ("model", one.model))
    }
    about = {
        "vm": one.vm or None,
        "line": one.line or None,
        "event": one.event,
        "kind": one.kind,
        "cause": one.why or None,
    }
    return about | {"address_space": space, "level": level, "gfn": gfn} | values


def _progress(progress: Callable[[str, int, int], None] | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress("verify", before + done, total)


def _near(i: int, step: int, count: int) -> range:
    return range(i + step, min(max(i + 16 * step, -1), count), step)


def _machine(recording: Recording, spans: list[Span], faults: int) -> Machine:
    """A machine as the recorded one, with memory for what so many faults can need of what the slots show."""
    size: Counter[str] = Counter()
    for start, end, backing in spans:
        size[backing] += end - start
    tables = _TABLES + 8 * PAGE_4K * faults  # of the process and of each tree, for pages far from each other
    fields: dict[str, Any] = {"memory": min(sum(size.values()), 2 * PAGE_4K * faults) + tables}
    size["thp"] = min(size["thp"], 2 * PAGE_2M * faults)
    if size["hugetlb-1G"]:
        fields |= {"pool": -(-size["hugetlb-1G"] // PAGE_1G) * PAGE_1G, "page_size": PAGE_1G}
        if size["hugetlb-2M"]:
            fields["other_pool"] = -(-size["hugetlb-2M"] // PAGE_2M) * PAGE_2M
    elif size["hugetlb-2M"]:
        fields |= {"pool": -(-size["hugetlb-2M"] // PAGE_2M) * PAGE_2M, "page_size": PAGE_2M}
    if size["thp"]:
        fields |= {"thp": "always", "buddy": -(-size["thp"] // PAGE_2M) * PAGE_2M + (64 << 20)}
    try:
        return Machine(
            Config("restructure", kernel=recording.kernel, stage2=recording.stage2,
                   nx_huge_pages=recording.nx_huge_pages, l1tf=recording.l1tf, **fields)
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise InputError(str(error), recording.log.source) from None
