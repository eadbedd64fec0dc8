"""What a comparison answers, and that what it says an answer rests on is what turns it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from comparisons import converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu.experiments.compare import DESIGNS, Comparison, DesignRun, WithoutEffect, compare, configuration, run
from pgemu.experiments.inferences import INFERENCES, Alternative
from pgemu.experiments.sensitivity import Sensitivity, sensitivity
from pgemu.experiments.verdict import (
    Basis,
    Breach,
    Line,
    Measure,
    breaches,
    broken,
    mapped,
    measure,
    paired,
    verdict,
)
from pgemu.machine.config import DEFECTS
from pgemu.machine.presets import Versions
from pgemu.report.screen import screen
from pgemu.trace import Lowered, LoweringOptions, Operation, load, shipped
from pgemu.trace.log import Doubt
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from random_traces import traces

# Rules whose alternative no version has: what they would change is not held against an answer.
WHAT_IFS = {"lazy-merge"}
SINGLES = [
    (name, one)
    for name, rule in INFERENCES.items()
    if name not in WHAT_IFS
    for one in rule.alternatives
    if not one.trace
]


class Alternatives:
    """Answers under alternatives, each design run by itself: nothing here is sensitivity.py's."""

    def __init__(self, trace: Lowered) -> None:
        self._trace = trace
        self._known: dict[object, DesignRun] = {}

    def _run(self, design: str, alternative: Alternative | None) -> DesignRun:
        versions, given = Versions(), {}
        if alternative and design in alternative.designs:
            versions, given = alternative.changed(versions), dict(alternative.fields)
        unseen = bool(alternative and alternative.unseen)
        config = configuration(self._trace, design, versions, given)  # type: ignore[arg-type]
        if (config, unseen) not in self._known:
            self._known[config, unseen] = run(self._trace, config, versions, unseen=unseen)
        return self._known[config, unseen]

    def measures(self, alternative: Alternative | None) -> dict[str, Measure]:
        first, second = (self._run(design, alternative) for design in DESIGNS)
        return measure(first, second, unreached=bool(alternative and alternative.unreached))


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(traces())
def test_an_answer_keeps_its_sign_under_all_alternatives_but_those_that_it_names(trace: Lowered) -> None:
    comparison = compare(trace)
    lines = verdict(comparison, sensitivity(comparison))
    alternatives = Alternatives(trace)
    assert comparison.runs[0].config.vm in ("plain", "sw")  # the largest leaf of a TDX VM is no question here
    answers = {(name, one.label): alternatives.measures(one) for name, one in SINGLES if name != "private-level"}
    for key, line in lines.items():
        better = {rule: found[key].better for rule, found in answers.items()}
        turned = {rule for rule, found in better.items() if found != line.measure.better}
        if line.basis.kind in ("fact", "captured"):
            assert line.measure.better in (0, 1)
            assert turned == set(), (key, line)
        elif line.basis.kind == "even":
            assert line.measure.better == -1
            assert turned == set(), (key, line)
        elif line.basis.kind == "undecided":
            low, high = line.measure.difference  # type: ignore[misc]
            assert low <= 0 <= high
        elif line.basis.kind == "inference":
            named = {(rule, label): then for rule, label, then in line.basis.rules if " and " not in rule}
            assert named.items() <= better.items(), (key, line)
            assert all(then != line.measure.better for then in named.values())
            assert line.basis.rules
        else:  # without the defect it is otherwise, both zeroing alike
            assert {name for name, _, _ in line.basis.rules} == {"uptodate-unzeroed"}
            assert any(rule == "zero" for rule, _ in turned)


def test_answers_of_a_small_trace() -> None:
    lines = verdict(mixed(), sensitivity(mixed()))
    kinds = {key: line.basis.kind for key, line in lines.items()}
    # Both: past the end, private memory, what is not simulated. One -EAGAIN against one refused MADV_DONTNEED.
    assert (lines["refused"].measure.first, lines["refused"].measure.second) == (4, 4)
    assert kinds["refused"] == "even"
    assert (kinds["broken"], lines["broken"].basis.rules[0][0]) == ("defect", "uptodate-unzeroed")
    # 7 pages of vmemmap, nodes of the xarray: no rule changes that.
    assert (kinds["memory"], lines["memory"].measure.better) == ("fact", 1)


