"""The worst operation of each kind: which record, when, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pgemu import Config, Machine
from pgemu.experiments.worst import explain, worst_operations
from pgemu.machine.designs import DESIGNS, Design
from pgemu.trace import Flag, Lowered, Operation, Records
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from tests.comparisons import HVA, INODE, lowered, mixed_records, one, setup


def boot_of(trace: Lowered, design: Design, **parameters: Any) -> Machine:
    machine = Machine(Config(design, pool=INODE, page_size=PAGE_2M, **parameters))
    machine.create_vm(machine.create_process(), protected=trace.init == "private")
    machine.create_guest_memfd(INODE, shared=trace.init == "shared")
    return machine


def timed(records: list[Records]) -> Lowered:
    """Record i comes at 100 i + 7 nanoseconds."""
    trace = lowered(records)
    time = np.arange(len(trace.records), dtype=np.uint64) * np.uint64(100) + np.uint64(7)
    return replace(trace, records=replace(trace.records, time=time))


def ran(trace: Lowered, design: Design, **parameters: Any) -> tuple[Machine, Any]:
    machine = boot_of(trace, design, **parameters)
    booted = machine.statistics
    machine.run(trace.records)
    return machine, booted


CONVERTS = [
    *setup(),
    one(Operation.GUEST_FAULT, address=PAGE_2M),
    one(Operation.CONVERT, Flag.SHARED, offset=0, length=PAGE_4K),  # 3: nothing is there to be split
    one(Operation.CONVERT, Flag.SHARED, offset=PAGE_2M, length=PAGE_4K),  # 4: a split
    one(Operation.CONVERT, Flag.SHARED, offset=PAGE_2M, length=PAGE_4K),  # 5: nothing to do
    one(Operation.CONVERT, Flag.SHARED, offset=PAGE_2M + PAGE_4K, length=PAGE_4K),  # 6: of a split page
]


def test_it_is_named_and_explained() -> None:
    trace = timed(CONVERTS)
    machine, booted = ran(trace, "restructure")
    found = worst_operations(trace, machine.statistics, booted)
    assert found.keys() == {Operation.MMAP, Operation.BIND, Operation.GUEST_FAULT, Operation.CONVERT}
    convert = found[Operation.CONVERT]
    assert (convert.record, convert.time, convert.largest) == (4, 407, None)
    assert found[Operation.GUEST_FAULT].record == 2
    explained = explain(trace, found.values(), lambda: boot_of(trace, "restructure"))
    assert explained.keys() == found.keys()
    for op, worst in explained.items():
        assert (worst.cost, worst.record, worst.time) == (found[op].cost, found[op].record, found[op].time)
        for end in (0, 1):
            assert sum(part.band[end] for part in worst.events) == pytest.approx(worst.cost[end])
    largest = explained[Operation.CONVERT].largest
    assert largest is not None
    assert (largest.event, largest.units) == (Event.VMEMMAP_PAGE_RESTORED, 7)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_it_is_what_one_by_one_shows(design: Design, check: bool) -> None:
    """Also where machines run every operation by itself, which is another loop."""
    records = [*mixed_records(), *mixed_records()[2:-2]]
    trace = timed(records)
    machine, booted = ran(trace, design)
    single = boot_of(trace, design)
    single.check_each(check)
    costs: dict[Operation, list[tuple[float, int]]] = {}
    for i, op in enumerate(trace.records.op.tolist()):
        before = single.statistics.cost(Operation(op))
        single.run(trace.records[i : i + 1])
        after = single.statistics.cost(Operation(op))
        costs.setdefault(Operation(op), []).append((after[1] - before[1], -i))
    for statistics in (machine.statistics, single.statistics):
        found = worst_operations(trace, statistics, booted)
        assert found.keys() == costs.keys()
        for op, worst in found.items():
            high, index = max((round(high, 3), index) for high, index in costs[op])
            assert (worst.cost[1], worst.record) == (pytest.approx(high, abs=1e-3), -index)


def test_another_kind_that_costs_the_same_is_seen() -> None:
    """A hole where nothing is and a mapping cost one system call each."""
    machine = Machine(Config("pfnmap", pool=INODE, page_size=PAGE_2M))
    process, gmem = machine.create_process(), machine.create_guest_memfd(INODE)
    before = machine.statistics
    assert before.worst(Operation.ALLOCATE) is None
    process.mmap(gmem, HVA)
    process.munmap(HVA, INODE)
    statistics = machine.statistics
    mapped, unmapped = statistics.worst(Operation.MMAP), statistics.worst(Operation.MUNMAP)
    assert mapped is not None
    assert unmapped is not None
    assert mapped.cost == statistics.cost(Operation.MMAP)
    assert unmapped.cost == statistics.cost(Operation.MUNMAP)
    assert mapped.number == statistics.count(Operation.MMAP) - 1
    assert len(statistics.words) == W.STATS_SIZE


def test_the_first_of_equals_counts() -> None:
    machine = Machine(Config("pfnmap", pool=INODE, page_size=PAGE_2M))
    gmem, vm = machine.create_guest_memfd(INODE), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    vm.touch_many([0, PAGE_4K, PAGE_2M, 2 * PAGE_2M, 3 * PAGE_2M])
    worst = machine.statistics.worst(Operation.GUEST_FAULT)
    assert worst is not None
    # The first fault also makes the tables; the second finds its page mapped; the others cost less than the first.
    assert worst.number == 0
    total = machine.statistics.cost(Operation.GUEST_FAULT)
    assert total[1] / 4 < worst.cost[1] < total[1]
