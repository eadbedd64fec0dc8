"""Which process of a log is the VM's: system-wide logs hold several VMs, and what other processes do to their memory.

A line names its process where the log was recorded so (ftrace's record-tgid, perf script's pid/tid). Where none does,
two threads that fault as the same vCPU are taken for two VMs: a VMM has one thread for each.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.trace.events import Input
from pgemu.trace.log import NO_VCPU, Doubt, Log

__all__ = ("OTHER_PROCESS", "Choice", "SeveralVmsError", "VmProcess", "of_vm")

Choice = int | Literal["all"]
"""A process, a thread whose process no line says, or all of them."""

OTHER_PROCESS = "of another process"
_KIND, _TASK, _A, _B, _VCPU, _L2 = 0, 2, 4, 5, 6, 8
_VM_S = (Input.GUEST_FAULT, Input.ATTRIBUTES, Input.MEMSLOT)
_VCPU_THREAD = re.compile(r"CPU \d+/K\w*")  # as QEMU names them, also where a name is cut at 8 characters
_SHOWN, _SAID = 6, 3  # VMs that an error and a note name
_HELP = "choose with --vm-process, which may be repeated, or merge them with --vm-process all"


@dataclass(frozen=True)
class VmProcess:
    """What may be a VM: a process, or a thread whose process no line says.

    Attributes:
        number: of the process or thread
        name: as the log has it
        inputs: guest faults, attributes and slots of it
        known: whether it is a process
    """

    number: int
    name: str
    inputs: int
    known: bool

    def __str__(self) -> str:
        inputs = f"{self.inputs} input{'s' * (self.inputs != 1)}"
        return f"{'process' if self.known else 'thread'} {self.number} ({printable(self.name)}, {inputs})"


class SeveralVmsError(InputError):
    """A log of several VMs, none of which was chosen.

    Attributes:
        log: as it was read
        vms: what may be VMs in it
    """

    def __init__(self, log: Log, vms: Mapping[int, VmProcess]) -> None:
        super().__init__(f"{_found(log, vms)}: {_HELP}", log.source)
        self.log = log
        self.vms = tuple(vms.values())


def of_vm(log: Log, chosen: tuple[Choice, ...] = ()) -> tuple[Log, Counter[str]]:
    """Keep what one VM's process asked for.

    :param chosen: processes, or threads whose process no line says; "all" merges whatever the log holds
    :returns: the log with the rows and a note of the VM, and how many inputs were left out, by reason
    :raises SeveralVmsError: several VMs and none chosen
    :raises InputError: a chosen one is not there
    """
    vms = _vms(log) if log.tasks else {}
    if not log.tasks or "all" in chosen or not (chosen or vms):
        merged = f"merged as asked: {_listed(vms.values(), _SAID)}" if len(vms) > 1 else ""
        return _collided(replace(log, notes=log.notes + (merged,) * bool(merged)), vms), Counter()
    if not chosen and len(vms) > 1:
        raise SeveralVmsError(log, vms)
    numbers = {number for number in chosen if number != "all"} or set(vms)
    _check(log, numbers, vms)
    if not any(vm.known for vm in vms.values()) and not chosen:
        return _taken_for_one(log), Counter()  # one VM, and no line says which process
    task_kept = np.array([_kept(log, task, numbers, vms) for task in range(len(log.tasks))], dtype=bool)
    kept = task_kept[log.rows[:, _TASK].astype(np.int64)]
    left = Counter({OTHER_PROCESS: int((~kept).sum())})
    notes = (*log.notes, f"the VM of {_listed((vms[number] for number in vms if number in numbers), _SAID)}")
    others = [vm for number, vm in vms.items() if number not in numbers]
    notes += (f"left out: {_listed(others, _SAID)}",) if others else ()
    merged_vms = {number: vm for number, vm in vms.items() if number in numbers}
    return _collided(replace(log, rows=log.rows[kept], notes=notes), merged_vms), +left


def _collided(log: Log, vms: Mapping[int, VmProcess]) -> Log:
    """The log of VMs that are merged, with a doubt if what they touch or convert lies at the same addresses."""
    count = _shared_pages(log, vms) if len(vms) > 1 else 0
    if not count:
        return log
    most = "" if all(vm.known for vm in vms.values()) else "up to "  # threads may be of one VM
    pages = "page is" if count == 1 else "pages are"
    text = f"{most}{count:,} {pages} at addresses of several VMs: what these did is laid over each other"
    return replace(log, doubts=(*log.doubts, Doubt(text)))


def _shared_pages(log: Log, vms: Mapping[int, VmProcess]) -> int:
    """How many 4K pages several VMs touch or convert."""
    vm_of = np.array([task.process if task.process in vms else task.tid for task in log.tasks], np.int64)
    rows = log.rows
    faults, attributes = rows[:, _KIND] == Input.GUEST_FAULT, rows[:, _KIND] == Input.ATTRIBUTES
    faults &= rows[:, _L2] == 0
    first = np.where(faults, rows[:, _A] >> np.uint64(12), rows[:, _A])
    end = np.where(faults, first + np.uint64(1), rows[:, _B])
    theirs = vm_of[rows[:, _TASK].astype(np.int64)]
    some = (faults | attributes) & (first < end)
    found = [_united(first[some & (theirs == number)], end[some & (theirs == number)]) for number in vms]
    points = np.concatenate([part for ends in found for part in ends])
    steps = np.repeat([1, -1] * len(found), [len(part) for ends in found for part in ends])
    order = np.argsort(points, kind="stable")
    several = np.cumsum(steps[order])[:-1] > 1
    return int(np.diff(points[order])[several].sum())


def _united(first: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], ...]:
    """Ranges as few that do not overlap: their firsts and ends."""
    order = np.argsort(first, kind="stable")
    first, reach = first[order], np.maximum.accumulate(end[order])
    begins = np.ones(len(first), dtype=bool)
    begins[1:] = first[1:] > reach[:-1]
    return first[begins], reach[np.append(begins[1:], True)] if len(first) else reach


def _taken_for_one(log: Log) -> Log:
    """A log in which no line names a process: where none names a vCPU either, its threads may be of several VMs."""
    faults = log.rows[log.rows[:, _KIND] == Input.GUEST_FAULT]
    tasks = set(faults[faults[:, _VCPU] == np.uint64(NO_VCPU), _TASK].tolist())
    threads = [log.tasks[task].tid for task in tasks if not _VCPU_THREAD.fullmatch(log.tasks[task].name)]
    if len(threads) < 2:
        return log
    note = f"no line names a process or vCPU: {len(threads)} threads that fault are taken for one VM (--vm-process)"
    return replace(log, notes=(*log.notes, note))


def _vms(log: Log) -> dict[int, VmProcess]:
    """What may be VMs, by process or thread: those of which there are guest faults, attributes or slots."""
    theirs = log.rows[np.isin(log.rows[:, _KIND], np.array(_VM_S, np.uint64))]
    inputs = Counter(theirs[:, _TASK].tolist())
    known: Counter[int] = Counter()
    unknown = []
    for task, count in sorted(inputs.items()):
        process = log.tasks[task].process
        if process is None:
            unknown.append(task)
        else:
            known[process] += count
    vms = {process: VmProcess(process, _name(log, process), count, True) for process, count in known.items()}
    if unknown and (len(_twice(log, theirs)) > 0 or known):
        for task in unknown:
            tid, _, name = log.tasks[task]
            vms[tid] = VmProcess(tid, name, inputs[task], False)
    elif unknown:
        first = log.tasks[unknown[0]]
        vms[first.tid] = VmProcess(first.tid, first.name, sum(inputs[task] for task in unknown), False)
    return vms


def _twice(log: Log, rows: npt.NDArray[np.uint64]) -> dict[str, list[int]]:
    """vCPUs that several threads of unknown process fault as, with these tasks."""
    faults = rows[rows[:, _KIND] == Input.GUEST_FAULT]
    threads: dict[str, set[int]] = defaultdict(set)
    for vcpu, task in {(int(vcpu), int(task)) for vcpu, task in faults[:, [_VCPU, _TASK]].tolist()}:
        about = log.tasks[task]
        if about.process is None:
            name = f"vCPU {vcpu}" if vcpu != NO_VCPU else about.name if _VCPU_THREAD.fullmatch(about.name) else ""
            threads[name].add(task)
    return {name: sorted(tasks) for name, tasks in threads.items() if name and len(tasks) > 1}


def _kept(log: Log, task: int, numbers: set[int], vms: Mapping[int, VmProcess]) -> bool:
    """Whether a task is of the chosen VM. Where its process is known, a thread of unknown process that asks nothing of
    KVM may be one of its own, and is taken for one."""
    tid, process, _ = log.tasks[task]
    if process is not None:
        return process in numbers
    return tid in numbers or (tid not in vms and any(vm.known for number, vm in vms.items() if number in numbers))


def _name(log: Log, process: int) -> str:
    names = [task.name for task in log.tasks if task.process == process]
    return next((task.name for task in log.tasks if task.tid == process), names[0])


def _check(log: Log, numbers: set[int], vms: Mapping[int, VmProcess]) -> None:
    there = {task.process if task.process is not None else task.tid for task in log.tasks}
    if missing := sorted(numbers - there):
        expected = f"expected one of {_listed(vms.values())}" if vms else "expected a process that the log names"
        raise InputError(f"--vm-process {missing[0]}: not in it, {expected}", log.source)


def _found(log: Log, vms: Mapping[int, VmProcess]) -> str:
    """What several VMs were told by."""
    text = f"several VMs in it: {_listed(vms.values())}"
    if any(vm.known for vm in vms.values()):
        return text
    theirs = log.rows[np.isin(log.rows[:, _KIND], np.array(_VM_S, np.uint64))]
    vcpu, tasks = next(iter(sorted(_twice(log, theirs).items())))
    where = " and ".join(str(log.tasks[task].tid) for task in tasks[:2])
    return f"{text}; no line names a process (record-tgid, perf script -F +pid), and {vcpu} faults in {where}"


def _listed(vms: Iterable[VmProcess], most: int = _SHOWN) -> str:
    names = [str(vm) for vm in vms]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
