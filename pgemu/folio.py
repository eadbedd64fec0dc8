"""Struct pages and folios, decoded from anything that holds physical memory: a machine, an image of a kernel.

>>> from pgemu import Config, Machine
>>> machine = Machine(Config(pool=1 << 30, page_size=2 << 20, kernel="6.18"))
>>> folio = machine.folio((1 << 20) + 70)  # a tail gives its folio
>>> folio.pfn == 1 << 20, folio.order, folio.refcount, folio.type, folio.optimized
(True, 9, 0, 'hugetlb', True)
>>> folio.hugetlb.flags
('freed', 'vmemmap_optimized')
>>> [(page.frame == folio.vmemmap[0].frame, page.writable) for page in folio.vmemmap[:2]]
[(True, True), (True, False)]

A Folio is a reader: every property looks into memory anew. Layouts are data (pgemu_kernels.page_layout). No compiler
is involved except by the operations of a machine's folios.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pgemu.walk import Kind, Memory, Step, leaf_address, walk
from pgemu_kernels.layout import PAGE_4K, Flag, Operation
from pgemu_kernels.page_format import PageFormat, x86_64
from pgemu_kernels.page_layout import (
    GUP_PIN_COUNTING_BIAS,
    MAPPING_ANON,
    MAPPING_KSM,
    MEMCG_FLAGS,
    STRUCT_PAGE,
    TAIL_MAPPING,
    VMEMMAP,
    Bits,
    Field,
    FieldKind,
    PageLayout,
    page_layout,
)

if TYPE_CHECKING:
    from pgemu.machine import Machine, Result

__all__ = ("Folio", "Hugetlb", "Mapping", "MmIds", "Page", "Value", "VmemmapPage", "decode_page", "pointer_name")

_U64 = (1 << 64) - 1
_POISON = {
    0xDEAD_0000_0000_0100: "LIST_POISON1",
    0xDEAD_0000_0000_0122: "LIST_POISON2",
    TAIL_MAPPING: "TAIL_MAPPING",
}
# Documentation/arch/x86/x86_64/mm.rst, four levels, without KASLR; the vmemmap is a parameter.
_REGIONS = (
    (0xFFFF_8880_0000_0000, 0xFFFF_C880_0000_0000, "direct map"),
    (0xFFFF_C900_0000_0000, 0xFFFF_E900_0000_0000, "vmalloc"),
    (0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_A000_0000, "kernel image"),
    (0xFFFF_FFFF_A000_0000, 0xFFFF_FFFF_FF00_0000, "module"),
)
_DIRECT_MAP = _REGIONS[0][0]
_VMEMMAP_SIZE = 1 << 40
_HUGETLB_DTOR = 2  # 6.1: HUGETLB_PAGE_DTOR
_MM_ID_BITS = 31  # mm_types.h: MM_ID_BITS; bit 31 of the first ID is a lock, of the second "mapped shared"
_LONGEST_LIST = 1 << 18  # entries of a list of poisoned pages that are followed


# --------------------------------------------------------------------------- one struct page


class Value(NamedTuple):
    """A field of a struct page: its name, bytes from the page's own start, bytes long, value, what that means."""

    name: str
    offset: int
    size: int
    value: int
    meaning: str


class Mapping(NamedTuple):
    """folio->mapping. kind: "address_space", "anon_vma", "ksm" or "tail" (TAIL_MAPPING); address: without low bits.

    The address is the kernel's, or in a machine a model address (pgemu_kernels.hugetlb.MAPPING_ADDRESS).
    """

    kind: str
    address: int


