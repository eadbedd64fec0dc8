"""Entries: golden values, encoding and decoding in every format, and kinds against a model of the manuals' tables."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.tables.entries import EntryKind, classify, decode
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits, leaves as K
from pgemu_kernels.formats.iommu import (
    amd_iommu_v1,
    amd_sized_leaf,
    vtd_second_stage,
)
from pgemu_kernels.formats.page_format import FORMATS, Family, PageFormat, arm64_stage2, ept, npt, x86_64

pytestmark = pytest.mark.same_with_checks

NX = 1 << 63
SAVED = 1 << 58
P61, P612, P618, P73 = (K.ProcessLeaves(kernel) for kernel in ("6.1", "6.12", "6.18", "7.3"))
PTI = K.ProcessLeaves("7.3", pti=True)
EPT_71 = ept(kernel="6.18")  # bits as read in 7.1, which 6.12 has, too
EPT_71_NX = ept(kernel="6.18", nx_huge_pages=True)
EPT_73 = ept()
HASWELL = ept(maxphyaddr=40, nx_huge_pages=True, l1tf_cache_bits=44)
NPT = npt(maxphyaddr=40)
VTD, AMD = vtd_second_stage(), amd_iommu_v1(6)
RO, RW = P73.protection(write=False), P73.protection(write=True)
ANON = P73.anonymous()
NOT_PRESENT_FRAME = bits.ADDRESS  # frame 0, inverted

# --------------------------------------------------------------------------- golden values

REFERENCE = [
    # what, value, made by: page-tables.md 0.3
    ("x86 table entry", 0x67, x86_64().table_entry(0)),
    ("PAGE_SHARED", NX | 0x27, P73.protection(write=True, shared=True)),
    ("vmf_insert_pfn, RW VMA", NX | 0x227, P73.special_pfn()),
    ("vmf_insert_pfn, RO VMA", NX | 0x225, P73.special_pfn(write=False)),
    ("file page, write fault", NX | 0x867, P73.file_page(write_fault=True)),
    ("... without soft-dirty", NX | 0x067, K.ProcessLeaves(soft_dirty=False).file_page(write_fault=True)),
    ("file page, read fault, clean", NX | 0x027, P73.file_page(write_fault=False)),
    ("file page, read fault, dirty", NX | 0x867, P73.file_page(write_fault=False, folio_dirty=True)),
    ("anonymous page", NX | 0x867, P73.anonymous()),
    ("HugeTLB shared 2M", NX | 0x8E7, P73.hugetlb(2, shared=True)),
    ("HugeTLB shared 1G", NX | 0x8E7, P73.hugetlb(3, shared=True)),
    ("vmf_insert_pfn_pmd, write", NX | 0xAE7, P73.special_pfn(2, make_write=True)),
    ("vmf_insert_pfn_pud, write", NX | 0xAE7, P73.special_pfn(3, make_write=True)),
    ("vmf_insert_pfn_pmd, read", NX | 0x2A7, P73.special_pfn(2)),
    ("BAR 4K", NX | 0x237, P73.bar()),
    ("BAR 2M", NX | 0x2B7, P73.bar(2)),
    ("BAR 1G", NX | 0x2B7, P73.bar(3)),
    ("BAR 4K, written", NX | 0x277, P73.bar(written=True)),
    ("BAR 2M, written", NX | 0x2F7, P73.bar(2, written=True)),
    ("guest_memfd page", NX | 0x867, P73.guest_memfd_page()),
    ("vmemmap tail, boot folio, 7.3", NX | SAVED | 0x121, P73.vmemmap(write=False, boot=True)),
    ("vmemmap tail, boot folio, 6.18", NX | SAVED | 0x121, P618.vmemmap(write=False, boot=True)),
    ("vmemmap tail, boot folio, 6.12", NX | 0x121, P612.vmemmap(write=False, boot=True)),
    ("vmemmap PMD", NX | 0x1E3, P73.vmemmap(level=2)),
    ("vmemmap PMD, PTI", NX | 0x0E3, PTI.vmemmap(level=2)),
    ("vmemmap PTE", NX | 0x163, P73.vmemmap()),
    ("vmemmap PTE, PTI", NX | 0x063, PTI.vmemmap()),
    ("vmemmap PTE read-only", NX | 0x121, P73.vmemmap(write=False)),
    ("vmemmap PTE read-only, PTI", NX | 0x021, PTI.vmemmap(write=False)),
    ("EPT 4K", 0x8600_0000_0000_0B77, K.stage2_leaf(EPT_71, 1)),
    ("EPT 2M", 0x8600_0000_0000_0BF7, K.stage2_leaf(EPT_71, 2)),
    ("EPT 1G", 0x8600_0000_0000_0BF7, K.stage2_leaf(EPT_71, 3)),
    ("EPT 2M, NX mitigation", 0x8600_0000_0000_0BF3, K.stage2_leaf(EPT_71_NX, 2)),
    ("EPT 4K, guest PAT", 0x8600_0000_0000_0B37, K.stage2_leaf(ept(kernel="6.18", ignore_pat=False), 1)),
    ("EPT table", 0x8000_0000_0000_0907, EPT_71.table_entry(0)),
    ("EPT 4K, 7.3", 0x80A0_0000_0000_0F77, K.stage2_leaf(EPT_73, 1)),
    ("EPT 2M, 7.3", 0x80A0_0000_0000_0FF7, K.stage2_leaf(EPT_73, 2)),
    ("EPT 2M, 7.3, NX mitigation", 0x80A0_0000_0000_0BF3, K.stage2_leaf(HASWELL, 2)),
    ("EPT table, 7.3", 0x8000_0000_0000_0D07, EPT_73.table_entry(0)),
    ("empty SPTE", NX, EPT_73.empty),
    ("frozen SPTE", NX | 0x1A0, EPT_73.frozen),
    ("empty SPTE, NPT", NX, NPT.empty),
    ("frozen SPTE, NPT", NX | 0x1A0, NPT.frozen),
    ("NPT 4K", 0xE67, K.stage2_leaf(NPT, 1)),
    ("NPT 2M", 0xEE7, K.stage2_leaf(NPT, 2)),
    ("NPT 1G", 0xEE7, K.stage2_leaf(NPT, 3)),
    ("NPT table", 0x827, NPT.table_entry(0)),
    ("NPT 4K, SME", 1 << 47 | 0xE67, K.stage2_leaf(npt(c_bit=47), 1)),
    ("NPT table, SME", 1 << 47 | 0x827, npt(c_bit=47).table_entry(0)),
    ("Arm page", 0x7FF, K.stage2_leaf(arm64_stage2(fwb=False), 1)),
    ("Arm block", 0x7FD, K.stage2_leaf(arm64_stage2(fwb=False), 2)),
    ("Arm page, XN", 1 << 54 | 0x7FF, K.stage2_leaf(arm64_stage2(fwb=False), 1, execute=False)),
    ("Arm block, XN", 1 << 54 | 0x7FD, K.stage2_leaf(arm64_stage2(fwb=False), 3, execute=False)),
    ("Arm page, FWB", 0x7DB, K.stage2_leaf(arm64_stage2(), 1)),
    ("Arm block, FWB", 0x7D9, K.stage2_leaf(arm64_stage2(), 2)),
    ("Arm page, FWB, XN", 1 << 54 | 0x7DB, K.stage2_leaf(arm64_stage2(), 1, execute=False)),
    ("Arm block, FWB, XN", 1 << 54 | 0x7D9, K.stage2_leaf(arm64_stage2(), 2, execute=False)),
    ("Arm page, XN, one bit", 1 << 54 | 0x7DB, K.stage2_leaf(arm64_stage2(kernel="6.12"), 1, execute=False)),
    ("Arm table", 0x3, arm64_stage2().table_entry(0)),
    ("VT-d 4K", 0x3, VTD.encode(1, 0)),
    ("VT-d 2M", 0x83, VTD.encode(2, 0)),
    ("VT-d 1G", 0x83, VTD.encode(3, 0)),
    ("VT-d 2M, coherence forced", 0x883, vtd_second_stage(force_snoop=True).encode(2, 0)),
    ("VT-d table", 0x403, VTD.table_entry(0)),
    ("VT-d table, coherent unit", 0x3, vtd_second_stage(coherent=True).table_entry(0)),
    ("VT-d table before generic tables", 0x3, vtd_second_stage(kernel="6.18").table_entry(0)),
    ("AMD IOMMU leaf", 0x6000_0000_0000_0001, amd_iommu_v1(force_coherent=False).encode(2, 0)),
    ("AMD IOMMU leaf, FC", 0x7000_0000_0000_0001, AMD.encode(2, 0)),
    ("AMD IOMMU 64K", 0x6000_0000_0000_7E01, amd_sized_leaf(0, 64 << 10)),
    ("AMD IOMMU 32M", 0x6000_0000_00FF_FE01, amd_sized_leaf(0, 32 << 20)),
    ("AMD IOMMU table, 2M", 0x6000_0000_0000_0201, AMD.table_entry(0, level=2)),
    ("AMD IOMMU table, 1G", 0x6000_0000_0000_0401, AMD.table_entry(0, level=3)),
    ("AMD IOMMU table, 512G", 0x6000_0000_0000_0601, AMD.table_entry(0, level=4)),
]

FACTS = [
    # what, value, made by: FACTS.md, by its tables
    ("top table, PTI, kernel's copy", NX | 0x67, x86_64(pti=True).table_entry(0, level=4)),
    ("top table, PTI, user's copy", 0x67, x86_64().table_entry(0, level=4)),
    ("below it, PTI", 0x67, x86_64(pti=True).table_entry(0, level=3)),
    ("anonymous page, executable", 0x867, P73.anonymous(execute=True)),
    ("zero page", NX | 0x225, P73.zero_page()),
    ("read-only after a write", NX | SAVED | 0x825, P73.modify(ANON, RO)),
    ("read-only after a write, 6.1", NX | 0x865, P61.modify(P61.anonymous(), RO)),
    ("accessible again", NX | 0x867, P73.make_accessible(P73.protection_none(ANON))),
    ("accessible again, 6.1", NX | 0x867, P61.make_accessible(P61.protection_none(P61.anonymous()))),
    ("protection-none", SAVED | NOT_PRESENT_FRAME | 0x920, P73.protection_none(ANON)),
    ("protection-none, 6.1", NOT_PRESENT_FRAME | 0x960, P61.protection_none(P61.anonymous())),
    ("zero page, protection-none", NOT_PRESENT_FRAME | 0x320, P73.protection_none(P73.zero_page())),
    ("fork, parent", NX | SAVED | 0x825, P73.wrprotect(ANON)),
    ("fork, child", NX | SAVED | 0x805, P73.fork_child(ANON)),
    ("fork, parent, 6.1", NX | 0x865, P61.wrprotect(P61.anonymous())),
    ("fork, child, 6.1", NX | 0x845, P61.fork_child(P61.anonymous())),
    ("write after fork", NX | 0x867, P73.mkwrite(P73.mkdirty(P73.wrprotect(ANON)))),
    ("transparent huge page", NX | 0x8E7, P73.anonymous(level=2)),
    ("huge zero page", NX | 0x2A5, P73.huge_zero_page()),
    ("huge zero page, 6.18", NX | 0x2A5, P618.huge_zero_page()),
    ("huge zero page, 6.12", NX | 0x0A5, P612.huge_zero_page()),
    ("huge zero page, 6.1", NX | 0x0A5, P61.huge_zero_page()),
    ("THP after fork, parent", NX | SAVED | 0x8A5, P73.wrprotect(P73.anonymous(level=2))),
    ("THP after fork, child", NX | SAVED | 0x885, P73.fork_child(P73.anonymous(level=2))),
    ("tmpfs page read, private", NX | 0x025, P73.file_page(write_fault=False, shared=False)),
    ("tmpfs page, executable", 0x025, P73.file_page(write_fault=False, write=False, execute=True)),
    ("HugeTLB private, read", NX | 0x0A5, P73.hugetlb(2, shared=False)),
    ("HugeTLB private, written", NX | SAVED | 0x8E7, P73.hugetlb(2, shared=False, write_fault=True) | bits.DIRTY),
    ("HugeTLB private, written, 6.1", NX | 0x8E7, P61.hugetlb(2, shared=False, write_fault=True)),
    ("HugeTLB read-only", NX | SAVED | 0x8A5, P73.modify(P73.hugetlb(2, shared=True), RO)),
    ("HugeTLB none", SAVED | NOT_PRESENT_FRAME | 0x9A0, P73.protection_none(P73.hugetlb(2, shared=True))),
    ("HugeTLB none, 6.1", NOT_PRESENT_FRAME | 0x9E0, P61.protection_none(P61.hugetlb(2, shared=True))),
    ("/dev/mem read-only", NX | 0x235, P73.special_pfn(write=False, cache="UC-")),
    ("/dev/mem read-write", NX | 0x237, P73.special_pfn(cache="UC-")),
    ("/dev/mem none", NOT_PRESENT_FRAME | 0x330, P73.protection_none(P73.special_pfn(cache="UC-"))),
    ("guard page", 0xFFFF_FFFF_FFFF_F600, P73.guard()),
    ("vmemmap tail, 6.1", NX | 0x161, P61.vmemmap(write=False)),
    ("NPT empty, 6.1", 0, npt(kernel="6.1").empty),
    ("NPT read-only", 0x825, K.read_only(NPT, 1)),
    ("NPT read-only 2M", 0x8A5, K.read_only(NPT, 2)),
    ("NPT under dirty logging", 0xE65, K.write_protected(NPT, K.stage2_leaf(NPT, 1))),
    ("NPT 1G under dirty logging", 0xEE5, K.write_protected(NPT, K.stage2_leaf(NPT, 3))),
    ("NPT prefaulted", 0xE47, K.stage2_leaf(NPT, 1, prefetched=True)),
    ("NPT MMIO", 0x8_0001_0400_0027, K.mmio(NPT, 0x104000, 4)),
    ("EPT read-only", 0x8000_0000_0000_0D75, K.read_only(HASWELL, 1)),
    ("EPT read-only 2M", 0x8000_0000_0000_09F1, K.read_only(HASWELL, 2)),
    ("EPT under dirty logging", 0x80A0_0000_0000_0F75, K.write_protected(HASWELL, K.stage2_leaf(HASWELL, 1))),
    ("EPT 2M under dirty logging", 0x80A0_0000_0000_0BF1, K.write_protected(HASWELL, K.stage2_leaf(HASWELL, 2))),
    ("EPT prefaulted", 0x80A0_0000_0000_0E77, K.stage2_leaf(HASWELL, 1, prefetched=True)),
    ("EPT MMIO, Haswell", 0xF81_0400_0026, K.mmio(HASWELL, 0x104000, 4)),
]


@pytest.mark.parametrize(("expected", "made"), [case[1:] for case in REFERENCE + FACTS],
                         ids=[case[0] for case in REFERENCE + FACTS])  # fmt: skip
def test_golden_value(expected: int, made: int) -> None:
    assert f"{made:#018x}" == f"{expected:#018x}"


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.18", "7.3"])
def test_a_frame_lies_under_the_flags(kernel: str) -> None:
    leaves = K.ProcessLeaves(kernel)
    pfn = 0x12_3456
    for entry in (leaves.anonymous(pfn), leaves.zero_page(pfn), leaves.vmemmap(pfn), leaves.guest_memfd_page(pfn)):
        assert entry & bits.ADDRESS == pfn << 12
        # Protection-none inverts the frame; giving access back inverts it again.
        hidden = leaves.protection_none(entry)
        assert hidden & bits.ADDRESS == bits.ADDRESS ^ pfn << 12
        assert leaves.modify(hidden, RW) & bits.ADDRESS == pfn << 12
    with pytest.raises(ValueError, match="at most 40 bits"):
        leaves.anonymous(1 << 40)


def test_a_transparent_huge_page_inverts_fewer_bits_than_hugetlb() -> None:
    address = 0x1_83A0_0000
    huge = P73.anonymous(address >> 12, level=2)
    assert P73.protection_none(huge) & bits.ADDRESS == bits.ADDRESS ^ address  # as captured: ...ff9a0
    assert P73.protection_none(huge, thp=True) & bits.ADDRESS == bits.ADDRESS & -(1 << 21) ^ address
    for hidden in (P73.protection_none(huge), P73.protection_none(huge, thp=True)):
        assert decode(x86_64(), 2, hidden).address == address


@pytest.mark.parametrize(("kernel", "read_only"), [
    ("6.1", NX | 0x8E5),
    ("6.12", NX | 0x8A5),  # the dirty bit is lost
    ("6.18", NX | 0x8A5),
    ("7.3", NX | SAVED | 0x8A5),
])  # fmt: skip
def test_mprotect_of_a_transparent_huge_page(kernel: str, read_only: int) -> None:
    leaves = K.ProcessLeaves(kernel)
    assert leaves.modify(leaves.anonymous(level=2), RO, thp=True) == read_only


@pytest.mark.parametrize(("cache", "small", "large"), [
    # PAT, PCD, PWT are bits 7, 4, 3 of a 4K leaf and 12, 4, 3 of a larger one; indices of Linux's PAT.
    ("WB", 0, 0), ("WC", 0x08, 0x08), ("UC-", 0x10, 0x10), ("UC", 0x18, 0x18),
    ("WP", 0x88, 0x1008), ("WT", 0x98, 0x1018),
])  # fmt: skip
def test_memory_types_of_special_leaves(cache: str, small: int, large: int) -> None:
    for level, expected in ((1, 0x227 | small), (2, 0x2A7 | large), (3, 0x2A7 | large)):
        entry = P73.special_pfn(level, cache=cache)
        assert entry == NX | expected
        assert decode(x86_64(), level, entry).memory_type == cache


def test_a_split_huge_page_keeps_its_flags() -> None:
    huge = P73.anonymous(0x200, level=2)
    assert P73.split_thp(huge) == P73.anonymous(0x200)
    assert P61.split_thp(huge) == P61.anonymous(0x200) & ~bits.DIRTY
    assert P73.split_thp(huge | bits.PAT_LARGE) == P73.anonymous(0x200) | bits.PAT_4K


def variants() -> list[PageFormat]:
    """Every format with every kernel, and each of its other parameters once."""
    made = [maker(kernel=kernel) for maker in FORMATS.values() for kernel in bits.RELEASES]
    made += [x86_64(maxphyaddr=39, amd=True), x86_64(pages_1g=False), x86_64(nx=False), x86_64(5, pti=True)]
    made += [x86_64(c_bit=47), npt(c_bit=51), npt(c_bit=47, reduced=43), npt(5, maxphyaddr=52)]
    made += [ept(mode_based_execute=True), ept(mode_based_execute=True, kernel="6.12"), ept(accessed_dirty=False)]
    made += [ept(accessed_dirty=False, kernel="6.12"), ept(execute_only=False), ept(pages_1g=False), HASWELL]
    made += [arm64_stage2(size) for size in (32, 35, 39, 43, 44)]
    made += [maker(accessed_dirty=True) for maker in (vtd_second_stage, amd_iommu_v1)]
    made += [vtd_second_stage(5, superpages=0, maxphyaddr=46), vtd_second_stage(3, superpages=1, force_snoop=True)]
    made += [arm64_stage2(fwb=False, kernel="6.12"), arm64_stage2(hardware_access_flag=False, maxphyaddr=40)]
    return made


VARIANTS = variants()


@st.composite
def leaves_of(draw: st.DrawFn) -> tuple[PageFormat, int, int, dict[str, Any]]:
    """A format, level, address, and arguments of encode() that it can express."""
    fmt = draw(st.sampled_from(VARIANTS))
    level = draw(st.integers(1, min(fmt.largest_leaf, fmt.levels)))
    size = 12 + 9 * (level - 1)
    address = draw(st.integers(0, (1 << fmt.maxphyaddr - size) - 1)) << size & fmt.address
    arguments: dict[str, Any] = {name: draw(st.booleans()) for name in ("write", "accessed", "dirty")}
    arguments["read"] = not fmt.read or draw(st.booleans())
    arguments["user"] = not fmt.user or draw(st.booleans())
    arguments["global_"] = bool(fmt.global_) and draw(st.booleans())
    arguments["memory_type"] = draw(st.sampled_from([name for name, _ in fmt.memory_types]))
    arguments["key"] = draw(st.integers(0, 15)) if fmt.key_shift else 0
    choices = [(s, u) for s in (False, True) for u in (False, True) if fmt.execute.encode(s, u) is not None]
    arguments["execute"], arguments["execute_user"] = draw(st.sampled_from(choices))
    if fmt.family is Family.VTD:
        arguments["read"] |= not arguments["write"]  # nothing at all is not present
    if fmt.family is Family.EPT and not arguments["read"]:
        # Write without read is a misconfiguration, and nothing at all is not present.
        arguments |= {"read": True} if fmt.bad_low & 1 << 4 or not draw(st.booleans()) else {"write": False}
        arguments["read"] |= not (arguments["execute"] or arguments["execute_user"])
    return fmt, level, address, arguments


@settings(max_examples=300)
@given(leaves_of())
def test_what_was_encoded_decodes(case: tuple[PageFormat, int, int, dict[str, Any]]) -> None:
    fmt, level, address, arguments = case
    entry = decode(fmt, level, fmt.encode(level, address, **arguments))
    assert entry.kind is EntryKind.LEAF
    assert (entry.address, entry.unknown, entry.reserved) == (address, 0, 0)
    rights = ["read", "write", "user", "global_", "key"]
    if fmt.family not in (Family.VTD, Family.AMD_IOMMU):  # they know one memory type, and nothing executes
        rights += ["execute", "execute_user", "memory_type"]
    given = {**arguments, "read": arguments["read"] or bool(fmt.read & fmt.leaf_bits)}  # VT-d before 7.x: always
    assert {name: getattr(entry, name) for name in rights} == {name: given[name] for name in rights}
    assert entry.accessed == (bool(fmt.accessed) and arguments["accessed"])
    # Arm's dirty state is the write permission itself.
    dirty = arguments["write"] if fmt.dirty == fmt.write else arguments["dirty"]
    assert entry.dirty == (bool(fmt.dirty) and dirty)
    assert sum(field.value << field.low for field in entry.fields if field.name != "PFN") | address == entry.value


@given(st.sampled_from(VARIANTS), st.data())
def test_table_entries_decode(fmt: PageFormat, data: st.DataObject) -> None:
    level = data.draw(st.integers(2, fmt.levels))
    address = data.draw(st.integers(0, (1 << fmt.maxphyaddr - 12) - 1)) << 12 & fmt.address
    entry = decode(fmt, level, fmt.table_entry(address, level))
    assert (entry.kind, entry.address, entry.unknown) == (EntryKind.TABLE, address, 0)
    assert entry.read
    assert entry.write
    assert entry.execute == (not fmt.table_top or level < fmt.levels)


@given(st.sampled_from([fmt for fmt in VARIANTS if fmt.family in (Family.NPT, Family.EPT)]), st.data())
def test_what_kvm_writes_decodes(fmt: PageFormat, data: st.DataObject) -> None:
    level = data.draw(st.integers(1, fmt.largest_leaf))
    write, execute, prefetched = (data.draw(st.booleans()) for _ in range(3))
    leaf = K.stage2_leaf(fmt, level, write=write, execute=execute, prefetched=prefetched)
    entry = decode(fmt, level, leaf)
    tracked = prefetched and not fmt.accessed
    assert entry.kind is (EntryKind.ACCESS_TRACKED if tracked else EntryKind.LEAF)
    assert entry.unknown == 0
    assert entry.read
    assert entry.write == (write and not tracked)
    assert entry.execute == (execute and not (level > 1 and fmt.nx_huge_pages))
    marks = fmt.host_writable | fmt.mmu_writable
    assert entry.software & marks == (marks if write else 0)
    assert entry.software & bits.MMU_PRESENT
    protected = decode(fmt, level, K.write_protected(fmt, leaf))
    assert (protected.write, protected.software) == (False, entry.software)


@given(st.sampled_from([NPT, npt(kernel="6.1"), HASWELL, ept(maxphyaddr=46), npt(c_bit=47, reduced=43)]), st.data())
def test_cached_mmio_accesses_keep_frame_and_generation(fmt: PageFormat, data: st.DataObject) -> None:
    gfn = data.draw(st.integers(0, (1 << (44 if fmt.mmio_moved else fmt.maxphyaddr) - 12) - 1))
    generation = data.draw(st.integers(0, (1 << 19) - 1))
    for level in (1, 2):
        entry = decode(fmt, level, K.mmio(fmt, gfn, generation))
        assert (entry.kind, entry.address, entry.generation) == (EntryKind.MMIO, gfn << 12, generation)
        assert entry.unknown == 0


@given(st.integers(0, 30), st.integers(0, (1 << 50) - 1), st.booleans(), st.booleans(), st.booleans())
def test_swap_entries_decode(kind: int, offset: int, exclusive: bool, wp: bool, dirty: bool) -> None:
    entry = decode(x86_64(), 1, K.swap_entry(kind, offset, exclusive=exclusive, uffd_wp=wp, soft_dirty=dirty))
    # Type 0 at an offset of all ones is the value of an empty entry: no swap file is that large.
    marked = exclusive or wp or dirty
    if kind == 0 and offset == (1 << 50) - 1 and not marked:
        assert entry.kind is EntryKind.ABSENT
        return
    assert (entry.kind, entry.swap_type, entry.swap_offset) == (EntryKind.SWAP, kind, offset)
    found = {field.name for field in entry.fields}
    assert found - {"SWP_TYPE", "~SWP_OFFSET"} == {
        name for name, on in (("SWP_EXCLUSIVE", exclusive), ("SWP_UFFD_WP", wp), ("SWP_SOFT_DIRTY", dirty)) if on
    }
    assert entry.unknown == 0


KERNEL, USER = 0xFFFF_8880_0000_0000, 0x7F00_0000_0000
# What an unmapped page of the kernel may have: RW, PWT, PCD, accessed, dirty, GLOBAL, NX (mm/pat/set_memory.c).
_KERNEL_BITS = st.sets(st.sampled_from([1, 3, 4, 5, 6, 8, 63])).map(lambda on: sum(1 << bit for bit in on))


@given(level=st.integers(1, 3), frame=st.integers(1, (1 << 38) - 1), low=_KERNEL_BITS, inverted=st.booleans())
def test_unmapped_pages_of_the_kernel_keep_their_frame(level: int, frame: int, low: int, inverted: bool) -> None:
    """Inverted since the fixes of L1TF, before as it is; with an address of the kernel's half whatever its bits."""
    physical = frame << 12 & -(4096 << 9 * (level - 1)) or 4096 << 9 * (level - 1)
    large = bits.LARGE if level > 1 else 0
    entry = (~physical & bits.ADDRESS if inverted else physical) | low | large
    for fmt in (x86_64(), x86_64(5), x86_64(maxphyaddr=40), x86_64(c_bit=51)):
        found = decode(fmt, level, entry & ~fmt.c_bit, KERNEL)
        assert found.kind is EntryKind.KERNEL_NOT_PRESENT
        assert found.address == physical & fmt.frame(level)
        assert (found.unknown, found.swap_type, found.write) == (0, None, False)
        assert classify(fmt, level, entry, USER) is not EntryKind.KERNEL_NOT_PRESENT
    # Without an address: no swap entry has bits 4 to 7.
    bare = decode(x86_64(), level, entry)
    if not low & bits.PROTECTION_NONE and not large and low & 0x70:
        assert (bare.kind, bare.address) == (EntryKind.KERNEL_NOT_PRESENT, physical)
    else:
        assert bare.kind is not EntryKind.KERNEL_NOT_PRESENT


