"""A log taken apart for verification: its VMs, what went in and came out in order, and what has to be inferred.

What a log does not say is inferred, once for the whole of it and in words (`Recording.said`): the kernel by its frozen
entry, the format by its tables, the memory behind the slots by the largest leaf; without slot lines, the slots by what
was mapped and unmapped. Each but the last is an option (`Options`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pgemu.errors import InputError
from pgemu.experiments.verification.host import Backing, Slot
from pgemu.experiments.verification.slots import inferred_slots
from pgemu.trace.events import Input
from pgemu.trace.log import Log
from pgemu.trace.outcomes import SPTE_CHANGED, Kept
from pgemu.trace.processes import Choice, of_vm
from pgemu_kernels.formats.bits import EMPTY_SPTE, KERNELS, LARGE, MMU_PRESENT

__all__ = ("Options", "Part", "Recording", "slot_of", "take_apart")

Rows = np.ndarray[Any, Any]
_KIND, _TASK, _LINE = 0, 2, 3
_LEVEL, _OLD, _NEW = 6, 7, 8
_EPT_EXECUTE = 1 << 2
_NPT_ACCESSED = 1 << 5
_L1TF = 0b11111 << 39
GUEST_MEMFD = 4


@dataclass(frozen=True)
class Options:
    """What the log may not say; None: inferred.

    Attributes:
        kernel: "6.12", "6.18" or "7.3"
        stage2: "npt" or "ept"
        backing: what memory is behind the slots: "4K", "thp" (/sys/kernel/mm/transparent_hugepage/enabled is always),
            "hugetlb-2M", "hugetlb-1G"
        prove_mmu: CONFIG_KVM_PROVE_MMU
        nx_huge_pages: KVM's parameter of that name
        inferred_inputs: whether what has no event (the end of a VM, reads of the dirty log, prefaults) is taken to have
            happened where only that leads to what the log has
        vm_processes: of which VM, see LoweringOptions
    """

    kernel: str | None = None
    stage2: Literal["npt", "ept"] | None = None
    backing: Backing | None = None
    prove_mmu: bool | None = None
    nx_huge_pages: bool | None = None
    inferred_inputs: bool = True
    vm_processes: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Part:
    """One VM of a log: its inputs and outcomes in order (kept: whether a row is one of outcomes), its slots."""

    name: str
    events: list[tuple[bool, list[int]]]
    slots: list[Slot]
    inferred: bool
    protected: bool
    backings: dict[int, Backing]
    holes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """A log, taken apart. said: what was inferred, in words."""

    log: Log
    parts: list[Part]
    kernel: str
    stage2: Literal["npt", "ept"]
    prove_mmu: bool
    nx_huge_pages: bool
    l1tf: bool
    sets: bool
    said: tuple[str, ...]


def take_apart(log: Log, options: Options) -> Recording:
    """Take a log apart.

    :raises InputError: no kvm_tdp_mmu_spte_changed in it, no guest fault, or several VMs and none chosen
    """
    assert log.sptes is not None
    changed = log.sptes[log.sptes[:, _KIND] == Kept.CHANGED]
    if not len(changed):
        raise InputError(f"no {SPTE_CHANGED} in it, expected a log with what KVM wrote (kvmmmu:*)", log.source)
    if not (log.rows[:, _KIND] == Input.GUEST_FAULT).any():
        raise InputError("no kvm_page_fault in it, expected a log with what went in", log.source)
    said: list[str] = []
    kernel = options.kernel or _kernel(changed, said)
    stage2 = options.stage2 or _stage2(changed, log, said)
    nx = options.nx_huge_pages
    if nx is None:
        nx = stage2 == "ept" and _nx_huge_pages(changed, said)
    prove = options.prove_mmu if options.prove_mmu is not None else _prove_mmu(changed, said)
    absent = changed[changed[:, _NEW] & np.uint64(MMU_PRESENT) == 0]
    l1tf = stage2 == "ept" and bool((absent[:, _NEW] & np.uint64(_L1TF) != 0).any())
    parts = list(_parts(log, options, said))
    sets = bool((log.sptes[:, _KIND] == Kept.SET).any())
    return Recording(log, parts, kernel, stage2, prove, nx, l1tf, sets, tuple(said))


def _present(entries: Rows) -> Any:
    return entries & np.uint64(MMU_PRESENT) != 0


def _kernel(changed: Rows, said: list[str]) -> str:
    """The kernel, by the value that an entry of a table has which goes."""
    news = set(np.unique(changed[~_present(changed[:, _NEW]), _NEW]).tolist())
    fits = [name for name, kernel in KERNELS.items() if EMPTY_SPTE | kernel.frozen_low in news] or ["7.3"]
    seen = f"frozen entries of {' and '.join(fits)}" if len(fits) < len(KERNELS) else "no frozen entry"
    said.append(f"kernel {fits[0]} ({seen}; --kernel)")
    return fits[0]


def _tables(changed: Rows) -> Rows:
    """Entries that point to tables."""
    new = changed[:, _NEW]
    found: Rows = new[_present(new) & (changed[:, _LEVEL] > 1) & (new & np.uint64(LARGE) == 0)]
    return found


def _stage2(changed: Rows, log: Log, said: list[str]) -> Literal["npt", "ept"]:
    tables = _tables(changed)
    if len(tables):
        npt = bool((tables & np.uint64(_NPT_ACCESSED) != 0).all())
        said.append(f"stage 2 {'npt' if npt else 'ept'} (its tables; --stage2)")
        return "npt" if npt else "ept"
    found: Literal["npt", "ept"] = "ept" if log.stage2 == "ept" else "npt"
    said.append(f"stage 2 {found} (no table was made; --stage2)")
    return found


def _nx_huge_pages(changed: Rows, said: list[str]) -> bool:
    new = changed[:, _NEW]
    large = new[_present(new) & (changed[:, _LEVEL] > 1) & (new & np.uint64(LARGE) != 0)]
    found = bool(len(large)) and not bool((large & np.uint64(_EPT_EXECUTE)).any())
    if found:
        said.append("NX huge pages (no large leaf can be executed; --nx-huge-pages)")
    return found


def _prove_mmu(changed: Rows, said: list[str]) -> bool:
    """CONFIG_KVM_PROVE_MMU: trees are taken apart from 4K on, so that 2M tables become empty, else they are frozen."""
    old = changed[:, _OLD]
    tables = changed[_present(old) & (changed[:, _LEVEL] == 2) & (old & np.uint64(LARGE) == 0)]
    gone = tables[~_present(tables[:, _NEW]), _NEW]
    found = not len(gone) or bool((gone == np.uint64(EMPTY_SPTE)).mean() > 0.5)
    if len(gone):
        how = "from 4K on, CONFIG_KVM_PROVE_MMU is on" if found else "from 1G on, CONFIG_KVM_PROVE_MMU is off"
        said.append(f"trees are taken apart {how} (tables of 2M that go; --prove-mmu)")
    return found


# --------------------------------------------------------------------------- VMs


def _parts(log: Log, options: Options, said: list[str]) -> Iterator[Part]:
    """The log's VMs: the one chosen, or where there are no slot lines all, one after the other."""
    assert log.sptes is not None
    if (log.rows[:, _KIND] == Input.MEMSLOT).any():
        kept, left = of_vm(log, options.vm_processes)
        rows, sptes = kept.rows, log.sptes
        if left:
            tasks = np.unique(rows[:, _TASK])
            others = np.setdiff1d(log.rows[:, _TASK], tasks)
            sptes = sptes[~np.isin(sptes[:, _TASK], others)]
            said.append(f"{sum(left.values()):,} inputs of other processes are left out")
        slots = [slot_of(row) for row in rows[rows[:, _KIND] == Input.MEMSLOT].tolist()]
        backing = options.backing or _backing(sptes, log, said)
        protected = any(slot.flags & GUEST_MEMFD for slot in slots) or bool((rows[:, _KIND] == Input.ATTRIBUTES).any())
        if protected:
            said.append("a VM with private memory is of the kind sw")
        yield Part("", _in_order(rows, sptes), slots, False, protected, dict.fromkeys(range(len(slots)), backing))
        return
    yield from _without_slots(log, options, said)


