"""Logs that were read wrongly once (tests/data/cases), with what is right."""

from __future__ import annotations

from pathlib import Path

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
