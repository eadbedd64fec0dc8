"""Default machines run loops of their own: compiled from the same kernels as those of all others, they do the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
SIZE = 3 * M2
KINDS = (
    Operation.CONVERT, Operation.CONVERT, Operation.HOST_FAULT, Operation.GUEST_FAULT, Operation.PUNCH_HOLE,
    Operation.ZAP, Operation.MUNMAP, Operation.MMAP, Operation.BIND, Operation.UNBIND, Operation.GET, Operation.PUT,
    Operation.CLOSE,
)  # fmt: skip
FLAGS = (0, Flag.WRITE, Flag.PRIVATE, Flag.SHARED, Flag.PRIVATE | Flag.SHARED, Flag.MADVISE)
EXTREMES = (0, 1, PAGE - 1, 1 << 47, (1 << 47) - PAGE, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)

near = st.builds(lambda page, inside: page * PAGE + inside, st.integers(0, 1540), st.sampled_from((0, 0, 0, 0, 1, 8)))
offsets = st.one_of(near, near, st.sampled_from((0, M2, 2 * M2, SIZE)), st.sampled_from(EXTREMES))
lengths = st.one_of(
    st.sampled_from((PAGE, PAGE, M2, SIZE)), st.integers(1, 1540).map(lambda n: n * PAGE), st.sampled_from(EXTREMES)
)
operations = st.tuples(
    st.sampled_from(KINDS), st.sampled_from(FLAGS), st.sampled_from((0, 0, 0, 1, 9)), offsets, lengths, st.booleans()
)


def scene(design: Any, shared: bool, **parameters: Any) -> Machine:
    machine = Machine(Config(design, pool=SIZE, page_size=M2, **parameters))
    gmem = machine.create_guest_memfd(SIZE, shared=shared)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, VA).status == 0
    assert vm.bind(gmem, 0).status == 0
    return machine


def operate(machine: Machine, step: tuple[Any, ...]) -> tuple[int, int]:
    op, flags, object_, offset, length, mapped = step
    address = offset if op in (Operation.GUEST_FAULT, Operation.BIND, Operation.UNBIND) or not mapped else VA + offset
    return tuple(
        machine.operate(
            op, flags=int(flags), object_=object_, address=address & (1 << 64) - 1, offset=offset, length=length
        )
    )


@pytest.mark.parametrize("design", DESIGNS)
@settings(deadline=None, max_examples=60)
@given(
    st.booleans(), st.sampled_from((None, 60)), st.sampled_from(("folio", "page")), st.lists(operations, max_size=16)
)
def test_both_loops_do_the_same(design: str, shared: bool, frames: int | None, zero: str, sequence: list[Any]) -> None:
    default, full = (scene(design, shared, frames=frames, zero=zero) for _ in range(2))
    full.arrays.state[W.R_FULL] = 1
    for step in sequence:
        assert operate(default, step) == operate(full, step), step
    assert default.check() == full.check() == 0
    for machine in (default, full):  # where the last search ended is a hint: one loop looks ahead, the other does not
        machine.arrays.state[W.R_FULL] = 0  # a mapping that is counted in pfnmap leaves the fast loops, too
        machine.arrays.state[[int(W.R_LAST_VMA), int(W.R_LAST_MEMSLOT)]] = 0
    assert_same(default, full)
