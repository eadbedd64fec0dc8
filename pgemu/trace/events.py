"""Which events of a Linux log are inputs, which are outcomes, which do not matter, and how inputs are printed.

Sources: include/trace/events/kvm.h, arch/x86/kvm/mmu/mmutrace.h, arch/x86/include/asm/trace/exceptions.h,
include/trace/events/hugetlbfs.h, include/trace/events/iommu.h, kernel/trace/trace_syscalls.c; the shapes are those of
Linux 6.1 to 7.3.
"""

from __future__ import annotations

import functools
import re
from enum import IntEnum
from typing import NamedTuple

__all__ = (
    "ADVICE",
    "CALLS",
    "EXPECTED",
    "IGNORED",
    "LEVELS",
    "OUTCOMES",
    "PERF_FIELDS",
    "PROBE",
    "PROBED",
    "RECORDED",
    "REQUEST",
    "TDX_SHARED_BITS",
    "Event",
    "Input",
    "event_name",
    "line_end",
    "pattern",
)

TDX_SHARED_BITS = (47, 51)
"""Where a TD's guest address says that it is shared: TDX_SHARED_BIT_PWL_4 and _5 (arch/x86/kvm/vmx/tdx.c)."""
REQUEST = "kvm_hypercall (KVM_HC_MAP_GPA_RANGE)"
"""What a guest's request to convert is counted as that is not taken for a conversion."""


class Input(IntEnum):
    """Kinds of input rows; what the words A to E of a row hold."""

    HOST_FAULT = 1  # HVA, error code, 1: no line says whether it was a write
    # address (of which kind: pgemu.trace.guest_addresses), error code, vCPU, level of the leaf that KVM then wrote (0:
    # none was seen), 1 where it is an L2 guest's
    GUEST_FAULT = 2
    ATTRIBUTES = 3  # first gfn, end gfn, attributes
    UNMAP = 4  # first HVA, end HVA
    MEMSLOT = 5  # slot, flags, GPA, size, HVA
    MADVISE = 6  # HVA, length, advice
    MUNMAP = 7  # HVA, length
    MMAP = 8  # address asked for, length, fd, offset, flags | prot << 32
    FALLOCATE = 9  # fd, mode, offset, length, HVA of the unmap inside it (0: none)
    HUGETLBFS_FALLOCATE = 10  # inode, mode, offset, length
    MAP_GPA_RANGE = 11  # GPA, pages, attributes (what the guest asks for, not what is done)
    IOMMU_MAP = 12  # first IOVA, length, physical address
    IOMMU_UNMAP = 13  # first IOVA, length
    # Of a process alone (Log.calls; pgemu.trace.process_calls). MADVISE, too, of any advice.
    PROTECT = 14  # HVA, length, prot
    REMAP = 15  # HVA, length, new length, flags, address it returned
    BREAK = 16  # address asked for, the one it returned
    LOCK = 17  # HVA, length, 0: unlock, 1: lock, 2: on fault
    LOCK_ALL = 18  # MCL_*, 0: unlock
    FORK = 19  # thread of the child, CLONE_*; all ones: not told
    EXEC = 20
    EXIT = 21  # 1: of the process with all its threads
    HUGETLBFS_EVICT = 22  # inode, size, blocks of 512 bytes


_HEX = r"(?:0x)?([0-9a-fA-F]{1,16})"
_SIGNED = r"(-?\d+)"

