"""Which function of the kernel each row of the report models, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.machine.designs import Design

__all__ = ("METRIC_SOURCES", "OPERATION_SOURCES", "TAGS", "Source", "Tag")

Tag = Literal["main", "next", "posted", "slides", "inference"]

TAGS: Mapping[Tag, str] = MappingProxyType(
    {
        "main": "in Linus's tree",
        "next": "in linux-next: in-place conversion of 4K folios",
        "posted": "1G page support: on the list, or in its authors' public branch; not merged",
        "slides": "VM_PFNMAP slides of 2025-08-07; no code was posted",
        "inference": "stated by no source; what the code around it implies",
    }
)


@dataclass(frozen=True)
class Source:
    """A function of the kernel, as file:symbol, or a text where there is no function yet."""

    function: str
    tag: Tag


def _main(function: str) -> Source:
    return Source(function, "main")


_Sources = tuple[Source, ...]
_MEMSLOT_DELETED = _main("arch/x86/kvm/mmu/mmu.c:kvm_mmu_zap_all_fast")
_UNMAP = _main("mm/memory.c:unmap_mapping_pages")
_NOTIFIER = _main("virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start")
_ZAP = _main("arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_zap_leafs")
_SPLIT = Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_split_folio", "posted")
_MERGE = Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_merge_folio", "posted")
_STRUCT_PAGES = _main("mm/huge_memory.c:__split_folio_to_order")
_ATTRIBUTES = Source("virt/kvm/guest_memfd.c:__kvm_gmem_set_attributes", "next")
_TDP_MAP = _main("arch/x86/kvm/mmu/tdp_mmu.c:kvm_tdp_mmu_map")
_INSERT_PFN = Source("mm/memory.c:vmf_insert_pfn", "slides")
_HOST_FAULT = Source("virt/kvm/guest_memfd.c:kvm_gmem_fault_user_mapping", "next")
_GUEST_FAULT = _main("arch/x86/kvm/mmu/mmu.c:kvm_mmu_faultin_pfn")
_PUNCH = _main("virt/kvm/guest_memfd.c:kvm_gmem_punch_hole")
_RELEASE = _main("virt/kvm/guest_memfd.c:kvm_gmem_release")


def _both(*sources: Source) -> dict[Design, _Sources]:
    return {"restructure": sources, "pfnmap": sources}


_RESTORE_FOLIO = _main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_restore_folio")
_OPTIMIZE_FOLIO = _main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_optimize_folio")

OPERATION_SOURCES: Mapping[Operation, Mapping[Design, _Sources]] = MappingProxyType(
    {
        Operation.HOST_FAULT: {
            "restructure": (_HOST_FAULT, _main("mm/memory.c:set_pte_range")),
            "pfnmap": (
                _INSERT_PFN,
                Source("mm/memory.c:vmf_insert_pfn under the invalidate_lock", "inference"),
            ),
        },
        Operation.GUEST_FAULT: {
            "restructure": (
                _GUEST_FAULT,
                _TDP_MAP,
                Source("virt/kvm/guest_memfd.c:kvm_gmem_get_folio", "posted"),
            ),
            "pfnmap": (
                _GUEST_FAULT,
                _TDP_MAP,
                Source("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, level from shareability", "slides"),
            ),
        },
        Operation.CONVERT: {
            "restructure": (
                _ATTRIBUTES,
                _SPLIT,
                _MERGE,
                Source("order of steps: Ackerley Tng, plan of January 2026", "posted"),
            ),
            "pfnmap": (
                Source("conversion only unmaps, no gate", "slides"),
                _UNMAP,
                _ZAP,
                Source("order of steps, exact range", "inference"),
            ),
        },
        Operation.PUNCH_HOLE: {
            "restructure": (
                _PUNCH,
                Source("virt/kvm/guest_memfd.c:kvm_gmem_truncate_inode_range", "posted"),
            ),
            "pfnmap": (
                _PUNCH,
                Source("mm/memory.c:unmap_mapping_pages before truncation", "inference"),
            ),
        },
        Operation.ALLOCATE: _both(
            _main("virt/kvm/guest_memfd.c:kvm_gmem_allocate"),
            Source("virt/kvm/guest_memfd.c:kvm_gmem_get_folio, whole huge pages", "posted"),
        ),
        Operation.MEMORY_POLICY: _both(
            _main("virt/kvm/guest_memfd.c:kvm_gmem_get_policy"), _main("mm/mempolicy.c:mpol_set_shared_policy")
        ),
        Operation.MMAP: {
            "restructure": (_main("virt/kvm/guest_memfd.c:kvm_gmem_mmap"),),
            "pfnmap": (Source("virt/kvm/guest_memfd.c:kvm_gmem_mmap, with VM_PFNMAP", "slides"),),
        },
        Operation.MUNMAP: _both(_main("mm/memory.c:unmap_vmas"), _main("mm/memory.c:free_pgtables"), _NOTIFIER),
        Operation.ZAP: {
            "restructure": (_main("mm/memory.c:zap_present_ptes"), _NOTIFIER, _main("mm/pt_reclaim.c:try_to_free_pte")),
            "pfnmap": (
                _main("mm/madvise.c:madvise_dontneed_free_valid_vma"),
                _main("mm/memory.c:zap_present_ptes"),
                _NOTIFIER,
            ),
        },
        # Ordinary memory is the same beside either design.
        Operation.PROTECT: _both(
            _main("mm/mprotect.c:change_pte_range"), _main("mm/mprotect.c:can_change_pte_writable")
        ),
        Operation.FORK: _both(_main("kernel/fork.c:dup_mmap"), _main("mm/memory.c:copy_page_range")),
        Operation.EXIT: _both(_main("mm/mmap.c:exit_mmap"), _main("mm/memory.c:free_pgtables")),
        Operation.POPULATE: _both(_main("mm/madvise.c:madvise_populate"), _main("mm/gup.c:faultin_page_range")),
        Operation.GUARD_INSTALL: _both(_main("mm/madvise.c:madvise_guard_install")),
        Operation.GUARD_REMOVE: _both(_main("mm/madvise.c:madvise_guard_remove")),
        Operation.REMAP: _both(_main("mm/mremap.c:move_vma"), _main("mm/mremap.c:move_page_tables")),
        Operation.READ_SMAPS: _both(_main("mm/pagewalk.c:walk_pud_range")),
        Operation.REVOKE: _both(_main("drivers/vfio/pci/vfio_pci_core.c:vfio_pci_zap_and_down_write_memory_lock")),
        Operation.RESTORE: _both(_main("drivers/vfio/pci/vfio_pci_core.c:vfio_pci_memory_unlock_and_restore")),
        Operation.BIND: _both(_main("virt/kvm/guest_memfd.c:kvm_gmem_bind")),
        Operation.UNBIND: _both(_MEMSLOT_DELETED),
        Operation.GET: _both(_main("include/linux/mm.h:folio_get")),
        Operation.PUT: _both(_main("mm/swap.c:__folio_put")),
        Operation.CLOSE: {
            "restructure": (
                _RELEASE,
                Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_cleanup_workfn", "posted"),
            ),
            "pfnmap": (_RELEASE, Source("mm/hugetlb.c:free_huge_folio, folios stay whole", "slides")),
        },
        Operation.MEMSLOT: _both(_main("virt/kvm/kvm_main.c:kvm_set_memory_region"), _MEMSLOT_DELETED),
        Operation.DIRTY_LOG: _both(_main("virt/kvm/kvm_main.c:kvm_get_dirty_log_protect")),
        Operation.ATTRIBUTES: _both(_main("virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes"), _ZAP),
        Operation.PREFAULT: _both(_main("virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory"), _TDP_MAP),
        Operation.VM_EXIT: _both(_main("virt/kvm/kvm_main.c:kvm_destroy_vm")),
        # Huge pages themselves, too.
        Operation.POOL_RESIZE: _both(_main("mm/hugetlb.c:set_max_huge_pages")),
        Operation.POOL_DEMOTE: _both(_main("mm/hugetlb.c:demote_pool_huge_page")),
        Operation.FOLIO_ALLOCATE: _both(_main("mm/hugetlb.c:alloc_hugetlb_folio")),
        Operation.FOLIO_FREE: _both(_main("mm/hugetlb.c:free_huge_folio")),
        Operation.VMEMMAP_OPTIMIZE: _both(
            _OPTIMIZE_FOLIO, _main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_optimize_folios")
        ),
        Operation.VMEMMAP_RESTORE: _both(_RESTORE_FOLIO, _main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_restore_folios")),
        Operation.FOLIO_SPLIT: _both(Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_split_folio", "posted")),
        Operation.FOLIO_MERGE: _both(Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_merge_folio", "posted")),
        Operation.FOLIO_REFERENCE: _both(_main("mm/gup.c:try_grab_folio"), _main("include/linux/mm.h:folio_put")),
        Operation.FOLIO_FREEZE: _both(_main("include/linux/page_ref.h:folio_ref_freeze")),
        Operation.DISSOLVE: _both(_main("mm/hugetlb.c:dissolve_free_hugetlb_folio")),
        Operation.POISON: _both(_main("mm/hugetlb.c:folio_set_hugetlb_hwpoison")),
        Operation.VMEMMAP_STORE: _both(_main("mm/hugetlb_vmemmap.c:vmemmap_remap_pte")),
        Operation.PIN: _both(_main("mm/gup.c:pin_user_pages"), _main("mm/gup.c:check_vma_flags")),
        Operation.UNPIN: _both(_main("mm/gup.c:unpin_user_pages")),
        Operation.LRU_DRAIN: _both(_main("mm/swap.c:lru_add_drain_all")),
        Operation.RELEASE: _both(_RELEASE),
        Operation.WORK: {
            "restructure": (
                Source("mm/guestmem_hugetlb.c:guestmem_hugetlb_cleanup_folio", "posted"),
                Source("a worker that merges what conversions leave split", "inference"),
            ),
            "pfnmap": (Source("nothing is merged: no work item exists", "slides"),),
        },
        Operation.DIRTY_LOGGING: _both(
            _main("arch/x86/kvm/x86.c:kvm_mmu_slot_apply_flags"),
            Source("dirty logging of a guest_memfd slot, which KVM refuses", "inference"),
        ),
    }
)
"""For every operation that the machine carries out and each design."""

_HOST_LEVEL: dict[Design, _Sources] = {"restructure": (_main("mm/memory.c:set_pte_range"),), "pfnmap": (_INSERT_PFN,)}
_GUEST_LEVEL: dict[Design, _Sources] = {
    "restructure": (_main("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, order of the folio"), _TDP_MAP),
    "pfnmap": (Source("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, level from shareability", "slides"), _TDP_MAP),
}
_HOST_TABLES = _both(_main("mm/memory.c:__pte_alloc"), _main("mm/memory.c:free_pgd_range"))
_STAGE2_TABLES = _both(
    _main("arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_link_sp"), _main("arch/x86/kvm/mmu/tdp_mmu.c:handle_removed_pt")
)
_RESTORE = _both(_RESTORE_FOLIO)
_OPTIMIZE = _both(_OPTIMIZE_FOLIO)
_VMEMMAP = _both(_RESTORE["pfnmap"][0], _OPTIMIZE["pfnmap"][0])
_WHOLE = Source("folios are never split", "slides")
_ZEROED: dict[Design, _Sources] = {
    "restructure": (_main("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn"), _HOST_FAULT),
    "pfnmap": (Source("whole folio, for PG_uptodate is one bit; or a bit per page (--zero page)", "inference"),),
}

METRIC_SOURCES: Mapping[str, Mapping[Design, _Sources]] = MappingProxyType(
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
        "folios_split": {"restructure": (_SPLIT,), "pfnmap": (_WHOLE,)},
        "folios_merged": {"restructure": (_MERGE,), "pfnmap": (_WHOLE,)},
        "huge_pages_whole": {"restructure": (_SPLIT, _MERGE), "pfnmap": (_WHOLE,)},
        "huge_pages_split": {"restructure": (_SPLIT, _MERGE), "pfnmap": (_WHOLE,)},
        "struct_page_bytes": {
            "restructure": (_STRUCT_PAGES, _main("mm/page_alloc.c:prep_compound_tail")),
            "pfnmap": (_main("mm/hugetlb.c:free_huge_folio"), _main("mm/filemap.c:__filemap_add_folio")),
        },
        "rmap_changes": {
            "restructure": (_main("mm/rmap.c:__folio_add_rmap"),),
            "pfnmap": (_main("mm/memory.c:vmf_insert_pfn, special entries have none"),),
        },
        "zeroed_by_page": _ZEROED,
        "zeroed_by_folio": _ZEROED,
        "flushes_mm": _both(_main("mm/mmu_gather.c:tlb_finish_mmu")),
        "flushes_vm": _both(_main("virt/kvm/kvm_main.c:kvm_flush_remote_tlbs")),
        "flushes_kernel": _both(_main("mm/hugetlb_vmemmap.c:vmemmap_remap_range")),
        "refused_conversions": {"restructure": (_ATTRIBUTES, _SPLIT), "pfnmap": (Source("no gate", "slides"),)},
        "refused_holes": {
            "restructure": (Source("virt/kvm/guest_memfd.c:kvm_gmem_truncate_inode_range", "posted"),),
            "pfnmap": (Source("nothing to merge, so nothing to refuse", "slides"),),
        },
        "refused_zaps": _both(_main("mm/madvise.c:madvise_dontneed_free_valid_vma")),
    }
)
"""For every metric and each design: what changes it."""