@pytest.mark.parametrize("check", ["end", "every", 1])
def test_stale_contents_are_broken_by_the_page_though_their_leaf_is_gone(check: int | str) -> None:
    """dec2025 zeroes one page of a 2M folio, the guest is shown it whole, and a hole takes it before the end."""
    records = [*setup(), one(Operation.GUEST_FAULT, address=0), one(Operation.PUNCH_HOLE, offset=0, length=PAGE_2M)]
    comparison = compare(lowered(records), check=check)  # type: ignore[arg-type]
    restructure, pfnmap = comparison.runs
    assert breaches(restructure) == (Breach(Broken.STALE_CONTENTS, 511, "pages", ("uptodate-unzeroed",)),)
    assert (breaches(pfnmap), broken(restructure), broken(pfnmap)) == ((), 511, 0)
    assert (restructure.finding is None) == (check == "end")
    assert not comparison.broken
    for found in (None, sensitivity(comparison)):
        line = verdict(comparison, found)["broken"]
        assert (line.measure.first, line.measure.better) == (511, 1)
        assert line.basis == Basis("defect", (("uptodate-unzeroed", "without", -1),))


@cache
def _stale_contents() -> Comparison:
    records = [*setup(), one(Operation.GUEST_FAULT, address=0), one(Operation.PUNCH_HOLE, offset=0, length=PAGE_2M)]
    return compare(lowered(records))


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_what_a_defect_breaks_decides_nothing_beside_what_none_does(first: int, second: int) -> None:
    """511 pages of restructure's are the defect's; what devices reach of private memory is no defect's."""
    known = _stale_contents()
    runs = [
        replace(run, devices=SimpleNamespace(stale=stale))  # type: ignore[arg-type]
        for run, stale in zip(known.runs, (first, second), strict=True)
    ]
    line = verdict(replace(known, runs=tuple(runs)))["broken"]
    assert (line.measure.first, line.measure.second) == (511 + first, second)
    if first <= second < 511 + first:
        assert line.basis.kind == "defect"
    elif second == 511 + first:
        assert line.basis.kind == "even"
    else:
        assert line.basis.kind == "untested"


def test_without_alternatives_nothing_is_an_inference() -> None:
    for comparison in (mixed(), converts_nothing()):
        kinds = {line.basis.kind for line in verdict(comparison).values()}
        assert kinds <= {"untested", "captured", "even", "undecided", "defect"}


@pytest.mark.parametrize("about", ["", "guest faults", "conversions", "host faults", "unmaps and holes"])
def test_what_rests_on_input_in_doubt_is_no_fact(about: str) -> None:
    """Everything but the basis stays; a rule that turns an answer is named as before."""
    trace = lowered(mixed_records())
    sure = compare(trace)
    doubtful = replace(sure, lowered=replace(trace, doubts=(Doubt("only 1 of 9", about),)))
    found = sensitivity(sure)
    rests = {"host faults": {"conversions", "memory"}, "unmaps and holes": {"guest_faults", "level"}}
    facts = 0
    for key, line in verdict(sure, found).items():
        other = verdict(doubtful, found)[key]
        turns = line.basis.kind in ("fact", "captured") and key in rests.get(about, {key})
        assert other == (line._replace(basis=Basis("doubtful")) if turns else line)
        facts += turns
    assert facts or about == "unmaps and holes"
    assert all(line.basis.kind != "doubtful" for line in verdict(sure, found).values())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces(), st.sets(st.sampled_from(sorted(DEFECTS)), max_size=3), st.sampled_from(["rfc2", "dec2025"]))
def test_where_nothing_was_tried_no_winner_rests_on_a_defect(trace: Lowered, names: set[str], like: Any) -> None:
    """Without any one defect the winner stays, unless the line names the defect and no winner."""
    comparison = compare(trace, versions=Versions(like), defects=tuple(names))
    lines = verdict(comparison)
    for name in {name for known in comparison.runs for name in known.config.defects}:
        fewer = [replace(known.config, defects=tuple({*known.config.defects} - {name})) for known in comparison.runs]
        without = measure(*(run(trace, config, comparison.versions) for config in fewer))
        for key, line in lines.items():
            if line.basis.kind == "untested" and name not in [rule for rule, *_ in line.basis.rules]:
                assert line.measure.better is None or without[key].better == line.measure.better
            if line.basis.kind == "untested" and line.basis.rules:
                assert line.measure.better is None


def test_a_defect_that_is_on_is_named_where_it_may_make_the_difference() -> None:
    found = verdict(mixed())
    assert found["guest_faults"].basis == Basis("untested", (("uptodate-unzeroed", "without", None),))
    assert (found["guest_faults"].measure.better, found["memory"].measure.better) == (None, 1)
    assert found["memory"].basis == Basis("untested")
    text = " ".join(screen(mixed(), found, None).split())
    assert "- guest faults untested: uptodate-unzeroed is on and may make the difference" in text
    idle = WithoutEffect({"restructure": ("uptodate-unzeroed",)}, ())
    assert verdict(replace(mixed(), without_effect=idle))["guest_faults"].measure.better == 0


