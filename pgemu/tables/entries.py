"""What a page-table entry says: its kind, rights and state, and a name for every bit.

`classify` gives the kind alone, `decode` everything. Entries are Python ints of 64 bits, levels are 1 (4K) to 5.
Names of bits are those of Linux (asm/pgtable_types.h, kvm/mmu/spte.h, asm/kvm_pgtable.h) and of the manuals. Making
entries is PageFormat.encode(), .table_entry(), and pgemu_kernels.formats.leaves for those that Linux writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from pgemu_kernels.formats import bits, leaves
from pgemu_kernels.formats.page_format import ALL, Family, PageFormat, span

__all__ = ("Entry", "EntryKind", "Field", "classify", "decode")


class EntryKind(Enum):
    """What an entry is.

    Hardware faults on every kind but TABLE and LEAF: MISCONFIGURED and, on EPT, MMIO with an EPT misconfiguration,
    RESERVED and AMD's MMIO with a reserved-bit fault, the others because they are not present. On Arm RESERVED is an
    address size fault, a translation fault (a block where there are none), or a RES0 bit, which hardware may ignore.
    """

    ABSENT = "absent"
    TABLE = "table"
    LEAF = "leaf"
    MMIO = "mmio"  # KVM: a cached access to memory without a slot
    FROZEN = "frozen"  # KVM: being removed, or between Arm's break and make
    RESERVED = "reserved"  # a reserved bit is set, or a type that does not exist at this level
    MISCONFIGURED = "misconfigured"  # EPT: rights or memory type that cannot be, or a reserved bit
    ACCESS_TRACKED = "access_tracked"  # KVM without accessed bits: watched for the next access
    ANNOTATED = "annotated"  # Arm: nothing mapped, an owner is noted
    PROTECTION_NONE = "protection_none"  # a process's page that may not be touched; frame bits inverted
    SPLITTING = "splitting"  # a transparent huge page while it is split: pmdp_invalidate()
    GUARD = "guard"  # MADV_GUARD_INSTALL
    MARKER = "marker"  # another PTE marker: userfaultfd write protection, poison
    SWAP = "swap"  # a swap or migration entry
    KERNEL_NOT_PRESENT = "kernel_not_present"  # a page that the kernel unmapped, in its direct map or its image


class Field(NamedTuple):
    """A named part of an entry: bits `high` to `low`, and their value.

    The value of a frame ("PFN", "GFN") is a number of 4 KiB pages whatever the level; of fields that begin with "~"
    it is what was inverted.
    """

    name: str
    high: int
    low: int
    value: int

    @property
    def bits(self) -> str:
        """ "63" or "51:12"."""
        return str(self.high) if self.high == self.low else f"{self.high}:{self.low}"


class _Name(NamedTuple):
    name: str
    high: int
    low: int
    shift: int | None = None  # how far down the value is moved, if not by `low`
    inverted: bool = False
    without: int = 0  # bits between that are another field: SME's bit in a frame

    @property
    def mask(self) -> int:
        return span(self.low, self.high) & ~self.without

    def field(self, entry: int) -> Field:
        value = (~entry if self.inverted else entry) & self.mask
        return Field(self.name, self.high, self.low, value >> (self.low if self.shift is None else self.shift))


@dataclass(frozen=True)
class Entry:
    """A decoded entry.

    address: physical address of the page or table; of MMIO the guest physical one; None where there is none.
    read, write, user, execute, execute_user: rights of this entry alone (execute: supervisor or EL1, execute_user:
    user or EL0); all False unless it is a table, a leaf or ACCESS_TRACKED. accessed, dirty: the hardware's bits of
    these and of a page that may not be touched; False where there are none. memory_type: "WB", "UC-", ...; None
    unless it is a leaf. key: protection key. software: the set bits that hardware ignores and Linux has named.
    generation: memslots generation of MMIO. swap_type, swap_offset: of SWAP, MARKER and GUARD. fields: every named
    bit that is set, and every field of several bits, highest first.
    reserved: reserved bits that are set; problem: what is wrong with a RESERVED or MISCONFIGURED one.
    unknown: set bits without a name.
    """

    kind: EntryKind
    level: int
    value: int
    address: int | None
    read: bool
    write: bool
    user: bool
    execute: bool
    execute_user: bool
    accessed: bool
    dirty: bool
    global_: bool
    memory_type: str | None
    key: int
    software: int
    fields: tuple[Field, ...]
    reserved: int = 0
    unknown: int = 0
    problem: str = ""
    generation: int | None = None
    swap_type: int | None = None
    swap_offset: int | None = None

    @property
    def names(self) -> list[tuple[str, str, int]]:
        """(bit or bits, name, value) of every field."""
        return [(field.bits, field.name, field.value) for field in self.fields]

    @property
    def flags(self) -> str:
        """Names of the single bits that are set, highest last, as crash's vtop shows them."""
        return " ".join(field.name for field in reversed(self.fields) if field.high == field.low and field.value)


