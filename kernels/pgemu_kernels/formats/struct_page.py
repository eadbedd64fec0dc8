"""Where every field of struct page and struct folio lies, and what every bit of page->flags is, per kernel.

Plain Python data, no numba. Offsets are in bytes from the head's struct page; a struct page has 64 bytes.

Sources. 6.1, 6.12 and 7.3 in Debian's configuration: include/linux/page-flags.h, page-flags-layout.h, mm_types.h,
hugetlb.h, generated/bounds.h and .config of the headers of 6.1.176, 6.12.107 and 7.3.4; a program compiled with them
gave the same offsets and shifts. 6.18: the words captured of 6.18.15; a bit that no captured word shows lies where 7.3
has it, and is not `confirmed`. "small" is the captured 7.3.4 without NUMA, memory cgroups and MEMORY_FAILURE (its
vmstat and meminfo say so); that it has neither PG_young and PG_idle nor multi-gen LRU is inference (both are off by
default). "small" of another release was never seen. 6.6, 6.8 and 6.10: the same headers of 6.6.63, 6.8.0 and 6.10.0,
no binary: which flags a configuration has, and how wide fields are, is Debian's of the releases beside, by inference.
HugeTLB's mark moved within 6.6 and 6.8, and page types after 6.10: their layouts know both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple

__all__ = (
    "CONFIGURATIONS",
    "FLAG_FIELDS",
    "GUP_PIN_COUNTING_BIAS",
    "STRUCT_PAGE",
    "TAIL_MAPPING",
    "VMEMMAP",
    "Bits",
    "Field",
    "FieldKind",
    "FieldWidths",
    "PageLayout",
    "field_widths",
    "page_layout",
)

STRUCT_PAGE = 64
VMEMMAP = 0xFFFF_EA00_0000_0000  # vmemmap_base with four levels and without KASLR
TAIL_MAPPING = 0xDEAD_0000_0000_0400  # include/linux/poison.h
GUP_PIN_COUNTING_BIAS = 1 << 10  # include/linux/mm.h
MAPPING_ANON = 1  # include/linux/page-flags.h: low bits of folio->mapping
MAPPING_KSM = 3
MEMCG_FLAGS = {1: "objexts", 2: "kmem"}  # include/linux/memcontrol.h: low bits of memcg_data
CONFIGURATIONS = ("debian", "small")


class Bits(NamedTuple):
    """Bits `high` to `low` of page->flags. confirmed: the kernel's own headers or a captured word say so."""

    name: str
    high: int
    low: int
    confirmed: bool = True

    @property
    def mask(self) -> int:
        return (1 << self.high + 1) - (1 << self.low)

    def value(self, flags: int) -> int:
        return (flags & self.mask) >> self.low


FLAG_FIELDS = ("node", "zone", "last_cpupid", "lru_gen", "lru_refs")
"""Fields of page->flags from bit 63 downwards; the others are single bits."""


class FieldWidths(NamedTuple):
    """Bits of the fields of page->flags that differ from one configuration to the next; 0: there is none.

    doubtful: names of those that could be otherwise.
    """

    node: int
    zone: int
    last_cpupid: int
    doubtful: frozenset[str] = frozenset()


class FieldKind(Enum):
    """What the value of a field is."""

    FLAGS = "flags"  # page->flags
    SECOND_FLAGS = "second flags"  # those of a folio's second struct page: the order, and flags of the folio
    COMPOUND = "compound"  # of a tail: the head's address or a mask, and bit 0
    POINTER = "pointer"
    NUMBER = "number"
    COUNT = "count"  # a signed number
    COUNT_LESS_ONE = "count less one"  # stored as the count less one
    PAGE_TYPE = "page type"  # of a typed page its type, else the count of its mappings less one
    PRIVATE = "private"  # of a HugeTLB folio its flags
    MAPPING = "mapping"
    MEMCG = "memcg"


