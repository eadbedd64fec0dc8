"""Built-in workloads: synthetic traces whose numbers are published ones, or parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.workload import assigned_boot, dma_steady, tdx_boot

__all__ = ("WORKLOADS", "open", "parameters_of")

WORKLOADS: dict[str, Callable[..., Lowered]] = {
    "tdx-boot": tdx_boot.build,
    "assigned-boot": assigned_boot.build,
    "dma-steady": dma_steady.build,
}
"""Name (without `workload:`) -> what makes it from a seed and parameters of its own."""


def parameters_of(name: str) -> tuple[str, ...]:
    """Names of a workload's own parameters, () of what is none; `workload:` may stand before its name."""
    build = WORKLOADS.get(name.removeprefix("workload:"))
    return tuple(inspect.signature(build).parameters)[1:] if build else ()


def open(name: str, /, seed: int = 0, **parameters: float) -> Lowered:
    """Make a workload; equal seeds and parameters make equal traces.

    :param parameters: of "tdx-boot": overlap; of "assigned-boot": overlap, late; of "dma-steady": guest_memory,
        flips, accesses, buffers, late, mapping
    :raises InputError: no such workload (the message lists those there are), or a parameter that it refuses
    """
    if name not in WORKLOADS:
        known = ", ".join(f"workload:{known}" for known in sorted(WORKLOADS))
        raise InputError(f"no such workload, there is {known}", f"workload:{name}")
    of_its_own = parameters_of(name)
    if unknown := sorted({*parameters} - {*of_its_own}):
        raise InputError(f"{', '.join(unknown)}: expected some of {', '.join(of_its_own)}", f"workload:{name}")
    return WORKLOADS[name](seed, **parameters)
