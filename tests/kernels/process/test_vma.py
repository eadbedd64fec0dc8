"""VMAs of anonymous memory: which flags mmap, mprotect, fork and mremap leave, and which neighbours merge.

VM_ACCOUNT is the only flag that a change of rights moves (mm/mprotect.c:mprotect_fixup()), and VMAs that differ in it
stay two (mm/vma.c:is_mergeable_vma(), anon_vma_compatible()).
"""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
BASE = 0x2000_4000_0000
NONE, READ, RW = 0, 1, 3
ACCOUNT, NORESERVE, SHARED = int(W.VM_ACCOUNT), int(W.VM_NORESERVE), int(W.VM_SHARED)


def make(kernel: str = "6.18") -> AddressSpace:
    return Machine(Config("restructure", pool=4 * M2, page_size=M2, kernel=kernel)).create_process()


def vmas(process: AddressSpace) -> list[tuple[int, int, int, int]]:
    """Start and end in pages from BASE, rights and flags of a process's VMAs, in order."""
    state = process.machine.arrays.state
    rows = state[int(W.STATE_VMAS) :][: W.VMAS * W.A_WORDS].reshape(-1, W.A_WORDS)
    words = (W.A_LIVE, W.A_SPACE, W.A_START, W.A_END, W.A_PROT, W.A_FLAGS)
    found = [tuple(int(row[word]) for word in words) for row in rows]
    mine = sorted(row[2:] for row in found if row[:2] == (1, process.space))
    return [((start - BASE) // PAGE, (end - BASE) // PAGE, prot, flags) for start, end, prot, flags in mine]


def test_a_table_stays_where_two_vmas_differ_in_what_they_are_counted() -> None:
    """The lower VMA was never written and lost VM_ACCOUNT with its rights, the upper one was and kept it."""
    process = make()
    process.mmap_anonymous(BASE, 4 * M2)
    process.touch(BASE)
    process.protect(BASE + 3 * M2, PAGE, NONE)
    process.touch(BASE + 3 * M2 + PAGE, write=True)
    process.protect(BASE, 4 * M2, NONE)
    assert vmas(process) == [(0, 1537, NONE, 0), (1537, 2048, NONE, ACCOUNT)]
    before = process.table_pages
    assert process.madvise_dontneed(BASE + 3 * M2, M2).status == 0
    assert process.table_pages == before
    assert vmas(process) == [(0, 1537, NONE, 0), (1537, 2048, NONE, ACCOUNT)]
    assert process.machine.check() == 0


MMAP = [
    # rights, options, flags: mm/vma.c:accountable_mapping(), private and writable
    (NONE, {}, 0),
    (READ, {}, 0),
    (RW, {}, ACCOUNT),
    (RW, {"noreserve": True}, NORESERVE),
]


@pytest.mark.parametrize(("prot", "options", "flags"), MMAP)
def test_mmap_counts_what_is_private_and_writable(prot: int, options: dict[str, Any], flags: int) -> None:
    process = make()
    process.mmap_anonymous(BASE, PAGE, prot, **options)
    assert vmas(process) == [(0, 1, prot, flags)]
    # do_mmap() and mprotect_fixup() come to the same: VM_NORESERVE is never counted.
    process.protect(BASE, PAGE, RW)
    assert vmas(process) == [(0, 1, RW, flags or ACCOUNT)]
    process.protect(BASE, PAGE, prot)
    assert vmas(process) == [(0, 1, prot, flags)]


def test_what_was_written_stays_counted() -> None:
    process = make()
    process.mmap_anonymous(BASE, PAGE)
    process.touch(BASE)
    process.protect(BASE, PAGE, READ)
    assert vmas(process) == [(0, 1, READ, 0)]  # the zero page needs no anon_vma
    process.protect(BASE, PAGE, RW)
    process.touch(BASE, write=True)
    process.protect(BASE, PAGE, READ)
    assert vmas(process) == [(0, 1, READ, ACCOUNT)]
    process.mmap_anonymous(BASE + PAGE, PAGE, READ)
    assert vmas(process) == [(0, 1, READ, ACCOUNT), (1, 2, READ, 0)]
    process.protect(BASE, 2 * PAGE, RW)
    assert vmas(process) == [(0, 2, RW, ACCOUNT)]


def test_huge_pages_and_shared_memory_are_never_counted() -> None:
    process = make()
    process.mmap_hugetlb(BASE, M2, RW, shared=False, noreserve=True)
    process.mmap_hugetlb(BASE + M2, M2, RW, shared=True, noreserve=True)
    device = process.machine.create_device(8 << 18, 1)
    process.mmap_device(device, BASE + 2 * M2, PAGE, RW)
    kinds = [NORESERVE, NORESERVE | SHARED, SHARED | int(W.VM_PFNMAP)]
    assert [vma[3] for vma in vmas(process)] == kinds
    for prot in (READ, RW):
        process.protect(BASE, 2 * M2 + PAGE, prot)
        assert [vma[3] for vma in vmas(process)] == kinds


def test_neighbours_that_differ_in_it_share_no_anon_vma() -> None:
    """mm/vma.c:reusable_anon_vma(). A guard needs an anon_vma without a right to write: for good it is another one."""
    process = make()
    process.mmap_anonymous(BASE, 2 * PAGE)
    process.protect(BASE + PAGE, PAGE, NONE)
    process.touch(BASE, write=True)
    assert process.guard_install(BASE + PAGE, PAGE).status == 0
    process.protect(BASE + PAGE, PAGE, RW)
    assert vmas(process) == [(0, 1, RW, ACCOUNT), (1, 2, RW, ACCOUNT)]


def test_neighbours_that_do_not_share_one_and_are_one_later() -> None:
    process = make()
    process.mmap_anonymous(BASE, 2 * PAGE)
    process.protect(BASE + PAGE, PAGE, READ | int(W.PROT_WRITE) | int(W.PROT_EXEC))
    process.touch(BASE, write=True)
    process.touch(BASE + PAGE, write=True)
    process.protect(BASE + PAGE, PAGE, RW)
    assert vmas(process) == [(0, 2, RW, ACCOUNT)]


def test_fork_and_mremap_keep_it() -> None:
    """kernel/fork.c:dup_mmap(). mm/mremap.c conceals it for the munmap() of the old place only."""
    process = make()
    process.mmap_anonymous(BASE, 4 * PAGE)
    process.touch(BASE, write=True)
    process.protect(BASE, 4 * PAGE, READ)
    assert vmas(process.fork()) == [(0, 4, READ, ACCOUNT)]
    assert process.remap(BASE + PAGE, PAGE, 2 * PAGE, BASE + M2).status == 0
    assert vmas(process) == [(0, 1, READ, ACCOUNT), (2, 4, READ, ACCOUNT), (512, 514, READ, ACCOUNT)]


@pytest.mark.parametrize(("kernel", "one"), [("6.12", False), ("6.18", True), ("7.3", True)])
def test_a_written_vma_joins_one_that_was_not(kernel: str, one: bool) -> None:
    """Before 6.16 is_mergeable_anon_vma() asked for one link in the neighbour's chain, which an empty one has not."""
    process = make(kernel)
    process.mmap_anonymous(BASE, 2 * PAGE)
    process.protect(BASE + PAGE, PAGE, READ)
    process.touch(BASE, write=True)
    process.protect(BASE, PAGE, READ)
    assert [vma[:2] for vma in vmas(process)] == [(0, 1), (1, 2)]  # counted, and not
    process.protect(BASE + PAGE, PAGE, RW)
    process.protect(BASE, PAGE, RW)
    assert [vma[:2] for vma in vmas(process)] == ([(0, 2)] if one else [(0, 1), (1, 2)])


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_a_vma_that_was_not_written_joins_one_that_was(kernel: str) -> None:
    process = make(kernel)
    process.mmap_anonymous(BASE, PAGE)
    process.touch(BASE, write=True)
    process.mmap_anonymous(BASE + PAGE, PAGE)
    assert vmas(process) == [(0, 2, RW, ACCOUNT)]
    process.protect(BASE + PAGE, PAGE, READ)  # with the anon_vma that it has now
    process.protect(BASE + PAGE, PAGE, RW)
    assert vmas(process) == [(0, 2, RW, ACCOUNT)]