class Field(NamedTuple):
    """A field: bytes from the head's struct page, bytes long."""

    name: str
    offset: int
    size: int
    kind: FieldKind

    def value(self, words: tuple[int, ...], first: int = 0) -> int:
        """The field's value in 64-bit words that begin `first` bytes after the head's struct page."""
        at = self.offset - first
        return words[at >> 3] >> (at & 7) * 8 & (1 << 8 * self.size) - 1


@dataclass(frozen=True)
class PageLayout:
    """Struct pages of one release and configuration.

    flags: single bits and fields of page->flags, lowest first. second_flags: flags of the folio in its second struct
    page's flags, beside those that every page has. zones: names by number. mask_tails: compound_info of a tail is a
    mask (7.1 and later), else the head's address. order_in_flags: the low byte of the second struct page's flags is
    the order (not in 6.1). page: fields of a struct page. tail: of one beyond those that hold fields of the folio.
    folio: fields of a large folio behind its head's struct page; those that begin with _hugetlb are a HugeTLB
    folio's, and in 6.12 they lie over _deferred_list. typed: names that a page of a type has for its words.
    types: page types by their top byte; types_cleared: by the bit that is clear (6.1 to 6.10, and 6.11).
    hugetlb_flags: names of the bits in a HugeTLB folio's private, from bit 0 on. cached_per_page: the page cache holds
    one reference per base page of a HugeTLB folio (6.1 and 6.6: one). doubtful: fields of page->flags whose given
    widths could be otherwise.
    """

    release: str
    configuration: str
    flags: tuple[Bits, ...]
    second_flags: tuple[Bits, ...]
    zones: tuple[str, ...]
    mask_tails: bool
    order_in_flags: bool
    page: tuple[Field, ...]
    tail: tuple[Field, ...]
    folio: tuple[Field, ...]
    typed: dict[str, tuple[Field, ...]]
    types: dict[int, str]
    types_cleared: dict[int, str]
    hugetlb_flags: tuple[str, ...]
    cached_per_page: bool
    doubtful: frozenset[str] = frozenset()

    def bits(self, name: str) -> Bits | None:
        """A flag or field of page->flags by name, None where this kernel has none."""
        return next((bits for bits in self.flags if bits.name == name), None)

    def field(self, name: str) -> Field | None:
        """A field of struct folio by name, None where this kernel has none."""
        return next((field for field in (*self.page, *self.folio) if field.name == name), None)

    @property
    def head(self) -> int:
        """PG_head, as a mask."""
        bits = self.bits("head")
        assert bits is not None
        return bits.mask

    @property
    def folio_pages(self) -> int:
        """How many struct pages hold fields of a large folio, the head's included."""
        return max(field.offset for field in self.folio) // STRUCT_PAGE + 1


# --------------------------------------------------------------------------- page->flags

