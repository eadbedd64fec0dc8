"""Walks of page tables in anything that holds physical memory: an image, a machine. No compiler involved.

Formats are data (pgemu_kernels.formats.page_format); levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G, 5 = 256T.
These walks look at what the tables hold: they check reserved bits and misconfigurations, not the rights of an access,
and set no bits.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np

from pgemu.machine.arrays import U8, U64, Bools, Integers
from pgemu.machine.short import html_walks, walks
from pgemu.tables.walked import Walk, walked
from pgemu_kernels.formats.page_format import Family, PageFormat

__all__ = (
    "Kind",
    "Memory",
    "Rights",
    "Status",
    "Step",
    "Translation",
    "granted",
    "in_range",
    "kind_of",
    "kinds_of",
    "leaf_address",
    "permissions",
    "rights_of",
    "root_table",
    "translate",
    "walk",
    "walk_page",
)

Array = np.ndarray[Any, Any]


class Memory(Protocol):
    """Physical memory: pgemu.images.image.Image, pgemu.Machine. Addresses are multiples of 8."""

    def words(self, address: int, count: int) -> U64:
        """uint64[count] at a physical address. ValueError if not all of it is there."""

    def load(self, addresses: Integers) -> U64:
        """uint64[n]: the words at physical addresses (uint64[n]). ValueError if one is not there."""

    def holds(self, addresses: Integers) -> Bools:
        """bool[n]: whether the word at each address is there."""


class Kind(IntEnum):
    """What the hardware makes of an entry."""

    ABSENT = 0  # not present
    TABLE = 1
    LEAF = 2
    RESERVED = 3  # present, with a reserved bit set
    MISCONFIGURED = 4  # EPT: also a reserved bit
    UNREADABLE = 5  # the table lies outside the memory


class Status(IntEnum):
    """How a translation ended."""

    MAPPED = 0
    ABSENT = 1
    RESERVED = 2
    MISCONFIGURED = 3
    UNREADABLE = 4  # a table lies outside the memory
    OUT_OF_RANGE = 5  # not canonical, or wider than the format's addresses: no entry is read


_STATUS = {
    Kind.ABSENT: Status.ABSENT,
    Kind.LEAF: Status.MAPPED,
    Kind.RESERVED: Status.RESERVED,
    Kind.MISCONFIGURED: Status.MISCONFIGURED,
}


class Step(NamedTuple):
    """One entry of a walk. The entry of an UNREADABLE one is 0."""

    level: int
    address: int
    entry: int
    kind: Kind


class Translation(NamedTuple):
    """Result of `translate`: physical addresses (uint64[n], 0 where unmapped), levels (uint8[n]) and Status (uint8[n]).

    The level is that of the leaf, or of the entry at which the walk ended; 0 if none was read.
    """

    physical: U64
    level: U8
    status: U8

    def __repr__(self) -> str:
        return walks(self, Status)

    def _repr_html_(self) -> str:
        return html_walks(self, Status, {"level": self.level})


# --------------------------------------------------------------------------- entries


def kind_of(fmt: PageFormat, level: int, entry: int) -> Kind:
    """What the hardware makes of one entry of a level."""
    if not entry & fmt.present:
        return Kind.ABSENT
    bad = Kind.MISCONFIGURED if fmt.family == Family.EPT else Kind.RESERVED
    leaf = fmt.has_leaf_form(level, entry)
    misplaced = level > fmt.largest_leaf if leaf else level == 1 or fmt.skips_level(level, entry)
    if misplaced or fmt.reserved_in(level, entry) or fmt.bad_low >> (entry & 7) & 1:
        return bad
    if leaf and fmt.bad_memory_type >> (entry >> 3 & 7) & 1:
        return bad
    return Kind.LEAF if leaf else Kind.TABLE


def kinds_of(fmt: PageFormat, level: int, entries: Array) -> Array:
    """uint8[n]: the Kind of each entry (uint64[n]) of a level."""
    leaf = fmt.have_leaf_form(level, entries)
    of_leaf = fmt.reserved_leaf[min(level, len(fmt.reserved_leaf)) - 1]
    reserved = np.where(leaf, np.uint64(of_leaf), np.uint64(fmt.reserved_table[level - 1]))
    if fmt.sized_leaf:
        sized = entries & np.uint64(fmt.leaf_mask) == np.uint64(fmt.sized_leaf)
        reserved[sized] = fmt.reserved_leaf[0]
    bad = entries & reserved != 0
    if fmt.table_level_shift:
        below = entries >> np.uint64(fmt.table_level_shift) & np.uint64(7)
        bad |= ~leaf & (below != np.uint64(level - 1))
    if level == 1:
        bad |= ~leaf
    elif level > fmt.largest_leaf:
        bad |= leaf
    if fmt.bad_low:
        bad |= np.uint64(fmt.bad_low) >> (entries & np.uint64(7)) & np.uint64(1) != 0
    if fmt.bad_memory_type:
        memory_type = entries >> np.uint64(3) & np.uint64(7)
        bad |= leaf & (np.uint64(fmt.bad_memory_type) >> memory_type & np.uint64(1) != 0)
    kinds = np.where(leaf, np.uint8(Kind.LEAF), np.uint8(Kind.TABLE))
    kinds[bad] = Kind.MISCONFIGURED if fmt.family == Family.EPT else Kind.RESERVED
    kinds[entries & np.uint64(fmt.present) == 0] = Kind.ABSENT
    return kinds


class Rights(NamedTuple):
    """What a translation permits; execute is the supervisor's or EL1's, execute_user the user's or EL0's."""

    read: bool
    write: bool
    user: bool
    execute: bool
    execute_user: bool


def permissions(fmt: PageFormat) -> int:
    """The bits of a leaf that say what it permits."""
    return fmt.read | fmt.write | fmt.user | fmt.execute.mask


def rights_of(fmt: PageFormat, rights: int) -> Rights:
    """What the `rights` of a MappedRange permit: layout.F_INVERT and F_FOLD undone."""
    entry = rights ^ fmt.invert & permissions(fmt)
    entry ^= entry >> 1 & fmt.fold
    return Rights(
        not fmt.read or bool(entry & fmt.read),
        bool(entry & fmt.write),
        not fmt.user or bool(entry & fmt.user),
        *fmt.execute.decode(entry),
    )


def granted(fmt: PageFormat, steps: list[Step]) -> int:
    """`rights` of a walk that ends at a leaf, as MappedRange has them."""
    rights = permissions(fmt)
    for step in steps:
        if step.kind == Kind.TABLE:
            rights &= step.entry ^ fmt.invert | fmt.table_rights
        else:
            rights &= step.entry ^ step.entry >> 1 & fmt.fold ^ fmt.invert
    return rights


def root_table(fmt: PageFormat, root: int) -> int:
    """Physical address of the top table in a CR3, an EPTP, an nCR3, a VTTBR, or as it is."""
    return root & fmt.address


def in_range(fmt: PageFormat, address: int) -> bool:
    """Whether an address can be walked: canonical where the format sign-extends, else within its input size."""
    if not fmt.sign_extended:
        return 0 <= address < 1 << fmt.input_bits
    high = address >> fmt.input_bits - 1
    return high in (0, (1 << 65 - fmt.input_bits) - 1)


# --------------------------------------------------------------------------- one address


def walk(memory: Memory, fmt: PageFormat, root: int, address: int) -> list[Step]:
    """Walk one address from the table at `root`: the entries read, from the top.

    Ends at the leaf, or at the first entry that is neither leaf nor table, or that cannot be read. Empty where the
    address is out of range. Bits of `root` outside the address of a table are ignored.
    """
    steps: list[Step] = []
    if not in_range(fmt, address):
        return steps
    table = root_table(fmt, root)
    mask = (1 << fmt.root_bits) - 1
    for level in range(fmt.levels, 0, -1):
        where = table + (address >> 9 * level + 3 & mask) * 8
        mask = 511
        try:
            entry = int(memory.words(where, 1)[0])
        except ValueError:
            steps.append(Step(level, where, 0, Kind.UNREADABLE))
            break
        kind = kind_of(fmt, level, entry)
        steps.append(Step(level, where, entry, kind))
        if kind is not Kind.TABLE:
            break
        table = entry & fmt.address
    return steps


def leaf_address(fmt: PageFormat, level: int, entry: int, address: int) -> int:
    """Where an input address lies in the page of a leaf: its physical address."""
    return fmt.leaf_address(level, entry) | address & fmt.size_of_leaf(level, entry) - 1


# --------------------------------------------------------------------------- many addresses


def walk_page(memory: Memory, fmt: PageFormat, root: int, page: int) -> Walk:
    """walk() to a page number: [(level, entry address, entry)]; bits beyond the input addresses are the sign's."""
    address = page << 12
    if fmt.sign_extended and address >> fmt.input_bits - 1 & 1:
        address |= (1 << 64) - (1 << fmt.input_bits)
    return walked((step[:3] for step in walk(memory, fmt, root, address)), fmt)


