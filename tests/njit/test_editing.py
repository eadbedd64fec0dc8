"""Edits from a caller's compiled function are those of PageTable's methods, flushes included."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from numba import njit

from machines import assert_same
from pgemu import Config, EditResult, Flush, Machine, kernels
from pgemu.tables.page_table import PageTable
from pgemu_kernels import words as W
from pgemu_kernels.words.table_words import Edit

Array = np.ndarray[Any, Any]
BASE = 0x4000_0000
UPPER = 0xFFFF_8880_0000_0000
SIZES = {1: W.PAGE_4K, 2: W.PAGE_2M, 3: W.PAGE_1G}
MAP, MAP_RANGE, UNMAP, PROTECT, SPLIT = range(5)


@njit(nogil=True)
def done_by(handle: Any, tree: Array, what: int, words: Array) -> Any:
    """One edit; words: uint64[6], address, physical, length, level, bits to set, bits to clear."""
    if what == MAP:
        return kernels.map(handle, tree, words[0], words[1], words[3], words[4], words[5])
    if what == MAP_RANGE:
        return kernels.map_range(handle, tree, words[0], words[1], words[2], words[3], words[4], words[5])
    if what == UNMAP:
        return kernels.unmap(handle, tree, words[0], words[2])
    if what == PROTECT:
        return kernels.protect(handle, tree, words[0], words[2], words[4], words[5])
    return kernels.edit(handle, tree, Edit.SPLIT, words[0], 0, words[2], words[3], 0, 0, 0)


def by_method(table: PageTable, what: int, words: list[int]) -> EditResult:
    address, physical, length, level, set_bits, clear_bits = words
    if what == MAP:
        return table.map(address, physical, level=level, attributes=set_bits, replace=bool(clear_bits))
    if what == MAP_RANGE:
        return table.map_range(
            address, physical, length, max_level=level, attributes=set_bits, replace=bool(clear_bits)
        )
    if what == UNMAP:
        return table.unmap(address, length)
    if what == PROTECT:
        return table.protect(address, length, set_bits=set_bits, clear_bits=clear_bits)
    return table.split(address, length, level=level)


def random_edit(table: PageTable, random: Random) -> tuple[int, list[int]]:
    """Most of them make sense; some are not aligned, of no level, or over what is mapped."""
    fmt = table.format
    size = SIZES[random.choice((1, 1, 1, 2, 2, 3))]
    base = UPPER if fmt.sign_extended and random.random() < 0.5 else BASE
    address = base + random.randrange(4 * W.PAGE_1G // size) % random.choice((4, 600)) * size
    address = random.choice((address, address, address, address, address + 8, (1 << 64) - size))
    length = random.choice((size, size, W.PAGE_4K, 3 * W.PAGE_4K, W.PAGE_2M + W.PAGE_4K, 0))
    what = random.randrange(5)
    bits = [0, 0]
    if what in (MAP, MAP_RANGE):
        bits = [fmt.leaf[0], random.randrange(2)]
    elif what == PROTECT:
        bits = [0, random.choice((fmt.dirty, 2, 2))]
    return what, [address, random.randrange(1 << 6) * size, length, random.choice((1, 1, 2, 2, 3, 0)), *bits]


def result_of(done: Any) -> EditResult:
    """What kernels return, as Python's calls do."""
    end = int(done.flush_end) or 1 << 64
    flush = Flush(int(done.flush_start), end, int(done.flush_level), bool(done.freed_tables))
    return EditResult(done.status, int(done.detail), flush if done.flush_level else None, 0)


@pytest.mark.parametrize("name", ["x86-64", "x86-64-5", "ept", "npt", "arm64-s2", "vtd-s2"])
def test_edits_are_those_of_the_methods(name: str) -> None:
    one, other = (Machine(Config(frames=700)).create_page_table(name) for _ in range(2))
    handle, tree = kernels.Handle(one.machine, "edit"), kernels.tree(one)
    random = Random(name)
    seen = set()
    for number in range(300):
        what, words = random_edit(other, random)
        if what == SPLIT and name == "vtd-s2":
            continue
        expected = by_method(other, what, words)
        found = result_of(done_by(handle, tree, what, np.array(words, np.uint64)))
        assert found == expected, (number, what, words)
        seen.add((what, found.status, found.flush is None))
    assert_same(one.machine, other.machine)
    assert len(seen) > 8
    assert any(not unflushed for _, _, unflushed in seen)


def test_what_no_edit_may_do_is_refused() -> None:
    machine = Machine(Config("pfnmap", pool=W.PAGE_1G))
    table, process = machine.create_page_table("x86-64"), machine.create_process()
    handle = kernels.Handle(machine, "edit")
    words = np.array([BASE, 0, W.PAGE_4K, 1, table.format.leaf[0], 0], np.uint64)
    assert done_by(handle, kernels.tree(process), UNMAP, words).status == kernels.REFUSED
    tall = machine.create_page_table("amd-v1")
    tree = kernels.tree(tall)
    assert done_by(handle, tree, MAP, words).status == kernels.REFUSED
    assert done_by(handle, tree, UNMAP, words).status == by_method(tall, UNMAP, words.tolist()).status
    for short in (tree[:319], np.zeros(0, np.uint64), np.zeros(320, np.uint64)):
        assert done_by(handle, short, UNMAP, words).status == kernels.REFUSED


def test_a_table_that_is_gone_is_closed() -> None:
    machine = Machine(Config())
    table, tall = machine.create_page_table("x86-64"), machine.create_page_table("amd-v1")
    handle = kernels.Handle(machine, "edit")
    tree, second, of_tall = kernels.tree(table), kernels.tree(table), kernels.tree(tall)
    words = np.array([BASE, 0, W.PAGE_4K, 1, table.format.leaf[0], 0], np.uint64)
    assert done_by(handle, tree, MAP, words).status == 0
    assert done_by(handle, second, UNMAP, words).status == 0
    assert tall.map(1 << 50, 0).status == 0  # by a taller table
    assert done_by(handle, of_tall, UNMAP, words).status == kernels.CLOSED
    assert table.destroy().status == 0
    for one in (tree, second):
        assert done_by(handle, one, UNMAP, words).status == kernels.CLOSED
    with pytest.raises(ValueError, match="destroyed"):
        kernels.tree(table)
