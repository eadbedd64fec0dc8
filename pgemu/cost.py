"""Cost profiles: what each event is estimated to take in a real kernel, as bands, each with its source.

An event that is charged n times at once takes `fixed + per_cpu * CPUs + each * n` nanoseconds. Every part is a
band (low, high): the sources disagree, and no public figure exists for most of guest_memfd. Sums of lows and of
highs are kept apart to the end, so that no result claims more than its sources.

>>> table = price_table("published", vcpus=8, host_cpus=64)
>>> table.shape, str(table.dtype)
((32, 4), 'int64')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu_kernels import layout as L
from pgemu_kernels.layout import Event

__all__ = ("PROFILES", "Band", "Price", "price_table", "profile")

Band = tuple[float, float]
"""Low and high end, nanoseconds."""

_NOTHING: Band = (0.0, 0.0)
_STRUCT_PAGES_1G = 1 << L.ORDER_1G


@dataclass(frozen=True)
class Price:
    """What one event takes.

    Attributes:
        event: the event
        source: where the figures come from; "assumption: ..." where nobody published any
        fixed: per charge, nanoseconds
        each: per unit charged, nanoseconds
        per_cpu: per charge and CPU that must answer, nanoseconds
    """

    event: Event
    source: str
    fixed: Band = _NOTHING
    each: Band = _NOTHING
    per_cpu: Band = _NOTHING

    def total(self, n: int, cpus: int = 1) -> Band:
        """Return the band of one charge of `n` units, nanoseconds."""
        low, high = (self.fixed[end] + self.per_cpu[end] * cpus + self.each[end] * n for end in (0, 1))
        return low, high


# One 4K page zeroed: 1 GiB at 10 GB/s is 100 ms (low); a whole 2M fault takes 233 us (high).
_ZERO_PAGE: Band = (100e6 / _STRUCT_PAGES_1G, 233e3 / 512)

# One CPU's share of a broadcast. Unbatched minus batched vmemmap changes, per 2M page: 44.6 us (optimise) and
# 46.6 us (restore) on 8 sockets, at most 288 CPUs, if there were two broadcasts (low); 272.8 and 276.4 us on 252
# vCPUs, if there was one (high).
_BROADCAST: Band = (44.6e3 / 2 / 288, 276.4e3 / 252)

_KRAVETZ = "Mike Kravetz, batched vmemmap changes v8, 2023-10-19"
_MEASURED = "measured on Linux 6.18, 2-vCPU guest on AMD EPYC"
_ENTRY = "assumption: a few stores, one of them atomic, under a lock that is held already"
_CARRIED = "no price of its own: "

_PUBLISHED = (
    Price(
        Event.HOST_FAULT,
        f"{_MEASURED}: guest_memfd refault 690-730 k/s = 1.37-1.45 us, less LEAF_WRITTEN and RMAP_CHANGED",
        fixed=(1e9 / 730e3 - 50, 1e9 / 690e3 - 85),
    ),
    Price(
        Event.GUEST_FAULT,
        "assumption: VM exit and entry plus a lookup like a host fault's; no figure is published",
        fixed=(1000, 5000),
    ),
    Price(
        Event.CONVERT_IOCTL,
        "assumption: system call, invalidate_lock, maple tree nodes; no figure is published",
        fixed=(500, 5000),
    ),
    Price(Event.SYSCALL, "assumption: entry, exit, and argument checks of a system call", fixed=(100, 1000)),
    Price(
        Event.TABLE_PAGE_ALLOCATED,
        "zeroing of 4 KiB as PAGE_ZEROED; assumption: 0.1-1 us for the buddy allocator and locks",
        each=(_ZERO_PAGE[0] + 100, _ZERO_PAGE[1] + 1000),
    ),
    Price(Event.TABLE_PAGE_FREED, "assumption: back to the per-CPU list, by RCU", each=(100, 1000)),
    Price(Event.LEAF_WRITTEN, _ENTRY, each=(20, 40)),
    Price(
        Event.LEAF_CLEARED,
        f"{_MEASURED}: zap of memfd 7.1 and of guest_memfd 6.0 M pages/s = 141-167 ns, less RMAP_CHANGED",
        each=(1e9 / 7.1e6 - 30, 1e9 / 6.0e6 - 45),
    ),
    Price(Event.SPTE_WRITTEN, _ENTRY + " (mmu_lock)", each=(20, 100)),
    Price(Event.SPTE_CLEARED, "assumption: at most what a zapped host page takes, 167 ns", each=(5, 167)),
    Price(Event.RMAP_CHANGED, "assumption: mapcount, reference and statistics of one folio", each=(30, 45)),
    Price(
        Event.TLB_FLUSH_MM,
        "assumption: per CPU as TLB_FLUSH_KERNEL, on the CPUs that run the process (min of vCPUs, host CPUs)",
        per_cpu=_BROADCAST,
    ),
    Price(
        Event.TLB_FLUSH_VM,
        "assumption: per vCPU as TLB_FLUSH_KERNEL, high end doubled because a running vCPU must leave the guest",
        per_cpu=(_BROADCAST[0], 2 * _BROADCAST[1]),
    ),
    Price(
        Event.TLB_FLUSH_KERNEL,
        f"{_KRAVETZ}: unbatched less batched, per 2M page: 44.6 us / (2 broadcasts x 288 CPUs, the most that 8 "
        "sockets had) = 77 ns; 276.4 us / 252 vCPUs = 1.1 us",
        per_cpu=_BROADCAST,
    ),
    Price(
        Event.TLB_FLUSH_PAGE,
        "assumption: one INVLPG each on the CPUs that the flush reaches anyway; the broadcast is TLB_FLUSH_MM",
        each=(50, 250),
    ),
    Price(
        Event.TLB_FLUSH_RANGE,
        "assumption: TLBI by range and DSB, broadcast by hardware; per CPU at most a quarter of an IPI",
        each=(100, 1000),
    ),
    Price(
        Event.PAGE_COPIED,
        "4 KiB read and written: twice PAGE_ZEROED at most",
        each=(_ZERO_PAGE[0], 2 * _ZERO_PAGE[1]),
    ),
    Price(
        Event.HUGE_FOLIO_ALLOCATED,
        f"{_KRAVETZ}: pool grown without HVO, 2.46 s / 524,288 pages = 4.7 us to 4.12 s / 500,000 = 8.2 us",
        each=(2.463e9 / 524288, 4.119e9 / 500000),
    ),
    Price(
        Event.HUGE_FOLIO_FREED,
        f"{_MEASURED}: PUNCH_HOLE 0.84 M pages/s less zap = 1.0 us; {_KRAVETZ}: pool shrunk without HVO, 4.48 s / "
        "500,000 pages = 9.0 us",
        each=(1e9 / 0.84e6 - 1e9 / 6.0e6, 4.477e9 / 500000),
    ),
    Price(
        Event.PAGE_ZEROED,
        f"10 GB/s = 0.38 us; {_MEASURED}: HugeTLB 2M fault with zeroing 233 us / 512 = 0.46 us",
        each=_ZERO_PAGE,
    ),
    Price(Event.FOLIO_ZEROED_PAGES, "per 4K page as PAGE_ZEROED: a 1G folio is 100-120 ms", each=_ZERO_PAGE),
    Price(
        Event.VMEMMAP_PAGE_RESTORED,
        f"{_KRAVETZ}: batched less off, per 2M page 4.0 us (VM) and 17.9 us (metal), / 7 vmemmap pages",
        each=(4.0e3 / 7, 17.9e3 / 7),
    ),
    Price(
        Event.VMEMMAP_PAGE_FREED,
        f"{_KRAVETZ}: batched less off, per 2M page 4.0 us (VM) and 5.1 us (metal), / 7 vmemmap pages",
        each=(4.0e3 / 7, 5.1e3 / 7),
    ),
    Price(
        Event.STRUCT_PAGE_WRITTEN,
        f"{_MEASURED}: demotion of 1G without HVO 1.43-2.5 ms / 262,144 struct pages",
        each=(1.43e6 / _STRUCT_PAGES_1G, 2.5e6 / _STRUCT_PAGES_1G),
    ),
    Price(Event.STRUCT_PAGE_BYTES, _CARRIED + "STRUCT_PAGE_WRITTEN counts the same stores"),
    Price(
        Event.FOLIO_GATE_CHECKED,
        "assumption: one struct page read, from cached (as STRUCT_PAGE_WRITTEN) to a miss",
        each=(1.43e6 / _STRUCT_PAGES_1G, 100),
    ),
    Price(
        Event.PAGE_CACHE_STORED,
        "assumption: a slot of a 64-slot xarray node; the high end fills the plausible 5-30 ms of a 1G split",
        each=(5, 60),
    ),
    Price(Event.ATTRIBUTES_STORED, "assumption: one range stored in a maple tree, nodes at hand", each=(200, 2000)),
    Price(Event.FOLIO_SPLIT, _CARRIED + "vmemmap, struct pages and page cache are events of their own"),
    Price(Event.FOLIO_MERGED, _CARRIED + "vmemmap, struct pages and page cache are events of their own"),
    Price(Event.FREEZE_SPIN, _CARRIED + "the wait lasts as long as somebody else holds the folio"),
    Price(Event.NOTIFIER_CALL, "assumption: SRCU, an interval tree lookup, mmu_lock", each=(100, 1000)),
    Price(Event.DEFERRED_MERGE, "assumption: a work item queued; the merge is events of its own", each=(500, 5000)),
)

PROFILES: Mapping[str, Mapping[Event, Price]] = MappingProxyType(
    {"published": MappingProxyType({price.event: price for price in _PUBLISHED})}
)
"""Prices by event, by the profile's name."""


