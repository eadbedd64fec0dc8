"""Profiles of one machine each, derived from the rows that were published of it.

Two sets of rows exist. Mike Kravetz timed pools of 2M pages grown and shrunk with HVO off, on with a broadcast flush
per page, and on in batches. Per page that is, with 7 vmemmap pages freed or restored,

    grow, off       A                       shrink, off       F
    grow, batched   A + 7 O + H             shrink, batched   F + 7 R           (and two broadcasts per batch)
    grow, single    A + 7 O + H + B         shrink, single    F + 7 R + B

A = HUGE_FOLIO_ALLOCATED, F = HUGE_FOLIO_FREED, O = VMEMMAP_PAGE_FREED, R = VMEMMAP_PAGE_RESTORED, H =
VMEMMAP_HEAD_COPIED, B = TLB_FLUSH_KERNEL. A page grown singly adds one more broadcast where its vmemmap was still
mapped by a 2M leaf, once per 64 pages. That both differences B agree within 10 % says that it is one broadcast, not
two. The rows do not determine O and H apart, only 7 O + H: H keeps the published band, which widens that of O. Nor do
they determine A and F better than the two kernels timed differ. Kernels of that time had no grace period in HVO.

The other set was measured on a 2-vCPU guest with Linux 6.18, whose HVO waits for one grace period per call:

    grow, on (2048 pages)     A + 7 O + H + G / 2048       shrink, on    F + 7 R + G / 2048
    demote 1G, on less off    4095 R + 512 (7 O + H) + 2 G

Three rows for R, 7 O + H and G = RCU_SYNCHRONIZED; the demotion's spread gives their bands. No row has a flush alone.
"""

from __future__ import annotations

from datetime import date
from functools import partial
from typing import NamedTuple

from pgemu.cost.prices import Band, Price, Profile
from pgemu.cost.published import HEAD_COPY, KRAVETZ, MEASURED, PUBLISHED
from pgemu_kernels.words.events import Event

__all__ = ("E7_8895", "EPYC_252VCPU", "GUEST_2VCPU", "POOL_ROWS", "PoolRows")

_VMEMMAP_PAGES = 7  # restored or freed, of a 2M page's eight
_published, _measured = partial(Price, basis="published"), partial(Price, basis="measured")
_SPLITS = 1 / 64  # 2M leaves of the vmemmap per 2M page


class PoolRows(NamedTuple):
    """Seconds for a pool of 2M pages, (grow, shrink) in each column; `off` once per kernel timed.

    Of the two kernels the first, without batches, gave `off[0]` and `single`, the second `off[1]` and `batched`.
    """

    pages: int
    host_cpus: int
    off: tuple[Band, Band]
    single: Band
    batched: Band


POOL_ROWS = {
    "e7-8895": PoolRows(500_000, 288, ((4.119, 4.477), (4.719, 4.245)), (28.973, 36.748), (7.267, 13.199)),
    "epyc-252vcpu": PoolRows(524_288, 252, ((2.463, 2.931), (2.715, 3.186)), (147.609, 149.924), (4.799, 5.273)),
}
"""Mike Kravetz's rows, by profile. CPUs of 8 sockets: 288 threads are the most that an E7-8895 (v3) makes."""


def _band(values: tuple[float, ...]) -> Band:
    return min(values), max(values)


def _us(band: Band) -> str:
    return f"{band[0] / 1000:.3g}-{band[1] / 1000:.3g} us"


def _pool_profile(name: str, machine: str, cpus_source: str) -> Profile:
    rows = POOL_ROWS[name]

    def per_page(seconds: float) -> float:
        return seconds * 1e9 / rows.pages

    allocated, freed = (_band(tuple(per_page(off[way]) for off in rows.off)) for way in (0, 1))
    optimized, restored = (_band(tuple(per_page(rows.batched[way] - off[way]) for off in rows.off)) for way in (0, 1))
    # Single less batched: over both kernels, and with what each kernel took without HVO deducted.
    grow, shrink = (
        (
            per_page(rows.single[way] - rows.batched[way]),
            per_page(rows.single[way] - rows.off[0][way] - (rows.batched[way] - rows.off[1][way])),
        )
        for way in (0, 1)
    )
    broadcast = _band((*(difference / (1 + _SPLITS) for difference in grow), *shrink))
    per_cpu = (broadcast[0] / rows.host_cpus, broadcast[1] / rows.host_cpus)
    head_page = (optimized[0] - HEAD_COPY[1], optimized[1] - HEAD_COPY[0])
    each = "per 2M page"
    own = (
        _published(Event.HUGE_FOLIO_ALLOCATED, f"{KRAVETZ}: grow without HVO, both kernels", each=allocated),
        _published(Event.HUGE_FOLIO_FREED, f"{KRAVETZ}: shrink without HVO, both kernels", each=freed),
        _published(
            Event.VMEMMAP_PAGE_FREED,
            f"{KRAVETZ}: grow, batched less off {_us(optimized)} {each}, less VMEMMAP_HEAD_COPIED (which the rows do "
            "not tell apart), / 7 vmemmap pages",
            each=(head_page[0] / _VMEMMAP_PAGES, head_page[1] / _VMEMMAP_PAGES),
        ),
        _published(
            Event.VMEMMAP_PAGE_RESTORED,
            f"{KRAVETZ}: shrink, batched less off {_us(restored)} {each}, / 7 vmemmap pages",
            each=(restored[0] / _VMEMMAP_PAGES, restored[1] / _VMEMMAP_PAGES),
        ),
        _published(
            Event.TLB_FLUSH_KERNEL,
            f"{KRAVETZ}: single less batched {_us(broadcast)} {each}, one broadcast, / {rows.host_cpus} {cpus_source}",
            per_cpu=per_cpu,
        ),
        Price(
            Event.TLB_FLUSH_MM,
            "assumption: per CPU as TLB_FLUSH_KERNEL of this machine",
            per_cpu=per_cpu,
            basis="assumption",
        ),
        Price(
            Event.TLB_FLUSH_VM,
            "assumption: per vCPU as TLB_FLUSH_KERNEL of this machine, high end doubled because a running vCPU must "
            "leave the guest",
            per_cpu=(per_cpu[0], 2 * per_cpu[1]),
            basis="assumption",
        ),
    )
    return Profile.of(name, machine, date(2023, 10, 19), rows.host_cpus, own, PUBLISHED)


