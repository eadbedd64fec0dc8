"""guest_memfd_conversions_test of the 1G series (RFC v2): each test at 4K, 2M and 1G, by whole allocator pages."""

from __future__ import annotations

from conformance.harness import GPA, HVA, PAGE, Scene, case
from pgemu_kernels import words as W

SOURCE = "guest_memfd_conversions_test (RFC v2)"
SOURCE_REPORTING = "guest_memfd_wrap_test_check_hugetlb_reporting"
NO_GUP = "GUP refuses VM_PFNMAP (mm/gup.c:check_vma_flags()): there is no pin"


def one_page(t: Scene, *, shared: bool, pages: int = 1) -> Scene:
    return t.set_up(pages * t.test_page_size, shared=shared)


@case(SOURCE)
def test_sharing(t: Scene) -> None:
    one_page(t, shared=True)
    t.host_rmw(0, None, "A")
    t.guest_rmw(0, "A", "B")
    assert t.gmem.convert(0, t.size, shared=False) == (0, 0)
    t.host_cannot(0)
    t.guest_rmw(0, "B", "C")
    assert t.gmem.convert(0, t.size, shared=True) == (0, 0)
    t.host_rmw(0, "C", "D")
    t.guest_rmw(0, "D", "E")


@case(SOURCE)
def test_init_mappable_false(t: Scene) -> None:
    one_page(t, shared=False)
    t.host_cannot(0)
    t.guest_rmw(0, None, "A")
    assert t.gmem.convert(0, t.size, shared=True) == (0, 0)
    t.host_rmw(0, "A", "B")
    t.guest_rmw(0, "B", "C")


@case(SOURCE)
def test_conversion_before_allocation(t: Scene) -> None:
    one_page(t, shared=True)
    assert t.gmem.convert(0, t.size, shared=False) == (0, 0)
    t.host_cannot(0)
    t.guest_rmw(0, None, "A")
    assert t.gmem.convert(0, t.size, shared=True) == (0, 0)
    t.host_rmw(0, "A", "B")
    t.guest_rmw(0, "B", "C")


@case(SOURCE, pages=range(16))
def test_conversion_if_not_all_folios_allocated(t: Scene) -> None:
    """Of 16 allocator pages two are there when all are converted."""
    total, second = 16, 8
    one_page(t, shared=True, pages=total)
    t.host_rmw(t.page * t.test_page_size, None, "A")
    t.host_rmw(second * t.test_page_size, None, "A")
    assert t.gmem.convert(0, t.size, shared=False) == (0, 0)
    for i in range(total):
        t.host_cannot(i * t.test_page_size)
        t.guest_rmw(i * t.test_page_size, "A" if i in (t.page, second) else None, "B")
    assert t.gmem.convert(0, t.size, shared=True) == (0, 0)
    for i in range(total):
        t.host_rmw(i * t.test_page_size, "B", "C")
        t.guest_rmw(i * t.test_page_size, "C", "D")


@case(SOURCE)
def test_conversions_should_not_affect_surrounding_pages(t: Scene) -> None:
    """The third of four pages is converted and back."""
    size = t.test_page_size
    one_page(t, shared=True, pages=4)
    for i in range(4):
        t.host_rmw(i * size, None, "A")
        t.guest_rmw(i * size, "A", "B")
    assert t.gmem.convert(2 * size, size, shared=False) == (0, 0)
    for i in range(4):
        if i == 2:
            t.host_cannot(i * size)
            t.guest_rmw(i * size, "B", "D")
        else:
            t.host_rmw(i * size, "B", "C")
            t.guest_rmw(i * size, "C", "D")
    assert t.gmem.convert(2 * size, size, shared=True) == (0, 0)
    for i in range(4):
        t.host_rmw(i * size, "D", "E")
        t.guest_rmw(i * size, "E", "F")


