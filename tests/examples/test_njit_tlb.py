"""The example of a simulator's own TLB: valid because edits say what to drop, and not otherwise."""

from __future__ import annotations

import pytest

from pgemu.examples import njit_tlb


def test_no_entry_is_stale_while_what_edits_return_is_dropped() -> None:
    counts, wrong = njit_tlb.simulate(40_000)
    assert wrong == 0
    assert counts[njit_tlb.HITS] + counts[njit_tlb.MISSES] == 40_000
    assert (counts > 0).all()
    _, wrong = njit_tlb.simulate(40_000, flush=False)
    assert wrong > 0


def test_it_says_what_it_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = njit_tlb.simulate
    monkeypatch.setattr(njit_tlb, "simulate", lambda accesses, **more: small(accesses // 100, **more))
    njit_tlb.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hits", "misses", "faults", "edits", "entries", "stale", "..."]
    assert lines[-2].split()[-1] == "0"