E7_8895 = _pool_profile(
    "e7-8895",
    "8-socket Intel Xeon E7-8895, bare metal",
    "CPUs (assumption: v3, 18 cores with two threads on each socket; a v2 had 240, which makes it 20 % more per CPU)",
)
EPYC_252VCPU = _pool_profile("epyc-252vcpu", "VM with 252 vCPUs on two AMD EPYC 7J13", "vCPUs")


def _guest_profile() -> Profile:
    grow_off, shrink_off, grow_on, shrink_on = 4e3, 6e3, 13e3, 16e3  # per 2M page of 2048; whole microseconds
    demote_off, demote_on = (1.43e6, 2.5e6), (17.4e6, 22.8e6)
    half = 500.0  # what rounding may have hidden
    optimized, restored = grow_on - grow_off, shrink_on - shrink_off

    def grace_period(difference: float) -> float:
        """G from the three rows: R = (restored - G/2048) / 7 and 7 O + H = optimized - G/2048, put into the third."""
        folios = difference - 4095 * restored / _VMEMMAP_PAGES - 512 * optimized
        return folios / (2 - (4095 / _VMEMMAP_PAGES + 512) / 2048)

    grace = (grace_period(demote_on[0] - demote_off[1]), grace_period(demote_on[1] - demote_off[0]))
    head_page = (optimized - grace[1] / 2048 - HEAD_COPY[1], optimized - grace[0] / 2048 - HEAD_COPY[0])
    restored_page = (restored - grace[1] / 2048, restored - grace[0] / 2048)
    pool = f"{MEASURED}: pool of 2048 2M pages"
    struct_page = (demote_off[0] / (1 << 18), demote_off[1] / (1 << 18))
    own = (
        *(PUBLISHED[event] for event in (Event.HOST_FAULT, Event.LEAF_CLEARED)),
        _measured(
            Event.PAGE_ZEROED,
            f"{MEASURED}: HugeTLB 2M fault with zeroing 233 us / 512 = 0.46 us (high); the rows do not tell zeroing "
            "alone: 10 GB/s = 0.38 us (low)",
            each=PUBLISHED[Event.PAGE_ZEROED].each,
        ),
        _measured(
            Event.FOLIO_ZEROED_PAGES,
            "per 4K page as PAGE_ZEROED of this machine",
            each=PUBLISHED[Event.PAGE_ZEROED].each,
        ),
        _measured(
            Event.HUGE_FOLIO_ALLOCATED, f"{pool} grown without HVO, 4 us each", each=(grow_off - half, grow_off + half)
        ),
        _measured(
            Event.HUGE_FOLIO_FREED, f"{pool} shrunk without HVO, 6 us each", each=(shrink_off - half, shrink_off + half)
        ),
        _measured(
            Event.VMEMMAP_PAGE_FREED,
            f"{pool} grown, HVO on less off 9 us each, less RCU_SYNCHRONIZED / 2048 and VMEMMAP_HEAD_COPIED, / 7",
            each=(head_page[0] / _VMEMMAP_PAGES, head_page[1] / _VMEMMAP_PAGES),
        ),
        _measured(
            Event.VMEMMAP_PAGE_RESTORED,
            f"{pool} shrunk, HVO on less off 10 us each, less RCU_SYNCHRONIZED / 2048, / 7",
            each=(restored_page[0] / _VMEMMAP_PAGES, restored_page[1] / _VMEMMAP_PAGES),
        ),
        _measured(
            Event.STRUCT_PAGE_WRITTEN,
            f"{MEASURED}: demotion of 1G without HVO 1.43-2.5 ms / 262,144 struct pages",
            each=struct_page,
        ),
        _measured(
            Event.RCU_SYNCHRONIZED,
            f"{MEASURED}: demotion of 1G, HVO on less off 14.9-21.4 ms, less 4095 vmemmap pages restored and 512 "
            "folios optimised at what the pool's rows say, / 2 grace periods (membarrier on such a guest: 5.1-7.4 ms)",
            each=grace,
        ),
    )
    return Profile.of(
        "guest-2vcpu", "guest with 2 vCPUs on AMD EPYC, Linux 6.18", date(2026, 11, 22), 2, own, PUBLISHED
    )


GUEST_2VCPU = _guest_profile()
