"""Sizes as people read them."""

from __future__ import annotations

from math import floor, log10

__all__ = ("size",)

_SIZES = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(n: int) -> str:
    """Return bytes with three digits, without a fraction where there is none: "512 MiB", "15.9 MiB", "28 B", "0"."""
    for unit, factor in _SIZES:
        if n >= factor:
            digits = max(0, 2 - floor(log10(n / factor)))
            return f"{n // factor:,} {unit}" if n % factor == 0 else f"{n / factor:,.{digits}f} {unit}"
    return f"{n} B" if n else "0"
