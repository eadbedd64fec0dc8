"""What a comparison is repeated for, and that what is left out would have turned nothing."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import pgemu.experiments.sensitivity as module
from comparisons import HVA, lowered, one, setup
from pgemu.experiments.compare import compare, run
from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.sensitivity import compare_and_vary, sensitivity
from pgemu.experiments.verdict import Measure, measure, verdict
from pgemu.trace import Flag, Lowered, Operation, Records
from pgemu.workload import tdx_boot
from pgemu_kernels.words.operations import PAGE_4K
from random_traces import PAGES, traces


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


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(traces())
def test_side_by_side_is_one_after_the_other(trace: Lowered) -> None:
    comparison, found = compare_and_vary(trace)
    alone = compare(trace)
    assert comparison.to_json() == alone.to_json()
    after = sensitivity(alone)
    assert (found.untouched, found.complete) == (after.untouched, True)
    assert [(one.rule, one.label, one.removes, one.measures) for one in found.trials] == [
        (one.rule, one.label, one.removes, one.measures) for one in after.trials
    ]


def test_an_interrupt_of_the_comparison_ends_what_runs_beside_it() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_and_vary(tdx_boot.build(), progress=stop)
    assert not [thread for thread in threading.enumerate() if thread is not threading.main_thread() and _works(thread)]


def _works(thread: threading.Thread) -> bool:
    thread.join(60)
    return thread.is_alive()


# --------------------------------------------------------------------------- what need not be tried


def _flips(draw: st.DrawFn) -> list[Records]:
    """Conversions of what is of the other kind as a whole, and faults between them."""
    shared = np.zeros(PAGES, bool)
    steps: list[Records] = []
    for _ in range(draw(st.integers(1, 12))):
        first = draw(st.integers(0, PAGES - 1))
        count = int(np.argmax(shared[first:] != shared[first])) or PAGES - first
        count = min(count, draw(st.sampled_from([1, 3, 512, PAGES])))
        to = not shared[first]
        convert = one(
            Operation.CONVERT,
            Flag.SHARED if to else Flag.PRIVATE,
            offset=first * PAGE_4K,
            length=count * PAGE_4K,
        )
        pages = [first, draw(st.integers(0, PAGES - 1))]
        steps += [one(Operation.GUEST_FAULT, Flag.WRITE, address=page * PAGE_4K) for page in pages]
        steps.append(convert)
        shared[first : first + count] = to
        steps += [one(Operation.GUEST_FAULT, Flag.WRITE, address=page * PAGE_4K) for page in pages]
        steps += [one(Operation.HOST_FAULT, Flag.WRITE, address=HVA + page * PAGE_4K) for page in pages if shared[page]]
    return steps


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_zapping_both_kinds_is_zapping_the_one_that_is_left(data: st.DataObject) -> None:
    trace = lowered([*setup(), *_flips(data.draw)], "private")
    comparison = compare(trace, vm="tdx")
    assert INFERENCES["zap-filter"].untouched(comparison) == (
        "no conversion finds memory that is already what it is to be"
    )
    for known in comparison.runs:
        again = run(trace, replace(known.config, zap_filter="target"), comparison.versions)
        assert (again.statistics.events == known.statistics.events).all()
        assert (again.statistics.charges == known.statistics.charges).all()
        assert measure(known, again)["level"].better == -1


def test_zapping_both_kinds_matters_where_a_conversion_finds_some_of_each() -> None:
    steps = [
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=PAGE_4K),
        one(Operation.GUEST_FAULT, Flag.WRITE, address=0),
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=2 * PAGE_4K),
    ]
    comparison = compare(lowered([*setup(), *steps], "private"), vm="tdx")
    assert INFERENCES["zap-filter"].untouched(comparison) == ""
