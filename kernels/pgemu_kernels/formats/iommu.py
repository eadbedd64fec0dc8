"""Entry formats of the IOMMUs' second stage, as data: Intel VT-d and AMD v1 host tables.

Bits as Linux writes them: drivers/iommu/generic_pt/fmt/vtdss.h and amdv1.h, drivers/iommu/amd/amd_iommu_types.h.
Nothing maps through them yet: they are for encoding and decoding. Of AMD's, words.F_TABLE lacks the level that a
table entry carries, so no kernel can make its tables. Plain Python: no numba here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgemu_kernels.formats.entry_format import WIDEST_ADDRESS, Execute, Family, FlushRule, PageFormat, check_width, span

VTD_READ = 1 << 0
VTD_WRITE = 1 << 1
VTD_LARGE = 1 << 7
VTD_ACCESSED = 1 << 8
VTD_DIRTY = 1 << 9
VTD_SNOOP = 1 << 11

AMD_PRESENT = 1 << 0
AMD_ACCESSED = 1 << 5
AMD_DIRTY = 1 << 6
AMD_NEXT_LEVEL = 7 << 9
AMD_FORCE_COHERENT = 1 << 60
AMD_READ = 1 << 61
AMD_WRITE = 1 << 62


def _second_stage(levels: int, maxphyaddr: int) -> dict[str, Any]:
    """The fields of a PageFormat that both have in common. ValueError for levels or bits that there are not."""
    if levels not in (3, 4, 5):
        raise ValueError(f"{levels} levels: expected 3 to 5")
    check_width(maxphyaddr)
    high = span(maxphyaddr, 51)
    return {
        "flush": FlushRule.RANGE,
        "levels": levels,
        "input_bits": 12 + 9 * levels,
        "address": span(12, 51),
        "reserved_leaf": (high, high | span(12, 20), high | span(12, 29), high, high),
        "maxphyaddr": maxphyaddr,
        "execute": Execute(mask=0, supervisor_and_user=0, nobody=0),
        "memory_type_mask": (0, 0, 0),
        "memory_types": (("WB", (0, 0, 0)),),
    }


def vtd_second_stage(
    levels: int = 4,
    *,
    maxphyaddr: int = WIDEST_ADDRESS,
    superpages: int = 2,
    accessed_dirty: bool = False,
    force_snoop: bool = False,
) -> PageFormat:
    """VT-d second stage of 3 to 5 levels. An entry is present if it may be read or written.

    superpages: the capability, 0: none, 1: 2M, 2: 2M and 1G. accessed_dirty: second-stage A/D is enabled.
    force_snoop: leaves carry SNP. ValueError for other numbers.
    """
    second_stage = _second_stage(levels, maxphyaddr)
    if superpages not in (0, 1, 2):
        raise ValueError(f"superpages {superpages}: expected 0, 1 or 2")
    high = span(maxphyaddr, 51)
    page = VTD_READ | VTD_WRITE | (VTD_SNOOP if force_snoop else 0)
    no_2m, no_1g = (0 if superpages >= size else VTD_LARGE for size in (1, 2))
    return PageFormat(
        name="vtd-s2",
        family=Family.VTD,
        present=VTD_READ | VTD_WRITE,
        leaf_mask=VTD_LARGE,
        leaf_value=VTD_LARGE,
        largest_leaf=1 + superpages,
        reserved_table=(0, high | no_2m, high | no_1g, high | VTD_LARGE, high | VTD_LARGE),
        table=VTD_READ | VTD_WRITE,
        leaf=(page, page | VTD_LARGE, page | VTD_LARGE),
        accessed=VTD_ACCESSED if accessed_dirty else 0,
        dirty=VTD_DIRTY if accessed_dirty else 0,
        leaf_bits=VTD_SNOOP if force_snoop else 0,
        read=VTD_READ,
        write=VTD_WRITE,
        **second_stage,
    )


def amd_iommu_v1(levels: int = 4, *, maxphyaddr: int = WIDEST_ADDRESS, accessed_dirty: bool = False) -> PageFormat:
    """AMD IOMMU v1 host tables of 3 to 5 levels.

    Bits 11:9 of a table entry hold the level of the table it points to; 0 makes a leaf of its level's size, 7 one
    whose size is in its address bits (amd_sized_leaf()). Linux writes no 512G leaves, because of an erratum.
    accessed_dirty: the device table enables A/D updates. ValueError for other numbers of levels or bits.
    """
    second_stage = _second_stage(levels, maxphyaddr)
    high = span(maxphyaddr, 51)
    page = AMD_PRESENT | AMD_READ | AMD_WRITE
    return PageFormat(
        name="amd-v1",
        family=Family.AMD_IOMMU,
        present=AMD_PRESENT,
        leaf_mask=AMD_NEXT_LEVEL,
        leaf_value=0,
        page_mask=AMD_NEXT_LEVEL,
        page_value=0,
        sized_leaf=AMD_NEXT_LEVEL,
        table_level_shift=9,
        reserved_table=(0, high, high, high, high),
        table=page,
        leaf=(page, page, page),
        accessed=AMD_ACCESSED if accessed_dirty else 0,
        dirty=AMD_DIRTY if accessed_dirty else 0,
        leaf_bits=AMD_PRESENT,
        read=AMD_READ,
        write=AMD_WRITE,
        **second_stage,
    )


def amd_sized_leaf(address: int, size: int, *, read: bool = True, write: bool = True, extra: int = 0) -> int:
    """One of the equal entries of AMD's leaf of another size than its level's: amd_iommu_types.h:PAGE_SIZE_PTE().

    There are 2^((log2(size) - 12) mod 9) of them. ValueError unless `size` is a power of two from 8K to 256G that
    `address` is a multiple of.
    """
    if size & size - 1 or not 1 << 13 <= size <= 1 << 38 or address % size or address >> WIDEST_ADDRESS:
        raise ValueError(f"{size:#x} bytes at {address:#x}: expected an aligned power of two from 8K to 256G")
    coded = (address | size - 1) & ~(size >> 1) & span(12, 51)
    rights = (AMD_READ if read else 0) | (AMD_WRITE if write else 0)
    return coded | AMD_NEXT_LEVEL | AMD_PRESENT | rights | extra


def amd_size(entry: int) -> int:
    """Size in bytes of what a leaf with its size in its address maps."""
    zero = ~entry >> 12
    return 2 << 12 + (zero & -zero).bit_length() - 1


IOMMU_FORMATS: dict[str, Callable[..., PageFormat]] = {"vtd-s2": vtd_second_stage, "amd-v1": amd_iommu_v1}
"""Makers by the name that `pgemu decode --format` takes, beside page_format.FORMATS."""
