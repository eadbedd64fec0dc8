"""Memory failure of memory of mainline Linux: anonymous, HugeTLB, guest_memfd of 4K folios, shmem; slots over it."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.results import Result
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.failures import MfPage, MfResult, Signal
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x4000_0000_0000
TYPE = {"6.12": 23, "6.18": 24, "7.3": 24}  # SWP_HWPOISON: include/linux/swap.h


def machine_of(**parameters: Any) -> tuple[Machine, AddressSpace]:
    machine = Machine(Config("restructure", **{"pool": 8 * M2, "page_size": M2, **parameters}))
    return machine, machine.create_process()


def entry(process: AddressSpace, address: int = VA) -> int:
    return process.walk(address)[-1][2]


def frame(process: AddressSpace, address: int = VA) -> int:
    level, _, value = process.walk(address)[-1]
    size = PAGE << 9 * (level - 1)
    return (value & (1 << 52) - size) + (address & size - PAGE)


def sound(machine: Machine) -> None:
    assert machine.check() == 0, machine.broken


# --------------------------------------------------------------------------- anonymous memory


@pytest.mark.parametrize("kernel", sorted(TYPE))
def test_a_page_of_anonymous_memory_is_taken_from_its_process(kernel: str) -> None:
    machine, process = machine_of(kernel=kernel)
    process.mmap_anonymous(VA, 4 * PAGE)
    process.touch(VA, write=True)
    at = frame(process)
    done = machine.memory_failure(at, early_kill=True)
    assert done[:5] == (0, at >> 12, MfResult.RECOVERED, MfPage.DIRTY_LRU, 1)
    assert done.signals == (Signal(process.space, VA, 5, 12),)
    assert entry(process) == TYPE[kernel] << 59 | ~(at >> 3) & (1 << 59) - (1 << 9)
    assert (process.rss, process.touch(VA).name) == (0, "VM_FAULT_HWPOISON")
    assert process.populate(VA, PAGE).status == -W.EHWPOISON
    assert machine.memory_failure(at).status == -W.EHWPOISON
    sound(machine)
    assert process.madvise_dontneed(VA, PAGE).status == 0
    assert process.touch(VA, write=True).status == W.VM_FAULT_NOPAGE
    assert frame(process) != at
    assert machine.unpoison(at).status == 0
    assert machine.poisoned_pages == 0
    sound(machine)


def test_every_process_that_maps_the_page_loses_it() -> None:
    machine, process = machine_of()
    process.mmap_anonymous(VA, 4 * PAGE)
    process.touch(VA, write=True)
    child = process.fork()
    at = frame(process)
    done = machine.memory_failure(at)
    assert (done.replaced, done.signals_sent) == (2, 0)
    assert entry(process) == entry(child) != 0
    grandchild = child.fork()  # it gets a copy of the entry: copy_nonpresent_pte()
    assert entry(grandchild) == entry(child)
    assert grandchild.touch(VA, write=True).status == W.VM_FAULT_HWPOISON
    assert grandchild.exit().status == 0
    sound(machine)


def test_the_entry_goes_along_and_away() -> None:
    """mremap moves it, mprotect leaves it, munmap drops it."""
    machine, process = machine_of()
    process.mmap_anonymous(VA, 4 * PAGE)
    for page in range(4):
        process.touch(VA + page * PAGE, write=True)
    bad = frame(process, VA + PAGE)
    assert process.madvise_hwpoison(VA + PAGE, PAGE).status == 0
    assert machine.last_failure.signals == (Signal(process.space, VA + PAGE, 4, 12),)
    value = entry(process, VA + PAGE)
    assert process.protect(VA, 4 * PAGE, 1).status == 0
    assert entry(process, VA + PAGE) == value
    assert process.remap(VA, 4 * PAGE, 4 * PAGE, VA + M2).status == 0
    assert entry(process, VA + M2 + PAGE) == value
    assert process.touch(VA + M2 + PAGE).status == W.VM_FAULT_HWPOISON
    sound(machine)
    assert process.munmap(VA + M2, 4 * PAGE).status == 0
    sound(machine)
    assert machine.unpoison(bad).status == 0
    sound(machine)


def test_pages_that_are_nobodys() -> None:
    """Tables and free frames of ordinary memory are not modelled, the page of zeroes is the kernel's own."""
    machine, process = machine_of()
    process.mmap_anonymous(VA, 4 * PAGE)
    process.touch(VA)
    done = machine.memory_failure(frame(process))
    assert (done.status, done.action, done.page) == (-W.EBUSY, MfResult.IGNORED, MfPage.GET_HWPOISON)
    assert machine.memory_failure(process.root).status == -W.EOPNOTSUPP
    assert process.touch(VA).status == 0
    with pytest.raises(ValueError, match=r"^address 0x1: "):
        machine.memory_failure(1)
    sound(machine)


