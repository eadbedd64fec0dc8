"""One struct page: what its eight words say, in a machine's memory or a real kernel's. No compiler involved.

>>> from pgemu_kernels.formats.struct_page import page_layout
>>> words = [0x17FFFFC0000058, 0xFFFFEA0004001008, 0, 0xFFFF888180C51C40, 0x200, 0x12, 0x201F4000000, 0]
>>> page = decode_page(words, 0x100000, page_layout("6.18"))
>>> page.kind, page.flags, page.type, page.refcount, page.zone_name
('head', ('uptodate', 'dirty', 'head'), 'hugetlb', 513, 'Normal')
>>> page.mapping.kind, hugetlb_flags(page_layout("6.18"), page.private)
('address_space', ('migratable', 'vmemmap_optimized'))

Layouts are data: pgemu_kernels.formats.struct_page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from pgemu.machine.short import html_table
from pgemu_kernels.formats.struct_page import (
    FLAG_FIELDS,
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
)

__all__ = (
    "VMEMMAP_SIZE",
    "Mapping",
    "Page",
    "Value",
    "decode_page",
    "flag_text",
    "flags_of",
    "head_of",
    "hugetlb_flags",
    "is_mask",
    "pointer_name",
    "second_order",
    "signed",
    "type_of",
)

_U64 = (1 << 64) - 1
_POISON = {
    0xDEAD_0000_0000_0100: "LIST_POISON1",
    0xDEAD_0000_0000_0122: "LIST_POISON2",
    TAIL_MAPPING: "TAIL_MAPPING",
}
# Documentation/arch/x86/x86_64/mm.rst, four levels: the first two where KASLR has not moved them; the image has 512 MiB
# or, with CONFIG_RANDOMIZE_BASE, 1 GiB before the modules.
_DIRECT_MAP = (0xFFFF_8880_0000_0000, 0xFFFF_C880_0000_0000)
_VMALLOC = (0xFFFF_C900_0000_0000, 0xFFFF_E900_0000_0000)
_REGIONS = (
    (0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_A000_0000, "kernel image"),
    (0xFFFF_FFFF_A000_0000, 0xFFFF_FFFF_C000_0000, "kernel image or module"),
    (0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_FF00_0000, "module"),
    (0xFFFF_8000_0000_0000, 0xFFFF_FFFF_8000_0000, "kernel address"),
)
VMEMMAP_SIZE = 1 << 40


class Value(NamedTuple):
    """A field of a struct page: its name, bytes from the page's own start, bytes long, value, what that means."""

    name: str
    offset: int
    size: int
    value: int
    meaning: str


class Mapping(NamedTuple):
    """folio->mapping. kind: "address_space", "anon_vma", "ksm" or "tail" (TAIL_MAPPING); address: without low bits.

    The address is the kernel's, or in a machine a model address (pgemu_kernels.folios.hugetlb.MAPPING_ADDRESS).
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

    def __repr__(self) -> str:
        order = "" if self.order is None else f", order={self.order}"
        return f"Page(pfn={self.pfn:#x}, {self.kind!r}{order}, refcount={self.refcount}, type={self.type!r})"

    def _repr_html_(self) -> str:
        names = [one.name for one in fields(self) if one.name not in ("values", "words")]
        rows = [(name, getattr(self, name)) for name in names]
        return html_table(("field", "value"), rows, len(rows))


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def decode_page(
    words: Iterable[int], pfn: int, layout: PageLayout, *, vmemmap: int = VMEMMAP, folio_type: str | None = "hugetlb",
    index: int | None = None,
) -> Page:  # fmt: skip
    """Decode the eight words of the struct page of a PFN.

    vmemmap: address of the struct page of PFN 0. folio_type: type of the folio that a tail belongs to, which says
    whether its words are HugeTLB's. index: which struct page of its folio a tail shows, if not that of its own PFN:
    before 7.1 an optimised folio shows its first 64 again and again. What looks like a head there is decoded as that
    head: its words are all that is known here; see Folio.
    ValueError unless there are eight words.
    """
    words = tuple(int(word) for word in words)
    if len(words) != 8:
        raise ValueError(f"{len(words)} words: expected the 8 of a struct page")
    tail = words[1] & 1 == 1
    head = head_of(words[1], pfn, vmemmap) if tail else pfn
    is_head = not tail and words[0] & layout.head != 0
    position = index if index is not None else pfn - head if head is not None else layout.folio_pages
    second = tail and position == 1
    type_ = None if tail else type_of(layout, words[6] & 0xFFFF_FFFF, words[0])
    values = _values(words, layout, _fields(layout, tail, position, type_, folio_type), pfn, vmemmap, type_)
    names, unknown, unconfirmed = flags_of(layout, words[0], second)
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
        order=second_order(layout, words) if second else None,
        refcount=signed(words[6] >> 32),
        mapcount=signed(size) + 1 if type_ is None else None,
        mapping=_mapping(words[3]) if own else None,
        index=words[4] if own else None,
        private=words[5] if own else None,
        values=values,
    )


def head_of(info: int, pfn: int, vmemmap: int) -> int | None:
    """PFN of a tail's head: page-flags.h:_compound_head(). Both forms are told by their value, masks being all ones
    above their lowest bit; None for an address that is no struct page's."""
    mask = info & ~1
    address = (vmemmap + STRUCT_PAGE * pfn) & mask if is_mask(info) else mask
    offset = address - vmemmap
    return offset // STRUCT_PAGE if 0 <= offset < VMEMMAP_SIZE and offset % STRUCT_PAGE == 0 else None


