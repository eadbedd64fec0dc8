"""Answers: two values, their difference, and what all three leave out."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from comparisons import lowered, mixed, mixed_records, one, setup
from pgemu.experiments.compare import Comparison, compare
from pgemu.experiments.sensitivity import sensitivity
from pgemu.experiments.verdict import QUESTIONS, measure, verdict
from pgemu.machine.presets import Versions
from pgemu.report.answers import Answer, answers_of, left_out
from pgemu.report.formats import document
from pgemu.report.screen import screen
from pgemu.report.sweep import Combination, sweep
from pgemu.report.two_documents import answer_lines
from pgemu.trace import Lowered, Operation
from pgemu_kernels.words.operations import PAGE_2M
from random_traces import traces


def ends(value: Any) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)


def reached_by_less(trace: Lowered, size: int) -> Lowered:
    """The same with a slot of `size` bytes: what lies behind it no slot reaches."""
    length = trace.records.length.copy()
    length[trace.records.op == Operation.BIND] = size
    kept = (trace.records.op != Operation.GUEST_FAULT) | (trace.records.address < size)
    return replace(trace, records=replace(trace.records, length=length).take(np.flatnonzero(kept)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces(), st.sampled_from([PAGE_2M // 2, PAGE_2M, 4 * PAGE_2M]), st.sampled_from(["rfc2", "dec2025"]))
def test_a_difference_lies_within_what_both_values_allow(trace: Lowered, size: int, like: Any) -> None:
    first, second = compare(reached_by_less(trace, size), versions=Versions(like)).runs
    for unreached in (False, True):
        for found in measure(first, second, unreached=unreached).values():
            if found.first is None or found.second is None:
                assert found.difference is None
                continue
            (a, b), (c, d), (low, high) = ends(found.first), ends(found.second), ends(found.difference)
            assert c - b - 1e-3 <= low <= high <= d - a + 1e-3  # a thousandth of a nanosecond: sums of floats


def half_reached() -> Comparison:
    """Whole folios of 2M are zeroed, of the first of which slots reach a half."""
    return compare(reached_by_less(lowered(mixed_records()), PAGE_2M // 2), zero="folio")


def test_what_values_leave_out_is_said_in_every_form() -> None:
    comparison = half_reached()
    said = "times of both designs are without zeroing that no slot reaches (slot-reach)"
    assert said in screen(comparison, verdict(comparison), None)
    alone = compare(comparison.lowered, ("pfnmap",), zero="folio")
    assert said in screen(alone, {}, None)
    found = json.loads(document(comparison, None, "json"))
    assert {key: answer["without"] for key, answer in found["verdict"].items()} == {
        **dict.fromkeys(QUESTIONS, ""),
        "guest_faults": "slot-reach",
    }
    assert said in "\n".join(answer_lines(found, found))
    table = csv.DictReader(io.StringIO(document(comparison, None, "csv")))
    quantities = {row["key"]: row["quantity"] for row in table}
    assert quantities["answers.guest_faults.low"] == "guest faults, time (slot-reach), low"
    assert quantities["answers.conversions.low"] == "conversions, time, low"
    assert said in document(comparison, None, "markdown")
    for form in ("text", "markdown", "csv", "json"):
        assert "slot-reach" in sweep([Combination({"zero": "folio"}, comparison)], form)
    assert "slot-reach" not in screen(mixed(), verdict(mixed()), None)
    assert list(left_out([])) == []


def test_an_answer_of_an_older_document_leaves_out_nothing() -> None:
    data = json.loads(document(mixed(), None, "json"))["verdict"]["memory"]
    del data["without"]
    assert Answer.from_json(data).without == ""


def unmapped(*designs: int) -> Comparison:
    """A machine whose guest maps a page, and what it is when its slot is gone."""
    records = [*setup(), one(Operation.GUEST_FAULT, address=0)]
    runs = [compare(lowered([*records, *[one(Operation.UNBIND, address=0)] * gone])).runs for gone in (0, 1)]
    return replace(compare(lowered(records)), runs=tuple(runs[index in designs][index] for index in range(2)))


@pytest.mark.parametrize(("gone", "said"), [((), None), ((0,), "undecided"), ((1,), "undecided"), ((0, 1), "alike")])
def test_a_share_of_nothing_is_none_and_decides_nothing(gone: tuple[int, ...], said: str | None) -> None:
    comparison = unmapped(*gone)
    answer = answers_of(verdict(comparison), ["restructure", "pfnmap"])["level"]
    assert [cell == "none" for cell in answer.cells[:2]] == [index in gone for index in range(2)]
    assert said in (None, answer.said)
    assert (answer.difference is None) == bool(gone)
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
    assert answer.swapped().swapped() == answer
    row = next(line for line in screen(comparison, verdict(comparison), None).splitlines() if line[:6] == "leaves")
    assert row.startswith("leaves >= 2M, end ")
    assert row.split().count("none") == len(gone)
    for form in ("text", "markdown", "csv", "json"):
        assert sweep([Combination({"zero": "folio"}, comparison)], form)
    table = {one["key"]: one for one in csv.DictReader(io.StringIO(document(comparison, None, "csv")))}
    assert (table["answers.level"]["difference"] == "") == bool(gone)
    sensitivity(comparison)