@given(st.integers(0, 31), st.integers(0, (1 << 49) - 1), st.sampled_from([None, 0, USER]))
def test_no_swap_entry_is_taken_for_a_page_of_the_kernel(kind: int, offset: int, address: int | None) -> None:
    assert classify(x86_64(), 1, K.swap_entry(kind, offset), address) is not EntryKind.KERNEL_NOT_PRESENT


@given(st.integers(32, 51), st.integers(0, (1 << 32) - 1), st.sampled_from([1, 0x100]))
def test_the_encryption_bit_is_no_part_of_a_frame(c_bit: int, frame: int, present: int) -> None:
    fmt = x86_64(c_bit=c_bit)
    frame &= ~(1 << c_bit - 12)
    entry = frame << 12 if present == 1 else ~frame << 12 & fmt.address
    found = decode(fmt, 1, entry | 1 << c_bit | present)
    assert found.address == frame << 12
    values = {field.name: field.value for field in found.fields}
    assert values["PFN" if present == 1 else "~PFN"] == frame
    assert values["ENC"] == 1
    assert found.unknown == 0


# --------------------------------------------------------------------------- kinds, against the manuals' tables


def between(low: int, high: int) -> set[int]:
    return set(range(low, high + 1))


class Manual:
    """Kinds of an entry by the tables of page-tables.md 1.3, 2.2, 2.4 and 4.1: an entry is the set of its bits."""

    def __init__(self, name: str, maxphyaddr: int) -> None:
        self.name = name
        self.too_high = between(maxphyaddr, 47 if name == "arm" else 51)

    def kind(self, level: int, entry: int) -> str:
        on = {bit for bit in range(64) if entry >> bit & 1}
        return {"intel": self.x86, "amd": self.x86, "ept": self.ept, "arm": self.arm}[self.name](level, on)

    def x86(self, level: int, on: set[int]) -> str:
        if 0 not in on:
            return "not present"
        if level == 1:
            return "reserved" if on & self.too_high else "leaf"
        if level <= 3 and 7 in on:
            zero = between(13, 20) if level == 2 else between(13, 29)
            return "reserved" if on & (zero | self.too_high) else "leaf"
        zero = {7} if level >= 4 else set()
        if self.name == "amd" and level >= 4:
            zero |= {8}
        return "reserved" if on & (zero | self.too_high) else "table"

    def ept(self, level: int, on: set[int]) -> str:
        if not on & {0, 1, 2}:
            return "not present"
        if on & {0, 1, 2} in ({1}, {1, 2}) or on & self.too_high:
            return "misconfigured"
        if level == 1 or (level <= 3 and 7 in on):
            zero = {1: set(), 2: between(12, 20), 3: between(12, 29)}[level]
            kept = sum(1 << bit - 3 for bit in on & {3, 4, 5})
            return "misconfigured" if kept in (2, 3, 7) or on & zero else "leaf"
        zero = between(3, 6) if level <= 3 else between(3, 7)
        return "misconfigured" if on & zero else "table"

    def arm(self, level: int, on: set[int]) -> str:
        if 0 not in on:
            return "not present"
        above = self.too_high | {48, 49, 50}  # RES0 without FEAT_LPA2
        if level == 1:
            return "leaf" if 1 in on and not on & above else "reserved"
        if 1 in on:
            return "reserved" if on & above else "table"
        zero = {2: between(12, 20), 3: between(12, 29)}.get(level)
        return "reserved" if zero is None or on & (zero | above) else "leaf"


