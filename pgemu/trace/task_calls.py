"""What each task of a log is doing: the system call that it is in, and the row of its last guest fault.

All of it is in one array of words (words/log_words.py, L_WORDS of each task), which kernels read and write, too.
"""

from __future__ import annotations

from array import array

from pgemu_kernels.words import log_words as L

__all__ = ("CALL_CODES", "NO_CALL", "TaskCalls")

CALL_CODES = {
    "sys_madvise": 1,
    "sys_munmap": 2,
    "sys_mmap": 3,
    "sys_mprotect": 4,
    "sys_mremap": 5,
    "sys_fallocate": 6,
}
NO_CALL = "", -1

_NAMES = {code: name for name, code in CALL_CODES.items()}
_CALL, _ROW, _FAULT, _L2 = (int(word) for word in (L.L_CALL, L.L_ROW, L.L_FAULT, L.L_L2))
_WORDS, _NO_ROW = L.L_WORDS, int(L.NO_ROW)


class TaskCalls:
    """Tasks by their dense number."""

    def __init__(self) -> None:
        self.words = array("Q")

    def add_task(self) -> None:
        """The next task: in no call, without a fault."""
        self.words.extend((0, _NO_ROW, _NO_ROW, 0))

    def begin(self, task: int, name: str, row: int) -> None:
        """A task enters a call; `row`: where the row of that begins, -1: it has none."""
        self.words[task * _WORDS + _CALL] = CALL_CODES[name]
        self.words[task * _WORDS + _ROW] = _NO_ROW if row < 0 else row

    def current(self, task: int) -> tuple[str, int]:
        """The call that a task is in and where its row begins, NO_CALL if it is in none."""
        code = self.words[task * _WORDS + _CALL]
        if not code:
            return NO_CALL
        row = self.words[task * _WORDS + _ROW]
        return _NAMES[code], -1 if row == _NO_ROW else row

    def end(self, task: int) -> tuple[str, int]:
        """The same, and the task is in no call any more."""
        found = self.current(task)
        self.words[task * _WORDS + _CALL] = 0
        return found

    def fault(self, task: int) -> int:
        """Where the row of a task's last guest fault begins, -1: it had none."""
        row = self.words[task * _WORDS + _FAULT]
        return -1 if row == _NO_ROW else row

    def note_fault(self, task: int, row: int) -> None:
        """A task has a guest fault; it is in no call."""
        self.words[task * _WORDS + _CALL] = 0
        self.words[task * _WORDS + _FAULT] = row

    def note_l2(self, task: int, is_l2: bool) -> None:
        """Whether a task's guest faults are an L2 guest's from now on."""
        self.words[task * _WORDS + _L2] = is_l2
