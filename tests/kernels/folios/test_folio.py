"""struct pages word by word: as captured for free HugeTLB folios, and as mappings and splits change them."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

M2 = W.PAGE_2M
G1 = W.PAGE_1G
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
NODE_AND_ZONE = dict.fromkeys(("6.12", "6.18", "7.3"), 0x0017_FFFF_C000_0000)
ALL = 0xFFFF_FFFF_FFFF_FFFF
LOW = 0xFFFF_FFFF
TAIL_MAPPING = 0xDEAD_0000_0000_0400
HUGETLB = 0xF400_0000
FREED, OPTIMIZED = 1 << 3, 1 << 4
UPTODATE, HEAD = 1 << 3, 1 << 6


def words(machine: Machine, pfn: int) -> list[int]:
    return [int(word) for word in machine.struct_page(pfn)]


def machine_of(design: str, page_size: int = M2, pages: int = 1, **parameters: Any) -> Machine:
    return Machine(Config(design, pool=pages * page_size, page_size=page_size, **parameters))  # type: ignore[arg-type]


def compound_info(kernel: str, head: int, order: int) -> int:
    """Of a tail: the mask that gives the head from its own address (7.1 and later), or the head's address."""
    if kernel == "7.3":
        return {9: 0xFFFF_FFFF_FFFF_8001, 18: 0xFFFF_FFFF_FF00_0001}[order]
    return VMEMMAP + 64 * head | 1


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize(("page_size", "order"), [(M2, 9), (G1, 18)])
def test_free_folio(kernel: str, page_size: int, order: int) -> None:
    """The words that Debian's 7.3.4, 6.18.15 and 6.12.107 showed, stale ones included."""
    machine = machine_of("restructure", page_size, kernel=kernel)
    head = machine.register(W.R_POOL_BASE)
    flags = NODE_AND_ZONE[kernel]
    compound = compound_info(kernel, head, order)
    first = words(machine, head)
    assert first[0] == flags | HEAD
    assert first[1] == first[2] >= W.HSTATES_ADDRESS  # the only one of its free list
    assert first[3:] == [0, 0, FREED | OPTIMIZED, HUGETLB, 0]
    # Large and entire mapcount -1, pincount and pages mapped 0; 6.12 has them the other way round, no MM ids,
    # and the number of pages in word 4.
    counts = [ALL, 0, 1 << order, 0, LOW, 0] if kernel == "6.12" else [LOW, LOW, ALL, 0, LOW, 1 << order]
    assert words(machine, head + 1) == [flags | order, compound, *counts]

    def tail(page: int) -> list[int]:
        return [flags, compound, VMEMMAP + 64 * page + 8, TAIL_MAPPING, 0, 0, LOW, 0]

    if kernel == "6.12":  # page 2: the subpool and the cgroup, none while the folio is free
        assert words(machine, head + 2) == [flags, compound, 0, 0, 0, 0, LOW, 0]
        assert words(machine, head + 3) == tail(head + 3)
    else:  # page 2: an empty list at byte 144; page 3: the subpool and the cgroup
        link = VMEMMAP + 64 * head + 144
        assert words(machine, head + 2) == [flags, compound, link, link, 0, 0, LOW, 0]
        assert words(machine, head + 3) == [flags, compound, 0, 0, 0, 0, LOW, 0]
    for page in (4, 63):
        assert words(machine, head + page) == tail(head + page)
    if kernel == "7.3":
        for page in (64, 65, 128, (1 << order) - 1):
            expected = [0x10 << 48, compound, 0, TAIL_MAPPING, 0, 0, LOW, 0]
            if order == 18:  # what the boot allocator's page showed last: the end of the zone's first 128 MiB
                expected = [*tail(head + 0x8000 - 64 + page % 64)[:6], 1 << 32 | LOW, 0]
            assert words(machine, head + page) == expected, page


def test_stale_words_without_deferred_initialisation() -> None:
    """The captured kernel without CONFIG_DEFERRED_STRUCT_PAGE_INIT: those of the last 1G page's end."""
    machine = machine_of("restructure", G1, 2, configuration="small")
    head = machine.register(W.R_POOL_BASE)
    zone = 0x4000_0000_0000_0000
    compound = compound_info("7.3", head, 18)
    assert words(machine, head)[:1] + words(machine, head + 3) == [
        zone | HEAD, zone, compound, 0, TAIL_MAPPING, 0, 0, LOW, 0,
    ]  # fmt: skip
    for page in (64, 200, (1 << 19) - 5):
        stale = VMEMMAP + 64 * (head + (1 << 19) - 64 + page % 64) + 8
        assert words(machine, head + page) == [zone, compound, stale, TAIL_MAPPING, 0, 0, 1 << 32 | LOW, 0]


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_tails_show_the_heads_page_again_before_7_1(kernel: str) -> None:
    """The fake heads: struct page 64 k of an optimised folio is the head."""
    machine = machine_of("restructure", kernel=kernel)
    head = machine.register(W.R_POOL_BASE)
    for page in (0, 1, 2, 40):
        assert words(machine, head + 64 + page) == words(machine, head + page)


