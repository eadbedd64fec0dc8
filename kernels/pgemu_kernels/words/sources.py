"""Functions of the kernel that what is told is modelled after, as data, and how certain that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tag = Literal["captured", "main", "next", "posted", "slides", "inference"]


@dataclass(frozen=True)
class Source:
    """A function of the kernel, as file:symbol, or a text where there is no function yet.

    rule: of an inference, its name in pgemu/experiments/inferences.py.
    """

    function: str
    tag: Tag
    rule: str = ""


def inferred(rule: str, function: str) -> Source:
    """What no source states: the name of the inferred rule, and in words what it says."""
    return Source(function, "inference", rule)


ByDesign = dict[str, tuple[Source, ...]]


def main(function: str) -> Source:
    """A function in Linus's tree."""
    return Source(function, "main")


def both(*sources: Source) -> ByDesign:
    """The same in both designs."""
    return {"restructure": sources, "pfnmap": sources}


# What several rows name.
MEMSLOT_DELETED = main("arch/x86/kvm/mmu/mmu.c:kvm_mmu_zap_all_fast")
UNMAP = main("mm/memory.c:unmap_mapping_pages")
NOTIFIER = main("virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start")
ZAP = main("arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_zap_leafs")
SPLIT = Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_split_folio", "posted")
MERGE = Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_merge_folio", "posted")
STRUCT_PAGES = main("mm/huge_memory.c:__split_folio_to_order")
ATTRIBUTES = Source("virt/kvm/guest_memfd.c:__kvm_gmem_set_attributes", "next")
TDP_MAP = main("arch/x86/kvm/mmu/tdp_mmu.c:kvm_tdp_mmu_map")
INSERT_PFN = Source("mm/memory.c:vmf_insert_pfn", "slides")
HOST_FAULT = Source("virt/kvm/guest_memfd.c:kvm_gmem_fault_user_mapping", "next")
GUEST_FAULT = main("arch/x86/kvm/mmu/mmu.c:kvm_mmu_faultin_pfn")
VCPU_MAP = main("virt/kvm/kvm_main.c:__kvm_vcpu_map")
VCPU_UNMAP = main("virt/kvm/kvm_main.c:kvm_vcpu_unmap")
PFN_CACHE_DEACTIVATE = main("virt/kvm/pfncache.c:kvm_gpc_deactivate")
PFN_CACHE = main("virt/kvm/pfncache.c:hva_to_pfn_retry")
PUNCH = main("virt/kvm/guest_memfd.c:kvm_gmem_punch_hole")
RELEASE = main("virt/kvm/guest_memfd.c:kvm_gmem_release")
RESTORE_FOLIO = main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_restore_folio")
OPTIMIZE_FOLIO = main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_optimize_folio")
ERROR_FOLIO = main("virt/kvm/guest_memfd.c:kvm_gmem_error_folio")