# --------------------------------------------------------------------------- kinds


def is_leaf(fmt: PageFormat, level: int, entry: int) -> bool:
    """Whether a present entry of `level` has the shape of a leaf."""
    return level <= fmt.largest_leaf and fmt.has_leaf_form(level, entry)


def reserved_bits(fmt: PageFormat, level: int, entry: int) -> int:
    """Reserved bits that a present entry has set."""
    if fmt.is_sized(entry):
        return fmt.reserved_in(level, entry)
    masks = fmt.reserved_leaf if level == 1 or is_leaf(fmt, level, entry) else fmt.reserved_table
    return entry & masks[level - 1]


def classify(fmt: PageFormat, level: int, entry: int, address: int | None = None) -> EntryKind:
    """The kind of an entry that lies in a table of `level`. ValueError for a level or entry that cannot be.

    address: a virtual address that the entry maps. Entries of a process and of the kernel that are not present differ;
    where no address tells whose it is, its bits do as far as they can: a swap entry has none of bits 4 to 7
    (asm/pgtable_64.h), and the kernel unmaps pages that were accessed (mm/pat/set_memory.c:__set_pages_np()).
    """
    if not 1 <= level <= fmt.levels:
        raise ValueError(f"{fmt.name}: level {level}: expected 1 to {fmt.levels}")
    if not 0 <= entry <= ALL:
        raise ValueError(f"{entry:#x}: expected an entry of 64 bits")
    if entry in (0, fmt.empty):
        return EntryKind.ABSENT
    if fmt.frozen and entry == fmt.frozen:
        return EntryKind.FROZEN
    if fmt.mmio_value and entry & (fmt.mmio_mask | bits.MMU_PRESENT) == fmt.mmio_value:
        return EntryKind.MMIO
    if not entry & fmt.present:
        return _classify_absent(fmt, level, entry, None if address is None else bool(address >> 63))
    if _problem(fmt, level, entry):
        return EntryKind.MISCONFIGURED if fmt.family is Family.EPT else EntryKind.RESERVED
    return EntryKind.LEAF if is_leaf(fmt, level, entry) else EntryKind.TABLE


def _problem(fmt: PageFormat, level: int, entry: int) -> str:
    """What makes a present entry fault whoever accesses it; "" if nothing does."""
    leaf = is_leaf(fmt, level, entry)
    if fmt.bad_low >> (entry & 7) & 1:
        return f"rights {entry & 7:03b}b"
    if leaf and fmt.bad_memory_type >> (entry >> 3 & 7) & 1:
        return f"memory type {entry >> 3 & 7}"
    if reserved := reserved_bits(fmt, level, entry):
        return f"reserved bits {reserved:#x}"
    # Arm: a page above level 1 or a block where there are none; others have a reserved bit for that.
    if not leaf and (level == 1 or entry & fmt.leaf_mask == fmt.leaf_value):
        return f"no leaf of this type at level {level}"
    if not leaf and fmt.skips_level(level, entry):
        return f"next level {entry >> fmt.table_level_shift & 7} at level {level}"
    return ""


def _classify_absent(fmt: PageFormat, level: int, entry: int, of_kernel: bool | None) -> EntryKind:
    """The kind of an entry that is not present, but not empty either."""
    if fmt.protection_none:
        return _classify_process(fmt, level, entry, of_kernel)
    if fmt.family is Family.ARM64:
        return EntryKind.ANNOTATED
    if fmt.saved_rights and entry & bits.MMU_PRESENT:
        return EntryKind.ACCESS_TRACKED
    return EntryKind.ABSENT


