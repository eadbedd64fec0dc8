"""Estimates from counts: what a machine's events take under a profile, and what two machines differ in.

A price is one unknown number within its band, and the same one on both machines. So the difference of two machines is
known better than their totals: per event the numbers of charges and of units are subtracted first, and each end of
what is left is priced by its sign. Where both do the same, however uncertain it is, nothing remains. Two events that
count the same work (SAME_WORK) at one price are one unknown.

Nothing is run again: counts of one run are priced under any profile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np

from pgemu.cost import price_table, profile as profile_named
from pgemu.cost.prices import BASES, Band, Basis, Price, Profile
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

__all__ = ("SAME_WORK", "Contribution", "Difference", "Estimate", "difference", "estimate")

Array = np.ndarray[Any, Any]
Prices = str | os.PathLike[str] | Profile
_PICOSECONDS = 1000.0
SAME_WORK = ((Event.PAGE_ZEROED, Event.FOLIO_ZEROED_PAGES),)
"""Events that count the same work, for the counts to tell who asks for it: here 4 KiB that are cleared. A profile that
prices them differently says that they are not the same on its machine."""


class Counted(Protocol):
    """What a machine counted: pgemu.machine.statistics.Statistics."""

    @property
    def events(self) -> Array: ...
    @property
    def charges(self) -> Array: ...


@dataclass(frozen=True)
class Contribution:
    """What one event adds to an estimate, or to a difference.

    Attributes:
        event: the event
        units, charges: how many, and charged at how many times; of a difference those of the second less the first's,
            and of SAME_WORK at one price those of both events, under the one that differs more
        band: nanoseconds, low and high; of a difference both may be negative
        price: what one takes, with its source and basis
    """

    event: Event
    units: int
    charges: int
    band: Band
    price: Price

    @property
    def size(self) -> float:
        """How much it moves the whole: the middle of the band without its sign, nanoseconds."""
        return abs(self.band[0] + self.band[1]) / 2


@dataclass(frozen=True)
class Estimate:
    """Kernel time of a machine, or of one kind of operation on it.

    Attributes:
        total: nanoseconds, low and high
        events: what each event adds, largest first; those that add nothing are left out
    """

    total: Band
    events: tuple[Contribution, ...]

    @property
    def by_basis(self) -> Mapping[Basis, Band]:
        """The part of the total that rests on each basis; the parts add up to it."""
        return MappingProxyType({basis: _sum(self.events, basis) for basis in BASES})

    @property
    def shares(self) -> Mapping[Basis, float]:
        """The same as fractions of the total's middle, 0 to 1; all 0 where the total is 0."""
        return MappingProxyType({basis: _part(self.events, basis) for basis in BASES})


@dataclass(frozen=True)
class Difference:
    """What the second machine takes more than the first.

    Attributes:
        total: nanoseconds, low and high; negative where the second takes less
        events: what each event adds to it, largest first; those that both do alike are left out
        first, second: the estimate of each
    """

    total: Band
    events: tuple[Contribution, ...]
    first: Estimate
    second: Estimate

    @property
    def cheaper(self) -> Literal["first", "second"] | None:
        """Which takes less, whatever the prices are within their bands; None where that is undecided, or equal."""
        if self.total[0] > 0:
            return "first"
        return "second" if self.total[1] < 0 else None

    @property
    def shares(self) -> Mapping[Basis, float]:
        """Fractions, 0 to 1, of what the events add and take away (their sizes) by basis."""
        return MappingProxyType({basis: _part(self.events, basis) for basis in BASES})


def estimate(
    statistics: Counted,
    profile: Prices = "published",
    vcpus: int = 1,
    host_cpus: int = 1,
    op: Operation | None = None,
) -> Estimate:
    """Price what a machine counted; under the machine's own profile and CPUs it is what `Statistics.cost` says.

    :param profile: name, path or profile
    :param op: one kind of operation only; None: all
    :raises ValueError: no such profile
    :raises InputError: a profile's file cannot be read, or is no profile
    """
    prices = profile if isinstance(profile, Profile) else profile_named(profile)
    return _estimate(*counts(statistics, op), price_table(prices, vcpus, host_cpus), prices)


def difference(
    first: Counted,
    second: Counted,
    profile: Prices = "published",
    vcpus: int = 1,
    host_cpus: int = 1,
    op: Operation | None = None,
) -> Difference:
    """Price what two machines counted, and what they differ in: event by event, each price the same on both.

    Parameters and errors as of `estimate`.
    """
    prices = profile if isinstance(profile, Profile) else profile_named(profile)
    table = price_table(prices, vcpus, host_cpus)
    (units, charges), (more_units, more_charges) = counts(first, op), counts(second, op)
    both = _estimate(*_as_one(more_units - units, more_charges - charges, table), table, prices)
    one, other = _estimate(units, charges, table, prices), _estimate(more_units, more_charges, table, prices)
    return Difference(both.total, both.events, one, other)


def counts(statistics: Counted, op: Operation | None = None) -> tuple[Array, Array]:
    """int64[EVENTS] each: units and charges of every event, in all or of one kind of operation."""
    units, charges = statistics.events, statistics.charges
    return (units.sum(axis=0), charges.sum(axis=0)) if op is None else (units[op], charges[op])


def _as_one(units: Array, charges: Array, table: Array) -> tuple[Array, Array]:
    """Units and charges of a difference, with those of SAME_WORK at one price put together.

    units, charges: int64[EVENTS]. table: int64[EVENTS, PRICE_WORDS]
    """
    units, charges = units.copy(), charges.copy()
    for pair in SAME_WORK:
        less, more = sorted(pair, key=lambda event: abs(int(units[event])))
        if (table[less] == table[more]).all():
            for counted in (units, charges):
                counted[more] += counted[less]
                counted[less] = 0
    return units, charges


def bands(units: Array, charges: Array, table: Array) -> Array:
    """float64[..., EVENTS, 2], nanoseconds: what counts take, which may be negative, under `price_table`s.

    units, charges: int64[EVENTS]. table: int64[..., EVENTS, PRICE_WORDS], of one profile or of many at once.
    """
    parts = ((charges, W.PRICE_FIXED_LOW, W.PRICE_FIXED_HIGH), (units, W.PRICE_EACH_LOW, W.PRICE_EACH_HIGH))
    ends = np.zeros((*table.shape[:-1], 2), np.int64)
    for count, low, high in parts:
        least, most = count * table[..., int(low)], count * table[..., int(high)]
        ends[..., 0] += np.minimum(least, most)  # of a negative count the high price makes the low end
        ends[..., 1] += np.maximum(least, most)
    return ends / _PICOSECONDS


def _estimate(units: Array, charges: Array, table: Array, prices: Profile) -> Estimate:
    ends = bands(units, charges, table)
    found = [
        Contribution(
            event,
            int(units[event]),
            int(charges[event]),
            (float(ends[event, 0]), float(ends[event, 1])),
            prices[event],
        )
        for event in Event
        if ends[event].any()
    ]
    found.sort(key=lambda part: (-part.size, part.event))
    return Estimate((float(ends[:, 0].sum()), float(ends[:, 1].sum())), tuple(found))


def _sum(events: tuple[Contribution, ...], basis: Basis) -> Band:
    low, high = (sum(part.band[end] for part in events if part.price.basis == basis) for end in (0, 1))
    return low, high


def _part(events: tuple[Contribution, ...], basis: Basis) -> float:
    whole = sum(part.size for part in events)
    return sum(part.size for part in events if part.price.basis == basis) / whole if whole else 0.0
