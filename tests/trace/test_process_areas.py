"""Areas of a process against a dict of its pages."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pgemu.trace.process_areas import ANONYMOUS, Area, Areas, joined

pytestmark = pytest.mark.same_with_checks

PAGE = 4096
PAGES = 12
RANGES = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(lambda r: (r[0], min(r[0] + r[1], PAGES)))
STEPS = st.tuples(st.sampled_from(["map", "unmap", "protect"]), RANGES, st.integers(0, 2), st.sampled_from([-1, 0, 1]))


def pages(areas: Areas) -> dict[int, tuple[int, int, int]]:
    """What each page shows: rights, file, page of the file."""
    found = {}
    for area in areas:
        for at in range(area.start, area.end, PAGE):
            inside = (area.offset + at - area.start) // PAGE if area.file != ANONYMOUS else 0
            found[at // PAGE] = area.rights, area.file, inside
    return found


@given(st.lists(STEPS, max_size=20), RANGES)
def test_areas_are_what_a_dict_of_pages_says(
    steps: list[tuple[str, tuple[int, int], int, int]], asked: tuple[int, int]
) -> None:
    areas, model = Areas(), {}
    for what, (start, end), rights, file in steps:
        if what == "map":
            areas.add(Area(start * PAGE, end * PAGE, rights, file, 3 * PAGE if file >= 0 else 0))
            model |= {page: (rights, file, 3 + page - start if file >= 0 else 0) for page in range(start, end)}
        elif what == "unmap":
            areas.remove(start * PAGE, end * PAGE)
            model = {page: shown for page, shown in model.items() if not start <= page < end}
        else:
            areas.change(start * PAGE, end * PAGE, rights=rights)
            model |= {page: (rights, *shown[1:]) for page, shown in model.items() if start <= page < end}
    assert pages(areas) == model
    # As few as they can be: neighbours differ.
    assert not any(two.continues(one) for one, two in zip(areas, list(areas)[1:], strict=False))
    start, end = asked
    holes = {page for low, high in areas.gaps(start * PAGE, end * PAGE) for page in range(low // PAGE, high // PAGE)}
    assert holes == set(range(start, end)) - set(model)
    assert set(pages(Areas(areas.parts(start * PAGE, end * PAGE)))) == set(model) & set(range(start, end))


def test_cuts_are_the_areas_that_a_change_makes_more() -> None:
    areas = Areas([Area(0, 4 * PAGE, 1), Area(8 * PAGE, 12 * PAGE, 1)])
    assert [areas.cuts(start * PAGE, end * PAGE) for start, end in [(0, 4), (1, 4), (1, 3), (2, 10), (4, 8)]] == [
        0, 1, 2, 2, 0,
    ]  # fmt: skip


def test_a_child_does_not_get_what_is_not_to_be_copied() -> None:
    areas = Areas([Area(0, 4 * PAGE, 1)])
    areas.change(PAGE, 2 * PAGE, dontfork=True)
    assert [(area.start // PAGE, area.end // PAGE) for area in areas.child()] == [(0, 1), (2, 4)]


def test_ranges_are_joined_over_gaps_that_nothing_else_has() -> None:
    ranges = [(0, PAGE, 1), (3 * PAGE, 4 * PAGE, 2), (6 * PAGE, 7 * PAGE, 4), (20 * PAGE, 21 * PAGE, 1)]
    apart = Areas([Area(5 * PAGE, 6 * PAGE, 0)])
    assert joined(ranges, 4 * PAGE, apart) == [(0, 4 * PAGE, 3), (6 * PAGE, 7 * PAGE, 4), (20 * PAGE, 21 * PAGE, 1)]
    assert len(joined(ranges, 0, Areas())) == 4
