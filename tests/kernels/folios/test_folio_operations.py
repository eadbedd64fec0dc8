"""References, pins and freezes of folios of a machine: page-tables.md 7.4, each rule with its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
KERNELS = ("6.12", "6.18", "7.3")


def machine_of(pages: int = 2, **parameters: Any) -> Machine:
    return Machine(Config(pool=pages * M2, page_size=M2, **parameters))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_huge_page_taken_from_its_pool(kernel: str) -> None:
    """0 in the pool, 1 when taken; a pin is a reference and a pin; the last reference frees it."""
    machine = machine_of(kernel=kernel)
    pool = machine.hugetlb()
    folio = machine.folio(pool.free_list()[0])
    assert folio.refcount == 0
    assert folio.get().status == -W.ENOMEM  # try_grab_folio() refuses a frozen folio
    assert pool.allocate().detail == folio.pfn
    assert (folio.refcount, folio.pincount, folio.maybe_dma_pinned) == (1, 0, False)
    assert folio.get(2).detail == 3
    assert folio.pin(5).detail == 8
    assert (folio.pincount, folio.maybe_dma_pinned) == (5, True)
    assert folio.unpin(6).status == -W.EINVAL  # only 5 are there
    assert folio.unpin(5).detail == 3
    assert folio.put(4).status == -W.EINVAL
    assert folio.put(3).detail == 0
    assert (pool.free_hugepages, folio.pfn in pool.free_list()) == (2, True)
    assert machine.check() == 0, machine.broken


def test_freeze_needs_the_exact_count() -> None:
    machine = machine_of()
    folio = machine.folio(machine.hugetlb().allocate().detail)
    folio.get(3)
    assert not folio.freeze(3)
    assert folio.refcount == 4
    assert folio.freeze(4)
    assert folio.refcount == 0
    assert folio.get().status == -W.ENOMEM
    assert not folio.unfreeze(0)
    assert folio.unfreeze(1)
    assert not folio.unfreeze(1)
    assert folio.put().detail == 0
    assert machine.hugetlb().free_hugepages == 2
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_page_cache_holds_one_reference_per_base_page(kernel: str) -> None:
    machine = machine_of(kernel=kernel)
    file = machine.create_hugetlb_file(M2)
    process = machine.create_process()
    assert process.mmap_hugetlb(VA, file=file).status == 0
    assert process.touch(VA, write=True).status == W.VM_FAULT_NOPAGE
    pfn = process.walk(VA)[-1][2] >> 12 & (1 << 40) - 1
    folio = machine.folio(pfn)
    assert (folio.refcount, folio.mapcount, folio.expected_references) == (513, 1, 513)
    assert folio.put().status == -W.EINVAL  # all of them have their owners
    assert folio.pin().detail == 514
    assert not folio.freeze(513)
    assert folio.unpin().detail == 513
    process.munmap(VA, M2)
    assert (folio.refcount, folio.mapcount, folio.expected_references) == (512, 0, 512)
    assert machine.check() == 0, machine.broken


def split_machine() -> tuple[Machine, Any, Any]:
    """An inode whose only block is split, its second page shared."""
    machine = machine_of(1)
    gmem = machine.create_guest_memfd(M2)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    vm.touch(0)
    assert gmem.convert(PAGE, PAGE, shared=True).status == 0
    return machine, gmem, machine.folio(gmem.pfn(PAGE) or 0)


def test_a_pin_of_a_small_folio_is_1024_references() -> None:
    machine, gmem, folio = split_machine()
    assert (folio.refcount, folio.expected_references) == (1, 1)
    assert folio.pin(2).detail == 2049
    assert folio.maybe_dma_pinned
    assert gmem.convert(PAGE, PAGE, shared=False) == (-W.EAGAIN, PAGE)
    assert folio.unpin(2).detail == 1
    assert machine.check() == 0, machine.broken
    assert gmem.convert(PAGE, PAGE, shared=False).status == 0
    assert machine.check() == 0, machine.broken


def test_many_references_make_a_small_folio_look_pinned() -> None:
    """The false positive of folio_maybe_dma_pinned()."""
    machine, _, folio = split_machine()
    folio.get(1022)
    assert not folio.maybe_dma_pinned
    folio.get()
    assert (folio.refcount, folio.maybe_dma_pinned) == (1024, True)
    folio.put(1023)
    assert machine.check() == 0, machine.broken


def test_a_pinned_piece_outlives_its_inode() -> None:
    """Its huge page waits for it as a zombie; the unpin sends all of it back to the pool."""
    machine, gmem, folio = split_machine()
    folio.pin()
    assert gmem.close().status == 0
    assert machine.hugetlb().free_hugepages == 0
    assert machine.check() == 0, machine.broken
    assert folio.put(1025).status == -W.EINVAL
    assert folio.unpin().detail == 0
    assert machine.hugetlb().free_hugepages == 1
    assert machine.check() == 0, machine.broken


def test_what_is_no_folio_of_the_zone_is_refused() -> None:
    machine = machine_of(buddy=M2)
    free = machine.register(W.R_POOL_BASE) + 1024  # with the page allocator: no reference to add to
    reference = Operation.FOLIO_REFERENCE
    assert machine.operate(reference, flags=Flag.SHARED, address=free << 12, length=1).status == -W.ENOMEM
    assert machine.operate(reference, flags=Flag.READ, address=free << 12, length=1).status == -W.EINVAL
    for address, length in ((0x1000, 1), (free << 12, 0), (free << 12, 1 << 40)):
        assert machine.operate(reference, flags=Flag.SHARED, address=address, length=length).status == -W.EINVAL
    assert machine.operate(Operation.FOLIO_FREEZE, address=0x1000, length=1).status == -W.EINVAL
    assert machine.check() == 0, machine.broken


def test_put_of_a_page_that_no_inode_had_is_refused() -> None:
    """PUT by address is for pages of inodes: not one taken from its pool, one the kernel uses, or one in a hole."""
    machine = machine_of(4, nodes=2, reserved=M2)
    head = machine.hugetlb().allocate().detail
    base = machine.register(W.R_POOL_BASE)
    for pfn in (head, head + 100, base, base + (1 << 17), base + machine.register(W.R_GUEST_PAGES)):
        assert machine.operate(Operation.PUT, address=pfn << 12).status == -W.ENOENT
    assert machine.folio(head).refcount == 1
    assert machine.check() == 0, machine.broken


def test_a_page_on_its_way_back_from_an_inode_is_not_the_pools() -> None:
    """What left the page cache while it was referenced is split and freed by nobody but its last reference."""
    machine = machine_of()
    inode = machine.create_guest_memfd(M2)
    vm = machine.create_vm(protected=True)
    assert vm.bind(inode, 0).status == 0
    assert vm.touch(0).detail == 2
    held = machine.operate(Operation.GET, object_=inode.inode).detail
    assert machine.operate(Operation.PUNCH_HOLE, object_=inode.inode, length=M2).status == 0
    for op in (Operation.FOLIO_FREE, Operation.FOLIO_SPLIT):
        assert machine.operate(op, address=held << 12).status == -W.EINVAL
    assert machine.operate(Operation.PUT, address=held << 12).status == 0
    assert machine.hugetlb().free_hugepages == 2
    assert machine.check() == 0, machine.broken


def test_free_pages_whose_count_is_1_are_free() -> None:
    """2M pages of a demoted 1G page of 7.3 inherit the count of the boot allocator's tail page."""
    machine = machine_of(0, other_pool=W.PAGE_1G)
    assert machine.hugetlb(W.PAGE_1G).demote() == (0, 1)
    pool = machine.hugetlb()
    folio = machine.folio(pool.free_list()[1])
    assert folio.refcount == 1
    assert folio.get().status == -W.ENOMEM
    assert folio.put().status == -W.EINVAL
    assert machine.free_folio(folio.pfn).status == -W.EINVAL
    assert machine.operate(Operation.FOLIO_SPLIT, address=folio.pfn << 12).status == -W.EINVAL
    assert pool.restore([folio.pfn]) == (0, 1)
    assert pool.optimize([folio.pfn]) == (0, 1)
    assert pool.free_hugepages == 512
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("split_form", ["rfc2", "jan2026"])
def test_pieces_become_the_page_that_they_were(split_form: str) -> None:
    """Pieces of a 1G page are no 2M page, pieces of 512 pages of 2M no 1G page."""
    machine = machine_of(0, other_pool=W.PAGE_1G, hvo=False, split_form=split_form)
    head = machine.hugetlb(W.PAGE_1G).allocate().detail
    split = {"op": Operation.FOLIO_SPLIT, "address": head << 12}
    merge = {"op": Operation.FOLIO_MERGE, "address": head << 12}
    assert machine.operate(**split).status == 0
    assert machine.operate(**merge, length=M2).status == -W.EINVAL
    assert machine.operate(**merge, length=W.PAGE_1G).status == 0
    assert machine.free_folio(head).status == 0
    assert machine.hugetlb(W.PAGE_1G).demote() == (0, 1)
    for page in range(head, head + (1 << 18), 512):
        assert machine.hugetlb().allocate().status == 0
        assert machine.operate(Operation.FOLIO_SPLIT, address=page << 12).status == 0
    assert machine.operate(**merge, length=W.PAGE_1G).status == -W.EINVAL
    assert machine.operate(**merge, length=M2).status == 0
    assert machine.check() == 0, machine.broken


