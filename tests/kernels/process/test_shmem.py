"""Shared anonymous memory, execute-only mappings, and several mappings that move at once."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA, TO = 0x7C00_0000_3000, 0x7C40_0000_3000
AROUND = 16


def mapped(process, pages: range) -> set[int]:  # type: ignore[no-untyped-def]
    """Which pages from VA on have an entry."""
    return {
        page
        for page in pages
        if process.walk(VA + page * PAGE)[-1][2] & 1 and process.walk(VA + page * PAGE)[-1][0] == 1
    }


@settings(max_examples=30, deadline=None)
@given(cached=st.sets(st.integers(0, 63)), asked=st.integers(0, 63))
def test_a_read_fault_maps_what_is_cached_around(cached: set[int], asked: int) -> None:
    """mm/memory.c:do_fault_around(): 16 pages from the aligned 64K, or the mapping's start, on."""
    machine = Machine(Config("restructure", pool=M2, page_size=M2))
    process = machine.create_process()
    assert process.mmap_anonymous(VA, 64 * PAGE, shared=True).status == 0
    for page in cached:
        process.touch(VA + page * PAGE, write=True)
    assert process.madvise_dontneed(VA, 64 * PAGE).status == 0
    assert mapped(process, range(64)) == set()
    process.touch(VA + asked * PAGE)
    index = (VA >> 12) + asked
    first = max(index & ~(AROUND - 1), VA >> 12) - (VA >> 12)
    window = range(first, min(first + AROUND, 64))
    assert mapped(process, range(64)) == {page for page in window if page in cached} | {asked}
    for page in mapped(process, range(64)):
        entry = process.walk(VA + page * PAGE)[-1][2]
        assert bool(entry & bits.DIRTY) == (page in cached), page
    assert machine.check() == 0


def test_a_child_sees_what_its_parent_wrote() -> None:
    machine = Machine(Config("restructure", pool=M2, page_size=M2))
    process = machine.create_process()
    assert process.mmap_anonymous(VA, 4 * PAGE, shared=True, populate=True).status == 0
    child = process.fork()
    child.touch(VA)
    assert child.walk(VA)[-1][2] & bits.ADDRESS == process.walk(VA)[-1][2] & bits.ADDRESS
    assert process.munmap(VA, 4 * PAGE).status == child.munmap(VA, 4 * PAGE).status == 0
    assert machine.check() == 0
    assert machine.statistics.gauge(W.Gauge.PAGE_CACHE_PAGES) == 0


def test_execute_only_memory_has_a_key_that_lets_no_data_through() -> None:
    """arch/x86/mm/pkeys.c: a processor without keys can read what it may execute."""
    for keys in (True, False):
        machine = Machine(Config("restructure", pool=M2, page_size=M2, protection_keys=keys))
        process = machine.create_process()
        assert process.mmap_anonymous(VA, PAGE, 7, populate=True).status == 0
        assert process.protect(VA, PAGE, 4).status == 0
        assert process.walk(VA)[-1][2] & bits.PROTECTION_KEY == (bits.EXECUTE_ONLY_KEY if keys else 0)
        assert process.touch(VA, execute=True).status == 0
        assert process.touch(VA).status == (W.VM_FAULT_SIGSEGV if keys else 0)
        assert process.protect(VA, PAGE, 3).status == 0
        assert process.walk(VA)[-1][2] & bits.PROTECTION_KEY == 0
        assert process.touch(VA, write=True).status == 0


@settings(max_examples=30, deadline=None)
@given(rights=st.lists(st.sampled_from([0, 1, 3, None]), min_size=8, max_size=8), start=st.integers(0, 7))
def test_mremap_moves_every_mapping_of_a_range(rights: list[int | None], start: int) -> None:
    """mm/mremap.c:remap_move() since 6.17: as one call for each would; a range that begins with a gap is refused."""
    machine = Machine(Config("restructure", pool=M2, page_size=M2))
    one, many = machine.create_process(), machine.create_process()
    for process in (one, many):
        for page, prot in enumerate(rights):
            if prot is not None:
                process.mmap_anonymous(VA + page * PAGE, PAGE)
                process.touch(VA + page * PAGE, write=True)
                process.protect(VA + page * PAGE, PAGE, prot)
    length = 8 - start
    status = many.remap(VA + start * PAGE, length * PAGE, length * PAGE, TO + start * PAGE).status
    assert status == (-W.EFAULT if rights[start] is None else 0)
    if status == 0:
        for page in range(start, 8):
            if rights[page] is not None:
                assert one.remap(VA + page * PAGE, PAGE, PAGE, TO + page * PAGE).status == 0
    for page in range(8):
        for base in (VA, TO):
            entries = [process.walk(base + page * PAGE)[-1][2] & ~bits.ADDRESS for process in (one, many)]
            assert entries[0] == entries[1], (page, hex(base))
    assert machine.check() == 0


def test_a_private_huge_page_is_its_mapping_s_alone_until_fork() -> None:
    """PageAnonExclusive: set at the first fault and when a page is reused, cleared by fork and when it is freed."""
    exclusive = 1 << 11
    machine = Machine(Config("restructure", pool=4 * M2, page_size=M2))
    process = machine.create_process()
    assert process.mmap_hugetlb(VA - 0x3000, M2, shared=False).status == 0
    process.touch(VA, write=True)
    pfn = (process.walk(VA)[-1][2] & bits.ADDRESS) >> 12

    def flagged() -> bool:
        return bool(int(machine.struct_page(pfn)[0]) & exclusive)

    assert flagged()
    child = process.fork()
    assert not flagged()
    child.touch(VA, write=True)  # a copy, the page is the parent's alone again, which its next write finds out
    assert not flagged()
    process.touch(VA, write=True)
    assert flagged()
    process.munmap(VA - 0x3000, M2)
    assert not flagged()