@dataclass(frozen=True, slots=True)
class Page:
    """A struct page, decoded by `decode_page`.

    kind: "page" (an order-0 page, or no part of a folio), "head" or "tail". head: PFN of the folio's head, itself for
    those that are none, None where a tail's word does not lead to a struct page. flags: names of the flags that are
    set, lowest first; of a folio's second struct page also those of the folio. unknown: set bits of the flags without
    a name; unconfirmed: those whose name is inference (page_layout). node, zone, last_cpupid, lru_gen, lru_refs: None
    where page->flags has no such field; last_cpupid -1 and lru_gen -1: none. type: name of the page type, or None.
    order: of a folio's second struct page the folio's order, else None. mapcount: of this page alone, None where the
    word holds a type. mapping, index, private: None where the words belong to the folio or to the page's type.
    values: every field in the order of the words.
    """

    pfn: int
    words: tuple[int, ...]
    kind: str
    head: int | None
    flags: tuple[str, ...]
    unknown: int
    unconfirmed: int
    node: int | None
    zone: int | None
    zone_name: str | None
    last_cpupid: int | None
    lru_gen: int | None
    lru_refs: int | None
    type: str | None
    order: int | None
    refcount: int
    mapcount: int | None
    mapping: Mapping | None
    index: int | None
    private: int | None
    values: tuple[Value, ...]


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def decode_page(
    words: Iterable[int], pfn: int, layout: PageLayout, *, vmemmap: int = VMEMMAP, folio_type: str | None = "hugetlb"
) -> Page:
    """Decode the eight words of the struct page of a PFN.

    vmemmap: address of the struct page of PFN 0. folio_type: type of the folio that a tail belongs to, which says
    whether its words are HugeTLB's. A struct page that only looks like a head (before 7.1, at every 64th page of an
    optimised folio) is decoded as the head that it shows: its words are all that is known here; see Folio.
    ValueError unless there are eight words.
    """
    words = tuple(int(word) for word in words)
    if len(words) != 8:
        raise ValueError(f"{len(words)} words: expected the 8 of a struct page")
    tail = words[1] & 1 == 1
    head = _head_of(words[1], pfn, vmemmap) if tail else pfn
    is_head = not tail and words[0] & layout.head != 0
    position = pfn - head if head is not None else layout.folio_pages
    second = tail and position == 1
    type_ = None if tail else _type(layout, words[6] & 0xFFFF_FFFF, words[0])
    values = _values(words, layout, _fields(layout, tail, position, type_, folio_type), pfn, vmemmap, type_)
    names, unknown, unconfirmed = _flags(layout, words[0], second)
    own = not (tail and position < layout.folio_pages) and type_ not in layout.typed
    number, size = _numbers(layout, words[0]), words[6] & 0xFFFF_FFFF
    zone = number.get("zone")
    return Page(
        pfn=pfn,
        words=words,
        kind="tail" if tail else "head" if is_head else "page",
        head=head,
        flags=names,
        unknown=unknown,
        unconfirmed=unconfirmed,
        node=number.get("node"),
        zone=zone,
        zone_name=layout.zones[zone] if zone is not None and zone < len(layout.zones) else None,
        last_cpupid=number.get("last_cpupid"),
        lru_gen=number.get("lru_gen"),
        lru_refs=number.get("lru_refs"),
        type=type_,
        order=_second_order(layout, words) if second else None,
        refcount=_signed(words[6] >> 32),
        mapcount=_signed(size) + 1 if type_ is None else None,
        mapping=_mapping(words[3]) if own else None,
        index=words[4] if own else None,
        private=words[5] if own else None,
        values=values,
    )


def _head_of(info: int, pfn: int, vmemmap: int) -> int | None:
    """PFN of a tail's head: page-flags.h:_compound_head(). Both forms are told by their value, masks being all ones
    above their lowest bit; None for an address that is no struct page's."""
    mask = info & ~1
    below = ~mask & _U64
    address = (vmemmap + STRUCT_PAGE * pfn) & mask if below & below + 1 == 0 else mask
    offset = address - vmemmap
    return offset // STRUCT_PAGE if 0 <= offset < _VMEMMAP_SIZE and offset % STRUCT_PAGE == 0 else None


def _type(layout: PageLayout, word: int, flags: int) -> str | None:
    """Name of a page type. page-flags.h:page_has_type(); 6.1: PageType(), where slab is a flag."""
    if layout.types_cleared:
        slab = layout.bits("slab")
        if slab is not None and flags & slab.mask:
            return "slab"
        based = word & 0xF000_0000 == 0xF000_0000
        return next((name for bit, name in layout.types_cleared.items() if based and not word & bit), None)
    if not 0x8000_0000 <= word < 0xFF00_0000:
        return None
    return layout.types.get(word >> 24, f"{word >> 24:#x}")


