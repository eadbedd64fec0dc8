"""Claims about nested virtualisation: their verdicts, the figures behind them, and what turns them."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.experiments.claims.claim import Claim, Figure, Verdict
from pgemu.experiments.claims.nested import CLAIMS

BY_NAME = {claim.name: claim for claim in CLAIMS}
FOUR = 4


def tried(claim: Claim, **changes: Any) -> tuple[dict[str, Figure], Verdict]:
    figures = dict(claim.measure(claim.setting.changed(changes)))
    return figures, claim.judge(figures).verdict


def numbers(figures: dict[str, Figure]) -> tuple[list[Any], list[Any]]:
    """mapped, held, refused, looked up, stale, converted: of pfnmap, of restructure."""
    return [one.trial for one in figures.values()], [one.other for one in figures.values()]


RESTRUCTURE = [FOUR, FOUR * 1024, FOUR, 0, 0, FOUR]  # pinned: refused until it is let go of


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("name", ["nested-references", "nested-structures"])
def test_pfnmap_refuses_or_forgets_where_restructure_pins(name: str, unsafe: bool) -> None:
    figures, verdict = tried(BY_NAME[name], fields={"allow_unsafe_mappings": unsafe})
    pfnmap = [FOUR, 0, 0, 0, FOUR, FOUR] if unsafe else [0, 0, 0, 0, 0, FOUR]
    assert numbers(figures) == (pfnmap, RESTRUCTURE)
    structures = Verdict.PRICE if unsafe else Verdict.FALSE
    assert verdict is (Verdict.FALSE if name == "nested-references" else structures)


def test_caches_are_taken_away_in_both() -> None:
    figures, verdict = tried(BY_NAME["nested-caches"])
    assert numbers(figures) == ([FOUR, 0, 0, 0, 0, FOUR],) * 2
    assert verdict is Verdict.HOLDS
    figures, verdict = tried(BY_NAME["nested-caches"], own={"pfnmap": {"notifier": False}})
    assert numbers(figures)[0] == [FOUR, 0, 0, 0, FOUR, FOUR]
    assert verdict is Verdict.PART


def test_before_6_13_a_reference_comes_back_and_delays_nothing() -> None:
    figures, verdict = tried(BY_NAME["nested-references"], fields={"kernel": "6.12"})
    # Of VM_PFNMAP only the pages that are the first of a huge page; they are private, and in use.
    assert numbers(figures) == ([2, 2, 0, 0, 2, FOUR], [FOUR, FOUR, FOUR, 0, 0, FOUR])
    assert verdict is Verdict.PART


def test_the_other_design_turns_them() -> None:
    assert tried(BY_NAME["nested-references"], on_trial="restructure")[1] is Verdict.HOLDS
    assert tried(BY_NAME["nested-structures"], on_trial="restructure")[1] is Verdict.HOLDS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_the_documented_verdict_is_what_the_switches_give(claim: Claim) -> None:
    changes = [change for switch in claim.switches for change in switch.settings.values()] or [{}]
    found = [tried(claim, **change)[1] for change in changes]
    assert claim.expected is (found[0] if len(set(found)) == 1 else Verdict.DEPENDS)