_FIELDS: dict[str, tuple[str, str]] = {
    name: (fields, expected)
    for name, fields, expected in (
        ("page_fault_user", rf"address={_HEX} ip=\S+ error_code={_HEX}", "address=, ip=, error_code="),
        (
            "kvm_page_fault",
            rf"(?:vcpu (\d+) )?(?:rip \S+ )?address {_HEX} error_code {_HEX}",
            "vcpu, rip, address, error_code",
        ),
        ("kvm_vm_set_mem_attributes", rf"{_HEX} -- {_HEX} \[{_HEX}\]", "START -- END [ATTRIBUTES]"),
        ("kvm_hypercall", rf"nr 0xc a0 {_HEX} a1 {_HEX} a2 {_HEX} a3 {_HEX}", "nr, a0, a1, a2, a3"),
        ("kvm_unmap_hva_range", rf"mmu notifier unmap range: {_HEX} -- {_HEX}", "START -- END"),
        (
            # A probe of virt/kvm/kvm_main.c:kvm_set_memory_region() that prints struct kvm_userspace_memory_region2
            # (include/uapi/linux/kvm.h), no event of the kernel's own: `pgemu compare --help`.
            "kvm_memslot",
            rf"(?:\(.*\) )?slot=(?:(0x[0-9a-f]+)|(\d+)) flags={_HEX} gpa={_HEX} size={_HEX} hva={_HEX}",
            "slot=, flags=, gpa=, size=, hva= (a probe: pgemu compare --help)",
        ),
        ("sys_madvise", rf"start: {_HEX}, len(?:_in)?: {_HEX}, behavior: {_HEX}\)?", "start:, len_in:, behavior:"),
        ("sys_munmap", rf"addr: {_HEX}, len: {_HEX}\)?", "addr:, len:"),
        (
            "sys_mmap",
            rf"addr: {_HEX}, len: {_HEX}, prot: {_HEX}, flags: {_HEX}, fd: {_HEX}, (?:off|pgoff): {_HEX}\)?",
            "addr:, len:, prot:, flags:, fd:, off:",
        ),
        (
            "sys_fallocate",
            rf"fd: {_HEX}, mode: {_HEX}, offset: {_HEX}, len: {_HEX}\)?",
            "fd:, mode:, offset:, len:",
        ),
        (
            "hugetlbfs_fallocate",
            rf"dev \d+,\d+ ino (\d+) mode 0([0-7]*) offset {_SIGNED} len {_SIGNED} size {_SIGNED} ret {_SIGNED}",
            "dev, ino, mode, offset, len, size, ret",
        ),
        # Until Linux 6.1 without the end; what went is `unmapped_size`, what was asked for `size`.
        ("map", rf"IOMMU: iova={_HEX}(?: - {_HEX})? paddr={_HEX} size=(\d+)", "IOMMU: iova=, paddr=, size="),
        (
            "unmap",
            rf"IOMMU: iova={_HEX}(?: - {_HEX})? size=\d+ unmapped_size=(\d+)",
            "IOMMU: iova=, size=, unmapped_size=",
        ),
    )
}
"""How the fields of an input are printed, and what a message names as expected."""

