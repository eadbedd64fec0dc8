"""The large differences of a comparison in words: one sentence each, where one side has twice the other or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pgemu.experiments.metrics import METRICS
from pgemu.machine.results import operation_name
from pgemu.report import units
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Operation

if TYPE_CHECKING:
    from pgemu.experiments.compare import Band, Comparison, DesignRun

__all__ = ("VERBS", "differences", "notes")

_FACTOR = 2

# Verb and object around a quantity, {s} for more than one: "restructure wrote 22 MiB of struct pages, pfnmap 28 B."
VERBS = {
    "host_tables_peak": ("needed up to", "of page tables for the host's mappings"),
    "stage2_tables_peak": ("needed up to", "of stage-2 page tables"),
    "vmemmap_peak": ("needed up to", "of vmemmap"),
    "vmemmap_restored": ("restored", "of vmemmap"),
    "folios_split": ("split", "huge folio{s}"),
    "folios_merged": ("merged", "huge folio{s}"),
    "huge_pages_split": ("leaves", "huge page{s} split"),
    "struct_page_bytes": ("wrote", "of struct pages"),
    "rmap_changes": ("changed", "mapcount{s}"),
    "zeroed_by_page": ("zeroed", "in single pages"),
    "zeroed_by_folio": ("zeroed", "in whole folios"),
    "flushes_mm": ("flushed a process's TLB", "time{s}"),
    "flushes_vm": ("flushed a VM's TLB", "time{s}"),
    "flushes_kernel": ("flushed the kernel's TLB on all CPUs", "time{s}"),
    "refused_conversions": ("refused", "conversion{s}"),
    "refused_holes": ("refused", "hole{s}"),
    "refused_zaps": ("refused", "call{s} of MADV_DONTNEED"),
}
_LEVELS = {
    "The host": ((PAGE_4K, Gauge.HOST_LEAVES_4K), (PAGE_2M, Gauge.HOST_LEAVES_2M), (PAGE_1G, Gauge.HOST_LEAVES_1G)),
    "Stage 2": (
        (PAGE_4K, Gauge.STAGE2_LEAVES_4K),
        (PAGE_2M, Gauge.STAGE2_LEAVES_2M),
        (PAGE_1G, Gauge.STAGE2_LEAVES_1G),
    ),
}
_LEVEL_NAMES = {PAGE_4K: "4K", PAGE_2M: "2M", PAGE_1G: "1G"}


def differences(comparison: Comparison) -> list[str]:
    """Return one sentence per large difference between the first two designs; none for a single design.

    Times differ only where their bands lie a factor of two apart.
    """
    if len(comparison.runs) < 2:
        return []
    first, second = comparison.runs[:2]
    return [*_times(first, second), *_mapped(first, second), *_levels(first, second), *_quantities(first, second)]


def _large(a: float, b: float) -> bool:
    return a != b and max(a, b) >= _FACTOR * min(a, b)


def _apart(a: Band, b: Band) -> bool:
    return a[0] >= _FACTOR * b[1] > 0 or b[0] >= _FACTOR * a[1] > 0


def _times(first: DesignRun, second: DesignRun) -> Iterator[str]:
    for run in first.operations:
        other = second.operation(run.operation)
        if other is None:
            continue
        name = "conversion" if run.operation is Operation.CONVERT else operation_name(run.operation)
        article = "an" if name[0] in "aeiou" else "a"
        for words, a, b in (
            (f"On average {article} {name}", run.mean, other.mean),
            (f"The longest {name}", run.worst, other.worst),
        ):
            if _apart(a, b) and not (run.count == 1 and words.startswith("The longest")):
                both = f"{units.band(*a)} on {first.design}, {units.band(*b)} on {second.design}"
                yield f"{words} takes {both} (estimate)."


def _mapped(first: DesignRun, second: DesignRun) -> Iterator[str]:
    runs = [design.operation(Operation.GUEST_FAULT) for design in (first, second)]
    a, b = (run.outcomes.get("RET_PF_FIXED", 0) if run else 0 for run in runs)
    if _large(a, b):
        yield (
            f"{first.design} took {units.count(a)} guest faults to map what the guest touched, {second.design} "
            f"{units.count(b)}."
        )


def _levels(first: DesignRun, second: DesignRun) -> Iterator[str]:
    for who, levels in _LEVELS.items():
        pairs = [
            (first.statistics.gauge(gauge) * page, second.statistics.gauge(gauge) * page) for page, gauge in levels
        ]
        if not any(_large(a, b) for a, b in pairs):
            continue
        sides = []
        for side, design in enumerate((first.design, second.design)):
            parts = [
                f"{units.size(pair[side])} at {_LEVEL_NAMES[page]}"
                for pair, (page, _) in zip(pairs, levels, strict=True)
                if pair[side]
            ]
            sides.append(f"{design} {' and '.join(parts) or 'nothing'}")
        yield f"{who} maps at the end: {', '.join(sides)}."


def _quantities(first: DesignRun, second: DesignRun) -> Iterator[str]:
    for metric in METRICS:
        if metric.key not in VERBS:
            continue
        a, b = metric.value(first.statistics), metric.value(second.statistics)
        if _large(a, b):
            verb, what = VERBS[metric.key]
            write = units.size if metric.unit == "bytes" else units.count
            yield f"{first.design} {verb} {write(a)} {what.format(s='s' * (a != 1))}, {second.design} {write(b)}."


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the tables must know to read them right."""
    found = []
    runs = comparison.runs
    if not comparison.lowered.converts:
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
    if any(run.end_of_life.zombies for run in runs):
        found.append(
            "Huge pages are missing from the pool at the end: references that the trace never drops keep them."
        )
    return found
