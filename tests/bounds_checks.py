"""Tests that are the same with bounds checks, marked `same_with_checks`, and what keeps the mark true.

CI runs such tests once: they call nothing compiled, so that compiling it otherwise changes nothing. In every run, one
that does call it fails; a new test has no mark, and runs with and without bounds checks.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

MARK = "same_with_checks"
NOTHING_COMPILED = "NUMBA_DISABLE_JIT"  # in a process that has it no machine boots


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Fail if compiled code is called meanwhile; a process that is started meanwhile has none to call.

    A process may have other variables: without NUMBA_BOUNDSCHECK it is the same whoever starts it.
    """
    from numba.core.dispatcher import Dispatcher  # before the variable is set, which numba reads as it is imported

    called = []

    def refuse(self: Any, *arguments: object, **named: object) -> None:
        called.append(self.py_func.__qualname__)
        raise AssertionError(f"{called[-1]}() is compiled, and is called by a test marked {MARK}")

    before = os.environ.get(NOTHING_COMPILED)
    Dispatcher.__call__ = refuse
    os.environ[NOTHING_COMPILED] = "1"
    try:
        yield
    finally:
        del Dispatcher.__call__  # that of numba, in C, is inherited
        os.environ.pop(NOTHING_COMPILED)
        if before is not None:
            os.environ[NOTHING_COMPILED] = before
    assert called == [], f"a test marked {MARK} calls what is compiled"  # whatever became of the exception


@pytest.hookimpl(wrapper=True)
def watched(item: pytest.Item) -> Generator[None, None, None]:
    """A phase of a test: its fixtures, itself, or the end of its fixtures."""
    with nothing_compiled() if item.get_closest_marker(MARK) else nullcontext():
        yield


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = watched
