"""Sources as plain data, for the JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pgemu import cost
from pgemu.machine.results import operation_name
from pgemu.report.limits import limits_of
from pgemu.report.sources import METRIC_SOURCES, OPERATION_SOURCES, TAGS, Source, sources_of

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison

__all__ = ("sources",)


def sources(comparison: Comparison) -> dict[str, Any]:
    """Return what each row models and what each price is made of, by design where the designs differ."""
    designs = [run.design for run in comparison.runs]
    prices = cost.profile(comparison.runs[0].config.profile)

    def plain(by_design: Any) -> dict[str, list[dict[str, str]]]:
        return {design: _plain(sources_of(by_design, design)) for design in designs}

    return {
        "operations": {operation_name(op): plain(by_design) for op, by_design in OPERATION_SOURCES.items()},
        "state": {key: plain(by_design) for key, by_design in METRIC_SOURCES.items()},
        "limits": {design: [asdict(limit) for limit in limits_of(design)] for design in designs},
        "tags": dict(TAGS),
        "prices_ns": {
            event.name.lower(): {
                "fixed": list(price.fixed),
                "per_cpu": list(price.per_cpu),
                "each": list(price.each),
                "source": price.source,
            }
            for event, price in prices.items()
        },
    }


def _plain(found: Iterable[Source]) -> list[dict[str, str]]:
    return [asdict(source) for source in found]
