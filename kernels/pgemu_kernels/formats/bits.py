"""Entry formats as data, and the one table of what differs between kernel versions.

Values are those of real kernels; each has its source beside it. Plain Python: no numba here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

U = np.uint64

# x86-64, user half: arch/x86/include/asm/pgtable_types.h
PRESENT = 1 << 0
WRITE = 1 << 1
USER = 1 << 2
WRITE_THROUGH = 1 << 3  # PWT, PCD, PAT: the index into the PAT MSR
CACHE_DISABLE = 1 << 4
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
PAT_4K = 1 << 7  # of a 4K entry; of a larger leaf it is bit 12
PAT_LARGE = 1 << 12
GLOBAL = 1 << 8
PROTECTION_NONE = 1 << 8  # _PAGE_PROTNONE, of an entry that is not present
SPECIAL = 1 << 9
UFFD_WP = 1 << 10
SOFT_DIRTY = 1 << 11
SAVED_DIRTY = 1 << 58  # _PAGE_SAVED_DIRTY: bit 6 of a page that may not be written (it would be a shadow stack's)
NO_EXECUTE = 1 << 63
PROTECTION_KEY = 0xF << 59
EXECUTE_ONLY_KEY = 1 << 59  # the first key that is free: arch/x86/mm/pkeys.c:__execute_only_pkey()
ADDRESS = 0x000F_FFFF_FFFF_F000

TABLE = PRESENT | WRITE | USER | ACCESSED | DIRTY  # pmd_populate(): 0x67

# The same as kernels compare them.
PTE_PRESENT = U(PRESENT)
PTE_WRITE = U(WRITE)
PTE_USER = U(USER)
PTE_ACCESSED = U(ACCESSED)
PTE_DIRTY = U(DIRTY)
PTE_LARGE = U(LARGE)
PTE_GLOBAL = U(GLOBAL)
PTE_PROTECTION_NONE = U(PROTECTION_NONE)
PTE_SPECIAL = U(SPECIAL)
PTE_SOFT_DIRTY = U(SOFT_DIRTY)
PTE_SAVED_DIRTY = U(SAVED_DIRTY)
PTE_NO_EXECUTE = U(NO_EXECUTE)
PTE_PROTECTION_KEY = U(PROTECTION_KEY)
PTE_EXECUTE_ONLY_KEY = U(EXECUTE_ONLY_KEY)
PTE_ADDRESS = U(ADDRESS)
PTE_TABLE = U(TABLE)

_SHARED = PRESENT | WRITE | USER | ACCESSED | NO_EXECUTE  # PAGE_SHARED: 8..27
_READ_ONLY = PRESENT | USER | ACCESSED | NO_EXECUTE  # PAGE_READONLY: 8..25
FILE_LEAF = _SHARED | DIRTY | SOFT_DIRTY | WRITE  # 8..867, of guest_memfd once it is dirty (captured)
FILE_LEAF_READ_ONLY = _READ_ONLY  # 8..25, set_pte_range() without write access
PFN_LEAF = _SHARED | SPECIAL  # vmf_insert_pfn(): 8..227
PFN_LEAF_READ_ONLY = _READ_ONLY | SPECIAL  # 8..225

# Kernel mappings of the vmemmap
VMEMMAP_LARGE = PRESENT | WRITE | ACCESSED | DIRTY | LARGE | GLOBAL | NO_EXECUTE  # 8..1e3
VMEMMAP_PAGE = PRESENT | WRITE | ACCESSED | DIRTY | GLOBAL | NO_EXECUTE  # 8..163
VMEMMAP_READ_ONLY = PRESENT | ACCESSED | GLOBAL | NO_EXECUTE  # 8..121

# KVM's stage 2: arch/x86/kvm/mmu/spte.h
EMPTY_SPTE = 1 << 63  # SHADOW_NONPRESENT_VALUE
MMU_PRESENT = 1 << 11
HOST_WRITABLE = 1 << 9  # of NPT; EPT has them in KernelParameters.ept_writable
MMU_WRITABLE = 1 << 10
NPT_TABLE = PRESENT | WRITE | USER | ACCESSED | MMU_PRESENT  # 827
NPT_LEAF = PRESENT | WRITE | USER | ACCESSED | DIRTY | 1 << 9 | 1 << 10 | MMU_PRESENT  # e67
EPT_RWX = 0b111
EPT_WB_IPAT = 6 << 3 | 1 << 6
EPT_ACCESSED = 1 << 8
EPT_DIRTY = 1 << 9
EPT_USER_EXECUTE = 1 << 10
EPT_AD_DISABLED = 1 << 52  # SPTE_TDP_AD_DISABLED; where 7.3 has it was not captured
SUPPRESS_VE = 1 << 63

HOST_X86_64 = 0
STAGE2_NPT = 1
STAGE2_EPT = 2


class BootMarks(IntEnum):
    """How the vmemmap entries of a 1G page of the boot allocator look (captured; hugetlb_vmemmap_init_early()).

    NONE: it is optimised like any other, once the page allocator runs (6.12). FIRST_64: 63 read-only entries with bit
    58 and 4032 read-write ones, all to the head's page (6.18). ALL: 4095 read-only ones with bit 58 (7.3).
    """

    NONE = 0
    FIRST_64 = 1
    ALL = 2


@dataclass(frozen=True)
class Configuration:
    """What the kernel configuration decides, as captured.

    `page_flags`: zone (ZONE_NORMAL) and last_cpupid in the flags of a struct page of node 0, as
    mm/mm_init.c:__init_single_page() leaves them; `tail_flags`: the same of a struct page that is made later, for a
    shared tail page (last_cpupid 0). `node_shift`: where the node begins, 0 without CONFIG_NUMA. `hugetlb_cgroup`:
    CONFIG_CGROUP_HUGETLB. `deferred_struct_pages`: CONFIG_DEFERRED_STRUCT_PAGE_INIT, with which the boot allocator's
    1G pages keep what the first 128 MiB of the zone left in their shared tail page, else what its last 1G page left.
    `memory_failure`: CONFIG_MEMORY_FAILURE, without which there is no PG_hwpoison.
    `lru_references`: the lower of the two flags in which MGLRU counts references (LRU_REFS_PGOFF), 0 without MGLRU.
    `init_on_alloc`: CONFIG_INIT_ON_ALLOC_DEFAULT_ON, what the page allocator gives was zeroed (captured; "small" is
    inference).
    """

    page_flags: int
    tail_flags: int
    node_shift: int
    hugetlb_cgroup: bool
    deferred_struct_pages: bool
    memory_failure: bool
    lru_references: int
    init_on_alloc: bool


CONFIGURATIONS: dict[str, Configuration] = {
    "debian": Configuration(0x0017_FFFF_C000_0000, 0x0010_0000_0000_0000, 54, True, True, True, 25, True),
    "small": Configuration(0x4000_0000_0000_0000, 0x4000_0000_0000_0000, 0, False, False, False, 0, False),
}
"""Debian's, and that of the captured 7.3.4 without NUMA and cgroups."""


