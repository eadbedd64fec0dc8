"""Built-in workloads: synthetic traces whose numbers are published ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.workload import tdx_boot

__all__ = ("WORKLOADS", "open")

WORKLOADS: dict[str, Callable[..., Lowered]] = {"tdx-boot": tdx_boot.build}
"""Name (without `workload:`) -> what makes it from a seed and parameters of its own."""


def open(name: str, /, seed: int = 0, **parameters: float) -> Lowered:
    """Make a workload; equal seeds and parameters make equal traces.

    :param parameters: of "tdx-boot": overlap
    :raises InputError: no such workload (the message lists those there are), or a parameter that it refuses
    """
    if name not in WORKLOADS:
        known = ", ".join(f"workload:{known}" for known in sorted(WORKLOADS))
        raise InputError(f"no such workload, there is {known}", f"workload:{name}")
    of_its_own = list(inspect.signature(WORKLOADS[name]).parameters)[1:]
    if unknown := sorted({*parameters} - {*of_its_own}):
        raise InputError(f"{', '.join(unknown)}: expected some of {', '.join(of_its_own)}", f"workload:{name}")
    return WORKLOADS[name](seed, **parameters)
