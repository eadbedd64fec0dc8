"""Faults on guest_memfd: whole, step by step and through every door to one; what they count, and who waits for whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine, Result
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
EXTREMES = (0, 1, PAGE - 1, PAGE, M2, G1, 1 << 39, (1 << 47) - PAGE, 1 << 47, 1 << 48, 1 << 63, (1 << 64) - 1)


def events(machine: Machine) -> dict[str, int]:
    """All counts; which pages a TLB flush names is the flush's, not the fault's."""
    return {event.name: machine.statistics.event(event) for event in Event if event != Event.TLB_FLUSH_PAGE}


def designs(design: str, **parameters: Any) -> tuple[Machine, Any, Any, Any]:
    """A machine with two pages of 2M, all shared, mapped at VA and bound at 0: machine, inode, process, VM."""
    machine = Machine(Config(design, pool=2 * M2, page_size=M2, **parameters))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(2 * M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, VA).status == 0
    assert vm.bind(gmem, 0).status == 0
    return machine, gmem, process, vm


# --------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("page_size", [PAGE, M2, G1])
@pytest.mark.parametrize(("design", "pages"), [("restructure", 3), ("pfnmap", 0)])
def test_mapped_folios_are_resident_and_special_entries_are_not(design: Any, pages: int, page_size: int) -> None:
    """mm/memory.c:finish_fault() adds mm_counter_file(folio); insert_pfn() adds nothing."""
    machine = Machine(Config(design, pool=max(page_size, M2), page_size=page_size))
    gmem = machine.create_guest_memfd(max(page_size, M2), shared=True)
    process = machine.create_process()
    assert process.mmap(gmem, VA).status == 0
    for page in (0, 1, 511, 511):
        process.touch(VA + page * PAGE)
    assert process.rss == pages
    assert machine.check() == 0, machine.broken
    assert process.zap(VA, PAGE).status == 0
    assert process.rss == max(pages - 1, 0)
    assert gmem.convert(PAGE, PAGE, shared=False).status == 0  # unmap_mapping_pages()
    assert process.rss == max(pages - 2, 0)
    assert process.munmap(VA, gmem.size).status == 0
    assert process.rss == 0
    assert machine.check() == 0, machine.broken


def test_the_first_touch_through_either_door_writes_and_counts_the_same() -> None:
    """One host fault: __filemap_add_folio() writes 28 bytes of the struct page, set_pte_range() entry and mapcount."""
    first = {
        "HOST_FAULT": 1, "TABLE_PAGE_ALLOCATED": 3, "LEAF_WRITTEN": 1, "RMAP_CHANGED": 1, "PAGE_ZEROED": 1,
        "STRUCT_PAGE_BYTES": 28, "PAGE_CACHE_STORED": 1,
    }  # fmt: skip
    for door in (Door(designs=True), Door(designs=False)):
        before = events(door.machine)
        assert door.process.touch(VA, write=True) == Result(W.VM_FAULT_LOCKED, 1)
        after = events(door.machine)
        assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == first
        assert door.process.rss == 1
        assert door.process.walk(VA)[-1][2] & 0xFFF == 0x867


# --------------------------------------------------------------------------- two doors to guest_memfd of 4K folios


class Door:
    """An inode of 64 pages of 4K, mapped at VA: Config(page_size=4096), or create_guest_memfd_4k()."""

    def __init__(self, *, designs: bool) -> None:
        if designs:
            self.machine = Machine(Config("restructure", pool=2 * M2, page_size=PAGE))
            self.gmem: Any = self.machine.create_guest_memfd(64 * PAGE, shared=True)
        else:
            self.machine = Machine(Config())
            self.gmem = self.machine.create_guest_memfd_4k(64 * PAGE)
        self.process = self.machine.create_process()
        assert self.process.mmap(self.gmem, VA).status == 0

    def do(self, what: str, page: int, pages: int, inside: int) -> tuple[Any, ...]:
        """An operation, what came of it, and what it counted."""
        before = events(self.machine)
        if what == "punch":
            result = self.gmem.punch_hole(page * PAGE + inside, pages * PAGE)
        elif what == "zap":
            result = self.process.zap(VA + page * PAGE + inside, pages * PAGE)
        else:
            result = self.process.touch(VA + page * PAGE + inside, write=what == "write")
        after = events(self.machine)
        counted = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        return tuple(result), counted, self.process.rss


spots = st.one_of(st.integers(0, 65), st.sampled_from((63, 64)))
actions = st.tuples(
    st.sampled_from(("read", "write", "read", "write", "zap", "punch")), spots, st.integers(1, 66),
    st.sampled_from((0, 0, 0, 1, 8, PAGE - 1)),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.lists(actions, max_size=20))
def test_both_doors_to_4k_folios_do_the_same(sequence: list[tuple[str, int, int, int]]) -> None:
    """virt/kvm/guest_memfd.c has one kvm_gmem_get_folio() and one kvm_gmem_fault_user_mapping()."""
    doors = Door(designs=True), Door(designs=False)
    for door in doors:  # the tables are there: a refused fault leaves those above the last level behind
        assert door.process.touch(VA).status == W.VM_FAULT_LOCKED
    for action in sequence:
        here, there = (door.do(*action) for door in doors)
        assert here == there, action
    for door in doors:
        assert door.machine.check() == 0, door.machine.broken


# --------------------------------------------------------------------------- whole and step by step

BOTH = (Operation.HOST_FAULT, Operation.GUEST_FAULT)
faults = st.tuples(
    st.sampled_from(BOTH),
    st.one_of(st.integers(0, 4 * M2), st.sampled_from(EXTREMES)),
    st.sampled_from((0, 0, Flag.WRITE, Flag.PRIVATE, Flag.SHARED)),
)
parameters = st.sampled_from(
    ({}, {}, {"host_huge": True}, {"lru_cache": True}, {"order": "rfc2", "split_form": "rfc2"}, {"zero": "page"})
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DESIGNS), parameters, st.lists(faults, max_size=12))
def test_steps_are_the_straight_line_for_any_address(design: str, more: Any, sequence: list[Any]) -> None:
    """The same results, counts and memory, word for word, of whole faults and of their steps."""
    whole, steps = designs(design, **more), designs(design, **more)
    for op, address, flags in sequence:
        at = (VA + address) % (1 << 64) if op == Operation.HOST_FAULT else address
        result = whole[0].operate(op, flags=flags, address=at, vm=0)
        machine = steps[0]
        machine.begin(1, op, flags=flags, address=at, vm=0)
        while machine.step(1) == W.GO:
            pass
        assert machine.result(1) == result
    assert events(whole[0]) == events(steps[0])
    assert np.array_equal(whole[0].arrays.ram, steps[0].arrays.ram)
    for machine in (whole[0], steps[0]):
        assert machine.check() == 0, machine.broken


conversions = st.tuples(
    st.just(Operation.CONVERT), st.integers(0, 1023), st.sampled_from((Flag.PRIVATE, Flag.SHARED))
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DESIGNS), st.sampled_from(("folio", "page")), st.lists(st.one_of(faults, conversions), max_size=16)
)
def test_machines_with_parameters_fault_as_default_ones(design: str, zero: str, sequence: list[Any]) -> None:
    """The fast loops' folio, level, zeroing and entry are those of a machine in full, word for word."""
    default, full = designs(design, zero=zero), designs(design, zero=zero, worker="queued")
    for op, number, flags in sequence:
        results = []
        for machine, gmem, _, _ in (default, full):
            columns = {"object_": gmem.inode, "offset": number * PAGE, "length": PAGE}
            if op != Operation.CONVERT:
                columns = {"address": (VA + number) % (1 << 64) if op == Operation.HOST_FAULT else number}
            results.append(machine.operate(op, flags=flags, **columns))
        assert results[0] == results[1]
    assert events(default[0]) == events(full[0])
    assert np.array_equal(default[0].arrays.ram, full[0].arrays.ram)
    for machine in (default[0], full[0]):
        assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("full", [False, True])
