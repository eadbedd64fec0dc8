"""What a design and an order of conversion are made of: bits of R_PROPERTIES."""

from __future__ import annotations

from enum import IntFlag


class Property(IntFlag):
    """Bits of R_PROPERTIES: those of the machine's design, and those of its order (pgemu/machine/designs.py)."""

    # Host entries have neither mapcount nor reference (pte_special(), vm_normal_page()); else their folio counts them.
    SPECIAL_ENTRIES = 1
    # The VMA is VM_PFNMAP: MADV_DONTNEED refuses it (mm/madvise.c:madvise_dontneed_free_valid_vma()), fork() copies it
    # (include/linux/mm.h:VM_COPY_ON_FORK), it is flushed before it goes (include/asm-generic/tlb.h:tlb_free_vmas()).
    VMA_PFNMAP = 2
    GUP = 4  # get_user_pages() gets at the pages: mm/gup.c:check_vma_flags(), vm_normal_page()
    SPLITS_FOLIOS = 8  # folios are of 4K while any of their pages is shared; else they stay whole for ever
    LEVEL_BY_FOLIO = 16  # stage 2 maps at the level of the folio; else at that of a block of pages of one kind
    INSERTS_LOCKED = 32  # a host entry is inserted under the invalidate_lock, for no reference protects the fault
    HOLES_UNMAP = 64  # a hole unmaps its range from processes itself; else truncation does, folio by folio
    # A conversion's invalidation begins and ends over its range rounded out to huge pages; else over the range. The zap
    # is of the range itself (R_ZAP_ROUNDED: of the rounded one, too).
    ROUNDS_RANGES = 128
    # Of the order alone.
    PREALLOCATES = 512  # nodes of the attribute tree are allocated before anything is done
    NAMES_PAGE = 1024  # an error names the page that failed, also one before the range
    DRAINS_LRU = 2048  # the gate of a 4K folio drains the LRU batches once before it gives up
    # KVM holds the folio until its leaf is there: kvm_release_faultin_page() of rfc2 and fixup. Later orders return no
    # struct page: kvm_gmem_get_pfn() puts the folio, after it released the lock.
    KEEPS_REFERENCE = 4096


class VmProperty(IntFlag):
    """Bits of V_PROPERTIES: what a kind of VM does otherwise than a plain one (pgemu/machine/vm_kinds.py)."""

    # Private memory has a root of its own, which mirrors tables that firmware owns: a zap goes to the roots that its
    # filter names (arch/x86/kvm/mmu/tdp_mmu.h:kvm_gfn_range_filter_to_root_types()), leaves that cross the border of a
    # zap are split before it, and no leaf takes the place of a table.
    MIRRORED = 1
    # The RMP says which pages are the guest's, in entries of 4K or 2M: no leaf of a guest_memfd is larger than its
    # entry, and shared pages have none (arch/x86/kvm/svm/sev.c:sev_gmem_max_mapping_level()).
    RMP = 2
    HONORS_ACCEPT = 4  # what the guest accepts at 4K is mapped at 4K, and a larger leaf there is split or dropped
    ACCEPT_ZEROES = 8  # accepting or adding a page zeroes it, beside the kernel, which clears every page it hands out