def test_equal_machines_are_even() -> None:
    lines = verdict(compare(lowered(setup())))
    for key in ("conversions", "guest_faults", "level", "refused", "broken"):
        assert lines[key].basis.kind == "even"
        assert lines[key].measure.better == -1


def test_what_a_version_refuses_is_the_one_answer() -> None:
    comparison = compare(lowered(setup(), "shared"), strict=True)
    restructure, pfnmap = comparison.runs
    assert restructure.refusal == "dec2025 refuses huge pages that are shared at first (-EINVAL)"
    assert (restructure.count, pfnmap.count, comparison.instead) == (0, 2, ())
    found = sensitivity(comparison)
    assert found.trials == ()
    lines = verdict(comparison, found)
    assert {key: line.measure.better for key, line in lines.items()} == {
        **dict.fromkeys(("conversions", "guest_faults", "memory", "level", "broken")),
        "refused": 1,
    }


def test_what_a_version_refuses_is_done_as_another_does() -> None:
    comparison = compare(lowered(setup(), "shared"))
    assert comparison.instead == (
        "dec2025 refuses huge pages that are shared at first (-EINVAL): created as rfc2 does",
    )
    assert [run.count for run in comparison.runs] == [2, 2]
    assert compare(lowered(setup(), "shared"), versions=Versions("rfc2")).instead == ()


def test_an_interrupt_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare(lowered(mixed_records()))

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    found = sensitivity(comparison, stop)
    assert not found.complete
    assert 0 < len(found.trials) < len(sensitivity(comparison).trials)
    assert set(verdict(comparison, found)) == set(verdict(comparison))


# --------------------------------------------------------------------------- numbers that were artefacts


@cache
def recorded() -> Comparison:
    """The shipped trace over a 1G page."""
    return compare(load(shipped(), LoweringOptions()))


@cache
def varied() -> Sensitivity:
    return sensitivity(recorded())


def line(key: str) -> Line:
    return verdict(recorded(), varied())[key]


def test_the_time_of_guest_faults_rests_on_what_is_zeroed() -> None:
    """5-29 ms against 100-130 ms for the longest fault was two whole folios, one of them 1G and one of 4K."""
    found = line("guest_faults")
    assert (found.measure.better, found.basis.kind) == (1, "inference")
    assert ("pfnmap-zeroing", "folio", None) in found.basis.rules
    faults = Operation.GUEST_FAULT
    # By whole folios pfnmap zeroes 1 GiB at its first fault, half of which no slot reaches: with that half restructure
    # is better, without it nothing is decided. By page on both sides pfnmap is better.
    folios = compare(recorded().lowered, zero="folio").runs
    low, high = paired(*folios, faults, unreached=True).total
    assert 0 < low < high
    low, high = paired(*folios, faults).total
    assert low < 0 < high
    low, high = paired(*compare(recorded().lowered, zero="page").runs, faults).total
    assert low < high < 0
    # What is left of the longest fault: 512 pages zeroed under a leaf of 2M, and the one that splits the 1G folio.
    restructure, pfnmap = (one.operation(faults) for one in compare(recorded().lowered, zero="page").runs)
    assert restructure
    assert pfnmap
    assert pfnmap.worst == (212_991, 262_143)
    assert restructure.worst[0] > 5e6


def test_what_stage_2_maps_rested_on_a_zap_that_no_version_rounds() -> None:
    restructure, pfnmap = recorded().runs
    faults = restructure.operation(Operation.GUEST_FAULT)
    assert faults
    assert faults.outcomes["RET_PF_FIXED"] == 13_872
    assert mapped(restructure) == (10_688 * PAGE_4K, 0)  # 41.8 MiB
    assert mapped(pfnmap)[0] == 82 << 20
    rounded = next(trial for trial in varied().trials if trial.rule == "zap")
    assert mapped(rounded.runs[0])[0] == 8192
    assert rounded.runs[1] is pfnmap
    assert rounded.measures["memory"].better == line("memory").measure.better == 1


def test_flips_that_overlap_split_once() -> None:
    """17-105 s was 1,704 splits of a 1G folio; under a page that stays shared it is split once."""
    trace = load("workload:tdx-boot", LoweringOptions(), 0, overlap=1.0)
    restructure = compare(trace, ["restructure"]).runs[0]
    conversions = restructure.operation(Operation.CONVERT)
    assert conversions
    assert conversions.count == 3409
    assert conversions.total[1] < 1e9
    assert restructure.to_json()["state"]["folios_split"] < 20
