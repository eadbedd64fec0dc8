"""KVM over a process's memory: by random sequences against the dict-based model, and case by case.

PGEMU_EXAMPLES sets how many sequences are tried and makes them random; without it they are the same at every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model import kvm as model
from model.kvm import Kvm, Leaf, Slot
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine, Result
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

PAGE = W.PAGE_4K
FRAME = 0x000F_FFFF_FFFF_F000
GMEM_PAGES = 512
READ, READ_WRITE = 1, 3


class Bits(NamedTuple):
    """What entries hold, from the captures."""

    table: int
    leaf: int
    execute: int
    write: int
    marked: int
    accessed: int
    dirty: int
    mmio: int


BITS = {
    ("npt", "7.3"): Bits(0x827, 0x805, 0, 2, 0x600, 0x20, 0x40, 0x8_0000_0000_0007),
    ("npt", "6.12"): Bits(0x827, 0x805, 0, 2, 0x600, 0x20, 0x40, 0x8_0000_0000_0007),
    ("ept", "7.3"): Bits(1 << 63 | 0xD07, 1 << 63 | 0x871, 0x404, 2, 1 << 53 | 1 << 55, 0x100, 0x200, 6),
    ("ept", "6.12"): Bits(1 << 63 | 0x907, 1 << 63 | 0x871, 4, 2, 1 << 57 | 1 << 58, 0x100, 0x200, 6),
}


def leaf_flags(bits: Bits, level: int, leaf: Leaf) -> int:
    value = bits.leaf | (0x80 if level > 1 else 0)
    for holds, mask in (
        (leaf.execute, bits.execute),
        (leaf.write, bits.write),
        (leaf.marked, bits.marked),
        (leaf.accessed, bits.accessed),
        (leaf.dirty, bits.dirty),
    ):
        value |= mask if holds else 0
    return value


def by_key(entries: Any) -> dict[tuple[int, int], int]:
    return {(level, gpa >> 12): entry for gpa, level, entry in entries.tolist()}


# Guest frames: alone in its 512G, alone in a 1G, two that share a 2M block, and one not congruent to host blocks.
GFNS = (0, 512, 1024, 1, 0x200 * 3 + 7, 0x4_0000, 0x4_0000 + 512, 0x800_0000)
SIZES = (1, 8, 512, 600, 1024)
HVAS = (model.ANON, model.ANON + 512, model.ANON + 5, model.HUGE, model.HUGE + 512, model.HUGE + 3)
OFFSETS = (0, 1, 5, 7, 255, 511, 512, 599, 1023)
numbers = st.integers(0, 3)
offsets = st.sampled_from(OFFSETS)


class KvmSequences(RuleBasedStateMachine):
    """A VM with up to four slots over anonymous memory, HugeTLB memory and a guest_memfd."""

    @initialize(data=st.data())
    def boot(self, data: st.DataObject) -> None:
        stage2, kernel = data.draw(st.sampled_from(sorted(BITS)))
        nx = stage2 == "ept" and data.draw(st.booleans())
        kind = data.draw(st.sampled_from(("plain", "sw", "tdx" if stage2 == "ept" else "snp")))
        protected = kind != "plain"
        self.bits = BITS[stage2, kernel]
        self.machine = Machine(
            Config("pfnmap", pool=4 * W.PAGE_2M, page_size=W.PAGE_2M, kernel=kernel, stage2=stage2, nx_huge_pages=nx)
        )
        self.process = self.machine.create_process()
        self.process.mmap_anonymous(model.ANON * PAGE, model.ANON_PAGES * PAGE)
        self.process.mmap_hugetlb(model.HUGE * PAGE, model.HUGE_PAGES * PAGE)
        self.vm = self.machine.create_vm(self.process, kind=kind)
        self.gmem = self.machine.create_guest_memfd_4k(GMEM_PAGES * PAGE, mmap=False, init_shared=False)
        self.model = Kvm(protected, nx, recovers=kernel != "6.12", mirrored=kind == "tdx")
        self.steps = 0
        for number, hva in enumerate((model.ANON, model.HUGE)):
            self.region(number, 512 * number * 2, 1024, hva, False, data.draw(st.booleans()), None)

    def region(self, number: int, gfn: int, pages: int, hva: int, read_only: bool, log: bool, gmem: int | None) -> None:
        result = self.vm.set_memory_region(
            number,
            gfn * PAGE,
            pages * PAGE,
            hva * PAGE,
            read_only=read_only,
            log_dirty_pages=log,
            gmem=None if gmem is None else self.gmem,
            gmem_offset=0 if gmem is None else gmem * PAGE,
        )
        if gmem is not None and gmem + pages > GMEM_PAGES:
            assert result.status < 0
            return
        if gmem is not None and not self.model.protected:
            return  # 7.3 lets every VM have one; the model has private memory in mind
        assert result.status == self.model.region(number, Slot(gfn, pages, hva, read_only, log, gmem))

    def gfn(self, number: int, offset: int) -> int:
        """A guest frame: of a slot, or near it."""
        slots = [self.model.slots[key] for key in sorted(self.model.slots)]
        if not slots:
            return offset
        slot = slots[number % len(slots)]
        return slot.gfn + (offset if number % 4 == 3 else offset % slot.pages)

    # ------------------------------------------------------------------ slots

    @rule(number=numbers, gfn=st.sampled_from(GFNS), pages=st.sampled_from(SIZES), hva=st.sampled_from(HVAS),
          read_only=st.booleans(), log=st.booleans())  # fmt: skip
    def makes_slot(self, number: int, gfn: int, pages: int, hva: int, read_only: bool, log: bool) -> None:
        self.region(number, gfn, pages, hva, read_only and not log, log, None)

    @rule(number=numbers, gfn=st.sampled_from(GFNS), pages=st.sampled_from((8, 512)), hva=st.sampled_from(HVAS))
    def makes_private_slot(self, number: int, gfn: int, pages: int, hva: int) -> None:
        if self.model.protected:
            self.region(number, gfn, pages, hva, False, False, 0)

    @rule(number=numbers, gfn=st.sampled_from(GFNS))
    def moves_slot(self, number: int, gfn: int) -> None:
        slot = self.model.slots.get(number)
        if slot is not None:
            self.region(number, gfn, slot.pages, slot.hva, slot.read_only, slot.log, None)

    @rule(number=numbers)
    def switches_logging(self, number: int) -> None:
        slot = self.model.slots.get(number)
        if slot is not None:
            self.region(number, slot.gfn, slot.pages, slot.hva, slot.read_only, not slot.log, None)

    @rule(number=numbers)
    def deletes_slot(self, number: int) -> None:
        self.region(number, 0, 0, 0, False, False, None)

    @rule(number=numbers)
    def reads_dirty_log(self, number: int) -> None:
        status, pages = self.vm.dirty_log(number)
        expected, gfns = self.model.dirty_log(number)
        assert (status, [page >> 12 for page in pages.tolist()]) == (expected, gfns)

    # ------------------------------------------------------------------ the guest

    @rule(number=numbers, offset=offsets, how=st.sampled_from("rrwwx"))
    def guest_touches(self, number: int, offset: int, how: str) -> None:
        gfn = self.gfn(number, offset)
        result = self.vm.touch(gfn * PAGE, write=how == "w", execute=how == "x")
        assert tuple(result) == self.model.access(gfn, how == "w", how == "x")

    @rule(number=numbers, offset=offsets, pages=st.sampled_from((1, 3, 16, 600)))
    def prefaults(self, number: int, offset: int, pages: int) -> None:
        gfn = self.gfn(number, offset)
        result = self.vm.prefault(gfn * PAGE, pages * PAGE)
        status, done = self.model.prefault(gfn, pages)
        assert result.status == status
        if status == 0:
            assert result.detail == min(done, pages) * PAGE

    @rule(number=numbers, offset=offsets, pages=st.sampled_from((1, 4, 512, 1024)), private=st.booleans())
    def converts(self, number: int, offset: int, pages: int, private: bool) -> None:
        gfn = self.gfn(number, offset)
        result = self.vm.set_attributes(gfn * PAGE, pages * PAGE, private=private)
        assert result.status == self.model.attributes(gfn, pages, private)

    # ------------------------------------------------------------------ the process

    @rule(page=st.sampled_from((0, 1, 5, 511, 512, 1023)), huge=st.booleans(), write=st.booleans())
    def host_touches(self, page: int, huge: bool, write: bool) -> None:
        at = (model.HUGE if huge else model.ANON) + page
        result = self.process.touch(at * PAGE, write=write)
        found = self.model.host.fault(at, write)
        assert (result.status & W.VM_FAULT_SIGSEGV != 0) == (found is None)
        if found is not None and found[3]:
            self.model.notify(at, 1)

    @rule(page=st.sampled_from((0, 1, 500, 512)), pages=st.sampled_from((1, 20, 512)))
    def dontneed(self, page: int, pages: int) -> None:
        assert self.process.madvise_dontneed((model.ANON + page) * PAGE, pages * PAGE).status == 0
        self.model.dontneed(model.ANON + page, pages)

    @rule(block=st.integers(0, 2))
    def dontneed_huge(self, block: int) -> None:
        assert self.process.madvise_dontneed((model.HUGE + 512 * block) * PAGE, W.PAGE_2M).status == 0
        self.model.dontneed(model.HUGE + 512 * block, 512)

    @rule(block=st.integers(0, 1), writable=st.booleans())
    def protects(self, block: int, writable: bool) -> None:
        prot = READ_WRITE if writable else READ
        assert self.process.protect((model.ANON + 512 * block) * PAGE, W.PAGE_2M, prot).status == 0
        self.model.protect(block, writable)

    @rule(index=st.sampled_from((0, 3, 511)), pages=st.sampled_from((1, 8, 512)))
    def punches(self, index: int, pages: int) -> None:
        pages = min(pages, GMEM_PAGES - index)
        assert self.gmem.punch_hole(index * PAGE, pages * PAGE).status == 0
        self.model.punch(index, pages)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def tree_is_equal(self) -> None:
        if not hasattr(self, "vm"):
            return
        for private in (False, True) if self.model.mirrored else (False,):
            with self.model.tree(private):
                self.one_tree_is_equal(private)
        for number, slot in self.model.slots.items():
            dirty = [page >> 12 for page in self.vm._dirty_pages(number).tolist()]
            assert dirty == sorted(slot.gfn + page for page in slot.dirty)
        self.steps += 1
        if self.steps % 8 == 0:
            assert self.machine.check() == 0, self.machine.broken

    def one_tree_is_equal(self, private: bool) -> None:
        tree = self.vm.stage2(private=private)
        leaves = by_key(tree.leaves)
        flags = {key: entry & ~FRAME for key, entry in leaves.items()}
        assert flags == {key: leaf_flags(self.bits, key[0], leaf) for key, leaf in self.model.leaves.items()}
        tables = {(level - 1, gfn): entry & ~FRAME for (level, gfn), entry in by_key(tree.tables).items()}
        assert tables == dict.fromkeys(self.model.tables, self.bits.table)
        mmio = {gfn: self.bits.mmio | gfn << 12 | (generation & 255) << 3 | generation >> 8 << 52
                for gfn, generation in self.model.mmio.items()}  # fmt: skip
        assert {gfn: entry for (_, gfn), entry in by_key(tree.others).items()} == mmio
        self.frames_are_equal({key: (entry & FRAME) >> 12 for key, entry in leaves.items()})

    def frames_are_equal(self, leaves: dict[tuple[int, int], int]) -> None:
        """Frames that the model calls the same are the same, and no others."""
        now: dict[Any, int] = {}
        for key, pfn in leaves.items():
            assert now.setdefault(self.model.leaves[key].frame, pfn) == pfn
        assert len(set(now.values())) == len(now)

    def teardown(self) -> None:
        if hasattr(self, "vm"):
            assert self.vm.close().status == 0
            assert self.machine.check() == 0, self.machine.broken
            assert self.vm.table_pages == 0


EXAMPLES = int(os.environ.get("PGEMU_EXAMPLES", 150))
KvmSequences.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    derandomize="PGEMU_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestKvmSequences = KvmSequences.TestCase


# --------------------------------------------------------------------------- case by case

ANON = model.ANON * PAGE
HUGE = model.HUGE * PAGE


def guest(size: int = 64 << 20, protected: bool = False, **config: Any) -> tuple[Machine, AddressSpace, Vm]:
    """A machine, a process with anonymous memory, and a VM of it."""
    machine = Machine(Config("pfnmap", **{"pool": 8 * W.PAGE_2M, "page_size": W.PAGE_2M, **config}))
    process = machine.create_process()
    assert process.mmap_anonymous(ANON, size).status == 0
    return machine, process, machine.create_vm(process, protected=protected)


def entry(vm: Vm, gpa: int) -> int:
    return vm.walk(gpa)[-1][2]


BAD_REGIONS = {
    "guest address": {"gpa": 0x800, "size": PAGE, "userspace_addr": ANON},
    "size": {"gpa": 0, "size": 0x800, "userspace_addr": ANON},
    "userspace address": {"gpa": 0, "size": PAGE, "userspace_addr": ANON + 1},
    "beyond the process": {"gpa": 0, "size": 2 * PAGE, "userspace_addr": (1 << 47) - 2 * PAGE},
    "beyond 48 bits": {"gpa": (1 << 48) - PAGE, "size": 2 * PAGE, "userspace_addr": ANON},
    "wraps": {"gpa": (1 << 64) - PAGE, "size": 2 * PAGE, "userspace_addr": ANON},
    "nothing to delete": {"gpa": 0, "size": 0, "userspace_addr": 0},
    "too many pages": {"gpa": 0, "size": 1 << 43, "userspace_addr": 0},
    "number": {"gpa": 0, "size": PAGE, "userspace_addr": ANON, "slot": 32764},
}


@pytest.mark.parametrize("region", BAD_REGIONS.values(), ids=BAD_REGIONS)
def test_regions_that_kvm_refuses(region: dict[str, int]) -> None:
    _, _, vm = guest()
    assert vm.set_memory_region(**{"slot": 0, **region}).status == -W.EINVAL
    assert vm.set_memory_region(0, 0, PAGE, ANON).status == 0


def test_changes_of_a_region() -> None:
    machine, _, vm = guest()
    assert vm.set_memory_region(0, 0, 2 * PAGE, ANON).status == 0
    assert vm.set_memory_region(0, 0, 2 * PAGE, ANON).status == 0  # nothing changes
    assert vm.set_memory_region(0, 0, 3 * PAGE, ANON).status == -W.EINVAL
    assert vm.set_memory_region(0, 0, 2 * PAGE, ANON + PAGE).status == -W.EINVAL
    assert vm.set_memory_region(0, 0, 2 * PAGE, ANON, read_only=True).status == -W.EINVAL
    assert vm.set_memory_region(1, PAGE, PAGE, ANON).status == -W.EEXIST
    assert vm.set_memory_region(1, 2 * PAGE, PAGE, ANON).status == 0
    assert vm.set_memory_region(1, PAGE, PAGE, ANON).status == -W.EEXIST  # a move
    assert vm.touch(0, write=True).status == W.RET_PF_FIXED
    assert vm.set_memory_region(1, 8 * PAGE, PAGE, ANON).status == 0
    assert vm.stage2().root == 0  # a move drops the tree, too
    assert vm.touch(8 * PAGE).status == W.RET_PF_FIXED
    assert vm.touch(0).status == W.RET_PF_FIXED
    assert entry(vm, 0) & FRAME == entry(vm, 8 * PAGE) & FRAME
    assert machine.check() == 0


def test_a_vm_without_a_process_has_no_userspace_addresses() -> None:
    machine, _, _ = guest()
    assert machine.create_vm().set_memory_region(0, 0, PAGE, ANON).status == -W.EINVAL


def test_cached_mmio_is_refreshed_when_the_slots_change() -> None:
    """The entry carries the generation of the slots: two steps for each change, as two address spaces share it."""
    _, _, vm = guest()
    vm.set_memory_region(0, 0, PAGE, ANON)
    gpa = 5 * PAGE
    assert vm.touch(gpa, write=True).status == W.RET_PF_EMULATE
    assert entry(vm, gpa) == 0x8_0000_0000_0007 | gpa | 2 << 3
    vm.set_memory_region(1, 16 * PAGE, PAGE, ANON)
    assert entry(vm, gpa) == 0x8_0000_0000_0007 | gpa | 2 << 3
    assert vm.touch(gpa).status == W.RET_PF_EMULATE
    assert entry(vm, gpa) == 0x8_0000_0000_0007 | gpa | 4 << 3
    assert vm.set_memory_region(2, gpa, PAGE, ANON).status == 0
    assert vm.touch(gpa, write=True).status == W.RET_PF_FIXED
    assert entry(vm, gpa) & ~FRAME == 0xE67
    assert vm.leaves() == (1, 0, 0)


def test_mmio_beyond_what_tables_reach_is_not_cached() -> None:
    _, _, vm = guest()
    vm.set_memory_region(0, 0, PAGE, ANON)
    assert vm.touch(1 << 48).status == W.RET_PF_EMULATE
    assert len(vm.stage2().others) == 0


def test_guest_memfd_of_a_slot() -> None:
    machine, _, vm = guest(protected=True)
    gmem = machine.create_guest_memfd_4k(16 * PAGE, mmap=False, init_shared=False)
    region = {"gpa": 0, "size": 8 * PAGE, "userspace_addr": ANON, "gmem": gmem}
    assert vm.set_memory_region(0, **region, read_only=True).status == -W.EINVAL
    assert vm.set_memory_region(0, **region, log_dirty_pages=True).status == -W.EINVAL
    assert vm.set_memory_region(0, **region, gmem_offset=9 * PAGE).status == -W.EINVAL
    assert vm.set_memory_region(0, **region, gmem_offset=0x800).status == -W.EINVAL
    assert vm.set_memory_region(0, **region, gmem_offset=8 * PAGE).status == 0
    assert vm.set_memory_region(0, **region, gmem_offset=8 * PAGE).status == -W.EINVAL  # cannot be changed
    assert vm.set_memory_region(1, **{**region, "gpa": 1 << 30}, gmem_offset=PAGE).status == -W.EINVAL  # bound already
    assert vm.set_attributes(0, 4 * PAGE, private=True).status == 0
    assert vm.touch(0, write=True).status == W.RET_PF_FIXED
    assert vm.touch(4 * PAGE, write=True).status == W.RET_PF_FIXED
    assert machine.operate(
        W.Operation.GUEST_FAULT, flags=W.Flag.SHARED, vm=vm.vm, address=0
    ).status == -W.EFAULT  # fmt: skip
    assert machine.check() == 0
    # The file goes: private pages cannot come back, shared ones can.
    assert gmem.close().status == 0
    assert vm.leaves() == (0, 0, 0)
    assert vm.touch(0).status == -W.EFAULT
    assert vm.touch(4 * PAGE).status == W.RET_PF_FIXED
    assert vm.set_memory_region(1, **{**region, "gpa": 1 << 30}).status == -W.EBADF
    assert machine.check() == 0


def test_private_memory_without_a_guest_memfd_is_a_memory_fault() -> None:
    _, _, vm = guest(protected=True)
    vm.set_memory_region(0, 0, 8 * PAGE, ANON)
    assert vm.set_attributes(0, PAGE, private=True).status == 0
    assert vm.touch(0).status == -W.EFAULT
    assert vm.touch(PAGE).status == W.RET_PF_FIXED
    assert vm.prefault(0, 2 * PAGE) == (-W.EFAULT, 0)


@pytest.mark.parametrize(("gpa", "size"), [(1, PAGE), (0, 100), (0, 0), ((1 << 64) - PAGE, 2 * PAGE)])
def test_attributes_and_prefault_refuse_bad_ranges(gpa: int, size: int) -> None:
    _, _, vm = guest(protected=True)
    vm.set_memory_region(0, 0, 8 * PAGE, ANON)
    assert vm.set_attributes(gpa, size, private=True).status == -W.EINVAL
    assert vm.prefault(gpa, size).status == -W.EINVAL


def test_private_memory_needs_a_protected_vm() -> None:
    _, _, vm = guest()
    vm.set_memory_region(0, 0, 8 * PAGE, ANON)
    assert vm.set_attributes(0, PAGE, private=True).status == -W.EINVAL
    assert vm.set_attributes(0, PAGE, private=False).status == 0


def test_prefault_stops_at_the_end_of_the_slot() -> None:
    _, _, vm = guest()
    vm.set_memory_region(0, 0, 8 * PAGE, ANON)
    assert vm.prefault(6 * PAGE, 4 * PAGE) == (0, 2 * PAGE)
    assert vm.prefault(8 * PAGE, PAGE) == (-W.ENOENT, 0)
    assert entry(vm, 6 * PAGE) & ~FRAME == 0x805  # the zero page, not accessed
    vm.touch(6 * PAGE)
    assert entry(vm, 6 * PAGE) & ~FRAME == 0x825


@pytest.mark.parametrize("stage2", ["npt", "ept"])
def test_a_device_is_uncached_in_ept(stage2: str) -> None:
    machine, process, vm = guest(stage2=stage2)
    device = machine.create_device(1 << 24, 1 << 18)
    assert process.mmap_device(device, 0x7200_0000_0000).status == 0
    vm.set_memory_region(0, 1 << 32, 1 << 30, 0x7200_0000_0000)
    assert vm.touch((1 << 32) + 5 * PAGE, write=True) == (W.RET_PF_FIXED, 3)
    assert entry(vm, 1 << 32) & FRAME == 1 << 36
    expected = 0xEE7 if stage2 == "npt" else 1 << 63 | 1 << 53 | 1 << 55 | 0xF87
    assert entry(vm, 1 << 32) & ~FRAME == expected


def test_collapse_leaves_a_table_without_leaves_alone() -> None:
    _, process, vm = guest()
    process.mmap_hugetlb(HUGE, W.PAGE_2M)
    vm.set_memory_region(0, 0, W.PAGE_2M, HUGE, log_dirty_pages=True)
    vm.touch(0, write=True)
    process.madvise_dontneed(HUGE, W.PAGE_2M)
    process.touch(HUGE)
    tables = vm.table_pages
    assert vm.set_memory_region(0, 0, W.PAGE_2M, HUGE).status == 0
    assert (vm.table_pages, vm.leaves()) == (tables, (0, 0, 0))
    assert vm.touch(0).detail == 2  # the large leaf takes the table's place
    assert vm.table_pages == tables - 1


def test_splitting_without_memory_leaves_a_large_leaf_write_protected() -> None:
    machine, process, vm = guest(frames=180)
    process.mmap_hugetlb(HUGE, W.PAGE_2M)
    vm.set_memory_region(0, 0, W.PAGE_2M, HUGE)
    assert vm.touch(0, write=True).detail == 2
    at = ANON
    while not process.touch(at, write=True).status & W.VM_FAULT_OOM:
        at += PAGE
    assert vm.set_memory_region(0, 0, W.PAGE_2M, HUGE, log_dirty_pages=True).status == 0
    assert entry(vm, 0) & ~FRAME == 0xEE5
    # The fast path does not fix a large leaf while writes are logged, and for a small one there is no memory.
    assert vm.touch(0, write=True).status == -W.ENOMEM
    process.madvise_dontneed(ANON, 8 * PAGE)
    assert vm.touch(0, write=True) == (W.RET_PF_FIXED, 1)
    assert machine.check() == 0


def test_the_attributes_of_a_large_range_are_all_or_nothing() -> None:
    machine, process, vm = guest(protected=True, frames=200)
    vm.set_memory_region(0, 0, 1 << 30, ANON)
    at = ANON
    while not process.touch(at, write=True).status & W.VM_FAULT_OOM:
        at += PAGE
    assert vm.set_attributes(0, 1 << 30, private=True).status == -W.ENOMEM
    assert vm.touch(0).status != -W.EFAULT
    assert machine.check() == 0


def test_a_closed_vm_refuses_everything() -> None:
    machine, process, vm = guest()
    vm.set_memory_region(0, 0, PAGE, ANON, log_dirty_pages=True)
    vm.touch(0, write=True)
    used = machine.statistics.gauge(W.Gauge.FRAMES_USED)
    assert vm.close().status == 0
    # Five tables and three nodes of the dirty bitmap at most: the process keeps its page.
    assert machine.statistics.gauge(W.Gauge.FRAMES_USED) < used
    assert vm.touch(0).status == -W.EBADF
    assert vm.set_memory_region(0, 0, PAGE, ANON).status == -W.EBADF
    assert vm.close().status == -W.EBADF
    process.madvise_dontneed(ANON, PAGE)
    assert machine.check() == 0


def test_slots_of_both_worlds_in_one_vm() -> None:
    """A guest_memfd over HugeTLB beside the process's memory, and a device where one of them comes to lie later."""
    machine, _, vm = guest()
    gmem = machine.create_guest_memfd(2 * W.PAGE_2M, shared=False)
    assert vm.set_memory_region(0, 0, 8 * PAGE, ANON).status == 0
    assert vm.touch(1 << 32).status == W.RET_PF_EMULATE
    assert vm.bind(gmem, gpa=1 << 32).status == 0
    assert vm.touch(1 << 32) == (W.RET_PF_FIXED, 2)
    assert vm.touch(0, write=True) == (W.RET_PF_FIXED, 1)
    assert vm.unbind(0).status == 0
    assert vm.stage2().root == 0
    assert vm.touch(1 << 32) == (W.RET_PF_FIXED, 2)
    assert vm.unbind(1 << 32).status == 0
    assert vm.unbind(1 << 32).status == -W.ENOENT
    assert gmem.close().status == 0
    assert machine.check() == 0


