"""Run a command under a tool, and write what the tool recorded as text."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pgemu.errors import InputError
from pgemu.recording.sink import Sink
from pgemu.recording.stopping import Stopping, Witness, witness
from pgemu.recording.tools import Way, said

__all__ = ("Ran", "run")

_PIECE = 1 << 16
_WAIT = 0.2  # seconds
_PATIENCE = 3  # signals until a command is killed that ignores them


class Ran(NamedTuple):
    """How it went.

    Attributes:
        status: as subprocess has it: the command's exit status, or minus the signal that ended it; None: not told
        stopped: Ctrl-C or its like came
    """

    status: int | None
    stopped: bool


def run(way: Way, command: Sequence[str], sink: Sink) -> Ran:
    """Run a command under a tool and copy what it recorded; the command's own input and output are this process's.

    Ctrl-C reaches the command and the tool as it would without pgemu, and what they recorded is kept; SIGINT that comes
    to this process alone is passed on. A second one terminates the command, a third one kills it.

    :raises InputError: the tool recorded nothing, or cannot print what it recorded
    """
    with witness() as group, Stopping() as stopping:
        passing = _Passing(stopping, group)
        status = _recorded(way, command, sink, passing) if way.show else _streamed(way, command, sink, passing)
    if not sink.lines:
        raise InputError(f"{way.tool} recorded nothing (exit status {status})")
    return Ran(status if way.tells_status else None, stopping.count > 0)


def _streamed(way: Way, command: Sequence[str], sink: Sink, passing: _Passing) -> int:
    """The tool writes text to a pipe: of a program's accesses there is too much for a file between."""
    out, end = os.pipe()
    try:
        arguments = [part.format(fd=end, file="") for part in way.record]
        process = subprocess.Popen([way.tool, *arguments, *command], pass_fds=(end,))
    finally:
        os.close(end)
    with _ending(process), os.fdopen(out, "rb", buffering=0) as pipe:
        while True:
            passing.on_to(process)
            if select.select([pipe], [], [], _WAIT)[0]:
                data = pipe.read(_PIECE)
                if not data:
                    break
                sink.write(data)
            elif process.poll() is not None:  # a child that lives on holds the pipe, and is none of this
                break
        return _waited(process, passing)


def _recorded(way: Way, command: Sequence[str], sink: Sink, passing: _Passing) -> int:
    """The tool writes a recording, which it prints afterwards."""
    with tempfile.TemporaryDirectory(prefix="pgemu-") as folder:
        file = os.path.join(folder, "recording")
        arguments = [part.format(file=file, fd="") for part in way.record]
        process = subprocess.Popen([way.tool, *arguments, *command])
        with _ending(process):
            status = _waited(process, passing)
        if not os.path.exists(file):
            raise InputError(f"{way.tool} recorded nothing (exit status {status})")
        with tempfile.TemporaryFile() as errors:
            printing = subprocess.Popen(
                [way.tool, *(part.format(file=file) for part in way.show)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
            assert printing.stdout
            with printing.stdout as text, _ending(printing):
                while data := text.read(_PIECE):
                    sink.write(data)
                    if passing.stopping.count > 1:  # the first one ended the command
                        raise KeyboardInterrupt
            if printing.wait():
                errors.seek(0)
                raise InputError(f"{way.tool} cannot print what it recorded: {said(errors.read())}")
    return status


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process that an exception would leave behind."""
    try:
        yield
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        raise


def _waited(process: subprocess.Popen[bytes], passing: _Passing) -> int:
    while True:
        passing.on_to(process)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_WAIT)


class _Passing(NamedTuple):
    """Signals that came, and who tells whether they came to the command and the tool themselves."""

    stopping: Stopping
    group: Witness

    def on_to(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what came since the last time: SIGINT as it is, unless all of the group got it, as of a terminal's
        Ctrl-C; else, and more of it, to terminate, then to kill.
        """
        stopping = self.stopping
        if process.returncode is not None or not stopping.news():
            return
        number = signal.SIGTERM if stopping.count < _PATIENCE else signal.SIGKILL
        if stopping.count == 1 and stopping.signal is signal.SIGINT:
            if self.group.got(signal.SIGINT):
                return
            number = signal.SIGINT
        for pid in _descendants(process.pid) or [process.pid]:  # strace itself blocks signals, valgrind is the command
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _descendants(tool: int) -> list[int]:
    """The command, its children and theirs, and what the tool traces, whose parent may have ended."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError), open(f"/proc/{name}/status") as file:
                words = dict(line.split(":\t", 1) for line in file if line.startswith(("PPid:", "TracerPid:")))
                traced = int(words.get("TracerPid", 0)) == tool
                found[int(name)] = tool if traced else int(words.get("PPid", 0))
    of_tool = {tool}
    while more := {pid for pid, parent in found.items() if parent in of_tool} - of_tool:
        of_tool |= more
    return sorted(of_tool - {tool})
