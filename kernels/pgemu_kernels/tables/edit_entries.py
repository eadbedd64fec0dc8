"""What an entry of any format is and says, by the words of its format's row: what every edit of a tree asks."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U3, U7, U12, U64, trailing_zeros
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.formats.page_format import FlushRule
from pgemu_kernels.words.table_words import (
    F_ACCESSED,
    F_ADDRESS,
    F_BAD_LOW,
    F_BAD_MEMORY_TYPE,
    F_BREAK_BEFORE_MAKE,
    F_DIRTY,
    F_FLUSH,
    F_FROZEN,
    F_INPUT_BITS,
    F_LARGEST_LEAF,
    F_LEAF_2M,
    F_LEAF_4K,
    F_LEAF_MASK,
    F_LEAF_VALUE,
    F_PAGE_MASK,
    F_PAGE_VALUE,
    F_PAT_LARGE,
    F_PAT_PAGE,
    F_PRESENT,
    F_RESERVED_LEAF,
    F_SIGN_EXTENDED,
    F_SIZED_LEAF,
    F_SIZED_MASK,
    F_SOFTWARE,
)

U = np.uint64
PROCESS = U(FlushRule.PROCESS)
U13 = U(13)


@kernel
def is_valid(state, f, value):
    """Whether an entry is present to the hardware: what a table of any format is edited by."""
    return value & state[f + F_PRESENT] != U0


@kernel
def is_leaf(state, f, level, value):
    """Whether a present entry is a leaf, of its level's size."""
    if level == U1:
        return True
    return level <= state[f + F_LARGEST_LEAF] and value & state[f + F_LEAF_MASK] == state[f + F_LEAF_VALUE]


@kernel
def is_sized(state, f, value):
    """Whether a leaf's size is in its address (AMD's IOMMU), so that entries beside it are parts of it."""
    mask = state[f + F_SIZED_MASK]
    return mask != U0 and value & mask == state[f + F_SIZED_LEAF]


@kernel
def is_any_leaf(state, f, level, value):
    """Whether a present entry is a leaf, of its level's size or of that in its address."""
    return is_leaf(state, f, level, value) or (level <= state[f + F_LARGEST_LEAF] and is_sized(state, f, value))


@kernel
def sized_shift(state, f, value):
    """Bits of an address within a leaf whose size is in its address: one more than ones stand from bit 12 on."""
    return U13 + trailing_zeros(~(value & state[f + F_ADDRESS]) >> U12)


@kernel
def leaf_shift(state, f, level, value):
    """Bits of an address within a leaf."""
    return sized_shift(state, f, value) if is_sized(state, f, value) else shift_of(level)


@kernel
def is_frozen(state, f, value):
    """Whether somebody is changing this entry: KVM's frozen value, Arm's locked one."""
    return state[f + F_FROZEN] != U0 and value == state[f + F_FROZEN]


@kernel
def breaks(state, f):
    return state[f + F_BREAK_BEFORE_MAKE] != U0


@kernel
def is_process(state, f):
    return state[f + F_FLUSH] == PROCESS


@kernel
def sticky_bits(state, f):
    """Bits that the hardware sets by itself. Arm's dirty bit is the right to write, so it is none of them."""
    if breaks(state, f):
        return state[f + F_ACCESSED]
    return state[f + F_ACCESSED] | state[f + F_DIRTY]


@kernel
def leaf_address(state, f, level, value):
    return value & state[f + F_ADDRESS] & ~(size_of(level) - U1)


@kernel
def attributes(state, f, level, value):
    """A leaf without its address."""
    if level == U1:
        return value & ~state[f + F_ADDRESS]
    return value & ~(state[f + F_ADDRESS] & ~state[f + F_PAT_LARGE])


@kernel
def page_only(state, f):
    """Bits that a 4K leaf has and a larger one has not: Arm's page type, execute under the NX mitigation."""
    return state[f + F_LEAF_4K] & ~state[f + F_LEAF_2M]


@kernel
def large_only(state, f):
    return state[f + F_LEAF_2M] & ~state[f + F_LEAF_4K]


@kernel
def moved_mask(state, f, level, bits):
    """Bits of a 4K leaf as a leaf of `level` has them, without those that tell the two apart."""
    if level == U1:
        return bits
    pat = state[f + F_PAT_PAGE]
    moved = bits & ~(pat | page_only(state, f))
    if bits & pat != U0:
        moved |= state[f + F_PAT_LARGE]
    return moved


@kernel
def leaf_attributes(state, f, level, bits):
    """Attributes of a leaf of `level` from those of a 4K leaf.

    x86: pgprot_4k_2_large() moves PAT from bit 7 to 12; KVM: make_huge_spte(); Arm: a block's type.
    """
    if level == U1:
        return bits
    return moved_mask(state, f, level, bits) | large_only(state, f)


@kernel
def child_attributes(state, f, level, bits):
    """Attributes of a child of `level` from those of a larger leaf: make_small_spte(), pgprot_large_2_4k()."""
    if level != U1:
        return bits
    child = bits & ~(large_only(state, f) | state[f + F_PAT_LARGE]) | page_only(state, f)
    if bits & state[f + F_PAT_LARGE] != U0:
        child |= state[f + F_PAT_PAGE]
    return child


@kernel
def well_formed(state, f, level, value):
    """Whether a walk takes the value for a present leaf of this level that is neither reserved nor misconfigured."""
    if not is_valid(state, f, value) or not is_leaf(state, f, level, value):
        return False
    if level == U1 and value & state[f + F_PAGE_MASK] != state[f + F_PAGE_VALUE]:
        return False
    return (
        value & state[f + F_RESERVED_LEAF + level] == U0
        and state[f + F_BAD_LOW] >> (value & U7) & U1 == U0
        and state[f + F_BAD_MEMORY_TYPE] >> (value >> U3 & U7) & U1 == U0
    )


@kernel
def needs_flush(state, f, old, new):
    """Whether a TLB may hold `old` to harm: not if only software bits changed or the hardware's bits were set.

    arch/x86/include/asm/tlbflush.h:pte_flags_need_flush().
    """
    return (old ^ new) & ~state[f + F_SOFTWARE] & ~(new & sticky_bits(state, f)) != U0


@kernel
def input_mask(state, f):
    """Bits of an input address, up to 64 of them."""
    return ALL >> (U64 - state[f + F_INPUT_BITS])


@kernel
def sign_extended(state, f, address):
    bits = state[f + F_INPUT_BITS]
    if state[f + F_SIGN_EXTENDED] != U0 and address >> (bits - U1) & U1 != U0:
        return address | ALL << bits
    return address
