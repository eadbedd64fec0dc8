"""Prices of this machine: what was measured here (pgemu.measurements), put to the events that it prices.

>>> calibration = calibrate("lab-3", seconds=5)  # doctest: +SKIP
>>> write_profile(calibration.profile, "lab-3.toml")  # doctest: +SKIP
>>> Machine(Config(profile="lab-3.toml"))  # doctest: +SKIP

User space sees copies, stores, cache misses, faults, zaps, one shootdown and grace periods. What it does not see (VM
exits, HugeTLB pools, HVO's way through the vmemmap's page table, the page cache) keeps its published price.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pgemu.cost import PROFILES, Band, Basis, Price, Profile
from pgemu.cost.measurements import Measurement, measure
from pgemu.cost.prices import weakest
from pgemu.cost.toml import LARGEST
from pgemu_kernels.words.events import Event

__all__ = ("RULES", "Calibration", "Rule", "calibrate", "machine_name", "prices")

_PUBLISHED = PROFILES["published"]
_MOST_CPUS = 8192
_RMAP = _PUBLISHED[Event.RMAP_CHANGED].each
_ENTRY = _PUBLISHED[Event.LEAF_WRITTEN].each


class Rule(NamedTuple):
    """How measurements price an event.

    event, part: what is priced, and which part of its price. needs: keys of pgemu.measurements.WHAT. band: the
    price of their quartile bands, in that order, nanoseconds. why: in words. basis: of the price that comes out.
    """

    event: Event
    part: Literal["fixed", "each", "per_cpu"]
    needs: tuple[str, ...]
    band: Callable[..., Band]
    why: str
    basis: Basis = "measured"


def _from_to(low: Band, high: Band) -> Band:
    return low[0], max(low[0], high[1])


def _same(band: Band) -> Band:
    return band


def _less(band: Band, *parts: Band) -> Band:
    """What is left of a band when each end gives up the same end of the parts, which it contains."""
    return band[0] - sum(part[0] for part in parts), band[1] - sum(part[1] for part in parts)


RULES = (
    Rule(
        Event.HOST_FAULT,
        "fixed",
        ("refault",),
        lambda fault: _less(fault, _ENTRY, _RMAP),
        "less LEAF_WRITTEN and RMAP_CHANGED",
    ),
    Rule(Event.SYSCALL, "fixed", ("system_call", "system_call_mm"), _from_to, "nothing done, to a lookup of a VMA"),
    Rule(
        Event.TABLE_PAGE_ALLOCATED,
        "each",
        ("zero_hot", "populate"),
        _from_to,
        "at least zeroed, at most as an anonymous page, which is also charged and mapped",
    ),
    Rule(
        Event.TABLE_PAGE_FREED,
        "each",
        ("zap_anonymous", "zap_memfd"),
        lambda freed, kept: (freed[0] - kept[1], _PUBLISHED[Event.TABLE_PAGE_FREED].each[1]),
        "a page freed in a batch (low); by RCU, as published (high)",
        "assumption",
    ),
    Rule(Event.LEAF_CLEARED, "each", ("zap_memfd",), lambda zap: _less(zap, _RMAP), "less RMAP_CHANGED"),
    Rule(Event.TLB_FLUSH_MM, "fixed", ("shootdown",), _same, "mprotect of a page that another CPU may have cached"),
    Rule(Event.TLB_FLUSH_MM, "per_cpu", ("shootdown_more",), _same, "mprotect, all CPUs less one"),
    Rule(Event.TLB_FLUSH_KERNEL, "fixed", ("shootdown",), _same, "assumption: as TLB_FLUSH_MM", "assumption"),
    Rule(
        Event.TLB_FLUSH_KERNEL,
        "per_cpu",
        ("shootdown_more",),
        _same,
        "assumption: as TLB_FLUSH_MM",
        "assumption",
    ),
    Rule(Event.PAGE_ZEROED, "each", ("zero_hot", "zero_cold"), _from_to, "cached, to not"),
    Rule(Event.FOLIO_ZEROED_PAGES, "each", ("zero_cold",), _same, "a folio is larger than the cache"),
    Rule(
        Event.VMEMMAP_PAGE_RESTORED,
        "each",
        ("zero_cold", "populate"),
        _from_to,
        "at least 4 KiB written from the cache, at most as an anonymous page, which is also charged and mapped",
    ),
    Rule(Event.STRUCT_PAGE_WRITTEN, "each", ("line_sequential",), _same, "folios are gone through in order"),
    Rule(
        Event.FOLIO_GATE_CHECKED,
        "each",
        ("atomic", "line_sequential", "line_random"),
        lambda add, line, other: (2 * add[0] + line[0], 2 * add[1] + other[1]),
        "assumption: a reference taken and dropped, a struct page read as one is stored, in order (low) or not",
        "assumption",
    ),
    Rule(Event.FOLIO_FROZEN, "each", ("atomic",), _same, "on a line that STRUCT_PAGE_WRITTEN pays for"),
    Rule(
        Event.PAGE_CACHE_STORED,
        "each",
        ("slot_hot", "slot_cold", "atomic"),
        lambda hot, cold, add: (hot[0], cold[1] + add[1]),
        "in sequence (low), to random order and the atomic of a lock",
    ),
    Rule(Event.PAGE_COPIED, "each", ("copy_hot", "copy_cold"), _from_to, "cached, to not"),
    Rule(
        Event.VMEMMAP_HEAD_COPIED,
        "each",
        ("copy_hot", "copy_cold", "populate", "zero_cold"),
        lambda hot, cold, page, zeroed: (hot[0], cold[1] + max(0.0, page[1] - zeroed[0])),
        "the copy alone, to a copy from memory and what an anonymous page takes beside being zeroed",
    ),
    Rule(Event.RCU_SYNCHRONIZED, "each", ("grace_period",), _same, "membarrier waits in synchronize_rcu()"),
    Rule(
        Event.REFERENCE_CHANGED,
        "each",
        ("atomic", "miss"),
        lambda add, miss: (add[0], add[1] + miss[1]),
        "on a cached line, to one that must be fetched",
    ),
)
"""What can be priced, by event."""


@dataclass(frozen=True)
class Calibration:
    """A profile of this machine, and what it was made of, by key of pgemu.measurements.WHAT."""

    profile: Profile
    measured: Mapping[str, Measurement]

    def priced(self, key: str) -> list[Event]:
        """The events whose prices a measurement is part of."""
        used = _with_stand_in(self.measured)
        keys = {rule_key for rule_key, measurement in used.items() if measurement.key == key}
        return list(dict.fromkeys(rule.event for rule in RULES if keys & {*rule.needs} and _band(rule, used)))

    @property
    def published(self) -> list[Event]:
        """The events that keep their published price, but for those that have none."""
        return [event for event in Event if event not in self.profile.own and _PUBLISHED[event].total(1)[1]]


def prices(measured: Mapping[str, Measurement]) -> list[Price]:
    """The prices that measurements make.

    An event, or a part of its price, stays as published if one of its measurements has a problem, and where nothing
    is left: a shootdown that took no longer than none.
    """
    used = _with_stand_in(measured)
    found: dict[Event, Price] = {}
    for rule in RULES:
        band = _band(rule, used)
        if band is None:
            continue
        source = f"{'; '.join(str(used[key]) for key in rule.needs)}: {rule.why}"
        price = found.get(rule.event)
        if price is None:  # parts that no rule prices stay as published
            price = replace(_PUBLISHED[rule.event], source=f"pgemu calibrate: {source}", basis=rule.basis)
        else:
            price = replace(price, source=f"{price.source}; {source}", basis=weakest(price.basis, rule.basis))
        found[rule.event] = _with_part(price, rule.part, band)
    return [_say_what_is_published(price, used) for price in found.values()]


def _band(rule: Rule, used: Mapping[str, Measurement]) -> Band | None:
    """What a rule makes of measurements, within what a profile can hold; None for nothing."""
    parts = [used[key] for key in rule.needs if key in used]
    if len(parts) < len(rule.needs) or any(part.median <= 0 for part in parts):
        return None
    ends = rule.band(*((part.low, part.high) for part in parts))
    low, high = sorted(round(min(max(end, 0.0), LARGEST), 1) for end in ends)
    return (low, high) if high > 0 else None


def _with_part(price: Price, part: str, band: Band) -> Price:
    parts: dict[str, Any] = {part: band}
    return replace(price, **parts)


def _say_what_is_published(price: Price, used: Mapping[str, Measurement]) -> Price:
    made = {rule.part for rule in RULES if rule.event is price.event and _band(rule, used)}
    left = [part for part in ("fixed", "each", "per_cpu") if part not in made and getattr(price, part)[1] > 0]
    if not left:
        return price
    basis = weakest(price.basis, _PUBLISHED[price.event].basis)
    return replace(price, source=f"{price.source}; {', '.join(left)} as published", basis=basis)


def _with_stand_in(measured: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """Measurements without a problem, by what rules ask for: before Linux 5.14 pages are touched one by one."""
    used = {key: measurement for key, measurement in measured.items() if not measurement.problem}
    if "populate" not in used and "touch" in used:
        used["populate"] = used["touch"]
    return used


def machine_name() -> str:
    """This machine in words: its processor, CPUs and kernel."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip().isprintable():
            model = value.strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def calibrate(
    name: str = "calibrated", seconds: float = 10.0, progress: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Measure this machine for about `seconds`, and some more to set up.

    :param name: the profile's; not one that pgemu has (ValueError)
    :param progress: called with the words of what is measured next
    :raises MemoryError: less than 64 MiB to measure in
    """
    if name in PROFILES or not name.isprintable() or not name.strip():
        raise ValueError(f"name {name!r}: expected printable text that is no profile of pgemu's own")
    measured = measure(seconds, progress)
    today = datetime.now(UTC).date()
    cpus = min(os.cpu_count() or 1, _MOST_CPUS)
    return Calibration(Profile.of(name, machine_name(), today, cpus, prices(measured), _PUBLISHED), measured)
