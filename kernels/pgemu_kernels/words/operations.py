"""What an operation is asked and what it answers: codes, flags, errors, results of faults and of steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum, IntFlag
from types import MappingProxyType

import numpy as np

import pgemu_kernels.words.sources as _S
from pgemu_kernels.words.errnos import *  # noqa: F403

U = np.uint64

# --------------------------------------------------------------------------- pages and levels

PAGE_4K = 4096
PAGE_2M = PAGE_4K * 512
PAGE_1G = PAGE_2M * 512
ORDER_2M = 9
ORDER_1G = 18

# --------------------------------------------------------------------------- operations


class Entry(IntEnum):
    """Which entry of pgemu_kernels.run runs an operation."""

    NOBODY = 0  # traces can hold it already: -EOPNOTSUPP
    FAST = 1  # fast.run; full.run_designs on a machine with parameters of its own (R_FULL)
    FULL = 2  # full.run_designs
    ORDINARY = 3  # ordinary.run_ordinary: of neither design
    POOLING = 4  # pooling.run_pooling: done to huge pages themselves
    DEVICES = 5  # devices.run_devices: what devices reach


ENTRY_SHIFT = 56  # from this bit on, what an entry returns that stopped tells which one goes on


class By(IntEnum):
    """What tells whether an operation is one of ordinary memory, for ordinary.run_ordinary: routing.is_ordinary()."""

    NEVER = 0
    ALWAYS = 1
    MAPPING = 2  # the kind of the VMA at the address
    SLOT = 3  # ... of the memory slot at the guest address
    FILE = 4  # ... of the inode
    MMAP = 5  # ... of the inode; what names none and says PRIVATE or SHARED is anonymous
    PROCESS = 6  # what the process has or had


_NOTHING: dict[str, str] = {}
_HOST_RANGE = {"space": "process", "address": "HVA, bytes", "length": "bytes"}
_FILE_PAGE = {"object": "inode", "offset": "bytes into the inode"}
_FILE_RANGE = {**_FILE_PAGE, "length": "bytes"}
_POOL = {"object": "order: 9 or 18", "space": "node + 1; 0: all nodes"}
_FOLIO = {"address": "physical address of its first page"}
_DMA_RANGE = {"space": "IOMMU domain", "address": "IOVA, bytes", "length": "bytes"}


class Operation(IntEnum):
    """What one trace record asks for (column `op`): the one table of operations. Codes are part of the trace format.

    A row is the code; which entry runs it; what tells whether it is one of ordinary memory; what each column means (one
    that is not named is not read and holds 0); by design, the functions of the kernel that it models. Columns `time`
    (ns) and `actor` (vCPU, host thread or device) mean the same for all. Schema, sources and routing are read off these
    rows; `OP_NAME` (enum_words.py) is a code as kernels compare it.
    """

    entry: Entry
    ordinary: By
    columns: Mapping[str, str]
    sources: Mapping[str, tuple[_S.Source, ...]]

    def __new__(
        cls, code: int, entry: Entry, ordinary: By, columns: dict[str, str], sources: _S.ByDesign | None = None
    ) -> Operation:
        """Make a member, which is its code."""
        made = int.__new__(cls, code)
        made._value_ = code
        made.entry, made.ordinary = entry, ordinary
        made.columns, made.sources = MappingProxyType(columns), MappingProxyType(sources or {})
        return made

    # fmt: off
    HOST_FAULT = (
        1, Entry.FAST, By.MAPPING, {"flags": "WRITE, EXEC", "space": "process", "address": "HVA, bytes"},
        {"restructure": (_S.HOST_FAULT, _S.main("mm/memory.c:set_pte_range")),
         "pfnmap": (_S.INSERT_PFN,
                    _S.inferred("pfnmap-insert-locked", "mm/memory.c:vmf_insert_pfn under the invalidate_lock"))},
    )
    GUEST_FAULT = (
        2, Entry.FAST, By.SLOT,
        {"flags": "WRITE, EXEC; PRIVATE or SHARED, neither: as the attributes say; ACCEPT_4K", "vm": "VM",
         "address": "GPA, bytes"},
        {"restructure": (_S.GUEST_FAULT, _S.TDP_MAP, _S.Source("virt/kvm/guest_memfd.c:kvm_gmem_get_folio", "posted")),
         "pfnmap": (_S.GUEST_FAULT, _S.TDP_MAP,
                    _S.Source("virt/kvm/guest_memfd.c:kvm_gmem_get_pfn, level from shareability", "slides"))},
    )
    CONVERT = (
        3, Entry.FAST, By.FILE, {"flags": "target: PRIVATE or SHARED", "vm": "VM that asks", **_FILE_RANGE},
        {"restructure": (_S.ATTRIBUTES, _S.SPLIT, _S.MERGE,
                         _S.inferred("dec2025-order", "order of steps of the version (--like)")),
         "pfnmap": (_S.Source("conversion only unmaps, no gate", "slides"), _S.UNMAP, _S.ZAP,
                    _S.inferred("pfnmap-order", "order of steps, exact range"))},
    )
    PUNCH_HOLE = (
        4, Entry.FAST, By.FILE, _FILE_RANGE,
        {"restructure": (_S.PUNCH, _S.Source("virt/kvm/guest_memfd.c:kvm_gmem_truncate_inode_range", "posted")),
         "pfnmap": (_S.PUNCH, _S.inferred("pfnmap-holes-unmap", "mm/memory.c:unmap_mapping_pages before truncation"))},
    )
    ALLOCATE = (
        5, Entry.FULL, By.FILE, _FILE_RANGE,
        _S.both(_S.main("virt/kvm/guest_memfd.c:kvm_gmem_allocate"),
                _S.Source("virt/kvm/guest_memfd.c:kvm_gmem_get_folio, whole huge pages", "posted")),
    )
    MMAP = (
        6, Entry.FAST, By.MMAP,
        {**_HOST_RANGE, **_FILE_RANGE,
         "flags": "READ_ONLY, COUNTED; of ordinary memory PRIVATE or SHARED; READ, WRITE, EXEC; POPULATE, LOCKED, "
         "NORESERVE",
         "object": "inode; anonymous memory: 0xffffffff"},
        {"restructure": (_S.main("virt/kvm/guest_memfd.c:kvm_gmem_mmap"),),
         "pfnmap": (_S.Source("virt/kvm/guest_memfd.c:kvm_gmem_mmap, with VM_PFNMAP", "slides"),)},
    )
    MUNMAP = (
        7, Entry.FAST, By.PROCESS, _HOST_RANGE,
        _S.both(_S.main("mm/memory.c:unmap_vmas"), _S.main("mm/memory.c:free_pgtables"), _S.NOTIFIER),
    )
    ZAP = (
        8, Entry.FAST, By.PROCESS, {"flags": "MADVISE: asked for by madvise(MADV_DONTNEED)", **_HOST_RANGE},
        {"restructure": (_S.main("mm/memory.c:zap_present_ptes"), _S.NOTIFIER,
                         _S.main("mm/pt_reclaim.c:try_to_free_pte")),
         "pfnmap": (_S.main("mm/madvise.c:madvise_dontneed_free_valid_vma"), _S.main("mm/memory.c:zap_present_ptes"),
                    _S.NOTIFIER)},
    )
    BIND = (
        9, Entry.FAST, By.FILE, {"vm": "VM", "address": "GPA, bytes", **_FILE_RANGE},
        _S.both(_S.main("virt/kvm/guest_memfd.c:kvm_gmem_bind")),
    )
    UNBIND = (
        10, Entry.FAST, By.SLOT, {"vm": "VM", "address": "GPA, bytes"},
        _S.both(_S.MEMSLOT_DELETED),
    )
    PIN = (
        11, Entry.FULL, By.PROCESS, {"flags": "WRITE, LONGTERM", "object": "pin, below 256", **_HOST_RANGE},
        _S.both(_S.main("mm/gup.c:pin_user_pages"), _S.main("mm/gup.c:check_vma_flags")),
    )
    UNPIN = (
        12, Entry.FULL, By.NEVER, {"object": "pin"},
        _S.both(_S.main("mm/gup.c:unpin_user_pages")),
    )
    GET = (
        13, Entry.FAST, By.FILE, _FILE_PAGE,
        _S.both(_S.main("include/linux/mm.h:folio_get")),
    )
    PUT = (
        14, Entry.FAST, By.FILE,
        {**_FILE_PAGE, "address": "physical address of the page, in place of object and offset; or 0"},
        _S.both(_S.main("mm/swap.c:__folio_put")),
    )
    DMA_MAP = (
        15, Entry.DEVICES, By.NEVER,
        {"flags": "READ, WRITE; of an IOAS IOVA_ANY: the address is chosen; COPY: of what the IOAS `object` has "
         "from address `offset` on", "vm": "process whose memory it is, or that accounts for it", **_DMA_RANGE,
         "object": "inode; 0xffffffff: memory of the process", "offset": "bytes into the inode; or HVA, bytes"},
        _S.both(_S.main("drivers/vfio/vfio_iommu_type1.c:vfio_dma_do_map"),
                _S.main("drivers/iommu/iommufd/io_pagetable.c:iopt_map_pages")),
    )
    DMA_UNMAP = (
        16, Entry.DEVICES, By.NEVER, {**_DMA_RANGE, "length": "all ones: everything; else bytes"},
        _S.both(_S.main("drivers/vfio/vfio_iommu_type1.c:vfio_dma_do_unmap"),
                _S.main("drivers/iommu/iommufd/io_pagetable.c:iopt_unmap_iova")),
    )
    DMA_ACCESS = (
        17, Entry.DEVICES, By.NEVER,
        {"flags": "WRITE", **_DMA_RANGE, "length": "any number of bytes", "object": "device",
         "offset": "word that a write stores there, not 0"},
        _S.both(_S.main("drivers/iommu/iommu.c:iommu_iova_to_phys")),
    )
    NESTED_MAP = (
        18, Entry.FULL, By.NEVER,
        {"flags": "WRITE; CACHED: a gfn_to_pfn_cache, activated, or refreshed if it is active; THROUGH: an access by "
         "the mapping that is there, which reads no address", "vm": "VM", "object": "mapping, below 256",
         "address": "GPA, bytes", "length": "of a cache, in bytes: it ends within the page"},
        _S.both(_S.VCPU_MAP, _S.main("virt/kvm/kvm_main.c:hva_to_pfn"), _S.PFN_CACHE),
    )
    NESTED_UNMAP = (
        19, Entry.FULL, By.NEVER, {"object": "mapping"}, _S.both(_S.VCPU_UNMAP, _S.PFN_CACHE_DEACTIVATE),
    )
    MEMORY_FAILURE = (
        20, Entry.ORDINARY, By.ALWAYS,
        {"flags": "SOFT: soft_offline_page(); HARDWARE: not injected; EARLY_KILL: the policy of all processes",
         **_FILE_PAGE, "address": "physical address of the page, in place of object and offset; or 0"},
        {"restructure": (_S.main("mm/memory-failure.c:memory_failure"), _S.ERROR_FOLIO,
                         _S.inferred("memory-failure-huge", "huge folios and their pieces are handled")),
         "pfnmap": (_S.Source("mm/memory-failure.c:hwpoison_user_mappings, nobody is found", "captured"),
                    _S.ERROR_FOLIO, _S.inferred("memory-failure-huge", "huge folios are handled"))},
    )
    CLOSE = (
        21, Entry.FAST, By.FILE, {"object": "inode"},
        {"restructure": (_S.RELEASE,
                         _S.Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_cleanup_workfn", "posted")),
         "pfnmap": (_S.RELEASE, _S.Source("mm/hugetlb.c:free_huge_folio, folios stay whole", "slides"))},
    )
    VM_EXIT = (
        22, Entry.ORDINARY, By.ALWAYS, {"vm": "VM"},
        _S.both(_S.main("virt/kvm/kvm_main.c:kvm_destroy_vm")),
    )
    GUEST_ACCESS = (
        23, Entry.NOBODY, By.NEVER,
        {"flags": "WRITE, EXEC", "vm": "VM", "space": "guest process", "address": "guest virtual, bytes"},
    )
    PROTECT = (
        24, Entry.ORDINARY, By.ALWAYS, {"flags": "READ, WRITE, EXEC", **_HOST_RANGE},
        _S.both(_S.main("mm/mprotect.c:change_pte_range"), _S.main("mm/mprotect.c:can_change_pte_writable")),
    )
    FORK = (
        25, Entry.ORDINARY, By.ALWAYS, {"space": "parent"},
        _S.both(_S.main("kernel/fork.c:dup_mmap"), _S.main("mm/memory.c:copy_page_range")),
    )
    EXIT = (
        26, Entry.ORDINARY, By.ALWAYS, {"space": "process"},
        _S.both(_S.main("mm/mmap.c:exit_mmap"), _S.main("mm/memory.c:free_pgtables")),
    )
    MEMSLOT = (
        27, Entry.ORDINARY, By.ALWAYS,
        {"flags": "READ_ONLY, LOG_DIRTY_PAGES; PRIVATE: with the guest_memfd that the last BIND named", "vm": "VM",
         "object": "slot number", "address": "GPA, bytes", "offset": "HVA, bytes", "length": "bytes, 0 deletes"},
        _S.both(_S.main("virt/kvm/kvm_main.c:kvm_set_memory_region"), _S.MEMSLOT_DELETED),
    )
    DIRTY_LOG = (
        28, Entry.ORDINARY, By.ALWAYS, {"vm": "VM", "object": "slot number"},
        _S.both(_S.main("virt/kvm/kvm_main.c:kvm_get_dirty_log_protect")),
    )
    ATTRIBUTES = (
        29, Entry.ORDINARY, By.ALWAYS,
        {"flags": "PRIVATE or SHARED", "vm": "VM", "address": "GPA, bytes", "length": "bytes"},
        _S.both(_S.main("virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes"), _S.ZAP),
    )
    PREFAULT = (
        30, Entry.FULL, By.SLOT, {"vm": "VM", "address": "GPA, bytes", "length": "bytes"},
        _S.both(_S.main("virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory"), _S.TDP_MAP),
    )
    POPULATE = (
        31, Entry.ORDINARY, By.ALWAYS, {"flags": "WRITE: MADV_POPULATE_WRITE, else _READ", **_HOST_RANGE},
        _S.both(_S.main("mm/madvise.c:madvise_populate"), _S.main("mm/gup.c:faultin_page_range")),
    )
    READ_SMAPS = (
        32, Entry.ORDINARY, By.ALWAYS, {"space": "process"},
        _S.both(_S.main("mm/pagewalk.c:walk_pud_range")),
    )
    REVOKE = (
        33, Entry.ORDINARY, By.ALWAYS, {"object": "inode of a device"},
        _S.both(_S.main("drivers/vfio/pci/vfio_pci_core.c:vfio_pci_zap_and_down_write_memory_lock")),
    )
    RESTORE = (
        34, Entry.ORDINARY, By.ALWAYS, {"object": "inode of a device"},
        _S.both(_S.main("drivers/vfio/pci/vfio_pci_core.c:vfio_pci_memory_unlock_and_restore")),
    )
    GUARD_INSTALL = (35, Entry.ORDINARY, By.ALWAYS, _HOST_RANGE, _S.both(_S.main("mm/madvise.c:madvise_guard_install")))
    GUARD_REMOVE = (36, Entry.ORDINARY, By.ALWAYS, _HOST_RANGE, _S.both(_S.main("mm/madvise.c:madvise_guard_remove")))
    REMAP = (
        37, Entry.ORDINARY, By.ALWAYS,
        {**_HOST_RANGE, "object": "new length, pages", "offset": "new HVA, bytes; 0: in place"},
        _S.both(_S.main("mm/mremap.c:move_vma"), _S.main("mm/mremap.c:move_page_tables")),
    )
    POOL_RESIZE = (
        38, Entry.POOLING, By.NEVER, {**_POOL, "length": "pages, as written to nr_hugepages"},
        _S.both(_S.main("mm/hugetlb.c:set_max_huge_pages")),
    )
    POOL_DEMOTE = (
        39, Entry.POOLING, By.NEVER, {**_POOL, "length": "pages"},
        _S.both(_S.main("mm/hugetlb.c:demote_pool_huge_page")),
    )
    FOLIO_ALLOCATE = (
        40, Entry.POOLING, By.NEVER, {**_POOL, "space": "node + 1 that is preferred; 0: none"},
        _S.both(_S.main("mm/hugetlb.c:alloc_hugetlb_folio")),
    )
    FOLIO_FREE = (41, Entry.POOLING, By.NEVER, _FOLIO, _S.both(_S.main("mm/hugetlb.c:free_huge_folio")))
    VMEMMAP_OPTIMIZE = (
        42, Entry.POOLING, By.NEVER, {**_FOLIO, "length": "bytes; all huge pages whose heads lie there, in one batch"},
        _S.both(_S.OPTIMIZE_FOLIO, _S.main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_optimize_folios")),
    )
    VMEMMAP_RESTORE = (
        43, Entry.POOLING, By.NEVER, {**_FOLIO, "length": "bytes; all huge pages whose heads lie there, in one batch"},
        _S.both(_S.RESTORE_FOLIO, _S.main("mm/hugetlb_vmemmap.c:hugetlb_vmemmap_restore_folios")),
    )
    FOLIO_SPLIT = (
        44, Entry.POOLING, By.NEVER, _FOLIO,
        _S.both(_S.Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_split_folio", "posted")),
    )
    FOLIO_MERGE = (
        45, Entry.POOLING, By.NEVER, {**_FOLIO, "length": "bytes of the huge page"},
        _S.both(_S.Source("mm/hugetlb_restructuring.c:hugetlb_restructuring_merge_folio", "posted")),
    )
    FOLIO_REFERENCE = (
        46, Entry.POOLING, By.NEVER,
        {**_FOLIO, "flags": "SHARED: get, READ: put, WRITE|SHARED: pin, WRITE|READ: unpin", "length": "how many"},
        _S.both(_S.main("mm/gup.c:try_grab_folio"), _S.main("include/linux/mm.h:folio_put")),
    )
    FOLIO_FREEZE = (
        47, Entry.POOLING, By.NEVER,
        {**_FOLIO, "flags": "READ: unfreeze", "length": "references expected, or given back"},
        _S.both(_S.main("include/linux/page_ref.h:folio_ref_freeze")),
    )
    DISSOLVE = (48, Entry.POOLING, By.NEVER, _FOLIO, _S.both(_S.main("mm/hugetlb.c:dissolve_free_hugetlb_folio")))
    POISON = (49, Entry.POOLING, By.NEVER, _FOLIO, _S.both(_S.main("mm/hugetlb.c:folio_set_hugetlb_hwpoison")))
    VMEMMAP_STORE = (
        50, Entry.POOLING, By.NEVER, {"address": "virtual address in the vmemmap", "offset": "value, of memcg_data"},
        _S.both(_S.main("mm/hugetlb_vmemmap.c:vmemmap_remap_pte")),
    )
    RELEASE = (
        51, Entry.FULL, By.NEVER, {"vm": "VM whose file of the inode it is", "object": "inode"},
        _S.both(_S.RELEASE),
    )
    LRU_DRAIN = (
        52, Entry.FULL, By.NEVER, _NOTHING,
        _S.both(_S.main("mm/swap.c:lru_add_drain_all")),
    )
    WORK = (
        53, Entry.FULL, By.NEVER, _NOTHING,
        {"restructure": (_S.Source("mm/guestmem_hugetlb.c:guestmem_hugetlb_cleanup_folio", "posted"),
                         _S.inferred("lazy-merge", "a worker that merges what conversions leave split")),
         "pfnmap": (_S.Source("nothing is merged: no work item exists", "slides"),)},
    )
    MEMORY_POLICY = (
        54, Entry.FULL, By.NEVER,
        {"flags": "MPOL_*: 0 default, 1 preferred, 2 bind, 3 interleave", **_FILE_RANGE,
         "object": "inode; 0xffffffff: the faulting tasks' own", "address": "nodes, a bit each"},
        _S.both(_S.main("virt/kvm/guest_memfd.c:kvm_gmem_get_policy"),
                _S.main("mm/mempolicy.c:mpol_set_shared_policy")),
    )
    DIRTY_LOGGING = (
        55, Entry.FULL, By.NEVER, {"flags": "LOG_DIRTY_PAGES or none", "vm": "VM", "address": "GPA of a slot"},
        _S.both(_S.main("arch/x86/kvm/x86.c:kvm_mmu_slot_apply_flags"),
                _S.inferred("dirty-log", "dirty logging of a guest_memfd slot, which KVM refuses")),
    )
    POOL_RESERVE = (
        56, Entry.POOLING, By.NEVER, {"object": "order: 9 or 18", "length": "pages"},
        _S.both(_S.main("mm/hugetlb.c:hugetlb_acct_memory"), _S.main("mm/hugetlb.c:gather_surplus_pages")),
    )
    LOCK = (57, Entry.ORDINARY, By.ALWAYS, {"flags": "LOCKED; POPULATE: at once; neither: munlock", **_HOST_RANGE},
        _S.both(_S.main("mm/mlock.c:apply_vma_lock_flags"), _S.main("mm/gup.c:populate_vma_page_range")),
    )
    DONTFORK = (58, Entry.ORDINARY, By.ALWAYS, _HOST_RANGE, _S.both(_S.main("mm/madvise.c:madvise_vma_behavior")))
    DOFORK = (59, Entry.ORDINARY, By.ALWAYS, _HOST_RANGE, _S.both(_S.main("mm/madvise.c:madvise_vma_behavior")))
    ADVISE_HUGE = (
        60, Entry.ORDINARY, By.ALWAYS, {"flags": "WRITE: MADV_HUGEPAGE, else MADV_NOHUGEPAGE", **_HOST_RANGE},
        _S.both(_S.main("mm/khugepaged.c:hugepage_madvise")),
    )
    COLLAPSE = (61, Entry.ORDINARY, By.ALWAYS, _HOST_RANGE, _S.both(_S.main("mm/khugepaged.c:madvise_collapse")))
    INJECT = (
        62, Entry.ORDINARY, By.ALWAYS, {"flags": "SOFT: MADV_SOFT_OFFLINE, else MADV_HWPOISON", **_HOST_RANGE},
        _S.both(_S.main("mm/madvise.c:madvise_inject_error")),
    )
    UNPOISON = (
        63, Entry.ORDINARY, By.ALWAYS, {"address": "physical address of the page"},
        _S.both(_S.main("mm/memory-failure.c:unpoison_memory")),
    )
    # fmt: on


OPERATIONS = 64  # room in the tables that have a row per operation


def _codes(operations: Iterable[Operation]) -> np.uint64:
    """A bit per operation: bit n is the one with code n."""
    return U(sum(1 << op for op in operations))


# Classes of operations, for routing.py.
OPS_FULL = _codes(op for op in Operation if op.entry is Entry.FULL)
OPS_DEVICES = _codes(op for op in Operation if op.entry is Entry.DEVICES)
OPS_POOLING = _codes(op for op in Operation if op.entry is Entry.POOLING)
OPS_BY_MAPPING = _codes(op for op in Operation if op.ordinary is By.MAPPING)
OPS_BY_SLOT = _codes(op for op in Operation if op.ordinary is By.SLOT)
OPS_BY_FILE = _codes(op for op in Operation if op.ordinary is By.FILE)
OPS_BY_MMAP = _codes(op for op in Operation if op.ordinary is By.MMAP)
OPS_BY_PROCESS = _codes(op for op in Operation if op.ordinary is By.PROCESS)
OPS_ALWAYS_ORDINARY = _codes(op for op in Operation if op.ordinary is By.ALWAYS)
# Those that try locks and wait for none: -EBUSY is a result.
OPS_TRYING = _codes((Operation.MEMORY_FAILURE, Operation.INJECT, Operation.UNPOISON))
# Those that bring ordinary memory into being, whatever a machine has had so far.
OPS_FOUNDING = OPS_ALWAYS_ORDINARY | OPS_BY_MMAP
# Of ordinary memory, those of a VM; the others are of a process or a file.
OPS_OF_VM = _codes(
    op for op in Operation if "vm" in op.columns and ("address" in op.columns or op.ordinary is By.ALWAYS)
) & ~_codes(op for op in Operation if op.ordinary is By.NEVER)


class Flag(IntFlag):
    """Bits of the trace column `flags`; which operation reads which is told in pgemu.trace.schema."""

    WRITE = 1
    EXEC = 2
    PRIVATE = 4
    SHARED = 8
    READ_ONLY = 16
    MADVISE = 32
    POPULATE = 64
    READ = 128
    LOG_DIRTY_PAGES = 64  # of a memory slot
    NORESERVE = 16  # of MMAP, where READ_ONLY is told by READ, WRITE and EXEC
    LOCKED = 32  # of MMAP
    ACCEPT_4K = 16  # of GUEST_FAULT: the guest accepts the page at 4K, or it is added so, where a VM's kind knows that
    COUNTED = 128  # of MMAP of the designs' inodes: entries of folios, as merged, whatever the design
    LONGTERM = 64  # of PIN: FOLL_LONGTERM
    IOVA_ANY = 32  # of DMA_MAP: without IOMMU_IOAS_MAP_FIXED_IOVA
    COPY = 16  # of DMA_MAP: IOMMU_IOAS_COPY
    CACHED = 32  # of NESTED_MAP: a gfn_to_pfn_cache;
    THROUGH = 64  # ... an access by the mapping, which is there already
    LOCKED_TOO = 64  # of ZAP with MADVISE: MADV_DONTNEED_LOCKED
    SOFT = 1  # of MEMORY_FAILURE and INJECT: soft offline
    HARDWARE = 2  # of MEMORY_FAILURE: without MF_SW_SIMULATED
    EARLY_KILL = 4  # of MEMORY_FAILURE: vm.memory_failure_early_kill is set


# --------------------------------------------------------------------------- results

# Guest faults: arch/x86/kvm/mmu/mmu_internal.h, enum of RET_PF_*.
RET_PF_CONTINUE = 0
RET_PF_RETRY = 1
RET_PF_EMULATE = 2
RET_PF_WRITE_PROTECTED = 3
RET_PF_INVALID = 4
RET_PF_FIXED = 5
RET_PF_SPURIOUS = 6

# Host faults: include/linux/mm_types.h, enum vm_fault_reason. 0 = the entry was there already.
VM_FAULT_OOM = 0x1
VM_FAULT_SIGBUS = 0x2
VM_FAULT_HWPOISON = 0x10
VM_FAULT_HWPOISON_LARGE = 0x20
VM_FAULT_SIGSEGV = 0x40
VM_FAULT_NOPAGE = 0x100
VM_FAULT_LOCKED = 0x200
VM_FAULT_RETRY = 0x400

WOULD_SPIN = (
    140  # status -WOULD_SPIN: the kernel's function would spin until a reference is gone (no errno is that high)
)
NEVER = 127  # status -NEVER: the kernel's function would not return (no errno; one defect does that)

# --------------------------------------------------------------------------- steps

# Orders of steps of a conversion: which patches' (R_CONVERT_ORDER).
CONVERT_RFC2 = U(0)
CONVERT_FIXUP = U(1)
CONVERT_JAN2026 = U(2)
CONVERT_NEXT4K = U(3)
CONVERT_SLIDES = U(4)  # of pfnmap


class Defect(IntFlag):
    """Mistakes of posted code that a machine can be given (R_DEFECTS); without its bit the code is as fixed."""

    ROLLBACK_AT_ZERO = 1  # rfc2: the rollback loop counts an unsigned index down and never ends at page 0
    ALLOCATION_RACE = 2  # two faults in one huge page both take a page of the subpool; the loser gets -ENOMEM
    MAPPING_ORDER = 4  # Dec 2025: looks at [index, index + nr) for private pages, not at the huge page around it
    INSERT_UNLOCKED = 8  # pfnmap: the entry is inserted after the invalidate_lock was released
    PUNCH_KEEPS_ENTRIES = 16  # pfnmap: truncation leaves special entries alone, as it has no folio to find them by
    HUGE_OVER_PRIVATE = 32  # 2022: a shared fault takes its level from the host alone and maps over private 4K pages
    # Dec 2025: a first use zeroes the folio's first 4K and marks all of it up to date; its merges as MERGE_KEEPS_FLAG
    UPTODATE_UNZEROED = 1024
    UNBIND_DYING = 4096  # before kvm-x86 0ee2c883b62d: a dying file's slot is unbound without the invalidate_lock
    MERGE_KEEPS_FLAG = 2048  # rfc2: the flag of the first 4K folio is the merged folio's, whatever the others were
    CONVERT_KEEPS_LEAVES = 8192  # rfc2: to private, stage 2 loses only what the notifier of a VMA's unmap takes
    HOLE_ZEROES_FROM_START = 16384  # rfc2: a hole in a part of a huge folio zeroes from the folio's first page on
    CUT_HUGE_PFN = 64  # mainline: cutting a VMA inside a 1G PFN entry, off 2M, takes the entry for that of a table


GO = 0  # what a step returns: the next one follows,
STOP = 1  # ... the operation has ended, its result is in the record,
BLOCKED = 2  # ... or a lock is held by another actor and nothing was done
