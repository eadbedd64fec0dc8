"""What a replay does beside running: decode what comes next, write what came before. Both leave Python to the runner
for most of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ("Ahead", "Behind")

_Item = TypeVar("_Item")
_DEPTH = 4  # items that wait
_END = object()


class Ahead(Generic[_Item]):
    """Items of an iterator, taken by a thread before they are asked for; what it raises is raised where they are."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._queue: Queue[Any] = Queue(_DEPTH)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = Thread(target=self._run, name="pgemu-decode", daemon=True)

    def __enter__(self) -> Iterator[_Item]:
        self._thread.start()
        return self._taken()

    def _taken(self) -> Iterator[_Item]:
        while (item := self._queue.get()) is not _END:
            yield item
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped = True
        while self._thread.is_alive():
            with suppress(Empty):  # room for what it may be about to put
                self._queue.get(timeout=0.01)
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if self._stopped:
                    break
                self._queue.put(item)
        except BaseException as error:
            self._error = error
        self._queue.put(_END)


class Behind(Generic[_Item]):
    """A function that a thread calls with one item after the other; what it raises is raised by the next call."""

    def __init__(self, take: Callable[[_Item], None]) -> None:
        self._take = take
        self._queue: Queue[Any] = Queue(_DEPTH)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="pgemu-write", daemon=True)

    def __enter__(self) -> Behind[_Item]:
        self._thread.start()
        return self

    def put(self, item: _Item) -> None:
        """Have an item taken."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def wait(self) -> None:
        """Until all items are taken."""
        self._queue.join()
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._queue.put(_END)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            try:
                if self._error is None:
                    self._take(item)
            except BaseException as error:
                self._error = error
            self._queue.task_done()