def test_a_page_of_a_file_may_be_held_by_others() -> None:
    """References and pins of a page of hugetlbfs are beside those of its cache: the recount allows them."""
    machine = machine_of()
    file = machine.create_hugetlb_file(2 * M2)
    process = machine.create_process()
    assert process.mmap_hugetlb(VA, file=file).status == 0
    assert process.touch(VA).detail == 2
    folio = machine.folio(machine.register(W.R_POOL_BASE))
    assert folio.refcount == 513
    assert folio.pin(2).detail == 515
    assert machine.check() == 0, machine.broken
    assert folio.unpin(2).detail == 513
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("size", [PAGE, M2])
@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@settings(max_examples=40)
@given(todo=st.lists(st.tuples(st.sampled_from(("get", "put", "freeze", "unfreeze", "touch")), st.integers(0, 3))))
def test_a_frozen_folio_is_no_broken_rule(design: Any, size: int, todo: list[tuple[str, int]]) -> None:
    """Whenever it is looked: freezes nest with references, mappings and conversions of a folio in the page cache."""
    machine = Machine(Config(design, pool=4 * M2, page_size=size))
    gmem, process = machine.create_guest_memfd(M2, shared=True), machine.create_process()
    assert gmem.allocate(0, M2).status == process.mmap(gmem, VA).status == 0
    folio = machine.folio(gmem.pfn(0) or 0)
    frozen = held = 0
    for what, n in todo:
        if what == "get" and n:
            held += n if folio.get(n).status == 0 else 0
        elif what == "put" and 0 < n <= held and not frozen:
            assert folio.put(n).status == 0
            held -= n
        elif what == "freeze" and not frozen:
            expected = folio.refcount - (n == 0)
            if folio.freeze(expected):
                frozen = expected
        elif what == "unfreeze" and frozen:
            assert folio.unfreeze(frozen)
            frozen = 0
        elif what == "touch" and not frozen:
            process.touch(VA)
        assert (folio.refcount == 0) == bool(frozen)
        assert machine.check() == 0, machine.broken
    assert not frozen or folio.unfreeze(frozen)
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("what", ["a process", "a device"])
def test_what_others_hold_is_not_an_outsiders_to_drop(what: str) -> None:
    """Pins of processes and devices keep their references, also when cache and mappings have let the page go."""
    machine = machine_of()
    file, process = machine.create_hugetlb_file(M2), machine.create_process()
    assert process.mmap_hugetlb(VA, file=file).status == 0
    assert process.touch(VA, write=True).status == W.VM_FAULT_NOPAGE
    folio = machine.folio(machine.register(W.R_POOL_BASE))
    if what == "a process":
        assert process.pin(VA, PAGE, pin=3).status == 0
    else:
        container = machine.create_vfio_container()
        container.attach()
        assert container.map(0, M2, process, VA).status == 0
    held = folio.refcount - 513
    assert held > 0
    for drop in (folio.put, folio.unpin):
        assert drop().status == -W.EINVAL
    assert folio.get().status == folio.pin().status == 0
    assert folio.put(2).status == folio.unpin(2).status == -W.EINVAL
    assert machine.check() == 0, machine.broken
    assert folio.unpin().status == folio.put().status == 0
    assert file.close().status == process.munmap(VA, M2).status == 0
    assert folio.refcount == held
    for drop in (folio.put, folio.unpin, lambda: machine.free_folio(folio.pfn)):
        assert drop().status == -W.EINVAL
    assert machine.operate(Operation.FOLIO_SPLIT, address=folio.pfn << 12).status == -W.EINVAL
    assert machine.check() == 0, machine.broken


