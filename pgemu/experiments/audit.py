"""The audit: claims that were made about pfnmap, their experiments run on both designs, and what came of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pgemu.experiments.claims import conversion, devices, io_entries, life, nested, poison, structure, users
from pgemu.experiments.claims.claim import Claim, Figure, Found, Setting, Switch, Verdict
from pgemu.machine.arguments import guards

__all__ = ("CLAIMS", "Audited", "Outcome", "audit", "document", "try_claim")

CLAIMS: tuple[Claim, ...] = tuple(
    claim for part in (structure, conversion, life, users, nested, devices, io_entries, poison) for claim in part.CLAIMS
)
"""In the order in which they are printed."""


class Outcome(NamedTuple):
    """What an experiment gave under one setting of a switch; of the first run `switch` and `label` are ""."""

    switch: str
    label: str
    figures: dict[str, Figure]
    found: Found


@dataclass(frozen=True)
class Audited:
    """A claim and its outcomes, the first run's first."""

    claim: Claim
    outcomes: tuple[Outcome, ...]

    @property
    def turns(self) -> list[Outcome]:
        """The outcomes under other settings whose verdict is not that of the first run."""
        return [one for one in self.outcomes[1:] if one.found.verdict is not self.outcomes[0].found.verdict]

    @property
    def verdict(self) -> Verdict:
        """The first run's, or that it depends on a switch."""
        return Verdict.DEPENDS if self.turns else self.outcomes[0].found.verdict

    @property
    def as_documented(self) -> bool:
        """Whether the verdict is the one that the claim's row says."""
        return self.verdict is self.claim.expected


def _run(claim: Claim, setting: Setting, switch: str = "", label: str = "") -> Outcome:
    figures = claim.measure(setting)
    return Outcome(switch, label, figures, claim.judge(figures))


def _alternatives(switch: Switch) -> Iterable[tuple[str, Any]]:
    return list(switch.settings.items())[1:]


def try_claim(claim: Claim, setting: Setting | None = None) -> Audited:
    """Run a claim's experiment, as it is and under each other setting of its switches."""
    first = claim.setting if setting is None else setting
    for switch in claim.switches:
        first = first.changed(next(iter(switch.settings.values())))
    outcomes = [_run(claim, first)]
    for switch in claim.switches:
        for label, changes in _alternatives(switch):
            outcomes.append(_run(claim, first.changed(changes), switch.name, label))
    return Audited(claim, tuple(outcomes))


@guards()
def audit(only: Iterable[str] = ()) -> list[Audited]:
    """Try all claims, or those named. ValueError for a name that is none.

    >>> [one.verdict.name for one in audit(["no-page-type"])]
    ['DEPENDS']
    """
    wanted = list(only)
    known = {claim.name: claim for claim in CLAIMS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"claim {name!r}: expected one of {', '.join(known)}")
    return [try_claim(claim) for claim in (map(known.__getitem__, wanted) if wanted else CLAIMS)]


def document(audited: Iterable[Audited]) -> list[dict[str, Any]]:
    """What was found, for JSON."""
    return [
        {
            "name": one.claim.name,
            "kind": one.claim.kind,
            "claim": one.claim.claim,
            "by": one.claim.by,
            "tried": one.claim.tried,
            "verdict": one.verdict.value,
            "as_documented": one.as_documented,
            "evidence": one.claim.evidence.value,
            "note": one.claim.note or None,
            "switches": {switch.name: switch.source or None for switch in one.claim.switches},
            "outcomes": [
                {
                    "switch": outcome.switch or None,
                    "setting": outcome.label or None,
                    "verdict": outcome.found.verdict.value,
                    "why": outcome.found.why,
                    "figures": {
                        name: {
                            "what": figure.what,
                            "on_trial": figure.trial,
                            "other": figure.other,
                            "unit": figure.unit,
                        }
                        for name, figure in outcome.figures.items()
                    },
                }
                for outcome in one.outcomes
            ],
        }
        for one in audited
    ]
