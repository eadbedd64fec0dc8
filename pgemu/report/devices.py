"""What a comparison says of devices: how they reach guest memory, what they did, and that where others unmap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pgemu.report.units as units
from pgemu.experiments.devices import COUNTS

if TYPE_CHECKING:
    from rich.console import Group

    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.experiments.devices import DeviceRun
    from pgemu.experiments.sensitivity import Sensitivity

__all__ = ("both_ways", "did", "how", "table", "ways")

_RULE = "iommu-unmaps"
_UNITS = {"vtd": "Intel's IOMMU", "amd": "AMD's IOMMU"}
_DOORS = {"vfio": "VFIO", "iommufd": "iommufd"}
_UNMAPS = {
    "refused": "pinned or refused",
    "none": "nobody unmaps",
    "vmm": "user space unmaps before conversions",
    "vmm-late": "user space unmaps after conversions",
    "notifier": "the kernel unmaps, user space maps again",
    "revoke": "the kernel revokes and returns",
    "mirror": "I/O entries mirror what is shared",
}


def _of(runs: Sequence[DesignRun]) -> list[DeviceRun]:
    return [run.devices for run in runs[:2] if run.devices]


def how(comparison: Comparison) -> Iterator[str]:
    """How devices reach guest memory; nothing where a trace has none."""
    found = _of(comparison.runs)
    if found:
        way = found[0].how
        what_if = ", a what-if" if way.iommu_unmaps != "refused" else ""
        text = f"devices: {_UNITS[way.iommu]}, {_DOORS[way.dma]}: {_UNMAPS[way.iommu_unmaps]}{what_if}"
        yield f"{text} (--iommu-unmaps {way.iommu_unmaps})"
        if found[0].vmm_unmaps or found[0].vmm_maps:
            counts = f"{units.count(found[0].vmm_unmaps)} unmaps and {units.count(found[0].vmm_maps)} maps"
            yield f"user space's part is added to the trace: {counts} around conversions"


def _each(runs: Sequence[DesignRun], names: Sequence[str]) -> str:
    """The sum of counts, of each design."""
    values = [sum(getattr(run.devices, name) for name in names) for run in runs[:2] if run.devices]
    return ", ".join(f"{run.design} {units.count(n)}" for run, n in zip(runs[:2], values, strict=True))


def did(comparison: Comparison) -> Iterator[str]:
    """What devices did, a sentence for each count that is not 0."""
    runs = comparison.runs
    found = _of(runs)
    if not found:
        return

    def some(*names: str) -> bool:
        return any(getattr(one, name) for one in found for name in names)

    yield f"device accesses that fault, of {units.count(found[0].accesses)}: {_each(runs, ['faulted'])}"
    if some("stale_private", "stale_freed"):
        freed = f" (freed: {_each(runs, ['stale_freed'])})" if some("stale_freed") else ""
        yield f"stale device accesses, to private memory: {_each(runs, ['stale_private'])}{freed}"
    if some("machine_checks"):
        yield f"of these a TDX host ends at the first: {_each(runs, ['machine_checks'])} machine checks"
    if some("conversions_pinned"):
        yield f"conversions that end in -EAGAIN for pins: {_each(runs, ['conversions_pinned'])}"
    if some("maps_refused"):
        yield f"maps for devices that are refused: {_each(runs, ['maps_refused'])}"
    if some("revoked"):
        beside = f", beside what converts {_each(runs, ['widened'])}" if some("widened") else ""
        yield f"pages revoked from devices: {_each(runs, ['revoked'])}{beside}; returned {_each(runs, ['returned'])}"
    if some("lost"):
        yield f"pages not returned for want of memory: {_each(runs, ['lost'])}"


def ways(sensitivity: Sensitivity | None) -> list[tuple[str, tuple[DesignRun, ...]]]:
    """Machines by who unmaps, other than as asked; none where that was not tried."""
    trials = sensitivity.trials if sensitivity else ()
    return [(one.label, one.runs) for one in trials if one.rule == _RULE]


def _short(runs: Sequence[DesignRun]) -> str:
    """What both designs have: faults, stale accesses, conversions that pins keep."""
    parts = []
    for what, names in (
        ("stale", ["stale_private", "stale_freed"]),
        ("faulted", ["faulted"]),
        ("-EAGAIN", ["conversions_pinned"]),
    ):
        values = [sum(getattr(one, name) for name in names) for one in _of(runs)]
        if any(values):
            parts.append(f"{what} {'/'.join(map(units.count, values))}")
    return ", ".join(parts) or "none of these"


def both_ways(comparison: Comparison, sensitivity: Sensitivity | None) -> Iterator[str]:
    """The same where somebody else unmaps, in one sentence."""
    alike: dict[str, list[str]] = {}
    for label, runs in ways(sensitivity):
        alike.setdefault(_short(runs), []).append(label)
    found = [f"{', '.join(labels)}: {text}" for text, labels in alike.items()]
    if found:
        designs = "/".join(run.design for run in comparison.runs[:2])
        yield f"who unmaps is open ({_RULE}), {designs} with {'; '.join(found)}"


def table(comparison: Comparison, sensitivity: Sensitivity | None) -> Iterator[Group]:
    """Every count, as asked and the other ways; nothing where a trace has no devices."""
    found = _of(comparison.runs)
    if not found:
        return
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = {found[0].how.iommu_unmaps: comparison.runs} | dict(ways(sensitivity))
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("", "design", *columns):
        grid.add_column(head, justify="left" if head in ("", "design") else "right", no_wrap=True)
    for name, label in COUNTS.items():
        for row, run in enumerate(comparison.runs[:2]):
            cells = [
                units.count(getattr(devices, name)) if row < len(runs) and (devices := runs[row].devices) else ""
                for runs in columns.values()
            ]
            grid.add_row("" if row else label, run.design, *cells)
    yield Group(Text("Devices, by who takes private pages from them (--iommu-unmaps)", style="bold"), grid)