@case(SOURCE, pages=range(4))
def test_conversions_should_fail_if_memory_has_elevated_refcount(t: Scene) -> None:
    size = t.test_page_size
    one_page(t, shared=True, pages=4)
    pinned = t.process.pin(HVA + t.page * size, size, pin=0, write=True, longterm=True)
    for i in range(4):
        t.host_rmw(i * size, None, "A")
        t.guest_rmw(i * size, "A", "B")
    if t.by_design(True, False, NO_GUP):
        assert pinned == (0, size // PAGE)
        t.to_private_fails(t.page * size, size, t.page * size)
        assert t.machine.unpin(0).status == 0
    else:
        assert pinned.status == -W.EFAULT
    assert t.gmem.convert(t.page * size, size, shared=False) == (0, 0)
    for i in range(4):
        if i == t.page:
            t.host_cannot(i * size)
        else:
            t.host_rmw(i * size, "B", "C")
        t.guest_rmw(i * size, "B" if i == t.page else "C", "D")
    assert t.gmem.convert(t.page * size, size, shared=True) == (0, 0)
    for i in range(4):
        t.host_rmw(i * size, "D", "E")
        t.guest_rmw(i * size, "E", "F")


@case(SOURCE)
def test_truncate_should_not_change_mappability(t: Scene) -> None:
    one_page(t, shared=True)
    t.host_rmw(0, None, "A")
    assert t.gmem.punch_hole(0, t.size) == (0, 0)
    t.host_rmw(0, None, "A")
    assert t.gmem.convert(0, t.size, shared=False) == (0, 0)
    t.host_cannot(0)
    t.guest_rmw(0, "A", "A")
    assert t.gmem.punch_hole(0, t.size) == (0, 0)
    t.host_cannot(0)
    t.guest_rmw(0, None, "A")


@case(SOURCE)
def test_fault_type_independent_of_mem_attributes(t: Scene) -> None:
    """The VM's attributes say the contrary of the file's: the file decides."""
    one_page(t, shared=False)
    assert t.vm.set_attributes(GPA, t.size, private=False).status == 0
    t.host_cannot(0)
    t.guest_rmw(0, None, "A")
    assert t.gmem.convert(0, t.size, shared=True) == (0, 0)
    assert t.vm.set_attributes(GPA, t.size, private=True).status == 0
    t.host_rmw(0, None, "A")
    t.guest_rmw(0, None, "A")


@case(SOURCE)
def test_truncate_shared_while_pinned(t: Scene) -> None:
    """A hole in 4K pages needs no merge and succeeds; in larger ones it waits for the pin."""
    one_page(t, shared=True)
    assert t.gmem.allocate(0, t.size) == (0, 0)
    pinned = t.process.pin(HVA, t.size, pin=0, write=True, longterm=True)
    if t.by_design(True, False, NO_GUP):
        assert pinned == (0, t.size // PAGE)
        status = 0 if t.test_page_size == PAGE else -W.EAGAIN
        assert t.gmem.punch_hole(0, t.size) == (status, 0)
        assert t.machine.unpin(0).status == 0
    else:
        assert pinned.status == -W.EFAULT
    assert t.gmem.punch_hole(0, t.size) == (0, 0)


@case(SOURCE)
def test_truncate_private(t: Scene) -> None:
    one_page(t, shared=False)
    assert t.gmem.allocate(0, t.size) == (0, 0)
    assert t.gmem.punch_hole(0, t.size) == (0, 0)


def close_while_pinned(t: Scene, *, shared: bool) -> None:
    """Closed while pinned, unpinned afterwards: the worker returns the page to where it came from."""
    one_page(t, shared=shared)
    free = t.machine.statistics.gauge(W.Gauge.POOL_FREE)
    assert t.gmem.allocate(0, t.size) == (0, 0)
    assert t.machine.statistics.gauge(W.Gauge.POOL_FREE) == free - 1
    pinned = t.process.pin(HVA, t.size, pin=0, write=True, longterm=True) if shared else None
    assert t.gmem.close().status == 0
    if pinned is not None and t.by_design(True, False, NO_GUP):
        assert pinned == (0, t.size // PAGE)
        assert t.machine.statistics.gauge(W.Gauge.POOL_FREE) == free - 1
        assert t.machine.unpin(0).status == 0
    assert t.machine.statistics.gauge(W.Gauge.POOL_FREE) == free


@case(SOURCE)
def test_close_with_pinning_init_private(t: Scene) -> None:
    close_while_pinned(t, shared=False)


@case(SOURCE)
def test_close_with_pinning(t: Scene) -> None:
    close_while_pinned(t, shared=True)


@case(SOURCE)
def test_allocate_subfolios(t: Scene) -> None:
    """The last and the middle 4K of a shared page have data of their own."""
    one_page(t, shared=True)
    last, middle = t.size - PAGE, t.size // 2 // PAGE * PAGE
    t.host_rmw(last, None, "A")
    t.guest_rmw(last, "A", "B")
    if middle != last:
        t.host_rmw(middle, None, "C")
        t.guest_rmw(middle, "C", "D")
        t.host_rmw(middle, "D", None)
    t.host_rmw(last, "B", None)


@case(SOURCE, variants=lambda v: v.size != "4K")
def test_convert_subfolios(t: Scene) -> None:
    """One middle 4K of a private page becomes shared: only that is visible to the host. Then back, data kept."""
    one_page(t, shared=False)
    middle = t.size // 2
    neighbours = (0, middle - PAGE, middle + PAGE, t.size - PAGE)
    for offset in (*neighbours, middle):
        t.guest_rmw(offset, None, "A")
    assert t.gmem.convert(middle, PAGE, shared=True) == (0, 0)
    t.host_rmw(middle, "A", "B")
    t.guest_rmw(middle, "B", "C")
    for offset in neighbours:
        t.host_cannot(offset)
        t.guest_rmw(offset, "A", "D")
    assert t.gmem.convert(middle, PAGE, shared=False) == (0, 0)
    for offset in (*neighbours, middle):
        t.host_cannot(offset)
        t.guest_rmw(offset, "C" if offset == middle else "D", "E")


@case(SOURCE_REPORTING, variants=lambda v: v.size != "4K")
def hugetlb_reporting(t: Scene) -> None:
    """HugePages_Free and _Rsvd over the life of a guest_memfd, as the code implies. (Upstream also cgroups', which are
    not modelled.)
    """
    one_page(t, shared=False, pages=2)
    pool = t.machine.hugetlb(t.test_page_size)
    assert (pool.free_hugepages, pool.resv_hugepages) == (2, 2)  # create: resv += n
    t.guest_rmw(0, None, "A")
    assert (pool.free_hugepages, pool.resv_hugepages) == (1, 1)
    assert t.gmem.convert(0, PAGE, shared=True) == (0, 0)
    assert (pool.free_hugepages, pool.resv_hugepages) == (1, 1)  # a split frees nothing
    assert t.gmem.punch_hole(0, t.test_page_size) == (0, 0)
    assert (pool.free_hugepages, pool.resv_hugepages) == (2, 2)
    t.guest_rmw(0, 0, "A")
    assert t.gmem.close().status == 0
    assert (pool.free_hugepages, pool.resv_hugepages) == (2, 0)


@case(SOURCE_REPORTING, variants=lambda v: v.size != "4K")
def hugetlb_reporting_while_pinned(t: Scene) -> None:
    """Closed while somebody holds a 4K page: all of its huge page, and its reservation, come back with the last pin."""
    one_page(t, shared=True, pages=2)
    pool = t.machine.hugetlb(t.test_page_size)
    pinned = t.process.pin(HVA + PAGE, PAGE, pin=0, write=True, longterm=True).status
    t.host_rmw(t.test_page_size, None, "A")
    assert pool.free_hugepages == t.by_design(0, 1, NO_GUP)
    assert t.gmem.close().status == 0
    if t.by_design(True, False, NO_GUP):
        assert pinned == 0
        assert pool.free_hugepages == 1
        assert t.machine.unpin(0).status == 0
    else:
        assert pinned == -W.EFAULT
    assert (pool.free_hugepages, pool.resv_hugepages) == (2, 0)
