"""Pins of ordinary memory: how they count, what they keep, what fork and others do about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x4000_0000
WRITE_BIT, DIRTY_BITS = 1 << 1, 1 << 6 | 1 << 58
READ_WRITE = 3


class Scene:
    """A process of a machine with transparent huge pages, or without."""

    def __init__(self, **parameters: Any) -> None:
        self.machine = Machine(Config(pool=8 * M2, page_size=M2, buddy=16 * M2, **parameters))
        self.machine.check_each()
        self.process: AddressSpace = self.machine.create_process()

    def entry(self, address: int, process: AddressSpace | None = None) -> int:
        return (process or self.process).walk(address)[-1][2]

    def pfn(self, address: int, process: AddressSpace | None = None) -> int:
        level, _, entry = (process or self.process).walk(address)[-1]
        size = 4096 << 9 * (level - 1)
        return (entry & 0xF_FFFF_FFFF_F000 & ~(size - 1)) + (address & size - 1) >> 12

    def references(self, pfn: int) -> int:
        """As folio_ref_count() would say: of 4K pages of memory from what is counted by frame."""
        if pfn >= self.machine.register(W.R_POOL_BASE):
            return int(self.machine.struct_page(pfn)[6]) >> 32
        counts = self.machine.arrays.counts
        word, pins = int(counts[pfn]), int(counts[self.machine.register(W.R_PINNED) + pfn])
        assert bool(word & int(W.PAGE_PINNED)) == bool(pins)
        return (word & int(W.PAGE_MAPPINGS)) + bool(word & int(W.PAGE_CACHED)) + 1024 * pins

    def pins(self, head: int) -> int:
        return int(self.machine.struct_page(head + 1)[3]) >> 32

    def used(self) -> int:
        return self.machine.statistics.gauge(Gauge.FRAMES_USED)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.findings


# --------------------------------------------------------------------------- anonymous memory


def test_a_small_page_gets_1024_references_and_outlives_its_mapping() -> None:
    s = Scene()
    s.process.mmap_anonymous(VA, 8 * PAGE, READ_WRITE)
    s.process.touch(VA, write=True)
    assert s.process.pin(VA, 2 * PAGE, pin=0, write=True) == (0, 2)
    first, second = s.machine.pinned_frames(0).tolist()
    assert [s.references(pfn) for pfn in (first, second)] == [1025, 1025]
    assert s.machine.statistics.event(Event.HOST_FAULT) == 2  # one by the process, one by the pin
    s.sound()
    assert s.process.madvise_dontneed(VA, 2 * PAGE).status == 0
    assert [s.references(pfn) for pfn in (first, second)] == [1024, 1024]
    s.sound()
    s.process.touch(VA, write=True)
    assert s.pfn(VA) not in (first, second)
    before = s.used()
    # The two pages and the node of the pin's list.
    assert s.machine.unpin(0) == (0, 2)
    assert s.used() == before - 3
    s.sound()


@pytest.mark.parametrize("end", ["munmap", "exit"])
def test_a_pinned_page_goes_with_its_last_pin(end: str) -> None:
    s = Scene()
    s.process.mmap_anonymous(VA, PAGE, READ_WRITE)
    for pin in (3, 7):
        assert s.process.pin(VA, PAGE, pin=pin, write=True) == (0, 1)
    pfn = s.pfn(VA)
    assert s.references(pfn) == 2049
    if end == "munmap":
        assert s.process.munmap(VA, PAGE).status == 0
    else:
        assert s.process.exit().status == 0
    s.sound()
    before = s.used()
    assert s.machine.unpin(3) == (0, 1)
    assert (s.references(pfn), s.used()) == (1024, before - 1)
    assert s.machine.unpin(7) == (0, 1)
    assert s.used() == before - 3
    s.sound()


@pytest.mark.parametrize("thp", ["never", "always"])
@pytest.mark.parametrize("longterm", [False, True])
def test_a_read_pin_of_memory_never_written(thp: str, longterm: bool) -> None:
    """The zero page is not counted; for long it is made a page of its own: read-only and clean, as FAULT_FLAG_UNSHARE
    leaves it (of 2M from 6.13 on do_huge_zero_wp_pmd() makes it writable)."""
    s = Scene(thp=thp)
    s.process.mmap_anonymous(VA, M2, READ_WRITE)
    assert s.process.pin(VA, 2 * PAGE, pin=0, longterm=longterm) == (0, 2)
    entry = s.entry(VA)
    small = thp == "never"
    if not longterm:
        zero = s.machine.register(W.R_ZERO_FRAME if small else W.R_HUGE_ZERO_FRAME)
        assert s.machine.pinned_frames(0).tolist() == ([zero, zero] if small else [zero, zero + 1])
    elif small:
        assert s.references(s.pfn(VA)) == 1025
        assert entry & (WRITE_BIT | DIRTY_BITS) == 0
        pfn = s.pfn(VA)
        s.process.touch(VA, write=True)  # it is this mapping's alone: no copy
        assert s.pfn(VA) == pfn
    else:
        assert (s.references(s.pfn(VA)), s.pins(s.pfn(VA))) == (3, 2)
        assert entry & WRITE_BIT
    s.sound()
    assert s.machine.unpin(0) == (0, 2)
    s.sound()


def test_a_pin_of_a_page_shared_after_fork_makes_it_the_mappings_own() -> None:
    s = Scene()
    s.process.mmap_anonymous(VA, 2 * PAGE, READ_WRITE)
    s.process.touch(VA, write=True)
    s.process.touch(VA + PAGE, write=True)
    old = [s.pfn(VA), s.pfn(VA + PAGE)]
    child = s.process.fork()
    assert child.pin(VA, PAGE, pin=0) == (0, 1)
    assert child.pin(VA + PAGE, PAGE, pin=1, write=True) == (0, 1)
    assert s.pfn(VA) == old[0]
    assert s.pfn(VA, child) != old[0]
    assert s.entry(VA, child) & (WRITE_BIT | DIRTY_BITS) == 0
    assert s.entry(VA + PAGE, child) & WRITE_BIT
    s.sound()
    # The parent's is the only mapping left: it is reused, nothing is copied.
    copied = s.machine.statistics.event(Event.PAGE_COPIED)
    assert s.process.pin(VA, PAGE, pin=2) == (0, 1)
    assert s.pfn(VA) == old[0]
    assert s.machine.statistics.event(Event.PAGE_COPIED) == copied
    s.sound()


def test_fork_copies_what_is_pinned_and_only_that() -> None:
    s = Scene()
    s.process.mmap_anonymous(VA, 3 * PAGE, READ_WRITE)
    for i in range(3):
        s.process.touch(VA + i * PAGE, write=True)
        s.machine.arrays.ram[s.pfn(VA + i * PAGE) * 512] = 77 + i
    assert s.process.pin(VA + PAGE, PAGE, pin=0, write=True) == (0, 1)
    child = s.process.fork()
    same = [s.pfn(VA + i * PAGE) == s.pfn(VA + i * PAGE, child) for i in range(3)]
    assert same == [True, False, True]
    assert [bool(s.entry(VA + i * PAGE) & WRITE_BIT) for i in range(3)] == [False, True, False]
    assert [bool(s.entry(VA + i * PAGE, child) & WRITE_BIT) for i in range(3)] == [False, True, False]
    assert [int(s.machine.arrays.ram[s.pfn(VA + i * PAGE, child) * 512]) for i in range(3)] == [77, 78, 79]
    s.sound()
    assert s.machine.unpin(0).status == 0
    again = s.process.fork()
    assert s.pfn(VA + PAGE, again) == s.pfn(VA + PAGE)
    s.sound()


# --------------------------------------------------------------------------- transparent huge pages


def test_a_huge_page_counts_pages_and_keeps_whole_what_is_pinned() -> None:
    s = Scene(thp="always")
    s.process.mmap_anonymous(VA, M2, READ_WRITE)
    assert s.process.pin(VA + 5 * PAGE, 100 * PAGE, pin=0, write=True) == (0, 100)
    head = s.pfn(VA)
    assert (s.references(head), s.pins(head)) == (101, 100)
    assert s.machine.pinned_frames(0).tolist() == list(range(head + 5, head + 105))
    s.sound()
    assert s.process.madvise_dontneed(VA, M2).status == 0
    assert (s.references(head), s.pins(head)) == (100, 100)
    s.sound()
    s.process.touch(VA, write=True)
    assert s.pfn(VA) != head
    free = s.machine.statistics.gauge(Gauge.BUDDY_BLOCKS)
    assert s.machine.unpin(0) == (0, 100)
    assert s.machine.statistics.gauge(Gauge.BUDDY_BLOCKS) == free + 1
    s.sound()


def test_fork_splits_and_copies_a_pinned_huge_page() -> None:
    s = Scene(thp="always")
    s.process.mmap_anonymous(VA, M2, READ_WRITE)
    assert s.process.pin(VA, PAGE, pin=0, write=True) == (0, 1)
    head = s.pfn(VA)
    child = s.process.fork()
    assert s.machine.statistics.event(Event.PAGE_COPIED) == 512  # folio_maybe_dma_pinned() is the folio's
    assert s.process.walk(VA)[-1][0] == child.walk(VA)[-1][0] == 1
    assert s.pfn(VA + 7 * PAGE) == head + 7
    assert (s.references(head), s.pins(head)) == (513, 1)
    s.sound()


def test_pinned_pages_are_not_collapsed() -> None:
    s = Scene(thp="always")
    s.process.mmap_anonymous(VA, M2, READ_WRITE)
    s.process.madvise_nohugepage(VA, M2)
    s.process.populate(VA, M2, write=True)
    s.process.madvise_hugepage(VA, M2)
    assert s.process.pin(VA, PAGE, pin=0, write=True) == (0, 1)
    assert s.process.madvise_collapse(VA, M2).status == -W.EAGAIN
    assert s.machine.unpin(0).status == 0
    assert s.process.madvise_collapse(VA, M2).status == 0
    s.sound()


# --------------------------------------------------------------------------- files, HugeTLB


@pytest.mark.parametrize("shared", [True, False])
def test_a_hugetlb_page_outlives_its_file_and_its_mapping(shared: bool) -> None:
    s = Scene()
    s.process.mmap_hugetlb(VA, 2 * M2, READ_WRITE, page_size=M2, shared=shared)
    assert s.process.pin(VA + M2 // 2, M2, pin=0, write=True) == (0, 512)
    head = s.pfn(VA)
    # What maps it, the 512 of its page cache, and the pins of half of it.
    assert (s.references(head), s.pins(head)) == (1 + 512 * shared + 256, 256)
    s.sound()
    assert s.process.munmap(VA, 2 * M2).status == 0
    assert s.references(head) == 256
    s.sound()
    free = s.machine.hugetlb(M2).free_hugepages
    assert s.machine.unpin(0) == (0, 512)
    assert s.machine.hugetlb(M2).free_hugepages == free + 2
    s.sound()


def test_fork_copies_a_pinned_private_hugetlb_page_or_fails() -> None:
    s = Scene()
    s.process.mmap_hugetlb(VA, M2, READ_WRITE, page_size=M2, shared=False)
    assert s.process.pin(VA, M2, pin=0, write=True) == (0, 512)
    child = s.process.fork()
    assert s.pfn(VA, child) != s.pfn(VA)
    assert s.entry(VA) & s.entry(VA, child) & WRITE_BIT
    s.sound()
    # The other six free pages go elsewhere: nothing is left for one more copy.
    s.process.mmap_hugetlb(VA + W.PAGE_1G, 6 * M2, READ_WRITE, page_size=M2, shared=False)
    with pytest.raises(OSError, match="fork") as error:
        s.process.fork()
    assert error.value.errno == W.ENOSPC
    s.sound()


@pytest.mark.parametrize("kind", ["4K", "2M", "hugetlb"])
def test_fork_copies_what_is_pinned_where_nobody_may_access_it(kind: str) -> None:
    """The copy's entry has its frame inverted, as its parent's has: pgtable-invert.h."""
    s = Scene(thp="always" if kind == "2M" else "never")
    if kind == "hugetlb":
        s.process.mmap_hugetlb(VA, M2, READ_WRITE, page_size=M2, shared=False)
    else:
        s.process.mmap_anonymous(VA, M2, READ_WRITE)
    s.process.touch(VA, write=True)
    assert s.process.pin(VA, PAGE, pin=0, write=True) == (0, 1)
    assert s.process.protect(VA, M2, 0).status == 0
    before = s.entry(VA)
    child = s.process.fork()
    s.sound()
    assert [s.entry(VA, process) >> 51 & 1 for process in (s.process, child)] == [1, 1]
    for process in (s.process, child):
        assert process.protect(VA, M2, READ_WRITE).status == 0
    assert s.pfn(VA) != s.pfn(VA, child)
    assert 0 < s.pfn(VA, child) < s.machine.register(W.R_POOL_BASE) + s.machine.register(W.R_GUEST_PAGES)
    assert before & 0x101 == 0x100
    s.sound()


@pytest.mark.parametrize("kind", ["shmem", "guest_memfd"])
def test_a_page_of_a_file_outlives_the_hole(kind: str) -> None:
    s = Scene()
    if kind == "shmem":
        s.process.mmap_anonymous(VA, 4 * PAGE, READ_WRITE, shared=True)
    else:
        file = s.machine.create_guest_memfd_4k(4 * PAGE)
        assert s.process.mmap(file, VA).status == 0
    assert s.process.pin(VA, 2 * PAGE, pin=0, write=True, longterm=True) == (0, 2)
    pfn = s.pfn(VA)
    assert s.references(pfn) == 1026
    s.sound()
    if kind == "guest_memfd":
        assert file.punch_hole(0, 4 * PAGE).status == 0
    assert s.process.munmap(VA, 4 * PAGE).status == 0
    assert s.references(pfn) == 1024 + (kind == "guest_memfd") * 0
    s.sound()
    assert s.machine.unpin(0) == (0, 2)
    s.sound()


# --------------------------------------------------------------------------- what is refused


def test_what_cannot_be_pinned() -> None:
    s = Scene()
    s.process.mmap_anonymous(VA, PAGE, 1)
    s.process.mmap_anonymous(VA + PAGE, PAGE, 0)
    s.process.mmap_anonymous(VA + 2 * PAGE, 2 * PAGE, READ_WRITE)
    device = s.machine.create_device(1 << 30, 4)
    s.process.mmap_device(device, VA + M2, 4 * PAGE, READ_WRITE)
    assert s.process.pin(VA, PAGE, pin=0, write=True) == (-W.EFAULT, 0)
    assert s.process.pin(VA, 2 * PAGE, pin=0) == (0, 1)
    assert s.process.pin(VA + PAGE, PAGE, pin=1) == (-W.EFAULT, 0)
    assert s.process.pin(VA + 2 * PAGE, 4 * PAGE, pin=1, write=True) == (0, 2)
    for touched in (False, True):
        if touched:
            s.process.touch(VA + M2)
        assert s.process.pin(VA + M2, PAGE, pin=2, longterm=touched) == (-W.EFAULT, 0)
    s.sound()


def test_a_count_at_its_end_refuses() -> None:
    """try_grab_folio() takes no reference of a folio whose count is negative: 2^31 / 1024 pins, less the mapping."""
    s = Scene()
    s.process.mmap_anonymous(VA, PAGE, READ_WRITE)
    s.process.touch(VA, write=True)
    at = s.machine.register(W.R_PINNED) + s.pfn(VA)
    s.machine.arrays.counts[s.pfn(VA)] |= np.uint32(W.PAGE_PINNED)
    s.machine.arrays.counts[at] = (1 << 21) - 1
    assert s.process.pin(VA, PAGE, pin=0) == (0, 1)
    assert s.process.pin(VA, PAGE, pin=1) == (-W.ENOMEM, 0)
