"""Logs that were read wrongly once (tests/data/cases), with what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.trace import Lowered, LoweringOptions, Operation, load, require_input
from pgemu.trace.guest_addresses import APIC, L2
from pgemu.trace.readers.ftrace import read

CASES = Path(__file__).parents[1] / "data" / "cases"


def test_perf_pads_names() -> None:
    log = read(CASES / "perf-script-padded-event.txt")
    assert (log.events, log.unknown) == (5, {})
    assert log.inputs == {"kvm_page_fault": 4, "kvm_unmap_hva_range": 1}


def test_call_chains_belong_to_their_event() -> None:
    log = read(CASES / "perf-callchains.txt")
    assert (log.events, log.inputs) == (2, {"kvm_page_fault": 2})
    assert log.skipped == {"lines of call chains": 4}


def test_latency_format() -> None:
    log = read(CASES / "latency-format.txt")
    assert log.inputs == {"page_fault_user": 1, "kvm_page_fault": 1}
    assert log.rows[:, 1].tolist() == [346277984000, 346278084000]


def test_the_last_line_needs_no_newline() -> None:
    log = read(CASES / "last-line-without-newline.txt")
    assert (log.inputs.total(), log.ignored.total()) == (2, 6)
    assert log.ignored["kvm_userspace_exit"] == 1


def lowered(name: str, page_size: int) -> Lowered:
    found = load(CASES / name, LoweringOptions(page_size=page_size))
    require_input(found)
    return found


def faults(found: Lowered) -> list[int]:
    return [int(address) for address in found.records.address[found.records.op == Operation.GUEST_FAULT]]


def test_a_td_s_shared_bit_is_no_part_of_the_address() -> None:
    found = lowered("tdx-shared-bit.txt", 1 << 21)
    assert [slot.gpa for slot in found.layout.slots] == [0x100000000]
    assert faults(found) == [0x100000000, 0x100010000, 0x100010000, 0x100020000]
    assert "bit 47" in found.notes[0]


def test_the_second_fault_is_an_l2_guest_s() -> None:
    found = lowered("nested-l2-address.txt", 1 << 30)
    assert faults(found) == [0x1050]
    assert found.accounting.without_operation == {L2: 1}


def test_the_apic_s_page_is_no_memory() -> None:
    found = lowered("apic-page-as-ram.txt", 1 << 30)
    assert (found.layout.inode_size, len(faults(found))) == (1 << 30, 3)
    assert found.accounting.without_operation == {APIC: 1}


def test_a_log_of_kvm_on_arm_has_no_input() -> None:
    with pytest.raises(InputError, match=r"no input in it, found 2 kvm_guest_fault \(of KVM on Arm, not read\)"):
        lowered("arm-log-says-nothing.txt", 1 << 30)