EXPECTED = {name: expected for name, (_, expected) in _FIELDS.items()}


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Return what the event of an input matches, fields in groups; compiled when a log has the first one."""
    return re.compile(r"[^ (]+(?:\(| +)" + _FIELDS[name][0] + r"\s*")


ADVICE = {
    0: "NORMAL",
    1: "RANDOM",
    2: "SEQUENTIAL",
    3: "WILLNEED",
    4: "DONTNEED",
    8: "FREE",
    9: "REMOVE",
    10: "DONTFORK",
    11: "DOFORK",
    12: "MERGEABLE",
    13: "UNMERGEABLE",
    14: "HUGEPAGE",
    15: "NOHUGEPAGE",
    16: "DONTDUMP",
    17: "DODUMP",
    18: "WIPEONFORK",
    19: "KEEPONFORK",
    20: "COLD",
    21: "PAGEOUT",
    22: "POPULATE_READ",
    23: "POPULATE_WRITE",
    24: "DONTNEED_LOCKED",
    25: "COLLAPSE",
    100: "HWPOISON",
    101: "SOFT_OFFLINE",
    102: "GUARD_INSTALL",
    103: "GUARD_REMOVE",
}
"""include/uapi/asm-generic/mman-common.h"""

CALLS = frozenset({"sys_madvise", "sys_munmap", "sys_mmap", "sys_mprotect", "sys_mremap", "sys_fallocate"})
"""System calls inside which kvm_unmap_hva_range is their outcome, not an input of its own."""

OUTCOMES = frozenset(
    {
        "fast_page_fault",
        "hugetlbfs_alloc_inode",
        "hugetlbfs_evict_inode",
        "hugetlbfs_free_inode",
        "hugetlbfs_setattr",
        "io_page_fault",
        "kvm_mmu_get_page",
        "kvm_mmu_prepare_zap_page",
        "kvm_mmu_set_spte",
        "kvm_mmu_split_huge_page",
        "kvm_mmu_spte_requested",
        "kvm_mmu_sync_page",
        "kvm_mmu_unsync_page",
        "kvm_mmu_zap_all_fast",
        "kvm_tdp_mmu_spte_changed",
        "mark_mmio_spte",
    }
)

LEVELS = frozenset({"kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed"})
"""Outcomes that tell at which level a guest fault was mapped."""

IGNORED = frozenset(
    {
        "<function>",
        "<stack trace>",
        "<user stack trace>",
        "add_device_to_group",
        "attach_device_to_domain",
        "bpf_trace_printk",
        "bprint",
        "bputs",
        "check_mmio_spte",
        "detach_device_from_domain",
        "funcgraph_entry",
        "funcgraph_exit",
        "function",
        "handle_mmio_page_fault",
        "kernel_stack",
        "kvm_ack_irq",
        "kvm_age_hva",
        "kvm_apic",
        "kvm_apic_accept_irq",
        "kvm_apic_ipi",
        "kvm_apicv_accept_irq",
        "kvm_apicv_inhibit_changed",
        "kvm_async_pf_completed",
        "kvm_async_pf_not_present",
        "kvm_async_pf_ready",
        "kvm_async_pf_repeated_fault",
        "kvm_cpuid",
        "kvm_cr",
        "kvm_dirty_ring_push",
        "kvm_dirty_ring_reset",
        "kvm_emulate_insn",
        "kvm_entry",
        "kvm_eoi",
        "kvm_exit",
        "kvm_fast_mmio",
        "kvm_fpu",
        "kvm_halt_poll_ns",
        "kvm_hypercall",
        "kvm_inj_exception",
        "kvm_inj_virq",
        "kvm_ioapic_set_irq",
        "kvm_mmio",
        "kvm_mmu_pagetable_walk",
        "kvm_mmu_paging_element",
        "kvm_mmu_set_accessed_bit",
        "kvm_mmu_set_dirty_bit",
        "kvm_mmu_walker_error",
        "kvm_msi_set_irq",
        "kvm_msr",
        "kvm_nested_intercepts",
        "kvm_nested_intr_vmexit",
        "kvm_nested_vmenter",
        "kvm_nested_vmenter_failed",
        "kvm_nested_vmexit",
        "kvm_nested_vmexit_inject",
        "kvm_nested_vmrun",
        "kvm_pic_set_irq",
        "kvm_pio",
        "kvm_pv_eoi",
        "kvm_pv_tlb_flush",
        "kvm_rmp_fault",
        "kvm_set_irq",
        "kvm_test_age_hva",
        "kvm_track_tsc",
        "kvm_update_master_clock",
        "kvm_userspace_exit",
        "kvm_vcpu_wakeup",
        "kvm_vmgexit_enter",
        "kvm_vmgexit_exit",
        "kvm_vmgexit_msr_protocol_enter",
        "kvm_vmgexit_msr_protocol_exit",
        "kvm_wait_lapic_expire",
        "kvm_write_tsc_offset",
        "page_fault_kernel",
        "print",
        "remove_device_from_group",
        "sched_process_exec",
        "sched_process_exit",
        "sched_process_fork",
        "sys_brk",
        "sys_ioctl",
        "sys_mlock",
        "sys_mlock2",
        "sys_mlockall",
        "sys_mprotect",
        "sys_mremap",
        "sys_munlock",
        "sys_munlockall",
        "tlb_flush",
        "tracing_mark_raw_write",
        "tracing_mark_write",
        "user_stack",
    }
)


class Event(NamedTuple):
    """A tracepoint: events/SYSTEM/NAME of tracefs; `str()` is SYSTEM:NAME, as trace-cmd and perf call it."""

    system: str
    name: str

    def __str__(self) -> str:
        return f"{self.system}:{self.name}"


RECORDED = (
    *(Event("kvm", name) for name in (
        "kvm_page_fault", "kvm_vm_set_mem_attributes", "kvm_hypercall", "kvm_unmap_hva_range",
    )),
    *(Event("kvmmmu", name) for name in (
        "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed", "kvm_mmu_split_huge_page", "kvm_mmu_zap_all_fast",
        "fast_page_fault", "mark_mmio_spte",
    )),
    Event("exceptions", "page_fault_user"),
    *(Event("syscalls", f"sys_{end}_{call.removeprefix('sys_')}") for call in sorted(CALLS) for end in (
        "enter", "exit",
    )),
    Event("hugetlbfs", "hugetlbfs_fallocate"),
    *(Event("iommu", name) for name in ("map", "unmap")),
)  # fmt: skip
"""What to record of a VM: every input, and the outcomes that say at which level KVM maps, and what it zaps. Not every
kernel has all of them (kvm_vm_set_mem_attributes: 6.8 and later)."""

PERF_FIELDS = "comm,pid,tid,cpu,time,event,trace"
"""What `perf script -F` is to print of them."""

PROBED = ("__kvm_set_memory_region", "kvm_set_memory_region")
"""Functions of virt/kvm/kvm_main.c to put the probe on: the first one that a kernel has (6.14 renamed it)."""

PROBE = "slot=+0(%si):u32 flags=+4(%si):x32 gpa=+8(%si):x64 size=+16(%si):x64 hva=+24(%si):x64"
"""What the probe `kvm_memslot` prints, as kprobe_events takes it (Documentation/trace/kprobetrace.rst), on x86-64."""

_LINE_ENDS = {
    "fast_page_fault": r" spurious \d fixed \d",
    "hugetlbfs_alloc_inode": r" dir \d+ mode 0\d+",
    "hugetlbfs_evict_inode": r" seals \d+ blocks \d+",
    "hugetlbfs_free_inode": r" seals \d+ blocks \d+",
    "hugetlbfs_setattr": r" old_size \d+ size \d+",
    "kvm_exit": r" (?:error_code 0x[0-9a-f]+(?: requests 0x[0-9a-f]+)?|info [0-9a-f]+ [0-9a-f]+)",  # up to 5.10
    "kvm_hypercall": r" a3 0x[0-9a-f]+",
    "kvm_mmu_set_spte": r" level \d at [0-9a-f]+",
    "kvm_mmu_split_huge_page": r" level \d errno -?\d+",
    "kvm_mmu_spte_requested": r" pfn [0-9a-f]+ level \d",
    "kvm_tdp_mmu_spte_changed": r" new_spte [0-9a-f]+",
    "mark_mmio_spte": r" access \d+ gen [0-9a-f]+",
    "sys_brk": r"\(brk: \w+\)",
    "sys_mprotect": r" prot: \w+\)",
}


@functools.cache
def line_end(name: str) -> re.Pattern[str] | None:
    """How a whole line of an event that is not parsed ends, where that is known: tells a last line that was cut off."""
    end = _LINE_ENDS.get(name)
    return None if end is None else re.compile(r".*" + end + r"\s*")


@functools.cache
def event_name(token: str) -> str:
    """Return the event's name from the first word after the time stamp, without system, colon and arguments.

    System calls are named alike whether ftrace (`sys_x(`, `sys_x ->`) or a tracepoint
    (`syscalls:sys_enter_x:`, `sys_exit_x:`) printed them; "sys_x return" is the return.
    """
    if token in ("<stack", "<user"):  # kernel/trace/trace_output.c:trace_stack_print(), trace_user_stack_print()
        return "<stack trace>" if token == "<stack" else "<user stack trace>"
    bare = token.partition("(")[0].removesuffix(":").rpartition(":")[2]
    if bare.startswith("sys_enter_"):
        return "sys_" + bare.removeprefix("sys_enter_")
    if bare.startswith("sys_exit_"):
        return "sys_" + bare.removeprefix("sys_exit_") + " return"
    if bare.startswith("sys_") and token.isidentifier():  # with a colon it is raw_syscalls' sys_enter or sys_exit
        return bare + " return"
    return bare
