"""Operations step by step: the same as in one go, and what interleavings of them return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Flag, Operation

M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
A, B = 1, 2  # actors
# Steps of a fault until it has its frame: lock, lookup, take, insert, (split,) lookup; without an allocation two.
ALLOCATING = {"restructure": 6, "pfnmap": 5}
# ... and until a guest's fault, which has it, holds neither the folio nor the lock (orders that put it: jan2026).
LOOKED_UP = {"restructure": 7, "pfnmap": 5}

Arguments = dict[str, Any]


class Setup:
    """Two 2M pages of one inode, all shared or all private, mapped by a process and bound to its VM."""

    def __init__(self, design: str, *, shared: bool, **parameters: Any) -> None:
        self.machine = Machine(Config(design, pool=2 * M2, page_size=M2, **parameters))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(2 * M2, shared=shared)
        self.process: AddressSpace = self.machine.create_process()
        self.vm: Vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, 0).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0

    def begin(self, actor: int, op: Operation, **arguments: Any) -> None:
        self.machine.begin(actor, op, **arguments)

    def finish(self, actor: int) -> tuple[int, int]:
        """Step to the end; the result."""
        for _ in range(20):
            outcome = self.machine.step(actor)
            assert outcome != W.BLOCKED
            if outcome == W.STOP:
                result = self.machine.result(actor)
                return result.status, result.detail
        raise AssertionError("an operation of more than 20 steps")

    def steps(self, actor: int, n: int) -> None:
        for _ in range(n):
            assert self.machine.step(actor) == W.GO

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


def host(page: int, *, write: bool = False) -> Arguments:
    return {"op": Operation.HOST_FAULT, "flags": Flag.WRITE if write else 0, "address": VA + page * PAGE}


def guest(page: int, flags: int = 0) -> Arguments:
    return {"op": Operation.GUEST_FAULT, "flags": flags, "address": page * PAGE}


def convert(first: int, pages: int, *, shared: bool) -> Arguments:
    flags = Flag.SHARED if shared else Flag.PRIVATE
    return {"op": Operation.CONVERT, "flags": flags, "offset": first * PAGE, "length": pages * PAGE}


def touched(setup: Setup) -> None:
    """Host (where shared) and guest have used pages of both blocks."""
    for page in (0, 1, 600):
        setup.process.touch(VA + page * PAGE)
        setup.vm.touch(page * PAGE)


def held(setup: Setup) -> None:
    """As `touched`, and somebody holds page 600."""
    touched(setup)
    assert setup.gmem.get_reference(600 * PAGE).status == 0


def untouched(_: Setup) -> None:
    """Nothing is allocated."""


def half_private(setup: Setup) -> None:
    touched(setup)
    assert setup.gmem.convert(0, M2, shared=False).status == 0


CASES: list[tuple[str, bool, Callable[[Setup], None], Arguments]] = [
    ("host fault, first use", True, untouched, host(7, write=True)),
    ("host fault, present", True, touched, host(1)),
    ("host fault, private", False, touched, host(1)),
    ("host fault, no mapping", True, touched, host(5000)),
    ("host fault, beside a private block", True, half_private, host(700)),
    ("guest fault, first use", False, untouched, guest(9)),
    ("guest fault, shared", True, untouched, guest(9)),
    ("guest fault, present", False, touched, guest(1)),
    ("guest fault, no slot", False, touched, guest(9000)),
    ("guest fault, wrong kind", False, untouched, guest(9, Flag.SHARED)),
    ("guest fault, huge leaf over a table", True, half_private, guest(300)),
    ("to shared", False, touched, convert(3, 1, shared=True)),
    ("to shared, both blocks", False, touched, convert(500, 100, shared=True)),
    ("to shared, nothing allocated", False, untouched, convert(0, 1024, shared=True)),
    ("to shared, held", False, held, convert(500, 200, shared=True)),
    ("to private", True, touched, convert(0, 1, shared=False)),
    ("to private, both blocks", True, touched, convert(0, 1024, shared=False)),
    ("to private, held", True, held, convert(590, 20, shared=False)),
    ("nothing to convert", True, touched, convert(0, 1024, shared=True)),
    ("beyond the end", True, touched, convert(1000, 100, shared=False)),
]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("shared", "prepare", "arguments"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_steps_do_what_the_whole_operation_does(
    design: str, kernel: str, shared: bool, prepare: Callable[[Setup], None], arguments: Arguments
) -> None:
    whole, stepped = (Setup(design, shared=shared, kernel=kernel) for _ in range(2))
    prepare(whole)
    prepare(stepped)
    expected = whole.machine.operate(**arguments)
    stepped.begin(0, **arguments)
    if expected.status == -W.WOULD_SPIN:  # a step is blocked where the freeze would spin
        while (outcome := stepped.machine.step(0)) == W.GO:
            pass
        assert outcome == W.BLOCKED
        return
    assert stepped.finish(0) == tuple(expected)
    for name, array in whole.machine.arrays._asdict().items():
        other = getattr(stepped.machine.arrays, name)
        if name == "state":
            array, other = (without_records(state) for state in (array, other))
        assert np.array_equal(array, other), name


def without_records(state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The `state` array less the operation records: the two ways use different ones."""
    copy = state.copy()
    copy[int(W.STATE_OPS) : int(W.STATE_INODES)] = 0
    return copy


