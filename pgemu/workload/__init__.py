"""Built-in workloads: synthetic traces whose numbers are published ones, or parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.workload import (
    assigned_boot,
    balloon,
    convert_loop,
    dma_steady,
    random_mix,
    snp_accept,
    swiotlb_steady,
    tdx_boot,
)

__all__ = ("WORKLOADS", "Workload", "defaults_of", "open", "parameters_of")


class Workload(NamedTuple):
    """A workload.

    Attributes:
        build: makes it from a seed and parameters of its own
        what: what happens in it
        anchors: what of it is published or captured; the rest is chosen, as its module says
    """

    build: Callable[..., Lowered]
    what: str
    anchors: str


WORKLOADS: dict[str, Workload] = {
    "tdx-boot": Workload(
        tdx_boot.build,
        "the boot of a TDX guest: accepts, and a few pages that are converted again and again",
        "slots, accepts by page, mappings at 2M of a 4 GiB guest (Yan Zhao, 2025)",
    ),
    "assigned-boot": Workload(
        assigned_boot.build, "the same boot with an assigned device, which has all shared memory", "those of tdx-boot"
    ),
    "dma-steady": Workload(
        dma_steady.build,
        "a device that uses bounce buffers while pages of them become private and shared again",
        "size of the buffers: 6 % of memory, 64 MiB to 1 GiB (mem_encrypt_setup_arch())",
    ),
    "snp-accept": Workload(
        snp_accept.build,
        "an SEV-SNP guest that accepts its memory, with swiotlb and GHCBs shared",
        "units of 4 MiB, faults at 2M, 220 vCPUs (Michael Roth, 2023); size of swiotlb, a GHCB per vCPU",
    ),
    "swiotlb-steady": Workload(
        swiotlb_steady.build,
        "I/O through bounce buffers that stay shared, and conversions elsewhere if asked for",
        "64 MiB, requests of up to 256 KiB in slots that follow one another (kernel/dma/swiotlb.c)",
    ),
    "convert-loop": Workload(
        convert_loop.build,
        "all memory is converted to shared and to private again, and accepted page by page",
        "4 GiB, 10 times (gmem_benchmark_tdx_convert.c)",
    ),
    "balloon": Workload(
        balloon.build,
        "a balloon is inflated and deflated, by pages or by units of free page reporting",
        "128 of 320 MiB, 32,768 holes of 4K; units of 2 and 4 MiB (captures of QEMU)",
    ),
    "random": Workload(
        random_mix.build, "operations drawn by weight over one memory, uniform or by Zipf's law", "none"
    ),
}  # fmt: skip
"""Workloads by name (without `workload:`)."""


def defaults_of(name: str) -> dict[str, Any]:
    """A workload's own parameters and what they are without being given, {} of what is none; `workload:` may stand
    before its name."""
    row = WORKLOADS.get(name.removeprefix("workload:"))
    found = list(inspect.signature(row.build).parameters.values())[1:] if row else []
    return {one.name: one.default for one in found}


def parameters_of(name: str) -> tuple[str, ...]:
    """Names of a workload's own parameters, () of what is none; `workload:` may stand before its name."""
    return tuple(defaults_of(name))


def open(name: str, /, seed: int = 0, **parameters: float) -> Lowered:
    """Make a workload; equal seeds and parameters make equal traces.

    :param parameters: of the workload's own, defaults_of() names them
    :raises InputError: no such workload (the message lists those there are), or a parameter that it refuses
    """
    if name not in WORKLOADS:
        known = ", ".join(f"workload:{known}" for known in sorted(WORKLOADS))
        raise InputError(f"no such workload, there is {known}", f"workload:{name}")
    of_its_own = parameters_of(name)
    if unknown := sorted({*parameters} - {*of_its_own}):
        expected = f"some of {', '.join(of_its_own)}" if of_its_own else "none"
        raise InputError(f"{', '.join(unknown)}: expected {expected}", f"workload:{name}")
    return WORKLOADS[name].build(seed, **parameters)
