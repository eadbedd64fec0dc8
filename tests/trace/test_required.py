"""A trace of which nothing concerns guest memory is refused, with what it has instead and what to record."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import LoweringOptions, load, require_input
from pgemu.trace.events import IGNORED, LEVELS, OUTCOMES
from pgemu.trace.lowering import lower
from pgemu.trace.readers.ftrace import _Parser
from pgemu.trace.schema import Operation

pytestmark = pytest.mark.same_with_checks

HEAD = "vmm-10 [000] ..... 1.000000: "
SLOT = "kvm_memslot: slot=0 flags=0 gpa=0 size=0x200000 hva=0x7f0000000000"
FAULT = "kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006"


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (["kvm_guest_fault: ipa 0x40000000, hsr 0x92000007"], "found 1 kvm_guest_fault (of KVM on Arm, not read): "),
        (
            ["sched_switch: a"] * 3 + ["kvm_exit: b"],
            "found 3 sched_switch, 1 kvm_exit: record kvm:kvm_page_fault (address, error",
        ),
        (["page_fault_user: address=0x7f00 ip=0x1 error_code=0x14"], "a process's memory, no VM's: pgemu replay"),
        (["kvm_page_fault: vcpu 0 rip 0x0 address 0xfee00000 error_code 0x182"], "found 1 page of the local APIC: "),
        (["vcpu 0 rip 0x0 address 0x1000"], "found 1 (no event name) (perf script -F +event prints it): record"),
        ([SLOT], "no input but memory slots in it, found nothing: record kvm:kvm_page_fault"),
        ([f"{name}: x" for name in "abcdef"], "found 1 a, 1 b, 1 c, 1 d and 2 more: record"),
    ],
)
def test_what_was_found_instead_is_said(tmp_path: Path, events: list[str], found: str) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"{HEAD}{event}\n" for event in events))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{re.escape(found)}"):
        require_input(load(path))


@pytest.mark.parametrize("events", [[FAULT], [SLOT, FAULT], ["kvm_vm_set_mem_attributes: 0x0 -- 0x200 [0x8]"]])
def test_a_trace_with_an_input_is_taken(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"{HEAD}{event}\n" for event in events))
    require_input(load(path))


_NO_INPUTS = sorted(
    {name for name in (OUTCOMES - LEVELS) | IGNORED if name[0] != "<" and name[:4] != "sys_"}
    | {"kvm_guest_fault", "kvm_access_fault", "kvm_exit_riscv", "sched_switch", "ept_violation", "page_faults"}
)  # fmt: skip


@given(st.lists(st.sampled_from(_NO_INPUTS), min_size=1, max_size=12))
def test_other_events_alone_are_no_input_and_the_most_frequent_are_named(events: list[str]) -> None:
    parser = _Parser("log")
    parser.feed("".join(f"{HEAD}{event}: x\n" for event in events))
    with pytest.raises(InputError, match=r"no input in it, found .*record kvm:kvm_page_fault") as caught:
        require_input(lower(parser.finish(), LoweringOptions()))
    most = max(events.count(event) for event in set(events))
    first = re.search(r"found (\d+) (\w+)", str(caught.value))
    assert first is not None
    assert (int(first[1]), events.count(first[2])) == (most, most)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_without_an_input_is_told_what_rows_it_needs(tmp_path: Path, rows: int) -> None:
    path = str(tmp_path / "table.parquet")
    columns = {"op": [int(Operation.BIND)] * rows, "address": [0] * rows, "offset": [0] * rows, "length": [4096] * rows}
    pq.write_table(pa.table({name: pa.array(values, "uint64") for name, values in columns.items()}), path)
    found = load(path)
    assert found.table
    with pytest.raises(InputError, match=r"expected rows of guest fault, .* in columns op; flags, address") as caught:
        require_input(found)
    assert "record kvm" not in str(caught.value)
