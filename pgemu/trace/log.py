"""What a log asks for, whatever format it was in: rows of inputs, and how its lines were classified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ("NAMELESS", "NO_VCPU", "Doubt", "FileKind", "Log", "Task", "by_time")

_TIME, _LINE = 1, 3

FileKind = Literal["shmem", "hugetlb-2M", "hugetlb-1G"]
"""Files that processes map, as a machine has them."""

NO_VCPU = (1 << 64) - 1
"""vCPU of a guest fault whose line names none (before Linux 6.0)."""

NAMELESS = "(no event name)"
"""What an event is counted as that has no name."""


class Task(NamedTuple):
    """A thread of a log: its number, its process (None: no line says), its name."""

    tid: int
    process: int | None
    name: str


class Doubt(NamedTuple):
    """Why a trace is not, or not all, of one VM's memory: a sentence, and the kind of input it is about ("": all)."""

    text: str
    about: str = ""


@dataclass(frozen=True)
class Log:
    """What a log asks for, and how its lines were classified.

    Attributes:
        source: name of the file
        rows: uint64[n, 10], one row per input in the order of the file: kind (`Input`), time (ns), task (dense
            index), line, five words as `Input` says, and 1 where the system call failed; an mmap that returned has
            the address it returned
        events: lines that hold an event
        inputs, outcomes, ignored, unknown: events by name
        lost: events that the ring buffer dropped
        skipped: lines that belong to no event and are not blank, by what they are
        tasks: by dense index
        nested_told: the log has what tells faults of an L2 guest from those of L1
        notes: what of the text was taken to mean something, in words
        stage2: "ept" or "npt" if an exit says so, else None
        doubts: why it is not, or not all, of one VM
        calls: uint64[n, 10], rows as above of what concerns a process's own memory and no VM's, in the order of the
            file (pgemu.trace.process_calls)
        called: what these are counted as, among `ignored` and `outcomes`
        files: the kinds of files by the numbers that rows of mmap and fallocate have for them; none where these are
            descriptors
        sizes: bytes of inodes of hugetlbfs by their numbers
        sptes: uint64[n, 9], what KVM said it wrote to stage 2 (pgemu.trace.outcomes); None where nobody asked for it
        kinds_told: each guest fault says whether it is private; else they do if one of them says that it is
    """

    source: str
    rows: npt.NDArray[np.uint64]
    events: int
    inputs: Counter[str]
    outcomes: Counter[str]
    ignored: Counter[str]
    unknown: Counter[str]
    lost: int
    skipped: Counter[str] = field(default_factory=Counter)
    tasks: tuple[Task, ...] = ()
    nested_told: bool = True
    notes: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    stage2: str | None = None
    sptes: npt.NDArray[np.uint64] | None = None
    kinds_told: bool = False
    calls: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 10), np.uint64))
    called: Counter[str] = field(default_factory=Counter)
    files: Mapping[int, FileKind] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)


def by_time(rows: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], tuple[str, ...]]:
    """The rows of a log by time, and a note if they were not: buffers of several CPUs may follow one another
    (per_cpu/cpu*/trace), threads overtake each other."""
    times = rows[:, _TIME]
    back = np.flatnonzero(times[1:] < times[:-1])
    if not back.size:
        return rows, ()
    first = int(rows[back[0] + 1, _LINE])
    count = f"{len(back)} times, first" if len(back) > 1 else "once,"
    note = f"its time goes back {count} at line {first}: inputs are taken by time (of two logs, cut one off)"
    return rows[np.argsort(times, kind="stable")], (note,)