def _classify_process(fmt: PageFormat, level: int, entry: int, of_kernel: bool | None) -> EntryKind:
    """... of a process: asm/pgtable.h:pte_present(), pmd_present(), pte_none(); of the kernel, or unknown whose."""
    if not entry & ~(bits.ACCESSED | bits.DIRTY):
        return EntryKind.ABSENT  # an erratum leaves these: _PAGE_KNL_ERRATUM_MASK
    if of_kernel:
        return EntryKind.KERNEL_NOT_PRESENT
    if entry & fmt.protection_none:
        return EntryKind.PROTECTION_NONE
    if level > 1 and entry & bits.LARGE:
        return EntryKind.SPLITTING
    if of_kernel is None and entry & _NOT_IN_SWAP:
        return EntryKind.KERNEL_NOT_PRESENT
    kind, marks = _swap(entry)
    if kind != leaves.SWAP_PTE_MARKER:
        return EntryKind.SWAP
    return EntryKind.GUARD if marks & leaves.MARKER_GUARD else EntryKind.MARKER


_NOT_IN_SWAP = span(4, 7)


def _is_inverted(fmt: PageFormat, entry: int) -> bool:
    """Whether the frame of an unmapped page of the kernel is inverted, as it is since the fixes of L1TF (Linux 4.19,
    asm/pgtable-invert.h): no memory lies where an address would have its highest bit."""
    return bool(entry >> fmt.address.bit_length() - 1 & 1)


def _swap(entry: int) -> tuple[int, int]:
    """Type and offset of a swap entry."""
    return entry >> 59, (~entry & span(9, 58)) >> 9


# --------------------------------------------------------------------------- names


def _bits(*names: tuple[str, int]) -> list[_Name]:
    return [_Name(name, bit, bit) for name, bit in names]


def _release(fmt: PageFormat) -> tuple[int, ...]:
    return tuple(int(part) for part in fmt.kernel.split("."))


def _frame(fmt: PageFormat, level: int) -> _Name:
    low = (fmt.frame(level) & -fmt.frame(level)).bit_length() - 1
    return _Name("PFN", min(fmt.address.bit_length(), fmt.maxphyaddr) - 1, low, shift=12, without=fmt.c_bit)


def _x86_names(level: int, leaf: bool) -> list[_Name]:
    """What x86-64 and NPT have in common."""
    named = _bits(("PRESENT", 0), ("RW", 1), ("USER", 2), ("PWT", 3), ("PCD", 4), ("ACCESSED", 5), ("DIRTY", 6))
    named += _bits(("NX", 63))
    if leaf:
        named += _bits(("GLOBAL", 8), ("PAT", 7)) if level == 1 else _bits(("GLOBAL", 8), ("PSE", 7), ("PAT", 12))
    return named


def _process_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    release = _release(fmt)
    named = _x86_names(level, leaf)
    if not leaf:
        top = _bits(("NOPTISHADOW", 58)) if level == fmt.levels and release >= (6, 13) else []
        return named + top + _bits(("HLAT_RESTART", 11))
    named += _bits(("SPECIAL", 9), ("UFFD_WP", 10), ("SOFT_DIRTY", 11))
    named += _bits(("SAVED_DIRTY" if bits.RELEASES[fmt.kernel].saved_dirty else "SOFTW5", 58))
    named += _bits(("DEVMAP" if release < (6, 17) else "SOFTW4", 57))
    return [*named, _Name("PKEY", 62, 59)]


def _npt_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    named = _x86_names(level, leaf) + _bits(("MMU_PRESENT", 11))
    return named + _bits(("HOST_WRITABLE", 9), ("MMU_WRITABLE", 10)) if leaf else named


def _ept_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    named = _bits(("R", 0), ("W", 1), ("X", 2), ("ACCESSED", 8), ("XU", 10), ("MMU_PRESENT", 11), ("SUPPRESS_VE", 63))
    marks = fmt.host_writable | fmt.mmu_writable
    if _release(fmt) < (7, 3):
        named.append(_Name("TDP_AD", 53, 52))
    else:
        named += _bits(("TDP_AD_DISABLED", 52))
    if not leaf:
        return named
    named += [_Name("MEMTYPE", 5, 3), *_bits(("IPAT", 6), ("DIRTY", 9), ("SAVED_R", 54), ("SAVED_X", 56))]
    named += _bits(("HOST_WRITABLE", fmt.host_writable.bit_length() - 1))
    named += _bits(("MMU_WRITABLE", fmt.mmu_writable.bit_length() - 1))
    # Each of these only if its control is on; KVM turns none on, and used to keep its own marks there.
    hardware = _bits(("VGP", 57), ("PWA", 58), ("SSS", 60), *((("SPP", 61),) if level == 1 else ()))
    named += [name for name in hardware if not name.mask & marks]
    return named + (_bits(("LARGE", 7)) if level > 1 else [])


