"""What a process says while it compiles: a line on stderr that changes, if that is a terminal, or one line in all."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

from pgemu_kernels.engine import machine_code


class Progress:
    """Which entries are being compiled, here and in other processes, and how many of those wanted are done."""

    def __init__(self) -> None:
        self.wanted = 0  # how many a caller has asked for, if it said so
        self.quiet = False  # for processes that compile for another one
        self._announced = False
        self._lock = threading.Lock()
        self._under_way: dict[str, float] = {}
        self._done = 0
        self._width = 0

    def expect(self, count: int) -> None:
        """So many entries are to be compiled from now on."""
        with self._lock:
            self.wanted, self._done = count, 0

    def begin(self, name: str) -> None:
        """The compilation of an entry begins."""
        with self._lock:
            self._under_way.setdefault(name, time.monotonic())
            self._show()

    def end(self, name: str) -> None:
        """It is there."""
        with self._lock:
            if self._under_way.pop(name, None) is not None:
                self._done += 1
            self._show()

    def _show(self) -> None:
        if self.quiet or sys.stderr is None:
            return
        with suppress(OSError, ValueError):  # closed, or on a full disk: nobody is told, and the work goes on
            self._tell()

    def _tell(self) -> None:
        if sys.stderr.isatty():
            self._rewrite(self._line() if self._under_way else "")
        elif not self._announced:
            kept = "once (their machine code is cached)"
            where = kept if machine_code.writable() else "into memory (no cache folder can be written)"
            print(f"pgemu: compiling kernels, {where}", file=sys.stderr, flush=True)
        self._announced = True

    def _line(self) -> str:
        names = ", ".join(self._under_way)
        of = f" {self._done} of {self.wanted} done," if self.wanted > 1 else ""
        kept = "" if machine_code.writable() else " into memory (no cache folder can be written)"
        return f"pgemu: compiling kernels{kept}:{of} now {names}"

    def _rewrite(self, line: str) -> None:
        print(f"\r{line:{self._width}}" + ("" if line else "\r"), end="", file=sys.stderr, flush=True)
        self._width = len(line)


progress = Progress()


def _begin_anew() -> None:
    """In a process that was forked: its parent's threads, which may have held the lock, are not here."""
    progress._lock = threading.Lock()
    progress._under_way = {}


os.register_at_fork(after_in_child=_begin_anew)