WIDTHS = (36, 40, 48)
CHECKED = [
    *((x86_64(levels, maxphyaddr=width), Manual("intel", width)) for levels in (4, 5) for width in WIDTHS),
    *((x86_64(levels, maxphyaddr=width, amd=True), Manual("amd", width)) for levels in (4, 5) for width in WIDTHS),
    *((ept(levels, maxphyaddr=width), Manual("ept", width)) for levels in (4, 5) for width in WIDTHS),
    *((npt(levels, maxphyaddr=width), Manual("amd", width)) for levels in (4, 5) for width in WIDTHS),
    *((arm64_stage2(ipa, maxphyaddr=width), Manual("arm", width)) for ipa in (40, 48) for width in WIDTHS),
]
NOT_PRESENT = {EntryKind.ABSENT, EntryKind.FROZEN, EntryKind.ANNOTATED, EntryKind.PROTECTION_NONE, EntryKind.SPLITTING,
               EntryKind.GUARD, EntryKind.MARKER, EntryKind.SWAP, EntryKind.KERNEL_NOT_PRESENT}  # fmt: skip


def scattered() -> st.SearchStrategy[int]:
    """Entries of which few or most bits are set, low ones more often: reserved fields stay clear often enough."""
    few = st.sets(st.integers(0, 63) | st.integers(0, 12), max_size=8).map(lambda on: sum(1 << bit for bit in on))
    return few | st.integers(0, (1 << 64) - 1) | few.map(lambda entry: entry | 0b111)


