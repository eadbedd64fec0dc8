"""Whatever an operation names, begin and step do what the operation does at once: both go by the same routing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

M2, PAGE = W.PAGE_2M, W.PAGE_4K
ANONYMOUS, SMALL, DEVICE, HUGE, DESIGNS_VMA = 0x400000, 0x800000, 0xC00000, 0x1000000, 0x7F00_0000_0000
USER_SLOT, DESIGNS_SLOT, NO_SLOT = 0, 1 << 30, 5 << 30
# One of each kind: inodes, and addresses in a VMA or a memory slot of each kind, touched and untouched.
INODES = {"guest_memfd": 0, "hugetlb": 1, "guest_memfd of 4K": 2, "device": 3, "none": 9, "anonymous": int(W.NO_INODE)}
PLACES = {
    "anonymous": ANONYMOUS, "anonymous, untouched": ANONYMOUS + PAGE, "guest_memfd of 4K": SMALL, "device": DEVICE,
    "hugetlb": HUGE, "guest_memfd": DESIGNS_VMA, "nothing": 0x3000_0000, "slot of a process": USER_SLOT + PAGE,
    "slot of guest_memfd": DESIGNS_SLOT, "no slot": NO_SLOT, "last page": (1 << 64) - PAGE,
}  # fmt: skip
FLAGS = (0, int(Flag.WRITE), int(Flag.SHARED), int(Flag.PRIVATE | Flag.READ | Flag.WRITE))
OPERATIONS = (0, *(int(op) for op in Operation), 63, 255)
MOST_STEPS = 200


def scene(design: Any) -> Machine:
    machine = Machine(Config(design, pool=6 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(2 * M2, shared=True)
    huge = machine.create_hugetlb_file(M2)
    small = machine.create_guest_memfd_4k(M2)
    device = machine.create_device(0x1000, 512)
    process = machine.create_process()
    done = [process.mmap_anonymous(ANONYMOUS, M2), process.mmap(small, SMALL), process.mmap_device(device, DEVICE)]
    done += [process.mmap_hugetlb(HUGE, file=huge), process.mmap(gmem, DESIGNS_VMA)]
    vm = machine.create_vm(process, protected=True)
    done += [vm.set_memory_region(0, USER_SLOT, M2, ANONYMOUS), vm.bind(gmem, DESIGNS_SLOT)]
    assert {result.status for result in done} == {0}
    for place in (ANONYMOUS, SMALL, DEVICE, HUGE, DESIGNS_VMA):
        process.touch(place, write=True)
    vm.touch(USER_SLOT, write=True)
    vm.touch(DESIGNS_SLOT)
    return machine


def step_to_the_end(machine: Machine, actor: int) -> int:
    for _ in range(MOST_STEPS):
        outcome = machine.step(actor)
        if outcome != W.GO:
            return outcome
    raise AssertionError("an operation of more steps than any has")


def assert_steps_do_the_same(design: str, op: int, cases: list[dict[str, int]]) -> None:
    whole, stepped = scene(design), scene(design)
    for case in cases:
        for flags in FLAGS:
            expected = whole.operate(op, flags=flags, **case)  # type: ignore[arg-type]
            stepped.begin(0, op, flags=flags, **case)  # type: ignore[arg-type]
            assert step_to_the_end(stepped, 0) == W.STOP
            assert stepped.result(0) == expected, (case, flags)
            with pytest.raises(ValueError, match="no operation under way"):
                stepped.step(0)
    assert whole.check() == stepped.check() == 0
    assert_same(whole, stepped)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("design", DESIGNS)
def test_steps_on_every_kind_of_inode(design: str, op: int) -> None:
    for inode in INODES.values():
        cases = [{"object_": inode, "offset": 0, "length": M2, "address": DESIGNS_SLOT * 2}]
        cases += [{"object_": inode, "offset": PAGE, "length": PAGE, "address": 1 << 40}]
        assert_steps_do_the_same(design, op, cases)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("design", DESIGNS)
def test_steps_on_every_kind_of_mapping_and_slot(design: str, op: int) -> None:
    for place in PLACES.values():
        assert_steps_do_the_same(design, op, [{"address": place, "length": PAGE}, {"address": place, "length": M2}])


# --------------------------------------------------------------------------- several actors

actors = st.integers(0, 2)
whatever = st.fixed_dictionaries(
    {
        "op": st.sampled_from([op for op in Operation if op is not Operation.VM_EXIT]),
        "flags": st.sampled_from(FLAGS),
        "object_": st.sampled_from(list(INODES.values())),
        "address": st.sampled_from(list(PLACES.values())),
        "offset": st.sampled_from((0, PAGE, M2)),
        "length": st.sampled_from((PAGE, M2)),
    }
)


@pytest.mark.parametrize("design", DESIGNS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(("begin", "step", "step", "operate")), actors, whatever), max_size=40))
def test_what_an_operation_names_may_change_between_its_steps(design: str, todo: list[Any]) -> None:
    """Mappings and slots come and go while others fault there: no step takes memory of one kind for another's."""
    machine = scene(design)
    active = set()
    for what, actor, operation in todo:
        if what == "operate":
            machine.operate(**operation)
        elif what == "begin" and actor not in active:
            machine.begin(actor, **operation)
            active.add(actor)
        elif actor in active and machine.step(actor) == W.STOP:
            active.discard(actor)
    for _ in range(MOST_STEPS):
        active = {actor for actor in active if machine.step(actor) != W.STOP}
    if not active:  # a conversion may wait for a reference that nobody gives back
        assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("design", DESIGNS)
def test_a_step_waits_for_a_lock_as_it_does_in_the_designs(design: str) -> None:
    """exit() would release a file whose lock a conversion holds: the step is blocked, and is counted once."""
    machine = scene(design)
    vm, process = machine.create_vm(), machine.create_process()
    assert vm.vm == 1
    gmem = machine.create_guest_memfd(M2, shared=True)
    own = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, DESIGNS_VMA).status == own.bind(gmem, DESIGNS_SLOT).status == 0
    assert own.release(gmem).status == 0
    machine.begin(1, Operation.CONVERT, object_=gmem.inode, length=M2, flags=int(Flag.PRIVATE))
    assert machine.step(1) == W.GO
    machine.begin(2, Operation.EXIT, space=process.space)
    before = machine.statistics.count(Operation.EXIT)
    for _ in range(3):
        assert machine.step(2) == W.BLOCKED
    assert machine.result(2).status == -W.EBUSY
    assert machine.statistics.event(W.Event.SYSCALL, Operation.EXIT) == before == 0
    assert step_to_the_end(machine, 1) == W.STOP
    assert machine.step(2) == W.STOP
    assert machine.statistics.results(Operation.EXIT) == {0: 1}
    assert machine.statistics.event(W.Event.SYSCALL, Operation.EXIT) == 1
    assert machine.register(W.R_STEPPED) == 0
    assert machine.check() == 0
