"""guest_memfd_test: what the file itself does, before any conversion.

Upstream it runs on files of four 4K pages, made with each set of flags that the kernel has. Here a file has four of the
allocator's pages, and of large ones a few 4K pages stand for all: those at both ends and in the middle of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from conformance.harness import GPA, HVA, PAGE, Scene, case
from pgemu.machine.boot import node_word
from pgemu.objects.guest_memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, CreateFlags, GuestMemfd, Rfc2Flags
from pgemu_kernels import words as W

SOURCE = "guest_memfd_test"
KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
NODE_0, NODE_1 = (0,), (1,)


def flag_sets(t: Scene) -> tuple[int, int, int]:
    """A file that cannot be mapped, one that can and is private, one that can and is shared."""
    if t.variant.form == "rfc2":
        huge = Rfc2Flags.HUGETLB if t.variant.size != "4K" else Rfc2Flags(0)
        return (
            int(huge),
            int(huge | Rfc2Flags.SUPPORT_SHARED | Rfc2Flags.INIT_PRIVATE),
            int(huge | Rfc2Flags.SUPPORT_SHARED),
        )
    return 0, int(CreateFlags.MMAP), int(CreateFlags.MMAP | CreateFlags.INIT_SHARED)


def create(t: Scene, size: int, flags: int) -> GuestMemfd:
    return t.machine.create_guest_memfd(size, flags=flags, form=t.variant.form)


@contextmanager
def opened(t: Scene, flags: int, pages: int = 4) -> Iterator[GuestMemfd]:
    """A file of some of the allocator's pages, closed in the end."""
    gmem = create(t, pages * t.test_page_size, flags)
    yield gmem
    assert gmem.close().status == 0


def all_files(t: Scene) -> Iterator[GuestMemfd]:
    """A file of four pages with each set of flags, one after the other."""
    t.boot(4 * t.test_page_size)
    for flags in flag_sets(t):
        with opened(t, flags) as gmem:
            yield gmem


def shared_file(t: Scene, pages: int = 4) -> None:
    """Four pages, all shared, mapped at HVA."""
    t.set_up(pages * t.test_page_size, shared=True)


