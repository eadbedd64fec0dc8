"""A mark that is not true is found: bounds_checks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import pytest
from numba import njit

from bounds_checks import nothing_compiled
from pgemu.objects.machine import Config, Machine

BOOT = "from pgemu import Config, Machine; Machine(Config('pfnmap', pool=1 << 21, page_size=1 << 21))"


@njit
def one_more(value):  # type: ignore[no-untyped-def]
    return value + 1


def test_what_is_compiled_cannot_be_called() -> None:
    assert one_more(1) == 2
    with pytest.raises(AssertionError, match=r"one_more\(\) is compiled"), nothing_compiled():
        one_more(1)
    assert one_more(1) == 2


def test_a_machine_cannot_be_booted() -> None:
    with pytest.raises(AssertionError, match=r"provide\(\) is compiled"), nothing_compiled():
        Machine(Config())
    Machine(Config())


def test_who_hears_no_exception_is_told_at_the_end() -> None:
    with pytest.raises(AssertionError, match=r"calls what is compiled"), nothing_compiled(), suppress(Exception):
        one_more(1)


def test_another_process_cannot_boot_one_either() -> None:
    before = dict(os.environ)
    with nothing_compiled():
        assert subprocess.run([sys.executable, "-c", BOOT], capture_output=True).returncode == 1
    assert os.environ == before
    assert subprocess.run([sys.executable, "-c", BOOT], capture_output=True).returncode == 0


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="it calls what is compiled")
@pytest.mark.same_with_checks
def test_a_mark_that_is_not_true_fails() -> None:
    with suppress(AssertionError):
        one_more(1)