def _arm_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    named = _bits(("VALID", 0))
    if not leaf:
        return named + _bits(("TABLE", 1))
    named += [_Name("MemAttr", 5, 2), _Name("S2AP", 7, 6), _Name("SH", 9, 8), *_bits(("AF", 10), ("FnXS", 11))]
    named += _bits(("DBM", 51), ("CONT", 52), *((f"SW{i}", 55 + i) for i in range(4)))
    named += [_Name("XN", 54, 53) if fmt.execute.mask >> 53 & 1 else _Name("XN", 54, 54), _Name("PBHA", 62, 59)]
    return named + (_bits(("PAGE", 1)) if level == 1 else [])


def _vtd_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    named = _bits(("R", 0), ("W", 1), ("X", 2), ("ACCESSED", 8))
    if not leaf:
        return named + (_bits(("CACHE_FLUSH_DONE", 10)) if _release(fmt) >= (6, 19) else [])
    named += [_Name("EMT", 5, 3), *_bits(("IPAT", 6), ("DIRTY", 9), ("SNP", 11), ("TM", 62))]
    return named + (_bits(("PS", 7)) if level > 1 else [])


def _amd_iommu_names(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    named = [*_bits(("PR", 0), ("ACCESSED", 5), ("IR", 61), ("IW", 62)), _Name("NEXT_LEVEL", 11, 9)]
    return named + (_bits(("DIRTY", 6), ("U", 59), ("FC", 60)) if leaf else [])


_PRESENT_NAMES: dict[Family, Callable[[PageFormat, int, bool], list[_Name]]] = {
    Family.X86: _process_names,
    Family.NPT: _npt_names,
    Family.EPT: _ept_names,
    Family.ARM64: _arm_names,
    Family.VTD: _vtd_names,
    Family.AMD_IOMMU: _amd_iommu_names,
}


def _present(fmt: PageFormat, level: int, leaf: bool) -> list[_Name]:
    # A leaf above level 3 does not exist; an entry that claims to be one is named like a table.
    frame = _frame(fmt, level if leaf and not fmt.sized_leaf else 1)
    named = [*_PRESENT_NAMES[fmt.family](fmt, level, leaf), frame]
    return named + _encryption(fmt)


def _encryption(fmt: PageFormat) -> list[_Name]:
    return _bits(("ENC", fmt.c_bit.bit_length() - 1)) if fmt.c_bit else []


def _absent_frame(fmt: PageFormat) -> _Name:
    """The inverted frame of an entry that is not present. SME's bit is none of it, and is kept as it is."""
    return _Name("~PFN", fmt.address.bit_length() - 1, 12, inverted=True, without=fmt.c_bit)


def _mmio_names(fmt: PageFormat) -> list[_Name]:
    moved = fmt.mmio_moved
    lowest = (moved & -moved).bit_length() - 1 if moved else fmt.maxphyaddr
    named = [_Name("GENERATION_LOW", 10, 3), _Name("GENERATION_HIGH", 62, 52), _Name("GFN", lowest - 1, 12)]
    if moved:
        named += [_Name("L1TF", moved.bit_length() - 1, lowest)]
        named += [_Name("GFN_HIGH", moved.bit_length() + 4, lowest + 5)]
    if fmt.mmio_rights:
        reserved = fmt.mmio_value & ~fmt.present
        low = (reserved & -reserved).bit_length() - 1
        return [*named, *_bits(("PRESENT", 0), ("RW", 1), ("USER", 2)), _Name("MMIO", reserved.bit_length() - 1, low)]
    return [*named, _Name("MMIO", 2, 0)]


def _absent_names(fmt: PageFormat, level: int, kind: EntryKind, inverted: bool) -> list[_Name]:
    """Names of an entry that is not present."""
    if kind is EntryKind.KERNEL_NOT_PRESENT:
        frame = _absent_frame(fmt) if inverted else _absent_frame(fmt)._replace(name="PFN", inverted=False)
        # Of a large page bit 12 is PAT, or was taken for a part of the frame.
        named = [name for name in _process_names(fmt, level, True) if (name.name, name.high) != ("PAT", 12)]
        return [*named, frame, *_encryption(fmt)]
    if kind is EntryKind.PROTECTION_NONE or kind is EntryKind.SPLITTING:
        named = [name for name in _process_names(fmt, level, True) if name.name not in ("GLOBAL", "PAT")]
        named += _bits(("PROTNONE", 8), *((("PAT", 7),) if level == 1 else ()))
        # The large page's PAT bit is inverted with the frame, or was taken for a part of it.
        return [*named, _absent_frame(fmt), *_encryption(fmt)]
    if kind in (EntryKind.SWAP, EntryKind.MARKER, EntryKind.GUARD):
        marks = _bits(("SWP_SOFT_DIRTY", 1), ("SWP_UFFD_WP", 2), ("SWP_EXCLUSIVE", 3))
        return [*marks, _Name("SWP_TYPE", 63, 59), _Name("~SWP_OFFSET", 58, 9, inverted=True)]
    if kind is EntryKind.ANNOTATED:
        return [_Name("OWNER", 9, 2)] if _release(fmt) < (7, 1) else [_Name("TYPE", 63, 60), _Name("ANNOTATION", 59, 1)]
    if kind is EntryKind.FROZEN:
        marker = fmt.frozen & ~bits.EMPTY_SPTE
        low = (marker & -marker).bit_length() - 1
        return [_Name("FROZEN", marker.bit_length() - 1, low), *_bits(("NONPRESENT", 63))]
    return _bits(("NONPRESENT", 63)) if fmt.empty else []


@lru_cache(maxsize=1024)
def _names(fmt: PageFormat, level: int, kind: EntryKind, leaf: bool, inverted: bool = True) -> tuple[_Name, ...]:
    """Names of the bits of an entry of this kind, highest first. inverted: see _is_inverted()."""
    if kind is EntryKind.MMIO:
        named = _mmio_names(fmt)
    elif kind in _SHAPED:
        named = _present(fmt, level, leaf)
    else:
        named = _absent_names(fmt, level, kind, inverted)
    return tuple(sorted(named, key=lambda name: -name.high))


_SHAPED = (
    EntryKind.TABLE,
    EntryKind.LEAF,
    EntryKind.RESERVED,
    EntryKind.MISCONFIGURED,
    EntryKind.ACCESS_TRACKED,
)
"""Kinds that have the fields of a table or leaf."""


# --------------------------------------------------------------------------- decoding


def decode(fmt: PageFormat, level: int, entry: int, address: int | None = None) -> Entry:
    """Decode an entry that lies in a table of `level`. ValueError for a level or entry that cannot be.

    address: as of classify(). Of SPLITTING, PROTECTION_NONE and KERNEL_NOT_PRESENT entries the address is the frame as
    it was before its bits were inverted, of ACCESS_TRACKED ones the rights are those that the next access restores.
    """
    kind = classify(fmt, level, entry, address)
    leaf = is_leaf(fmt, level, entry) or kind is EntryKind.ACCESS_TRACKED
    named = _names(fmt, level, kind, leaf, kind is not EntryKind.KERNEL_NOT_PRESENT or _is_inverted(fmt, entry))
    fields = tuple(name.field(entry) for name in named if entry & name.mask or name.high > name.low)
    covered = 0
    for name in named:
        covered |= name.mask
    shaped = kind in _SHAPED
    return Entry(
        kind=kind,
        level=level,
        value=entry,
        address=_address(fmt, level, kind, entry),
        **_rights(fmt, kind, entry),
        accessed=kind in (EntryKind.TABLE, EntryKind.LEAF, *_KEPT) and bool(entry & fmt.accessed),
        dirty=(kind is EntryKind.LEAF or kind in _KEPT) and bool(entry & fmt.dirty),
        global_=kind is EntryKind.LEAF and bool(entry & fmt.global_),
        memory_type=_memory_type(fmt, level, entry) if kind is EntryKind.LEAF else None,
        key=entry >> fmt.key_shift & 15 if fmt.key_shift and kind is EntryKind.LEAF else 0,
        software=entry & _software(fmt, level, kind),
        fields=fields,
        reserved=reserved_bits(fmt, level, entry) if shaped else 0,
        unknown=entry & ~covered & ~(reserved_bits(fmt, level, entry) if shaped else 0),
        problem=_problem(fmt, level, entry) if kind in (EntryKind.RESERVED, EntryKind.MISCONFIGURED) else "",
        generation=leaves.mmio_generation(entry) if kind is EntryKind.MMIO else None,
        swap_type=_swap(entry)[0] if kind in _SWAPPED else None,
        swap_offset=_swap(entry)[1] if kind in _SWAPPED else None,
    )


_KEPT = (EntryKind.PROTECTION_NONE, EntryKind.SPLITTING, EntryKind.ACCESS_TRACKED, EntryKind.KERNEL_NOT_PRESENT)
"""Kinds of pages that are mapped but may not be touched: accessed and dirty are as the last access left them."""
_SWAPPED = (EntryKind.SWAP, EntryKind.MARKER, EntryKind.GUARD)
_SOFTWARE = {"SPECIAL", "UFFD_WP", "SOFT_DIRTY", "SAVED_DIRTY", "SOFTW4", "SOFTW5", "DEVMAP", "NOPTISHADOW", "TDP_AD",
             "MMU_PRESENT", "HOST_WRITABLE", "MMU_WRITABLE", "SAVED_R", "SAVED_X", "TDP_AD_DISABLED",
             "SW0", "SW1", "SW2", "SW3", "CACHE_FLUSH_DONE"}  # fmt: skip


@lru_cache(maxsize=1024)
def _software(fmt: PageFormat, level: int, kind: EntryKind) -> int:
    """Bits that hardware ignores and Linux has named."""
    if kind not in (EntryKind.TABLE, EntryKind.LEAF, EntryKind.ACCESS_TRACKED, EntryKind.PROTECTION_NONE):
        return 0
    named = _names(fmt, level, kind, kind is not EntryKind.TABLE)
    return sum(name.mask for name in named if name.name in _SOFTWARE)


def _address(fmt: PageFormat, level: int, kind: EntryKind, entry: int) -> int | None:
    if kind is EntryKind.MMIO:
        return leaves.mmio_gfn(fmt, entry) << 12
    if kind in (EntryKind.PROTECTION_NONE, EntryKind.SPLITTING):
        return ~entry & fmt.frame(level)
    if kind is EntryKind.KERNEL_NOT_PRESENT:
        return (~entry if _is_inverted(fmt, entry) else entry) & fmt.frame(level)
    if kind is EntryKind.LEAF and fmt.is_sized(entry):
        return fmt.leaf_address(level, entry)
    if kind is EntryKind.LEAF or kind is EntryKind.ACCESS_TRACKED:
        return entry & fmt.frame(level)
    return entry & fmt.address if kind is EntryKind.TABLE else None


def _rights(fmt: PageFormat, kind: EntryKind, entry: int) -> dict[str, bool]:
    """read, write, user, execute, execute_user. A format without a bit for a right always grants it."""
    if kind is EntryKind.ACCESS_TRACKED:
        # The W bit is not kept: the next write fault restores it if KVM's mark allows.
        entry = entry & ~fmt.write | entry >> fmt.saved_rights & 0b101
    elif kind not in (EntryKind.TABLE, EntryKind.LEAF):
        return dict.fromkeys(("read", "write", "user", "execute", "execute_user"), False)
    if kind is EntryKind.TABLE and fmt.table_rights:
        return dict.fromkeys(("read", "write", "user", "execute", "execute_user"), True)
    supervisor, user = fmt.execute.decode(entry)
    return {
        "read": not fmt.read or bool(entry & fmt.read),
        "write": bool(entry & fmt.write),
        "user": not fmt.user or bool(entry & fmt.user),
        "execute": supervisor,
        "execute_user": user,
    }


def _memory_type(fmt: PageFormat, level: int, entry: int) -> str | None:
    value = entry & fmt.memory_type_mask[min(level, 3) - 1]
    return (
        None
        if len(fmt.memory_types) == 1
        else next((name for name, values in fmt.memory_types if values[min(level, 3) - 1] == value), None)
    )
