"""Tools that record a command: with which options, and what keeps one from working.

The options are those of which the text is read back: perf-record(1), perf-script(1), trace-cmd-record(1), strace(1),
and the manual of Valgrind, "Lackey".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from pgemu.errors import InputError
from pgemu.recording.tracefs import events_here, tracefs
from pgemu.trace.events import PERF_FIELDS, Event

__all__ = ("TOOLS", "Way", "check_command", "choose", "said", "ways_of")

_FAULT_FIELDS = "comm,pid,tid,time,event,addr,ip,sym"  # of page-faults, which have no fields and no CPU
_CALLS = "%memory,ioctl,fallocate,ftruncate,memfd_create,execve,exit_group,clone,?clone3,?fork,?vfork"
_PROBE_SECONDS = 60
_LONGEST = 300  # characters of what a tool says


class Way(NamedTuple):
    """One way to record with a tool.

    Attributes:
        tool: its name
        what: what is recorded, in words
        record: arguments before the command; {file} is where the recording goes, {fd} a descriptor that text goes to
        show: arguments that print a recording {file} as text; (): the text is written at once
        tells_status: the tool exits as the command does
    """

    tool: str
    what: str
    record: tuple[str, ...]
    show: tuple[str, ...] = ()
    tells_status: bool = True


TOOLS = {"perf": "linux-perf", "trace-cmd": "trace-cmd", "valgrind": "valgrind", "strace": "strace"}
"""Debian's packages by tool, in the order in which they are tried."""


def _tracepoints() -> tuple[Event, ...]:
    """The events that this kernel has, () where they cannot be seen."""
    try:
        return events_here(tracefs())
    except InputError:
        return ()


def ways_of(tool: str) -> tuple[Way, ...]:
    """Ways to record with a tool on this machine, the best first."""
    if tool == "valgrind":
        return (Way(tool, "every access", ("--tool=lackey", "--trace-mem=yes", "--log-fd={fd}")),)
    if tool == "strace":
        return (Way(tool, "calls", ("-f", "-ttt", "-e", f"trace={_CALLS}", "-o", "/dev/fd/{fd}")),)
    events = [str(event) for event in _tracepoints()]
    what = f"{'exceptions:page_fault_user and ' if len(events) > 1 else ''}{max(len(events) - 1, 1)} other events"
    if tool == "trace-cmd":
        chosen = [part for event in events for part in ("-e", event)]
        record = ("record", "-q", "-F", "-c", *chosen, "-o", "{file}")
        return (Way(tool, what, record, ("report", "-i", "{file}"), tells_status=False),) * bool(events)
    show = ("script", "--show-lost-events", "-i", "{file}", "-F")
    quiet = ("record", "-q", "-c", "1", "-o", "{file}")
    faults = Way(tool, "page-faults, without calls", (*quiet, "-e", "page-faults", "-d", "--"), (*show, _FAULT_FIELDS))
    if not events:
        return (faults,)
    return Way(tool, what, (*quiet, "-e", ",".join(events), "--"), (*show, PERF_FIELDS)), faults


def choose(tool: str | None) -> Way:
    """The first way that works, of one tool or of all.

    :raises InputError: none does; it says what to install, or which privilege is missing
    """
    reasons = []
    for name in TOOLS if tool is None else (tool,):
        found, reason = _working(name)
        if found:
            return found
        reasons.append(f"{name}: {reason}")
    raise InputError("; ".join(reasons))


def _working(tool: str) -> tuple[Way | None, str]:
    """A tool's first way that works, or why none does."""
    if shutil.which(tool) is None:
        return None, f"not installed (Debian: apt install {TOOLS[tool]})"
    ways = ways_of(tool)
    reason = "tracefs cannot be read"
    for way in ways:
        reason = _tried(way)
        if not reason:
            return way, ""
    return None, f"does not work here: {reason}{_missing(tool)}"


def _tried(way: Way) -> str:
    """Why a way does not work, "" if it does: it records a command that does nothing."""
    with tempfile.TemporaryDirectory(prefix="pgemu-") as folder:
        file = os.path.join(folder, "recording")
        with open(os.devnull, "wb") as nothing:
            arguments = [part.format(file=file, fd=nothing.fileno()) for part in way.record]
            try:
                done = subprocess.run(
                    [way.tool, *arguments, "true"], capture_output=True, stdin=subprocess.DEVNULL,
                    pass_fds=(nothing.fileno(),), timeout=_PROBE_SECONDS,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                return getattr(error, "strerror", None) or f"no end after {_PROBE_SECONDS} s"
    return "" if done.returncode == 0 else said(done.stderr) or f"exit status {done.returncode}"


def said(stderr: bytes) -> str:
    """What a tool said, in one line."""
    return " ".join(stderr.decode(errors="replace").split())[:_LONGEST]


def _missing(tool: str) -> str:
    """Which privilege it may be."""
    if tool == "perf":
        return (
            f" (kernel.perf_event_paranoid is {_setting('kernel/perf_event_paranoid')}: 2 or less is needed, or root)"
        )
    if tool == "trace-cmd":
        return " (it needs root, and may write to /sys/kernel/tracing)"
    if tool == "strace":
        scope = _setting("yama/ptrace_scope")
        return f" (ptrace: kernel.yama.ptrace_scope is {scope}, 3 forbids it, and a container may)"
    return ""


def _setting(name: str) -> str:
    """A setting of the kernel's."""
    try:
        with open(f"/proc/sys/kernel/{name}") as file:
            return file.read().strip()
    except OSError:
        return "not set"


def check_command(command: Sequence[str]) -> None:
    """Refuse a command that is not there. InputError that names it."""
    if shutil.which(command[0]) is None:
        raise InputError("no such command, or it cannot be executed", command[0])
