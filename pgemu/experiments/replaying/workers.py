"""Tasks in processes of their own, some at a time.

A process that only loads what its task needs is ended where it is, once no more is wanted: that takes seconds, in which
nobody asks it anything. A task that has asked whether to stop has begun, and ends as it likes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from pgemu.errors import InputError

__all__ = ("run_all",)

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEAVE = signal.SIGUSR1  # its default ends a process that has not come as far as to take it
_WAIT = 0.2  # seconds
_AGAIN = 1.0  # seconds until a process is told once more that may have lost an exception


def run_all(
    function: Callable[[_Task, Callable[[], bool]], _Result], tasks: Sequence[_Task], jobs: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[int, _Result | InputError]]:  # fmt: skip
    """Yield the number of each task and its result, or what it refused, as they come; `jobs` processes at a time.

    Once `stopped` says so no more begin, those that run are told, and of those that had not begun nothing comes.
    InputError if a process dies.

    :param function: takes a task, and what to ask whether to stop
    """
    # A process that is forked would have the threads of this one, which do not run there.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # here, for it ends by letting signals through
    left = list(enumerate(tasks))
    workers: list[_Worker] = []
    try:
        while left or any(one.number is not None for one in workers):
            if stopped():
                left.clear()
                for one in workers:
                    one.leave()
            while left and (free := _free(workers, jobs, context)):
                free.begin(function, *left.pop(0))
            busy = {one.connection: one for one in workers if one.number is not None}
            for ready in wait(list(busy), _WAIT):
                found = busy[ready].result()
                if found is not None:
                    yield found
    except BaseException:  # nobody waits for the results any more
        for one in workers:
            one.leave()
        raise
    finally:
        for one in workers:
            one.end()


class _Worker:
    """A process for one task after the other.

    Attributes:
        connection: what it says
        number: of the task that it does, None: none
    """

    def __init__(self, context: Any) -> None:
        self.number: int | None = None
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,))
        self._told = 0.0  # when it was told to leave, 0: it was not
        self._process.start()
        theirs.close()  # so that its end is seen

    def begin(self, function: Callable[[Any, Callable[[], bool]], Any], number: int, task: Any) -> None:
        """Give it a task."""
        self.number = number
        with suppress(BrokenPipeError, ConnectionResetError):  # it died: result() tells
            self.connection.send((function, task))

    def leave(self) -> None:
        """Let its task end where it is, or, if it has begun, as it likes."""
        now = time.monotonic()
        if now - self._told >= _AGAIN and self._process.is_alive():
            self._told = now
            os.kill(self._process.pid, _LEAVE)

    def result(self) -> tuple[int, Any] | None:
        """Take what it says: its task and the result, or what that refused; None where it left. What it raised else is
        raised.
        """
        number, self.number = self.number, None
        assert number is not None
        try:
            is_error, found = self.connection.recv()
        except (EOFError, OSError):
            if self._told:
                return None
            raise InputError("a process of the run ended before its time: out of memory, or killed") from None
        if is_error and not isinstance(found, InputError):
            raise found
        return number, found

    def end(self) -> None:
        """Wait until it has ended."""
        self.connection.close()
        while self._process.is_alive():
            if self._told:
                self.leave()
            self._process.join(_WAIT)


def _free(workers: list[_Worker], jobs: int, context: Any) -> _Worker | None:
    """A process without a task, a new one if there may be more."""
    found = next((one for one in workers if one.number is None), None)
    if found is None and len(workers) < jobs:
        with _uninterrupted():  # else there were one that nobody knows
            found = _Worker(context)
            workers.append(found)
    return found


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that begin meanwhile are not interrupted by Ctrl-C or its like, not even while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --------------------------------------------------------------------------- in such a process


class _Asked:
    """Whether to stop, as a task asks it, and whether it did: then it has begun, and is not ended from outside."""

    def __init__(self) -> None:
        self.begun = False
        self._wanted = False
        self._left = 0.0

    @property
    def left(self) -> bool:
        """Whether the task is ended where it is: what it raises is what an import makes of that."""
        return self._wanted and not self.begun

    def __call__(self) -> bool:
        self.begun = True
        return self._wanted

    def leave(self, _number: int, _frame: Any) -> None:
        """End this process by an exception, so that nothing half-written stays, or let its task stop."""
        self._wanted = True
        now = time.monotonic()
        if self.begun or now - self._left < _AGAIN / 2:
            return
        self._left = now
        sys.unraisablehook = lambda _: None  # what a callback of a library loses comes once more
        raise SystemExit(0)


def _work(connection: Connection) -> None:
    """Do tasks until there are no more."""
    asked = _Asked()
    signal.signal(_LEAVE, asked.leave)
    for number in _SIGNALS:  # the process that asked for the tasks says when to stop
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            asked.begun = False
            try:
                function, task = connection.recv()  # which imports what they are made of
            except Exception:
                if asked.left:
                    return
                raise
            answer = _answer(function, task, asked)
            asked.begun = True  # it is over, and is told
            connection.send(answer)


def _answer(function: Callable[[Any, Callable[[], bool]], Any], task: Any, asked: _Asked) -> tuple[bool, Any]:
    """Whether a task raised something, and that or its result."""
    try:
        return False, function(task, asked)
    except InputError as error:
        return True, error
    except Exception as error:
        if asked.left:
            raise SystemExit(0) from None
        error.add_note("".join(traceback.format_exception(error)))
        return True, error


def _end_with(parent: Any) -> None:
    """End this process once the one that asked for the tasks has ended, for whatever reason."""
    parent.join()
    os._exit(1)