def is_mask(info: int) -> bool:
    """Whether a tail's word is the mask form of 7.1 and later, which leads to the head from the tail's own address."""
    below = ~(info & ~1) & _U64
    return below & below + 1 == 0


def type_of(layout: PageLayout, word: int, flags: int) -> str | None:
    """Name of a page type. page-flags.h:page_has_type(); up to 6.11 PageType(), and up to 6.8 slab is a flag."""
    if layout.types_cleared:
        slab = layout.bits("slab")
        if slab is not None and flags & slab.mask:
            return "slab"
        for bit, name in layout.types_cleared.items():
            base = 0x8000_0000 if bit > 0xFFFF else 0xF000_0000  # PAGE_TYPE_BASE, 6.11's and the earlier one
            if word & (base | bit) == base:
                return name
        return None
    if not 0x8000_0000 <= word < 0xFF00_0000:
        return None
    return layout.types.get(word >> 24, f"{word >> 24:#x}")


def second_order(layout: PageLayout, words: tuple[int, ...]) -> int:
    field = layout.field("_folio_order")
    return words[0] & 0xFF if field is None else field.value(words, STRUCT_PAGE)


def flags_of(layout: PageLayout, word: int, second: bool) -> tuple[tuple[str, ...], int, int]:
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
        if bits.name not in FLAG_FIELDS:
            names.append(bits.name)
        if not bits.confirmed:
            unconfirmed |= word & bits.mask
        known |= bits.mask
    return tuple(names), word & ~known & _U64, unconfirmed


def _numbers(layout: PageLayout, word: int) -> dict[str, int]:
    """Values of the fields of page->flags."""
    found = {bits.name: bits.value(word) for bits in layout.flags if bits.name in FLAG_FIELDS}
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
    """`others`, those of `fields` that they leave room for, and the bytes between them, by offset."""
    taken = {byte for field in others for byte in range(field.offset, field.offset + field.size)}
    rest = [field for field in fields if not taken & set(range(field.offset, field.offset + field.size))]
    found: list[Field] = []
    end = 0
    for field in sorted((*rest, *others), key=lambda field: field.offset):
        if field.offset > end:
            found.append(Field("(unused)", end, field.offset - end, FieldKind.NUMBER))
        found.append(field)
        end = field.offset + field.size
    if end < STRUCT_PAGE:
        found.append(Field("(unused)", end, STRUCT_PAGE - end, FieldKind.NUMBER))
    return tuple(found)


