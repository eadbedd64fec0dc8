"""Layouts of struct page and folio, their decoding, and folios read through a page table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import pgemu
from pgemu.images.folio import Folio, Mapping, decode_page
from pgemu.images.struct_page import Page, flag_text, hugetlb_flags, pointer_name
from pgemu.objects.machine import Config, Machine, Result
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from pgemu_kernels.formats.page_format import x86_64
from pgemu_kernels.formats.struct_page import CONFIGURATIONS, RELEASES, PageLayout, page_layout
from trees import Tree

M2 = W.PAGE_2M
G1 = W.PAGE_1G
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
ALL = (1 << 64) - 1
UNMAPPED = 0xFFFF_FFFF  # _mapcount -1
DEBIAN = 0x17_FFFF_C000_0000  # node 0, ZONE_NORMAL, no CPU and PID
TAIL = 0xDEAD_0000_0000_0400
LAYOUTS = [page_layout(release, configuration) for release in RELEASES for configuration in CONFIGURATIONS]


def positions(layout: PageLayout) -> dict[str, tuple[int, int]]:
    return {bits.name: (bits.high, bits.low) for bits in layout.flags}


# --------------------------------------------------------------------------- layouts


def test_releases_are_those_of_entries() -> None:
    """Struct pages are also decoded of releases whose entries are as those of the releases beside them."""
    assert [release for release in RELEASES if release in formats.RELEASES] == list(formats.RELEASES)
    assert [release for release in RELEASES if release not in formats.RELEASES] == ["6.6", "6.8", "6.10"]
    assert [layout.release for layout in LAYOUTS if layout.mask_tails] == ["7.3"] * 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.release}-{layout.configuration}")
def test_bits_and_fields_do_not_overlap(layout: PageLayout) -> None:
    masks = [bits.mask for bits in layout.flags]
    assert sum(masks) == np.bitwise_or.reduce(np.array(masks, np.uint64))
    assert masks == sorted(masks)
    assert len(positions(layout)) == len(masks)
    assert all(a.high < b.low for a, b in zip(layout.flags, layout.flags[1:], strict=False))
    for names in ((), ("_deferred_list",), ("_hugetlb",)):
        taken: set[int] = set()
        for field in layout.folio:
            if field.name.startswith(("_deferred_list", "_hugetlb")) and not field.name.startswith(names or ("-",)):
                continue
            these = set(range(field.offset, field.offset + field.size))
            assert not taken & these, field
            taken |= these


def test_where_debian_has_node_zone_and_lru() -> None:
    """NODES_SHIFT 10, 5 zones, 21 bits of a CPU and PID, then multi-gen LRU: include/linux/page-flags-layout.h."""
    fields = {"node": (63, 54), "zone": (53, 51), "last_cpupid": (50, 30), "lru_gen": (29, 27), "lru_refs": (26, 25)}
    for release in RELEASES:
        found = positions(page_layout(release))
        # NR_PAGEFLAGS of generated/bounds.h; 6.6 and 6.8 leave one bit for the references: LRU_REFS_WIDTH.
        flags = {"6.12": 24, "6.6": 26, "6.8": 26}.get(release, 25)
        fields["lru_refs"] = (26, max(flags, 25))
        assert {name: found[name] for name in fields} == fields
        assert len(found) - len(fields) == flags


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.1", {"referenced": 1, "uptodate": 2, "slab": 9, "head": 16, "mlocked": 21, "hwpoison": 23, "arch_2": 24}),
        (
            "6.6",
            {"writeback": 1, "head": 6, "error": 10, "slab": 11, "mappedtodisk": 17, "mlocked": 21, "hwpoison": 23},
        ),
        (
            "6.8",
            {"writeback": 1, "head": 6, "error": 10, "slab": 11, "mappedtodisk": 17, "mlocked": 21, "hwpoison": 23},
        ),
        ("6.10", {"head": 6, "error": 10, "owner_priv_1": 11, "mappedtodisk": 16, "mlocked": 20, "hwpoison": 22}),
        ("6.12", {"writeback": 1, "head": 6, "workingset": 9, "mlocked": 19, "hwpoison": 20, "idle": 22, "arch_2": 23}),
        ("6.18", {"head": 6, "dropbehind": 19, "mlocked": 20, "hwpoison": 21, "young": 22, "arch_2": 24}),
        ("7.3", {"head": 6, "dropbehind": 19, "mlocked": 20, "hwpoison": 21, "young": 22, "arch_2": 24}),
    ],
)
def test_where_debian_has_flags(release: str, expected: dict[str, int]) -> None:
    layout = page_layout(release)
    assert {name: positions(layout)[name] for name in expected} == {name: (bit, bit) for name, bit in expected.items()}
    assert layout.head == 1 << expected["head"]


def test_the_small_configuration_has_a_zone_only() -> None:
    layout = page_layout("7.3", "small")
    assert [bits for bits in layout.flags if bits.high != bits.low] == [("zone", 63, 62, True)]
    assert layout.bits("hwpoison") is None
    assert layout.zones[1] == "Normal"


def test_what_is_inference_says_so() -> None:
    assert not any(bits.confirmed for bits in page_layout("6.12", "small").flags)
    assert all(bits.confirmed for release in ("6.1", "6.12", "7.3") for bits in page_layout(release).flags)
    assert {bits.name for bits in page_layout("6.18").flags if bits.confirmed} == {
        "referenced", "uptodate", "dirty", "head", "lru_refs", "last_cpupid", "zone"
    }  # fmt: skip
    assert [bits.name for bits in page_layout("7.3", "small").flags if not bits.confirmed] == ["arch_2"]


OFFSETS = {
    "6.1": {"_folio_order": 81, "_total_mapcount": 84, "_pincount": 88, "_folio_nr_pages": 92, "_hugetlb_subpool": 96,
            "_hugetlb_cgroup": 168, "_hugetlb_cgroup_rsvd": 232, "_hugetlb_hwpoison": 296},
    "6.12": {"_large_mapcount": 80, "_entire_mapcount": 84, "_nr_pages_mapped": 88, "_pincount": 92,
             "_folio_nr_pages": 96, "_hugetlb_subpool": 144, "_hugetlb_cgroup": 152, "_hugetlb_cgroup_rsvd": 160,
             "_hugetlb_hwpoison": 168, "_deferred_list.next": 144},
    "6.18": {"_large_mapcount": 80, "_nr_pages_mapped": 84, "_entire_mapcount": 88, "_pincount": 92,
             "_mm_id_mapcount[0]": 96, "_mm_id[0]": 104, "_nr_pages": 120, "_deferred_list.next": 144,
             "_hugetlb_subpool": 208, "_hugetlb_cgroup": 216, "_hugetlb_cgroup_rsvd": 224, "_hugetlb_hwpoison": 232},
}  # fmt: skip
OFFSETS["7.3"] = OFFSETS["6.18"]
OFFSETS["6.10"] = OFFSETS["6.12"]
OFFSETS["6.6"] = OFFSETS["6.8"] = {
    name: offset for name, offset in OFFSETS["6.12"].items() if name.startswith(("_hugetlb", "_deferred"))
} | {"_entire_mapcount": 88, "_nr_pages_mapped": 92, "_pincount": 96, "_folio_nr_pages": 100}


@pytest.mark.parametrize("release", RELEASES)
def test_where_fields_of_a_folio_lie(release: str) -> None:
    layout = page_layout(release)
    fields = {name: layout.field(name) for name in OFFSETS[release]}
    assert {name: field.offset if field else None for name, field in fields.items()} == OFFSETS[release]
    assert ("cma" in layout.hugetlb_flags) == (release in ("6.18", "7.3"))
    assert hugetlb_flags(layout, 0b1_0101) == ("restore_reserve", "temporary", "vmemmap_optimized")
    assert hugetlb_flags(layout, 1 << 40) == ("bit 40",)


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel '5\.4': expected one of 6\.1, 6\.6, 6\.8, 6\.10, 6\.12, 6\.18"):
        page_layout("5.4")
    with pytest.raises(ValueError, match="configuration 'large': expected one of debian, small"):
        page_layout("7.3", "large")


# --------------------------------------------------------------------------- one struct page


def page_of(release: str = "7.3", pfn: int = 0x180000, **words: int) -> Page:
    """A decoded struct page; what is not given is that of an idle page with one reference."""
    given = {"flags": DEBIAN, "next": 0, "prev": 0, "mapping": 0, "index": 0, "private": 0, "type": UNMAPPED, "ref": 1}
    given |= words
    counts = (given["ref"] & UNMAPPED) << 32 | given["type"] & UNMAPPED
    row = [*(given[name] for name in ("flags", "next", "prev", "mapping", "index", "private")), counts, 0]
    return decode_page(row, pfn, page_layout(release))


def meaning(page: Page, name: str) -> str:
    (text,) = [value.meaning for value in page.values if value.name == name]
    return text


def test_an_anonymous_page() -> None:
    """uptodate, lru, swapbacked, third generation, two reference bits, node 3, mapped twice."""
    flags = 1 << 3 | 1 << 5 | 1 << 17 | 3 << 27 | 2 << 25 | 0x12345 << 30 | 2 << 51 | 3 << 54
    page = page_of(flags=flags, mapping=0xFFFF_8881_0203_0401, type=1, ref=2)
    assert (page.kind, page.head, page.flags) == ("page", 0x180000, ("uptodate", "lru", "swapbacked"))
    assert (page.node, page.zone_name, page.last_cpupid, page.lru_gen, page.lru_refs) == (3, "Normal", 0x12345, 2, 2)
    assert (page.refcount, page.mapcount, page.type) == (2, 2, None)
    assert page.mapping == Mapping("anon_vma", 0xFFFF_8881_0203_0400)
    text = "uptodate|lru|swapbacked, lru_refs 2, lru_gen 2, last_cpupid 74565, zone 2 (Normal), node 3"
    assert meaning(page, "flags") == text
    assert meaning(page, "mapping") == "anon_vma, direct map, physical 0x102030400"


@pytest.mark.parametrize(
    ("word", "kind"),
    [(0xFFFF_8881_0000_0000, "address_space"), (0xFFFF_8881_0000_0003, "ksm"), (TAIL, "tail")],
)
def test_mappings(word: int, kind: str) -> None:
    mapping = page_of(mapping=word).mapping
    assert mapping is not None
    assert (mapping.kind, mapping.address) == (kind, word & ~3)


@pytest.mark.parametrize(
    ("release", "word", "type_"),
    [
        *(("7.3", 0xF0 + i << 24, name) for i, name in enumerate(
            ("buddy", "offline", "table", "guard", "hugetlb", "slab", "zsmalloc", "unaccepted", "large_kmalloc"))),
        ("6.12", 0xF800_0000, "0xf8"), ("6.12", 0xF400_1234, "hugetlb"), ("7.3", 0x8000_0000, "0x80"),
        ("7.3", 0xFF00_0000, None), ("7.3", UNMAPPED, None), ("7.3", 0x7FFF_FFFF, None),
        ("6.1", 0xFFFF_FF7F, "buddy"), ("6.1", 0xFFFF_FEFF, "offline"), ("6.1", 0xFFFF_FDFF, "table"),
        ("6.1", 0xFFFF_FBFF, "guard"), ("6.1", UNMAPPED, None), ("6.1", 5, None), ("6.1", 0xBFFF_FFFF, None),
        *((release, UNMAPPED & ~(0x80 << i), name) for release in ("6.6", "6.8", "6.10") for i, name in enumerate(
            ("buddy", "offline", "table", "guard", "hugetlb"))),
        ("6.6", UNMAPPED, None), ("6.8", UNMAPPED & ~0x1000, None), ("6.10", UNMAPPED & ~0x1000, "slab"),
        *(("6.10", UNMAPPED & ~(1 << 30 - i), name) for i, name in enumerate(  # of 6.11
            ("buddy", "offline", "table", "guard", "hugetlb", "slab", "zsmalloc"))),
        ("6.10", UNMAPPED, None), ("6.10", 0x7FFF_FFFF, None), ("6.10", 3, None), ("6.12", 0xBFFF_FFFF, "0xbf"),
    ],
)  # fmt: skip
def test_page_types(release: str, word: int, type_: str | None) -> None:
    page = page_of(release, type=word)
    assert page.type == type_
    assert (page.mapcount is None) == (type_ is not None)
    assert [value.name for value in page.values][6] == ("_mapcount" if type_ is None else "page_type")


def test_words_of_typed_pages_have_their_own_names() -> None:
    table = page_of(type=0xF200_0000, prev=VMEMMAP + 64, index=2)
    assert {"pmd_huge_pte", "pt_index", "ptl"} <= {value.name for value in table.values}
    assert (meaning(table, "pmd_huge_pte"), table.mapping, table.index) == ("struct page of PFN 0x1", None, None)
    assert "buddy_list.next" in {value.name for value in page_of(type=0xF000_0000).values}
    old = page_of("6.8", type=UNMAPPED & ~0x200)
    assert {"pmd_huge_pte", "pt_mm", "ptl"} <= {value.name for value in old.values}
    slab = page_of("6.6", flags=DEBIAN | 1 << 11, type=0x20_0010)
    assert (slab.type, "memcg_data" in {value.name for value in slab.values}) == ("slab", True)
    slab = page_of("6.1", flags=DEBIAN | 1 << 9, type=0x20_0010)
    assert (slab.type, "freelist" in {value.name for value in slab.values}) == ("slab", True)


def test_counts_are_signed() -> None:
    page = page_of(ref=-3, type=-130)
    assert (page.refcount, page.mapcount, meaning(page, "_refcount")) == (-3, -129, "-3")  # below every type
    assert page_of(type=0x7FFF_FFFE).mapcount == 0x7FFF_FFFF


def test_flags_without_a_name_and_by_inference() -> None:
    page = page_of("6.12", flags=DEBIAN | 1 << 24 | 1 << 20)
    assert (page.flags, page.unknown, page.unconfirmed) == (("hwpoison",), 1 << 24, 0)
    assert meaning(page, "flags") == "hwpoison, zone 2 (Normal), node 0, unknown 0x1000000"
    page = page_of("6.18", flags=DEBIAN | 1 << 3 | 1 << 19)
    assert (page.flags, page.unconfirmed) == (("uptodate", "dropbehind"), 1 << 19)
    assert flag_text(page_layout("6.18"), DEBIAN | 1 << 19) == "dropbehind?, zone 2 (Normal), node 0"
    assert flag_text(page_layout("7.3", "small"), 3 << 62) == "zone 3 (Device)"
    assert page_of(flags=7 << 51).zone_name is None


@pytest.mark.parametrize(("release", "order"), [("6.12", 4), ("7.3", 4), ("7.3", 9), ("6.18", 18)])
def test_the_second_struct_page_keeps_flags_of_the_folio(release: str, order: int) -> None:
    """Order, has_hwpoisoned, large_rmappable, partially_mapped, and its own hwpoison: the low byte is no flags."""
    layout = page_layout(release)
    hwpoison = layout.bits("hwpoison")
    assert hwpoison is not None
    info = ALL << order + 6 & ALL | 1 if layout.mask_tails else VMEMMAP + 64 * 0x180000 | 1
    words = [DEBIAN | order | 0x1_0300 | hwpoison.mask, info, 2 << 32 | 5, 1, 0, 0, UNMAPPED, 1 << order]
    page = decode_page(words, 0x180001, layout, folio_type=None)
    assert (page.kind, page.head, page.order) == ("tail", 0x180000, order)
    assert set(page.flags) == {"has_hwpoisoned", "large_rmappable", "partially_mapped", "hwpoison"}
    assert (page.unknown, page.mapping, page.index, page.private) == (0, None, None, None)
    assert meaning(page, "_large_mapcount") == "6"
    assert meaning(page, "_nr_pages_mapped") == ("2" if release != "6.12" else "1")
    assert meaning(page, "_flags_1").startswith(f"order {order}, has_hwpoisoned|large_rmappable|partially_mapped|")


def test_page_2_of_6_12_is_a_list_or_hugetlbs() -> None:
    words = [DEBIAN, VMEMMAP + 1, 0, 0, 0, 0, UNMAPPED, 0]
    names = [
        {value.name for value in decode_page(words, 2, page_layout("6.12"), folio_type=type_).values}
        for type_ in ("hugetlb", None)
    ]
    assert {"_hugetlb_subpool", "_hugetlb_hwpoison"} <= names[0]
    assert "_deferred_list.next" in names[1]
    assert not names[0] & {"_deferred_list.next"}
    assert not any(name.startswith("_hugetlb") for name in names[1])


@pytest.mark.parametrize("info", [1, 3, VMEMMAP - 63, VMEMMAP + 0x21, 0xFFFF_8880_0000_0001, VMEMMAP + (1 << 40) + 1])
def test_a_tail_that_leads_nowhere(info: int) -> None:
    page = page_of(next=info)
    assert (page.kind, page.head) == ("tail", None)
    (compound,) = [value for value in page.values if value.name == "compound_info"]
    assert compound.meaning == "no struct page"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, ""),
        (0xDEAD_0000_0000_0100, "LIST_POISON1"),
        (0xDEAD_0000_0000_0122, "LIST_POISON2"),
        (TAIL, "TAIL_MAPPING"),
        (VMEMMAP + 64 * 5 + 8, "struct page of PFN 0x5 + 0x8"),
        (0xFFFF_8880_0000_1000, "direct map, physical 0x1000"),
        (0xFFFF_C900_0000_0000, "vmalloc"),
        (0xFFFF_FFFF_8215_3B00, "kernel image"),
        (0xFFFF_FFFF_A000_0000, "kernel image or module"),
        (0xFFFF_FFFF_C000_0000, "module"),
        (0xFFFF_8000_0000_0000, "kernel address"),
        (0xFFFF_FE00_0000_0000, "kernel address"),
        (0x7F00_0000_0000, ""),
        (ALL, ""),
    ],
)
def test_pointers_are_told_by_their_address(value: int, name: str) -> None:
    assert pointer_name(value) == name


def test_kaslr_moves_the_direct_map_with_the_vmemmap() -> None:
    moved = 0xFFFF_E180_0000_0000
    assert pointer_name(moved + 128, moved) == "struct page of PFN 0x2"
    assert pointer_name(0xFFFF_8880_0000_1000, moved) == pointer_name(0xFFFF_C900_0000_0000, moved) == "kernel address"
    assert pointer_name(0xFFFF_FFFF_8215_3B00, moved) == "kernel image"


def test_a_struct_page_has_eight_words() -> None:
    with pytest.raises(ValueError, match="7 words: expected the 8 of a struct page"):
        decode_page([0] * 7, 0, page_layout("7.3"))


@pytest.mark.same_with_checks
@given(
    layout=st.sampled_from(LAYOUTS),
    words=st.lists(st.integers(0, ALL), min_size=8, max_size=8),
    pfn=st.integers(0, (1 << 34) - 1),
    index=st.none() | st.integers(0, 63),
    type_=st.sampled_from([None, "hugetlb"]),
)
@settings(max_examples=300, deadline=None)
def test_any_words_decode(layout: PageLayout, words: list[int], pfn: int, index: int | None, type_: str | None) -> None:
    """Every byte stands in one value, and every bit of the flags has a name or is unknown."""
    page = decode_page(words, pfn, layout, folio_type=type_, index=index)
    offset, built = 0, 0
    for value in page.values:
        assert value.offset == offset
        offset += value.size
        built |= value.value << 8 * value.offset
    assert (offset, built) == (64, sum(word << 64 * i for i, word in enumerate(words)))
    named = sum(bits.mask for bits in layout.flags)
    assert page.unknown & named == 0
    if page.order is None:
        assert page.unknown == words[0] & ~named
    assert (page.kind == "tail") == (words[1] & 1 == 1)


# --------------------------------------------------------------------------- folios in hand-made memory


def store(tree: Tree, physical: int, rows: dict[int, list[int]]) -> None:
    """Struct pages, by number in the page of struct pages at a physical address."""
    for i, words in rows.items():
        tree.memory.pages[physical][8 * i : 8 * i + 8] = words


def thp(release: str) -> tuple[Folio, Tree]:
    """An anonymous folio of 16 pages from PFN 0x40 on, mapped by 3 entries, in a page table of one vmemmap page."""
    tree = Tree(x86_64())
    frame = tree.memory.add(0x5000)
    tree.map(VMEMMAP + PAGE, frame, 1, 0x8000_0000_0000_0163)
    layout = page_layout(release)
    info = ALL << 10 & ALL | 1 if layout.mask_tails else VMEMMAP + PAGE | 1
    # Mapped by 3 entries, none of the whole, pinned once; from 6.15 on by MM 3 once and by MM 7 twice, bit 31 a lock.
    counts = [3 << 32 | 2, 1 << 32 | UNMAPPED, 1 << 32, 7 << 32 | 0x8000_0003]
    if release == "6.12":
        counts = [UNMAPPED << 32 | 2, 1 << 32 | 3, 16, 0]
    head = [DEBIAN | 1 << 6 | 1 << 17 | 1 << 3, 0, 0, 0xFFFF_8881_0000_1001, 0x7F0, 0, 5 << 32 | UNMAPPED, 0]
    tails = {i: [DEBIAN, info, 0, TAIL, 0, 0, UNMAPPED, 0] for i in range(2, 16)}
    small = {16: [DEBIAN | 1 << 3, 0, 0, 0xFFFF_8881_0000_2000, 9, 0, 1026 << 32 | 0, 0]}
    second = [DEBIAN | 4 | 1 << 9, info, *counts, UNMAPPED, 16]
    store(tree, frame, {0: head, 1: second, **tails, **small})
    return Folio(tree.memory, 0x40 + 7, layout, tree.root), tree


@pytest.mark.parametrize("release", ["6.12", "6.18", "7.3"])
def test_a_transparent_huge_page(release: str) -> None:
    folio, tree = thp(release)
    assert (folio.pfn, folio.given, folio.fake, folio.large) == (0x40, 0x47, False, True)
    assert (folio.order, folio.nr_pages, folio.type, folio.hugetlb, folio.optimized) == (4, 16, None, None, False)
    assert (folio.refcount, folio.mapcount, folio.large_mapcount, folio.entire_mapcount) == (5, 3, 3, 0)
    assert (folio.pincount, folio.maybe_dma_pinned, folio.expected_references) == (1, True, 3)
    assert folio.flags == ("uptodate", "head", "swapbacked", "large_rmappable")
    assert folio.mapping == Mapping("anon_vma", 0xFFFF_8881_0000_1000)
    assert (folio.index, folio.inode) == (0x7F0, None)
    if release == "6.12":
        assert folio.mm_ids is None
    else:
        assert folio.mm_ids == ((3, 7), (1, 2), True, False)
    (page,) = folio.vmemmap
    assert (page.address, page.level, page.entry) == (VMEMMAP + PAGE, 1, 0x8000_0000_0000_5163)
    assert (page.frame, page.writable, page.shared) == (5, True, False)
    assert tree.memory.word(page.entry_address) == page.entry
    small = Folio(tree.memory, 0x50, folio.layout, tree.root)
    assert (small.pfn, small.order, small.nr_pages, small.pincount, small.mm_ids) == (0x50, 0, 1, None, None)
    assert (small.refcount, small.mapcount, small.expected_references, small.maybe_dma_pinned) == (1026, 1, 2, True)
    assert (small.large_mapcount, small.entire_mapcount) == (None, None)
    assert repr(small) == "Folio(pfn=0x50, order=0, refcount=1026, type=None)"


def test_the_swap_cache_and_private_data_hold_references() -> None:
    folio, tree = thp("7.3")
    frame = 0x5000
    tree.memory.store(frame, tree.memory.word(frame) | 1 << 10)  # PG_swapcache of a swap-backed folio
    assert folio.expected_references == 16 + 3
    tree.memory.store(frame + 24, 0xFFFF_8881_0000_1000)  # no longer anonymous
    tree.memory.store(frame, tree.memory.word(frame) & ~(1 << 10) | 1 << 14)
    assert folio.expected_references == 16 + 1 + 3


def test_a_list_of_poisoned_pages_is_followed() -> None:
    tree = Tree(x86_64())
    frame, heap = tree.memory.add(0x5000), tree.memory.add(0x8000)
    tree.map(VMEMMAP, frame, 1, 0x8000_0000_0000_0163)
    tree.map(0xFFFF_8880_0000_8000, heap, 1, 0x8000_0000_0000_0163)
    head = [DEBIAN | 1 << 6, 0, 0, 0, 0, 0x28, 0xF400_0000, 0]
    first = 0xFFFF_8880_0000_8100
    mask = ALL << 15 & ALL | 1
    rows = {
        0: head,
        1: [DEBIAN | 9, mask, UNMAPPED, UNMAPPED, ALL, 0, UNMAPPED, 512],
        3: [DEBIAN, mask, 0xFFFF_8881_0000_0000, 0, 0, first, UNMAPPED, 0],
    }
    store(tree, frame, rows)
    tree.memory.pages[heap][0x20:0x22] = [0xFFFF_8880_0000_8200, VMEMMAP + 64 * 77]
    tree.memory.pages[heap][0x40:0x42] = [0, VMEMMAP + 64 * 3]
    folio = Folio(tree.memory, 0, page_layout("7.3"), tree.root)
    assert folio.hugetlb == (("freed", "raw_hwp_unreliable"), 0xFFFF_8881_0000_0000, 0, 0, first)
    assert folio.poisoned_pages == [77, 3]
    tree.memory.pages[heap][0x40] = 0xFFFF_8880_0000_9000  # not mapped
    assert folio.poisoned_pages is None


def test_struct_pages_that_are_not_there() -> None:
    folio, tree = thp("7.3")
    with pytest.raises(ValueError, match=r"PFN 0x80: its struct page at 0xffffea0000002000 is not mapped"):
        Folio(tree.memory, 0x80, folio.layout, tree.root)
    with pytest.raises(ValueError, match="not mapped"):
        Folio(tree.memory, 1 << 40, folio.layout, tree.root)
    tree.map(VMEMMAP + 2 * PAGE, 0x99000, 1, 0x163)
    with pytest.raises(ValueError, match="physical 0x99000 is not in memory"):
        Folio(tree.memory, 0x80, folio.layout, tree.root)
    tree.memory.store(tree.slot(VMEMMAP + (1 << 30), 3), 0x77000 | 0x67)
    with pytest.raises(ValueError, match="not in memory"):
        Folio(tree.memory, 1 << 24, folio.layout, tree.root)
    store(tree, 0x5000, {20: [DEBIAN, 0x1235, 0, 0, 0, 0, UNMAPPED, 0]})
    with pytest.raises(ValueError, match="0x1235 leads to no struct page"):
        Folio(tree.memory, 0x40 + 20, folio.layout, tree.root)


# --------------------------------------------------------------------------- folios of a machine

KERNELS = ["6.12", "6.18", "7.3"]


def test_the_package_names_folio() -> None:
    machine = Machine(Config(pool=M2, page_size=M2))
    assert isinstance(machine.folio(machine.register(W.R_POOL_BASE)), Folio)
    assert pgemu.Folio is Folio


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("page_size", "order"), [(M2, 9), (G1, 18)])
def test_every_page_of_a_pool_gives_its_folio(kernel: str, page_size: int, order: int) -> None:
    machine = Machine(Config(pool=2 * page_size, page_size=page_size, kernel=kernel))
    base = machine.register(W.R_POOL_BASE)
    pages = 1 << order
    for head in (base, base + pages):
        for offset in [*range(130), pages - 64, pages - 63, pages - 1]:
            folio = machine.folio(head + offset)
            assert (folio.pfn, folio.given, folio.order) == (head, head + offset, order)
            assert folio.fake == (kernel != "7.3" and offset % 64 == 0 and offset > 0)
    folio = machine.folio(base)
    assert (folio.type, folio.refcount, folio.mapcount, folio.pincount, folio.nr_pages) == ("hugetlb", 0, 0, 0, pages)
    assert folio.optimized
    vmemmap = folio.vmemmap
    assert len(vmemmap) == pages // 64
    read_only = 63 if (kernel, order) == ("6.18", 18) else pages // 64 - 1  # 6.18's 1G boot pages, as captured
    assert [page.writable for page in vmemmap] == [
        True, *[False] * read_only, *[True] * (pages // 64 - 1 - read_only)
    ]  # fmt: skip
    assert len({page.frame for page in vmemmap[1:]}) == 1
    assert (vmemmap[1].frame == vmemmap[0].frame) == (kernel != "7.3")


def test_a_pool_without_optimisation() -> None:
    machine = Machine(Config(pool=G1, hvo=False))
    folio = machine.folio(machine.register(W.R_POOL_BASE) + 12345)
    assert (folio.optimized, folio.fake, folio.order) == (False, False, 18)
    vmemmap = folio.vmemmap
    assert {(page.level, page.writable, page.shared) for page in vmemmap} == {(2, True, False)}
    frames = [page.frame for page in vmemmap]
    assert frames == list(range(frames[0] or 0, (frames[0] or 0) + 4096))


def test_pages_outside_the_zone_are_refused() -> None:
    machine = Machine(Config(pool=M2, page_size=M2))
    base = machine.register(W.R_POOL_BASE)
    for pfn in (base - 1, base + 512, 0, -1):
        with pytest.raises(ValueError, match="expected a frame"):
            machine.folio(pfn)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_folio_follows_what_happens(kernel: str) -> None:
    """In the page cache, split into 4K folios, mapped, merged again."""
    machine = Machine(Config("restructure", pool=2 * M2, page_size=M2, kernel=kernel))
    machine.create_guest_memfd(M2)  # so that the inode's number is not 0
    gmem = machine.create_guest_memfd(M2)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    vm.touch(0)
    folio = machine.folio(gmem.pfn(0) or 0)
    assert (folio.order, folio.refcount, folio.expected_references, folio.index) == (9, 512, 512, 0)
    assert (folio.inode, folio.flags) == (1, ("uptodate", "head"))
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert (folio.order, folio.nr_pages, folio.type, folio.hugetlb, folio.optimized) == (0, 1, None, None, False)
    process = machine.create_process()
    process.mmap(gmem, VA)
    process.touch(VA)
    assert (folio.refcount, folio.mapcount, folio.expected_references) == (2, 1, 2)
    piece = machine.folio(folio.pfn + 100)
    assert (piece.pfn, piece.order, piece.refcount, piece.index, piece.inode) == (folio.pfn + 100, 0, 1, 100, 1)
    assert len(piece.vmemmap) == 1
    process.munmap(VA, M2)
    assert gmem.convert(0, PAGE, shared=False).status == 0
    assert (folio.order, folio.refcount, machine.folio(folio.pfn + 100).pfn) == (9, 512, folio.pfn)
    gmem.close()
    assert folio.hugetlb is not None
    assert (folio.refcount, folio.mapping, folio.hugetlb.flags[0]) == (0, None, "freed")


@pytest.mark.parametrize("kernel", KERNELS)
def test_mapped_huge_pages(kernel: str) -> None:
    """Private ones belong to an anon_vma and have a reference per mapping, those of a file one per page besides."""
    machine = Machine(Config(pool=4 * M2, page_size=M2, kernel=kernel))
    process = machine.create_process()
    file = machine.create_hugetlb_file(M2)
    process.mmap_hugetlb(VA, file=file)
    process.mmap_hugetlb(VA + G1, M2, shared=False)
    found = []
    for address in (VA, VA + G1):
        process.touch(address, write=True)
        found.append(machine.folio((process.walk(address)[-1][2] & formats.ADDRESS) >> 12))
    shared, private = found
    assert (shared.refcount, shared.expected_references, shared.mapcount, shared.inode) == (513, 513, 1, file.inode)
    assert (private.refcount, private.expected_references, private.mapcount, private.inode) == (1, 1, 1, None)
    assert [folio.mapping.kind for folio in found if folio.mapping] == ["address_space", "anon_vma"]
    process.fork()  # entries of shared mappings are left to faults: mm/memory.c:vma_needs_copy()
    for folio, count in ((shared, 1), (private, 2)):
        assert (folio.entire_mapcount, folio.large_mapcount) == (count, count)
        assert folio.refcount == folio.expected_references


@pytest.mark.parametrize("kernel", ["6.18", "7.3"])
def test_poisoned_pages_of_a_machine(kernel: str) -> None:
    machine = Machine(Config(pool=2 * M2, page_size=M2, kernel=kernel))
    base = machine.register(W.R_POOL_BASE)
    folio = machine.folio(base)
    assert folio.poisoned_pages == []
    for offset in (77, 3):
        assert machine.poison(base + offset).status == 0
    assert folio.poisoned_pages == [base + 3, base + 77]
    assert folio.flags == ("head", "hwpoison")
    assert machine.folio(base + 512).poisoned_pages == []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_word_of_a_machine_has_a_meaning(kernel: str, configuration: str) -> None:
    """No flag without a name in pools of both sizes, optimised or not, demoted, dissolved."""
    machine = Machine(Config(
        pool=4 * M2, page_size=M2, other_pool=2 * G1, kernel=kernel, configuration=configuration  # type: ignore[arg-type]
    ))  # fmt: skip
    large, small = machine.hugetlb(G1), machine.hugetlb(M2)
    assert large.demote(1).status == 0
    dissolved, *rest = small.free_list()
    assert machine.dissolve(dissolved).status == 0
    assert (machine.folio(dissolved + 3).order, len(rest), len(large.free_list())) == (0, 3 + 512, 1)
    for head, order in [(large.free_list()[0], 18), *((pfn, 9) for pfn in rest[::100]), (dissolved, 0)]:
        folio = machine.folio(head)
        assert (folio.pfn, folio.order, folio.optimized) == (head, order, order > 0)
        for index in {0, 1, 2, 3, 4, 64, (1 << order) - 1} & set(range(1 << order)):
            page = folio.page(index)
            assert (page.unknown, page.head) == (0, page.pfn if folio.shown(index) == 0 else head), page
            assert page.zone_name == "Normal", page


def test_operations_become_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the columns of each operation hold (words.Operation)."""
    machine = Machine(Config(pool=M2, page_size=M2))
    folio = machine.folio(machine.register(W.R_POOL_BASE) + 5)
    asked: list[tuple[Any, ...]] = []

    def operate(op: W.Operation, *, flags: int = 0, address: int = 0, length: int = 0) -> Result:
        asked.append((op, flags, address, length))
        return Result(1 if op is W.Operation.FOLIO_FREEZE and length == 1 else 0, 0)

    monkeypatch.setattr(machine, "operate", operate)
    for result in (folio.get(), folio.put(2), folio.pin(3), folio.unpin(4), folio.optimize(), folio.restore()):
        assert result == (0, 0)
    assert [folio.freeze(1), folio.freeze(2), folio.unfreeze(1), folio.unfreeze(2)] == [True, False, True, False]
    assert folio.split() == (0, 0)
    assert folio.merge() == folio.merge(18) == (0, 0)
    at = folio.pfn << 12
    op, flag = W.Operation, W.Flag
    assert asked == [
        (op.FOLIO_REFERENCE, flag.SHARED, at, 1),
        (op.FOLIO_REFERENCE, flag.READ, at, 2),
        (op.FOLIO_REFERENCE, flag.WRITE | flag.SHARED, at, 3),
        (op.FOLIO_REFERENCE, flag.WRITE | flag.READ, at, 4),
        (op.VMEMMAP_OPTIMIZE, 0, at, M2),
        (op.VMEMMAP_RESTORE, 0, at, M2),
        (op.FOLIO_FREEZE, 0, at, 1),
        (op.FOLIO_FREEZE, 0, at, 2),
        (op.FOLIO_FREEZE, flag.READ, at, 1),
        (op.FOLIO_FREEZE, flag.READ, at, 2),
        (op.FOLIO_SPLIT, 0, at, M2),
        (op.FOLIO_MERGE, 0, at, M2),
        (op.FOLIO_MERGE, 0, at, G1),
    ]


def test_a_folio_of_an_image_is_only_read() -> None:
    folio, _ = thp("7.3")
    for operation in (folio.get, folio.split, folio.merge, folio.optimize):
        with pytest.raises(ValueError, match="expected one of a machine"):
            operation()
