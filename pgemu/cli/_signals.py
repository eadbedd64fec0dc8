"""Signals that end a command: as Ctrl-C does, so that nothing half-written is left, with the status of each."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ("Ending", "Terminated", "status_of")

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised as Ctrl-C is.

    Attributes:
        number: which one
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def status_of(number: int) -> int:
    """The exit status that shells give to what a signal ended."""
    return 128 + number


class Ending:
    """Where SIGTERM and SIGHUP would end this process, raise Terminated; the second one ends it all the same.

    What is ignored, as by nohup, stays so.

    Attributes:
        number: the signal that came, 0: none
    """

    def __init__(self) -> None:
        self.number = 0
        self._taken: list[signal.Signals] = []

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():  # no other one may
            self._taken = [one for one in _SIGNALS if signal.getsignal(one) is signal.SIG_DFL]
        for one in self._taken:
            signal.signal(one, self._came)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one in self._taken:
            signal.signal(one, signal.SIG_DFL)

    def _came(self, number: int, _frame: FrameType | None) -> Any:
        self.number = number
        for one in self._taken:
            signal.signal(one, signal.SIG_DFL)
        raise Terminated(number)