_FLAGS_6_1 = (
    "locked", "referenced", "uptodate", "dirty", "lru", "active", "workingset", "waiters", "error", "slab",
    "owner_priv_1", "arch_1", "reserved", "private", "private_2", "writeback", "head", "mappedtodisk", "reclaim",
    "swapbacked", "unevictable", "mlocked", "uncached", "hwpoison", "arch_2",
)  # fmt: skip
_FLAGS = (
    "locked", "writeback", "referenced", "uptodate", "dirty", "lru", "head", "waiters", "active", "workingset",
    "owner_priv_1", "owner_2", "arch_1", "reserved", "private", "private_2", "reclaim", "swapbacked", "unevictable",
)  # fmt: skip
_FLAGS_6_10 = (
    "locked", "writeback", "referenced", "uptodate", "dirty", "lru", "head", "waiters", "active", "workingset", "error",
    "owner_priv_1", "arch_1", "reserved", "private", "private_2", "mappedtodisk", "reclaim", "swapbacked",
    "unevictable", "mlocked",
)  # fmt: skip
_FLAGS_6_6 = (*_FLAGS_6_10[:11], "slab", *_FLAGS_6_10[11:])
_UNCACHED = ("uncached",)
_DROPBEHIND = ("dropbehind",)
_DEBIAN = ("mlocked", "hwpoison", "young", "idle", "arch_2")
_SMALL = ("mlocked", "arch_2")  # neither MEMORY_FAILURE nor PAGE_IDLE_FLAG
_NAMES = {
    ("6.1", "debian"): _FLAGS_6_1,
    ("6.1", "small"): tuple(name for name in _FLAGS_6_1 if name != "hwpoison"),
    ("6.6", "debian"): _FLAGS_6_6 + _UNCACHED + _DEBIAN[1:4],
    ("6.6", "small"): _FLAGS_6_6 + _UNCACHED,
    ("6.8", "debian"): _FLAGS_6_6 + _UNCACHED + _DEBIAN[1:4],
    ("6.8", "small"): _FLAGS_6_6 + _UNCACHED,
    ("6.10", "debian"): _FLAGS_6_10 + _UNCACHED + _DEBIAN[1:4],
    ("6.10", "small"): _FLAGS_6_10 + _UNCACHED,
    ("6.12", "debian"): _FLAGS + _DEBIAN,
    ("6.12", "small"): _FLAGS + _SMALL,
    ("6.18", "debian"): _FLAGS + _DROPBEHIND + _DEBIAN,
    ("6.18", "small"): _FLAGS + _DROPBEHIND + _SMALL,
    ("7.3", "debian"): _FLAGS + _DROPBEHIND + _DEBIAN,
    ("7.3", "small"): _FLAGS + _DROPBEHIND + _SMALL,
}
RELEASES = tuple(dict.fromkeys(release for release, _ in _NAMES))

_ZONES = {
    "debian": ("DMA", "DMA32", "Normal", "Movable", "Device"),
    "small": ("DMA32", "Normal", "Movable", "Device"),
}

# include/linux/page-flags-layout.h, mmzone.h: fields from bit 63 downwards, with their widths. Debian: NODES_SHIFT 10,
# five zones, 8 bits of a PID and 13 of one of 8192 CPUs, order_base_2(MAX_NR_GENS + 1), MAX_NR_TIERS - 2.
_FIELDS = {
    "debian": (("node", 10), ("zone", 3), ("last_cpupid", 21), ("lru_gen", 3), ("lru_refs", 2)),
    "small": (("zone", 2),),
}

# What captured words of 6.18.15 and of the small 7.3.4 show, and what the headers of the others say of every
# configuration; the rest of these is inference.
_SEEN = {
    ("6.6", "debian"): {*_FLAGS_6_6},
    ("6.8", "debian"): {*_FLAGS_6_6},
    ("6.10", "debian"): {*_FLAGS_6_10},
    ("6.18", "debian"): {"referenced", "uptodate", "dirty", "head", "zone", "last_cpupid", "lru_refs"},
    ("7.3", "small"): {*_FLAGS, *_DROPBEHIND, "mlocked", "zone"},
}
_FROM_HEADERS = {("6.1", "debian"), ("6.12", "debian"), ("7.3", "debian")}

# Flags of a folio that its second struct page keeps: FOLIO_SECOND_PAGE in page-flags.h.
_SECOND = {
    "6.1": (("double_map", 6), ("has_hwpoisoned", 8)),
    "6.6": (("hugetlb", 8), ("large_rmappable", 9), ("has_hwpoisoned", 10)),
    "6.8": (("hugetlb", 8), ("large_rmappable", 9), ("has_hwpoisoned", 10)),
    "6.10": (("large_rmappable", 9), ("has_hwpoisoned", 10)),
    "6.12": (("has_hwpoisoned", 8), ("large_rmappable", 9), ("partially_mapped", 16)),
}


