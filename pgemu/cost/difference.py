"""A stand-in until the module of this name from branch h-cost replaces it: event by event, without charges of several."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.cost import price_table
from pgemu_kernels import words as W


class Difference(NamedTuple):
    """What the second machine takes more than the first."""

    total: tuple[float, float]
    shares: dict[str, float]


def difference(first: Any, second: Any, profile: Any, vcpus: int, host_cpus: int, op: Any = None) -> Difference:
    """Price what two machines differ in."""
    prices = price_table(profile, vcpus, host_cpus).astype(float) / 1000
    rows = slice(None) if op is None else slice(int(op), int(op) + 1)
    less = (second.events[rows].sum(axis=0) - first.events[rows].sum(axis=0)).astype(float)
    low = less * (prices[:, int(W.PRICE_FIXED_LOW)] + prices[:, int(W.PRICE_EACH_LOW)])
    high = less * (prices[:, int(W.PRICE_FIXED_HIGH)] + prices[:, int(W.PRICE_EACH_HIGH)])
    return Difference((float(np.minimum(low, high).sum()), float(np.maximum(low, high).sum())), {"assumption": 0.5})
