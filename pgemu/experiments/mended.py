"""Whether the mistakes that a version was asked to have change anything on a trace: its machine runs once without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pgemu.experiments.compare import Mended, run
from pgemu.machine.presets import PFNMAP, Versions

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun

__all__ = ("with_mended",)


def with_mended(comparison: Comparison, progress: Callable[[str, int, int], None] | None = None) -> Comparison:
    """Return a comparison that knows, of each of the first two designs, what it counts without such mistakes.

    Asked for are those of `as_posted`, and those of a version of pfnmap. Where there are none, or a version refuses
    the memory, nothing is run.

    :param progress: called with the design, the records that have run, and all of them
    """
    versions = comparison.versions
    without = {
        "restructure": set(versions.fields("restructure")["defects"])
        - set(Versions(versions.like).fields("restructure")["defects"]),
        "pfnmap": set(PFNMAP[versions.pfnmap].defects),
    }
    found = {}
    for known in comparison.runs[:2]:
        names = tuple(sorted(without.get(known.design, set()) & set(known.config.defects)))
        if names and not known.refusal:
            kept = tuple(name for name in known.config.defects if name not in names)
            config = replace(known.config, defects=kept)
            other = run(comparison.lowered, config, versions, comparison.check, progress)
            found[known.design] = Mended(names, _same(known, other))
    return replace(comparison, mended=found)


def _same(one: DesignRun, other: DesignRun) -> bool:
    """Whether two machines counted, returned and broke the same, while they ran and at their end."""
    alike = np.array_equal(one.statistics.words, other.statistics.words)
    return bool(alike and one.end_of_life == other.end_of_life and one.finding == other.finding)