def field_widths(configuration: str) -> FieldWidths:
    """The widths that a configuration has."""
    widths = dict(_FIELDS[configuration])
    return FieldWidths(*(widths.get(name, 0) for name in FLAG_FIELDS[:3]))


def _flags(release: str, configuration: str, given: FieldWidths | None) -> tuple[Bits, ...]:
    """Flags from bit 0 upwards, then fields from bit 63 downwards, in ascending order.

    ValueError for given widths that leave the flags no room.
    """
    key = (release, configuration)
    widths = given or field_widths(configuration)

    def confirmed(name: str) -> bool:
        if given is not None and name in FLAG_FIELDS:  # that there is an LRU generation follows from no width
            return name in FLAG_FIELDS[:3] and name not in given.doubtful
        return key in _FROM_HEADERS or name in _SEEN.get(key, ())

    found = [Bits(name, bit, bit, confirmed(name)) for bit, name in enumerate(_NAMES[key])]
    fields, end = [], 64
    for name, wanted in (*zip(FLAG_FIELDS, widths[:3], strict=False), *_FIELDS[configuration][3:]):
        room = end - len(found)
        width = min(wanted, room) if name == "lru_refs" else wanted  # LRU_REFS_WIDTH
        if not 0 <= width <= room:
            raise ValueError(f"{name} of {width} bits: expected at most {room}")
        end -= width
        if width:
            fields.append(Bits(name, end + width - 1, end, confirmed(name)))
    return tuple(found + fields[::-1])


# --------------------------------------------------------------------------- struct page, struct folio

_F = FieldKind
_MEMCG = {"debian": "memcg_data", "small": "_unused_slab_obj_exts"}


def _page(configuration: str) -> tuple[Field, ...]:
    """struct page, or the head of a struct folio: the same in every release here."""
    return (
        Field("flags", 0, 8, _F.FLAGS),
        Field("lru.next", 8, 8, _F.POINTER),
        Field("lru.prev", 16, 8, _F.POINTER),
        Field("mapping", 24, 8, _F.MAPPING),
        Field("index", 32, 8, _F.NUMBER),
        Field("private", 40, 8, _F.PRIVATE),
        Field("_mapcount", 48, 4, _F.PAGE_TYPE),
        Field("_refcount", 52, 4, _F.COUNT),
        Field(_MEMCG[configuration], 56, 8, _F.MEMCG),
    )


def _tail(compound: str, configuration: str) -> tuple[Field, ...]:
    """struct page of a tail that holds no field of the folio."""
    page = _page(configuration)
    return (page[0], Field(compound, 8, 8, _F.COMPOUND), *page[2:])


def _start(number: int) -> tuple[Field, Field]:
    """The words that every struct page keeps for itself."""
    at = number * STRUCT_PAGE
    kind = _F.SECOND_FLAGS if number == 1 else _F.FLAGS
    return Field(f"_flags_{number}", at, 8, kind), Field(f"_head_{number}", at + 8, 8, _F.COMPOUND)


def _hugetlb(at: int) -> tuple[Field, ...]:
    names = ("_hugetlb_subpool", "_hugetlb_cgroup", "_hugetlb_cgroup_rsvd", "_hugetlb_hwpoison")
    return tuple(Field(name, at + 8 * i, 8, _F.POINTER) for i, name in enumerate(names))


_DEFERRED = (Field("_deferred_list.next", 144, 8, _F.POINTER), Field("_deferred_list.prev", 152, 8, _F.POINTER))

