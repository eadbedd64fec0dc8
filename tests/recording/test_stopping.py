"""Signals that end a recording, not this process."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pgemu.recording.stopping import Stopping

pytestmark = pytest.mark.same_with_checks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_counted_and_then_do_what_they_did_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stopping() as stopping:
        assert not stopping.news()
        os.kill(os.getpid(), number)
        assert (stopping.count, stopping.signal) == (1, number)
        assert stopping.news()
        assert not stopping.news()
    assert signal.getsignal(number) is before


def test_other_threads_may_record_too() -> None:
    found: list[int] = []

    def record() -> None:
        with Stopping() as stopping:
            found.append(stopping.count)

    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    assert found == [0]


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.count == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
