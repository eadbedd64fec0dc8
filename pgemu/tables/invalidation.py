"""The command that an IOMMU gets for a flush: VT-d's IOTLB invalidation, AMD's INVALIDATE_IOMMU_PAGES.

>>> from pgemu import Config, Machine
>>> table = Machine(Config()).create_page_table("vtd-s2")
>>> table.map_range(0x3000, physical=0x80003000, length=0x5000).status
0
>>> invalidation(table.format, table.unmap(0x3000, 0x5000).flush)
Invalidation(pages=8, address=0x0, word=0x43)
"""

from __future__ import annotations

from typing import NamedTuple

from pgemu.machine.arguments import guards
from pgemu.tables.flush import Flush
from pgemu_kernels.formats.page_format import Family, FlushRule, PageFormat

__all__ = ("Invalidation", "invalidation")

VTD_HINT = 1 << 6  # IH: no table went, so paging-structure caches may keep what they have
AMD_SIZE = 1 << 0  # S: more than one page, the size in the address
AMD_TABLES = 1 << 1  # PDE: paging-structure caches, too
AMD_EVERYTHING = (1 << 63) - 1 & -4096  # CMD_INV_IOMMU_ALL_PAGES_ADDRESS


class Invalidation(NamedTuple):
    """What is invalidated: an aligned power of two of pages from `address` on, or, with pages 0, the whole domain.

    word: VT-d: the second quadword of the descriptor (address, IH, AM), 0 for a domain-selective one; AMD: the third
    and fourth doubleword of the command (address with the size coded in it, S, PDE).
    """

    pages: int
    address: int
    word: int

    def __repr__(self) -> str:
        return f"Invalidation(pages={self.pages}, address={self.address:#x}, word={self.word:#x})"


@guards()
def invalidation(fmt: PageFormat, flush: Flush) -> Invalidation:
    """The command for a flush of a domain of this format. ValueError for another format.

    Sources: drivers/iommu/intel/cache.c:calculate_psi_aligned_address(), cache_tag_flush_range(),
    intel/iommu.c:intel_iommu_tlb_sync(); drivers/iommu/amd/iommu.c:build_inv_address(), build_inv_iommu_pages().
    """
    if fmt.flush != FlushRule.IOTLB:
        raise ValueError(f"fmt {fmt.name}: expected one of an IOMMU's domain")
    first, last = flush.start >> 12, flush.end - 1 >> 12
    order = (first ^ last).bit_length()
    address = first >> order << order + 12
    if fmt.family is Family.VTD:
        if order > fmt.largest_flush:
            return Invalidation(0, 0, 0)
        return Invalidation(1 << order, address, address | (0 if flush.freed_tables else VTD_HINT) | order)
    if not order:
        return Invalidation(1, address, address | AMD_TABLES)
    if order + 11 > 51:
        return Invalidation(0, 0, AMD_EVERYTHING | AMD_SIZE | AMD_TABLES)
    # Ones below the highest bit that differs, which stays 0.
    coded = (flush.start | (1 << order + 11) - 1) & -4096
    return Invalidation(1 << order, address, coded | AMD_SIZE | AMD_TABLES)
