"""How two machines are compared: a difference of one word is found, wherever it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from machines import PAGE, SMALL, assert_same, same, touched
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

WORDS = 2 * SMALL // 8


@pytest.mark.same_with_checks
@settings(deadline=None)
@given(offset=st.integers(0, PAGE // 8), at=st.lists(st.integers(0, WORDS - 1), max_size=3), flip=st.booleans())
def test_one_word_makes_arrays_unequal(offset: int, at: list[int], flip: bool) -> None:
    """Of memory that is touched nowhere else, from any word of a page on."""
    one, other = (np.zeros(WORDS + PAGE // 8, np.uint64)[offset : offset + WORDS] for _ in range(2))
    one[at] = 7
    assert same(one, other) == (not at)
    other[at] = 7
    assert same(one, other)
    if flip and at:
        other[at[-1]] = 0
        assert not same(one, other)


def test_what_nobody_touched_is_not_read() -> None:
    """Else comparing two machines takes as long as filling them: if this fails, tests are slow, and no less right."""
    array = np.zeros(64 * SMALL // 8, np.uint64)
    if touched(array[: SMALL // 8]).all():
        pytest.skip("the operating system does not say what is touched")
    assert same(array, np.zeros(array.size, np.uint64))
    assert not touched(array).all()


@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_machines_differ_by_one_word_of_ram(place: str) -> None:
    one, other = (Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M)) for _ in range(2))
    assert_same(one, other)
    ram = other.arrays.ram
    ram[{"first": 0, "last": len(ram) - 1, "middle": len(ram) // 2}[place]] ^= np.uint64(1)
    with pytest.raises(AssertionError, match="ram"):
        assert_same(one, other)