def profile(name: str) -> Mapping[Event, Price]:
    """Return a profile's prices.

    :raises ValueError: no such profile; the message lists those there are
    """
    if name not in PROFILES:
        raise ValueError(f"cost profile {name!r}: expected one of {', '.join(sorted(PROFILES))}")
    return PROFILES[name]


def flushed_cpus(event: Event, vcpus: int, host_cpus: int) -> int:
    """Return how many CPUs must answer: a process's flush those that can run it, a VM's its vCPUs."""
    if event is Event.TLB_FLUSH_MM:
        return min(vcpus, host_cpus)
    return vcpus if event is Event.TLB_FLUSH_VM else host_cpus


def price_table(name: str, vcpus: int, host_cpus: int) -> npt.NDArray[np.int64]:
    """Return a profile as kernels read it: picoseconds, int64[EVENTS, PRICE_WORDS], CPUs folded in.

    :raises ValueError: no such profile
    """
    table: npt.NDArray[Any] = np.zeros((L.EVENTS, L.PRICE_WORDS), np.int64)
    for event, price in profile(name).items():
        fixed = price.total(0, flushed_cpus(event, vcpus, host_cpus))
        words = {
            L.PRICE_FIXED_LOW: fixed[0],
            L.PRICE_EACH_LOW: price.each[0],
            L.PRICE_FIXED_HIGH: fixed[1],
            L.PRICE_EACH_HIGH: price.each[1],
        }
        for word, nanoseconds in words.items():
            table[event, word] = round(nanoseconds * 1000)
    return table
