"""folio_mark_accessed() of HugeTLB pages that guests use: the flags after each mark, as the three forms write them."""

from __future__ import annotations

import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

REFERENCED, WORKINGSET, COUNT = 1 << 2, 1 << 9, 1 << 25
MGLRU = REFERENCED | WORKINGSET | 3 * COUNT
OLD = [  # 6.12: folio_inc_refs()
    REFERENCED,
    REFERENCED | WORKINGSET,
    *(REFERENCED | WORKINGSET | n * COUNT for n in (1, 2, 3, 3)),
]
NEW = [  # lru_gen_inc_refs()
    REFERENCED,
    *(REFERENCED | n * COUNT for n in (1, 2, 3)),
    REFERENCED | WORKINGSET | 3 * COUNT,
    REFERENCED | WORKINGSET | 3 * COUNT,
]
CLASSIC = [REFERENCED, 0] * 3  # without MGLRU: what would be activated is in no list
HVA, GPA = 0x7000_0000_0000, 0x1_4000_0000


def machine_of(kernel: str, configuration: str, page_size: int) -> tuple[Machine, AddressSpace, Vm]:
    """A VM with one page of the pool as its memory."""
    machine = Machine(
        Config(pool=page_size, page_size=page_size, kernel=kernel, configuration=configuration)  # type: ignore[arg-type]
    )
    process = machine.create_process()
    process.mmap_hugetlb(HVA, page_size, 3, page_size=page_size, shared=True)
    return machine, process, machine.create_vm(process)


def marks(machine: Machine) -> int:
    return int(machine.struct_page(machine.register(W.R_POOL_BASE))[0]) & MGLRU


@pytest.mark.parametrize("page_size", [W.PAGE_2M, W.PAGE_1G], ids=["2M", "1G"])
@pytest.mark.parametrize(
    ("kernel", "configuration", "expected"),
    [("6.12", "debian", OLD), ("6.18", "debian", NEW), ("7.3", "debian", NEW), ("7.3", "small", CLASSIC)],
)
def test_every_fault_marks_once(kernel: str, configuration: str, expected: list[int], page_size: int) -> None:
    """Each fault of a guest is one mark, wherever in the page it is; an access without a fault is none. 6.12 marks the
    page of an accessed leaf that goes with its slot, too: tdp_mmu.c:handle_changed_spte()."""
    machine, process, vm = machine_of(kernel, configuration, page_size)
    process.touch(HVA, write=True)
    assert marks(machine) == 0  # the host's own faults mark nothing
    found = []
    for i in range(len(expected)):
        vm.set_memory_region(0, GPA, page_size, HVA)
        at = GPA + i * 7 * W.PAGE_2M % page_size + 0x5000
        assert vm.touch(at, write=True).status == W.RET_PF_FIXED
        assert vm.touch(at, write=True).status == W.RET_PF_SPURIOUS
        found.append(marks(machine))
        vm.set_memory_region(0, GPA, 0, HVA)
    each = 2 if kernel == "6.12" else 1
    assert found == [expected[min(i * each, len(expected) - 1)] for i in range(len(expected))]
    assert machine.check() == 0


@pytest.mark.parametrize(("kernel", "expected"), [("6.12", OLD[1]), ("6.18", NEW[0]), ("7.3", NEW[0])])
def test_only_6_12_marks_what_it_drops(kernel: str, expected: int) -> None:
    """MADV_DONTNEED of the host drops an accessed leaf: the second mark in 6.12, none later."""
    machine, process, vm = machine_of(kernel, "debian", W.PAGE_2M)
    vm.set_memory_region(0, GPA, W.PAGE_2M, HVA)
    vm.touch(GPA, write=True)
    assert vm.leaves() == (0, 1, 0)
    process.madvise_dontneed(HVA, W.PAGE_2M)
    assert vm.leaves() == (0, 0, 0)
    assert marks(machine) == expected


@pytest.mark.parametrize(("kernel", "expected"), [("6.12", MGLRU), ("6.18", NEW[0]), ("7.3", NEW[0])])
def test_only_6_12_marks_what_it_splits(kernel: str, expected: int) -> None:
    """Dirty logging splits a 1G leaf, then 512 of 2M, and each marks the one folio: captured as a full count."""
    machine, _, vm = machine_of(kernel, "debian", W.PAGE_1G)
    vm.set_memory_region(0, GPA, W.PAGE_1G, HVA)
    vm.touch(GPA, write=True)
    vm.set_memory_region(0, GPA, W.PAGE_1G, HVA, log_dirty_pages=True)
    assert vm.leaves() == (1 << 18, 0, 0)
    assert marks(machine) == expected
