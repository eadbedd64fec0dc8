"""Every row that is printed says what it models."""

from __future__ import annotations

import re

import pytest

from comparisons import converts_nothing, lowered, mixed
from pgemu.experiments.compare import DESIGNS, compare
from pgemu.experiments.metrics import METRICS
from pgemu.report.limits import LIMITS
from pgemu.report.plain_sources import sources
from pgemu.report.sources import METRIC_SOURCES, OPERATION_SOURCES, TAGS, Source
from pgemu.trace import Operation, Records

FUNCTION = re.compile(r"[a-z0-9_/-]+\.[ch]:[a-z0-9_]+")


def simulated() -> set[Operation]:
    """What a machine does not answer with -EOPNOTSUPP."""
    every = compare(lowered([Records.build(1, op=op) for op in Operation]), ["pfnmap"]).runs[0]
    return {run.operation for run in every.operations if "-EOPNOTSUPP" not in run.outcomes}


def test_every_simulated_operation_has_a_source_in_each_design() -> None:
    assert set(OPERATION_SOURCES) == simulated()
    for by_design in OPERATION_SOURCES.values():
        assert set(by_design) == set(DESIGNS)


def test_every_metric_has_a_source_in_each_design() -> None:
    assert set(METRIC_SOURCES) == {metric.key for metric in METRICS}
    for by_design in METRIC_SOURCES.values():
        assert set(by_design) == set(DESIGNS)


def all_sources() -> list[Source]:
    tables = [*OPERATION_SOURCES.values(), *METRIC_SOURCES.values()]
    return [source for by_design in tables for row in by_design.values() for source in row]


def test_every_row_names_something_with_a_known_tag() -> None:
    for source in all_sources():
        assert source.tag in TAGS
        assert source.function
    for by_design in (*OPERATION_SOURCES.values(), *METRIC_SOURCES.values()):
        assert all(by_design.values())


def test_what_is_in_the_tree_names_a_function() -> None:
    for source in all_sources():
        if source.tag in ("main", "next"):
            assert FUNCTION.match(source.function), source


@pytest.mark.parametrize("design", DESIGNS)
def test_every_limit_names_a_function(design: str) -> None:
    for limit in LIMITS[design]:
        assert FUNCTION.fullmatch(limit.function)
        assert limit.tag in TAGS


def test_the_document_carries_all_of_them() -> None:
    found = sources(mixed())
    assert found["operations"]["convert"]["pfnmap"][0] == {
        "function": "conversion only unmaps, no gate",
        "tag": "slides",
        "rule": "",
    }
    assert set(found["state"]) == set(METRIC_SOURCES)
    assert found["prices_ns"]["leaf_written"]["each"] == [20, 40]
    assert len(found["limits"]["pfnmap"]) == len(LIMITS["pfnmap"])
    assert sources(converts_nothing()) == found