def translate(memory: Memory, fmt: PageFormat, root: int, addresses: Integers) -> Translation:
    """Translate addresses (uint64[n]), level by level. Bits of `root` outside the address of a table are ignored."""
    addresses = np.asarray(addresses, np.uint64)
    physical = np.zeros(addresses.size, np.uint64)
    level_of = np.zeros(addresses.size, np.uint8)
    status = np.full(addresses.size, Status.OUT_OF_RANGE, np.uint8)
    rest = np.flatnonzero(_all_in_range(fmt, addresses))
    tables = np.full(rest.size, root_table(fmt, root), np.uint64)
    mask = np.uint64((1 << fmt.root_bits) - 1)
    for level in range(fmt.levels, 0, -1):
        if not rest.size:
            break
        shift = np.uint64(9 * level + 3)
        index = addresses[rest] >> shift & mask
        mask = np.uint64(511)
        where = tables + (index << np.uint64(3))
        level_of[rest] = level
        held = memory.holds(where)
        status[rest[~held]] = Status.UNREADABLE
        rest = rest[held]
        entries = memory.load(where[held])
        kinds = kinds_of(fmt, level, entries)
        for kind, outcome in _STATUS.items():
            status[rest[kinds == kind]] = outcome
        leaf = kinds == Kind.LEAF
        inside = fmt.sizes_of_leaves(level, entries[leaf]) - np.uint64(1)
        physical[rest[leaf]] = entries[leaf] & np.uint64(fmt.address) & ~inside | addresses[rest[leaf]] & inside
        table = kinds == Kind.TABLE
        rest = rest[table]
        tables = entries[table] & np.uint64(fmt.address)
    return Translation(physical, level_of, status)


def _all_in_range(fmt: PageFormat, addresses: Array) -> Array:
    """bool[n]: in_range() of each."""
    if not fmt.sign_extended:
        small: Array = addresses >> np.uint64(fmt.input_bits) == 0
        return small
    high = addresses >> np.uint64(fmt.input_bits - 1)
    canonical: Array = (high == 0) | (high == np.uint64((1 << 65 - fmt.input_bits) - 1))
    return canonical
