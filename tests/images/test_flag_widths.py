"""Widths of the fields of page->flags: given, derived from lines of the kernel, and doubtful where several fit."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pgemu.images.flag_widths import derived_widths, given_widths
from pgemu.images.struct_page import decode_page, flag_text
from pgemu_kernels.formats.struct_page import CONFIGURATIONS, RELEASES, FieldWidths, field_widths, page_layout

pytestmark = pytest.mark.same_with_checks


def line(word: int, node: int, zone: int, cpupid: int | None) -> str:
    """As __dump_page() prints it; without NUMA balancing there is no CPU and PID."""
    last = "" if cpupid is None else f"|lastcpupid={cpupid:#x}"
    return f"[   12.345678] page_type: flags: {word:#x}(uptodate|lru|node={node}|zone={zone}{last})"


def word_of(widths: FieldWidths, values: tuple[int, int, int], low: int = 0) -> int:
    word, end = low, 64
    for width, value in zip(widths[:3], values, strict=True):
        end -= width
        word |= value << end
    return word


def numbers(
    word: int, widths: FieldWidths, release: str = "6.18", configuration: str = "debian"
) -> tuple[int, int, int | None]:
    page = decode_page([word, 0, 0, 0, 0, 0, 0xFFFF_FFFF, 0], 1, page_layout(release, configuration, widths))
    assert page.zone is not None
    return page.node or 0, page.zone, page.last_cpupid


@st.composite
def pages(draw: st.DrawFn) -> tuple[FieldWidths, list[tuple[int, int, int]]]:
    """Widths, and what the fields of a few pages hold."""
    widths = FieldWidths(draw(st.integers(1, 10)), draw(st.integers(1, 3)), draw(st.integers(8, 21)))
    values = st.tuples(*(st.integers(0, (1 << width) - 1) | st.just((1 << width) - 1) for width in widths[:3]))
    return widths, draw(st.lists(values, min_size=1, max_size=5))


@given(pages(), st.integers(0, (1 << 25) - 1), st.sampled_from(RELEASES), st.sampled_from(CONFIGURATIONS))
def test_derived_widths_mean_what_every_line_says(
    case: tuple[FieldWidths, list[tuple[int, int, int]]], low: int, release: str, configuration: str
) -> None:
    widths, values = case
    words = [word_of(widths, value, low) for value in values]
    lines = [line(word, *value) for word, value in zip(words, values, strict=True)]
    derived = derived_widths(lines)
    for word, (node, zone, cpupid) in zip(words, values, strict=True):
        last = -1 if cpupid == (1 << derived.last_cpupid) - 1 else cpupid
        assert numbers(word, derived, release, configuration) == (node, zone, last)
    # What is not doubtful is the kernel's.
    if not derived.doubtful:
        assert derived == widths
    layout = page_layout(release, configuration, derived)
    for bits in layout.flags:
        if bits.name in ("node", "zone", "last_cpupid"):
            assert bits.confirmed == (bits.name not in derived.doubtful)
            assert f"{bits.name} " not in flag_text(layout, words[0]) or f"{bits.name} {bits.value(words[0])}" + (
                "" if bits.confirmed else "?"
            ) in flag_text(layout, words[0])


@given(pages())
def test_given_widths_are_taken(case: tuple[FieldWidths, list[tuple[int, int, int]]]) -> None:
    widths, values = case
    text = f"node={widths.node},zone={widths.zone},lastcpupid={widths.last_cpupid}"
    assert given_widths(text, "debian") == widths
    for release in RELEASES:
        for value in values:
            last = -1 if value[2] == (1 << widths.last_cpupid) - 1 else value[2]
            assert numbers(word_of(widths, value), widths, release) == (*value[:2], last)


def test_more_lines_leave_less_doubt() -> None:
    widths = FieldWidths(6, 3, 17)
    first, second = ((0, 1, 0x1FFFF), (5, 2, 0x1FFFF))
    lines = [line(word_of(widths, value), *value) for value in (first, second)]
    assert derived_widths(lines[:1]) == (6, 3, 17, frozenset({"node", "zone"}))
    assert derived_widths(lines) == (6, 3, 17, frozenset())


def test_fields_that_are_not_printed_have_no_bits() -> None:
    assert derived_widths(["flags: 0x8000000000000848(head|zone=2)"])[:3] == (0, 2, 0)
    assert derived_widths(["flags: 0x4000000000000848(head|zone=1)", "flags: 0xc000000000000848(head|zone=3)"]) == (
        0, 2, 0, frozenset()
    )  # fmt: skip


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_what_is_not_given_is_the_configuration_s(configuration: str) -> None:
    assert given_widths("node=5", configuration) == field_widths(configuration)._replace(node=5)
    assert given_widths("last_cpupid=11, node=5", configuration) == field_widths(configuration)._replace(
        node=5, last_cpupid=11
    )


@pytest.mark.parametrize("text", ["", "node", "node=", "node=x", "node=-1", "nodes=3", "node=6;zone=3", "node=65"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected widths like node=6,zone=3,lastcpupid=17"):
        given_widths(text, "debian")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing", "expected a line like"),
        ("flags: 0x17ffff0000000848(uptodate|head)", "no zone in the flags"),
        ("flags: 0x17ffff0000000848(section=3|node=1|zone=3)", "section in the flags is not read"),
        ("flags: 0x17ffff0000000848(node=0|zone=3|lastcpupid=0x1ffff)", "no widths of node, zone and lastcpupid fit"),
    ],
)
def test_lines_that_fit_no_widths_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        derived_widths([text])


def test_lines_of_two_kernels_are_refused() -> None:
    lines = [line(word_of(FieldWidths(n, 3, 17), (1, 2, 0x1FFFF)), 1, 2, 0x1FFFF) for n in (4, 6)]
    with pytest.raises(ValueError, match="no widths"):
        derived_widths(lines)


def test_widths_need_room() -> None:
    with pytest.raises(ValueError, match="last_cpupid of 30 bits: expected at most 26"):
        page_layout("7.3", "debian", FieldWidths(10, 3, 30))
    assert page_layout("7.3", "debian", FieldWidths(10, 3, 23)).bits("lru_refs") is None


def test_zones_have_names_where_the_field_is_as_wide_as_the_configuration_s() -> None:
    assert page_layout("6.18", "debian", FieldWidths(6, 3, 17)).zones == page_layout("6.18").zones
    assert flag_text(page_layout("6.18", "debian", FieldWidths(6, 2, 17)), 2 << 56) == "zone 2, node 0"


def test_all_fields_are_doubtful_where_the_zone_is_none() -> None:
    assert flag_text(page_layout("7.3"), 0x00FFF20000000000) == "last_cpupid 2082816?, zone 7?, node 3?"


@pytest.mark.parametrize(
    ("release", "word", "said", "expected"),
    [
        ("6.18", 0x17FFFF0000000848, "node=1|zone=3|lastcpupid=0x1ffff", (1, 3)),
        ("6.18", 0x00FFF200000000A9, "node=0|zone=1|lastcpupid=0x7ff", (0, 1)),
        ("6.12", 0x02FFFF800000002D, "node=0|zone=2|lastcpupid=0x1ffff", (0, 2)),
    ],
)
def test_flags_of_other_configurations(release: str, word: int, said: str, expected: tuple[int, int]) -> None:
    assert numbers(word, derived_widths([f"flags: {word:#x}(uptodate|{said})"]), release)[:2] == expected


def test_a_free_block_of_6_11() -> None:
    words = [0x00FFF00000000000, 0xFFFFEA0000959608, 0xFFFFEA00019D9408, 0, 0, 3, 0xBFFFFFFF, 0]
    page = decode_page(words, 0x64620, page_layout("6.10"))
    assert page.type == "buddy"
    assert [value.value for value in page.values if value.name == "private"] == [3]  # the block's order
