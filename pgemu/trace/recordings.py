"""Binary recordings whose text is read: the tool that made them prints them, if it is installed.

Sources: tools/perf/util/header.h (PERF_MAGIC), trace-cmd.dat(5); tools/perf/Documentation/perf-script.txt,
trace-cmd-report(1).
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import BinaryIO, cast

from pgemu.errors import InputError
from pgemu.trace.events import PERF_FIELDS
from pgemu.trace.source import Source

__all__ = ("printed", "recording_of")


@dataclass(frozen=True)
class _Recording:
    """A kind of recording: how it begins, which tool prints it with which arguments before the file, and what a person
    may do without."""

    magic: bytes
    name: str
    command: tuple[str, ...]
    help: str


_RECORDINGS = (
    _Recording(
        b"PERFILE2",
        "a recording of perf",
        # Fields of tracepoints alone: other events may have no CPU, which would end it.
        ("perf", "script", "--show-lost-events", "-F", f"trace:{PERF_FIELDS}", "-i"),
        f"print it with perf script -i FILE -F {PERF_FIELDS}",
    ),
    _Recording(
        b"\x17\x08\x44tracing",
        "a recording of trace-cmd",
        ("trace-cmd", "report", "-i"),
        "print it with trace-cmd report",
    ),
)
_START = 1 << 16  # bytes of the text by which its format is told
_LONGEST = 300  # characters of what the tool says


def recording_of(head: bytes) -> str | None:
    """What a recording is called that begins so; None for no recording."""
    return next((one.name for one in _RECORDINGS if head.startswith(one.magic)), None)


def printed(source: Source) -> Source:
    """A recording's text as its tool prints it; any other source as it is.

    What is read is the tool's output while it runs: it ends with the reading, and if it fails that does, too.

    :raises InputError: the tool is not there, or prints nothing
    """
    recording = next((one for one in _RECORDINGS if source.head.startswith(one.magic)), None)
    if recording is None:
        return source
    tool = shutil.which(recording.command[0])
    if tool is None:
        source.close()
        raise InputError(f"{recording.name}: {recording.help}", source.name)
    with source.whole() as file:
        stream = _Output(source.name, recording, *_started(source, recording, tool, file))
    try:
        start = b""
        while len(start) < _START and (data := stream.read(_START - len(start))):  # it may write in small pieces
            start += data
        if not start:
            raise InputError(f"{recording.name}: {stream.command} prints nothing of it{stream.said(': ')}", source.name)
        return Source(f"{source.name} ({stream.command})", None, cast(BinaryIO, stream), start)
    except BaseException:
        stream.close()
        raise


def _started(
    source: Source, recording: _Recording, tool: str, file: BinaryIO
) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """The tool, which prints a file, and what it says beside that."""
    # A copy has no name: the tool opens what it inherits.
    copy = file.fileno() if source.path is None else None
    where = os.path.abspath(source.path) if source.path is not None else f"/proc/self/fd/{copy}"
    errors = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (closed with the output)
    try:
        process = subprocess.Popen(
            [tool, *recording.command[1:], where],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C", "DEBUGINFOD_URLS": ""},  # symbols are fetched from nowhere
            pass_fds=() if copy is None else (copy,),
        )
    except OSError as error:
        errors.close()
        text = f"{recording.name}: {tool} cannot be run: {error.strerror or error}"
        raise InputError(text, source.name) from None
    return process, errors


class _Output(io.RawIOBase):
    """What a tool prints of a recording: the file's end is where the tool ended well.

    Attributes:
        command: what runs, as messages name it
    """

    def __init__(self, source: str, recording: _Recording, process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
        super().__init__()
        self.command = " ".join(recording.command[:2])
        self._source = source
        self._name = recording.name
        self._process = process
        self._errors = errors
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Some bytes, none at the end. InputError if the tool failed."""
        if self._ended:
            return b""
        output = self._process.stdout
        assert output is not None
        data: bytes = output.read1(size)  # type: ignore[attr-defined]
        if not data:
            self._ended = True
            status = self._process.wait()
            if status:
                raise InputError(f"{self._name}: {self.command} ends with {self._reason(status)}", self._source)
        return data

    def _reason(self, status: int) -> str:
        """How the tool ended, with the last thing that it said."""
        return f"{f'status {status}' if status > 0 else f'signal {-status}'}{self.said(': ')}"

    def said(self, before: str) -> str:
        """The last line of the tool's errors behind some text, nothing where there is none."""
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"{before}{lines[-1][:_LONGEST]}" if lines else ""

    def close(self) -> None:
        """End the tool, if it runs."""
        if self.closed:
            return
        if self._process.poll() is None:
            self._process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()
        self._errors.close()
        super().close()
