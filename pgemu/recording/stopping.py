"""Signals that ask a recording to end: it ends, and what it has is kept; and whether one came to the command, too."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ("Stopping", "Witness", "witness")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Counts Ctrl-C and its like, where they would end this process; what is ignored, as by nohup, stays so.

    Attributes:
        count: how many have come
        signal: the last one
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal: signal.Signals | None = None
        self._told = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # no other one may
            found = {one: signal.getsignal(one) for one in _SIGNALS}
            self._before = {one: before for one, before in found.items() if before is not signal.SIG_IGN}
        for one in self._before:
            signal.signal(one, self._came)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    def news(self) -> bool:
        """Whether one has come since this was asked last."""
        before, self._told = self._told, self.count
        return self.count > before

    def _came(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.signal = signal.Signals(number)


class Witness:
    """A process of this process group that does nothing: what it got, all of the group got."""

    _SOON = 0.02  # seconds until a signal to a group has come to all of it

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def got(self, number: signal.Signals) -> bool:
        """Whether it got a signal, which waits there for ever; where the system does not tell it is taken to have.
        proc_pid_status(5), ShdPnd
        """
        time.sleep(self._SOON)
        with suppress(OSError), open(f"/proc/{self._pid}/status") as file:
            pending = next((int(line.split()[1], 16) for line in file if line.startswith("ShdPnd:")), 0)
            return bool(pending >> (number - 1) & 1)
        return True


@contextmanager
def witness() -> Iterator[Witness]:
    """Have a process in this group, for which SIGINT waits; it ends with this one, whatever ends that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which it inherits
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", "read _"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield Witness(process.pid)
    finally:
        process.kill()
        process.communicate()
