"""Reservations and surplus pages: four counts of a pool against arithmetic on them alone.

The arithmetic is that of the counters test of libhugetlbfs (LTP's hugemmap10): pages that a mapping reserves and the
pool has not free are surplus, pages that are freed leave while there are surplus ones, and so do reserved ones that
were never used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pgemu import Config, Machine
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.files import HugetlbFile
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

M2, G1 = W.PAGE_2M, W.PAGE_1G
BASE = 0x7F00_0000_0000
NAMES = ("Total", "Free", "Rsvd", "Surp")


@dataclass
class Counts:
    """A pool of which memory never runs out: pages, free ones, reserved ones, surplus ones."""

    total: int
    overcommit: int = 0
    free: int = field(init=False)
    reserved: int = 0
    surplus: int = 0

    def __post_init__(self) -> None:
        self.free = self.total

    @property
    def all(self) -> list[int]:
        return [self.total, self.free, self.reserved, self.surplus]

    def reserve(self, pages: int) -> bool:
        short = max(self.reserved + pages - self.free, 0)
        if self.surplus + short > self.overcommit and short:
            return False
        self.total += short
        self.free += short
        self.surplus += short
        self.reserved += pages
        return True

    def use(self, has_reservation: bool) -> bool:
        # A hole may have left reservations without pages: the kernel's difference of the two is unsigned, and not 0.
        if self.free and (has_reservation or self.free != self.reserved):
            self.free -= 1
        elif self.surplus < self.overcommit:
            self.total += 1
            self.surplus += 1
        else:
            return False
        self.reserved -= has_reservation
        return True

    def give_back(self) -> None:
        if self.surplus:
            self.total -= 1
            self.surplus -= 1
        else:
            self.free += 1

    def no_longer_reserve(self, pages: int) -> None:
        self.reserved -= pages
        gone = min(pages, self.surplus, self.free)
        self.total -= gone
        self.free -= gone
        self.surplus -= gone

    def resize(self, count: int) -> None:
        while self.surplus and count > self.total - self.surplus:
            self.surplus -= 1
        grown = max(count - (self.total - self.surplus), 0)
        self.total += grown
        self.free += grown
        used = self.total - self.free
        persistent_least = max(count, self.reserved + used - self.surplus)
        gone = min(max(self.total - self.surplus - persistent_least, 0), self.free)
        self.total -= gone
        self.free -= gone
        self.surplus += max(self.total - self.surplus - count, 0)


@dataclass
class Mapping:
    address: int
    pages: int
    file: HugetlbFile | None
    reserved: set[int]
    used: set[int] = field(default_factory=set)


@dataclass
class Guest:
    """A guest_memfd, all of it reserved: which of its huge pages are there."""

    gmem: GuestMemfd
    vm: Vm
    pages: int
    used: set[int] = field(default_factory=set)


def seen(machine: Machine) -> list[int]:
    meminfo = machine.meminfo()
    return [meminfo[f"HugePages_{name}"] for name in NAMES]


class Reservations(RuleBasedStateMachine):
    """Mappings, private ones and of files that are mapped once, of one process."""

    machine: Machine
    process: AddressSpace
    created = 0

    @initialize(
        pool=st.integers(0, 8),
        overcommit=st.integers(0, 8),
        hvo=st.booleans(),
        kernel=st.sampled_from(["6.12", "6.18", "7.3"]),
    )
    def boot(self, pool: int, overcommit: int, hvo: bool, kernel: str) -> None:
        self.machine = Machine(Config(pool=8 * M2, page_size=M2, buddy=96 * M2, hvo=hvo, kernel=kernel))
        self.counts = Counts(8)
        self.mappings: list[Mapping] = []
        self.guests: list[Guest] = []
        self.process = self.machine.create_process()
        self.addresses = itertools.count(BASE, 64 * M2)
        self.resize(pool)
        self.set_overcommit(overcommit)

    @rule(count=st.integers(0, 12))
    def resize(self, count: int) -> None:
        assert self.machine.hugetlb(M2).resize(count).status == 0
        self.counts.resize(count)

    @rule(count=st.integers(0, 8))
    def set_overcommit(self, count: int) -> None:
        self.machine.hugetlb(M2).nr_overcommit_hugepages = self.counts.overcommit = count

    @rule(pages=st.integers(1, 6), shared=st.booleans(), noreserve=st.booleans())
    def map(self, pages: int, shared: bool, noreserve: bool) -> None:
        address = next(self.addresses)
        file = self.machine.create_hugetlb_file(pages * M2, M2) if shared else None
        status = self.process.mmap_hugetlb(address, pages * M2, file=file, shared=shared, noreserve=noreserve).status
        if noreserve or self.counts.reserve(pages):
            assert status == 0
            self.mappings.append(Mapping(address, pages, file, set() if noreserve else set(range(pages))))
        else:
            assert status == -W.ENOMEM
            if file:
                file.close()

    @precondition(lambda self: self.mappings)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        mapping = data.draw(st.sampled_from(self.mappings))
        page = data.draw(st.integers(0, mapping.pages - 1))
        status = self.process.touch(mapping.address + page * M2, write=True).status
        if page in mapping.used:
            assert status == 0
        elif self.counts.use(page in mapping.reserved):
            assert status == W.VM_FAULT_NOPAGE
            mapping.used.add(page)
            mapping.reserved.discard(page)
        else:
            assert status == W.VM_FAULT_SIGBUS

    @precondition(lambda self: self.mappings)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        mapping = self.mappings.pop(data.draw(st.integers(0, len(self.mappings) - 1)))
        assert self.process.munmap(mapping.address, mapping.pages * M2).status == 0
        if mapping.file:
            assert mapping.file.close().status == 0
        for _ in mapping.used:
            self.counts.give_back()
        self.counts.no_longer_reserve(len(mapping.reserved))

    @precondition(lambda self: any(mapping.file for mapping in self.mappings))
    @rule(data=st.data())
    def punch(self, data: st.DataObject) -> None:
        """A hole frees pages; the reservation of those that were never used stays."""
        mapping = data.draw(st.sampled_from([mapping for mapping in self.mappings if mapping.file]))
        page = data.draw(st.integers(0, mapping.pages - 1))
        assert mapping.file
        assert mapping.file.punch_hole(page * M2, M2).status == 0
        if page in mapping.used:
            mapping.used.discard(page)
            self.counts.give_back()

    @precondition(lambda self: self.created < 6)
    @rule(pages=st.integers(1, 4))
    def create(self, pages: int) -> None:
        """A guest_memfd's subpool reserves all of it: hugepage_new_subpool()."""
        self.created += 1
        if not self.counts.reserve(pages):
            with pytest.raises(OSError, match="cannot reserve"):
                self.machine.create_guest_memfd(pages * M2)
            return
        gmem, vm = self.machine.create_guest_memfd(pages * M2), self.machine.create_vm(protected=True)
        vm.bind(gmem, gpa=0)
        self.guests.append(Guest(gmem, vm, pages))

    @precondition(lambda self: self.guests)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.guests))
        page = data.draw(st.integers(0, guest.pages - 1))
        status = guest.vm.touch(page * M2, write=True).status
        if page in guest.used:
            assert status == W.RET_PF_SPURIOUS
        elif self.counts.use(has_reservation=True):
            assert status == W.RET_PF_FIXED
            guest.used.add(page)
        else:
            assert status == -W.ENOMEM

    @precondition(lambda self: self.guests)
    @rule(data=st.data())
    def punch_guest(self, data: st.DataObject) -> None:
        """A huge page goes back, and leaves where there are surplus ones; it is reserved again all the same."""
        guest = data.draw(st.sampled_from(self.guests))
        page = data.draw(st.integers(0, guest.pages - 1))
        assert guest.gmem.punch_hole(page * M2, M2).status == 0
        if page in guest.used:
            guest.used.discard(page)
            self.counts.give_back()
            self.counts.reserved += 1

    @precondition(lambda self: self.guests)
    @rule(data=st.data())
    def close_guest(self, data: st.DataObject) -> None:
        guest = self.guests.pop(data.draw(st.integers(0, len(self.guests) - 1)))
        guest.gmem.close()
        for _ in guest.used:
            self.counts.give_back()
        self.counts.reserved += len(guest.used)  # the subpool's again, which gives up all at its end:
        self.counts.no_longer_reserve(guest.pages)  # unlock_or_release_subpool()

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "process"):
            assert seen(self.machine) == self.counts.all
            self.machine.check()
            assert self.machine.broken[0] == 0