def test_of_a_frozen_folio_nobody_drops_a_reference() -> None:
    machine, _, folio = split_machine()
    assert folio.get(2).detail == 3
    assert folio.freeze(3)
    assert folio.put().status == -W.EINVAL
    assert machine.operate(Operation.PUT, address=folio.pfn << 12).status == -W.ENOENT
    assert folio.unfreeze(3)
    assert folio.put(2).detail == 1
    assert machine.check() == 0, machine.broken


def test_so_many_folios_can_be_pinned_by_outsiders() -> None:
    machine = machine_of(W.FROZEN + 1)
    folios = [machine.folio(machine.hugetlb().allocate().detail) for _ in range(W.FROZEN + 1)]
    assert {folio.pin().status for folio in folios[:-1]} == {0}
    assert folios[-1].pin().status == -W.ENOSPC
    assert folios[0].pin().status == folios[0].unpin(2).status == 0
    assert folios[-1].pin().status == 0
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("who", ["an outsider", "a process"])
def test_the_one_reference_of_a_poisoned_page_may_be_somebodys(who: str) -> None:
    """unpoison_memory() drops memory failure's reference, and there is none where a page was only marked."""
    machine = machine_of()
    if who == "an outsider":
        folio = machine.folio(machine.hugetlb().allocate().detail)
    else:
        file, process = machine.create_hugetlb_file(M2), machine.create_process()
        assert process.mmap_hugetlb(VA, file=file).status == 0
        assert process.pin(VA, PAGE, pin=0, write=True).status == 0
        folio = machine.folio(machine.register(W.R_POOL_BASE))
        assert file.close().status == process.munmap(VA, M2).status == 0
    assert folio.refcount == 1
    assert machine.operate(Operation.POISON, address=folio.pfn << 12).status == 0
    assert machine.operate(Operation.UNPOISON, address=folio.pfn << 12).status == -W.EBUSY
    assert folio.refcount == 1
    assert machine.check() == 0, machine.broken
    assert (folio.put() if who == "an outsider" else machine.unpin(0)).status == 0
    assert machine.check() == 0, machine.broken


def test_an_unfreeze_gives_back_what_others_hold() -> None:
    """Of 512 references of the cache, one of a mapping and one that was taken here, one may be missing afterwards."""
    machine = machine_of()
    file, process = machine.create_hugetlb_file(M2), machine.create_process()
    assert process.mmap_hugetlb(VA, file=file).status == 0
    assert process.touch(VA, write=True).status == W.VM_FAULT_NOPAGE
    folio = machine.folio(machine.register(W.R_POOL_BASE))
    assert not folio.unfreeze(5)  # nobody froze it
    assert folio.get().detail == 514
    for n, fine in ((1, False), (512, False), (513, True)):
        if folio.refcount:
            assert folio.freeze(514)
        assert folio.unfreeze(n) == fine
    assert folio.put().status == -W.EINVAL  # its own is gone
    assert folio.freeze(513)
    assert folio.unfreeze(515)
    assert folio.put(2).detail == 513
    assert machine.check() == 0, machine.broken