def test_transparent_huge_pages_are_not_modelled() -> None:
    machine, process = machine_of(buddy=4 * M2, thp="always")
    process.mmap_anonymous(VA, M2)
    assert process.touch(VA, write=True).detail == 2
    assert process.madvise_hwpoison(VA, M2).status == -W.EOPNOTSUPP
    assert process.touch(VA).status == 0
    sound(machine)


def test_a_guest_over_it_is_interrupted_by_its_signal() -> None:
    """As captured of a slot by host address: KVM_RUN returns -EINTR, SIGBUS names the host's address."""
    machine, process = machine_of()
    process.mmap_anonymous(VA, M2)
    vm = machine.create_vm(process)
    assert vm.set_memory_region(0, 0, M2, VA).status == 0
    assert vm.touch(3 * PAGE, write=True).status == W.RET_PF_FIXED
    done = machine.memory_failure(frame(process, VA + 3 * PAGE))
    assert (done.status, done.replaced, done.stage2_dropped) == (0, 1, 1)
    assert vm.touch(3 * PAGE).name == "-EINTR"
    assert machine.last_failure.signals == (Signal(process.space, VA + 3 * PAGE, 4, 12),)
    assert vm.touch(4 * PAGE).status == W.RET_PF_FIXED
    sound(machine)


# --------------------------------------------------------------------------- HugeTLB


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [M2, G1])
def test_a_huge_page_is_lost_whole(shared: bool, size: int) -> None:
    """A file keeps its page; a private one leaves its pool, its 2M block with the bad page aside."""
    machine, process = machine_of(pool=4 * size, page_size=size)
    process.mmap_hugetlb(VA, 2 * size, page_size=size, shared=shared)
    process.touch(VA, write=True)
    at = frame(process, VA + 5 * PAGE)
    pages = machine.hugetlb(size).nr_hugepages
    done = machine.memory_failure(at, early_kill=True)
    assert (done.status, done.action, done.page, done.replaced) == (0, MfResult.RECOVERED, MfPage.HUGE, 1)
    assert done.signals == (Signal(process.space, VA, 5, size.bit_length() - 1),)
    assert entry(process) == 24 << 59 | ~((at & -size) >> 3) & (1 << 59) - (1 << 9)
    assert process.touch(VA).name == "VM_FAULT_HWPOISON_LARGE"
    assert process.touch(VA + size, write=True).status == W.VM_FAULT_NOPAGE
    assert machine.hugetlb(size).nr_hugepages == pages - (not shared)
    sound(machine)
    child = process.fork()
    assert child.touch(VA).status == W.VM_FAULT_HWPOISON_LARGE
    assert process.madvise_dontneed(VA, size).status == 0
    assert process.touch(VA, write=True).status == (W.VM_FAULT_HWPOISON_LARGE if shared else W.VM_FAULT_NOPAGE)
    assert (machine.unpoison(at).status == 0) != shared  # the file has it
    child.exit()
    process.exit()
    sound(machine)
    if shared:
        assert machine.unpoison(at).status == 0
        sound(machine)


def test_a_table_that_processes_share() -> None:
    """huge_pmd_unshare(): all but the last let go of it and fault again; then the file's page is poisoned."""
    machine, process = machine_of(pool=1024 * M2)
    file = machine.create_hugetlb_file(G1)
    for one in (process, other := machine.create_process()):
        assert one.mmap_hugetlb(VA, file=file, shared=True).status == 0
        one.touch(VA, write=True)
    done = file.memory_failure(0)
    assert (done.status, done.dropped, done.replaced) == (0, 1, 1)
    for one in (process, other):
        assert one.touch(VA).status == W.VM_FAULT_HWPOISON_LARGE
    sound(machine)


