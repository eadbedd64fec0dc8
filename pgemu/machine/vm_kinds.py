"""Kinds of VM as data. Kernels read a VM's properties (V_*, VmProperty) and never its kind's name.

What each property does stands in pgemu_kernels/words/properties.py. Not in here, and room for it in a row: PAMT and its
pages, the RMP's checks of accesses, flushes of S-EPT, tables that firmware owns beside the mirror.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pgemu_kernels.words.properties import VmProperty

__all__ = ("KINDS", "PRIVATE_LEVELS", "Kind", "Row", "kind_row")

Kind = Literal["plain", "sw", "snp", "tdx"]

PRIVATE_LEVELS = {"4K": 1, "2M": 2, "1G": 3}


class Row(NamedTuple):
    """A kind of VM.

    Attributes:
        text: KVM's name of the type
        private: whether it has private memory (kvm_arch_has_private_mem())
        properties: what it does otherwise than a plain VM
        private_level: level of the largest leaf over private memory: 1 = 4K, 2 = 2M, 3 = 1G
        stage2: the format of its tables, if it is the processor's
        zeroed_by: who zeroes a private page before the guest sees it: "kernel" when it is handed out, "accept" when the
            guest accepts it (or it is added)
        source: where private_level and properties are from
    """

    text: str
    private: bool
    properties: VmProperty
    private_level: int
    stage2: str | None
    zeroed_by: tuple[str, ...]
    source: str


# In every version of guest_memfd the kernel clears what it hands out, whatever the kind of VM. PVALIDATE of an SNP
# guest zeroes nothing; TDG.MEM.PAGE.ACCEPT and TDH.MEM.PAGE.ADD write the page.
KINDS: dict[str, Row] = {
    "plain": Row("KVM_X86_DEFAULT_VM", False, VmProperty(0), 3, None, ("kernel",), "main"),
    # Private memory by the attributes alone: nothing limits its leaves, and a large one is back at the next fault.
    "sw": Row("KVM_X86_SW_PROTECTED_VM", True, VmProperty(0), 3, None, ("kernel",), "main"),
    # A large leaf is back once all 512 pages were given back to the host: sev_gmem_prepare() makes an entry of 2M only
    # where none of it is assigned.
    "snp": Row(
        "KVM_X86_SNP_VM",
        True,
        VmProperty.RMP | VmProperty.HONORS_ACCEPT,
        2,
        "npt",
        ("kernel",),
        "main: arch/x86/kvm/svm/sev.c:sev_gmem_prepare(), sev_gmem_max_mapping_level(), sev_gmem_invalidate()",
    ),
    # A large leaf is never back where a table is. Mainline maps 4K; 2M is of TDX huge pages v3, as a guest that runs
    # has it.
    "tdx": Row(
        "KVM_X86_TDX_VM",
        True,
        VmProperty.MIRRORED | VmProperty.HONORS_ACCEPT | VmProperty.ACCEPT_ZEROES,
        2,
        "ept",
        ("kernel", "accept"),
        "posted: TDX huge pages v3 (Yan Zhao, 2026-01-06): tdx_gmem_max_mapping_level(), disallowed_hugepage_adjust()",
    ),
}


def kind_row(kind: str, stage2: str, name: str = "vm") -> Row:
    """The row of a kind. ValueError for another name, or where its tables are of another format than `stage2`.

    `name`: of the argument or field that says it.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{name} {kind!r}: expected one of {', '.join(KINDS)}")
    row = KINDS[kind]
    if row.stage2 not in (None, stage2):
        told = f"{name} {kind!r} with stage 2 {stage2!r}"
        raise ValueError(f"{told}: expected {row.stage2}, which its processors have")
    return row
