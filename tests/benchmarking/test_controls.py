"""Controls do what they say, over pages anywhere, and refuse what they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.benchmarking import controls
from pgemu.objects.machine import Machine

CANONICAL = st.integers(0, (1 << 47) - 1) | st.integers((1 << 64) - (1 << 47), (1 << 64) - 1)
PRESENT, ADDRESS = 1, 0x000F_FFFF_FFFF_F000


def entries(machine: Machine, root: int, page: int) -> tuple[int, int]:
    """Index and value of the level-1 entry of a page, found one table after the other."""
    ram = machine.arrays.ram
    for level in (4, 3, 2):
        entry = int(ram[root // 8 + (page >> 9 * (level - 1) & 511)])
        assert entry & PRESENT
        root = entry & ADDRESS
    at = root // 8 + (page & 511)
    return at, int(ram[at])


@settings(max_examples=15)
@given(st.lists(CANONICAL, min_size=1, max_size=40))
def test_each_page_s_entry_is_stored_to_and_no_other(addresses: list[int]) -> None:
    made: list[Any] = []
    original = controls._linked
    controls._linked = lambda given: made.append(original(given)) or made[0]  # type: ignore[assignment, func-returns-value]
    try:
        control = controls.walk_and_store(np.array(addresses, np.uint64))
    finally:
        controls._linked = original
    (table,) = made
    places = {entries(table.machine, table.root, address >> 12) for address in addresses}
    assert {value for _, value in places} == {0}  # nothing is mapped
    ram = table.machine.arrays.ram
    for at, _ in places:
        ram[at] = 5
    before = ram.copy()
    control()
    assert {int(at) for at in np.flatnonzero(ram != before)} == {at for at, _ in places}
    assert not any(ram[at] for at, _ in places)
    assert (control.what, control.operations) == ("walk and store", len(addresses))
    assert repr(control) == f"Control('walk and store', {len(addresses):,} operations)"


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20), st.data())
def test_gather_loads_each_index(words: list[int], data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=1, max_size=20))
    array, found = np.array(words, np.uint64), np.empty(len(indices), np.uint64)
    controls._compiled()[1](array, np.array(indices, np.uint64), found)
    assert found.tolist() == [words[index] for index in indices]
    control = controls.gather(array, np.array(indices, np.uint64))
    control()
    assert (control.what, control.operations) == ("gather", len(indices))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: controls.walk_and_store(np.zeros(0, np.uint64)), r"addresses of shape \(0,\): expected one or more"),
        (lambda: controls.walk_and_store(np.array([1 << 50], np.uint64)), "addresses around 0x4000000000000: expected"),
        (lambda: controls.walk_and_store(np.zeros((2, 2), np.uint64)), "addresses"),
        (lambda: controls.gather(np.zeros(3, np.uint64), np.array([3], np.uint64)), r"indices .*: expected .* below 3"),
        (lambda: controls.gather(np.zeros(3, np.uint64), np.zeros(0, np.uint64)), "indices of shape"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
