"""What a log has of a process's own memory beside what a VM's log is read for: rows as of inputs, apart from these.

A VM's log counts them as ignored or as outcomes, so their shape is no reason to refuse it: one that is not understood
makes no row.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import Input
from pgemu_kernels.words.log_words import ROW_WORDS

__all__ = ("CALLS_OF_PROCESSES", "FAILED", "NOT_TOLD", "ProcessCalls")

FAILED = 1
NOT_TOLD = (1 << 64) - 1
"""CLONE_* of a child of which no line says whether it is a thread."""

_STATE, _FIRST_WORD = 9, 4
_FIRST_ERROR = (1 << 64) - 4095  # IS_ERR_VALUE()
_LARGEST = (1 << 64) - 1
_FIELD = re.compile(r"\b(\w+): (?:0x)?([0-9a-fA-F]{1,16})\b")
_CHILD = re.compile(r"\bpid=\d+.*\bchild_pid=(\d{1,10})\b")
_EVICTED = re.compile(r"dev \d+,\d+ ino (\d{1,20}) mode \d+ size (\d{1,20}) nlink \d+ seals \d+ blocks (\d{1,20})")

_FIELDS: dict[str, tuple[Input, tuple[str, ...], int]] = {
    "sys_mprotect": (Input.PROTECT, ("start", "len", "prot"), 0),
    "sys_mremap": (Input.REMAP, ("addr", "old_len", "new_len", "flags"), 0),
    "sys_brk": (Input.BREAK, ("brk",), 0),
    "sys_mlock": (Input.LOCK, ("start", "len"), 1),
    "sys_mlock2": (Input.LOCK, ("start", "len"), 1),
    "sys_munlock": (Input.LOCK, ("start", "len"), 0),
    "sys_mlockall": (Input.LOCK_ALL, ("flags",), 0),
    "sys_munlockall": (Input.LOCK_ALL, (), 0),
}
"""System calls: the kind of their row, the fields that are its first words, and the word behind them.

kernel/trace/trace_syscalls.c:print_syscall_enter() prints the names of their parameters.
"""
_RETURNED_AT = {Input.REMAP: 4, Input.BREAK: 1}
"""Which word of a row is what the call returned."""

CALLS_OF_PROCESSES = (
    *_FIELDS, "sched_process_fork", "sched_process_exec", "sched_process_exit", "hugetlbfs_evict_inode",
)  # fmt: skip
"""Events that make rows of their own here."""


class ProcessCalls:
    """Rows so far, and the call that each task is in."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self.sizes: dict[int, int] = {}  # of inodes of hugetlbfs
        self._rows = array("Q")
        self._open: dict[int, tuple[str, int]] = {}  # task -> call, where its row begins

    def rows(self) -> npt.NDArray[np.uint64]:
        """uint64[n, 10]: one for each event, in the order of the file."""
        return np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, ROW_WORDS)

    def add(self, name: str, kind: Input, time: int, task: int, line: int, *words: int, failed: bool = False) -> int:
        """Append a row, counted as `name`; return where it begins."""
        position = len(self._rows)
        padding = (0,) * (ROW_WORDS - 5 - len(words))
        self._rows.extend((kind, time, task, line, *words, *padding, FAILED if failed else 0))
        self.called[name] += 1
        self._open[task] = name.partition(" ")[0], position
        return position

    def event(self, name: str, event: str, task: int, time: int, line: int) -> None:
        """An event of CALLS_OF_PROCESSES; one that is not understood makes no row."""
        self._open.pop(task, None)
        if name in _FIELDS:
            kind, fields, then = _FIELDS[name]
            given = {field: int(value, 16) for field, value in _FIELD.findall(event)}
            if all(field in given for field in fields):
                on_fault = name == "sys_mlock2" and given.get("flags") == 1  # MLOCK_ONFAULT
                words = (*(given[field] for field in fields), 2 if on_fault else then)[:5]
                self.add(name, kind, time, task, line, *words)
        elif name == "hugetlbfs_evict_inode":
            if (found := _EVICTED.search(event)) and all(int(word) <= _LARGEST for word in found.groups()):
                self.sizes[int(found[1])] = int(found[2])
                self.add(name, Input.HUGETLBFS_EVICT, time, task, line, *(int(word) for word in found.groups()))
        elif name == "sched_process_fork":
            if (found := _CHILD.search(event)) and int(found[1]) <= _LARGEST:
                self.add(name, Input.FORK, time, task, line, int(found[1]), NOT_TOLD)
        else:
            self.add(name, Input.EXEC if name == "sched_process_exec" else Input.EXIT, time, task, line)

    def returned(self, task: int, name: str, value: int) -> None:
        """A task's system call returns."""
        call, position = self._open.pop(task, ("", -1))
        if call != name or position < 0:
            return
        kind = Input(self._rows[position])
        if kind is not Input.BREAK and (value < 0 or value >= _FIRST_ERROR):
            self._rows[position + _STATE] = FAILED
        elif kind in _RETURNED_AT:
            self._rows[position + _FIRST_WORD + _RETURNED_AT[kind]] = value
