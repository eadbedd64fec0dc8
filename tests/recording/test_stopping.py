"""Signals that end a recording, not this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pgemu.recording.stopping import Stopping, witness

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


ASKED = """
import os, signal, sys
from pgemu.recording.stopping import Stopping, witness
with witness() as group, Stopping():
    {before}
    print(group.got(signal.SIGINT))
"""


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ("pass", "False"),
        ("os.kill(os.getpid(), signal.SIGINT)", "False"),
        ("os.killpg(0, signal.SIGINT)", "True"),
        ("group._pid = 1 << 30", "True"),
    ],
)
def test_a_witness_tells_what_came_to_all_of_the_group(before: str, told: str) -> None:
    code = ASKED.format(before=before)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, process_group=0, timeout=60)
    assert (ran.stdout, ran.stderr) == (f"{told}\n", "")


def test_a_witness_ends_with_who_asked() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with witness() as group:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        os.kill(group._pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(group._pid, 0)
    code = "import os, signal\nfrom pgemu.recording.stopping import witness\n"
    code += "with witness() as group:\n    print(group._pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.wait(60)
        for _ in range(600):
            try:
                os.kill(pid, 0)
                if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                    return
            except OSError:
                return
            time.sleep(0.05)
    raise AssertionError("it lives on")
