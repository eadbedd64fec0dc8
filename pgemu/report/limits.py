"""What each design cannot do, whatever the trace: the other half of a choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pgemu.report.sources import Tag

__all__ = ("LIMITS", "Limit", "limits_of")


@dataclass(frozen=True)
class Limit:
    """One thing that a design cannot do, or does badly, and the function that makes it so."""

    text: str
    function: str
    tag: Tag
    rule: str = ""  # of an inference, its name in pgemu/experiments/inferences.py


LIMITS: Mapping[str, tuple[Limit, ...]] = MappingProxyType(
    {
        "restructure": (
            Limit(
                "4K mappings for a whole huge page as long as one of its 4K pages is shared",
                "mm/hugetlb_restructuring.c:hugetlb_restructuring_split_folio",
                "posted",
            ),
            Limit(
                "conversion to private fails with EAGAIN while anybody holds a reference (GUP, pins, VFIO)",
                "virt/kvm/guest_memfd.c:__kvm_gmem_set_attributes",
                "next",
            ),
            Limit(
                "conversion to shared fails with ENOMEM when the vmemmap cannot be restored, and waits for "
                "transient references when it freezes a folio",
                "mm/hugetlb_vmemmap.c:hugetlb_vmemmap_restore_folio",
                "posted",
            ),
            Limit(
                "15.996 MiB (1G) or 28 KiB (2M) of vmemmap must be at hand for every huge page that may be split",
                "mm/hugetlb_vmemmap.c:alloc_vmemmap_page_list",
                "posted",
            ),
            Limit(
                "split folios can outlive the inode; a huge page returns to the pool when its last piece does",
                "mm/hugetlb_restructuring.c:maybe_merge_unreferenced_folio",
                "posted",
            ),
            Limit(
                "a hole over a split huge page fails with EAGAIN while a piece is referenced",
                "virt/kvm/guest_memfd.c:kvm_gmem_truncate_inode_range",
                "posted",
            ),
            Limit(
                "a 4K page that memory failure holds cannot become private, and its huge page not be merged",
                "mm/memory-failure.c:memory_failure",
                "inference",
                "memory-failure-huge",
            ),
        ),
        "pfnmap": (
            Limit(
                "GUP fails with EFAULT: no O_DIRECT, io_uring fixed buffers, vhost zero-copy, RDMA, process_vm_readv "
                "on guest memory",
                "mm/gup.c:check_vma_flags",
                "captured",
            ),
            Limit(
                "VFIO type1 refuses ordinary RAM with EFAULT",
                "drivers/vfio/vfio_iommu_type1.c:vaddr_get_pfns",
                "captured",
            ),
            Limit("iommufd refuses it with EFAULT: it pins through GUP only", "mm/gup.c:check_vma_flags", "captured"),
            Limit(
                "MADV_DONTNEED fails with EINVAL",
                "mm/madvise.c:madvise_dontneed_free_valid_vma",
                "captured",
            ),
            Limit(
                "no rmap: memory failure cannot find the processes that map a poisoned page",
                "mm/memory-failure.c:hwpoison_user_mappings",
                "captured",
            ),
            Limit(
                "one bad 4K page takes its whole huge page from the guest, and nothing from the process",
                "mm/memory-failure.c:try_memory_failure_hugetlb",
                "inference",
                "memory-failure-huge",
            ),
            Limit(
                "stale PTEs if the owner forgets to unmap before it punches: truncation looks at mapcounts only",
                "mm/truncate.c:truncate_cleanup_folio",
                "captured",
            ),
            Limit(
                "no reference protects a fault in flight: the PTE must be inserted under the invalidate_lock",
                "mm/memory.c:vmf_insert_pfn",
                "inference",
                "pfnmap-insert-locked",
            ),
            Limit(
                "a larger mapping level comes back only at the next guest fault, not at the conversion",
                "arch/x86/kvm/mmu/tdp_mmu.c:kvm_tdp_mmu_map",
                "captured",
            ),
        ),
    }
)


def limits_of(design: str) -> tuple[Limit, ...]:
    """What a design cannot do; of one that only has a row, that nobody has said so."""
    unsaid = Limit("nobody has listed any (pgemu/report/limits.py)", "none", "inference", "own-design")
    return LIMITS.get(design, (unsaid,))
