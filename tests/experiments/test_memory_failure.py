"""Memory failure in a trace: both designs run it, and what rests on a rule is tried the other way."""

from __future__ import annotations

from comparisons import HVA, lowered, one, setup
from pgemu.experiments.compare import compare
from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.sensitivity import sensitivity
from pgemu.trace import Flag, Operation, Records
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K


def records() -> list[Records]:
    """A page of a whole huge page fails, and one that host and guest share. Restructure first, where they differ."""
    return [
        *setup(),
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=PAGE_4K),
        one(Operation.HOST_FAULT, Flag.WRITE, address=HVA),  # VM_FAULT_LOCKED or VM_FAULT_NOPAGE
        one(Operation.GUEST_FAULT, address=0),
        one(Operation.GUEST_FAULT, address=PAGE_2M),  # RET_PF_FIXED at 2M
        one(Operation.MEMORY_FAILURE, offset=0),  # -EBUSY
        one(Operation.MEMORY_FAILURE, offset=PAGE_2M + PAGE_4K),  # -EBUSY
        one(Operation.HOST_FAULT, address=HVA),  # VM_FAULT_HWPOISON, or present
        one(Operation.GUEST_FAULT, address=0),  # -EHWPOISON
        one(Operation.GUEST_FAULT, address=PAGE_2M),  # -EHWPOISON
        one(Operation.CONVERT, Flag.PRIVATE, offset=0, length=PAGE_4K),  # -EHWPOISON, for it would be merged, or ok
        one(Operation.CONVERT, Flag.SHARED, offset=PAGE_2M, length=PAGE_4K),  # -EHWPOISON, for it would be split, or ok
    ]


def test_both_designs_run_what_a_trace_says() -> None:
    comparison = compare(lowered(records()), check="every")
    outcomes = {
        run.design: {op.name: dict(run.operation(op).outcomes) for op in (
            Operation.HOST_FAULT, Operation.GUEST_FAULT, Operation.MEMORY_FAILURE, Operation.CONVERT,
        )}
        for run in comparison.runs
    }  # fmt: skip
    assert outcomes["restructure"] == {
        "HOST_FAULT": {"VM_FAULT_LOCKED": 1, "VM_FAULT_HWPOISON": 1},
        "GUEST_FAULT": {"RET_PF_FIXED": 2, "-EHWPOISON": 2},
        "MEMORY_FAILURE": {"-EBUSY": 2},
        "CONVERT": {"ok": 1, "-EHWPOISON": 2},
    }
    assert outcomes["pfnmap"] == {
        "HOST_FAULT": {"VM_FAULT_NOPAGE": 1, "present": 1},
        "GUEST_FAULT": {"RET_PF_FIXED": 2, "-EHWPOISON": 2},
        "MEMORY_FAILURE": {"-EBUSY": 2},
        "CONVERT": {"ok": 3},
    }
    # The first page of a huge page alone is zeroed: the defect of the version.
    found = [rule for run in comparison.runs if run.finding for rule in run.finding.rules]
    assert {rule.explained_by for rule in found} == {("uptodate-unzeroed",)}


def test_the_rules_that_no_source_states_are_tried_the_other_way() -> None:
    comparison = compare(lowered(records()))
    found = sensitivity(comparison)
    assert {"memory-failure-huge", "poisoned-blocks"} <= {name for trial in found.trials for name in [trial.rule]}
    assert INFERENCES["memory-failure-huge"].untouched(compare(lowered(setup()))) == "the trace has no memory failure"