@settings(max_examples=600)
@given(st.sampled_from(CHECKED), st.data())
def test_kinds_are_those_of_the_manuals(checked: tuple[PageFormat, Manual], data: st.DataObject) -> None:
    fmt, manual = checked
    level = data.draw(st.integers(1, fmt.levels))
    entry = data.draw(scattered())
    kind = classify(fmt, level, entry)
    expected = manual.kind(level, entry)
    if kind is EntryKind.MMIO:
        # KVM's cached MMIO accesses are made so that hardware faults on them.
        assert expected == ("misconfigured" if fmt.family is Family.EPT else "reserved")
    elif expected == "not present":
        assert kind in NOT_PRESENT
    else:
        assert kind.value == expected
    decoded = decode(fmt, level, entry)
    assert decoded.kind is kind
    assert bool(decoded.problem) == (kind in (EntryKind.RESERVED, EntryKind.MISCONFIGURED))
    # Every set bit is named, reserved or unknown, and only set bits are.
    named = sum(((1 << field.high - field.low + 1) - 1) << field.low for field in decoded.fields)
    assert (named | decoded.reserved | decoded.unknown) & entry == entry
    assert not decoded.unknown & ~entry
    assert not decoded.unknown & named


@pytest.mark.parametrize(("fmt", "level", "entry", "kind"), [
    (x86_64(), 1, 0, EntryKind.ABSENT),
    (x86_64(), 1, 0x60, EntryKind.ABSENT),  # accessed and dirty alone: pte_none()
    (x86_64(), 1, 0x100, EntryKind.PROTECTION_NONE),
    (x86_64(), 2, bits.ADDRESS | 0xE0, EntryKind.SPLITTING),
    (x86_64(), 1, P73.guard(), EntryKind.GUARD),
    (x86_64(), 1, P73.marker(K.MARKER_POISONED), EntryKind.MARKER),
    (x86_64(), 1, K.swap_entry(3, 0x1234), EntryKind.SWAP),
    (x86_64(nx=False), 1, NX | 0x25, EntryKind.RESERVED),
    (x86_64(pages_1g=False), 3, 0xE7, EntryKind.RESERVED),
    (x86_64(maxphyaddr=52, amd=True), 3, 0x167, EntryKind.TABLE),  # reserved at level 4 alone
    (x86_64(maxphyaddr=52, amd=True), 4, 0x167, EntryKind.RESERVED),
    (NPT, 1, NX, EntryKind.ABSENT),
    (NPT, 1, NX | 0x1A0, EntryKind.FROZEN),
    (npt(kernel="6.1"), 1, 0x5A0, EntryKind.FROZEN),
    (npt(maxphyaddr=52), 1, 0x8_0001_0400_0027, EntryKind.LEAF),  # no reserved bits: KVM caches none
    (npt(c_bit=47, reduced=43), 1, 0xF_F801_0400_0027, EntryKind.MMIO),
    (npt(c_bit=47), 1, 1 << 47 | 0xE67, EntryKind.LEAF),
    (npt(maxphyaddr=47), 1, 1 << 47 | 0xE67, EntryKind.RESERVED),
    (EPT_73, 1, 0x26, EntryKind.MMIO),
    (EPT_73, 1, NX | 0x26, EntryKind.MISCONFIGURED),  # KVM's value leaves bit 63 clear
    (EPT_73, 1, 1 << 11 | 0x36, EntryKind.MISCONFIGURED),
    (EPT_73, 1, 0x34, EntryKind.LEAF),  # execute only
    (ept(execute_only=False), 1, 0x34, EntryKind.MISCONFIGURED),
    (ept(mode_based_execute=True), 1, 0x430, EntryKind.LEAF),
    (ept(mode_based_execute=True, execute_only=False), 1, 0x430, EntryKind.MISCONFIGURED),
    (EPT_73, 1, 0x430, EntryKind.ABSENT),
    (ept(pages_1g=False), 3, 0xB7, EntryKind.MISCONFIGURED),
    (ept(kernel="6.12", accessed_dirty=False), 1, 1 << 54 | 1 << 52 | 1 << 11, EntryKind.ACCESS_TRACKED),
    (arm64_stage2(), 1, 0x7D9, EntryKind.RESERVED),  # a block at the last level
    (arm64_stage2(48), 4, 0x7D9, EntryKind.RESERVED),  # no 512G blocks
    (arm64_stage2(34), 2, 0x7D9, EntryKind.LEAF),
    (arm64_stage2(maxphyaddr=40), 1, 1 << 40 | 0x7DB, EntryKind.RESERVED),
    (arm64_stage2(), 2, 1 << 60, EntryKind.FROZEN),
    (arm64_stage2(kernel="6.12"), 2, 1 << 10, EntryKind.FROZEN),
    (arm64_stage2(kernel="6.12"), 2, 3 << 2, EntryKind.ANNOTATED),
    (arm64_stage2(kernel="6.12"), 1, 1 << 53 | 0x7DB, EntryKind.RESERVED),  # XN is one bit there
    (arm64_stage2(), 1, 1 << 53 | 0x7DB, EntryKind.LEAF),
    (VTD, 1, 0x80, EntryKind.ABSENT),
    (VTD, 2, 0x80_0083, EntryKind.LEAF),
    (VTD, 2, 0x8_0083, EntryKind.RESERVED),
    (vtd_second_stage(superpages=1), 3, 0x83, EntryKind.RESERVED),
    (AMD, 3, 0x6000_0000_0000_0401, EntryKind.TABLE),
    (AMD, 3, 0x6000_0000_0000_0201, EntryKind.RESERVED),  # tables skip no level
    (AMD, 4, 0x6000_0000_0000_0001, EntryKind.LEAF),  # 512G: the manual has it, Linux makes none
    (AMD, 6, 0x6000_0000_0000_0001, EntryKind.RESERVED),
    (AMD, 1, 0x6000_0000_0000_0201, EntryKind.RESERVED),
])  # fmt: skip
def test_kind(fmt: PageFormat, level: int, entry: int, kind: EntryKind) -> None:
    assert classify(fmt, level, entry) is kind
    assert decode(fmt, level, entry).kind is kind


