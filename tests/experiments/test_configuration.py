"""What a machine has from its trace, and what no machine can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from comparisons import lowered, mixed_records, one, setup
from pgemu.errors import InputError
from pgemu.experiments.compare import compare
from pgemu.experiments.configuration import configuration
from pgemu.machine.presets import Versions
from pgemu.machine.vm_kinds import KINDS
from pgemu.trace import Flag, Lowered, Operation
from random_traces import traces


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(traces(), st.sampled_from(sorted(KINDS)))
def test_memory_that_begins_private_needs_a_vm_that_has_it(trace: Lowered, kind: Any) -> None:
    refused = trace.init == "private" and not KINDS[kind].private
    for design in ("restructure", "pfnmap"):
        if refused:
            with pytest.raises(InputError, match=f"^vm {kind}: it has no private memory, and .*: expected one of sw, "):
                configuration(trace, design, Versions(), {"vm": kind})  # type: ignore[arg-type]
        else:
            assert configuration(trace, design, Versions(), {"vm": kind}).vm == kind  # type: ignore[arg-type]


def test_why_memory_is_private_is_said() -> None:
    fault = lowered([*setup(), one(Operation.GUEST_FAULT, Flag.PRIVATE, address=0)])
    for trace, why in (
        (lowered(mixed_records()), "the trace converts"),
        (fault, "the trace has private guest faults"),
        (lowered(setup()), "memory is private at first"),
    ):
        with pytest.raises(InputError, match=f"no private memory, and {why}: expected one of"):
            compare(trace, vm="plain")
        compare(trace)
    compare(lowered(mixed_records(), "shared"), vm="plain")
