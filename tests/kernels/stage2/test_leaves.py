"""Leaves of stage 2 that go for the sake of a part of what they map."""

from __future__ import annotations

import pytest

from pgemu import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation


@pytest.mark.parametrize(
    ("page_size", "first", "pages", "beyond"),
    [
        (W.PAGE_2M, 0, 1, 511),
        (W.PAGE_2M, 500, 24, (512 - 12) + (512 - 12)),  # the last 12 pages of one leaf, the first 12 of the next
        (W.PAGE_2M, 512, 512, 0),
        (W.PAGE_2M, 511, 514, 511 + 511),  # the leaf between lies in the range
        (W.PAGE_1G, 7, 1, 262_143),
    ],
)
def test_pages_of_a_large_leaf_outside_the_range_are_counted(
    page_size: int, first: int, pages: int, beyond: int
) -> None:
    size = max(4 * page_size, W.PAGE_1G) if page_size == W.PAGE_2M else page_size
    machine = Machine(Config("restructure", pool=size, page_size=page_size, order="rfc2"))
    gmem, vm = machine.create_guest_memfd(size), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    vm.touch_many(range(0, size, page_size))
    assert gmem.convert(first * W.PAGE_4K, pages * W.PAGE_4K, shared=True).status == 0
    assert machine.statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) == beyond
    # 4K leaves, which is all that is left there, go one by one.
    vm.touch_many(range(first * W.PAGE_4K, (first + pages) * W.PAGE_4K, W.PAGE_4K))
    again = machine.statistics.event(Event.SPTE_PAGES_BEYOND)
    assert gmem.convert(first * W.PAGE_4K, W.PAGE_4K, shared=False).status == 0
    assert machine.statistics.event(Event.SPTE_PAGES_BEYOND) == again


def test_memory_that_no_slot_maps_is_not_beyond() -> None:
    machine = Machine(Config("restructure", pool=W.PAGE_1G, page_size=W.PAGE_1G, order="rfc2"))
    gmem = machine.create_guest_memfd(W.PAGE_1G)
    assert gmem.convert(0, W.PAGE_4K, shared=True).status == 0
    assert machine.statistics.event(Event.SPTE_PAGES_BEYOND) == 0