def _second_order(layout: PageLayout, words: tuple[int, ...]) -> int:
    field = layout.field("_folio_order")
    return words[0] & 0xFF if field is None else field.value(words, STRUCT_PAGE)


def _flags(layout: PageLayout, word: int, second: bool) -> tuple[tuple[str, ...], int, int]:
    """Names of the flags set, set bits without a name, set bits whose name is inference."""
    flags: list[Bits] = [*layout.flags]
    names, known, unconfirmed = [], 0, 0
    if second:
        if layout.order_in_flags:
            known = 0xFF
        flags = [*layout.second_flags, *(bits for bits in flags if not bits.mask & known)]
    for bits in flags:
        if not word & bits.mask & ~known:
            continue
        if bits.high == bits.low:
            names.append(bits.name)
        if not bits.confirmed:
            unconfirmed |= word & bits.mask
        known |= bits.mask
    return tuple(names), word & ~known & _U64, unconfirmed


def _numbers(layout: PageLayout, word: int) -> dict[str, int]:
    """Values of the fields of page->flags that are wider than a bit."""
    found = {bits.name: bits.value(word) for bits in layout.flags if bits.high != bits.low or bits.name == "node"}
    if (cpupid := layout.bits("last_cpupid")) and found["last_cpupid"] == cpupid.mask >> cpupid.low:
        found["last_cpupid"] = -1
    if "lru_gen" in found:
        found["lru_gen"] -= 1  # mmzone.h: 0 is "on no list of a generation"
    return found


def _mapping(word: int) -> Mapping | None:
    if word == 0:
        return None
    if word == TAIL_MAPPING:
        return Mapping("tail", word)
    low = word & MAPPING_KSM
    kind = "ksm" if low == MAPPING_KSM else "anon_vma" if low == MAPPING_ANON else "address_space"
    return Mapping(kind, word & ~MAPPING_KSM)


# --------------------------------------------------------------------------- fields and their meanings


def _fields(
    layout: PageLayout, tail: bool, position: int, type_: str | None, folio_type: str | None
) -> tuple[Field, ...]:
    """The fields that the words of a struct page hold, from its own start on."""
    if not tail:
        return _over(layout.page, layout.typed.get(type_ or "", ()))
    start = position * STRUCT_PAGE
    hugetlb = folio_type == "hugetlb"
    theirs = [
        field._replace(offset=field.offset - start)
        for field in layout.folio
        if field.offset // STRUCT_PAGE == position and (hugetlb or not field.name.startswith("_hugetlb"))
    ]
    if hugetlb and any(field.name == "_hugetlb_subpool" and field.offset == 16 for field in theirs):
        theirs = [field for field in theirs if not field.name.startswith("_deferred")]
    return _over(layout.tail, tuple(theirs))


def _over(fields: tuple[Field, ...], others: tuple[Field, ...]) -> tuple[Field, ...]:
    """`others`, and those of `fields` that they leave room for, by offset."""
    taken = {byte for field in others for byte in range(field.offset, field.offset + field.size)}
    rest = [field for field in fields if not taken & set(range(field.offset, field.offset + field.size))]
    return tuple(sorted((*rest, *others), key=lambda field: field.offset))


def _values(
    words: tuple[int, ...], layout: PageLayout, fields: tuple[Field, ...], pfn: int, vmemmap: int, type_: str | None
) -> tuple[Value, ...]:
    found = []
    for field in fields:
        value = field.value(words)
        name = "page_type" if field.kind is FieldKind.PAGE_TYPE and type_ and type_ != "slab" else field.name
        meaning = _meaning(field, value, words, layout, pfn, vmemmap, type_)
        found.append(Value(name, field.offset, field.size, value, meaning))
    return tuple(found)


