"""AMD's nested page tables as data. Bits: AMD APM volume 2 (15.25)."""

from __future__ import annotations

from pgemu_kernels.formats import bits
from pgemu_kernels.formats.entry_format import (
    WIDEST_ADDRESS,
    Family,
    FlushRule,
    PageFormat,
    c_bit_mask,
    check_levels,
    check_width,
    span,
)
from pgemu_kernels.formats.x86_64 import x86_entries


def _npt_mmio(maxphyaddr: int, c_bit: int | None, reduced: int) -> int:
    """Bits of a cached MMIO access, 0 where there is no reserved address bit to tell it by.

    arch/x86/kvm/mmu/spte.c:kvm_mmu_reset_all_pte_masks(); with SME arch/x86/kvm/svm/svm.c:svm_adjust_mmio_mask().
    """
    if c_bit is None:
        return 1 << 51 | bits.PRESENT if maxphyaddr < WIDEST_ADDRESS else 0
    lowest = reduced + 1 if reduced == c_bit else reduced
    return span(lowest, 51) | bits.PRESENT if lowest < WIDEST_ADDRESS else 0


def npt(
    levels: int = 4,
    *,
    maxphyaddr: int = 51,
    nx: bool = True,
    pages_1g: bool = True,
    c_bit: int | None = None,
    reduced: int | None = None,
    kernel: str = "7.3",
) -> PageFormat:
    """AMD nested paging of 4 or 5 levels, entries as KVM of `kernel` writes them. APM 15.25.

    maxphyaddr: CPUID 80000008H EAX[7:0]. c_bit: position of the encryption bit while the host uses SME (CPUID
    8000001FH EBX[5:0]); entries carry it, and `reduced` (default: c_bit) is what remains of the address bits.
    A CPU with 52 bits has no reserved bit: KVM caches no MMIO accesses then. KeyError for an unknown kernel.
    """
    check_levels(levels)
    check_width(maxphyaddr)
    encrypted = c_bit_mask(c_bit)
    if c_bit is not None:
        maxphyaddr = c_bit if reduced is None else reduced
    mmio = _npt_mmio(maxphyaddr, c_bit, maxphyaddr)
    parameters = bits.RELEASES[kernel]
    small = bits.NPT_LEAF | encrypted
    return PageFormat(
        name="npt" if levels == 4 else "npt-5",
        family=Family.NPT,
        flush=FlushRule.WHOLE_VM,
        table=bits.NPT_TABLE | encrypted,
        leaf=(small, small | bits.LARGE, small | bits.LARGE),
        empty=parameters.empty_spte,
        frozen=parameters.empty_spte | parameters.frozen_low,
        kernel=parameters.release,
        kvm_leaf=bits.MMU_PRESENT,
        host_writable=bits.HOST_WRITABLE,
        mmu_writable=bits.MMU_WRITABLE,
        mmio_mask=mmio,
        mmio_value=mmio,
        mmio_rights=bits.WRITE | bits.USER,
        software=0b111 << 9 | span(52, 58),
        **x86_entries(levels, maxphyaddr, nx, pages_1g, True, c_bit),
    )
