"""The inferred rules stand in one table, and what a rule cannot touch stays as it is under its alternatives."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import rich_click as click
from hypothesis import HealthCheck, given, settings

from comparisons import converts_nothing, lowered, mixed, mixed_records
from pgemu.cli import main
from pgemu.experiments.compare import compare
from pgemu.experiments.inferences import INFERENCES
from pgemu.machine.config import Config
from pgemu.machine.presets import Versions
from pgemu.report.limits import LIMITS, limits_of
from pgemu.report.sources import METRIC_SOURCES, OPERATION_SOURCES, sources_of
from pgemu.trace import Lowered
from random_traces import traces

FEW = settings(max_examples=15, suppress_health_check=list(HealthCheck))
VERSIONS = {field.name for field in fields(Versions)}


def inferred() -> list[Any]:
    """Every row and limit that no source states."""
    rows = [source for table in (OPERATION_SOURCES, METRIC_SOURCES) for by_design in table.values()
            for row in by_design.values() for source in row]  # fmt: skip
    limits = [limit for design in LIMITS.values() for limit in design]
    unsaid = [*limits_of("of a row"), *sources_of({}, "of a row")]
    return [one for one in (*rows, *limits, *unsaid) if one.tag == "inference"]


def test_every_inference_of_the_report_names_its_rule() -> None:
    assert len(inferred()) > 5
    assert {one.function: one.rule for one in inferred() if one.rule not in INFERENCES} == {}


def test_the_rules_that_decide_something_are_in_the_table() -> None:
    assert INFERENCES.keys() >= {
        *("zap", "invalidate", "zero", "merge-zero", "pfnmap-zeroing", "pfnmap-level", "host-huge", "dec2025-order"),
        *("holes", "overlap", "slot-reach", "recorded-levels"),
    }
    assert all(rule.text and rule.source for rule in INFERENCES.values())


@pytest.mark.parametrize("name", INFERENCES)
def test_alternatives_change_what_exists_and_can_be_asked_for(name: str) -> None:
    compare_command = main.get_command(click.Context(main), "compare")
    assert compare_command
    options = {str(option.name) for option in compare_command.params}
    config = {field.name for field in fields(Config)}
    labels = [alternative.label for alternative in INFERENCES[name].alternatives]
    assert len(labels) == len(set(labels))
    for alternative in INFERENCES[name].alternatives:
        assert alternative.fields.keys() <= config & options
        assert alternative.versions.keys() <= VERSIONS & options
        assert alternative.trace.keys() <= options
        changes = (alternative.fields, alternative.versions, alternative.trace)
        assert any(changes) or alternative.unseen or alternative.unreached
        for design in alternative.designs:  # Config takes it
            alternative.changed(Versions()).configuration(design, pool=2 << 30, **alternative.fields)


def test_reasons_why_a_rule_touches_nothing() -> None:
    plain = converts_nothing()
    assert INFERENCES["zap"].untouched(plain) == "the trace has no conversion"
    assert INFERENCES["holes"].untouched(plain) == "the trace has no hole"
    assert INFERENCES["merge-zero"].untouched(plain) == "nothing is merged"
    assert INFERENCES["host-huge"].untouched(plain) == ""  # all of it is shared
    assert INFERENCES["overlap"].untouched(plain) == "no workload with that parameter"
    assert INFERENCES["recorded-levels"].untouched(plain) == ""
    everything = replace(plain, lowered=replace(plain.lowered, accesses=True))
    assert INFERENCES["recorded-levels"].untouched(everything) == "not a log, but all accesses"
    assert INFERENCES["private-level"].untouched(plain) == "not a TDX VM"
    # One conversion is -EAGAIN on restructure, a block is merged, a hole is made, no 2M block is all shared.
    for rule in ("zap", "holes", "dec2025-order", "pfnmap-holes-unmap"):
        assert INFERENCES[rule].untouched(mixed()) == ""
    assert INFERENCES["merge-zero"].untouched(mixed()) == "defect uptodate-unzeroed: a merge does not look"
    assert INFERENCES["merge-zero"].untouched(compare(lowered(mixed_records()), zero="page")) == ""
    assert INFERENCES["host-huge"].untouched(mixed()) == "no host fault is in a 2M block that is all shared"


@FEW
@given(traces())
def test_orders_count_the_same_where_no_conversion_fails_on_the_way(trace: Lowered) -> None:
    base = compare(trace, ["restructure"])
    if INFERENCES["dec2025-order"].untouched(base):
        other = compare(trace, ["restructure"], order="jan2026")
        assert np.array_equal(base.runs[0].statistics.events, other.runs[0].statistics.events)
        assert base.runs[0].operations == other.runs[0].operations


@FEW
@given(traces())
def test_larger_host_entries_come_only_where_a_block_is_all_shared(trace: Lowered) -> None:
    base = compare(trace, ["pfnmap"])
    if INFERENCES["host-huge"].untouched(base):
        other = compare(trace, ["pfnmap"], host_huge=True)
        assert np.array_equal(base.runs[0].statistics.events, other.runs[0].statistics.events)