def sample(t: Scene, start: int, end: int) -> list[int]:
    """4K pages of [start, end): all of small ones, of large ones those at both ends and in the middle."""
    unit = t.test_page_size
    inside = {0, PAGE, unit // 2 // PAGE * PAGE, unit - PAGE}
    found = {base + offset for base in range(0, end, unit) for offset in inside if offset < unit}
    return sorted(offset for offset in found if start <= offset < end)


def fill(t: Scene, start: int, end: int, value: int) -> None:
    for offset in sample(t, start, end):
        t.host_rmw(offset, None, value)


def holds(t: Scene, start: int, end: int, value: int) -> None:
    for offset in sample(t, start, end):
        t.host_rmw(offset, value, None)


@case(SOURCE)
def test_file_read_write(t: Scene) -> None:
    """The file has neither read nor write."""
    for gmem in all_files(t):
        assert gmem.pread(64, 0).status == -W.EINVAL
        assert gmem.pwrite(bytes(64), 0).status == -W.EINVAL


@case(SOURCE)
def test_mmap_supported(t: Scene) -> None:
    """What is written is read; after a hole in the first 4K, and in the first page of the allocator, that is zero."""
    shared_file(t)
    fill(t, 0, t.size, 0xAA)
    holds(t, 0, t.size, 0xAA)
    for length in sorted({PAGE, t.test_page_size}):
        assert t.gmem.fallocate(PUNCH, 0, length) == (0, 0)
        holds(t, 0, length, 0)
        holds(t, length, t.size, 0xAA)
        fill(t, 0, length, 0xAA)
        holds(t, 0, t.size, 0xAA)


@case(SOURCE)
def test_mmap_not_supported(t: Scene) -> None:
    t.boot(4 * t.test_page_size)
    process = t.machine.create_process()
    with opened(t, flag_sets(t)[0]) as gmem:
        for length in (t.test_page_size, t.size):
            assert process.mmap(gmem, HVA, length=length).status == -W.ENODEV


@case(SOURCE)
def test_mmap_cow(t: Scene) -> None:
    t.boot(4 * t.test_page_size)
    process = t.machine.create_process()
    for flags in flag_sets(t)[1:]:
        with opened(t, flags) as gmem:
            assert process.mmap(gmem, HVA, private=True).status == -W.EINVAL


def fault_sigbus(t: Scene, gmem: GuestMemfd, accessible: int, mapped: int) -> None:
    """Of a mapping as long as `mapped` the first bytes can be used, the rest is SIGBUS."""
    t.process = t.machine.create_process()
    assert t.process.mmap(gmem, HVA, length=mapped).status == 0
    fill(t, 0, accessible, 0xAA)
    for offset in sample(t, accessible, mapped):
        t.host_cannot(offset)
    holds(t, 0, accessible, 0xAA)
    assert t.process.munmap(HVA, mapped).status == 0


@case(SOURCE)
def test_fault_overflow(t: Scene) -> None:
    """A mapping may be longer than the file."""
    t.boot(4 * t.test_page_size)
    with opened(t, flag_sets(t)[2]) as gmem:
        fault_sigbus(t, gmem, t.size, 4 * t.size)


@case(SOURCE)
def test_fault_private(t: Scene) -> None:
    t.boot(4 * t.test_page_size)
    with opened(t, flag_sets(t)[1]) as gmem:
        fault_sigbus(t, gmem, 0, t.size)


@case(SOURCE)
def test_file_size(t: Scene) -> None:
    for gmem in all_files(t):
        assert (gmem.stat().st_size, gmem.stat().st_blksize) == (t.size, PAGE)


@case(SOURCE)
def test_fallocate(t: Scene) -> None:
    """Memory for all of the file and nothing past its end; holes may lie anywhere."""
    for gmem in all_files(t):
        assert gmem.fallocate(KEEP, 0, t.size) == (0, 0)
        assert gmem.fallocate(PUNCH, PAGE - 1, PAGE).status == -W.EINVAL
        assert gmem.fallocate(KEEP, t.size, PAGE).status == -W.EINVAL
        assert gmem.fallocate(KEEP, t.size + PAGE, PAGE).status == -W.EINVAL
        assert gmem.fallocate(PUNCH, t.size, PAGE) == (0, 0)
        assert gmem.fallocate(PUNCH, t.size + PAGE, PAGE) == (0, 0)
        assert gmem.fallocate(PUNCH, PAGE, PAGE - 1).status == -W.EINVAL
        assert gmem.fallocate(PUNCH, PAGE, PAGE) == (0, 0)
        assert gmem.fallocate(KEEP, PAGE, PAGE) == (0, 0)


@case(SOURCE)
def test_invalid_punch_hole(t: Scene) -> None:
    lengths = {0: (1, PAGE - 1, PAGE + 1), 1: (1, PAGE - 1, PAGE, PAGE + 1), PAGE: (1, PAGE - 1, PAGE + 1)}
    for gmem in all_files(t):
        for offset, several in lengths.items():
            for length in several:
                assert gmem.fallocate(PUNCH, offset, length).status == -W.EINVAL


def refused(t: Scene, size: int, flags: int) -> bool:
    """Whether creation ends in EINVAL."""
    try:
        gmem = create(t, size, flags)
    except OSError as error:
        return error.errno == W.EINVAL
    assert gmem.close().status == 0
    return False


@case(SOURCE)
def test_create_guest_memfd_invalid_sizes(t: Scene) -> None:
    """Parts of a 4K page; of a large page also multiples of 4K."""
    t.boot(t.test_page_size)
    for flags in flag_sets(t):
        parts = (*range(1, PAGE), *sample(t, 1, t.test_page_size))
        assert all(refused(t, size, flags) for size in parts)
        assert not refused(t, t.test_page_size, flags)


@case(SOURCE)
def test_create_guest_memfd_multiple(t: Scene) -> None:
    t.boot(3 * t.test_page_size)
    flags = flag_sets(t)[0]
    with opened(t, flags, pages=1) as first, opened(t, flags, pages=2) as second:
        assert (first.stat().st_size, second.stat().st_size) == (t.test_page_size, 2 * t.test_page_size)
        assert first.stat().st_ino != second.stat().st_ino


@case(SOURCE)
def test_guest_memfd_flags(t: Scene) -> None:
    """Every valid flag alone, and every other bit. INIT_PRIVATE of RFC v2 is none without SUPPORT_SHARED."""
    t.boot(t.test_page_size)
    valid = int(CreateFlags.MMAP | CreateFlags.INIT_SHARED)
    if t.variant.form == "rfc2":
        valid = int(Rfc2Flags.SUPPORT_SHARED | Rfc2Flags.HUGETLB)
    for bit in range(64):
        flag = 1 << bit
        if t.variant.form == "rfc2" and flag == Rfc2Flags.HUGETLB and t.variant.size == "4K":
            with pytest.raises(ValueError, match="order of the machine's"):  # a kernel would have huge pages, too
                create(t, t.size, flag)
            continue
        assert refused(t, t.size, flag) == (not flag & valid)


@case(SOURCE)
def test_mbind(t: Scene) -> None:
    """Policies of ranges can be set, asked for and taken back; an unknown one is refused (upstream 999, here 99)."""
    unit = t.test_page_size
    t.boot(4 * unit, nodes=2)
    for flags in flag_sets(t)[1:]:
        with opened(t, flags) as gmem:
            assert gmem.mbind(0, 2 * unit, "interleave", NODE_0).status == 0
            assert gmem.mempolicy(0) == ("interleave", NODE_0)
            assert gmem.mbind(2 * unit, 2 * unit, "bind", NODE_0).status == 0
            assert gmem.mempolicy(2 * unit) == ("bind", NODE_0)
            assert gmem.mempolicy(2 * unit - PAGE) == ("interleave", NODE_0)
            assert gmem.mbind(0, t.size, "default").status == 0
            assert gmem.mempolicy(0) == ("default", ())
            assert gmem.mbind(0, unit, 99, NODE_0).status == -W.EINVAL


def node_of(t: Scene, offset: int) -> int:
    """The NUMA node that the page at an offset lies on, as move_pages() would tell."""
    pfn = t.gmem.pfn(offset)
    assert pfn is not None
    return int(pfn >= int(t.machine.arrays.state[node_word(1, W.N_BASE)]))


@case(SOURCE)
def test_numa_allocation(t: Scene) -> None:
    """Pages lie where the policy says: one of before the first access, not one of after it.

    RFC v2 asks only the policy of the task that faults: there the task changes its own.
    """
    unit = t.test_page_size
    t.set_up(4 * unit, shared=True, nodes=2, pool=max(8 * unit, 2 * W.PAGE_2M))
    by_task = t.variant.order == "rfc2"

    def touch_all(policies: dict[int, tuple[int]]) -> None:
        """Bind two pages from each key on to a node; then write everything."""
        for offset, node in policies.items():
            if by_task:
                assert t.machine.set_mempolicy("bind", node).status == 0
                fill(t, offset, offset + 2 * unit, 0xAA)
            else:
                assert t.gmem.mbind(offset, 2 * unit, "bind", node).status == 0
        fill(t, 0, t.size, 0xAA)

    fill(t, 0, unit, 0xAA)
    first = node_of(t, 0)
    assert t.gmem.mbind(0, unit, "bind", NODE_1).status == 0
    assert node_of(t, 0) == first == 0
    assert t.gmem.fallocate(PUNCH, 0, unit) == (0, 0)
    touch_all({0: NODE_1, 2 * unit: NODE_0})
    assert [node_of(t, i * unit) for i in range(4)] == [1, 1, 0, 0]
    assert t.gmem.fallocate(PUNCH, 0, t.size) == (0, 0)
    touch_all({0: NODE_0, 2 * unit: NODE_1})
    assert [node_of(t, i * unit) for i in range(4)] == [0, 0, 1, 1]


@case(SOURCE)
def test_collapse(t: Scene) -> None:
    """MADV_COLLAPSE is refused; taken out of the tables, a page comes back as 4K. (MADV_HUGEPAGE changes nothing.)"""
    t.set_up(W.PAGE_2M, shared=True)
    for offset in range(0, W.PAGE_2M, PAGE):
        t.host_rmw(offset, 0, None)
    assert t.process.madvise_collapse(HVA, W.PAGE_2M).status == -W.EINVAL
    why = "MADV_DONTNEED refuses VM_PFNMAP (mm/madvise.c:madvise_dontneed_free_valid_vma())"
    assert t.process.madvise_dontneed(HVA, W.PAGE_2M).status == t.by_design(0, -W.EINVAL, why)
    t.host_rmw(0, 0, None)
    assert t.process.walk(HVA)[-1][0] == 1


@case(SOURCE)
def test_guest_memfd_guest(t: Scene) -> None:
    """The guest sees what the host wrote, and the host what the guest wrote, though it was unmapped in between."""
    t.set_up(t.test_page_size, shared=True)
    assert t.vm.walk(GPA)[-1][2] & 1 == 0
    fill(t, 0, t.size, 0xAA)
    assert t.process.munmap(HVA, t.size).status == 0
    for offset in sample(t, 0, t.size):
        t.guest_rmw(offset, 0xAA, 0xFF)
    assert t.process.mmap(t.gmem, HVA).status == 0
    holds(t, 0, t.size, 0xFF)