@given(st.integers(13, 38), st.data())
def test_amd_leaves_whose_size_is_in_their_address(order: int, data: st.DataObject) -> None:
    address = data.draw(st.integers(0, (1 << 52 - order) - 1)) << order
    entry = amd_sized_leaf(address, 1 << order, write=False)
    level = 1 + (order - 12) // 9
    decoded = decode(AMD, level, entry)
    assert (decoded.kind, decoded.address, AMD.size_of_leaf(level, entry)) == (EntryKind.LEAF, address, 1 << order)
    assert (decoded.read, decoded.write, decoded.unknown) == (True, False, 0)


HIGH = 0x000F_FF00_0000_0000  # bits 40 to 51


@pytest.mark.parametrize(("fmt", "leaf", "table"), [
    # Reserved bits of leaves of level 1 to 3 and of table entries of level 2 to 5, with 40 address bits.
    (x86_64(5, maxphyaddr=40), (0, 0x1F_E000, 0x3FFF_E000), (0, 0, 0x80, 0x80)),
    (x86_64(5, maxphyaddr=40, amd=True), (0, 0x1F_E000, 0x3FFF_E000), (0, 0, 0x180, 0x180)),
    (x86_64(5, maxphyaddr=40, nx=False), (NX, NX | 0x1F_E000, NX | 0x3FFF_E000), (NX, NX, NX | 0x80, NX | 0x80)),
    (x86_64(5, maxphyaddr=40, pages_1g=False), (0, 0x1F_E000, 0x80), (0, 0x80, 0x80, 0x80)),
    (npt(5, maxphyaddr=40), (0, 0x1F_E000, 0x3FFF_E000), (0, 0, 0x180, 0x180)),
    (ept(5, maxphyaddr=40), (0, 0x1F_F000, 0x3FFF_F000), (0x78, 0x78, 0xF8, 0xF8)),
    (ept(5, maxphyaddr=40, pages_1g=False), (0, 0x1F_F000, 0x3FFF_F080), (0x78, 0xF8, 0xF8, 0xF8)),
])  # fmt: skip
def test_reserved_bits_of_kvms_checker(fmt: PageFormat, leaf: tuple[int, ...], table: tuple[int, ...]) -> None:
    row = [int(word) for word in fmt.row()]
    first = int(W.F_RESERVED_LEAF)
    assert [f"{word:#x}" for word in row[first + 1 : first + 4]] == [f"{HIGH | word:#x}" for word in leaf]
    first = int(W.F_RESERVED_TABLE)
    assert [f"{word:#x}" for word in row[first + 2 : first + 6]] == [f"{HIGH | word:#x}" for word in table]


