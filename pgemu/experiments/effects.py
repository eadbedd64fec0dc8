"""What changes nothing on a trace: options given by hand, and mistakes that a machine has. Each is left out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.errors import InputError
from pgemu.experiments.compare import WithoutEffect, configuration, run
from pgemu.experiments.inferences import INFERENCES

if TYPE_CHECKING:
    from pgemu.experiments.compare import Check, Comparison, DesignRun
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.machine.config import Config

__all__ = ("with_effects",)

_Same = Callable[["DesignRun", "Config"], bool]
# Prices alone, or given without being asked for.
_NOT_TRIED = ("defects", "profile", "host_cpus")


def with_effects(
    comparison: Comparison,
    progress: Callable[[str, int, int], None] | None = None,
    sensitivity: Sensitivity | None = None,
) -> Comparison:
    """Return a comparison that knows which options and which defects of the first two designs change nothing.

    An option is tried if it makes a machine another one than it was without; a defect by itself, together with those
    that were found to change nothing. Where a version refuses the memory, nothing is tried.

    :param progress: called with the design, the records that have run, and all of them
    :param sensitivity: of the comparison, whose runs need not be repeated
    """
    known_runs = list(_of_the_trace(sensitivity))

    def rerun(config: Config, check: Check) -> DesignRun:
        for other in known_runs if check == "end" else ():
            if other.config == config:
                return other
        found = run(comparison.lowered, config, comparison.versions, check, progress)
        if check == "end":
            known_runs.append(found)
        return found

    def same(known: DesignRun, config: Config) -> bool:
        # What breaks on the way is found, and counted, by the same checks only; recounts of everything take too long.
        if known.finding and comparison.check not in ("end", "every"):
            known = rerun(known.config, "every")
        check: Check = "every" if known.finding and comparison.check != "end" else "end"
        return _same(known, rerun(config, check))

    runs = [known for known in comparison.runs[:2] if not known.refusal]
    defects = {known.design: tuple(_idle_defects(known, same)) for known in runs}
    options = tuple(_idle_options(comparison, runs, same)) if len(runs) == len(comparison.runs[:2]) else ()
    found = {design: names for design, names in defects.items() if names}
    return replace(comparison, without_effect=WithoutEffect(found, options))


def _of_the_trace(sensitivity: Sensitivity | None) -> Iterator[DesignRun]:
    """Runs of alternatives on the trace as it is: to its end, and without accesses that it does not have."""
    for trial in sensitivity.trials if sensitivity else ():
        alternatives = [one for name in trial.rule.split(" and ") for one in INFERENCES[name].alternatives]
        if not any(one.trace or one.unseen for one in alternatives):
            yield from trial.runs


def _idle_defects(known: DesignRun, same: _Same) -> Iterator[str]:
    kept = known.config.defects
    for name in known.config.defects:
        fewer = tuple(other for other in kept if other != name)
        if same(known, replace(known.config, defects=fewer)):
            kept = fewer
            yield name


def _idle_options(comparison: Comparison, runs: list[DesignRun], same: _Same) -> Iterator[str]:
    for name in comparison.given:
        if name in _NOT_TRIED or (name == "seed" and comparison.lowered.again):  # a workload's is of its trace, too
            continue
        fewer = {key: value for key, value in comparison.given.items() if key != name}
        try:
            configs = [_without(comparison, known, fewer) for known in runs]
        except InputError:  # another option needs it
            continue
        changed = [(known, config) for known, config in zip(runs, configs, strict=True) if known.config != config]
        if changed and all(same(known, config) for known, config in changed):
            yield name


def _without(comparison: Comparison, known: DesignRun, given: dict[str, Any]) -> Config:
    return configuration(comparison.lowered, known.design, comparison.versions, given)


def _same(one: DesignRun, other: DesignRun) -> bool:
    """Whether two machines counted, returned and broke the same, while they ran and at their end."""
    alike = np.array_equal(one.statistics.words, other.statistics.words)
    findings = [found and (found.count, found.rule, found.index) for found in (one.finding, other.finding)]
    return bool(alike and one.end_of_life == other.end_of_life and findings[0] == findings[1])
