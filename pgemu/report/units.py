"""Numbers as people read them: exact counts, sizes, and bands of time with two digits."""

from __future__ import annotations

from math import floor, log10

from pgemu.sizes import size

__all__ = ("band", "change", "count", "share", "size")

_TIMES = (("s", 1e9), ("ms", 1e6), ("us", 1e3), ("ns", 1.0))


def count(n: int) -> str:
    """Return "16,825"."""
    return f"{n:,}"


def share(part: float) -> str:
    """Return a part of a whole, 0 to 1, in percent; only nothing is "0%", and only all of it "100%"."""
    if 0 < part < 1 and f"{part:.0%}" in ("0%", "100%"):
        return "<1%" if part < 0.5 else ">99%"
    return f"{part:.0%}"


def change(first: float, second: float) -> str:
    """Return how `second` differs from `first`, which is not 0, in percent: "-75%", "+1200%"; "+0%" only if equal."""
    ratio = (second - first) / first
    sign = "-" if ratio < 0 else "+"
    return sign + (share(abs(ratio)) if ratio < 0.5 else f"{ratio:.0%}")


def band(low: float, high: float) -> str:
    """Return a band of nanoseconds with two digits at each end: "5.1-29 ms", "900 ns-1.2 us", "0 ns".

    Both ends share a unit where that keeps them short; equal ends are one number.
    """
    unit, factor = _time_unit(high)
    ends = [_two_digits(end / factor) for end in (low, high)]
    if ends[0] == ends[1]:
        return f"{ends[1]} {unit}"
    if low and low < 0.1 * factor:
        low_unit, low_factor = _time_unit(low)
        return f"{_two_digits(low / low_factor)} {low_unit}-{ends[1]} {unit}"
    return f"{ends[0]}-{ends[1]} {unit}"


def _time_unit(nanoseconds: float) -> tuple[str, float]:
    return next((unit for unit in _TIMES if nanoseconds >= 0.9995 * unit[1]), _TIMES[-1])


def _two_digits(value: float) -> str:
    if value == 0:
        return "0"
    decimals = 1 - floor(log10(value))
    rounded = round(value, decimals)
    decimals = max(0, 1 - floor(log10(rounded)))
    return f"{rounded:,.{decimals}f}"
