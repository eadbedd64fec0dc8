"""What a reader of the tables must know to read them right, and which rules were broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu.machine.defects import TEXTS
from pgemu.machine.findings import INDEX
from pgemu.trace.events import REQUEST
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.events import Event

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison

__all__ = ("defects", "findings", "notes")


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the tables must know to read them right."""
    found = []
    runs = comparison.runs
    if not comparison.lowered.converts and not comparison.lowered.accounting.ignored[REQUEST]:
        found.append(
            "This trace converts nothing, so no folio is split or merged by a conversion. The built-in workload of a "
            "confidential guest's boot converts: pgemu compare workload:tdx-boot"
        )
    outcomes = {name for run in runs for operation in run.operations for name in operation.outcomes}
    if "RET_PF_SPURIOUS" in outcomes:
        found.append(
            "RET_PF_SPURIOUS: a leaf maps the page already, mostly a larger one than in the recorded VM, where the "
            "fault happened. Such accesses cost nothing here."
        )
    if "-EOPNOTSUPP" in outcomes:
        found.append("-EOPNOTSUPP: this version does not simulate the operation.")
    if any(run.statistics.event(Event.ZEROED_UNREACHED) for run in runs):
        found.append(
            "Kernel times of these tables, and of --format markdown and csv, are whole: with zeroing that no slot "
            "reaches, which the answers of the first screen leave out (slot-reach)."
        )
    if any(run.end_of_life.zombies for run in runs):
        found.append(
            "Huge pages are missing from the pool at the end: references that the trace never drops keep them."
        )
    return found


def defects(comparison: Comparison) -> list[str]:
    """Return one line per defect that a machine has: what it does, and whether it changes nothing here."""
    idle = comparison.without_effect.defects
    lines = []
    for name, text in TEXTS.items():
        has = [run.design for run in comparison.runs if name in run.config.defects]
        without = [design for design in has if name in idle.get(design, ())]
        nothing = f" (without effect here: {', '.join(without)})" if without else ""
        if has:
            lines.append(f"{name}, of {' and '.join(has)}: {text.does}{nothing}")
    return lines


def findings(comparison: Comparison, *, explained: bool = True) -> list[str]:
    """Return one line per design that broke a rule; without `explained` only of those whose defects do not say why."""
    lines = []
    for run in comparison.runs:
        total = run.count  # user space may have added some
        if run.finding and (explained or not run.finding.explained):
            rule = run.finding.rule.lower().replace("_", " ")
            where = INDEX[Broken[run.finding.rule]].format(f"{run.finding.index:#x}")
            when = f"noticed after {run.finding.after:,} of {total:,} operations"
            if run.finding.after > total:
                when = "noticed after closing"
            lines.append(f"{run.design}: {run.finding.count:,} findings, the first: {rule}, {where}, {when}")
    return lines