def test_a_page_that_nobody_can_migrate_is_only_marked() -> None:
    """HugetlbPool.allocate() gives a page without the flag that hugetlbfs sets at its faults."""
    machine, _ = machine_of()
    pfn = machine.hugetlb().allocate().detail
    done = machine.memory_failure(pfn << 12)
    assert (done.status, done.action) == (-W.EBUSY, MfResult.IGNORED)
    assert machine.folio(pfn).poisoned_pages == [pfn]
    sound(machine)


# --------------------------------------------------------------------------- files of 4K pages


def test_a_page_of_guest_memfd_as_merged() -> None:
    machine, process = machine_of()
    gmem = machine.create_guest_memfd_4k(M2)
    process.mmap(gmem, VA)
    vm = machine.create_vm(process, protected=False)
    assert vm.set_memory_region(0, 0, M2, VA, gmem=gmem, gmem_offset=0).status == 0
    process.touch(VA, write=True)
    vm.touch(0)
    at = frame(process)
    done = gmem.memory_failure(0)
    assert (done.status, done.action, done.replaced) == (-W.EBUSY, MfResult.FAILED, 1)
    assert done.stage2_dropped == 1
    assert vm.touch(0).status == -W.EHWPOISON
    assert process.touch(VA).status == W.VM_FAULT_HWPOISON
    assert machine.unpoison(at).status == -W.EBUSY
    sound(machine)
    assert gmem.punch_hole(0, PAGE).status == 0
    assert entry(process) != 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    sound(machine)
    assert machine.unpoison(at).status == 0
    assert machine.soft_offline(at).status in (-W.EBUSY, -W.EOPNOTSUPP)
    for beyond in (machine.register(W.R_FRAMES), 1 << 30, (1 << 52) - 1):  # no struct page
        assert machine.soft_offline(beyond << 12).status == -W.ENXIO
    sound(machine)


def test_a_page_of_shmem_counts_as_recovered() -> None:
    machine, process = machine_of()
    process.mmap_anonymous(VA, M2, shared=True)
    process.touch(VA, write=True)
    done = machine.memory_failure(frame(process))
    assert (done.status, done.action, done.page) == (0, MfResult.RECOVERED, MfPage.DIRTY_LRU)
    assert process.touch(VA).status == W.VM_FAULT_HWPOISON
    process.madvise_dontneed(VA, PAGE)
    assert process.touch(VA).status == W.VM_FAULT_HWPOISON  # the file keeps it
    process.touch(VA + PAGE)  # fault-around leaves it out
    assert entry(process) == 0
    sound(machine)


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@pytest.mark.parametrize("touched", [False, True], ids=["never there", "there"])
@pytest.mark.parametrize("kind", ["anonymous", "shmem", "hugetlb", "guest_memfd_4k", "designs"])
def test_what_may_not_be_read_gives_no_page(kind: str, touched: bool, design: str) -> None:
    """mm/gup.c:check_vma_flags(): a mapping without VM_READ is -EFAULT before any fault."""
    machine = Machine(Config(design, pool=8 * M2, page_size=M2))  # type: ignore[arg-type]
    process = machine.create_process()
    if kind == "hugetlb":
        process.mmap_hugetlb(VA, M2)
    elif kind == "guest_memfd_4k":
        process.mmap(machine.create_guest_memfd_4k(M2), VA)
    elif kind == "designs":
        process.mmap(machine.create_guest_memfd(M2, shared=True), VA)
    else:
        process.mmap_anonymous(VA, M2, shared=kind == "shmem")
    if touched:
        process.touch(VA, write=True)
    assert process.protect(VA, M2, 0).status == 0
    before = process.walk(VA)
    for ask in (process.madvise_hwpoison, process.madvise_soft_offline):
        assert ask(VA, PAGE) == Result(-W.EFAULT, 0)
        assert process.walk(VA) == before
    sound(machine)
    assert process.exit().status == 0
    sound(machine)
