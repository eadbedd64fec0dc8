"""One walk, exactly: every check in its order, the fault as the hardware reports it, accessed and dirty bits.

The batches of `translate` and `nested` send here whatever is not an entry they can pass at one look. What is
asked of a walk is an access row (words.X_*), made by pgemu.tables.translation.Access; what a walk leaves is a record
(words.W_*) in a scratch array, so that callers need no ten results.

Intel SDM volume 3, "4-Level Paging and 5-Level Paging", "EPT Misconfigurations", "EPT Violations"; AMD APM volume 2,
15.25; Arm DDI 0487, "Stage 2 translation", fault priorities.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U3, U4, U8, U9, U12, U16, U32, U64, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.formats.page_format import Family
from pgemu_kernels.tables.edit_entries import is_sized, leaf_shift
from pgemu_kernels.words.enum_words import (
    WALK_ACCESS_FLAG,
    WALK_ADDRESS_SIZE,
    WALK_MISCONFIGURED,
    WALK_NOT_CANONICAL,
    WALK_NOT_PRESENT,
    WALK_OK,
    WALK_OUTSIDE_MEMORY,
    WALK_PERMISSION,
    WALK_PROTECTION_KEY,
    WALK_RESERVED,
)
from pgemu_kernels.words.registers import R_CONTENTS, R_GUEST_PAGES, R_POOL_BASE
from pgemu_kernels.words.table_words import (
    F_ADDRESS,
    F_BAD_LOW,
    F_BAD_MEMORY_TYPE,
    F_FAMILY,
    F_FOLD,
    F_INPUT_BITS,
    F_INVERT,
    F_KEY_SHIFT,
    F_LARGEST_LEAF,
    F_LEAF_MASK,
    F_LEAF_VALUE,
    F_LEVELS,
    F_PAGE_MASK,
    F_PAGE_VALUE,
    F_PRESENT,
    F_RESERVED_LEAF,
    F_RESERVED_TABLE,
    F_ROOT_BITS,
    F_SIGN_EXTENDED,
    F_TABLE_LEVEL,
    F_TABLE_RIGHTS,
    W_COUNT,
    W_ENTRY,
    W_ERROR,
    W_LEVEL,
    W_PHYSICAL,
    W_RIGHTS,
    W_SLOT,
    W_STATUS,
    X_DIRTY_GIVES,
    X_DIRTY_IF,
    X_ERROR,
    X_FLAG,
    X_FORBID,
    X_KEYS_SUPERVISOR,
    X_KEYS_USER,
    X_NEED,
    X_RESERVED,
    X_SET_LEAF,
    X_SET_TABLE,
    X_USER,
)

U = np.uint64
_EPT = U(Family.EPT)
_ARM64 = U(Family.ARM64)
_VTD = U(Family.VTD)
_AMD_IOMMU = U(Family.AMD_IOMMU)
U128 = U(128)
_LOW3 = U(7)
_KEY = U(15)
_USER_EXECUTE = U(1 << 10)


@kernel
def translates(state, f, address):
    """Whether an address is one the format takes: canonical, or not beyond its input bits."""
    bits = state[f + F_INPUT_BITS]
    half = state[f + F_SIGN_EXTENDED] << (bits - U1)
    return (address + half) & ~(ALL >> (U64 - bits)) == U0


@kernel
def slot_of(m, physical):
    """Index in `ram` of the word at a physical address, in the metadata zone or a guest frame; NONE outside memory.

    A guest frame without contents reads as zero, as frame 0 does, which is never handed out.
    """
    state = m.state
    slot = physical >> U3
    if slot < U(m.ram.size):
        return slot
    index = (physical >> U12) - state[R_POOL_BASE]
    if index >= state[R_GUEST_PAGES]:
        return NONE
    return U(m.counts[state[R_CONTENTS] + index]) << U9 | slot & U511


@kernel
def has_leaf_form(state, f, entry, level):
    """Whether a present entry has the form of a leaf; at level 1, of a page."""
    if is_sized(state, f, entry):
        return True
    if level == U1:
        return entry & state[f + F_PAGE_MASK] == state[f + F_PAGE_VALUE]
    return entry & state[f + F_LEAF_MASK] == state[f + F_LEAF_VALUE]


@kernel
def skips_level(state, f, entry, level):
    """Whether a table entry says another level than the next one: Linux makes none, and reads none."""
    shift = state[f + F_TABLE_LEVEL]
    return shift != U0 and entry >> shift & _LOW3 != level - U1


@kernel
def judge_entry(state, f, entry, level, checked):
    """What is wrong with an entry by itself; `checked` are the reserved bits that fault."""
    if entry & state[f + F_PRESENT] == U0:
        return WALK_NOT_PRESENT
    leaf = has_leaf_form(state, f, entry, level)
    # Address bits below its level's size are no reserved ones of a leaf that has its size there.
    own = U1 if is_sized(state, f, entry) else level
    reserved = state[f + F_RESERVED_LEAF + own] if leaf else state[f + F_RESERVED_TABLE + level]
    wrong = level > state[f + F_LARGEST_LEAF] if leaf else level == U1 or skips_level(state, f, entry, level)
    if state[f + F_FAMILY] == _EPT:
        type_bit = state[f + F_BAD_MEMORY_TYPE] >> (entry >> U3 & _LOW3) if leaf else U0
        if (state[f + F_BAD_LOW] >> (entry & _LOW3) | type_bit) & U1 != U0 and checked != U0:
            return WALK_MISCONFIGURED
        if entry & reserved & checked != U0 or wrong:
            return WALK_MISCONFIGURED
    if entry & reserved & checked != U0 or wrong:
        return WALK_RESERVED
    return WALK_OK


@kernel
def rights_of(state, f, entry, leaf):
    """The rights that an entry leaves."""
    if leaf:
        return (entry ^ entry >> U1 & state[f + F_FOLD]) ^ state[f + F_INVERT]
    return (entry ^ state[f + F_INVERT]) | state[f + F_TABLE_RIGHTS]


@kernel
def key_denies(state, f, access, x, entry, rights):
    """Whether the leaf's protection key denies the access. SDM "Protection Keys"."""
    shift = state[f + F_KEY_SHIFT]
    if shift == U0:
        return False
    keys = access[x + X_KEYS_USER] if rights & access[x + X_USER] != U0 else access[x + X_KEYS_SUPERVISOR]
    return keys >> (entry >> shift & _KEY) & U1 != U0


