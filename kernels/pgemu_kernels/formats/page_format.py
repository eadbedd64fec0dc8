"""All entry formats: a file each, which makes them, and its line in `FORMATS`; those that every machine has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pgemu_kernels import words as W
from pgemu_kernels.formats import bits
from pgemu_kernels.formats.arm64 import ARM_DIRTY_MODIFIER, ARM_WRITE, arm64_stage2
from pgemu_kernels.formats.entry_format import ALL, Family, FlushRule, MapRule, PageFormat, UnmapRule, span
from pgemu_kernels.formats.ept import ept
from pgemu_kernels.formats.iommu import amd_iommu_v1, vtd_second_stage
from pgemu_kernels.formats.npt import npt
from pgemu_kernels.formats.x86_64 import X86_MEMORY_TYPES, x86_64

__all__ = (
    "ALL",
    "ARM_DIRTY_MODIFIER",
    "ARM_WRITE",
    "FORMATS",
    "X86_MEMORY_TYPES",
    "Family",
    "FlushRule",
    "MapRule",
    "PageFormat",
    "UnmapRule",
    "amd_iommu_v1",
    "arm64_stage2",
    "ept",
    "format_table",
    "machine_formats",
    "npt",
    "span",
    "vtd_second_stage",
    "x86_64",
)


def machine_formats(
    kernel: str, *, nx_huge_pages: bool = False, l1tf: bool = False, pti: bool = False
) -> tuple[PageFormat, PageFormat, PageFormat]:
    """The formats that every machine has, as `kernel` writes them: of processes, NPT, EPT.

    `l1tf`: a processor with that bug and 44 bits of cache address, as captured. KeyError for an unknown kernel.
    """
    cache_bits = 44 if l1tf else None
    return (
        x86_64(kernel=kernel, pti=pti),
        npt(kernel=kernel),
        ept(kernel=kernel, nx_huge_pages=nx_huge_pages, l1tf_cache_bits=cache_bits),
    )


def format_table(
    kernel: str, *, nx_huge_pages: bool = False, l1tf: bool = False, pti: bool = False
) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """`machine_formats` as kernels read them: uint64[3, F_WORDS].

    Rows formats.HOST_X86_64, with the leaves of the designs' mappings, STAGE2_NPT and STAGE2_EPT.
    """
    every = machine_formats(kernel, nx_huge_pages=nx_huge_pages, l1tf=l1tf, pti=pti)
    table = np.array([fmt.row() for fmt in every], np.uint64)
    leaves = {
        W.F_LEAF_4K: bits.FILE_LEAF,
        W.F_LEAF_2M: bits.FILE_LEAF | bits.LARGE,
        W.F_LEAF_1G: bits.FILE_LEAF | bits.LARGE,
        W.F_LEAF_4K_RO: bits.FILE_LEAF_READ_ONLY,
        W.F_SPECIAL_4K: bits.PFN_LEAF,
        W.F_SPECIAL_4K_RO: bits.PFN_LEAF_READ_ONLY,
    }
    for word, value in leaves.items():
        table[bits.HOST_X86_64, int(word)] = value
    return table


FORMATS: dict[str, Callable[..., PageFormat]] = {
    "x86-64": x86_64,
    "x86-64-5": partial(x86_64, 5),
    "ept": ept,
    "ept-5": partial(ept, 5),
    "npt": npt,
    "npt-5": partial(npt, 5),
    "arm64-s2": arm64_stage2,
    "arm64-s2-48": partial(arm64_stage2, 48),
    "vtd-s2": vtd_second_stage,
    "vtd-s2-3": partial(vtd_second_stage, 3),
    "vtd-s2-5": partial(vtd_second_stage, 5),
    "amd-v1": amd_iommu_v1,
    "amd-v1-4": partial(amd_iommu_v1, 4),
    "amd-v1-5": partial(amd_iommu_v1, 5),
    "amd-v1-6": partial(amd_iommu_v1, 6),
}
"""Makers of the formats by the name that --format takes; parameters are the maker's keywords."""
