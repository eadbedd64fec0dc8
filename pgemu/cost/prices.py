"""What a price and a cost profile are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from types import MappingProxyType
from typing import Literal, get_args

from pgemu_kernels.words.events import Event

__all__ = ("BASES", "Band", "Basis", "Price", "Profile", "weakest")

Band = tuple[float, float]
"""Low and high end, nanoseconds."""

Basis = Literal["measured", "published", "assumption"]
"""What a price rests on: figures that were measured for pgemu, on a machine that the source names; figures that others
published; or an assumption. Of several it is the weakest, but for what is small beside the rest."""

BASES: tuple[Basis, ...] = get_args(Basis)
"""From the strongest to the weakest."""

_NOTHING: Band = (0.0, 0.0)
_BROADCASTS = (Event.TLB_FLUSH_MM, Event.TLB_FLUSH_KERNEL)  # the CPU that flushes is one of those that answer


def weakest(*bases: Basis) -> Basis:
    """What a price rests on that is made of several."""
    return max(bases, key=BASES.index)


@dataclass(frozen=True)
class Price:
    """What one event takes.

    Attributes:
        event: the event
        source: where the figures come from
        basis: what they rest on
        fixed: per charge, nanoseconds; of TLB_FLUSH_MM and TLB_FLUSH_KERNEL only where another CPU must answer
        each: per unit charged, nanoseconds
        per_cpu: per charge and CPU that must answer, nanoseconds
    """

    event: Event
    source: str
    fixed: Band = _NOTHING
    each: Band = _NOTHING
    per_cpu: Band = _NOTHING
    basis: Basis = field(kw_only=True)

    def total(self, n: int, cpus: int = 1) -> Band:
        """Return the band of one charge of `n` units, nanoseconds."""
        fixed = _NOTHING if cpus < 2 and self.event in _BROADCASTS else self.fixed
        low, high = (fixed[end] + self.per_cpu[end] * cpus + self.each[end] * n for end in (0, 1))
        return low, high


@dataclass(frozen=True, eq=False)
class Profile(Mapping[Event, Price]):
    """The prices of one machine: a mapping with a price for every event.

    What the machine's own figures do not tell comes from `base`; the source of such a price begins with
    "from profile NAME: ". Equal are profiles with the same name, machine, date, CPUs and own prices.

    Attributes:
        name: as `pgemu compare --profile` takes it
        machine: what the figures were taken on, in words
        measured: when they were taken, or published
        host_cpus: CPUs of that machine; prices per CPU scale from it. None: figures of several machines
        own: the prices that are this machine's
        base: the profile of all others, None only for "published"
    """

    name: str
    machine: str
    measured: date
    host_cpus: int | None
    own: Mapping[Event, Price]
    base: Profile | None

    @classmethod
    def of(
        cls,
        name: str,
        machine: str,
        measured: date,
        host_cpus: int | None,
        prices: Iterable[Price],
        base: Profile | None,
    ) -> Profile:
        """A profile of prices in any order."""
        own = MappingProxyType({price.event: price for price in sorted(prices, key=lambda price: price.event)})
        return cls(name, machine, measured, host_cpus, own, base)

    def __getitem__(self, event: Event) -> Price:
        if event in self.own or self.base is None:
            return self.own[event]
        price = self.base[event]
        return replace(price, source=f"from profile {self.base.name}: {price.source}")

    def __iter__(self) -> Iterator[Event]:
        return iter(sorted({*self.own, *(self.base or ())}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key()[:-1])

    def _key(self) -> tuple[object, ...]:
        return self.name, self.machine, self.measured, self.host_cpus, dict(self.own)
