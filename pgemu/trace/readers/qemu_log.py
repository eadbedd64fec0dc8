"""QEMU's trace output: conversions, memory slots and memory faults, as its log backend prints them.

Sources: QEMU's accel/kvm/trace-events (kvm_convert_memory, kvm_memory_fault, kvm_set_user_memory, whose fields changed
in 2024), accel/kvm/kvm-all.c (kvm_convert_memory(), kvm_cpu_exec(), kvm_set_user_memory_region()),
scripts/tracetool/backend/log.py and util/message.c (what stands before an event). Slots were seen in output of
QEMU 7.2; conversions and faults only as quoted on mailing lists.

Other programs' text may stand before an event in its line, and several events in one.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.events import Input
from pgemu.trace.fields import cut_off
from pgemu.trace.guest_addresses import PRIVATE_ACCESS
from pgemu.trace.lines import place
from pgemu.trace.log import NO_VCPU, Log, Task, by_time
from pgemu.trace.source import Match, Source
from pgemu_kernels.words.log_words import ROW_WORDS

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"qemu-log": "QEMU's trace output"}

_HELP = "expected events of qemu -trace kvm_convert_memory -trace kvm_set_user_memory -trace kvm_memory_fault"
_HEX = r"0x([0-9a-f]{1,16})(?![0-9a-f])"
_STAMP = r"(?P<thread>\d{1,10})@(?P<seconds>\d{1,10})\.(?P<micro>\d{6}):"
_EVENT = re.compile(
    rf"(?:{_STAMP})?(?P<name>kvm_convert_memory|kvm_memory_fault|kvm_set_user_memory)"
    r"(?= (?:start 0x|gfn 0x|Slot#\d|AddrSpace#\d)) "
)
_FIELDS = {
    "kvm_convert_memory": (
        re.compile(rf"start {_HEX} size {_HEX} (shared_to_private|private_to_shared)"),
        "start, size, shared_to_private or private_to_shared",
    ),
    "kvm_memory_fault": (re.compile(rf"start {_HEX} size {_HEX} flags {_HEX}"), "start, size, flags"),
    "kvm_set_user_memory": (
        re.compile(
            rf"(?:AddrSpace#(\d{{1,5}}) )?Slot#(\d{{1,10}}) flags={_HEX} gpa={_HEX} size={_HEX} ua={_HEX}"
            r"(?: (?:guest_memfd|gmem_fd)=-?\d+ \w+=0x[0-9a-f]+)? ret=(-?\d{1,10})(?!\d)"
        ),
        "Slot#, flags=, gpa=, size=, ua=, ret=",
    ),
}
_OTHER = re.compile(rf"(?:{_STAMP})?(?P<name>[a-z]\w*)(?: |$)")
# Since 2025 any line of QEMU's log may begin so: time, guest's name, program, thread with its name.
_CONTEXT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?Z )?(?:\[[^\]]*\] )?(?:[\w.+-]+: )?"
    r"(?:\((?P<thread>\d{1,10}):(?P<name>[^()]{0,40})\): )?"
)
_GFN_FAULT = "kvm_memory_fault (gfn, operation)"  # of trees before Linux had KVM_EXIT_MEMORY_FAULT
_PAGE, _PRIVATE = 1 << 12, 1 << 3  # KVM_MEMORY_EXIT_FLAG_PRIVATE, and KVM_MEMORY_ATTRIBUTE_PRIVATE is the same
_ADDRESSES = 1 << 64
_SHOWN = 120
_LINES = 200  # looked at to tell what a file is

_IGNORED = frozenset(
    {
        "kvm_arch_on_vmfd_change", "kvm_clear_dirty_log", "kvm_cpu_exec", "kvm_create_vcpu", "kvm_destroy_vcpu",
        "kvm_device_ioctl", "kvm_dirty_ring_flush", "kvm_dirty_ring_full", "kvm_dirty_ring_page", "kvm_dirty_ring_reap",
        "kvm_dirty_ring_reap_vcpu", "kvm_dirty_ring_reaper", "kvm_dirty_ring_reaper_kick",
        "kvm_failed_get_vcpu_mmap_size", "kvm_failed_reg_get", "kvm_failed_reg_set", "kvm_hc_map_gpa_range",
        "kvm_init_vcpu", "kvm_interrupt_exit_request", "kvm_io_window_exit", "kvm_ioctl", "kvm_irqchip_add_msi_route",
        "kvm_irqchip_commit_routes", "kvm_irqchip_release_virq", "kvm_irqchip_update_msi_route", "kvm_park_vcpu",
        "kvm_resample_fd_notify", "kvm_run_exit", "kvm_run_exit_system_event", "kvm_set_ioeventfd_mmio",
        "kvm_set_ioeventfd_pio", "kvm_slots_grow", "kvm_unpark_vcpu", "kvm_vcpu_ioctl", "kvm_vm_ioctl",
        "kvm_x86_add_msi_route", "kvm_x86_fixup_msi_error", "kvm_x86_remove_msi_route", "kvm_x86_update_msi_routes",
    }
)  # fmt: skip
"""Events of accel/kvm and target/i386/kvm that ask nothing of guest memory: kvm_hc_map_gpa_range is followed by the
conversion that it asks for."""


def sniff(head: bytes) -> Match:
    """Its events, or what its log backend prints before any; not among lines of ftrace, whose markers may be both."""
    if b"\0" in head or (b"kvm_" not in head and b"@" not in head):
        return Match.NO
    found = False
    for line in head.decode("utf-8", "replace").split("\n")[:_LINES]:
        if _is_ftrace(line):
            return Match.NO
        if not found and line[:1].isdigit():
            match = _OTHER.match(line)
            found = match is not None and match["thread"] is not None
        found = found or _EVENT.search(line) is not None
    return Match.SURE if found else Match.NO


def _is_ftrace(line: str) -> bool:
    try:
        return place(line) is not None
    except ValueError:
        return False


def read(source: Source, form: str | None = None) -> Log:
    """Read a log.

    :raises InputError: unreadable, none of the three events in it, or one that is malformed (with its line)
    """
    parser = _Parser(source.name)
    for block in source.blocks():
        parser.feed(block)
    return parser.finish()


def _events(line: str) -> list[re.Match[str]]:
    """The events of a line; nearly all lines have one at most."""
    if "kvm_" not in line or not any(name in line for name in _FIELDS):
        return []
    match = _EVENT.match(line)
    if match is None or line.find("kvm_", match.end()) >= 0:
        return list(_EVENT.finditer(line))
    return [match]


class _Parser:
    """State while a log is read."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._line = 0
        self._time = 0
        self._timed = False
        self._rows = array("Q")
        self._tasks: list[Task] = []
        self._by_thread: dict[int, int] = {}
        self._inputs: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._whole = True  # the last line has its newline

    def feed(self, block: str) -> None:
        """Read lines; only the file's last may lack its newline."""
        lines = block.split("\n")
        last = lines.pop()
        if last:
            self._whole = False
            lines.append(last)
        for line in lines:
            self._line += 1
            matches = _events(line)
            for match in matches:
                self._event(line, match)
            if not matches:
                self._other(line)

    def _event(self, line: str, match: re.Match[str]) -> None:
        name = match["name"]
        shape, expected = _FIELDS[name]
        task = self._place(line, match)
        if line.startswith("gfn ", match.end()):
            self._unknown[_GFN_FAULT] += 1
            return
        fields = shape.match(line, match.end())
        if fields is None:
            text = line[match.start("name") :][:_SHOWN]
            raise self._wrong(f"malformed {name}, expected {expected}: {text!r}")
        getattr(self, f"_{name}")(fields.groups(), task)

    def _wrong(self, text: str) -> InputError:
        return InputError(f"{text}{cut_off(False, not self._whole)}", self._source, self._line)

    def _place(self, line: str, match: re.Match[str]) -> int:
        """The task of an event; what its line says of the time."""
        if match["thread"] is not None:
            self._time = int(match["seconds"]) * 10**9 + int(match["micro"]) * 1000
            self._timed = True
            return self._task(int(match["thread"]), "qemu")
        context = _CONTEXT.match(line)
        if context is None or not context[0]:
            return self._task(0, "qemu")
        if context["time"]:
            self._take_date(context["time"].strip())
        return self._task(int(context["thread"] or 0), context["name"] or "qemu")

    def _take_date(self, text: str) -> None:
        try:
            since = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
        except ValueError:
            return  # a day or an hour that there is not
        self._time, self._timed = max(since // timedelta(microseconds=1), 0) * 1000, True

    def _task(self, thread: int, name: str) -> int:
        task = self._by_thread.setdefault(thread, len(self._tasks))
        if task == len(self._tasks):
            self._tasks.append(Task(thread, None, name))
        return task

    def _add(self, name: str, kind: Input, task: int, *words: int) -> None:
        row = (int(kind), self._time, task, self._line, *words)
        self._rows.extend((*row, *(0,) * (ROW_WORDS - len(row))))
        self._inputs[name] += 1

    def _kvm_convert_memory(self, fields: tuple[str, ...], task: int) -> None:
        start, size = int(fields[0], 16), int(fields[1], 16)
        if start + size > _ADDRESSES:
            raise self._wrong(f"kvm_convert_memory of {size:#x} bytes at {start:#x}, which ends beyond 64 bits")
        if not size or (start | size) % _PAGE:
            self._ignored["kvm_convert_memory of no whole pages"] += 1  # QEMU refuses it
            return
        attributes = _PRIVATE if fields[2] == "shared_to_private" else 0
        words = start // _PAGE, (start + size) // _PAGE, attributes
        self._add("kvm_convert_memory", Input.ATTRIBUTES, task, *words)

    def _kvm_memory_fault(self, fields: tuple[str, ...], task: int) -> None:
        start, _, flags = (int(field, 16) for field in fields)
        code = PRIVATE_ACCESS if flags & _PRIVATE else 0
        self._add("kvm_memory_fault", Input.GUEST_FAULT, task, start, code, NO_VCPU)

    def _kvm_set_user_memory(self, fields: tuple[str, ...], task: int) -> None:
        space, slot, *rest, result = fields
        if int(result) != 0:
            self._ignored["kvm_set_user_memory that failed"] += 1
            return
        flags, gpa, size, hva = (int(field, 16) for field in rest)
        if max(gpa, hva) + size > _ADDRESSES:
            raise self._wrong(f"memory slot that ends beyond 64 bits: {size:#x} bytes at {gpa:#x}, {hva:#x}")
        number = int(slot) | int(space or 0) << 16
        self._add("kvm_set_user_memory", Input.MEMSLOT, task, number, flags, gpa, size, hva)

    def _other(self, line: str) -> None:
        """Count a line that has none of the events."""
        match = _OTHER.match(line)
        if match is None and line[:1] != " ":
            context = _CONTEXT.match(line)
            match = _OTHER.match(line, context.end()) if context and context["thread"] else None
        if match is not None:
            name = match["name"]
            if name in _IGNORED:
                self._ignored[name] += 1
                return
            if match["thread"] is not None or match.start() > 0 or name.startswith("kvm_"):
                self._unknown[name] += 1
                return
        if line.strip():
            self._skipped["messages of QEMU" if "qemu-" in line[:_SHOWN] else "other lines"] += 1

    def finish(self) -> Log:
        """The log, its rows by time."""
        counters = self._inputs, Counter[str](), self._ignored, self._unknown
        events = sum(counter.total() for counter in counters)
        if not self._rows:
            some = (self._ignored + self._unknown).most_common(3)
            found = ", ".join(f"{count} {name}" for name, count in some) or "no event"
            raise InputError(f"no conversion, memory slot or memory fault in it, found {found}: {_HELP}", self._source)
        rows, back = by_time(np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, ROW_WORDS))
        return Log(
            self._source, rows, events, *counters, 0, self._skipped, tuple(self._tasks),
            notes=(*self._notes(), *back), kinds_told=True,
        )  # fmt: skip

    def _notes(self) -> Iterator[str]:
        count = self._inputs["kvm_convert_memory"]
        if count:
            are = "s are" if count > 1 else " is"
            yield f"{count} conversion{are} taken as done: QEMU prints what it is going to ask of KVM"
        if not self._timed:
            yield "no line has a time, only their order counts"
        if not self._whole:
            yield "its last line has no newline and is taken to be whole"
