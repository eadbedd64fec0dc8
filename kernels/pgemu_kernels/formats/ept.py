"""EPT entries as data. Bits: Intel SDM volume 3 ("EPT"), arch/x86/kvm/mmu/mmu.c:__reset_rsvds_bits_mask_ept()."""

from __future__ import annotations

from pgemu_kernels.formats import bits
from pgemu_kernels.formats.entry_format import (
    WIDEST_ADDRESS,
    Execute,
    Family,
    FlushRule,
    PageFormat,
    check_levels,
    check_width,
    span,
)

EPT_EXECUTE = 1 << 2
EPT_IGNORE_PAT = 1 << 6
EPT_MISCONFIGURED = 0b110  # VMX_EPT_MISCONFIG_WX_VALUE: KVM's cached MMIO access
EPT_MEMORY_TYPES = ((0, "UC"), (1, "WC"), (4, "WT"), (5, "WP"), (6, "WB"))


def ept(
    levels: int = 4,
    *,
    maxphyaddr: int = WIDEST_ADDRESS,
    kernel: str = "7.3",
    accessed_dirty: bool = True,
    execute_only: bool = True,
    mode_based_execute: bool = False,
    ignore_pat: bool = True,
    nx_huge_pages: bool = False,
    pages_1g: bool = True,
    l1tf_cache_bits: int | None = None,
) -> PageFormat:
    """Intel EPT of 4 or 5 levels, entries as KVM of `kernel` writes them.

    accessed_dirty: EPTP bit 6. execute_only: execute without read is allowed. mode_based_execute: bit 10 alone
    makes an entry present, too. ignore_pat: leaves carry IPAT. nx_huge_pages: the iTLB-multihit mitigation.
    pages_1g: 1G leaves exist (IA32_VMX_EPT_VPID_CAP bit 17). l1tf_cache_bits: on a CPU with L1TF, physical address
    bits of its L1 cache (x86_cache_bits, 44 on Haswell): cached MMIO accesses then set the highest five of them.
    Of 7.3 only what was captured is known: which of bits 53 and 55 is which, and where marks of entries without
    accessed and dirty bits lie (as in 7.1 here), is inference.
    KeyError for a kernel that is not in formats.RELEASES.
    """
    check_levels(levels)
    check_width(maxphyaddr)
    if l1tf_cache_bits is not None and not 32 <= l1tf_cache_bits < WIDEST_ADDRESS - 5:
        raise ValueError(f"{l1tf_cache_bits} bits of L1 cache address: expected 32 to {WIDEST_ADDRESS - 6}")
    parameters = bits.RELEASES[kernel]
    high = span(maxphyaddr, 51)
    suppress = bits.SUPPRESS_VE if parameters.empty_spte else 0
    kvm = bits.MMU_PRESENT | suppress | (0 if accessed_dirty else bits.EPT_AD_DISABLED)
    base = bits.EPT_RWX | 6 << 3 | kvm | parameters.ept_writable | parameters.ept_extra
    if accessed_dirty:
        base |= bits.EPT_ACCESSED | bits.EPT_DIRTY
    if ignore_pat:
        base |= EPT_IGNORE_PAT
    user_execute = bits.EPT_USER_EXECUTE if mode_based_execute else 0
    large = base | bits.LARGE
    if nx_huge_pages:
        large &= ~(EPT_EXECUTE | bits.EPT_USER_EXECUTE)
    one_gigabyte = 0 if pages_1g else bits.LARGE
    host_writable = parameters.ept_writable & -parameters.ept_writable
    return PageFormat(
        name="ept" if levels == 4 else "ept-5",
        family=Family.EPT,
        flush=FlushRule.WHOLE_VM,
        levels=levels,
        input_bits=12 + 9 * levels,
        present=bits.EPT_RWX | user_execute,
        address=bits.ADDRESS,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=(high, high | span(12, 20), high | span(12, 29) | one_gigabyte, high, high),
        reserved_table=(
            0, high | span(3, 6), high | span(3, 6) | one_gigabyte, high | span(3, 7), high | span(3, 7)
        ),
        # Without execute-only every entry that executes must be readable, by bit 10 alone, too.
        bad_low=1 << 0b010 | 1 << 0b110 | (0 if execute_only else 1 << 0b100 | (1 if mode_based_execute else 0)),
        bad_memory_type=1 << 2 | 1 << 3 | 1 << 7,
        accessed=bits.EPT_ACCESSED if accessed_dirty else 0,
        dirty=bits.EPT_DIRTY if accessed_dirty else 0,
        table=bits.EPT_RWX | kvm | parameters.ept_extra | (bits.EPT_ACCESSED if accessed_dirty else 0),
        leaf=(base, large, large),
        empty=parameters.empty_spte,
        frozen=parameters.empty_spte | parameters.frozen_low,
        kernel=parameters.release,
        maxphyaddr=maxphyaddr,
        read=1 << 0,
        write=1 << 1,
        execute=Execute(
            mask=EPT_EXECUTE | user_execute,
            supervisor_and_user=EPT_EXECUTE | user_execute,
            nobody=0,
            supervisor=EPT_EXECUTE if mode_based_execute else None,
            user=user_execute or None,
        ),
        memory_type_mask=(7 << 3, 7 << 3, 7 << 3),
        memory_types=tuple((name, (code << 3, code << 3, code << 3)) for code, name in EPT_MEMORY_TYPES),
        kvm_leaf=kvm | (EPT_IGNORE_PAT if ignore_pat else 0),
        ignore_pat=EPT_IGNORE_PAT if ignore_pat else 0,
        kvm_execute=parameters.ept_extra & ~user_execute,
        saved_rights=0 if accessed_dirty else 54,
        host_writable=host_writable,
        mmu_writable=parameters.ept_writable & ~host_writable,
        mmio_mask=bits.EPT_RWX | suppress,
        mmio_value=EPT_MISCONFIGURED,
        mmio_moved=0 if l1tf_cache_bits is None else span(l1tf_cache_bits - 5, l1tf_cache_bits - 1),
        nx_huge_pages=nx_huge_pages,
        software=bits.MMU_PRESENT | span(52, 56) | parameters.ept_writable,
    )  # fmt: skip
