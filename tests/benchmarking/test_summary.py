"""The two sections, and ratios within a group only."""

from __future__ import annotations

import pytest

from pgemu.benchmarking.summary import Timed, emulator_lines, modelled_lines, set_ratios, unmodelled_line

pytestmark = pytest.mark.same_with_checks


def timed(group: str, name: str, rate: float | None, role: str = "call", **info: object) -> Timed:
    """A benchmark of 1000 operations at a rate in millions a second."""
    return Timed(group, name, role, {"operations": 1000, **info}, None if rate is None else 1000 / (rate * 1e6))


def test_ratios_are_to_the_control_of_the_same_group() -> None:
    found = [
        timed("a", "fast", 50.0),
        timed("a", "control", 100.0, "control"),
        timed("a", "c", 25.0, "peer"),
        timed("b", "slow", 1.0),
    ]
    set_ratios(found)
    assert [one.info.get("ratio_to_control") for one in found] == [pytest.approx(0.5), None, pytest.approx(0.25), None]
    assert list(emulator_lines(found)) == ["a: fast 50.0 (0.5), control 100.0, c 25.0 (0.25)", "b: slow 1"]


def test_what_was_not_timed_has_no_rate_and_sets_none() -> None:
    found = [timed("a", "call", 5.0), timed("a", "control", None, "control")]
    set_ratios(found)
    assert list(emulator_lines(found)) == ["a: call 5"]


def test_modelled_time_is_per_operation_and_only_of_what_was_counted() -> None:
    counts = {"operations": {"guest fault": {"RET_PF_SPURIOUS": 1000}}, "events": {}}
    found = [
        timed("a", "call", 5.0, modelled_ns=[800_000.0, 2_000_000.0], counts=counts),
        timed("a", "again", 5.0, modelled_ns=[0.0, 0.0], counts=counts),
        timed("a", "control", 5.0, "control"),
        timed("b", "walk", 5.0),
    ]
    assert list(modelled_lines(found)) == [
        "a: call 0.80-2.0 us, again: nothing that has a price (guest fault RET_PF_SPURIOUS)"
    ]


@pytest.mark.parametrize(
    ("operations", "told"),
    [
        ({"guest fault": {"RET_PF_FIXED": 1000}}, ""),
        (
            {"guest fault": {"RET_PF_FIXED": 128, "RET_PF_SPURIOUS": 65408}},
            " (mean over 128 RET_PF_FIXED, 65,408 RET_PF_SPURIOUS)",
        ),
        ({"convert": {"-EINVAL": 2}}, " (-EINVAL 2 of 2)"),
        (
            {"convert": {"ok": 1}, "guest fault": {"RET_PF_FIXED": 9}},
            " (mean over 1 convert ok, 9 guest fault RET_PF_FIXED)",
        ),
    ],
)
def test_outcomes_stand_beside_a_price_where_they_are_not_one_success(operations: dict[str, object], told: str) -> None:
    counts = {"operations": operations, "events": {}}
    found = [timed("a", "call", 5.0, modelled_ns=[800_000.0, 2_000_000.0], counts=counts)]
    assert list(modelled_lines(found)) == [f"a: call 0.80-2.0 us{told}"]


def test_a_call_that_no_machine_counted_is_named() -> None:
    found = [
        timed("a", "own", 5.0),
        timed("a", "control", 5.0, "control"),
        timed("a", "other", 5.0, modelled_ns=[0, 1]),
    ]
    assert (line := unmodelled_line(found)) is not None
    assert line.endswith(": own (a)")
    assert unmodelled_line(found[1:]) is None
