"""How much the benchmarks do: what is worth timing, or where they only run as tests (--benchmark-disable) little."""

from __future__ import annotations

little = False
"""Set by conftest.py before any benchmark is imported."""


def amount(full: int, small: int) -> int:
    """The first of two amounts where calls are timed, else the second."""
    return small if little else full
