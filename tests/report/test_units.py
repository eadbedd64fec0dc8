"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pgemu.report import units


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (5.07e6, 28.7e6, "5.1-29 ms"),
        (0, 0, "0 ns"),
        (20, 40, "20-40 ns"),
        (900, 1200, "0.90-1.2 us"),
        (77.4, 1097, "77 ns-1.1 us"),
        (1300, 1320, "1.3 us"),
        (100.1e6, 119.3e6, "100-120 ms"),
        (2.1e9, 99.6e9, "2.1-100 s"),
        (999.7, 999.7, "1.0 us"),
        (0, 1500, "0-1.5 us"),
        (5e9, 5000e9, "5.0-5,000 s"),
    ],
)
def test_a_band_has_two_digits_at_each_end(low: float, high: float, text: str) -> None:
    assert units.band(low, high) == text


@given(st.floats(1, 1e12), st.floats(1, 1e6))
def test_a_band_never_shows_a_third_digit(low: float, factor: float) -> None:
    for end in units.band(low, low * factor).split("-"):
        digits = end.split()[0].replace(",", "").replace(".", "").strip("0")
        assert len(digits) <= 2


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (28, "28 B"),
        (4096, "4 KiB"),
        (2_101_248, "2.00 MiB"),
        (16_773_120, "16.0 MiB"),
        (512 << 20, "512 MiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 40, "1 TiB"),
        (5000 << 40, "5,000 TiB"),
    ],
)
def test_sizes(n: int, text: str) -> None:
    assert units.size(n) == text


def test_counts_are_exact() -> None:
    assert units.count(16825) == "16,825"


@given(st.floats(0, 1))
def test_only_nothing_is_0_percent_and_only_all_of_it_is_100(part: float) -> None:
    assert (units.share(part) == "0%") == (part == 0)
    assert (units.share(part) == "100%") == (part == 1)
    assert abs(float(units.share(part).strip("<>%")) - 100 * part) <= 1


@given(st.integers(1, 10**12), st.integers(0, 10**12))
def test_only_what_is_gone_falls_by_100_percent_and_only_equals_by_0(first: int, second: int) -> None:
    shown = units.change(first, second)
    assert (shown == "-100%") == (second == 0)
    assert (shown == "+0%") == (first == second)
    assert shown.startswith("-") == (second < first)
