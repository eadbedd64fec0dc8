"""Cost profiles as TOML files.

    name = "lab-3"                      # not one of those that come with pgemu
    machine = "2 x AMD EPYC 9654, Linux 7.3"
    measured = 2026-11-22
    host_cpus = 384                     # the CPUs that prices per CPU were taken with

    [prices.tlb_flush_kernel]           # an event of layout.Event, in lower case
    per_cpu = [70.0, 95.5]              # low and high, nanoseconds; also fixed (per charge) and each (per unit)
    source = "mprotect, 384 threads"
    basis = "measured"              # or "published", or "assumption"

All four keys and every `source` must be there; a price without `basis` counts as an assumption. A price has at least
one band; bands lie between 0 and 10^9 nanoseconds, low first. Of a broadcast flush `fixed` is the wait for the first
other CPU, charged where there is one. Events that are not named are priced as in "published".
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from datetime import date, datetime
from typing import Any, NoReturn

from pgemu.cost.prices import BASES, Band, Basis, Price, Profile
from pgemu.errors import InputError
from pgemu.whole_file import whole_file
from pgemu_kernels.words.events import Event

__all__ = ("LARGEST", "read_profile", "to_toml", "write_profile")

LARGEST = 1e9
"""Largest end of a band, nanoseconds: sums of picoseconds stay far below 2^63."""

_MOST_CPUS = 8192
_MOST_BYTES = 1 << 20
_BANDS = ("fixed", "each", "per_cpu")
_KEYS = ("name", "machine", "measured", "host_cpus", "prices")


def read_profile(path: str | os.PathLike[str], base: Profile, taken: Collection[str] = ()) -> Profile:
    """Read a profile from a TOML file; what it does not price is as in `base`, and no name in `taken` may be its own.

    :raises InputError: the file cannot be read or is no profile: one line that names the key and what was expected
    """
    import tomllib

    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", name) from None
    if len(data) > _MOST_BYTES:
        raise InputError("longer than 1 MiB: expected a cost profile", name)
    try:
        document = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise InputError("no UTF-8: expected a cost profile in TOML", name) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, arrays nested as deep
        raise InputError(f"no TOML: {error}", name) from None
    profile = _Reader(name).profile(document, base)
    if profile.name in taken:
        raise InputError(f"name = {profile.name!r}: expected one that no profile of pgemu's own has", name)
    return profile


class _Reader:
    """Makes a profile of a TOML document, and complains in the file's name."""

    def __init__(self, file: str) -> None:
        self.file = file

    def profile(self, document: dict[str, Any], base: Profile) -> Profile:
        self.known("", document, _KEYS)
        name = self.text("name", document)
        machine = self.text("machine", document)
        measured = self.get("measured", document)
        if not isinstance(measured, date) or isinstance(measured, datetime):
            self.refuse("measured", "a date like 2026-11-22", measured)
        cpus = self.get("host_cpus", document)
        if not isinstance(cpus, int) or isinstance(cpus, bool) or not 1 <= cpus <= _MOST_CPUS:
            self.refuse("host_cpus", f"a whole number from 1 to {_MOST_CPUS}", cpus)
        prices = self.table("prices", self.get("prices", document))
        return Profile.of(name, machine, measured, cpus, [self.price(*item) for item in prices.items()], base)

    def price(self, name: str, value: Any) -> Price:
        key = f"prices.{name}"
        events = {event.name.lower(): event for event in Event}
        if name not in events:
            self.refuse(key, "an event such as page_copied or tlb_flush_kernel (`pgemu compare --sources` lists them)")
        price = self.table(key, value)
        self.known(f"{key}.", price, (*_BANDS, "source", "basis"))
        bands = {band: self.band(f"{key}.{band}", price[band]) for band in _BANDS if band in price}
        if not bands:
            self.refuse(key, "at least one of fixed, each and per_cpu")
        return Price(events[name], self.text("source", price, f"{key}."), **bands, basis=self.basis(key, price))

    def basis(self, key: str, price: dict[str, Any]) -> Basis:
        value: Basis = price.get("basis", "assumption")
        if value not in BASES:
            self.refuse(f"{key}.basis", "measured, published or assumption", value)
        return value

    def band(self, key: str, value: Any) -> Band:
        if not isinstance(value, list) or len(value) != 2 or any(type(end) not in (int, float) for end in value):
            self.refuse(key, "two numbers of nanoseconds, low and high", value)
        low, high = value
        if not (0 <= low <= LARGEST and 0 <= high <= LARGEST):  # so written, it refuses nan as well
            self.refuse(key, "nanoseconds from 0 to 10^9", value)
        if low > high:
            self.refuse(key, "the low end first", value)
        return float(low), float(high)

    def table(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(key, "a table", value)
        return value

    def text(self, key: str, table: Mapping[str, Any], prefix: str = "") -> str:
        value = self.get(key, table, prefix)
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            self.refuse(prefix + key, "a line of printable text", value)
        return value

    def get(self, key: str, table: Mapping[str, Any], prefix: str = "") -> Any:
        if key not in table:
            raise InputError(f"{_shown(prefix + key)}: expected, but missing", self.file)
        return table[key]

    def known(self, prefix: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        for key in table:
            if key not in keys:
                self.refuse(f"{prefix}{key}", f"one of {', '.join(keys)}")

    def refuse(self, key: str, expected: str, value: Any = None) -> NoReturn:
        shown = "" if value is None else f" = {value!r:.60}"
        raise InputError(f"{_shown(key)}{shown}: expected {expected}", self.file)


def _shown(key: str) -> str:
    """A key as an error shows it: keys in quotes may hold anything."""
    return f"{key if key.isprintable() else ascii(key):.80}"


def to_toml(profile: Profile) -> str:
    """A profile as TOML text: its own prices, in the order of events.

    :raises ValueError: what `read_profile` would refuse: no CPUs, text that is not printable, bands out of bounds
    """
    if profile.host_cpus is None:
        raise ValueError(f"cost profile {profile.name!r}: expected the CPUs of one machine")
    lines = [
        "# Cost profile of pgemu: nanoseconds, as bands of low and high. Other events are priced as in published.",
        f"name = {_quoted(profile.name)}",
        f"machine = {_quoted(profile.machine)}",
        f"measured = {profile.measured.isoformat()}",
        f"host_cpus = {profile.host_cpus}",
        *([] if profile.own else ["", "[prices]"]),
    ]
    for price in profile.own.values():
        lines += ["", f"[prices.{price.event.name.lower()}]"]
        # A price of nothing is written as such, so that it is not taken for one left out.
        bands = [band for band in _BANDS if getattr(price, band) != (0, 0)] or ["each"]
        for band in bands:
            low, high = getattr(price, band)
            if not 0 <= low <= high <= LARGEST:
                raise ValueError(
                    f"{price.event.name}: {band} {low} to {high}: expected 0 to 10^9 nanoseconds, low first"
                )
            lines.append(f"{band} = [{float(low)!r}, {float(high)!r}]")
        lines.append(f"source = {_quoted(price.source)}")
        lines.append(f'basis = "{price.basis}"')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string. ValueError for text that a profile cannot hold."""
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{text!r}: expected a line of printable text")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile's own prices as TOML; the file appears whole or not at all.

    :raises ValueError: as to_toml
    :raises InputError: the file cannot be written
    """
    name = os.fspath(path)
    data = to_toml(profile).encode()
    try:
        with whole_file(name) as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", name) from None
