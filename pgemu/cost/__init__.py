"""Cost profiles: what each event is estimated to take in a real kernel, as bands, each with its source.

An event that is charged n times at once takes `fixed + per_cpu * CPUs + each * n` nanoseconds. Every part is a
band (low, high): the sources disagree, and no public figure exists for most of guest_memfd. Sums of lows and of
highs are kept apart to the end, so that no result claims more than its sources.

"published" has the figures of all machines in one band. The others are of one machine each: "e7-8895" (8 sockets,
bare metal), "epyc-252vcpu" (a VM), "guest-2vcpu", and any TOML file of the form that `pgemu.cost.toml` describes,
such as `pgemu calibrate` writes. They are partial: what their machine does not tell is as published.

>>> table = price_table("published", vcpus=8, host_cpus=64)
>>> table.shape, str(table.dtype)
((64, 4), 'int64')
>>> PROFILES["epyc-252vcpu"].host_cpus
252
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pgemu.cost.machines import E7_8895, EPYC_252VCPU, GUEST_2VCPU
from pgemu.cost.prices import Band, Basis, Price, Profile
from pgemu.cost.published import PUBLISHED
from pgemu.cost.toml import read_profile, to_toml, write_profile
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

__all__ = (
    "PROFILES",
    "Band",
    "Basis",
    "Price",
    "Profile",
    "flushed_cpus",
    "price_table",
    "profile",
    "to_toml",
    "write_profile",
)

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {profile.name: profile for profile in (PUBLISHED, E7_8895, EPYC_252VCPU, GUEST_2VCPU)}
)
"""The profiles that come with pgemu, by name."""


def profile(name: str | os.PathLike[str]) -> Profile:
    """Return a profile by its name, or read it from a TOML file: a path, or a name with a "/" or ".toml" in it.

    :raises ValueError: no such profile; the message lists those there are
    :raises InputError: the file cannot be read, or is no profile
    """
    text = os.fspath(name)
    if isinstance(name, str) and text in PROFILES:
        return PROFILES[text]
    if isinstance(name, str) and not (os.sep in text or text.endswith(".toml") or os.path.isfile(text)):
        raise ValueError(f"cost profile {text!r}: expected one of {', '.join(PROFILES)}, or a TOML file")
    return read_profile(text, PUBLISHED, taken=PROFILES)


def flushed_cpus(event: Event, vcpus: int, host_cpus: int) -> int:
    """Return how many CPUs must answer: a process's flush those that can run it, a VM's its vCPUs."""
    if event is Event.TLB_FLUSH_MM:
        return min(vcpus, host_cpus)
    return vcpus if event is Event.TLB_FLUSH_VM else host_cpus


def price_table(name: str | os.PathLike[str] | Profile, vcpus: int, host_cpus: int) -> npt.NDArray[np.int64]:
    """Return a profile as kernels read it: picoseconds, int64[EVENTS, PRICE_WORDS], CPUs folded in.

    `name`: as `profile` takes it, or a profile.

    :raises ValueError: no such profile
    :raises InputError: the file cannot be read, or is no profile
    """
    table = np.zeros((W.EVENTS, W.PRICE_WORDS), np.int64)
    prices = name if isinstance(name, Profile) else profile(name)
    for event, price in prices.items():
        fixed = price.total(0, flushed_cpus(event, vcpus, host_cpus))
        words = {
            W.PRICE_FIXED_LOW: fixed[0],
            W.PRICE_EACH_LOW: price.each[0],
            W.PRICE_FIXED_HIGH: fixed[1],
            W.PRICE_EACH_HIGH: price.each[1],
        }
        for word, nanoseconds in words.items():
            table[event, word] = round(nanoseconds * 1000)
    return table