# --------------------------------------------------------------------------- interleavings


def test_restructure_conversion_meets_a_host_fault_in_flight() -> None:
    """The fault's reference makes the gate refuse, at the page's offset; once it is over, unmapping helps."""
    s = Setup("restructure", shared=True)
    s.begin(A, **host(20))
    s.steps(A, ALLOCATING["restructure"])  # the reference is held, the invalidate_lock is not
    s.begin(B, **convert(10, 100, shared=False))
    assert s.finish(B) == (-W.EAGAIN, 20 * PAGE)
    assert s.gmem.is_shared(10 * PAGE)
    assert s.finish(A) == (W.VM_FAULT_LOCKED, 1)
    s.sound()
    assert s.gmem.convert(10 * PAGE, 100 * PAGE, shared=False).status == 0
    assert s.process.walk(VA + 20 * PAGE)[-1][2] == 0
    s.sound()


def test_pfnmap_conversion_waits_for_a_host_fault_in_flight() -> None:
    """No reference protects the fault, so it holds the invalidate_lock until the entry is there."""
    s = Setup("pfnmap", shared=True)
    s.begin(A, **host(20))
    s.steps(A, ALLOCATING["pfnmap"])
    s.begin(B, **convert(10, 100, shared=False))
    assert s.machine.step(B) == W.BLOCKED
    assert s.gmem.is_shared(10 * PAGE)
    assert s.finish(A) == (W.VM_FAULT_NOPAGE, 1)
    assert s.finish(B) == (0, 0)
    assert s.process.walk(VA + 20 * PAGE)[-1][2] == 0
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_host_fault_waits_for_a_conversion_and_sees_its_outcome(design: str) -> None:
    s = Setup(design, shared=True)
    s.begin(B, **convert(20, 1, shared=False))
    s.steps(B, 1)
    s.begin(A, **host(20))
    assert s.machine.step(A) == W.BLOCKED
    assert s.machine.result(A).status == W.VM_FAULT_RETRY
    assert s.finish(B) == (0, 0)
    assert s.finish(A) == (W.VM_FAULT_SIGBUS, 0)
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("shared", [True, False])
def test_guest_fault_is_retried_after_a_conversion(design: str, shared: bool) -> None:
    """Between the frame and the leaf the sequence moved: nothing is installed. The retry has the new level."""
    s = Setup(design, shared=not shared, order="jan2026")
    s.begin(A, **guest(20))
    s.steps(A, LOOKED_UP[design])
    assert s.gmem.convert(20 * PAGE, PAGE, shared=shared).status == 0
    assert s.finish(A) == (W.RET_PF_RETRY, 0)
    assert s.vm.walk(20 * PAGE)[-1][2] & 1 == 0
    assert s.vm.touch(20 * PAGE) == (W.RET_PF_FIXED, 1)
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_guest_fault_is_retried_while_an_invalidation_is_in_progress(design: str) -> None:
    """Begun while the conversion's range is invalidated, and again between lookup and leaf."""
    s = Setup(design, shared=False, order="jan2026", batch="range")
    s.vm.touch(20 * PAGE)
    s.begin(A, **guest(600))
    s.steps(A, LOOKED_UP[design])
    s.begin(B, **convert(20, 600, shared=True))
    s.steps(B, 3 if design == "restructure" else 2)  # ... and the invalidation has begun
    assert s.finish(A) == (W.RET_PF_RETRY, 0)
    assert s.finish(B) == (0, 0)
    assert s.vm.touch(600 * PAGE) == (W.RET_PF_FIXED, 1)
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_guest_fault_outside_the_range_only_minds_the_sequence(design: str) -> None:
    """The range is exact with pfnmap and rounded to huge pages with restructure; both leave block 1 alone."""
    s = Setup(design, shared=False)
    s.begin(B, **convert(20, 1, shared=True))
    s.steps(B, 3 if design == "restructure" else 2)
    s.begin(A, **guest(600))
    assert s.machine.step(A) == W.BLOCKED  # the writer has the invalidate_lock
    assert s.finish(B) == (0, 0)
    assert s.finish(A) == (W.RET_PF_FIXED, 2)
    s.sound()