def test_without_hvo_every_tail_is_its_own() -> None:
    machine = machine_of("restructure", hvo=False)
    head = machine.register(W.R_POOL_BASE)
    assert words(machine, head)[5] == FREED
    stale = VMEMMAP + 64 * (head + 64) + 8
    flags = NODE_AND_ZONE["7.3"]
    assert words(machine, head + 64) == [flags, 0xFFFF_FFFF_FFFF_8001, stale, TAIL_MAPPING, 0, 0, LOW, 0]


# --------------------------------------------------------------------------- in use


def mapped(design: str, **parameters: Any) -> tuple[Machine, GuestMemfd, AddressSpace]:
    """A shared 2M page mapped by a process, nothing touched."""
    machine = machine_of(design, **parameters)
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    return machine, gmem, process


@pytest.mark.parametrize("design", DESIGNS)
def test_folio_in_the_page_cache(design: str) -> None:
    """One reference per base page, the mapping and index of the inode, up to date; the flag `freed` is gone."""
    machine = machine_of(design, pages=2)
    gmem = machine.create_guest_memfd(2 * M2)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    vm.touch(M2)
    head = gmem.pfn(M2)
    assert head is not None
    page = words(machine, head)
    assert page[0] == NODE_AND_ZONE["7.3"] | HEAD | UPTODATE
    assert page[3] != 0
    assert page[4:] == [512, OPTIMIZED, 512 << 32 | HUGETLB, 0]
    gmem.punch_hole(M2, M2)
    assert words(machine, head)[3:] == [0, 512, FREED | OPTIMIZED, HUGETLB, 0]  # the index stays, as captured
    assert words(machine, head)[0] == NODE_AND_ZONE["7.3"] | HEAD


def test_pfnmap_mappings_touch_no_struct_page() -> None:
    machine, gmem, process = mapped("pfnmap")
    process.touch(VA)
    head = gmem.pfn(0)
    assert head is not None
    before = [words(machine, head + page) for page in range(512)]
    process.touch(VA + 5 * PAGE)
    process.zap(VA, M2)
    assert [words(machine, head + page) for page in range(512)] == before
    assert before[0][6] == 512 << 32 | HUGETLB


def test_restructure_mappings_count() -> None:
    """A 4K folio: reference and mapcount rise and fall with each process's entry."""
    machine, gmem, process = mapped("restructure")
    other = machine.create_process()
    other.mmap(gmem, VA)
    process.touch(VA)
    pfn = (gmem.pfn(0) or 0) + 5
    assert words(machine, pfn)[6] == 1 << 32 | LOW  # page cache only; mapcount -1
    process.touch(VA + 5 * PAGE)
    assert words(machine, pfn)[6] == 2 << 32
    other.touch(VA + 5 * PAGE)
    assert words(machine, pfn)[6] == 3 << 32 | 1
    process.zap(VA, M2)
    assert words(machine, pfn)[6] == 2 << 32
    other.munmap(VA, M2)
    assert words(machine, pfn)[6] == 1 << 32 | LOW
    assert machine.check() == 0


def test_transient_references_count_on_the_folio() -> None:
    """On the page itself where it is a folio, else on the head."""
    machine = machine_of("restructure", pages=2)
    gmem = machine.create_guest_memfd(2 * M2)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    gmem.convert(0, PAGE, shared=True)
    for block in (0, M2):
        vm.touch(block)
    split, whole = (gmem.pfn(block) or 0 for block in (0, M2))
    for offset in (7 * PAGE, M2 + 7 * PAGE):
        assert gmem.get_reference(offset).status == 0
    assert words(machine, split + 7)[6] == 2 << 32 | LOW
    assert words(machine, split)[6] == 1 << 32 | LOW
    assert words(machine, whole)[6] == 513 << 32 | HUGETLB
    for pfn in (split + 7, whole + 7):
        assert gmem.put_reference(pfn).status == 0
        assert gmem.put_reference(pfn).status == -W.ENOENT
    assert words(machine, whole)[6] == 512 << 32 | HUGETLB
    assert machine.check() == 0


def test_the_reference_of_a_mapping_is_not_the_callers_to_drop() -> None:
    machine, gmem, process = mapped("restructure")
    process.touch(VA)
    assert gmem.put_reference(gmem.pfn(0) or 0).status == -W.ENOENT
    assert words(machine, gmem.pfn(0) or 0)[6] == 2 << 32
    assert machine.check() == 0