# 6.1 keeps the HugeTLB words in _private_1 and in `private` of pages 2 to 4 (hugetlb.h: SUBPAGE_INDEX_CGROUP and on).
_FOLIO_6_1 = (
    *_start(1),
    Field("_folio_dtor", 80, 1, _F.NUMBER),
    Field("_folio_order", 81, 1, _F.NUMBER),
    Field("_total_mapcount", 84, 4, _F.COUNT_LESS_ONE),
    Field("_pincount", 88, 4, _F.COUNT),
    Field("_folio_nr_pages", 92, 4, _F.NUMBER),
    Field("_hugetlb_subpool", 96, 8, _F.POINTER),
    *_start(2),
    *_DEFERRED,
    Field("_hugetlb_cgroup", 168, 8, _F.POINTER),
    *_start(3),
    Field("_hugetlb_cgroup_rsvd", 232, 8, _F.POINTER),
    *_start(4),
    Field("_hugetlb_hwpoison", 296, 8, _F.POINTER),
)
# Page 2 is a list for THP and four words for HugeTLB, here and up to 6.12.
_FOLIO_6_6 = (
    *_start(1),
    Field("_folio_avail", 80, 8, _F.NUMBER),
    Field("_entire_mapcount", 88, 4, _F.COUNT_LESS_ONE),
    Field("_nr_pages_mapped", 92, 4, _F.COUNT),
    Field("_pincount", 96, 4, _F.COUNT),
    Field("_folio_nr_pages", 100, 4, _F.NUMBER),
    *_start(2),
    *_DEFERRED,
    *_hugetlb(144),
)
_FOLIO_6_12 = (
    *_start(1),
    Field("_large_mapcount", 80, 4, _F.COUNT_LESS_ONE),
    Field("_entire_mapcount", 84, 4, _F.COUNT_LESS_ONE),
    Field("_nr_pages_mapped", 88, 4, _F.COUNT),
    Field("_pincount", 92, 4, _F.COUNT),
    Field("_folio_nr_pages", 96, 4, _F.NUMBER),
    *_start(2),
    *_DEFERRED,
    *_hugetlb(144),
)
_FOLIO_6_18 = (
    *_start(1),
    Field("_large_mapcount", 80, 4, _F.COUNT_LESS_ONE),
    Field("_nr_pages_mapped", 84, 4, _F.COUNT),
    Field("_entire_mapcount", 88, 4, _F.COUNT_LESS_ONE),
    Field("_pincount", 92, 4, _F.COUNT),
    Field("_mm_id_mapcount[0]", 96, 4, _F.COUNT_LESS_ONE),
    Field("_mm_id_mapcount[1]", 100, 4, _F.COUNT_LESS_ONE),
    Field("_mm_id[0]", 104, 4, _F.NUMBER),
    Field("_mm_id[1]", 108, 4, _F.NUMBER),
    Field("_mapcount_1", 112, 4, _F.COUNT_LESS_ONE),
    Field("_refcount_1", 116, 4, _F.COUNT),
    Field("_nr_pages", 120, 4, _F.NUMBER),
    *_start(2),
    *_DEFERRED,
    *_start(3),
    *_hugetlb(208),
)
_FOLIO = {
    "6.1": _FOLIO_6_1, "6.6": _FOLIO_6_6, "6.8": _FOLIO_6_6, "6.10": _FOLIO_6_12, "6.12": _FOLIO_6_12,
    "6.18": _FOLIO_6_18, "7.3": _FOLIO_6_18,
}  # fmt: skip

# struct ptdesc (mm_types.h) and struct slab (mm/slab.h of 6.12; of later ones inference). A free block's private is
# its order.
_TYPED = {
    "buddy": (
        Field("buddy_list.next", 8, 8, _F.POINTER),
        Field("buddy_list.prev", 16, 8, _F.POINTER),
        Field("private", 40, 8, _F.NUMBER),
    ),
    "table": (
        Field("pmd_huge_pte", 16, 8, _F.POINTER),
        Field("__page_mapping", 24, 8, _F.POINTER),
        Field("pt_index", 32, 8, _F.NUMBER),
        Field("ptl", 40, 8, _F.NUMBER),
    ),
    "slab": (
        Field("slab_cache", 8, 8, _F.POINTER),
        Field("slab_list.next", 16, 8, _F.POINTER),
        Field("slab_list.prev", 24, 8, _F.POINTER),
        Field("freelist", 32, 8, _F.POINTER),
        Field("counters", 40, 8, _F.NUMBER),
        Field("obj_exts", 56, 8, _F.POINTER),
    ),
}