@kernel
def judge_leaf(state, f, access, x, entry, rights):
    """Access flag, rights, protection key: (status, whether a key denies)."""
    if entry & access[x + X_FLAG] != access[x + X_FLAG]:
        return WALK_ACCESS_FLAG, False
    denied = key_denies(state, f, access, x, entry, rights)
    if rights & access[x + X_NEED] != access[x + X_NEED] or rights & access[x + X_FORBID] != U0:
        return WALK_PERMISSION, denied
    return (WALK_PROTECTION_KEY if denied else WALK_OK), denied


@kernel
def arm_fault(status, level):
    """DFSC[5:0]: kind of fault and Arm's level, which counts the other way round."""
    if status == WALK_ADDRESS_SIZE:
        return U4  # a translation fault at level 0, whatever the first level is: AArch64.S2Walk()
    if status == WALK_PERMISSION:
        return U12 | U4 - level
    if status == WALK_ACCESS_FLAG:
        return U8 | U4 - level
    return U4 | U4 - level


@kernel
def is_vtd(state, f):
    return state[f + F_FAMILY] == _VTD


@kernel
def vtd_reason(status, denied):
    """Fault reason of legacy mode; `denied` is that of an access which an entry does not let through.

    VT-d specification, "Fault Reason Encodings"; drivers/iommu/intel/dmar.c:dma_remap_fault_reasons[].
    """
    if status == WALK_ADDRESS_SIZE:
        return U4
    return U12 if status == WALK_RESERVED else denied


@kernel
def amd_flags(status):
    """Flags of an IO_PAGE_FAULT beside RW: PR, PE, RZ, as drivers/iommu/amd/iommu.c prints them (bits 27:16)."""
    if status == WALK_PERMISSION:
        return U16 | U64
    return U16 | U128 if status == WALK_RESERVED else U0


@outlined
def fault_code(state, f, access, x, status, level, rights, denied):
    """The error word of a fault: page-fault error code, EXITINFO1, exit qualification or fault status.

    0 where the hardware gives none: a general protection fault, an EPT misconfiguration, no memory.
    """
    if status == WALK_NOT_CANONICAL or status == WALK_MISCONFIGURED or status == WALK_OUTSIDE_MEMORY:
        return U0
    family = state[f + F_FAMILY]
    error = access[x + X_ERROR]
    if family == _EPT:
        if status == WALK_ADDRESS_SIZE:
            return error
        user = rights & state[f + F_PRESENT] & _USER_EXECUTE
        return error | (rights & _LOW3) << U3 | user >> U4
    if family == _ARM64:
        return error | arm_fault(status, level)
    if is_vtd(state, f):
        return vtd_reason(status, error)
    if family == _AMD_IOMMU:
        return error | amd_flags(status)
    if status != WALK_NOT_PRESENT and status != WALK_ADDRESS_SIZE:
        error |= U1
    if status == WALK_RESERVED:
        error |= U8
    if denied:
        error |= U32
    return error


