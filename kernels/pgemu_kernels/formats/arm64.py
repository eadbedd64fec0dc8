"""Arm64 stage-2 entries as data. Bits: Arm DDI 0487 ("Stage 2"), arch/arm64/include/asm/kvm_pgtable.h."""

from __future__ import annotations

from pgemu_kernels.formats import bits
from pgemu_kernels.formats.entry_format import ALL, Execute, Family, FlushRule, PageFormat, check_width, span

ARM_VALID = 1 << 0
ARM_TABLE = 1 << 1  # a table at levels 2 and above, a page at level 1
ARM_READ = 1 << 6
ARM_WRITE = 1 << 7
ARM_INNER_SHAREABLE = 0b11 << 8
ARM_ACCESSED = 1 << 10
ARM_LOCKED = 1 << 10  # of an invalid entry: a change is under way (a type nibble from 7.1 on)
ARM_DIRTY_MODIFIER = 1 << 51
ARM_NO_EXECUTE = 0b10 << 53  # XN[1:0] = 10: nobody executes
_ARM_MEMORY_TYPES = (("WB", 0b1111), ("NC", 0b0101), ("nGnRE", 0b0001))  # arm64/include/asm/memory.h:MT_S2_*
_ARM_MEMORY_TYPES_FWB = (("WB", 0b0110), ("NC", 0b0101), ("nGnRE", 0b0001))


def arm64_stage2(
    ipa_bits: int = 40,
    *,
    fwb: bool = True,
    hardware_access_flag: bool = True,
    kernel: str = "7.3",
    maxphyaddr: int = 48,
    range_invalidation: bool = True,
) -> PageFormat:
    """Arm64 stage 2, 4K granule, as KVM of `kernel` writes it.

    ipa_bits: 32 to 48; up to 34 two levels, up to 43 three, then four, with up to 16 concatenated root tables
    (arch/arm64/include/asm/stage2_pgtable.h:stage2_pgtable_levels()). fwb: FEAT_S2FWB memory attributes.
    hardware_access_flag: VTCR_EL2.HA. maxphyaddr: output address bits; an entry with a higher one is an address size
    fault. Kernels up to 6.18 write XN as one bit, 54, and bit 53 is reserved; later ones write both bits of FEAT_XNX.
    Reserved bits are those beyond the output address and those that are RES0 without FEAT_LPA2 (in a block also the
    address bits below its size): hardware may ignore the latter, KVM leaves them clear.
    range_invalidation: FEAT_TLBIRANGE.
    ValueError for another size; KeyError for a kernel that is not in formats.RELEASES.
    """
    if not 32 <= ipa_bits <= 48:
        raise ValueError(f"{ipa_bits} bits of intermediate physical address: expected 32 to 48")
    check_width(maxphyaddr, 48)
    parameters = bits.RELEASES[kernel]
    levels = -(-(ipa_bits - 4 - 12) // 9)
    types = _ARM_MEMORY_TYPES_FWB if fwb else _ARM_MEMORY_TYPES
    base = ARM_VALID | ARM_READ | ARM_WRITE | ARM_INNER_SHAREABLE | ARM_ACCESSED | types[0][1] << 2
    high = span(maxphyaddr, 50)
    one_bit = 0 if parameters.arm_two_bit_xn else 1 << 53
    leaf = high | one_bit
    return PageFormat(
        name="arm64-s2",
        family=Family.ARM64,
        flush=FlushRule.RANGE,
        levels=levels,
        input_bits=ipa_bits,
        root_tables=1 << max(0, ipa_bits - 12 - 9 * levels),
        present=ARM_VALID,
        address=span(12, 47),
        leaf_mask=ARM_TABLE,
        leaf_value=0,
        page_mask=ARM_TABLE,
        page_value=ARM_TABLE,
        largest_leaf=min(3, levels),
        reserved_leaf=(leaf, leaf | span(12, 20), leaf | span(12, 29), 0, 0),
        reserved_table=(0, high, high, high, high),
        # Bit 53 becomes "EL1 executes", bit 54 "EL0 executes": XN is 00 both, 01 not EL1, 10 none, 11 not EL0.
        fold=1 << 53,
        invert=0b11 << 53,
        table_rights=ALL,
        accessed=ARM_ACCESSED if hardware_access_flag else 0,
        dirty=ARM_WRITE,
        table=ARM_VALID | ARM_TABLE,
        leaf=(base | ARM_TABLE, base, base),
        frozen=parameters.arm_locked,
        break_before_make=True,
        kernel=parameters.release,
        maxphyaddr=maxphyaddr,
        # Without hardware updates KVM sets the access flag itself: stage2_set_prot_attr().
        leaf_bits=ARM_VALID | ARM_INNER_SHAREABLE | (0 if hardware_access_flag else ARM_ACCESSED),
        read=ARM_READ,
        write=ARM_WRITE,
        execute=Execute(
            mask=0b11 << 53 if parameters.arm_two_bit_xn else 1 << 54,
            supervisor_and_user=0,
            nobody=ARM_NO_EXECUTE,
            supervisor=0b11 << 53 if parameters.arm_two_bit_xn else None,
            user=0b01 << 53 if parameters.arm_two_bit_xn else None,
        ),
        memory_type_mask=(0b1111 << 2,) * 3,
        memory_types=tuple((name, (code << 2,) * 3) for name, code in types),
        # Output address, block or page, memory attributes, shareability, contiguous: Arm DDI 0487, "Break-before-make".
        break_bits=span(12, 47) | ARM_TABLE | span(2, 5) | span(8, 9) | 1 << 52,
        software=span(55, 58),
        range_invalidation=range_invalidation,
        # arch/arm64/kvm/hyp/pgtable.c:stage2_unmap_defer_tlb_flush()
        defers_unmap=range_invalidation and fwb,
    )