def test_reserved_bits_of_arm() -> None:
    row = [int(word) for word in arm64_stage2(48, maxphyaddr=40, kernel="6.12").row()]
    beyond = 0x0007_FF00_0000_0000  # 40 to 50
    first = int(W.F_RESERVED_LEAF)
    assert row[first + 1 : first + 4] == [beyond | 1 << 53 | low for low in (0, 0x1F_F000, 0x3FFF_F000)]
    first = int(W.F_RESERVED_TABLE)
    assert row[first + 2 : first + 6] == [beyond] * 4


# --------------------------------------------------------------------------- names


def names(fmt: PageFormat, level: int, entry: int) -> list[tuple[str, str, int]]:
    return decode(fmt, level, entry).names


def test_bits_have_the_names_of_linux_and_the_manuals() -> None:
    assert names(x86_64(), 2, 0x8400_0012_3460_18A5) == [
        ("63", "NX", 1), ("62:59", "PKEY", 0), ("58", "SAVED_DIRTY", 1), ("51:21", "PFN", 0x1234600),
        ("12", "PAT", 1), ("11", "SOFT_DIRTY", 1), ("7", "PSE", 1), ("5", "ACCESSED", 1), ("2", "USER", 1),
        ("0", "PRESENT", 1),
    ]  # fmt: skip
    assert names(EPT_73, 1, 0x80A0_0000_1234_5F75) == [
        ("63", "SUPPRESS_VE", 1), ("55", "MMU_WRITABLE", 1), ("53", "HOST_WRITABLE", 1), ("51:12", "PFN", 0x12345),
        ("11", "MMU_PRESENT", 1), ("10", "XU", 1), ("9", "DIRTY", 1), ("8", "ACCESSED", 1), ("6", "IPAT", 1),
        ("5:3", "MEMTYPE", 6), ("2", "X", 1), ("0", "R", 1),
    ]  # fmt: skip
    assert names(arm64_stage2(), 1, 0x0048_0000_1234_57DB) == [
        ("62:59", "PBHA", 0), ("54:53", "XN", 2), ("51", "DBM", 1), ("47:12", "PFN", 0x12345), ("10", "AF", 1),
        ("9:8", "SH", 3), ("7:6", "S2AP", 3), ("5:2", "MemAttr", 6), ("1", "PAGE", 1), ("0", "VALID", 1),
    ]  # fmt: skip
    assert decode(x86_64(), 1, NX | 0x225).flags == "PRESENT USER ACCESSED SPECIAL NX"