def test_a_fault_waits_for_the_one_that_allocates_its_page(design: str, full: bool) -> None:
    """Also on a machine without parameters: the huge page is there, but not split yet, and its mutex is held.

    The hash mutex around kvm_gmem_get_folio() of the January 2026 rewrite.
    """
    machine, gmem, process, vm = designs(design, **({"dirty_log_guest_memfd": True} if full else {}))
    machine.begin(1, Operation.HOST_FAULT, flags=Flag.WRITE, address=VA, space=0)
    for _ in range(3):  # begin, lookup, take
        assert machine.step(1) == W.GO
    assert process.touch(VA + PAGE, write=True) == Result(W.VM_FAULT_RETRY, 0)
    assert vm.touch(2 * PAGE) == Result(W.RET_PF_RETRY, 0)
    assert machine.step(1) == W.GO  # insert: pfnmap's folio is whole for ever, restructure's is to be split
    expected = W.VM_FAULT_NOPAGE if design == "pfnmap" else W.VM_FAULT_RETRY
    assert process.touch(VA + PAGE, write=True).status == expected
    while machine.step(1) == W.GO:
        pass
    assert machine.result(1).status == (W.VM_FAULT_NOPAGE if design == "pfnmap" else W.VM_FAULT_LOCKED)
    assert process.touch(VA + PAGE, write=True).status in (0, W.VM_FAULT_LOCKED)
    assert gmem.is_split(0) == (design == "restructure")
    assert machine.check() == 0, machine.broken
