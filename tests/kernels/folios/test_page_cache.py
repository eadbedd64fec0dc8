"""The radix tree behind page caches, through a guest_memfd of 4K folios, against a set."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from pgemu.objects.files import GuestMemfd4K
from pgemu.objects.machine import Config, Machine
from pgemu.objects.stage2 import radix_tree
from pgemu_kernels import words as W

PAGE = 4096
PAGES = 1 << 40
# Indexes that share nodes of every level, and ones that make the tree grow.
indexes = st.builds(
    lambda shift, low: min((1 << shift) - 1 + low, PAGES - 1),
    st.sampled_from((0, 0, 9, 18, 27, 36, 39)),
    st.sampled_from((0, 1, 2, 511, 512)),
)
edits = st.lists(st.tuples(st.booleans(), indexes), min_size=1, max_size=40)


def make(**options: int) -> tuple[Machine, GuestMemfd4K]:
    machine = Machine(Config("restructure", pool=W.PAGE_2M, page_size=W.PAGE_2M, **options))  # type: ignore[arg-type]
    return machine, machine.create_guest_memfd_4k(PAGES * PAGE)


def stored(machine: Machine, file: GuestMemfd4K) -> set[int]:
    root = machine.arrays.state[int(W.STATE_INODES) + file.inode * W.I_WORDS + int(W.I_CACHE)]
    index, _ = radix_tree(machine.arrays.ram, int(root))
    return set(index.tolist())


@settings(max_examples=60, deadline=None)
@given(edits=edits)
def test_it_holds_what_was_stored(edits: list[tuple[bool, int]]) -> None:
    machine, file = make()
    expected: set[int] = set()
    for add, index in edits:
        if add:
            assert file.allocate(index * PAGE, PAGE).status == 0
            expected.add(index)
        else:
            assert file.punch_hole(index * PAGE, PAGE).status == 0
            expected.discard(index)
        assert stored(machine, file) == expected
        assert (machine.statistics.gauge(W.Gauge.CACHE_NODES) == 0) == (not expected)
    assert machine.statistics.gauge(W.Gauge.PAGE_CACHE_PAGES) == len(expected)
    assert machine.check() == 0
    file.close()
    assert machine.statistics.gauge(W.Gauge.CACHE_NODES) == 0
    assert machine.check() == 0


@settings(max_examples=60, deadline=None)
@given(st.sets(indexes, min_size=1, max_size=20), st.lists(st.tuples(indexes, indexes), min_size=1, max_size=5))
def test_a_hole_finds_all_that_is_in_it(kept: set[int], holes: list[tuple[int, int]]) -> None:
    """However far apart: from any index on the next one is found, whatever nodes lie between them."""
    machine, file = make()
    for index in kept:
        assert file.allocate(index * PAGE, PAGE).status == 0
    for ends in holes:
        start, last = sorted(ends)
        assert file.punch_hole(start * PAGE, (last + 1 - start) * PAGE).status == 0
        kept = {index for index in kept if not start <= index <= last}
        assert stored(machine, file) == kept
    assert machine.check() == 0


def test_without_memory_nothing_is_stored_and_nothing_lost() -> None:
    used = make()[0].statistics.gauge(W.Gauge.FRAMES_USED)
    for limit in range(used, used + 16):
        machine, file = make(frames=limit)
        before = machine.statistics.gauge(W.Gauge.FRAMES_USED)
        expected = set()
        for index in (0, 1 << 30, 1 << 39, 5, 1 << 20):
            status = file.allocate(index * PAGE, PAGE).status
            assert status in (0, -W.ENOMEM)
            if status == 0:
                expected.add(index)
            assert stored(machine, file) == expected
        assert machine.check() == 0, machine.broken
        for index in expected:
            file.punch_hole(index * PAGE, PAGE)
        assert machine.statistics.gauge(W.Gauge.FRAMES_USED) == before