@pytest.mark.parametrize(("fmt", "level", "entry", "nameless"), [
    # Bits that hardware ignores and no kernel uses, of a leaf and of a table. Levels 1, 2 and the top.
    (x86_64(), 1, 0x1, 0x01F0_0000_0000_0000),
    (x86_64(kernel="6.12"), 2, 0x81, 0x01F0_0000_0000_0000),
    (x86_64(), 2, 0x1, 0x7FF0_0000_0000_0700),
    (x86_64(), 4, 0x1, 0x7BF0_0000_0000_0700),
    (npt(maxphyaddr=52), 1, 0x1, 0x7FF0_0000_0000_0000),
    (npt(maxphyaddr=52), 2, 0x1, 0x7FF0_0000_0000_0700),
    (ept(kernel="6.12"), 1, 0x1, 0x4880_0000_0000_0080),
    (ept(kernel="6.12"), 2, 0x1, 0x7FC0_0000_0000_0200),
    (EPT_73, 2, 0x81, 0x6800_0000_0000_0000),
    (arm64_stage2(), 1, 0x3, 0x8000_0000_0000_0000),
    (arm64_stage2(), 2, 0x3, 0xFFF8_0000_0000_0FFC),
])  # fmt: skip
def test_bits_without_a_name(fmt: PageFormat, level: int, entry: int, nameless: int) -> None:
    found = 0
    for bit in range(1, 64):
        with_bit = entry | 1 << bit
        decoded = decode(fmt, level, with_bit)
        if decoded.kind in (EntryKind.LEAF, EntryKind.TABLE) and decoded.kind is classify(fmt, level, entry):
            found |= decoded.unknown
    assert f"{found:#018x}" == f"{nameless:#018x}"


