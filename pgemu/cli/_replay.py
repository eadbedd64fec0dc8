"""What `pgemu replay` is made of beside its options: interrupts, lines of progress, names of its files."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pgemu.cli._output import say
from pgemu.cli._signals import Terminated, status_of
from pgemu.errors import InputError

__all__ = ("Interrupt", "PlainLines", "output_names")


class Interrupt:
    """Ctrl-C and its like as a question that a run asks between two pieces; the second one, or one before the run,
    interrupts. What is ignored, as by nohup, stays so.

    Attributes:
        status: exit status of what such a signal ended
    """

    def __init__(self) -> None:
        self._asked = self._wanted = False
        self._before: dict[signal.Signals, Any] = {}
        self.status = status_of(signal.SIGINT)

    def __call__(self) -> bool:
        self._asked = True
        return self._wanted

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if (before := signal.getsignal(one)) not in (signal.SIG_IGN, None):
                    self._before[one] = before
                    signal.signal(one, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Where a run that was asked to stop has nothing to leave, it ends as by the signal that asked."""
        try:
            yield
        except KeyboardInterrupt as error:
            number = self.status - status_of(0)
            if isinstance(error, Terminated) or number == signal.SIGINT:
                raise
            raise Terminated(number) from None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.status = status_of(number)
        if not self._asked or self._wanted:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
        self._wanted = True


class PlainLines:
    """Progress as lines on stderr, one every few seconds."""

    _EACH = 5.0  # seconds

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._began: dict[str, tuple[float, int]] = {}
        self._last = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say how much of something is done, if that is due."""
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, done))
        if self._quiet or now - self._last < self._EACH:
            return
        self._last = now
        rate = (done - first) / max(now - began, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if rate and total > done else ""
        say(f"{what}: {done:,} of {total:,}, {rate:,.0f}/s{left}")


def output_names(output: str, traces: Sequence[str], labels: Sequence[dict[str, str]], several: bool) -> list[str]:
    """The file of each run, trace by trace."""
    if not several:
        if os.path.isdir(output):
            raise InputError("is a folder, expected the name of a file for the outcomes of one run", output)
        return [output]
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"is no folder, expected one for the outcomes of {len(traces) * len(labels)} runs", output)
    stems = [_stem(trace) for trace in traces]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    names = [f"{stem}-{number}" if stem in twice else stem for number, stem in enumerate(stems)]
    return [
        os.path.join(output, ".".join([name, *(_safe(f"{key}={value}") for key, value in label.items())]) + ".parquet")
        for name in names
        for label in labels
    ]


def _stem(trace: str) -> str:
    return _safe(trace) if trace.startswith("workload:") else _safe(Path(trace).name.split(".")[0] or "trace")


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_=,+-]", "-", text)