Reservations.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestReservations = Reservations.TestCase


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("hvo", [False, True])
@pytest.mark.parametrize("pool", range(9))
@pytest.mark.parametrize("overcommit", [0, 3, 8])
def test_sweep(kernel: str, hvo: bool, pool: int, overcommit: int) -> None:
    """Map, touch half, grow, shrink, touch all, unmap: of a file, then private."""
    machine = Reservations()
    machine.boot(pool, overcommit, hvo, kernel)
    for shared in (True, False):
        for pages in (1, 5):
            before = len(machine.mappings)
            machine.map(pages, shared, False)
            machine.equal()
            if len(machine.mappings) == before:
                continue
            mapping = machine.mappings[-1]
            for page in range(pages):
                if page == pages // 2:
                    for count in (pool + 2, pool // 2):
                        machine.resize(count)
                        machine.equal()
                assert machine.process.touch(mapping.address + page * M2, write=True).status == W.VM_FAULT_NOPAGE
                assert machine.counts.use(True)
                mapping.used.add(page)
                mapping.reserved.discard(page)
                machine.equal()
    while machine.mappings:
        mapping = machine.mappings.pop()
        assert machine.process.munmap(mapping.address, mapping.pages * M2).status == 0
        if mapping.file:
            mapping.file.close()
        for _ in mapping.used:
            machine.counts.give_back()
        machine.equal()


def test_a_reservation_takes_surplus_pages_and_returns_them() -> None:
    machine = Machine(Config(pool=M2, page_size=M2, buddy=64 << 20))
    pool = machine.hugetlb(M2)
    pool.resize(0)
    pool.nr_overcommit_hugepages = 3
    process = machine.create_process()
    assert process.mmap_hugetlb(BASE, M2).status == 0
    assert seen(machine) == [1, 1, 1, 1]
    assert process.munmap(BASE, M2).status == 0
    assert seen(machine) == [0, 0, 0, 0]
    assert process.mmap_hugetlb(BASE, 4 * M2).status == -W.ENOMEM
    assert seen(machine) == [0, 0, 0, 0]


@pytest.mark.parametrize("touched", [0, 1, 2])
def test_reserved_pages_that_became_surplus_leave(touched: int) -> None:
    machine = Machine(Config(pool=4 * M2, page_size=M2, buddy=8 * M2))
    process = machine.create_process()
    file = machine.create_hugetlb_file(3 * M2, M2)
    process.mmap_hugetlb(BASE, 3 * M2, file=file)
    machine.hugetlb(M2).resize(0)
    for page in range(touched):
        process.touch(BASE + page * M2, write=True)
    process.munmap(BASE, 3 * M2)
    file.close()
    assert seen(machine) == [0, 0, 0, 0]


def test_a_guest_memfd_takes_surplus_pages_and_returns_them() -> None:
    machine = Machine(Config(pool=M2, page_size=M2, buddy=64 << 20))
    pool = machine.hugetlb(M2)
    pool.resize(0)
    pool.nr_overcommit_hugepages = 3
    gmem, vm = machine.create_guest_memfd(2 * M2), machine.create_vm(protected=True)
    assert seen(machine) == [2, 2, 2, 2]
    with pytest.raises(OSError, match="cannot reserve"):
        machine.create_guest_memfd(2 * M2)
    assert seen(machine) == [2, 2, 2, 2]
    vm.bind(gmem, gpa=0)
    vm.touch(0)
    assert seen(machine) == [2, 1, 1, 2]
    gmem.punch_hole(0, M2)
    assert seen(machine) == [1, 1, 2, 1]  # free_huge_folio(): restore_reserve, and the page leaves
    gmem.close()
    assert seen(machine) == [0, 0, 0, 0]


def test_memory_that_ends_while_surplus_pages_are_gathered() -> None:
    """What was gathered until then goes back: nothing is reserved, nothing is surplus."""
    machine = Machine(Config(pool=M2, page_size=M2, buddy=3 * M2))
    pool = machine.hugetlb(M2)
    pool.resize(0)
    pool.nr_overcommit_hugepages = 64
    process = machine.create_process()
    assert process.mmap_hugetlb(BASE, 32 * M2).status == -W.ENOMEM
    assert seen(machine) == [0, 0, 0, 0]
    machine.check()
    assert machine.broken[0] == 0
    assert process.mmap_hugetlb(BASE, 2 * M2).status == 0
    assert seen(machine) == [2, 2, 2, 2]


def test_gigantic_pages_can_be_surplus_since_6_19() -> None:
    """mm/hugetlb.c:nr_overcommit_hugepages_store(), hstate_is_gigantic_no_runtime()"""
    old = Machine(Config(pool=G1, page_size=G1, kernel="6.18"))
    with pytest.raises(OSError, match=r"6\.19"):
        old.hugetlb(G1).nr_overcommit_hugepages = 1
    machine = Machine(Config(pool=G1, page_size=G1, kernel="7.3", buddy=3 * G1))
    pool = machine.hugetlb(G1)
    pool.resize(0)
    pool.nr_overcommit_hugepages = 1
    process = machine.create_process()
    assert process.mmap_hugetlb(BASE, G1, page_size=G1).status == 0
    assert seen(machine) == [1, 1, 1, 1]
    assert process.touch(BASE, write=True).status == W.VM_FAULT_NOPAGE
    assert seen(machine) == [1, 0, 0, 1]
    assert process.munmap(BASE, G1).status == 0
    assert seen(machine) == [0, 0, 0, 0]


def test_demotion_of_a_node_asks_for_more_pages_there_than_are_reserved_anywhere() -> None:
    """mm/hugetlb_sysfs.c:demote_store(): free pages of the node less all reserved ones, of both nodes."""
    machine = Machine(Config(pool=6 * G1, page_size=G1, nodes=2))
    pool = machine.hugetlb(G1)
    machine.create_guest_memfd(3 * G1)
    assert pool.node(0).free_hugepages == 3
    assert tuple(pool.demote(3, 0)) == (0, 0)
    assert tuple(pool.demote(1)) == (0, 1)  # of both, 6 are free


def test_demotion_takes_reserved_pages_too() -> None:
    """demote_pool_huge_page() takes as many as are asked for once one is free that is not reserved."""
    machine = Machine(Config(pool=4 * G1, page_size=G1))
    pool = machine.hugetlb(G1)
    gmem, vm = machine.create_guest_memfd(3 * G1), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    assert tuple(pool.demote(4)) == (0, 4)
    assert (pool.nr_hugepages, pool.free_hugepages, pool.resv_hugepages) == (0, 0, 3)
    assert vm.touch(0).status == -W.ENOMEM
    assert tuple(pool.demote(1)) == (-W.EBUSY, 0)  # 0 less 3 is not 0
    machine.check()
    assert machine.broken[0] == 0
    assert gmem.close().status == 0
    assert pool.resv_hugepages == 0


def test_a_pool_with_fewer_pages_than_reservations_gives_them_to_anybody() -> None:
    """available_huge_pages() is an unsigned difference: it is not 0 where more are reserved than free."""
    machine = Machine(Config(pool=2 * M2, page_size=M2, buddy=16 * M2))
    pool = machine.hugetlb(M2)
    gmem, vm = machine.create_guest_memfd(2 * M2), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    vm.touch(0)
    pool.resize(0)  # the page in use and the reserved one are surplus
    gmem.punch_hole(0, M2)
    assert seen(machine) == [1, 1, 2, 1]
    assert pool.allocate().status == 0
    assert vm.touch(M2).status == -W.ENOMEM
