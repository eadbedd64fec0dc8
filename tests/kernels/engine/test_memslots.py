"""Memory slots of several VMs against a dict, as many as KVM has, and what their trees cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
PAGES = 24  # of the process's memory, and of each file
VMS = 3
U = np.uint64


@dataclass
class Slot:
    """What a dict knows of a slot: guest page, pages, first page of the process or of the file, which file."""

    gfn: int
    pages: int
    at: int
    file: int | None = None

    def guest(self) -> range:
        return range(self.gfn, self.gfn + self.pages)

    def shown(self) -> range:
        return range(self.at, self.at + self.pages)


def meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


vms = st.integers(0, VMS - 1)
numbers = st.integers(0, 7)
gfns = st.integers(0, 40)
sizes = st.integers(1, 6)
places = st.integers(0, PAGES - 1)


class SlotSequences(RuleBasedStateMachine):
    """Slots with numbers over a process's memory, and without over files of the design, which get no userspace address:
    made, moved, deleted, found by guest page, by address and by page of the file."""

    @initialize(design=st.sampled_from(["restructure", "pfnmap"]))
    def boot(self, design: Any) -> None:
        self.machine = Machine(Config(design, pool=8 * M2, page_size=M2))
        self.files = [self.machine.create_guest_memfd(M2, shared=True) for _ in range(2)]
        self.process = self.machine.create_process()
        assert self.process.mmap_anonymous(VA, PAGES * PAGE).status == 0
        self.vms = [self.machine.create_vm(self.process) for _ in range(VMS)]
        self.slots: list[dict[int, Slot]] = [{} for _ in range(VMS)]  # those of files by numbers from 100 on
        self.made = 100

    def holder(self, vm: int, guest: range, but: int | None = None) -> int | None:
        """The number of the slot that has some of the guest pages."""
        slots = self.slots[vm].items()
        return next((number for number, slot in slots if number != but and meet(slot.guest(), guest)), None)

    @rule(vm=vms, number=numbers, gfn=gfns, pages=sizes, at=places)
    def set_region(self, vm: int, number: int, gfn: int, pages: int, at: int) -> None:
        old = self.slots[vm].get(number)
        status = 0
        if old is not None and (old.pages, old.at) != (pages, at):
            status = -W.EINVAL
        elif (old is None or old.gfn != gfn) and self.holder(vm, range(gfn, gfn + pages), number) is not None:
            status = -W.EEXIST
        assert self.vms[vm].set_memory_region(number, gfn * PAGE, pages * PAGE, VA + at * PAGE).status == status
        if status == 0:
            self.slots[vm][number] = Slot(gfn, pages, at)

    @rule(vm=vms, gfn=gfns, pages=sizes, at=places, file=st.integers(0, 1))
    def bind(self, vm: int, gfn: int, pages: int, at: int, file: int) -> None:
        new = Slot(gfn, pages, at, file)
        status = 0
        if self.holder(vm, new.guest()) is not None:
            status = -W.EEXIST
        elif any(slot.file == file and meet(slot.shown(), new.shown()) for slot in self.slots[vm].values()):
            status = -W.EINVAL
        bound = self.vms[vm].bind(self.files[file], gfn * PAGE, offset=at * PAGE, length=pages * PAGE)
        assert bound.status == status
        if status == 0:
            self.made += 1
            self.slots[vm][self.made] = new

    @rule(vm=vms, number=numbers)
    def delete(self, vm: int, number: int) -> None:
        status = 0 if self.slots[vm].pop(number, None) else -W.EINVAL
        assert self.vms[vm].set_memory_region(number, 0, 0).status == status

    @rule(vm=vms, gfn=gfns)
    def unbind(self, vm: int, gfn: int) -> None:
        number = self.holder(vm, range(gfn, gfn + 1))
        there = number is not None and self.slots[vm][number].gfn == gfn
        assert self.vms[vm].unbind(gfn * PAGE).status == (0 if there else -W.ENOENT)
        if there:
            del self.slots[vm][number]  # type: ignore[arg-type]

    @rule(vm=vms, gfn=gfns)
    def touch(self, vm: int, gfn: int) -> None:
        outside = self.holder(vm, range(gfn, gfn + 1)) is None
        assert (self.vms[vm].touch(gfn * PAGE).status == W.RET_PF_EMULATE) == outside

    @rule(first=places, pages=sizes)
    def lose_pages(self, first: int, pages: int) -> None:
        """What every slot shows of the process's pages leaves stage 2, and nothing else does."""
        lost = range(first, min(first + pages, PAGES))
        before = [self.leaves(vm) for vm in range(VMS)]
        assert self.process.madvise_dontneed(VA + lost.start * PAGE, len(lost) * PAGE).status == 0
        for vm, slots in enumerate(self.slots):
            gone = {
                slot.gfn + page - slot.at
                for slot in slots.values()
                for page in slot.shown()
                if slot.file is None and page in lost
            }
            assert self.leaves(vm) == before[vm] - gone

    @rule(file=st.integers(0, 1), first=places, pages=sizes)
    def lose_file_pages(self, file: int, first: int, pages: int) -> None:
        """The same of a hole in a file."""
        lost = range(first, first + pages)
        before = [self.leaves(vm) for vm in range(VMS)]
        self.files[file].punch_hole(lost.start * PAGE, len(lost) * PAGE)
        for vm, slots in enumerate(self.slots):
            gone = {
                slot.gfn + page - slot.at
                for slot in slots.values()
                for page in slot.shown()
                if slot.file == file and page in lost
            }
            assert self.leaves(vm) == before[vm] - gone

    @rule(vm=vms)
    def close_and_begin_another(self, vm: int) -> None:
        if self.machine.register(W.R_VMS) < 20:
            assert self.vms[vm].close().status == 0
            self.vms[vm] = self.machine.create_vm(self.process)
            self.slots[vm].clear()

    def leaves(self, vm: int) -> set[int]:
        """Guest pages that have a leaf."""
        found = self.vms[vm].stage2().leaves
        assert (found["level"] == 1).all()
        return set((found["gpa"] // PAGE).tolist())

    @invariant()
    def the_trees_are_right(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


SlotSequences.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40, derandomize=True)
TestSlotSequences = SlotSequences.TestCase


# --------------------------------------------------------------------------- as many as KVM has


def many(count: int, order: Any = None, **parameters: Any) -> tuple[Machine, Vm]:
    """A machine with a VM of as many slots of one page, each with the next page of one file, bound in an order."""
    machine = Machine(Config("pfnmap", pool=160 * M2, page_size=M2, **parameters))
    gmem = machine.create_guest_memfd(128 << 20, shared=True)
    process = machine.create_process()
    assert process.mmap(gmem, VA).status == 0
    vm = machine.create_vm(process, protected=True)
    pages = np.arange(count, dtype=U) if order is None else np.asarray(order, U)
    assert not bind_pages(machine, vm, pages).any()
    return machine, vm


def bind_pages(machine: Machine, vm: Vm, pages: Any) -> Any:
    """Bind pages of file 0, one by one, each at the guest address of twice its offset."""
    header = U(Operation.BIND | vm.vm << 32)
    return machine.run_columns(header, 0, pages * U(2 * PAGE), pages * U(PAGE), PAGE, count=len(pages)).status


def depth(machine: Machine, root: int) -> tuple[int, int]:
    """How many nodes the longest path down a tree has, and how many the tree has."""
    state = machine.arrays.state
    level, deepest, nodes = [int(state[root])], 0, 0
    while level := [node for node in level if node]:
        deepest += 1
        nodes += len(level)
        level = [int(state[node + int(side)]) for node in level for side in (W.T_LEFT, W.T_RIGHT)]
    return deepest, nodes


ORDERS = {
    "ascending": lambda n: np.arange(n),
    "descending": lambda n: np.arange(n)[::-1],
    "random": lambda n: np.random.default_rng(3).permutation(n),
    "from both ends": lambda n: np.stack([np.arange(n // 2), n - 1 - np.arange(n // 2)], 1).reshape(-1),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_slot_is_found_on_a_short_path(order: Any) -> None:
    """Nodes from the top down, most of a tree: of a balanced one log2(n), of a list n."""
    for count in (1000, 16_000):
        machine, vm = many(count, order(count))
        row = int(W.STATE_VMS) + vm.vm * W.V_WORDS
        for root in (row + int(W.V_SLOTS), row + int(W.V_SLOTS_BY_HVA), int(W.STATE_INODES) + int(W.I_SLOTS)):
            deepest, nodes = depth(machine, root)
            assert nodes == count
            assert deepest < 4 * math.log2(count)


def test_as_many_slots_as_kvm_has_numbers() -> None:
    """KVM_USER_MEM_SLOTS is 32764: kvm_set_memory_region() refuses numbers from there on. Two VMs have more than the
    machine has rows, which is the model's own limit."""
    machine, vm = many(32764)
    assert bind_pages(machine, vm, np.array([32764], U)).tolist() == [-W.EINVAL]
    other = machine.create_vm(protected=True)
    statuses = bind_pages(machine, other, np.arange(1100, dtype=U))
    assert np.count_nonzero(statuses == 0) == W.MEMSLOTS - 32764
    assert set(statuses[W.MEMSLOTS - 32764 :].tolist()) == {-W.ENOSPC}
    assert vm.unbind(17 * 2 * PAGE).status == 0
    assert bind_pages(machine, vm, np.array([32764, 32765], U)).tolist() == [0, -W.EINVAL]
    for page in (0, 16, 18, 32764):
        assert vm.touch(page * 2 * PAGE).status == W.RET_PF_FIXED
    assert vm.touch(17 * 2 * PAGE).status != W.RET_PF_FIXED
    assert machine.check() == 0
    assert vm.close().status == 0
    assert machine.check() == 0
    assert not bind_pages(machine, other, np.arange(2000, 30_000, dtype=U)).any()


def test_numbered_slots_count_with_the_others() -> None:
    machine, vm = many(32763)
    process = machine.create_process()
    assert process.mmap_anonymous(VA, PAGE).status == 0
    assert vm.set_memory_region(7, 1 << 40, PAGE, VA).status == 0
    assert vm.set_memory_region(8, 1 << 41, PAGE, VA).status == -W.EINVAL
    assert vm.set_memory_region(7, 1 << 41, PAGE, VA).status == 0
    assert vm.set_memory_region(7, 0, 0).status == 0
    assert vm.set_memory_region(8, 1 << 41, PAGE, VA).status == 0


def test_rows_that_nobody_uses_take_no_memory() -> None:
    """The rows of slots and their nodes are pages of the machine's `state` that were never written."""
    machine = Machine(Config("pfnmap", pool=8 * M2, page_size=M2))
    rows = machine.arrays.state[int(W.STATE_MEMSLOTS) : W.STATE_SIZE]
    first = -(-rows.ctypes.data // PAGE)
    last = (rows.ctypes.data + rows.nbytes) // PAGE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = np.frombuffer(file.read((last - first) * 8), U)
    assert len(entries) > 2000
    assert np.count_nonzero(entries >> U(63)) < 8


def seconds_each(machine: Machine, vm: Vm, count: int) -> float:
    """Of conversions of some of the first pages, and the guest's accesses to them: the best of some rounds."""
    pages = np.random.default_rng(1).integers(0, count, 4000).astype(U)
    found = []
    for kind in (Flag.SHARED, Flag.PRIVATE, Flag.SHARED, Flag.PRIVATE):
        began = time.process_time()
        header = U(Operation.CONVERT | kind << 8)
        machine.run_columns(header, 0, 0, pages * U(PAGE), PAGE, count=len(pages))
        machine.run_columns(U(Operation.GUEST_FAULT | vm.vm << 32), 0, pages * U(2 * PAGE), count=len(pages))
        found.append(time.process_time() - began)
    return min(found)


def test_a_conversion_and_a_fault_do_not_go_through_all_slots() -> None:
    few, many_slots = many(32), many(32_000)
    pages = 32
    for machine, vm in (few, many_slots):
        seconds_each(machine, vm, pages)
    assert seconds_each(*many_slots, pages) < 20 * seconds_each(*few, pages)
