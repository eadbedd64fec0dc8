"""Which function of the kernel each row of the report models, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pgemu_kernels.words import sources as S
from pgemu_kernels.words.operations import Operation
from pgemu_kernels.words.sources import Source, Tag

__all__ = ("METRIC_SOURCES", "OPERATION_SOURCES", "TAGS", "Source", "Tag", "sources_of")

TAGS: Mapping[Tag, str] = MappingProxyType(
    {
        "captured": "a kernel was seen to do it",
        "main": "in Linus's tree",
        "next": "in linux-next: in-place conversion of 4K folios",
        "posted": "1G page support: on the list, or in its authors' public branch; not merged",
        "slides": "VM_PFNMAP slides of 2025-08-07; no code was posted",
        "inference": "stated by no source; what the code around it implies",
    }
)

_Sources = tuple[Source, ...]

OPERATION_SOURCES: Mapping[Operation, Mapping[str, _Sources]] = MappingProxyType(
    {operation: operation.sources for operation in Operation if operation.sources}
)
"""For every operation that the machine carries out and each design."""

_HOST_LEVEL: Mapping[str, _Sources] = {"restructure": (S.main("mm/memory.c:set_pte_range"),), "pfnmap": (S.INSERT_PFN,)}
_GUEST_LEVEL: Mapping[str, _Sources] = {
    "restructure": (S.main("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, order of the folio"), S.TDP_MAP),
    "pfnmap": (Source("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, level from shareability", "slides"), S.TDP_MAP),
}
_HOST_TABLES = S.both(S.main("mm/memory.c:__pte_alloc"), S.main("mm/memory.c:free_pgd_range"))
_STAGE2_TABLES = S.both(
    S.main("arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_link_sp"), S.main("arch/x86/kvm/mmu/tdp_mmu.c:handle_removed_pt")
)
_RESTORE = S.both(S.RESTORE_FOLIO)
_OPTIMIZE = S.both(S.OPTIMIZE_FOLIO)
_VMEMMAP = S.both(_RESTORE["pfnmap"][0], _OPTIMIZE["pfnmap"][0])
_WHOLE = Source("folios are never split", "slides")
_ZEROED: Mapping[str, _Sources] = {
    "restructure": (S.main("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn"), S.HOST_FAULT),
    "pfnmap": (S.inferred("pfnmap-zeroing", "page by page, for PG_uptodate is one bit (--zero)"),),
}

METRIC_SOURCES: Mapping[str, Mapping[str, _Sources]] = MappingProxyType(
    {
        "host_mapped_4k": _HOST_LEVEL,
        "host_mapped_2m": _HOST_LEVEL,
        "host_mapped_1g": _HOST_LEVEL,
        "stage2_mapped_4k": _GUEST_LEVEL,
        "stage2_mapped_2m": _GUEST_LEVEL,
        "stage2_mapped_1g": _GUEST_LEVEL,
        "host_tables": _HOST_TABLES,
        "host_tables_peak": _HOST_TABLES,
        "stage2_tables": _STAGE2_TABLES,
        "stage2_tables_peak": _STAGE2_TABLES,
        "vmemmap": _VMEMMAP,
        "vmemmap_peak": _VMEMMAP,
        "vmemmap_restored": _RESTORE,
        "vmemmap_freed": _OPTIMIZE,
        "folios_split": {"restructure": (S.SPLIT,), "pfnmap": (_WHOLE,)},
        "folios_merged": {"restructure": (S.MERGE,), "pfnmap": (_WHOLE,)},
        "huge_pages_whole": {"restructure": (S.SPLIT, S.MERGE), "pfnmap": (_WHOLE,)},
        "huge_pages_split": {"restructure": (S.SPLIT, S.MERGE), "pfnmap": (_WHOLE,)},
        "struct_page_bytes": {
            "restructure": (S.STRUCT_PAGES, S.main("mm/page_alloc.c:prep_compound_tail")),
            "pfnmap": (S.main("mm/hugetlb.c:free_huge_folio"), S.main("mm/filemap.c:__filemap_add_folio")),
        },
        "rmap_changes": {
            "restructure": (S.main("mm/rmap.c:__folio_add_rmap"),),
            "pfnmap": (S.main("mm/memory.c:vmf_insert_pfn, special entries have none"),),
        },
        "zeroed_by_page": _ZEROED,
        "zeroed_by_folio": _ZEROED,
        "zeroed_unreached": _ZEROED,
        "stale_shown": _ZEROED,
        "stage2_beyond": S.both(S.ZAP),
        "mapped_private": S.both(S.VCPU_MAP, S.PFN_CACHE),
        "mapped_freed": S.both(S.VCPU_MAP, S.PFN_CACHE),
        "stores_irq_off": {"restructure": (S.SPLIT, S.MERGE), "pfnmap": (_WHOLE,)},
        "flushes_mm": S.both(S.main("mm/mmu_gather.c:tlb_finish_mmu")),
        "flushes_vm": S.both(S.main("virt/kvm/kvm_main.c:kvm_flush_remote_tlbs")),
        "flushes_kernel": S.both(S.main("mm/hugetlb_vmemmap.c:vmemmap_remap_range")),
        "refused_conversions": {"restructure": (S.ATTRIBUTES, S.SPLIT), "pfnmap": (Source("no gate", "slides"),)},
        "spinning_conversions": {
            "restructure": (Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_freeze_folio", "posted"),),
            "pfnmap": (_WHOLE,),
        },
        "refused_holes": {
            "restructure": (Source("virt/kvm/guest_memfd.c:kvm_gmem_truncate_inode_range", "posted"),),
            "pfnmap": (S.inferred("holes", "checks of fallocate() are those of the version of restructure"),),
        },
        "refused_zaps": S.both(S.main("mm/madvise.c:madvise_dontneed_free_valid_vma")),
    }
)
"""For every metric and each design: what changes it."""


def sources_of(by_design: Mapping[str, _Sources], design: str) -> _Sources:
    """What a row models on a design; of one that only has a row of properties, that no source is named."""
    return by_design.get(design, (S.inferred("own-design", "its properties combined: no source is named"),))
