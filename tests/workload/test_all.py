"""What holds for every workload: equal seeds make equal traces, sums come out, both designs run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu import workload
from pgemu.errors import InputError
from pgemu.experiments.compare import compare
from pgemu.trace import LoweringOptions, Operation, load
from pgemu.trace.schema import DTYPES

MIB = 1 << 20

# Small ones, that run in no time.
SMALL: dict[str, dict[str, float]] = {
    "tdx-boot": {},
    "assigned-boot": {},
    "dma-steady": {"guest_memory": 128 * MIB, "flips": 5, "accesses": 4},
    "snp-accept": {"guest_memory": 256 * MIB, "vcpus": 20},
    "swiotlb-steady": {"guest_memory": 128 * MIB, "requests": 500, "conversions": 500},
    "convert-loop": {"guest_memory": 4 * MIB, "iterations": 2},
    "balloon": {"guest_memory": 16 * MIB, "inflated": 8 * MIB, "rounds": 2, "scattered": 0.5, "reused": 0.5},
    "random": {"guest_memory": 16 * MIB, "operations": 2000, "zipf": 1.1, "remap": 1, "pin": 1, "nested_map": 1},
}
DRAWS_NOTHING = {"convert-loop"}
NEW = [name for name in SMALL if name not in ("tdx-boot", "assigned-boot", "dma-steady")]  # those have their own


def test_each_is_here() -> None:
    assert SMALL.keys() == workload.WORKLOADS.keys()


@pytest.mark.same_with_checks
@pytest.mark.parametrize("name", SMALL)
def test_equal_seeds_make_equal_traces(name: str) -> None:
    one, same, other = (workload.open(name, seed, **SMALL[name]) for seed in (5, 5, 6))
    assert all(np.array_equal(getattr(one.records, column), getattr(same.records, column)) for column in DTYPES)
    assert all(np.array_equal(getattr(one.records, column), getattr(other.records, column)) for column in DTYPES) == (
        name in DRAWS_NOTHING
    )
    one.records.check(name)
    assert one.accounting.balanced()
    assert one.source == f"workload:{name}"
    assert np.all(np.diff(one.records.time.astype(np.int64)) >= 0)
    assert {*one.machine} <= {"vm", "stage2", "vcpus"}


@pytest.mark.same_with_checks
@pytest.mark.parametrize("name", SMALL)
def test_it_says_what_it_is_and_which_parameters_it_has(name: str) -> None:
    row = workload.WORKLOADS[name]
    assert row.what
    assert row.anchors
    assert tuple(workload.defaults_of(f"workload:{name}")) == workload.parameters_of(name)
    given = {key: value for key, value in workload.defaults_of(name).items() if value is not None}
    assert all(isinstance(value, int | float) for value in given.values())


@pytest.mark.same_with_checks
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", True, 1e30])
def test_what_is_no_parameter_is_refused(name: str, value: Any) -> None:
    for parameter in workload.parameters_of(name):
        with pytest.raises(InputError, match=f"^workload:{name}: .*{parameter}.*: expected "):
            workload.open(name, **{parameter: value})


@pytest.mark.same_with_checks
def test_a_parameter_of_another_workload_is_refused() -> None:
    with pytest.raises(InputError, match=r"^workload:balloon: flips: expected some of guest_memory, inflated, unit"):
        workload.open("balloon", flips=1)


@pytest.mark.parametrize("name", NEW)
def test_both_designs_run_it_without_a_broken_invariant(name: str) -> None:
    found = compare(load(f"workload:{name}", LoweringOptions(page_size=2 * MIB), 1, **SMALL[name]), check="every")
    assert not found.broken
    for run in found.runs:
        outcomes = run.to_json()["operations"]
        assert "-EOPNOTSUPP" not in {one for operation in outcomes.values() for one in operation["outcomes"]}


def test_devices_of_a_random_mix_run() -> None:
    """One of 20 maps memory for a device, at most 128 at once; what pfnmap maps has no pages to pin."""
    parameters = {**SMALL["random"], "dma_map": 5}
    found = compare(load("workload:random", LoweringOptions(page_size=2 * MIB), 1, **parameters), check="every")
    assert not found.broken
    counts = {run.design: run.operation(Operation.DMA_ACCESS) for run in found.runs}
    assert all(one and one.count > 40 for one in counts.values())
