"""Where guest memory lies in the inode."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from pgemu.trace.memory_layout import (
    Layout,
    RefusedSlot,
    Region,
    Slot,
    bind_slots,
    grow,
    inferred_slots,
    place_regions,
    ram_ranges,
)

M, G = 1 << 20, 1 << 30


def test_host_ranges_that_touch_or_overlap_are_one() -> None:
    slots = [Slot(0, 0, M, 5 * M), Slot(1, M, M, 6 * M), Slot(2, 9 * M, 2 * M, 6 * M), Slot(3, 0, M, 20 * M)]
    assert ram_ranges(slots) == [(5 * M, 8 * M), (20 * M, 21 * M)]


def test_a_pc_with_memory_above_4g_is_one_region_from_offset_0() -> None:
    slots = [Slot(0, 0, 3 * G, G), Slot(1, 4 * G, 5 * G, 4 * G), Slot(2, 4 * G - M, M, 100 * G)]
    regions = place_regions(ram_ranges(slots), slots, G)
    assert regions == [Region(G, 0, 8 * G), Region(100 * G, 8 * G, M)]


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    gpas=st.lists(st.integers(0, 1 << 20), min_size=8, max_size=8),
    page_size=st.sampled_from([2 * M, G]),
)
def test_regions_do_not_overlap_and_big_ones_are_congruent(sizes: list[int], gpas: list[int], page_size: int) -> None:
    slots = [
        Slot(number, gpas[number] * 4096, size * 4096, (number + 1) * 100 * G) for number, size in enumerate(sizes)
    ]
    regions = place_regions(ram_ranges(slots), slots, page_size)
    layout = grow(Layout(0, page_size, tuple(regions), ()), page_size, None)
    assert layout.inode_size % page_size == 0
    end = 0
    for region in sorted(regions, key=lambda region: region.offset):
        assert region.offset >= end
        end = region.offset + region.size
    assert end <= layout.inode_size
    for slot in bind_slots(slots, regions):
        assert slot.offset % 4096 == 0
        if slot.size >= 2 * M:
            assert (slot.offset - slot.gpa) % page_size == 0


def test_json_round_trip() -> None:
    layout = Layout(G, G, (Region(G, 0, M),), (Slot(0, 0, M, G),), (RefusedSlot(1, M, M, "read-only"),), "inferred")
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.to_json()["inferred"] is True


def test_inferred_slots_hold_ranges_whole_and_join_gaps_below_1g() -> None:
    ranges = [(4096, 8192), (0, 3 * G), (4 * G - 2 * M, 4 * G), (5 * G, 5 * G + 1), (0, 1 << 50)]
    start, end = (np.array(side, np.uint64) for side in zip(*ranges, strict=True))
    assert [(slot.gpa, slot.size) for slot in inferred_slots(start, end)] == [(0, 4 * G), (5 * G, 2 * M)]
    assert all(slot.hva % G == slot.gpa % G for slot in inferred_slots(start, end))
    assert inferred_slots(start[:0], end[:0]) == []
