"""Entry formats of the IOMMUs' second stage, as data: Intel VT-d and AMD v1 host tables.

Bits and rules as Linux has them. From 6.19 on both are drivers/iommu/generic_pt/ (iommu_pt.h, fmt/vtdss.h,
fmt/amdv1.h); before that drivers/iommu/intel/iommu.c and drivers/iommu/amd/io_pgtable.c. Captured with 6.12, 6.18
(VT-d) and 7.3. Plain Python: no numba here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pgemu_kernels.formats.entry_format import (
    WIDEST_ADDRESS,
    Execute,
    Family,
    FlushRule,
    Gather,
    MapRule,
    PageFormat,
    UnmapRule,
    check_width,
    span,
)

VTD_READ = 1 << 0
VTD_WRITE = 1 << 1
VTD_LARGE = 1 << 7
VTD_ACCESSED = 1 << 8
VTD_DIRTY = 1 << 9
VTD_FLUSHED = 1 << 10  # of a table entry: written back for a unit that does not snoop (SW_BIT_CACHE_FLUSH_DONE)
VTD_SNOOP = 1 << 11

AMD_PRESENT = 1 << 0
AMD_ACCESSED = 1 << 5
AMD_DIRTY = 1 << 6
AMD_NEXT_LEVEL = 7 << 9
AMD_FORCE_COHERENT = 1 << 60
AMD_READ = 1 << 61
AMD_WRITE = 1 << 62

KERNELS = ("6.1", "6.12", "6.18", "7.3")  # 6.1 is written as 6.12
AMD_PAGE_SIZES = span(12, 51) & ~(1 << 39)  # AMD_IOMMU_PGSIZES: every power of two but, for an erratum, 512G
_AMD_ALL_PAGES = 52  # CMD_INV_IOMMU_ALL_PAGES_ADDRESS: one command takes any number of pages


def _second_stage(levels: int, most: int, maxphyaddr: int, kernel: str) -> dict[str, Any]:
    """The fields of a PageFormat that both have in common. ValueError for levels and bits that there are not."""
    if not 3 <= levels <= most:
        raise ValueError(f"{levels} levels: expected 3 to {most}")
    if kernel not in KERNELS:
        raise KeyError(kernel)
    check_width(maxphyaddr)
    high = span(maxphyaddr, 51)
    return {
        "kernel": kernel,
        "flush": FlushRule.IOTLB,
        "levels": levels,
        "input_bits": min(12 + 9 * levels, 64),
        "address": span(12, 51),
        "reserved_leaf": (high, *(high | span(12, 9 * level + 2) for level in (2, 3, 4, 5))),
        "maxphyaddr": maxphyaddr,
        "execute": Execute(mask=0, supervisor_and_user=0, nobody=0),
        "memory_type_mask": (0, 0, 0),
        "memory_types": (("WB", (0, 0, 0)),),
    }


def _named(name: str, levels: int, usual: int) -> str:
    """The name of a format with so many levels in page_format.FORMATS."""
    return name if levels == usual else f"{name}-{levels}"


def vtd_second_stage(
    levels: int = 4,
    *,
    kernel: str = "7.3",
    maxphyaddr: int = WIDEST_ADDRESS,
    superpages: int = 2,
    accessed_dirty: bool = False,
    force_snoop: bool = False,
    coherent: bool = False,
    caching_mode: bool = False,
    max_address_mask: int = 18,
) -> PageFormat:
    """VT-d second stage of 3 to 5 levels. An entry is present if it may be read or written.

    superpages: the capability, 0: none, 1: 2M, 2: 2M and 1G. accessed_dirty: second-stage A/D is enabled.
    force_snoop: leaves carry SNP. coherent: ECAP.C, the unit snoops the processors' caches as it walks; where it does
    not, table entries of 7.3 have bit 10 once they were written back. caching_mode: CAP.CM, maps are flushed.
    max_address_mask: CAP.MAMV, what one page-selective invalidation takes: 2 ** mask pages; 18 is QEMU's.
    The default is the captured unit's. ValueError for other numbers.
    """
    second_stage = _second_stage(levels, 5, maxphyaddr, kernel)
    if superpages not in (0, 1, 2):
        raise ValueError(f"superpages {superpages}: expected 0, 1 or 2")
    if not 0 <= max_address_mask <= 63:
        raise ValueError(f"max_address_mask {max_address_mask}: expected 0 to 63")
    high = span(maxphyaddr, 51)
    generic = kernel == "7.3"
    read_always = kernel in ("6.1", "6.12")  # __domain_mapping(): DMA_FL_PTE_PRESENT is the read bit
    always = (VTD_SNOOP if force_snoop else 0) | (VTD_READ if read_always else 0)
    page = VTD_READ | VTD_WRITE | always
    no_2m, no_1g = (0 if superpages >= size else VTD_LARGE for size in (1, 2))
    return PageFormat(
        name=_named("vtd-s2", levels, 4),
        family=Family.VTD,
        present=VTD_READ | VTD_WRITE,
        leaf_mask=VTD_LARGE,
        leaf_value=VTD_LARGE,
        largest_leaf=1 + superpages,
        reserved_table=(0, high | no_2m, high | no_1g, high | VTD_LARGE, high | VTD_LARGE),
        table=VTD_READ | VTD_WRITE | (VTD_FLUSHED if generic and not coherent else 0),
        leaf=(page, page | VTD_LARGE, page | VTD_LARGE),
        accessed=VTD_ACCESSED if accessed_dirty else 0,
        dirty=VTD_DIRTY if accessed_dirty else 0,
        leaf_bits=always,
        read=VTD_READ,
        write=VTD_WRITE,
        page_sizes=sum(1 << 12 + 9 * size for size in range(superpages + 1)),
        map_rule=MapRule.IN_USE if generic else MapRule.CLEAR_LARGE,
        unmap_rule=UnmapRule.STOPS if generic else UnmapRule.COVERED,
        largest_flush=max_address_mask,
        gather=Gather.ALL if generic else Gather.LIKE,
        map_flushes=caching_mode,
        **second_stage,
    )


def amd_iommu_v1(
    levels: int = 3,
    *,
    kernel: str = "7.3",
    maxphyaddr: int = WIDEST_ADDRESS,
    accessed_dirty: bool = False,
    force_coherent: bool = True,
    most_levels: int = 6,
    page_sizes: int = AMD_PAGE_SIZES,
    caching_mode: bool = False,
) -> PageFormat:
    """AMD IOMMU v1 host tables of 3 to 6 levels.

    Bits 11:9 of a table entry hold the level of the table it points to; 0 makes a leaf of its level's size, 7 one
    whose size is in its address bits (amd_sized_leaf()). Linux writes no 512G leaves, because of an erratum.
    accessed_dirty: the device table enables A/D updates. force_coherent: leaves carry FC. most_levels: how many levels
    the unit walks (EFR.HATS); a domain begins with `levels` of them. page_sizes: bitmap of the sizes of leaves (the
    kernel's amd_iommu= parameter takes some away). caching_mode: NpCache, maps are flushed.
    ValueError for other numbers.
    """
    second_stage = _second_stage(levels, 6, maxphyaddr, kernel)
    if not levels <= most_levels <= 6:
        raise ValueError(f"most_levels {most_levels}: expected {levels} to 6")
    if page_sizes & ~AMD_PAGE_SIZES or not page_sizes & 1 << 12:
        raise ValueError(f"page_sizes {page_sizes:#x}: expected some of {AMD_PAGE_SIZES:#x}, 4K among them")
    high = span(maxphyaddr, 51)
    always = AMD_PRESENT | (AMD_FORCE_COHERENT if force_coherent else 0)
    page = always | AMD_READ | AMD_WRITE
    generic = kernel == "7.3"
    return PageFormat(
        name=_named("amd-v1", levels, 3),
        family=Family.AMD_IOMMU,
        present=AMD_PRESENT,
        leaf_mask=AMD_NEXT_LEVEL,
        leaf_value=0,
        largest_leaf=5,
        page_mask=AMD_NEXT_LEVEL,
        page_value=0,
        sized_leaf=AMD_NEXT_LEVEL,
        table_level_shift=9,
        reserved_table=(0, high, high, high, high, high),
        table=AMD_PRESENT | AMD_READ | AMD_WRITE,
        leaf=(page, page, page),
        accessed=AMD_ACCESSED if accessed_dirty else 0,
        dirty=AMD_DIRTY if accessed_dirty else 0,
        leaf_bits=always,
        read=AMD_READ,
        write=AMD_WRITE,
        page_sizes=page_sizes,
        most_levels=most_levels,
        map_rule=MapRule.IN_USE if generic else MapRule.REPLACE,
        unmap_rule=UnmapRule.STOPS if generic else UnmapRule.WHOLE,
        largest_flush=_AMD_ALL_PAGES,
        gather=Gather.ADJACENT if caching_mode else Gather.ALL,
        map_flushes=caching_mode,
        **second_stage,
    )


def taller(fmt: PageFormat) -> list[PageFormat]:
    """The formats that a domain's tables go over to as they grow, one level more each."""
    return [
        replace(fmt, name=_named("amd-v1", levels, 3), levels=levels, input_bits=min(12 + 9 * levels, 64))
        for levels in range(fmt.levels + 1, fmt.most_levels + 1)
    ]


def attributes_for(fmt: PageFormat, *, read: bool = True, write: bool = True) -> int:
    """Attributes of a 4K leaf with these rights, as a map takes them. ValueError without any."""
    if not (read or write):
        raise ValueError("read and write: expected one of them")
    return (
        fmt.leaf[0] & ~(fmt.read | fmt.write) | (fmt.read if read else 0) | (fmt.write if write else 0) | fmt.leaf_bits
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
