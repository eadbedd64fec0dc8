"""Every real log and every workload runs on both designs, operation by operation, and no rule is broken."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.experiments.compare import Comparison, compare
from pgemu.trace import LoweringOptions, Operation, load, shipped

FOLDER = Path(os.environ.get("PGEMU_TRACES", Path(__file__).parents[1] / "data" / "traces"))
FILES = sorted(str(path) for pattern in ("ftrace-*.txt.xz", "vm-*.txt.xz") for path in FOLDER.glob(pattern))


@cache
def compared(name: str, page_size: int) -> Comparison:
    # The captures of KVM's events are of many VMs, one after the other, and no line names a process.
    several = Path(name).name.startswith("ftrace-kvm")
    options = LoweringOptions(page_size=page_size, vm_processes=("all",) if several else ())
    return compare(load(name, options), check="every")


def assert_sound(comparison: Comparison) -> None:
    document = comparison.to_json()
    for run in comparison.runs:  # the defect that dec2025 has is found where a folio is used before it is split
        broken = [(rule.rule.name, rule.explained_by) for rule in run.finding.rules] if run.finding else []
        assert broken in ([], [("STALE_CONTENTS", ("uptodate-unzeroed",))])
        assert not broken or run.design == "restructure"
    for design in document["designs"].values():
        assert design["count"] == document["trace"]["records"] == document["trace"]["accounting"]["operations"]
        assert sum(op["count"] for op in design["operations"].values()) == design["count"]
        assert "-EOPNOTSUPP" not in {name for op in design["operations"].values() for name in op["outcomes"]}
        assert design["end_of_life"]["pool_free"] == design["end_of_life"]["pool"]
        assert design["end_of_life"]["vmemmap"] == design["end_of_life"]["vmemmap_at_boot"]


def test_there_are_logs() -> None:
    assert len(FILES) >= 9


@pytest.mark.parametrize("page_size", [1 << 30, 1 << 21], ids=["1G", "2M"])
@pytest.mark.parametrize("name", FILES, ids=lambda name: Path(name).name.split(".")[0])
def test_real_logs(name: str, page_size: int) -> None:
    if Path(name).name.startswith("ftrace-page-faults"):  # of programs
        with pytest.raises(InputError, match="a process's memory, no VM's: pgemu replay runs it"):
            compared(name, page_size)
        return
    assert_sound(compared(name, page_size))


def test_the_boot_of_a_confidential_guest() -> None:
    comparison = compared("workload:tdx-boot", 1 << 30)
    assert_sound(comparison)
    restructure, pfnmap = comparison.runs
    for run in comparison.runs:
        conversions = run.operation(Operation.CONVERT)
        assert conversions
        assert conversions.count >= 1000
    # Flipping a few hot pages splits and merges their 1G page each time; nothing like it happens under VM_PFNMAP.
    assert restructure.to_json()["state"]["folios_split"] >= 1000
    assert pfnmap.to_json()["state"]["folios_split"] == 0


def test_the_shipped_trace() -> None:
    restructure, pfnmap = compared(str(shipped()), 1 << 30).runs
    for run in (restructure, pfnmap):
        counts = {op: found.count for op in Operation if (found := run.operation(op))}
        assert counts[Operation.GUEST_FAULT] == 16825
        assert counts[Operation.CONVERT] == 445
    # The first 2 MiB stay shared to the end, so the only 1G page is split once and never merged.
    assert restructure.to_json()["state"]["huge_pages_split"] == 1
    assert restructure.to_json()["state"]["stage2_mapped_2m"] == 0
    assert pfnmap.to_json()["state"]["huge_pages_split"] == 0
