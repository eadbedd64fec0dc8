"""guest_memfd_conversions_test of the in-place series (v7 to v13): 4K at a time, whatever the allocator's page size.

Upstream it runs on guest_memfd of 4K folios. On larger pages the same must hold: that is what splitting, or VM_PFNMAP,
is for.
"""

from __future__ import annotations

from conformance.harness import HVA, PAGE, Scene, case
from pgemu_kernels import words as W

SOURCE = "guest_memfd_conversions_test (in place)"


@case(SOURCE)
def init_private(t: Scene) -> None:
    t.set_up(PAGE, shared=False)
    t.private(0, 0, "A")
    t.to_shared(0, "A", "B", "C")
    t.to_private(0, "C", "E")


@case(SOURCE)
def init_shared(t: Scene) -> None:
    t.set_up(PAGE, shared=True)
    t.shared(0, 0, "A", "B")
    t.to_private(0, "B", "C")
    t.to_shared(0, "C", "D", "E")


@case(SOURCE, pages=range(4))
def indexing(t: Scene) -> None:
    """Only the page that is converted changes its state; all keep their data."""
    t.set_up(4 * PAGE, shared=True)
    for i in range(4):
        t.shared(i * PAGE, 0, "A", "B")
    for i in range(4):
        if i == t.page:
            t.to_private(i * PAGE, "B", "D")
        else:
            t.shared(i * PAGE, "B", "C", "D")
    for i in range(4):
        if i == t.page:
            t.to_shared(i * PAGE, "D", "E", "F")
        else:
            t.shared(i * PAGE, "D", "E", "F")


@case(SOURCE)
def before_allocation_shared(t: Scene) -> None:
    t.set_up(PAGE, shared=True)
    t.to_private(0, 0, "A")


@case(SOURCE)
def before_allocation_private(t: Scene) -> None:
    t.set_up(PAGE, shared=False)
    t.to_shared(0, 0, "A", "B")


@case(SOURCE, pages=range(8))
def unallocated_folios(t: Scene) -> None:
    """Two of eight pages are faulted, all are converted."""
    t.set_up(8 * PAGE, shared=True)
    second = 4
    t.host_rmw(t.page * PAGE, None, "A")
    t.host_rmw(second * PAGE, None, "A")
    assert t.gmem.convert(0, 8 * PAGE, shared=False) == (0, 0)
    for i in range(8):
        t.private(i * PAGE, "A" if i in (t.page, second) else 0, "B")
    for i in range(8):
        t.to_shared(i * PAGE, "B", "C", "D")


@case(SOURCE)
def truncate(t: Scene) -> None:
    """A hole changes neither kind of page; what was there reads as zero."""
    t.set_up(PAGE, shared=True)
    t.host_rmw(0, 0, "A")
    assert t.gmem.punch_hole(0, t.size) == (0, 0)
    t.host_rmw(0, 0, "A")
    t.to_private(0, "A", "B")
    assert t.gmem.punch_hole(0, t.size) == (0, 0)
    t.private(0, 0, "A")


@case(SOURCE)
def forked_accesses(t: Scene) -> None:
    """After a conversion to private no process that inherited the mapping gets at the page."""
    t.set_up(PAGE, shared=True)
    t.host_rmw(0, 0, "A")
    child = t.process.fork()
    t.host_rmw(0, "A", "B", process=child)
    t.host_rmw(0, "B", "C")
    assert t.gmem.convert(0, PAGE, shared=False) == (0, 0)
    t.host_cannot(0)
    t.host_cannot(0, process=child)
    t.guest_rmw(0, "C", "D")
    assert t.gmem.convert(0, PAGE, shared=True) == (0, 0)
    t.host_rmw(0, "D", "E", process=child)
    t.host_rmw(0, "E", "F")
    assert child.exit().status == 0


@case(SOURCE, pages=range(4))
def elevated_refcount(t: Scene) -> None:
    """A pinned page refuses the conversion, alone and in bulk, and names its offset."""
    t.set_up(4 * PAGE, shared=True)
    pinned = t.process.pin(HVA + t.page * PAGE, PAGE, pin=0, write=True, longterm=True)
    for i in range(4):
        t.shared(i * PAGE, 0, "A", "B")
    why = "GUP refuses VM_PFNMAP (mm/gup.c:check_vma_flags()), so nothing ever holds a page against a conversion"
    if t.by_design(True, False, why):
        assert pinned == (0, 1)
        t.to_private_fails(0, 4 * PAGE, t.page * PAGE)
        for i in range(4):
            if i == t.page:
                t.to_private_fails(i * PAGE, PAGE, t.page * PAGE)
            else:
                t.to_private(i * PAGE, "B", "C")
        assert t.machine.unpin(0).status == 0
        assert t.gmem.convert(0, 4 * PAGE, shared=False) == (0, 0)
        for i in range(4):
            t.private(i * PAGE, "B" if i == t.page else "C", "D")
    else:
        assert pinned.status == -W.EFAULT
        assert t.gmem.convert(0, 4 * PAGE, shared=False) == (0, 0)
        for i in range(4):
            t.private(i * PAGE, "B", "D")


@case(SOURCE)
def reset_shared_after_hole_punch(t: Scene) -> None:
    """A page converted, punched and converted again is shared and empty."""
    t.set_up(PAGE, shared=True)
    t.shared(0, 0, "A", "B")
    t.to_private(0, "B", "C")
    assert t.gmem.punch_hole(0, t.size) == (0, 0)
    t.to_shared(0, 0, "A", "B")


@case(SOURCE)
def precision(t: Scene) -> None:
    """The first and the last page around a converted one keep their state and data, entries included."""
    t.set_up(3 * PAGE, shared=True)
    for i in range(3):
        t.shared(i * PAGE, 0, "A", "B")
    t.to_private(PAGE, "B", "C")
    for i in (0, 2):
        assert t.process.touch(HVA + i * PAGE) == (0, 1)  # still mapped: the conversion unmapped its own page only
        t.shared(i * PAGE, "B", "D", "E")


@case(SOURCE)
def cross_process(t: Scene) -> None:
    """Another process that maps the same file sees the same pages, and loses them alike."""
    t.set_up(PAGE, shared=True)
    other = t.machine.create_process()
    assert other.mmap(t.gmem, HVA).status == 0
    t.host_rmw(0, 0, "A")
    t.host_rmw(0, "A", "B", process=other)
    t.to_private(0, "B", "C")
    t.host_cannot(0, process=other)
    t.to_shared(0, "C", "D", "E")
    t.host_rmw(0, "E", "F", process=other)