@pytest.mark.parametrize(("kernel", "status"), [("6.12", -W.EINVAL), ("6.18", -W.EBADF), ("7.3", -W.EBADF)])
def test_guest_memfd_serves_ordinary_vms_from_6_18_on(kernel: str, status: int) -> None:
    """A slot with guest_memfd, and no file named: refused by its flag, or for want of the file."""
    machine, _, vm = guest(kernel=kernel)
    flags = W.Flag.PRIVATE
    assert machine.operate(W.Operation.MEMSLOT, flags=flags, vm=vm.vm, offset=ANON, length=PAGE).status == status


def run_short(frames: int | None) -> tuple[Machine, set[int]]:
    """A fixed list of calls on a machine of so many frames, recounted after each: it, and what the calls returned."""
    machine, process, vm = guest(frames=frames, protected=True, stage2="ept", nx_huge_pages=True)
    gmem = machine.create_guest_memfd_4k(64 * PAGE, mmap=False, init_shared=False)
    process.mmap_hugetlb(HUGE, 2 * W.PAGE_2M)
    vm.set_memory_region(0, 0, 64 * PAGE, ANON, gmem=gmem)
    vm.set_memory_region(1, 1 << 30, 2 * W.PAGE_2M, HUGE)
    calls: list[Callable[[], Result]] = [
        *(partial(vm.touch, i * PAGE, write=i % 2 == 0) for i in range(0, 64, 7)),
        partial(vm.set_attributes, 0, 32 * PAGE, private=True),
        *(partial(vm.touch, i * PAGE, write=True) for i in range(0, 64, 5)),
        partial(vm.touch, (1 << 30) + PAGE, write=True),
        partial(vm.touch, (1 << 30) + W.PAGE_2M, execute=True),
        partial(vm.set_memory_region, 1, 1 << 30, 2 * W.PAGE_2M, HUGE, log_dirty_pages=True),
        *(partial(vm.touch, (1 << 30) + i * 9 * PAGE, write=True) for i in range(16)),
        partial(vm.touch, 1 << 40),
        partial(vm.prefault, 0, 64 * PAGE),
        partial(process.madvise_dontneed, ANON, 40 * PAGE),
        partial(vm.set_memory_region, 1, 1 << 30, 2 * W.PAGE_2M, HUGE),
        partial(gmem.punch_hole, 0, 8 * PAGE),
        partial(vm.set_attributes, 0, 16 * PAGE, private=False),
        partial(vm.prefault, 1 << 30, W.PAGE_2M),
        partial(vm.set_memory_region, 0, 0, 0),
        vm.close,
    ]
    returned = set()
    for call in calls:
        returned.add(call().status)
        assert machine.check() == 0, machine.broken
    assert machine.statistics.gauge(W.Gauge.STAGE2_TABLES) == 0
    return machine, returned


def test_memory_that_runs_out_anywhere_leaves_everything_in_order() -> None:
    machine, returned = run_short(None)
    done = {0, W.RET_PF_FIXED, W.RET_PF_SPURIOUS, W.RET_PF_EMULATE}
    assert returned <= done
    needed = machine.statistics.peak(W.Gauge.FRAMES_USED)
    for frames in range(20, needed):
        _, returned = run_short(frames)
        assert returned <= done | {-W.ENOMEM, -W.ENOENT}
        assert -W.ENOMEM in returned or frames > needed - 40  # populating ahead may stop unseen
