"""Whether sums of prices agree with what is known of whole operations. No price comes from here.

>>> for check in cross_checks():
...     print(f"{check.what}: {check.band[0] / 1e6:.1f}-{check.band[1] / 1e6:.1f} ms, {check.verdict}")
1G folio split to 4K: 4.5-23.0 ms, agrees
... its vmemmap: 2.3-10.5 ms, no figure to compare with
... its struct pages: 1.4-2.5 ms, no figure to compare with
... its page cache: 0.7-10.1 ms, no figure to compare with
4K folios merged to 1G: 4.6-10.4 ms, no figure to compare with
1G demoted to 2M with HVO, less without: 9.9-33.8 ms, agrees
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pgemu.cost import flushed_cpus, profile as profile_named
from pgemu.cost.prices import Band, Profile
from pgemu_kernels.words.events import Event

__all__ = ("NODES_1G", "NODE_BYTES", "PARTS", "Check", "cross_checks")

NODES_1G, NODE_BYTES = 4161, 576
"""The page cache's nodes for the pages of 1 GiB: 1 + 64 + 4096 of 64 slots. 2,396,736 bytes, as Ackerley Tng counted
(2025-12-04). With memdescs a split would allocate some 20 MiB more (Matthew Wilcox, 2025-11-18), which pgemu does not
model."""

_PAGES, _VMEMMAP = 1 << 18, 4095
_Charges = Mapping[Event, int]

_RESTORED: _Charges = {Event.VMEMMAP_PAGE_RESTORED: _VMEMMAP, Event.TLB_FLUSH_KERNEL: 1}
_STRUCT_PAGES: _Charges = {Event.STRUCT_PAGE_WRITTEN: _PAGES - 1, Event.FOLIO_FROZEN: 1}
_STORED: _Charges = {Event.PAGE_CACHE_STORED: _PAGES, Event.XARRAY_NODE_ALLOCATED: NODES_1G}
_MERGED: _Charges = {
    Event.FOLIO_FROZEN: _PAGES,
    Event.PAGE_CACHE_STORED: 1,
    Event.XARRAY_NODE_FREED: NODES_1G,
    Event.STRUCT_PAGE_WRITTEN: _PAGES - 1,
    Event.VMEMMAP_PAGE_FREED: _VMEMMAP,
    Event.VMEMMAP_HEAD_COPIED: 1,
    Event.TLB_FLUSH_KERNEL: 1,
}
_DEMOTED: _Charges = {
    Event.VMEMMAP_PAGE_RESTORED: _VMEMMAP,
    Event.VMEMMAP_PAGE_FREED: 512 * 7,
    Event.VMEMMAP_HEAD_COPIED: 512,
    Event.RCU_SYNCHRONIZED: 2,
}

PARTS: Mapping[str, _Charges] = MappingProxyType(
    {
        "1G folio split to 4K": {**_RESTORED, **_STRUCT_PAGES, **_STORED},
        "... its vmemmap": _RESTORED,
        "... its struct pages": _STRUCT_PAGES,
        "... its page cache": _STORED,
        "4K folios merged to 1G": _MERGED,
        "1G demoted to 2M with HVO, less without": _DEMOTED,
    }
)
"""What is added up: events, each charged once, by their units. Split and merge in place, as a machine of kernel 7.3
charges them; of 6.18 each waits for a grace period, too."""

_KNOWN: Mapping[str, tuple[Band, str]] = MappingProxyType(
    {
        "1G folio split to 4K": (
            (5e6, 30e6),
            "inference: HVO of 2M pages scaled to 1G, and struct pages and page cache; nobody published one of 1G",
        ),
        "1G demoted to 2M with HVO, less without": (
            (14.9e6, 21.4e6),
            "measured on Linux 6.18, 2-vCPU guest on AMD EPYC",
        ),
    }
)


@dataclass(frozen=True)
class Check:
    """A sum of prices beside what is known of the whole.

    Attributes:
        what: in words
        band: the sum, nanoseconds
        known, source: what is known of it, and from where; None and "" where nothing is
    """

    what: str
    band: Band
    known: Band | None
    source: str

    @property
    def agrees(self) -> bool | None:
        """Whether the bands overlap; None where there is nothing to compare with."""
        return None if self.known is None else self.band[0] <= self.known[1] and self.known[0] <= self.band[1]

    @property
    def verdict(self) -> str:
        """The same in words."""
        return {None: "no figure to compare with", True: "agrees", False: "DISAGREES"}[self.agrees]


def cross_checks(
    profile: str | os.PathLike[str] | Profile = "published", vcpus: int = 1, host_cpus: int = 1
) -> tuple[Check, ...]:
    """Add up a profile's prices.

    :raises ValueError: no such profile
    :raises InputError: the profile's file cannot be read, or is no profile
    """
    prices = profile if isinstance(profile, Profile) else profile_named(profile)
    found = []
    for what, charges in PARTS.items():
        totals = [prices[event].total(n, flushed_cpus(event, vcpus, host_cpus)) for event, n in charges.items()]
        band = (sum(low for low, _ in totals), sum(high for _, high in totals))
        known, source = _KNOWN.get(what, (None, ""))
        found.append(Check(what, band, known, source))
    return tuple(found)
