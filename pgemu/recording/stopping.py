"""Signals that ask a recording to end: it ends, and what it has is kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ("Stopping",)

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