@kernel
def judge(state, f, access, x, entry, level, rights):
    """An entry of a walk that has `rights` so far: (status, is it a leaf, rights left, does a key deny)."""
    status = judge_entry(state, f, entry, level, access[x + X_RESERVED])
    leaf = has_leaf_form(state, f, entry, level)
    if leaf and entry & access[x + X_DIRTY_IF] != U0:
        entry |= access[x + X_DIRTY_GIVES]
    rights &= rights_of(state, f, entry, leaf)
    denied = False
    if status == WALK_OK and leaf:
        status, denied = judge_leaf(state, f, access, x, entry, rights)
    return status, leaf, rights, denied


@kernel
def refused(state, f):
    """The status of an address that the format does not translate."""
    return WALK_NOT_CANONICAL if state[f + F_SIGN_EXTENDED] != U0 else WALK_ADDRESS_SIZE


@kernel
def record(w, at, status, level, rights, count):
    w[at + W_STATUS] = status
    w[at + W_LEVEL] = level
    w[at + W_RIGHTS] = rights
    w[at + W_COUNT] = count
    w[at + W_ERROR] = U0
    w[at + W_PHYSICAL] = U0


@kernel
def output_address(state, f, entry, level, address):
    """Where a leaf of `level` maps an address to."""
    inside = (U1 << leaf_shift(state, f, level, entry)) - U1
    return entry & state[f + F_ADDRESS] & ~inside | address & inside


@outlined
def walk(m, f, access, x, root, address, w, at):
    """Walk the tables below physical address `root`; the record begins at w[at]. Returns the status.

    f: where the format's row begins in `state`. x: where the access row begins in `access`. Nothing is written
    to memory: see `update`. On failure W_LEVEL is the level of the entry at fault.
    """
    state = m.state
    level = state[f + F_LEVELS]
    rights = ALL
    count = U0
    leaf = denied = False
    status = WALK_OK if translates(state, f, address) else refused(state, f)
    table = root
    mask = (U1 << state[f + F_ROOT_BITS]) - U1
    entry = U0
    while status == WALK_OK and not leaf:
        physical = table + ((address >> shift_of(level) & mask) << U3)
        slot = slot_of(m, physical)
        if slot == NONE:
            status = WALK_OUTSIDE_MEMORY
            break
        entry = m.ram[slot]
        w[at + W_SLOT + count] = slot
        w[at + W_ENTRY + count] = physical
        count += U1
        status, leaf, rights, denied = judge(state, f, access, x, entry, level, rights)
        if status == WALK_OK and not leaf:
            table = entry & state[f + F_ADDRESS]
            mask = U511
            level -= U1
    record(w, at, status, level, rights, count)
    if status == WALK_OK:
        w[at + W_PHYSICAL] = output_address(state, f, entry, level, address)
    else:
        w[at + W_ERROR] = fault_code(state, f, access, x, status, level, rights, denied)
    return status


@kernel
def new_value(access, x, entry, leaf):
    """An entry as the hardware leaves it after a walk that succeeded."""
    if not leaf:
        return entry | access[x + X_SET_TABLE]
    if entry & access[x + X_DIRTY_IF] != U0:
        entry |= access[x + X_DIRTY_GIVES]
    return entry | access[x + X_SET_LEAF]


@outlined
def update(m, access, x, w, at, writes, first, written, mark):
    """Set accessed and dirty bits in the entries of a walk that succeeded, one 8-byte write for each that changes.

    The addresses written, with `mark` in their low bits, are put into writes[first + written ..] where the array
    has room for lists. Returns how many have been written then.
    """
    count = w[at + W_COUNT]
    for n in range(count):
        slot = w[at + W_SLOT + n]
        entry = m.ram[slot]
        value = new_value(access, x, entry, n == count - U1)
        if value != entry:
            m.ram[slot] = value
            if U(writes.size) != U0:
                writes[first + written] = w[at + W_ENTRY + n] | mark
            written += U1
    return written


@kernel
def list_reads(w, at, reads, first, count, mark):
    """Append the entries that a walk read to a list of references, where there is one: how many there are then."""
    if U(reads.size) != U0:
        for n in range(w[at + W_COUNT]):
            reads[first + count + n] = w[at + W_ENTRY + n] | mark
    return count + w[at + W_COUNT]