def _meaning(
    field: Field, value: int, words: tuple[int, ...], layout: PageLayout, pfn: int, vmemmap: int, type_: str | None
) -> str:
    """What a field's value means, "" where the number says it all."""
    match field.kind:
        case FieldKind.FLAGS:
            return flag_text(layout, value, False)
        case FieldKind.SECOND_FLAGS:
            order = f"order {value & 0xFF}, " if layout.order_in_flags else ""
            return order + flag_text(layout, value, True)
        case FieldKind.COMPOUND:
            head = _head_of(value, pfn, vmemmap)
            return "" if not value & 1 else "no struct page" if head is None else f"tail of PFN {head:#x}"
        case FieldKind.COUNT:
            return str(_signed(value))
        case FieldKind.COUNT_LESS_ONE:
            return str(_signed(value) + 1)
        case FieldKind.PAGE_TYPE:
            return type_ or str(_signed(value) + 1)
        case FieldKind.PRIVATE if _is_hugetlb(layout, words):
            return "|".join(_hugetlb_flags(layout, value))
        case FieldKind.MAPPING:
            mapping = _mapping(value)
            kind = f"{mapping.kind}, " if mapping and mapping.kind != "tail" else ""
            return kind + pointer_name(value & ~MAPPING_KSM if kind else value, vmemmap)
        case FieldKind.MEMCG:
            kinds = [name for bit, name in MEMCG_FLAGS.items() if value & bit]
            return " ".join([*kinds, pointer_name(value & ~sum(MEMCG_FLAGS), vmemmap)]).strip()
        case FieldKind.POINTER:
            return pointer_name(value, vmemmap)
    return ""


def _is_hugetlb(layout: PageLayout, words: tuple[int, ...]) -> bool:
    """Whether a head's own words say that it is a HugeTLB folio (6.1's do not: its second struct page does)."""
    return words[1] & 1 == 0 and _type(layout, words[6] & 0xFFFF_FFFF, words[0]) == "hugetlb"


def _hugetlb_flags(layout: PageLayout, private: int) -> tuple[str, ...]:
    return tuple(
        layout.hugetlb_flags[bit] if bit < len(layout.hugetlb_flags) else f"bit {bit}"
        for bit in range(64)
        if private >> bit & 1
    )


def flag_text(layout: PageLayout, word: int, second: bool = False) -> str:
    """Flags as text: "uptodate|head, zone 2 (Normal)"; names that are inference end in "?"."""
    names, unknown, unconfirmed = _flags(layout, word, second)
    certain = {bits.name: not bits.mask & unconfirmed for bits in layout.flags}
    parts = ["|".join(name if certain.get(name, True) else f"{name}?" for name in names)] if names else []
    for name, value in _numbers(layout, word).items():
        if name == "zone":
            zone = f" ({layout.zones[value]})" if value < len(layout.zones) else ""
            parts.append(f"zone {value}{zone}")
        elif name == "node" or (name == "lru_refs" and value) or (name != "lru_refs" and value > 0):
            parts.append(f"{name} {value}" + ("" if certain[name] else "?"))
    if unknown:
        parts.append(f"unknown {unknown:#x}")
    return ", ".join(parts)


def pointer_name(value: int, vmemmap: int = VMEMMAP) -> str:
    """What a kernel pointer is by its address, "" for 0 and for what is none."""
    if value in _POISON:
        return _POISON[value]
    offset = value - vmemmap
    if 0 <= offset < _VMEMMAP_SIZE:
        rest = f" + {offset % STRUCT_PAGE:#x}" if offset % STRUCT_PAGE else ""
        return f"struct page of PFN {offset // STRUCT_PAGE:#x}{rest}"
    if 0 <= value - _DIRECT_MAP < _REGIONS[0][1] - _DIRECT_MAP:
        return f"direct map, physical {value - _DIRECT_MAP:#x}"
    return next((name for start, end, name in _REGIONS if start <= value < end), "")


# --------------------------------------------------------------------------- a folio


class VmemmapPage(NamedTuple):
    """What maps one 4K page of a folio's struct pages.

    address: virtual. level, entry_address, entry: the last entry of the walk; level 2 or 3: part of a large leaf.
    frame: PFN, or None where nothing is mapped. shared: another page of the folio's vmemmap shows the same frame.
    """

    address: int
    level: int
    entry_address: int
    entry: int
    frame: int | None
    writable: bool
    shared: bool