@pytest.mark.parametrize(("design", "first", "second"), [
    ("restructure", W.VM_FAULT_LOCKED, 0),
    ("pfnmap", W.VM_FAULT_NOPAGE, W.VM_FAULT_NOPAGE),
])  # fmt: skip
def test_two_host_faults_on_one_page(design: str, first: int, second: int) -> None:
    """Both have the frame before either maps it; the second finds the entry there and gives its reference back."""
    s = Setup(design, shared=True)
    for actor, steps in ((A, ALLOCATING[design]), (B, 2)):
        s.begin(actor, **host(20))
        s.steps(actor, steps)
    assert s.finish(A) == (first, 1)
    assert s.finish(B) == (second, 1)
    assert s.machine.statistics.gauge(W.Gauge.HOST_LEAVES_4K) == 1
    assert s.machine.statistics.event(Event.LEAF_WRITTEN) == 1
    pfn = s.gmem.pfn(20 * PAGE)
    assert pfn is not None
    if design == "restructure":
        assert int(s.machine.struct_page(pfn)[6]) == 2 << 32  # page cache and one entry; mapped once
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_two_guest_faults_on_one_page(design: str) -> None:
    s = Setup(design, shared=True)
    for actor, steps in ((A, ALLOCATING[design]), (B, 2)):
        s.begin(actor, **guest(20))
        s.steps(actor, steps)
    level = 1 if design == "restructure" else 2
    assert s.finish(A) == (W.RET_PF_FIXED, level)
    assert s.finish(B) == (W.RET_PF_SPURIOUS, level)
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_two_conversions_exclude_each_other(design: str) -> None:
    s = Setup(design, shared=True)
    s.begin(A, **convert(0, 1, shared=False))
    s.begin(B, **convert(600, 1, shared=False))
    s.steps(A, 1)
    assert s.machine.step(B) == W.BLOCKED
    assert s.machine.result(B).status == -W.EBUSY
    assert s.finish(A) == (0, 0)
    assert s.finish(B) == (0, 0)
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_time_of_one_actor_is_not_charged_to_another(design: str) -> None:
    """A fault's cost is that of its own steps, whatever runs in between."""
    alone, between = Setup(design, shared=True), Setup(design, shared=True)
    for s in (alone, between):
        s.process.touch(VA + 30 * PAGE)
        s.begin(A, **host(20))
        s.steps(A, 2)
    before = between.machine.statistics.cost(Operation.HOST_FAULT)
    between.vm.touch(0)
    assert alone.finish(A) == between.finish(A)
    cost = [s.machine.statistics.cost(Operation.HOST_FAULT) for s in (alone, between)]
    assert cost[0] == cost[1]
    assert cost[1] > before
