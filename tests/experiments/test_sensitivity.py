"""What a comparison is repeated for, and that what is left out would have turned nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

import pgemu.experiments.sensitivity as module
from pgemu.experiments.compare import compare
from pgemu.experiments.sensitivity import sensitivity
from pgemu.experiments.verdict import Measure, verdict
from pgemu.trace import Lowered
from random_traces import traces


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(traces())
def test_pairs_that_are_left_out_turn_nothing(trace: Lowered) -> None:
    comparison = compare(trace)
    few = sensitivity(comparison)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_may_turn_more", lambda *_: True)
        every = sensitivity(comparison)
    assert len(few.trials) <= len(every.trials)
    lines = verdict(comparison, few)
    for key, line in verdict(comparison, every).items():
        assert (line.measure, line.basis.kind) == (lines[key].measure, lines[key].basis.kind), key


def _answer(difference: float, better: int | None = None) -> dict[str, Measure]:
    if better is None:
        better = 1 if difference < 0 else 0
    return {"memory": Measure(better, 0, difference, difference, "bytes")}


@pytest.mark.parametrize(
    ("base", "a", "b", "expected"),
    [
        (_answer(-100), _answer(-80), _answer(-94), True),  # 26 together: four times that is more than 100
        (_answer(-100), _answer(-90), _answer(-88), False),
        (_answer(-100), _answer(1), _answer(-50), False),  # rests on the first, whatever both do
        (_answer(0, -1), _answer(0, -1), _answer(0, -1), False),
        (_answer(0, -1), _answer(0, -1), _answer(0.01, -1), True),  # alike, and something moves it
    ],
)
def test_pairs_are_tried_where_they_could_turn_another_answer(
    base: dict[str, Measure], a: dict[str, Measure], b: dict[str, Measure], expected: bool
) -> None:
    assert module._may_turn_more(base, a, b) is expected