def _values(
    words: tuple[int, ...], layout: PageLayout, fields: tuple[Field, ...], pfn: int, vmemmap: int, type_: str | None
) -> tuple[Value, ...]:
    found = []
    for field in fields:
        value = field.value(words)
        typed = type_ is not None and not (type_ == "slab" and layout.bits("slab"))
        name = "page_type" if field.kind is FieldKind.PAGE_TYPE and typed else field.name
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
            head = head_of(value, pfn, vmemmap)
            return "" if not value & 1 else "no struct page" if head is None else f"tail of PFN {head:#x}"
        case FieldKind.COUNT:
            return str(signed(value))
        case FieldKind.COUNT_LESS_ONE:
            return str(signed(value) + 1)
        case FieldKind.PAGE_TYPE:
            return type_ or str(signed(value) + 1)
        case FieldKind.PRIVATE if _is_hugetlb(layout, words):
            return "|".join(hugetlb_flags(layout, value))
        case FieldKind.MAPPING:
            mapping = _mapping(value)
            kind = f"{mapping.kind}, " if mapping and mapping.kind != "tail" else ""
            return (kind + pointer_name(value & ~MAPPING_KSM if kind else value, vmemmap)).removesuffix(", ")
        case FieldKind.MEMCG:
            kinds = [name for bit, name in MEMCG_FLAGS.items() if value & bit]
            return " ".join([*kinds, pointer_name(value & ~sum(MEMCG_FLAGS), vmemmap)]).strip()
        case FieldKind.POINTER:
            return pointer_name(value, vmemmap)
    return ""


def _is_hugetlb(layout: PageLayout, words: tuple[int, ...]) -> bool:
    """Whether a head's own words say that it is a HugeTLB folio (6.1's do not: its second struct page does)."""
    return words[1] & 1 == 0 and type_of(layout, words[6] & 0xFFFF_FFFF, words[0]) == "hugetlb"


def hugetlb_flags(layout: PageLayout, private: int) -> tuple[str, ...]:
    return tuple(
        layout.hugetlb_flags[bit] if bit < len(layout.hugetlb_flags) else f"bit {bit}"
        for bit in range(64)
        if private >> bit & 1
    )


def flag_text(layout: PageLayout, word: int, second: bool = False) -> str:
    """Flags as text: "uptodate|head, zone 2 (Normal)"; names that are inference end in "?", as do the numbers of fields
    that are, and of all fields where the zone is none of the configuration's: other widths."""
    names, unknown, unconfirmed = flags_of(layout, word, second)
    certain = {bits.name: not bits.mask & unconfirmed and bits.name not in layout.doubtful for bits in layout.flags}
    zone = layout.bits("zone")
    if zone and layout.zones and zone.value(word) >= len(layout.zones):
        certain |= dict.fromkeys(FLAG_FIELDS, False)
    parts = ["|".join(name if certain.get(name, True) else f"{name}?" for name in names)] if names else []
    for name, value in _numbers(layout, word).items():
        if name == "zone":
            named = f" ({layout.zones[value]})" if value < len(layout.zones) else ""
            parts.append(f"zone {value}{'' if certain[name] else '?'}{named}")
        elif name == "node" or (name == "lru_refs" and value) or (name != "lru_refs" and value > 0):
            parts.append(f"{name} {value}" + ("" if certain[name] else "?"))
    if unknown:
        parts.append(f"unknown {unknown:#x}")
    return ", ".join(parts)


def pointer_name(value: int, vmemmap: int = VMEMMAP) -> str:
    """What a kernel pointer is by its address, "" for 0 and for what is none.

    Where the vmemmap is not at its own place, KASLR has moved the direct map, too, and nothing says where to.
    """
    if value in _POISON:
        return _POISON[value]
    offset = value - vmemmap
    if 0 <= offset < VMEMMAP_SIZE:
        rest = f" + {offset % STRUCT_PAGE:#x}" if offset % STRUCT_PAGE else ""
        return f"struct page of PFN {offset // STRUCT_PAGE:#x}{rest}"
    if vmemmap == VMEMMAP and _DIRECT_MAP[0] <= value < _DIRECT_MAP[1]:
        return f"direct map, physical {value - _DIRECT_MAP[0]:#x}"
    if vmemmap == VMEMMAP and _VMALLOC[0] <= value < _VMALLOC[1]:
        return "vmalloc"
    return next((name for start, end, name in _REGIONS if start <= value < end), "")