@dataclass(frozen=True)
class KernelParameters:
    """What one Linux version writes differently.

    `release` is what --kernel takes. `ept_writable` are the host-writable and MMU-writable bits of an
    EPT leaf and `ept_extra` what its leaves and tables carry besides (captured for 7.3, spte.h before).
    `mask_tails` is the compound_info mask with one shared tail page per zone (7.1 and later) instead
    of the pointer form whose tails share the folio's own head page. `reset_struct_pages` is
    NR_RESET_STRUCT_PAGE of a vmemmap restore. `dontneed_frees_tables` is CONFIG_PT_RECLAIM (6.14).
    `gigantic_surplus`: 1G pages may be surplus (6.19, mm/hugetlb.c:hstate_is_gigantic_no_runtime()).
    `recovers_huge_pages`: dirty logging off puts huge leaves back in place (captured for 6.18 and 7.3), else it drops
    the small ones (6.12). `guest_memfd_mmap`: guest_memfd can be mapped and serves every VM (6.18).
    `remap_moves_many`: mremap() moves several mappings at once (6.17, mm/mremap.c:remap_move()).
    `dirty_entries`: a dirty folio of a file is entered by a dirty entry, also for a read (mm/memory.c:set_pte_range();
    captured for 6.18 and 7.3, not for 6.12).
    `folio_6_12` puts a folio's mapcounts and page count where 6.12 has them (mm_types.h).
    `boot_marks`: how the vmemmap of 1G pages of the boot allocator is left (captured). `boot_list_ascending`: in which
    order these pages stand in their free list (captured). `marks_zapped`: KVM calls folio_mark_accessed() not only on
    what a guest's fault maps, but also on what it drops or splits an accessed leaf of (6.12's handle_changed_spte()).
    `virtual_index`: folio->index of a private HugeTLB page is its address' page number (captured for 7.3).
    `hwpoison`: PG_hwpoison (page-flags.h). `hwpoison_type`: the swap type of a poisoned page's entry (SWP_HWPOISON,
    captured for 7.3; 6.12 has one more type of device memory above it: include/linux/swap.h). `failure_pfn`: pages
    without a struct page have a memory failure of their own (6.19, mm/memory-failure.c:memory_failure_pfn()).

    `saved_dirty`: dirty of a read-only leaf is kept in bit 58, since 6.6 (asm/pgtable.h:pte_mksaveddirty()).
    `special_huge_zero`: the huge zero page's leaf is special (captured for 6.18, not for 6.12).
    `merges_unfaulted`: VMAs merge, too, where only the one that changes has an anon_vma (6.16, "mm/vma: fix
    incorrectly disallowed anonymous VMA merges").
    `guards`: MADV_GUARD_INSTALL exists (6.13). `huge_pfn`: vmf_insert_pfn_pmd() and _pud() serve VFIO (6.12).
    `thp_modify_drops_dirty`: mprotect of a transparent huge page loses its dirty bit (captured for 6.12 and 6.18:
    pmd_modify() masked it out before it could be saved). `thp_split_drops_dirty`: the pages of a split one are clean.
    `huge_zero_replaced`: a write to the huge zero page gets a huge page (captured for 6.18 and 7.3:
    mm/huge_memory.c:do_huge_zero_wp_pmd()), else it is split (captured for 6.12). `reuses_large_folios`: a write to a
    page of a large folio that is one process's alone makes it writable (captured for 6.18 and 7.3), else it is copied
    (captured for 6.12). `collapses_read_only`: MADV_COLLAPSE works where no page may be written (6.18, "mm: enable
    khugepaged anonymous collapse on non-writable regions"). `collapse_skips_holes`: it goes on behind 2M of which
    nothing is there (SCAN_NO_PTE_TABLE of mm/khugepaged.c:madvise_collapse()), else it ends (SCAN_PMD_NONE).
    `collapse_batches`: it unmaps the pages of a large folio together (captured for 6.18 and 7.3), else one by one, so
    that the folio is deferred for its split (captured for 6.12).
    `pins_mapped_pages`: kvm_vcpu_map() pins, and refuses VM_PFNMAP but for kvm.allow_unsafe_mappings (6.13, "KVM: Pin
    (as in FOLL_PIN) pages during kvm_vcpu_map()"), else it takes one reference (kvm_try_get_pfn()).
    `empty_spte`: KVM's value of an empty entry (spte.h:SHADOW_NONPRESENT_VALUE), and with `frozen_low` the frozen one
    (spte.h:FROZEN_SPTE; captured for 6.12 and 7.3).
    `arm_two_bit_xn`: KVM writes XN[1:0] of FEAT_XNX (arm64/kvm/hyp/pgtable.c:stage2_set_xn_attr()), else bit 54.
    `arm_locked`: an Arm entry between break and make (KVM_INVALID_PTE_LOCKED; a type in bits 63:60 from 7.1 on).
    `arm_two_bit_xn` of 6.18 and `arm_locked` of 6.18 are inference: only 6.12 and 7.1 were read.
    """

    release: str
    ept_writable: int
    ept_extra: int
    mask_tails: bool
    reset_struct_pages: int
    dontneed_frees_tables: bool
    folio_6_12: bool
    boot_marks: BootMarks
    boot_list_ascending: bool
    marks_zapped: bool = False
    virtual_index: bool = False
    hwpoison: int = 1 << 21
    hwpoison_type: int = 24
    failure_pfn: bool = False
    saved_dirty: bool = True
    special_huge_zero: bool = True
    guards: bool = True
    huge_pfn: bool = True
    thp_modify_drops_dirty: bool = False
    thp_split_drops_dirty: bool = False
    empty_spte: int = EMPTY_SPTE
    frozen_low: int = 0x5A0
    arm_two_bit_xn: bool = False
    arm_locked: int = 1 << 10
    recovers_huge_pages: bool = True
    guest_memfd_mmap: bool = True
    remap_moves_many: bool = True
    dirty_entries: bool = True
    merges_unfaulted: bool = True
    gigantic_surplus: bool = False
    huge_zero_replaced: bool = True
    reuses_large_folios: bool = True
    collapses_read_only: bool = True
    collapse_skips_holes: bool = False
    collapse_batches: bool = True
    pins_mapped_pages: bool = True


