"""Lines of many numbers at once are those that one after another makes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.cli._rows import hexadecimal, joined, looked_up
from pgemu.cli.dump import _documents, _lines
from pgemu.cli.walk import SIZES, flag_names, rights_letters
from pgemu.tables.entries import decode
from pgemu.tables.walk import rights_of
from pgemu_kernels.formats.page_format import FORMATS

pytestmark = pytest.mark.same_with_checks

words = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 255), st.sampled_from([0, 1 << 63, 1 << 32]))


@given(numbers=st.lists(st.tuples(words, words), min_size=1, max_size=20), width=st.integers(0, 16))
def test_lines(numbers: list[tuple[int, int]], width: int) -> None:
    columns = [np.array(column, np.uint64) for column in zip(*numbers, strict=True)]

    def text(a: int, b: int) -> str:
        return f"{a}:{b % 3 * 'é'}"

    found = joined("<", hexadecimal(columns[0], width), " ", looked_up(columns, text), "\n")
    assert found == "".join(f"<{a:0{width}x} {text(a, b)}\n" for a, b in numbers)


def test_no_lines() -> None:
    none = np.zeros(0, np.uint64)
    assert joined("x", hexadecimal(none, 3), looked_up([none], str)) == ""


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    """A format, and ranges of it: address, length, physical, level, flags, rights, step."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    found = []
    for _ in range(draw(st.integers(1, 8))):
        level = draw(st.integers(1, 3))
        size = 1 << 9 * level + 3
        length = size * draw(st.integers(1, 600))
        rows = (draw(words) & ~0xFFF & (1 << 60) - 1, length, draw(words) & (1 << 52) - 4096, level)
        found.append((*rows, draw(words) & ~((1 << 52) - 4096), draw(words), draw(st.sampled_from([0, size]))))
    return name, found


@given(drawn=ranges())
@settings(max_examples=100)
def test_ranges_as_text_and_as_json(drawn: tuple[str, list[tuple[int, ...]]]) -> None:
    name, rows = drawn
    fmt = FORMATS[name]()
    array = np.array(rows, np.uint64).T
    lines = _lines(fmt, array).splitlines()
    documents = json.loads(f"[{_documents(fmt, array)[:-2]}]")
    for row, line, document in zip(rows, lines, documents, strict=True):
        address, length, physical, level, flags, rights, step = row
        units = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))
        size = next(f"{length // unit}{letter}" for unit, letter in units if length % unit == 0)
        names, letters = flag_names(decode(fmt, level, flags)), rights_letters(fmt, rights_of(fmt, rights))
        again = "" if step else f" ({length // (1 << 9 * level + 3)} times the same page)"
        assert line == (
            f"{address:016x}-{address + length - 1:016x}  {size:>6}  {physical:#015x}  "
            f"{SIZES[level - 1]:>2}  {letters}  {names}{again}"
        )
        assert document == {
            "address": hex(address), "length": length, "physical": hex(physical), "level": level,
            "same_page": step == 0, "entry_bits": hex(flags), "flags": names.split("|"), "rights": letters,
        }  # fmt: skip