def _without_slots(log: Log, options: Options, said: list[str]) -> Iterator[Part]:
    """Each process, or task whose process is not known, that faults as a vCPU is a VM; slots are inferred."""
    assert log.sptes is not None
    owner = np.array([task.tid if task.process is None else task.process for task in log.tasks], np.int64)
    faults = log.rows[log.rows[:, _KIND] == Input.GUEST_FAULT]
    vms = list(dict.fromkeys(owner[faults[:, _TASK].astype(np.int64)].tolist()))
    count = f"the memory slots of {len(vms)} VMs, a process each, are" if len(vms) > 1 else "the memory slots are"
    said.append(f"no slot lines: {count} inferred from what was mapped and unmapped, as is the memory behind them")
    for number in vms:
        rows = log.rows[owner[log.rows[:, _TASK].astype(np.int64)] == number]
        sptes = log.sptes[owner[log.sptes[:, _TASK].astype(np.int64)] == number]
        events = _in_order(rows, sptes)
        slots, backings, holes = inferred_slots(events)
        if options.backing:
            backings = dict.fromkeys(backings, options.backing)
        yield Part(f"{number}", events, slots, True, False, backings, holes)


def slot_of(row: list[int]) -> Slot:
    """The slot of a row of inputs."""
    number, flags, gpa, size, hva = row[4:9]
    return Slot(number, gpa, size, hva, flags)


def _backing(sptes: Rows, log: Log, said: list[str]) -> Backing:
    """What memory is behind the slots, by the largest leaf that KVM made."""
    new = sptes[sptes[:, _KIND] == Kept.CHANGED]
    large = _present(new[:, _NEW]) & (new[:, _NEW] & np.uint64(LARGE) != 0) & np.isin(new[:, _LEVEL], (2, 3))
    most = int(new[large, _LEVEL].max(initial=1))
    file = log.inputs["hugetlbfs_fallocate"] + log.outcomes["hugetlbfs_fallocate"] > 0
    found: Backing = "4K" if most == 1 else "hugetlb-1G" if most == 3 else "hugetlb-2M" if file else "thp"
    why = {1: "no larger leaf", 2: "2M leaves, holes in hugetlbfs" if file else "2M leaves", 3: "1G leaves"}[most]
    said.append(f"memory behind the slots: {found} ({why}; --backing)")
    return found


def _in_order(rows: Rows, sptes: Rows) -> list[tuple[bool, list[int]]]:
    """Inputs and outcomes by time, and by line where that is the same."""
    order = np.lexsort(
        (np.concatenate([rows[:, _LINE], sptes[:, _LINE]]), np.concatenate([rows[:, 1], sptes[:, 1]]))
    ).tolist()
    both = rows.tolist() + sptes.tolist()
    return [(i >= len(rows), both[i]) for i in order]
