"""Where the kernel's events are, and a recording of KVM's by tracefs alone.

Documentation/trace/events.rst, Documentation/trace/kprobetrace.rst; an instance (Documentation/trace/ftrace.rst,
"Instances") has buffers and events of its own, so that nobody else's tracing is touched.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pgemu.errors import InputError
from pgemu.recording.sink import Sink
from pgemu.recording.stopping import Stopping
from pgemu.trace.events import PROBE, PROBED, RECORDED, Event

__all__ = ("PLACES", "Recorded", "events_here", "probed_function", "record", "tracefs")

PLACES = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_PIECE = 1 << 16
_WAIT = 0.2  # seconds from one look at the buffer to the next, at most
_OF_VMM = ("exceptions", "syscalls")  # events that every process has


class Recorded(NamedTuple):
    """What was recorded.

    Attributes:
        seconds: how long
        missing: events that this kernel does not have, each with a reason where there is one
        stopped: a signal ended it
    """

    seconds: float
    missing: tuple[str, ...]
    stopped: bool


def tracefs(places: Sequence[str] = PLACES) -> str:
    """Where tracefs is mounted.

    :raises InputError: nowhere, or not for this user
    """
    for place in places:
        try:
            if "events" in os.listdir(place):
                return place
        except PermissionError:
            raise InputError("no permission: tracing needs root", place) from None
        except OSError:
            continue
    raise InputError(f"no tracefs: as root, mount -t tracefs tracefs {places[0]}", places[0])


def events_here(root: str) -> tuple[Event, ...]:
    """Those events to record that this kernel has. InputError without permission to look."""
    try:
        systems = {system: {*os.listdir(f"{root}/events/{system}")} for system in os.listdir(f"{root}/events")
                   if os.path.isdir(f"{root}/events/{system}")}  # fmt: skip
    except PermissionError as error:
        raise InputError("no permission: tracing needs root", error.filename) from None
    return tuple(event for event in RECORDED if event.name in systems.get(event.system, ()))


def probed_function() -> str:
    """The function that sets a memory slot in this kernel."""
    with suppress(OSError), open("/proc/kallsyms") as symbols:
        if any(line.split()[2:3] == [PROBED[0]] for line in symbols):
            return PROBED[0]
    return PROBED[1]


def record(
    seconds: float, sink: Sink, *, tasks: Sequence[str] = (), buffer: int = 32 << 20, root: str | None = None
) -> Recorded:
    """Record KVM's events of all VMs for some seconds, or until Ctrl-C; of the text's own time stamps nothing is
    changed.

    :param tasks: names (with * and ?) of the threads whose page faults and system calls are wanted; none: all but this
        process's
    :param buffer: bytes of the ring buffer of each CPU
    :param root: of tracefs; None: where it is mounted
    :raises InputError: no tracefs, no privilege, no KVM
    """
    root = root or tracefs()
    here = events_here(root)
    if not any(event.system == "kvm" for event in here):
        raise InputError("no events of KVM: the module kvm is not loaded (modprobe kvm)", root)
    missing = [event.name for event in RECORDED if event not in here]
    with Stopping() as stopping, _instance(root) as instance:
        _write(f"{instance}/buffer_size_kb", str(max(buffer >> 10, 4)))
        with suppress(InputError):  # older kernels; it tells each thread's process
            _write(f"{instance}/options/record-tgid", "1")
        with _probe(root) as probe:
            _enable(instance, here, tasks)
            if probe.system:
                _write(f"{instance}/events/{probe.system}/{probe.name}/enable", "1")
            else:
                missing.append(f"{probe.name} (no kprobes)")
            taken = _copy(instance, seconds, sink, stopping)
            _write(f"{instance}/events/enable", "0")  # else the probe is in use
    return Recorded(taken, tuple(missing), stopping.count > 0)


def _write(path: str, text: str, mode: str = "w") -> None:
    try:
        with open(path, mode) as file:
            file.write(text)
    except OSError as error:
        needs = ": tracing needs root" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
        raise InputError(f"{error.strerror}{needs}", path) from None


@contextmanager
def _instance(root: str) -> Iterator[str]:
    """An instance of one's own, which is gone at the end whatever happens."""
    path = f"{root}/instances/pgemu-{os.getpid()}"
    try:
        os.mkdir(path)
    except OSError as error:
        raise InputError(f"{error.strerror}: tracing needs root, and a kernel with instances", path) from None
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: str) -> None:
    """The directory of an instance goes with all that is in it; a reader may hold it for a moment."""
    for _ in range(20):
        try:
            os.rmdir(path)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                break
            time.sleep(0.05)
    raise InputError("the instance could not be removed: rmdir it", path)


@contextmanager
def _probe(root: str) -> Iterator[Event]:
    """The probe on what sets memory slots, gone at the end; its system is "" where the kernel takes none."""
    events, system, name = f"{root}/kprobe_events", f"pgemu_{os.getpid()}", "kvm_memslot"
    try:
        _write(events, f"p:{system}/{name} {probed_function()} {PROBE}\n", "r+")
    except InputError:
        yield Event("", name)
        return
    try:
        yield Event(system, name)
    finally:
        _write(events, f"-:{system}/{name}\n", "r+")


def _enable(instance: str, events: Sequence[Event], tasks: Sequence[str]) -> None:
    """Turn events on, those that every process has for some threads only."""
    wanted = f"common_pid != {os.getpid()}"
    if tasks:
        wanted = " || ".join(f'comm ~ "{task}"' for task in tasks)
    for event in events:
        folder = f"{instance}/events/{event.system}/{event.name}"
        if event.system in _OF_VMM:
            _write(f"{folder}/filter", wanted)
        _write(f"{folder}/enable", "1")


def _copy(instance: str, seconds: float, sink: Sink, stopping: Stopping) -> float:
    """Copy what the kernel prints, and what is left in its buffers when the time is over; how long it took."""
    begin = time.monotonic()
    pipe = os.open(f"{instance}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while not stopping.count and (left := begin + seconds - time.monotonic()) > 0:
            _drain(pipe, sink, begin + seconds)
            with suppress(InterruptedError):
                select.select([pipe], [], [], min(left, _WAIT))
        _write(f"{instance}/tracing_on", "0")
        end = time.monotonic()
        _drain(pipe, sink, None)
    finally:
        os.close(pipe)
    return end - begin


def _drain(pipe: int, sink: Sink, until: float | None) -> None:
    """Copy what there is, as long as there is time."""
    with suppress(BlockingIOError):
        while (until is None or time.monotonic() < until) and (data := os.read(pipe, _PIECE)):
            sink.write(data)