class Hugetlb(NamedTuple):
    """What a HugeTLB folio has of its own: names of its flags, and pointers (0: none).

    hwpoison: the first raw_hwp_page, see Folio.poisoned_pages.
    """

    flags: tuple[str, ...]
    subpool: int
    cgroup: int
    cgroup_rsvd: int
    hwpoison: int


class MmIds(NamedTuple):
    """MM owner tracking of a large folio, 6.15 and later: mm_types.h. An ID of 0 is none; mapcounts as counts."""

    ids: tuple[int, int]
    mapcounts: tuple[int, int]
    locked: bool
    shared: bool


class Folio:
    """The folio that holds a PFN, read through the kernel's page table. Made by Machine.folio(), or directly.

    memory: an Image, a Machine, or anything with their words(), load() and holds(). layout: page_layout(). root:
    physical address of the kernel's top table, fmt: its format. vmemmap: address of the struct page of PFN 0.

    pfn: PFN of the head. given: the PFN asked for. fake: its struct page shows a head that is another one's: what
    page_fixed_fake_head() sees through before 7.1. Other attributes are read when asked for, so they follow what
    happens to the machine; `pfn` stays. ValueError, now or then, where a struct page is not mapped or not in memory.
    """

    def __init__(
        self, memory: Memory, pfn: int, layout: PageLayout, root: int, *, fmt: PageFormat | None = None,
        vmemmap: int = VMEMMAP, machine: Machine | None = None,
    ) -> None:  # fmt: skip
        self.memory = memory
        self.layout = layout
        self.root = root
        self.format = x86_64() if fmt is None else fmt
        self.vmemmap_base = vmemmap
        self.machine = machine
        self.given = pfn
        self.pfn, self.fake = self._find_head(pfn)
        self._order = self.order

    def __repr__(self) -> str:
        return f"Folio(pfn={self.pfn:#x}, order={self.order}, refcount={self.refcount}, type={self.type!r})"

    @classmethod
    def of_machine(cls, machine: Machine, pfn: int) -> Folio:
        """See Machine.folio."""
        from pgemu_kernels import layout as L

        # Where the zone lies in page->flags tells: bit 52 is part of Debian's ZONE_NORMAL, 2, and not of the small one's.
        small = machine.register(L.R_PAGE_FLAGS) >> 52 & 1 == 0
        layout = page_layout(machine.config.kernel, "small" if small else "debian")
        root, vmemmap = machine.register(L.R_KERNEL_ROOT), machine.register(L.R_VMEMMAP)
        return cls(machine, pfn, layout, root, fmt=machine.host_format, vmemmap=vmemmap, machine=machine)

    # ------------------------------------------------------------------ words

    def _walk(self, address: int) -> list[Step]:
        return walk(self.memory, self.format, self.root, address)

    def physical(self, index: int = 0) -> int:
        """Physical address of the folio's struct page `index`. ValueError where it is not mapped."""
        return self._physical(self.pfn + index)

    def _physical(self, pfn: int) -> int:
        address = self.vmemmap_base + STRUCT_PAGE * pfn
        steps = self._walk(address) if 0 <= pfn < _VMEMMAP_SIZE // STRUCT_PAGE else []
        if not steps or steps[-1].kind is not Kind.LEAF:
            why = "not in memory" if steps and steps[-1].kind is Kind.UNREADABLE else "not mapped"
            raise ValueError(f"PFN {pfn:#x}: its struct page at {address:#x} is {why}")
        return leaf_address(self.format, steps[-1].level, steps[-1].entry, address)

    def words(self, index: int = 0) -> tuple[int, ...]:
        """The eight words that the folio's struct page `index` shows."""
        return self._words(self.pfn + index)

    def _words(self, pfn: int) -> tuple[int, ...]:
        physical = self._physical(pfn)
        try:
            return tuple(self.memory.words(physical, 8).tolist())
        except ValueError:
            raise ValueError(f"PFN {pfn:#x}: its struct page at physical {physical:#x} is not in memory") from None

    def page(self, index: int = 0) -> Page:
        """Struct page `index` of the folio, decoded."""
        return decode_page(
            self.words(index), self.pfn + index, self.layout, vmemmap=self.vmemmap_base, folio_type=self.type
        )

    def _find_head(self, pfn: int) -> tuple[int, bool]:
        """PFN of the head, and whether the page shows a head that is not its own: page-flags.h:_compound_head()."""
        words = self._words(pfn)
        if words[1] & 1:
            head = _head_of(words[1], pfn, self.vmemmap_base)
            if head is None:
                raise ValueError(f"PFN {pfn:#x}: a tail whose word {words[1]:#x} leads to no struct page")
            return head, False
        # Only the first struct page of a vmemmap page can be another's head; the one after it tells.
        if words[0] & self.layout.head and (self.vmemmap_base + STRUCT_PAGE * pfn) % PAGE_4K == 0:
            info = self._words(pfn + 1)[1]
            head = _head_of(info, pfn + 1, self.vmemmap_base) if info & 1 else None
            if head is not None and head != pfn:
                return head, True
        return pfn, False

    def _field(self, name: str) -> int | None:
        """A field of a large folio by name, as it is stored; None for a small one, or where there is no such field."""
        field = self.layout.field(name)
        if field is None or not self.large:
            return None
        index = field.offset // STRUCT_PAGE
        return field.value(self.words(index), index * STRUCT_PAGE)

    def _count(self, name: str, less_one: bool = False) -> int | None:
        value = self._field(name)
        return None if value is None else _signed(value) + less_one

    # ------------------------------------------------------------------ what every folio has

    @property
    def large(self) -> bool:
        """Whether it has more than one page."""
        return self.words()[0] & self.layout.head != 0

    @property
    def order(self) -> int:
        """0 for a page of 4K, 9 for 2M, 18 for 1G."""
        return _second_order(self.layout, self.words(1)) if self.large else 0

    @property
    def nr_pages(self) -> int:
        """Pages, as the folio's own field says."""
        pages = self._field("_nr_pages")
        pages = self._field("_folio_nr_pages") if pages is None else pages
        return 1 if pages is None else pages

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the head's flags and of those that the second struct page keeps for the folio."""
        word, second = self.words()[0], self.words(1)[0] if self.large else 0
        kept = tuple(bits.name for bits in self.layout.second_flags if second & bits.mask)
        return _flags(self.layout, word, False)[0] + kept

    @property
    def type(self) -> str | None:
        """Page type: "hugetlb", "slab", ...; None for what processes map and the page cache holds."""
        words = self.words()
        if self.layout.order_in_flags or not words[0] & self.layout.head:
            return _type(self.layout, words[6] & 0xFFFF_FFFF, words[0])
        destructor = self._field("_folio_dtor")
        return "hugetlb" if destructor == _HUGETLB_DTOR else _type(self.layout, words[6] & 0xFFFF_FFFF, words[0])

    @property
    def refcount(self) -> int:
        """References, signed as the kernel's."""
        return _signed(self.words()[6] >> 32)

    @property
    def mapcount(self) -> int:
        """Page-table entries that map any part of it: mm.h:folio_mapcount(). 0 for a type that is never mapped.

        6.1: its entire mappings; those of single pages of a transparent huge page are not added up.
        """
        for name in ("_large_mapcount", "_total_mapcount"):
            count = self._count(name, less_one=True)
            if count is not None:
                return count
        return self.page().mapcount or 0

    @property
    def large_mapcount(self) -> int | None:
        """Mappings of any part; None of a small folio, and on 6.1."""
        return self._count("_large_mapcount", less_one=True)

    @property
    def entire_mapcount(self) -> int | None:
        """Mappings of the whole by one entry; None of a small folio."""
        count = self._count("_entire_mapcount", less_one=True)
        return self._count("_total_mapcount", less_one=True) if count is None else count

    @property
    def pincount(self) -> int | None:
        """Pins; None of a small folio, whose pins are in its references."""
        return self._count("_pincount")

    @property
    def mm_ids(self) -> MmIds | None:
        """MM owner tracking; None of a small folio and before 6.15."""
        ids = [self._field(f"_mm_id[{i}]") for i in (0, 1)]
        counts = [self._count(f"_mm_id_mapcount[{i}]", less_one=True) for i in (0, 1)]
        if ids[0] is None or ids[1] is None or counts[0] is None or counts[1] is None:
            return None
        mask = (1 << _MM_ID_BITS) - 1
        return MmIds(
            (ids[0] & mask, ids[1] & mask), (counts[0], counts[1]), ids[0] > mask, ids[1] > mask
        )  # fmt: skip

    @property
    def mapping(self) -> Mapping | None:
        """What owns it: an address_space, an anon_vma, nothing."""
        return self.page().mapping

    @property
    def inode(self) -> int | None:
        """Of a machine: number of the inode whose page cache holds it."""
        from pgemu_kernels.hugetlb import MAPPING_ADDRESS
        from pgemu_kernels.layout import INODES

        mapping = self.mapping if self.machine is not None else None
        if mapping is None or mapping.kind != "address_space":
            return None
        inode = mapping.address - int(MAPPING_ADDRESS) >> 12
        return inode if 0 <= inode < INODES else None

    @property
    def index(self) -> int:
        """Offset in its mapping: in pages, of HugeTLB's private mappings in huge pages."""
        return self.words()[4]

    # ------------------------------------------------------------------ references

    @property
    def expected_references(self) -> int:
        """References that the page cache, the swap cache, private data and mappings hold: folio_expected_ref_count().

        Every other one is a pin, a fault under way, or somebody's transient reference. 0 for a type other than
        "hugetlb". 6.1 has no such function: its page cache holds one reference of a HugeTLB folio.
        """
        if self.type not in (None, "hugetlb"):
            return 0
        words, layout = self.words(), self.layout
        flags = set(_flags(layout, words[0], False)[0])
        pages = 1 << self.order
        expected = self.mapcount
        if {"swapbacked", "owner_priv_1"} <= flags:  # PG_swapcache
            expected += pages
        if not words[3] & MAPPING_ANON:
            cached = pages if layout.cached_per_page or self.type is None else 1
            expected += (cached if words[3] else 0) + ("private" in flags)
        return expected

    @property
    def maybe_dma_pinned(self) -> bool:
        """mm.h:folio_maybe_dma_pinned(). Of a small folio 1024 ordinary references look like a pin."""
        pins = self.pincount
        return pins > 0 if pins is not None else self.refcount & 0xFFFF_FFFF >= GUP_PIN_COUNTING_BIAS

    # ------------------------------------------------------------------ HugeTLB

    @property
    def hugetlb(self) -> Hugetlb | None:
        """None unless it is a HugeTLB folio."""
        if self.type != "hugetlb":
            return None
        pointers = (self._field(f"_hugetlb_{name}") or 0 for name in ("subpool", "cgroup", "cgroup_rsvd", "hwpoison"))
        return Hugetlb(_hugetlb_flags(self.layout, self.words()[5]), *pointers)

    @property
    def optimized(self) -> bool:
        """Whether HugeTLB vmemmap optimisation took its tails' pages: the flag of the folio."""
        hugetlb = self.hugetlb
        return hugetlb is not None and "vmemmap_optimized" in hugetlb.flags

    @property
    def poisoned_pages(self) -> list[int] | None:
        """PFNs on its list of poisoned pages (mm/memory-failure.c: raw_hwp_page), None where that cannot be read."""
        hugetlb = self.hugetlb
        node = hugetlb.hwpoison if hugetlb is not None else 0
        found: list[int] = []
        while node and len(found) < _LONGEST_LIST:
            steps = self._walk(node)
            if not steps or steps[-1].kind is not Kind.LEAF:
                return None
            try:
                where = leaf_address(self.format, steps[-1].level, steps[-1].entry, node)
                node, page = self.memory.words(where, 2).tolist()
            except ValueError:
                return None
            found.append((page - self.vmemmap_base) // STRUCT_PAGE)
        return found

    @property
    def vmemmap(self) -> list[VmemmapPage]:
        """What maps its struct pages, one VmemmapPage for each 4K of them: 8 for 2M, 4096 for 1G, 1 up to 256K."""
        address = self.vmemmap_base + STRUCT_PAGE * self.pfn
        end = address + (STRUCT_PAGE << self.order)
        address &= -PAGE_4K
        found: list[VmemmapPage] = []
        while address < end:
            stop = min(end, (address >> 21) + 1 << 21)
            found += self._vmemmap_of_table(address, stop)
            address = stop
        times = Counter(page.frame for page in found)
        return [page._replace(shared=page.frame is not None and times[page.frame] > 1) for page in found]

    def _vmemmap_of_table(self, address: int, end: int) -> list[VmemmapPage]:
        """Vmemmap pages of addresses that share a last-level table, or the entry that stands in its place."""
        steps = self._walk(address)
        if not steps:
            raise ValueError(f"{address:#x}: not an address of the vmemmap")
        last, pages = steps[-1], range(address, end, PAGE_4K)
        if last.level > 1 or last.kind is Kind.UNREADABLE:
            leaf = last.kind is Kind.LEAF
            return [self._vmemmap_page(page, last.level, last.address, last.entry, leaf) for page in pages]
        entries = self.memory.words(last.address, len(pages)).tolist()
        return [
            self._vmemmap_page(page, 1, last.address + 8 * i, entry, entry & self.format.present != 0)
            for i, (page, entry) in enumerate(zip(pages, entries, strict=True))
        ]

    def _vmemmap_page(self, address: int, level: int, where: int, entry: int, leaf: bool) -> VmemmapPage:
        frame = leaf_address(self.format, level, entry, address) >> 12 if leaf else None
        return VmemmapPage(address, level, where, entry, frame, leaf and entry & self.format.write != 0, False)

    # ------------------------------------------------------------------ operations of a machine's folio

    def _operate(self, op: Operation, length: int, flags: int = 0) -> Result:
        if self.machine is None:
            raise ValueError("a folio of an image: expected one of a machine")
        return self.machine.operate(op, address=self.pfn << 12, length=length, flags=flags)

    def get(self, n: int = 1) -> Result:
        """Take `n` references, as FOLL_GET does: refused (-ENOMEM) while the refcount is zero or negative."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.SHARED)

    def put(self, n: int = 1) -> Result:
        """Drop `n` references; the last one frees the folio."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.READ)

    def pin(self, n: int = 1) -> Result:
        """Pin `n` times, as FOLL_PIN does: each is 1024 references of a small folio, a reference and a pin of a large."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.SHARED)

    def unpin(self, n: int = 1) -> Result:
        """Undo `n` pins."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.READ)

    def freeze(self, expected: int) -> bool:
        """Set the refcount to 0 if it is `expected`: folio_ref_freeze()."""
        return self._operate(Operation.FOLIO_FREEZE, expected).status == 1

    def unfreeze(self, n: int) -> bool:
        """Set the refcount of a frozen folio to `n`: folio_ref_unfreeze(). False if it was not frozen."""
        return self._operate(Operation.FOLIO_FREEZE, n, Flag.READ).status == 1

    def split(self) -> Result:
        """Split it into 4K folios, in the way of the machine's `series`; its vmemmap is restored first."""
        return self._operate(Operation.FOLIO_SPLIT, PAGE_4K << self.order)

    def merge(self, order: int | None = None) -> Result:
        """Make one folio of `order` again of the 4K folios from this one on.

        order: if None, the order that it had when this Folio was made, or that of the machine's pool.
        """
        return self._operate(Operation.FOLIO_MERGE, PAGE_4K << self._order_to_merge(order))

    def _order_to_merge(self, order: int | None) -> int:
        if order is not None:
            return order
        return self._order or (self.machine.config.order if self.machine is not None else 0)

    def optimize(self) -> Result:
        """hugetlb_vmemmap_optimize_folio()."""
        return self._operate(Operation.VMEMMAP_OPTIMIZE, PAGE_4K << self.order)

    def restore(self) -> Result:
        """hugetlb_vmemmap_restore_folio()."""
        return self._operate(Operation.VMEMMAP_RESTORE, PAGE_4K << self.order)