def test_who_executes_on_arm() -> None:
    xnx, xn = arm64_stage2(), arm64_stage2(kernel="6.12")
    for value, executes in ((0b00, (True, True)), (0b01, (False, True)), (0b10, (False, False)), (0b11, (True, False))):
        entry = decode(xnx, 1, value << 53 | 0x7DB)
        assert (entry.execute, entry.execute_user) == executes
    with pytest.raises(ValueError, match="together"):
        xn.encode(1, 0, execute=True, execute_user=False)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("maker", "arguments", "complaint"), [
    (x86_64, {"levels": 3}, "3 levels: expected 4 or 5"),
    (x86_64, {"maxphyaddr": 53}, "53 bits of physical address: expected 13 to 52"),
    (x86_64, {"c_bit": 52}, "encryption bit 52: expected 32 to 51"),
    (arm64_stage2, {"ipa_bits": 31}, "expected 32 to 48"),
    (arm64_stage2, {"ipa_bits": 49}, "expected 32 to 48"),
    (arm64_stage2, {"maxphyaddr": 52}, "expected 13 to 48"),
    (vtd_second_stage, {"superpages": 3}, "superpages 3: expected 0, 1 or 2"),
    (amd_iommu_v1, {"levels": 7}, "7 levels: expected 3 to 6"),
    (amd_iommu_v1, {"levels": 4, "most_levels": 3}, "most_levels 3: expected 4 to 6"),
    (amd_iommu_v1, {"page_sizes": 1 << 21}, "page_sizes 0x200000: expected some of"),
    (vtd_second_stage, {"max_address_mask": 64}, "max_address_mask 64: expected 0 to 63"),
])  # fmt: skip
def test_formats_that_cannot_be(maker: Any, arguments: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        maker(**arguments)


@pytest.mark.parametrize("maker", FORMATS.values(), ids=FORMATS)
def test_an_unknown_kernel_is_a_key_error(maker: Any) -> None:
    assert "kernel" in inspect.signature(maker).parameters
    with pytest.raises(KeyError, match=r"5\.10"):
        maker(kernel="5.10")
    with pytest.raises(KeyError, match=r"5\.10"):
        K.ProcessLeaves("5.10")


@pytest.mark.parametrize(("fmt", "level", "address", "arguments", "complaint"), [
    (x86_64(), 4, 0, {}, "no leaf at level 4: expected 1 to 3"),
    (x86_64(pages_1g=False), 3, 0, {}, "no leaf at level 3: expected 1 to 2"),
    (x86_64(), 2, 0x1000, {}, "0x1000 is not a multiple of 0x200000"),
    (x86_64(maxphyaddr=36), 1, 1 << 36, {}, "at most 36 bits"),
    (x86_64(), 1, 0, {"read": False}, "cannot withhold read"),
    (EPT_73, 1, 0, {"user": False}, "cannot withhold user"),
    (EPT_73, 1, 0, {"global_": True}, "no global bit"),
    (EPT_73, 1, 0, {"key": 1}, "protection key 1: expected 0"),
    (x86_64(), 1, 0, {"key": 16}, "protection key 16: expected 0 to 15"),
    (x86_64(nx=False), 1, 0, {"execute": False}, "execute together or not at all"),
    (x86_64(), 1, 0, {"memory_type": "WBX"}, "memory type 'WBX': expected one of WB, WC, UC-, UC, "),
    (x86_64(), 1, 0, {"extra": 0x202}, "bits 0x2 are reserved or have arguments"),
    (x86_64(maxphyaddr=40), 2, 0, {"extra": 1 << 45 | 1 << 14}, "bits 0x200000004000 are reserved"),
])  # fmt: skip
def test_leaves_that_cannot_be(
    fmt: PageFormat, level: int, address: int, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        fmt.encode(level, address, **arguments)


def test_other_misuse() -> None:
    with pytest.raises(ValueError, match="no tables below level 1"):
        x86_64().table_entry(0, level=1)
    with pytest.raises(ValueError, match="is not a table's address"):
        x86_64().table_entry(0x800)
    with pytest.raises(ValueError, match="level 5: expected 1 to 4"):
        classify(x86_64(), 5, 0)
    with pytest.raises(ValueError, match="expected an entry of 64 bits"):
        decode(x86_64(), 1, 1 << 64)
    with pytest.raises(ValueError, match="caches no MMIO"):
        K.mmio(npt(maxphyaddr=52), 0, 0)
    with pytest.raises(ValueError, match="has no guard pages"):
        P612.guard()
    with pytest.raises(ValueError, match="memory type 'WBX': expected one of WB, WC, UC-, UC, WP, WT"):
        P73.special_pfn(cache="WBX")
    with pytest.raises(ValueError, match="aligned power of two from 8K to 256G"):
        amd_sized_leaf(0x1000, 0x2000)
    with pytest.raises(ValueError, match="swap type 32"):
        K.swap_entry(32, 0)


def test_arm_roots() -> None:
    shapes = {
        size: (arm64_stage2(size).levels, arm64_stage2(size).root_tables) for size in (32, 34, 35, 39, 40, 43, 44, 48)
    }
    assert shapes == {32: (2, 4), 34: (2, 16), 35: (3, 1), 39: (3, 1), 40: (3, 2), 43: (3, 16), 44: (4, 1), 48: (4, 1)}
