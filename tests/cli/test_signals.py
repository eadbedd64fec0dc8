"""Signals that end a command: their exit status, nothing half-written, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pgemu.cli._replay import Interrupt
from pgemu.cli._signals import Ending, Terminated

SIGNALS = [signal.SIGTERM, signal.SIGHUP]
CONVERT = """
import os, signal, sys
from pgemu.cli import main
from pgemu.trace.readers import parquet
def write(found, target):
    with parquet.whole_file(target) as file:
        file.write(b"half")
        os.kill(os.getpid(), {number})
        signal.pause()
parquet.write = write
main(["trace", "convert", "workload:balloon", "-o", sys.argv[1]], prog_name="pgemu")
"""


def started(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
def test_nothing_half_written_is_left(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with started(sys.executable, "-c", CONVERT.format(number=int(number)), str(out)) as process:
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed, said.strip()) == (128 + number, "", "pgemu: interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_once_and_what_is_ignored_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Ending() as ending:
            with pytest.raises(Terminated, match=number.name):
                os.kill(os.getpid(), number)
            assert ending.number == number
            assert signal.getsignal(number) is signal.SIG_DFL  # the second one ends it
        for manager in (Ending, Interrupt):
            signal.signal(number, signal.SIG_IGN)
            with manager():
                os.kill(os.getpid(), number)
                assert signal.getsignal(number) is signal.SIG_IGN
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
def test_a_replay_is_asked_to_stop_once(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            assert not interrupt()
            os.kill(os.getpid(), number)
            assert interrupt()
            assert interrupt.status == 128 + number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def replaying(out: Path, *more: str, **how: object) -> subprocess.Popen[str]:
    options = ("--design", "pfnmap", "--page-size", "2M", "--set", "operations=1M", "--progress", "none")
    return started(sys.executable, "-m", "pgemu", "replay", "workload:random", *options, *more, "-o", str(out), **how)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in found.read_text().split()] if found.exists() else []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def test_processes_of_a_replay_end_with_the_one_that_asked_for_them(tmp_path: Path) -> None:
    with replaying(tmp_path / "runs", "--vary", "zero=page,folio", "--jobs", "2") as process:
        until(lambda: len(children(process.pid)) >= 3)  # two, and Python's tracker of resources
        begun = children(process.pid)
        process.kill()
        process.communicate(timeout=60)  # who reads the output waits for all of them
    until(lambda: all(map(gone, begun)))


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
@pytest.mark.parametrize("to", ["it", "its group"])
def test_runs_that_only_load_end_at_once_and_leave_nothing(number: signal.Signals, to: str, tmp_path: Path) -> None:
    """Each would run for many seconds."""
    more = ("--set", "operations=16M", "--vary", "zero=page,folio", "--jobs", "2")
    with replaying(tmp_path / "runs", *more, process_group=0) as process:
        until(lambda: len(children(process.pid)) >= 3)
        begun = children(process.pid)
        (os.kill if to == "it" else os.killpg)(process.pid, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.startswith("pgemu: interrupted")
    assert said.count("\n") == 1
    assert not list((tmp_path / "runs").iterdir())
    until(lambda: all(map(gone, begun)))


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
def test_a_run_that_leaves_nothing_ends_as_by_the_signal(number: signal.Signals) -> None:
    interrupt = Interrupt()
    interrupt.status = 128 + number
    with pytest.raises(KeyboardInterrupt) as ended, interrupt.ending():
        raise KeyboardInterrupt
    assert getattr(ended.value, "number", signal.SIGINT) == number


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_leaves_what_has_run_and_a_second_one_nothing(times: int, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pgemu.cli import main
from pgemu.experiments.replaying.run import _Replay
pieces = _Replay._pieces
def once(self, *arguments):
    for piece in pieces(self, *arguments):
        yield piece
        if self.done < 50_000:  # after it was asked whether to stop
            for _ in range({times}):
                os.kill(os.getpid(), signal.SIGTERM)
_Replay._pieces = once
main(["replay", "workload:random", "--design", "pfnmap", "--page-size", "2M", "-o", sys.argv[1]], prog_name="pgemu")
"""
    out = tmp_path / "out.parquet"
    with started(sys.executable, "-c", code.replace("{times}", str(times)), str(out)) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    if times == 2:
        assert not list(tmp_path.iterdir())
        return
    assert "pgemu: interrupted after " in said
    assert 0 < pq.read_metadata(out).num_rows < 101_036
    assert list(tmp_path.iterdir()) == [out]