_TYPES = {
    0xF0: "buddy", 0xF1: "offline", 0xF2: "table", 0xF3: "guard", 0xF4: "hugetlb", 0xF5: "slab", 0xF6: "zsmalloc",
    0xF7: "unaccepted",
}  # fmt: skip
_LARGE_KMALLOC = {0xF8: "large_kmalloc"}  # not in 6.12
_TYPES_6_1 = {0x80: "buddy", 0x100: "offline", 0x200: "table", 0x400: "guard"}
_HUGETLB_6_6 = {0x800: "hugetlb"}  # 6.6.63; before, and in 6.8.0, a flag of the second struct page
_SLAB_6_10 = {0x1000: "slab"}
_TYPES_6_11 = {
    1 << bit: name
    for bit, name in ((30, "buddy"), (29, "offline"), (28, "table"), (27, "guard"), (26, "hugetlb"), (25, "slab"),
                      (24, "zsmalloc"))
}  # fmt: skip
_TYPES_CLEARED = {
    "6.1": _TYPES_6_1,
    "6.6": _TYPES_6_1 | _HUGETLB_6_6,
    "6.8": _TYPES_6_1 | _HUGETLB_6_6,
    "6.10": _TYPES_6_1 | _HUGETLB_6_6 | _SLAB_6_10 | _TYPES_6_11,
}
_HUGETLB_FLAGS = ("restore_reserve", "migratable", "temporary", "freed", "vmemmap_optimized", "raw_hwp_unreliable")


def _typed(release: str) -> dict[str, tuple[Field, ...]]:
    """Names of the words of typed pages; 6.6 and 6.8 have two other ones."""
    if release not in ("6.6", "6.8"):
        return _TYPED
    names = {"pt_index": "pt_mm", "obj_exts": "memcg_data"}
    return {
        type_: tuple(field._replace(name=names.get(field.name, field.name)) for field in fields)
        for type_, fields in _TYPED.items()
    }


@cache
def page_layout(release: str, configuration: str = "debian", widths: FieldWidths | None = None) -> PageLayout:
    """The layout of a release (RELEASES) and a configuration ("debian", "small").

    widths: of the fields of page->flags, if not the configuration's; zones have names only where theirs is the same.
    ValueError for another release or configuration, or widths that leave no room for the flags.
    """
    if release not in RELEASES:
        raise ValueError(f"kernel {release!r}: expected one of {', '.join(RELEASES)}")
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"configuration {configuration!r}: expected one of {', '.join(CONFIGURATIONS)}")
    later = release in ("6.18", "7.3")
    mask_tails = release == "7.3"
    cleared = _TYPES_CLEARED.get(release, {})
    same_zones = widths is None or widths.zone == field_widths(configuration).zone
    return PageLayout(
        release=release,
        configuration=configuration,
        flags=_flags(release, configuration, widths),
        second_flags=tuple(Bits(name, bit, bit) for name, bit in _SECOND.get(release, _SECOND["6.12"])),
        zones=_ZONES[configuration] if same_zones else (),
        mask_tails=mask_tails,
        order_in_flags=release != "6.1",
        page=_page(configuration),
        tail=_tail("compound_info" if mask_tails else "compound_head", configuration),
        folio=_FOLIO[release],
        typed=_typed(release),
        types={} if cleared else _TYPES | (_LARGE_KMALLOC if later else {}),
        types_cleared=cleared,
        hugetlb_flags=_HUGETLB_FLAGS + (("cma",) if later else ()),
        cached_per_page=release not in ("6.1", "6.6"),
        doubtful=frozenset() if widths is None else widths.doubtful,
    )
