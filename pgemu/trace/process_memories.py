"""Whose memory each event of a log is about: tasks, and the address spaces that they have over time.

kernel/fork.c:copy_mm(): a child has its parent's memory with CLONE_VM, a copy of it else; fs/exec.c:exec_mmap(): a
program begins with new memory. A log without these says of a task what process it is of, or nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import Input
from pgemu.trace.log import Task
from pgemu.trace.process_calls import NOT_TOLD

__all__ = ("NONE", "Memories", "Memory", "NewTasks")

NewTasks = Literal["auto", "process", "thread"]
NONE = -1
_CLONE_VM, _CLONE_THREAD = 0x100, 0x10000  # include/uapi/linux/sched.h
_KIND, _TASK, _A, _B, _STATE = 0, 2, 4, 5, 9


@dataclass
class Memory:
    """An address space (mm_struct) from its beginning to its end.

    Attributes:
        task: whose it is first
        parent: of which it is a copy by fork, None: none
        before: what the process had until it executed this program, None: nothing
        begins: position of the event that makes it, -1: it stands before the log
    """

    task: int
    parent: int | None = None
    before: int | None = None
    begins: int = -1


class Memories:
    """The address spaces of a log.

    Attributes:
        memories: by number
        of_event: int64[events], the one that each is about, after it; NONE: it has ended
        made: by position of a FORK or EXEC, the memory that it makes
        ended: by position of an EXIT (or an EXEC), the memories that end with it
        notes: what was taken to be so, in words
    """

    def __init__(self, tasks: tuple[Task, ...], rows: npt.NDArray[np.uint64], new_tasks: NewTasks) -> None:
        self.memories: list[Memory] = []
        self.of_event = np.zeros(len(rows), np.int64)
        self.made: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self._tasks, self._new = tasks, new_tasks
        self._by_tid = {task.tid: number for number, task in enumerate(tasks)}
        self._memory_of: dict[int, int] = {}  # of a task that runs
        self._of_process: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        self._group: dict[int, int] = {}  # of a task: the task that is its process's first
        self._last = 0  # task of the event before
        self._guessed: Counter[str] = Counter()
        for position, row in enumerate(rows[:, [_KIND, _TASK, _A, _B, _STATE]].tolist()):
            self._event(position, *row)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken to be so."""
        told = []
        if count := self._guessed["process"]:
            told.append(f"threads of which no line names the process, taken for one each (new_tasks): {count}")
        if count := self._guessed["thread"]:
            told.append(f"tasks that no line makes, taken for threads of the process before (new_tasks): {count}")
        return tuple(told)

    def _event(self, position: int, kind: int, task: int, a: int, b: int, state: int) -> None:
        if task not in self._memory_of and kind == Input.EXIT:
            self.of_event[position] = NONE  # its process has ended before
            return
        if task not in self._memory_of:
            self._enter(task, self._first_memory(task, kind, a))
        memory = self._memory_of[task]
        if state == 0:
            if kind == Input.FORK:
                self._fork(position, task, memory, a, b)
            elif kind == Input.EXEC:
                memory = self._exec(position, task, memory)
            elif kind == Input.EXIT:
                self._exit(position, task, memory, whole=a == 1)
        self.of_event[position] = memory
        self._last = task

    def _enter(self, task: int, memory: int) -> None:
        self._group.setdefault(task, task)
        self._memory_of[task] = memory
        self._users[memory] += 1
        process = self._tasks[task].process
        if process is not None:
            self._of_process[process] = memory

    def _new_memory(self, memory: Memory) -> int:
        self.memories.append(memory)
        return len(self.memories) - 1

    def _first_memory(self, task: int, kind: int, a: int) -> int:
        """Of a task that no event made: its process's, else as `new_tasks` says."""
        process = self._tasks[task].process
        if process is not None:
            if process in self._of_process:
                leader = self._by_tid.get(process)
                self._group[task] = self._group.get(task if leader is None else leader, task)
                return self._of_process[process]
            return self._new_memory(Memory(task))
        if not self.memories:
            return self._new_memory(Memory(task))
        begins = kind == Input.EXEC or (kind == Input.BREAK and a == 0)  # as a program does
        thread = self._new == "thread" or (self._new == "auto" and not self._tasks[task].name and not begins)
        if thread and self._last in self._memory_of:
            self._guessed["thread"] += 1
            self._group[task] = self._group[self._last]
            return self._memory_of[self._last]
        self._guessed["process"] += not begins
        return self._new_memory(Memory(task))

    def _fork(self, position: int, task: int, memory: int, child: int, flags: int) -> None:
        number = self._by_tid.get(child)
        if number is None or number == task:
            return
        if flags == NOT_TOLD:
            process = self._tasks[number].process
            is_thread = process is not None and process == self._tasks[task].process
            flags = _CLONE_VM | _CLONE_THREAD if is_thread else 0
        self._leave(number)
        self._group[number] = self._group[task] if flags & _CLONE_THREAD else number
        if flags & _CLONE_VM:
            self._enter(number, memory)
            return
        made = self._new_memory(Memory(number, parent=memory, begins=position))
        self.made[position] = made
        self._enter(number, made)

    def _exec(self, position: int, task: int, memory: int) -> int:
        made = self._new_memory(Memory(task, before=memory, begins=position))
        if self._all_leave(self._threads(task)):
            self.ended[position] = memory
        self._enter(task, made)
        self.made[position] = made
        return made

    def _exit(self, position: int, task: int, memory: int, *, whole: bool) -> None:
        if self._all_leave(self._threads(task) if whole else [task]):
            self.ended[position] = memory

    def _threads(self, task: int) -> list[int]:
        """Tasks of the same process, itself among them."""
        return [one for one in self._memory_of if self._group[one] == self._group[task]]

    def _all_leave(self, tasks: list[int]) -> bool:
        """Tasks do without their memory: whether they were its last ones."""
        return [self._leave(task) for task in tasks][-1:] == [True]

    def _leave(self, task: int) -> bool:
        """A task does without its memory: whether that was the last one."""
        memory = self._memory_of.pop(task, None)
        if memory is None:
            return False
        self._users[memory] -= 1
        process = self._tasks[task].process
        if process is not None and self._of_process.get(process) == memory and not self._users[memory]:
            del self._of_process[process]
        return not self._users[memory]
