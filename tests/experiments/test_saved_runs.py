"""A machine that is saved in the middle of a trace, or copied, ends with the JSON that the machine itself ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pgemu
from pgemu import Lowered, Machine
from pgemu.experiments.compare import DesignRun, OperationRun, run
from pgemu.experiments.configuration import configuration
from pgemu.experiments.setting_up import boot, fill
from pgemu.machine.presets import Versions
from pgemu.machine.results import operation_name
from pgemu_kernels.words.operations import Operation

VERSIONS = Versions()
# What compare's document has of a run beside what the machine's own words say.
BESIDE = ("end_of_life", "broken", "devices")


def shortened(name: str, records: int) -> Lowered:
    trace = pgemu.load(f"workload:{name}")
    return replace(trace, records=trace.records[:records])


def document(machine: Machine, outcomes: list[Any], like: DesignRun) -> str:
    """Everything that a comparison tells of a design, and what each record of the rest returned."""
    statistics = machine.statistics
    collected = (OperationRun.of(statistics, op) for op in Operation)
    ended = replace(like, statistics=statistics, operations=tuple(one for one in collected if one), worst={})
    told = {name: value for name, value in ended.to_json().items() if name not in BESIDE}
    return json.dumps({"rest": outcomes, **told})


def rest_of(machine: Machine, trace: Lowered, cut: int) -> list[Any]:
    records = trace.records[cut:]
    results = machine.run(records)
    columns = zip(records.op.tolist(), results.status.tolist(), results.detail.tolist(), strict=True)
    return [(operation_name(Operation(op)), status, detail) for op, status, detail in columns]


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@pytest.mark.parametrize(("name", "records"), [("tdx-boot", 4000), ("dma-steady", 2500), ("random", 2500)])
def test_the_rest_of_a_trace_gives_the_same_json(name: str, records: int, design: Any, tmp_path: Path) -> None:
    trace = shortened(name, records)
    config = configuration(trace, design, VERSIONS, {})
    whole = run(trace, config, VERSIONS)
    machine = boot(trace, config)
    fill(machine, trace)
    cut = len(trace.records) // 2
    assert cut > 1000
    machine.run(trace.records[:cut])
    machine.save(tmp_path / "machine")
    others = [Machine.open(tmp_path / "machine"), machine.copy()]
    told = document(machine, rest_of(machine, trace, cut), whole)
    for other in others:
        assert document(other, rest_of(other, trace, cut), whole) == told
    of_whole = document(machine, [], whole)
    ends = {key: value for key, value in whole.to_json().items() if key not in BESIDE}
    for one in ends["operations"].values():
        one["worst_record"] = None
    assert json.loads(of_whole) == {"rest": [], **json.loads(json.dumps(ends))}
