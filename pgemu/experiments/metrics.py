"""The quantities that a comparison shows of each machine, as data: name, unit, and where they are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pgemu.machine.statistics import Statistics
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, WOULD_SPIN, Operation

__all__ = ("METRICS", "Metric")

Unit = Literal["bytes", "count"]


@dataclass(frozen=True)
class Metric:
    """One row of the comparison.

    Attributes:
        key: name in JSON
        group: heading in the table
        label: row in the table
        unit: "bytes" or "count"
        value: reads it from a machine's statistics
    """

    key: str
    group: str
    label: str
    unit: Unit
    value: Callable[[Statistics], int]


def _gauge(gauge: Gauge, size: int = 1) -> Callable[[Statistics], int]:
    return lambda statistics: statistics.gauge(gauge) * size


def _peak(gauge: Gauge, size: int = 1) -> Callable[[Statistics], int]:
    return lambda statistics: statistics.peak(gauge) * size


def _event(event: Event, size: int = 1, op: Operation | None = None) -> Callable[[Statistics], int]:
    return lambda statistics: statistics.event(event, op) * size


def _refused(op: Operation) -> Callable[[Statistics], int]:
    return lambda statistics: sum(n for status, n in statistics.results(op).items() if -WOULD_SPIN < status < 0)


def _beyond(statistics: Statistics) -> int:
    return statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) * PAGE_4K


def _spinning(statistics: Statistics) -> int:
    return statistics.results(Operation.CONVERT).get(-WOULD_SPIN, 0)


_HOST = "Mapped by the host at the end"
_GUEST = "Mapped in stage 2 at the end"
_TABLES = "Memory for page tables"
_VMEMMAP = "Memory for struct pages"
_FOLIOS = "Folios and their struct pages"
_ZEROED = "Zeroed"
_BEYOND = "Dropped from stage 2 beyond the range"
_STALE = "Used by KVM by its own mappings"
_IRQ_OFF = "With interrupts off"
_FLUSHES = "TLB flushes"
_REFUSED = "Refused"

METRICS: tuple[Metric, ...] = (
    Metric("host_mapped_4k", _HOST, "at 4K", "bytes", _gauge(Gauge.HOST_LEAVES_4K, PAGE_4K)),
    Metric("host_mapped_2m", _HOST, "at 2M", "bytes", _gauge(Gauge.HOST_LEAVES_2M, PAGE_2M)),
    Metric("host_mapped_1g", _HOST, "at 1G", "bytes", _gauge(Gauge.HOST_LEAVES_1G, PAGE_1G)),
    Metric("stage2_mapped_4k", _GUEST, "at 4K", "bytes", _gauge(Gauge.STAGE2_LEAVES_4K, PAGE_4K)),
    Metric("stage2_mapped_2m", _GUEST, "at 2M", "bytes", _gauge(Gauge.STAGE2_LEAVES_2M, PAGE_2M)),
    Metric("stage2_mapped_1g", _GUEST, "at 1G", "bytes", _gauge(Gauge.STAGE2_LEAVES_1G, PAGE_1G)),
    Metric("host_tables", _TABLES, "host, now", "bytes", _gauge(Gauge.HOST_TABLES, PAGE_4K)),
    Metric("host_tables_peak", _TABLES, "host, peak", "bytes", _peak(Gauge.HOST_TABLES, PAGE_4K)),
    Metric("stage2_tables", _TABLES, "stage 2, now", "bytes", _gauge(Gauge.STAGE2_TABLES, PAGE_4K)),
    Metric("stage2_tables_peak", _TABLES, "stage 2, peak", "bytes", _peak(Gauge.STAGE2_TABLES, PAGE_4K)),
    Metric("vmemmap", _VMEMMAP, "vmemmap, now", "bytes", _gauge(Gauge.VMEMMAP_PAGES, PAGE_4K)),
    Metric("vmemmap_peak", _VMEMMAP, "vmemmap, peak", "bytes", _peak(Gauge.VMEMMAP_PAGES, PAGE_4K)),
    Metric("vmemmap_restored", _VMEMMAP, "vmemmap restored", "bytes", _event(Event.VMEMMAP_PAGE_RESTORED, PAGE_4K)),
    Metric("vmemmap_freed", _VMEMMAP, "vmemmap freed again", "bytes", _event(Event.VMEMMAP_PAGE_FREED, PAGE_4K)),
    Metric("folios_split", _FOLIOS, "huge folios split", "count", _event(Event.FOLIO_SPLIT)),
    Metric("folios_merged", _FOLIOS, "huge folios merged", "count", _event(Event.FOLIO_MERGED)),
    Metric("huge_pages_whole", _FOLIOS, "huge pages whole at the end", "count", _gauge(Gauge.BLOCKS_HUGE)),
    Metric("huge_pages_split", _FOLIOS, "huge pages split at the end", "count", _gauge(Gauge.BLOCKS_SPLIT)),
    Metric("struct_page_bytes", _FOLIOS, "struct pages written", "bytes", _event(Event.STRUCT_PAGE_BYTES)),
    Metric("rmap_changes", _FOLIOS, "mapcounts changed", "count", _event(Event.RMAP_CHANGED)),
    Metric("zeroed_by_page", _ZEROED, "4K at a time", "bytes", _event(Event.PAGE_ZEROED, PAGE_4K)),
    Metric("zeroed_by_folio", _ZEROED, "whole folios", "bytes", _event(Event.FOLIO_ZEROED_PAGES, PAGE_4K)),
    Metric("zeroed_unreached", _ZEROED, "of it reached by no slot", "bytes", _event(Event.ZEROED_UNREACHED, PAGE_4K)),
    Metric("stale_shown", _ZEROED, "shown without, once each", "bytes", _event(Event.STALE_PAGE_SHOWN, PAGE_4K)),
    Metric("stage2_beyond", _BEYOND, "by conversions", "bytes", _beyond),
    Metric("mapped_private", _STALE, "private by then", "count", _event(Event.MAPPED_STALE_PRIVATE)),
    Metric("mapped_freed", _STALE, "not the inode's by then", "count", _event(Event.MAPPED_STALE_FREED)),
    Metric("stores_irq_off", _IRQ_OFF, "stores to an xarray, most at once", "count", _peak(Gauge.STORES_IRQ_OFF)),
    Metric("flushes_mm", _FLUSHES, "of a process", "count", _event(Event.TLB_FLUSH_MM)),
    Metric("flushes_vm", _FLUSHES, "of a VM", "count", _event(Event.TLB_FLUSH_VM)),
    Metric("flushes_kernel", _FLUSHES, "of the kernel, all CPUs", "count", _event(Event.TLB_FLUSH_KERNEL)),
    Metric("refused_conversions", _REFUSED, "conversions", "count", _refused(Operation.CONVERT)),
    Metric("spinning_conversions", _REFUSED, "conversions that would spin", "count", _spinning),
    Metric("refused_holes", _REFUSED, "holes", "count", _refused(Operation.PUNCH_HOLE)),
    Metric("refused_zaps", _REFUSED, "MADV_DONTNEED", "count", _refused(Operation.ZAP)),
)
"""In the order of the table. Values are as the trace leaves the machine; sums are over the whole trace."""