KERNELS: dict[str, KernelParameters] = {
    "6.12": KernelParameters(
        "6.12", 1 << 57 | 1 << 58, 0, False, 3, False, True, BootMarks.NONE, True,
        special_huge_zero=False, guards=False, recovers_huge_pages=False, merges_unfaulted=False,
        guest_memfd_mmap=False, remap_moves_many=False, dirty_entries=False, thp_modify_drops_dirty=True,
        marks_zapped=True, hwpoison=1 << 20, hwpoison_type=23, huge_zero_replaced=False, reuses_large_folios=False,
        collapses_read_only=False, collapse_batches=False, pins_mapped_pages=False,
    ),
    "6.18": KernelParameters(
        "6.18", 1 << 57 | 1 << 58, 0, False, 4, True, False, BootMarks.FIRST_64, True, thp_modify_drops_dirty=True
    ),
    "7.3": KernelParameters(
        "7.3", 1 << 53 | 1 << 55, EPT_USER_EXECUTE, True, 4, True, False, BootMarks.ALL, False,
        arm_two_bit_xn=True, arm_locked=1 << 60, virtual_index=True, gigantic_surplus=True,
        collapse_skips_holes=True, failure_pfn=True, frozen_low=0x1A0,
    ),
}  # fmt: skip
"""The kernels that pgemu runs."""

RELEASES: dict[str, KernelParameters] = {
    "6.1": KernelParameters(
        "6.1", 1 << 57 | 1 << 58, 0, False, 1, False, True, BootMarks.NONE, True,
        saved_dirty=False, special_huge_zero=False, guards=False, huge_pfn=False,
        thp_split_drops_dirty=True, empty_spte=0,
    ),
    **KERNELS,
}  # fmt: skip
"""The kernels whose entries pgemu writes and reads, by release: KERNELS and 6.1, whose operations it does not run.

Words of 6.1 outside page-table entries (mask_tails to folio_6_12) are not used by anything.
"""
