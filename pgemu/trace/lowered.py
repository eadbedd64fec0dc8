"""What a trace is once it can be replayed: records, where guest memory lies, and an account of every input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import index
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.machine.field_rules import BYTES, RULES, Rule, checked, choice
from pgemu.machine.short import changed
from pgemu.trace.events import REQUEST, TDX_SHARED_BITS
from pgemu.trace.log import Doubt, FileKind
from pgemu.trace.memory_layout import GivenSlot, Layout, RefusedSlot
from pgemu.trace.schema import Records
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, Flag, Operation

__all__ = (
    "Accounting",
    "Guest",
    "Init",
    "Kind",
    "Lowered",
    "LoweringOptions",
    "ProcessFile",
    "private_because",
)

Init = Literal["private", "shared"]
Kind = Literal["guest", "process"]


class Guest(NamedTuple):
    """Guest memory of one VM of several: where it lies, and its shareability at first."""

    layout: Layout
    init: Init


class ProcessFile(NamedTuple):
    """A file that processes map: memory of shmem or of hugetlbfs, and its size in bytes."""

    kind: FileKind
    size: int


def _slots(value: Any) -> tuple[GivenSlot, ...]:
    """GPA, size and offset of each, as ints; whether they are pages is for the layout to say."""
    if not isinstance(value, tuple | list):
        raise TypeError
    found = []
    for one in value:
        if not isinstance(one, tuple) or len(one) not in (3, 4) or any(isinstance(part, bool) for part in one):
            raise TypeError
        gpa, size, *places = one
        found.append(GivenSlot(index(gpa), index(size), *(None if part is None else index(part) for part in places)))
    return tuple(found)


def _within(slots: tuple[GivenSlot, ...]) -> bool:
    return all(0 <= part <= 1 << 52 for slot in slots for part in slot if part is not None)


def _refused_slots(value: Any) -> tuple[RefusedSlot, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(one, RefusedSlot) for one in value):
        raise TypeError
    return tuple(value)


def _processes(value: Any) -> tuple[int | str, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError
    if any(isinstance(one, bool) for one in value):
        raise TypeError
    return tuple(one if isinstance(one, str) else index(one) for one in value)


def _are_processes(value: tuple[int | str, ...]) -> bool:
    return all(one == "all" if isinstance(one, str) else one >= 0 for one in value)


_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "page_size": RULES["page_size"],
        "init": choice(("private", "shared", "auto")),
        "dontneed": choice(("punch", "zap"), optional=True),
        "memslots": Rule(
            lambda: "a tuple of GivenSlot(gpa, size, offset, hva), bytes from 0 to 2**52", _slots, _within
        ),
        "other_ranges": Rule(lambda: "a tuple of RefusedSlot", _refused_slots, lambda value: True),
        "guest_memory": BYTES._replace(optional=True),
        "vm_processes": Rule(lambda: 'a tuple of process numbers from 0 on, or ("all",)', _processes, _are_processes),
        "tdx_shared_bit": choice(("auto", "none", *map(str, TDX_SHARED_BITS))),
        "fault_address": choice(("auto", "physical", "virtual")),
        "requests": choice(("done", "ignored")),
        "early_slots": choice(("stand", "absent")),
        "iova": choice(("ignored", "guest")),
        "kind": choice(("auto", "guest", "process")),
        "area_gap": BYTES,
        "fault_kind": choice(("write", "read")),
        "new_tasks": choice(("auto", "process", "thread")),
    }
)


@dataclass(frozen=True)
class LoweringOptions:
    """How a log is laid over guest_memfd.

    Attributes:
        page_size: bytes of a page of guest_memfd: 4 KiB, 2 MiB or 1 GiB
        init: shareability at the start; "auto" is private if the trace converts, has
            private faults or is a TD's, else shared
        dontneed: what gives memory back: "punch" a hole or "zap" the page tables; None punches for madvise and
            zaps for an unmap that no system call asked for
        memslots: memory slots that replace those of the log
        other_ranges: guest addresses that are known to be no memory that guest_memfd could back, with the reason:
            what the guest does there is left out, and no mistake beside given memory slots
        guest_memory: bytes of the guest_memfd; None: as much as the slots need
        vm_processes: the VM's processes, or threads of a log whose lines name no process; "all" merges all VMs; none:
            the only one, and several are refused
        tdx_shared_bit: the bit of a guest fault's address that says "shared" in a TD (47 with four levels, 51 with
            five); "auto": one of them, if an address without it lies where there is memory
        fault_address: what the log's guest faults print; "auto": physical addresses, but virtual ones (shadow paging)
            if the kernel's half of the virtual addresses is among them and no code is one of nested paging
        requests: what the guest asks for (KVM_HC_MAP_GPA_RANGE) in a log that has no kvm_vm_set_mem_attributes: taken
            as "done" by the VMM, or "ignored"; a log that has these says what was done, and requests ask for nothing
        early_slots: memory slots that the guest uses before the log's first slot line, and that a line names later:
            they "stand" from the start, for KVM maps nothing where no slot is, or are "absent" until their line
        iova: what the log's iommu:map and iommu:unmap are: no line says of which device, so they are "ignored", or
            "guest": of the VM's device, at the guest's physical addresses (VFIO of a guest that sees no IOMMU)
        kind: whose memory a log is about, a "guest"'s or a "process"'s; "auto": a process's if nothing in it is
            KVM's or said of a VM (memslots, vm_processes), and faults or system calls of processes are in it
        area_gap: of a process: bytes between faults that are in no area that the log makes, up to which they are taken
            to be in one area, which stands before the log
        fault_kind: of a process: what a fault is of which no line says whether it was a write (perf's page-faults), in
            an area that can be written
        new_tasks: of a process: what a task is that nothing in the log makes, and whose process no line tells: a
            "process", a "thread" of the process before it, or "auto": of a log that names tasks, and where it begins as
            a program does (execve, brk(NULL)), a process, else a thread

    TypeError for a field of another type, ValueError for a value that it does not take.

    >>> LoweringOptions(page_size=2 << 20, init="shared").init
    'shared'
    """

    page_size: int = PAGE_1G
    init: Literal["private", "shared", "auto"] = "auto"
    dontneed: Literal["punch", "zap"] | None = None
    memslots: tuple[GivenSlot, ...] = ()
    other_ranges: tuple[RefusedSlot, ...] = ()
    guest_memory: int | None = None
    vm_processes: tuple[int | Literal["all"], ...] = ()
    tdx_shared_bit: Literal["auto", "none", "47", "51"] = "auto"
    fault_address: Literal["auto", "physical", "virtual"] = "auto"
    requests: Literal["done", "ignored"] = "done"
    early_slots: Literal["stand", "absent"] = "stand"
    iova: Literal["ignored", "guest"] = "ignored"
    kind: Literal["auto", "guest", "process"] = "auto"
    area_gap: int = PAGE_2M
    fault_kind: Literal["write", "read"] = "write"
    new_tasks: Literal["auto", "process", "thread"] = "auto"

    def __post_init__(self) -> None:
        for name in _RULES:
            object.__setattr__(self, name, checked(name, getattr(self, name), _RULES))

    def __repr__(self) -> str:
        return changed(self)


_COUNTS = ("inputs", "outcomes", "ignored", "unknown", "skipped", "without_operation")
_TOTALS = ("events", "lost", "operations", "setup", "extra_pieces")


@dataclass
class Accounting:
    """Where every event of a log went, and every operation came from.

    `inputs == operations - setup - extra_pieces + without_operation` and
    `events == inputs + outcomes + ignored + unknown`, counted over all names.

    Attributes:
        events: lines that hold an event
        inputs, outcomes, ignored, unknown: events by name
        lost: events that the ring buffer dropped
        skipped: lines that belong to no event and are not blank, by what they are
        operations: records
        setup: records in front that no input asked for (host mappings, and slots the log does not show)
        extra_pieces: records beyond the first of inputs that touch several slots or mappings
        without_operation: inputs that ask nothing of guest_memfd, by reason
    """

    events: int = 0
    inputs: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    setup: int = 0
    extra_pieces: int = 0
    without_operation: Counter[str] = field(default_factory=Counter)

    def balanced(self) -> bool:
        """Return whether both sums come out."""
        inputs = self.inputs.total()
        others = self.outcomes.total() + self.ignored.total() + self.unknown.total()
        made = self.operations - self.setup - self.extra_pieces + self.without_operation.total()
        return inputs == made and self.events == inputs + others

    def missing(self) -> Counter[str]:
        """What of the log is in no record, by what it is: unknown, lost and ignored events, lines that belong to none,
        and inputs that ask nothing of guest_memfd."""
        found = self.unknown + self.skipped
        found += Counter({f"{name} (ignored)": n for name, n in self.ignored.items()})
        found += Counter({f"without an operation: {name}": n for name, n in self.without_operation.items()})
        return found + Counter(lost=self.lost)

    @classmethod
    def added(cls, several: Iterable[Accounting]) -> Accounting:
        """Where the events of several logs went."""
        total = cls()
        for one in several:
            for name in (*_COUNTS, *_TOTALS):
                setattr(total, name, getattr(total, name) + getattr(one, name))
        return total

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and ints, names sorted."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in _COUNTS}
        totals = {name: getattr(self, name) for name in _TOTALS}
        return {**totals, **counts}

    @classmethod
    def from_json(cls, found: Any) -> Accounting:
        """What to_json() returned. TypeError, ValueError, KeyError for anything else."""
        totals = {name: index(found[name]) for name in _TOTALS}
        counts = {name: Counter({str(one): index(n) for one, n in dict(found[name]).items()}) for name in _COUNTS}
        if min(totals.values()) < 0 or any(n < 0 for count in counts.values() for n in count.values()):
            raise ValueError("a count below 0")
        given: dict[str, Any] = {**totals, **counts}
        return cls(**given)


def private_because(records: Records, vm: str | None = None, asked: bool = False) -> str:
    """What shows that memory is private at first, a sentence, or "": conversions, private faults, that it is a TD's, or
    that the guest asked for conversions."""
    if (records.op == Operation.CONVERT).any():
        return "the trace converts"
    if (records.flags[records.op == Operation.GUEST_FAULT] & np.uint8(Flag.PRIVATE)).any():
        return "the trace has private guest faults"
    # A TD's memory is private until it is converted, which a log may not show.
    if vm == "tdx":
        return "the VM is a TD"
    return "the guest asks for conversions" if asked else ""


@dataclass(frozen=True)
class Lowered:
    """A trace ready for replay.

    Attributes:
        records: the operations, in order; the first ones (see `accounting.setup`) map and bind guest memory
        layout: where guest memory lies
        init: shareability of every page before the first record
        converts: whether any record is a conversion
        accounting: where the log's events went
        source: name of the file or workload
        fault_levels: uint8[records], the level of the leaf with which the recorded VM's KVM answered each guest fault
            (1 = 4K, 2 = 2M, 3 = 1G), 0 where it wrote none; None: not recorded
        accesses: the guest faults are all accesses of the guest that matter, not only those that faulted: no log
        machine: fields of Config that the trace or workload brings: its stage 2, its vCPUs
        notes: what of the trace was taken to mean something, or left out, in words
        doubts: why the trace is not, or not all, of one VM's memory
        again: of a workload with parameters: makes it with other ones
        table: it was no log, but rows of operations (Parquet)
        kind: whose memory it is: a "guest"'s, in a guest_memfd, or a "process"'s, ordinary memory of processes
        guests: of a merged trace of VMs, each VM's guest memory, inode n for VM n; () of one VM's
        processes: of kind "process", how many there are before the first record: `space` 0 on; FORK makes others
        files: of kind "process", the files that there are before the first record: `object` 0 on

    >>> lowered = load("workload:convert-loop", guest_memory=2 << 20, iterations=1)
    >>> lowered.init, lowered.records
    ('private', Records(1,028: 1,024 guest fault, 2 convert, 1 mmap, 1 bind))
    """

    records: Records
    layout: Layout
    init: Init
    converts: bool
    accounting: Accounting
    source: str
    fault_levels: npt.NDArray[np.uint8] | None = None
    accesses: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    again: Callable[..., Lowered] | None = field(default=None, compare=False)
    table: bool = False
    kind: Kind = "guest"
    guests: tuple[Guest, ...] = ()
    processes: int = 1
    files: tuple[ProcessFile, ...] = ()

    @property
    def private_because(self) -> str:
        """What shows that memory is private at first, "" where nothing does."""
        return private_because(self.records, self.machine.get("vm"), self.accounting.ignored[REQUEST] > 0)

    def __repr__(self) -> str:
        return f"Lowered({self.source!r}, init={self.init!r}, {self.records!r}, {self.layout!r})"
