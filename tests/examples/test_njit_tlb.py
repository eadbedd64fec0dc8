"""The example of a simulator's own TLB: valid because edits say what to drop, and not otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.examples import njit_tlb
from pgemu.machine.designs import DESIGNS


def test_no_entry_is_stale_while_what_edits_return_is_dropped() -> None:
    counts, wrong = njit_tlb.simulate(40_000)
    assert wrong == 0
    assert counts[njit_tlb.HITS] + counts[njit_tlb.MISSES] == 40_000
    assert (counts > 0).all()
    _, wrong = njit_tlb.simulate(40_000, flush=False)
    assert wrong > 0


@pytest.mark.parametrize("design", DESIGNS)
def test_a_guest_s_tlb_is_right_if_it_is_emptied_when_flushes_of_vms_were_counted(design: Any) -> None:
    counts, wrong = njit_tlb.simulate_vm(20_000, design)
    assert wrong == 0
    assert counts[njit_tlb.EDITS] == 20_000 // 64
    assert (counts > 0).all()


def test_dropping_the_range_of_a_conversion_is_not_enough() -> None:
    counts, wrong = njit_tlb.simulate_vm(20_000, "pfnmap", how=njit_tlb.BY_RANGE)
    assert counts[njit_tlb.EDITS] == 20_000 // 64
    assert wrong > 0


def test_it_says_what_it_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small, small_vm = njit_tlb.simulate, njit_tlb.simulate_vm
    monkeypatch.setattr(njit_tlb, "simulate_vm", lambda accesses, **more: small_vm(accesses // 100, **more))
    monkeypatch.setattr(njit_tlb, "simulate", lambda accesses, **more: small(accesses // 100, **more))
    njit_tlb.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["hits", "misses", "faults", "edits", "entries", "stale", "..."]
    assert lines[-3].split()[-1] == "0"
    assert lines[-1].startswith("guest: 31 conversions, 0 stale; ")
