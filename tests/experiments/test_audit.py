"""The audit: verdicts are the documented ones, follow from what was measured, and turn where it is otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.experiments.audit import CLAIMS, Audited, Outcome, audit, try_claim
from pgemu.experiments.claims.claim import Claim, Figure, Found, Verdict

RESTRUCTURE = {"on_trial": "restructure"}
# Under what verdicts are others: with the other design in the place of the one on trial, or as said. Nothing that a
# machine can be told turns those that are not here.
TURNED: dict[str, dict[str, Any]] = {
    "no-restructuring": RESTRUCTURE,
    "no-hvo-churn": RESTRUCTURE,
    "no-reserve": RESTRUCTURE,
    "no-page-type": RESTRUCTURE,
    "runtime-cost": RESTRUCTURE,
    "struct-page-bytes": RESTRUCTURE,
    "conversion-not-refused": RESTRUCTURE,
    "transient-references": RESTRUCTURE,
    "stays-mapped": {"own": {"pfnmap": {"in_place_conversion": False}}},
    "level-from-shareability": RESTRUCTURE,
    "user-mappings-1g": {"own": {"pfnmap": {"host_huge": True}}},
    "not-outlive-inode": {**RESTRUCTURE, "held": 2},
    "cleanup-at-release": {**RESTRUCTURE, "held": 2},
    "no-merge-after-close": RESTRUCTURE,
    "cannot-gup": RESTRUCTURE,
    "vfio-maps-ram": RESTRUCTURE,
    "iommufd-cannot": RESTRUCTURE,
    "vfio-bar-not-ram": RESTRUCTURE,
    "vfio-unchecked-unpins": RESTRUCTURE,
    "devices-need-no-kernel": {"door": "iommufd mirror"},
    "stale-entry-private": RESTRUCTURE,
    "stale-entry-freed": RESTRUCTURE,
    "not-unmapping-is-a-policy": {"fields": {"vm": "snp", "stage2": "npt"}, "unit": "amd"},
    "large-entries-follow": {"door": "iommufd revoke"},
    "revoke-is-exact": {"door": "iommufd mirror"},
    "nested-references": RESTRUCTURE,
    "nested-structures": RESTRUCTURE,
    "nested-caches": {"own": {"pfnmap": {"notifier": False}}},
    "no-memory-failure-race": RESTRUCTURE,
    "poison-inside-1g": {**RESTRUCTURE, "shared": True},
}


@pytest.fixture(scope="module")
def audited() -> dict[str, Audited]:
    return {one.claim.name: one for one in audit()}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_verdict_is_the_documented_one(claim: Claim, audited: dict[str, Audited]) -> None:
    assert audited[claim.name].verdict is claim.expected


@pytest.mark.parametrize("claim", [one for one in CLAIMS if one.name in TURNED], ids=lambda claim: claim.name)
def test_a_verdict_turns_with_what_it_is_about(claim: Claim, audited: dict[str, Audited]) -> None:
    setting = claim.setting
    for switch in claim.switches:
        setting = setting.changed(next(iter(switch.settings.values())))
    setting = setting.changed(TURNED[claim.name])
    found = claim.judge(claim.measure(setting))
    assert found.verdict is not audited[claim.name].outcomes[0].found.verdict
    assert found.why != audited[claim.name].outcomes[0].found.why


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_each_switch_has_an_outcome_of_its_own(claim: Claim, audited: dict[str, Audited]) -> None:
    settings = [(switch.name, label) for switch in claim.switches for label in list(switch.settings)[1:]]
    assert [(one.switch, one.label) for one in audited[claim.name].outcomes[1:]] == settings
    assert (claim.expected is Verdict.DEPENDS) == bool(audited[claim.name].turns)


def _others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, str):
        return [{"True": "False", "ok": "-EFAULT"}.get(value, "ok")]
    return [other for other in (0, 1, 3, 10**12) if other != value]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_verdict_follows_from_the_figures_alone(claim: Claim, audited: dict[str, Audited]) -> None:
    """Some other figures give another verdict, the same ones the same."""
    first = audited[claim.name].outcomes[0]
    assert claim.judge(first.figures) == first.found
    others = [
        claim.judge({**first.figures, name: figure._replace(trial=other)})
        for name, figure in first.figures.items()
        for other in _others(figure.trial)
    ]
    assert {found.verdict for found in others} - {first.found.verdict}


def test_a_verdict_that_is_not_documented_is_said_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = replace(CLAIMS[0], expected=Verdict.FALSE)
    monkeypatch.setattr("pgemu.experiments.audit.CLAIMS", (claim,))
    result = CliRunner().invoke(main, ["audit"])
    assert result.exit_code == 1
    assert f"{claim.name}: holds (documented: does not hold)\n" in result.stdout


def test_what_is_printed() -> None:
    names = ["user-mappings-1g", "vfio-maps-ram"]
    result = CliRunner().invoke(main, ["audit", "--only", names[0], "--only", names[1]])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "2 claims, each tried on machines of both designs: 1 depends, 1 does not hold"
    assert [line.split(":")[0] for line in lines if line and not line.startswith(" ")][1:] == names
    assert "  holds (host_huge with a huge_fault handler): level 3 against 1 (1: 4K, 2: 2M," in lines
    table = CliRunner().invoke(main, ["audit", "--only", names[1], "--format", "markdown"]).stdout.splitlines()
    assert [line.count("|") for line in table] == [5, 5, 5]
    found = json.loads(CliRunner().invoke(main, ["audit", "--only", names[0], "--json"]).stdout)["claims"]
    assert [one["verdict"] for one in found[0]["outcomes"]] == ["does not hold", "holds"]
    assert found[0]["outcomes"][1]["figures"]["level"]["on_trial"] == 3


def test_bad_input() -> None:
    result = CliRunner().invoke(main, ["audit", "--only", "gup"])
    assert result.exit_code == 2
    assert result.stderr.startswith("pgemu: --only: claim 'gup': expected one of no-restructuring, ")
    assert result.stderr.count("\n") == 1


def test_names_are_listed() -> None:
    listed = CliRunner().invoke(main, ["audit", "--list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [claim.name for claim in CLAIMS]
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_a_claim_depends_where_a_setting_turns_it() -> None:
    figure = {"n": Figure("n", 1, 2)}
    one = replace(CLAIMS[0], expected=Verdict.DEPENDS)
    holds, in_part = Found(Verdict.HOLDS, ""), Found(Verdict.PART, "")
    same = Audited(one, (Outcome("", "", figure, holds), Outcome("s", "a", figure, holds)))
    turned = Audited(one, (*same.outcomes, Outcome("s", "b", figure, in_part)))
    assert (same.verdict, same.as_documented) == (Verdict.HOLDS, False)
    assert (turned.verdict, turned.as_documented) == (Verdict.DEPENDS, True)
    assert try_claim(CLAIMS[0]).verdict is Verdict.HOLDS
