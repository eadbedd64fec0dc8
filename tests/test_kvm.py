"""KVM over a process's memory: by random sequences against the dict-based model, and case by case.

PGEMU_EXAMPLES sets how many sequences are tried and makes them random; without it they are the same at every run.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model import kvm as model
from model.kvm import Kvm, Leaf, Slot
from pgemu.machine import Config, Machine
from pgemu_kernels import layout as L

PAGE = L.PAGE_4K
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
        protected = data.draw(st.booleans())
        self.bits = BITS[stage2, kernel]
        self.machine = Machine(
            Config("pfnmap", pool=4 * L.PAGE_2M, page_size=L.PAGE_2M, kernel=kernel, stage2=stage2, nx_huge_pages=nx)
        )
        self.process = self.machine.create_process()
        self.process.mmap_anonymous(model.ANON * PAGE, model.ANON_PAGES * PAGE)
        self.process.mmap_hugetlb(model.HUGE * PAGE, model.HUGE_PAGES * PAGE)
        self.vm = self.machine.create_vm(self.process, protected=protected)
        self.gmem = self.machine.create_guest_memfd_4k(GMEM_PAGES * PAGE, mmap=False, init_shared=False)
        self.model = Kvm(protected, nx, recovers=kernel != "6.12")
        self.pfns: dict[Any, int] = {}
        self.steps = 0
        for number, hva in enumerate((model.ANON, model.HUGE)):
            self.region(number, 512 * number * 2, 1024, hva, False, False, None)

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
        assert (result.status & L.VM_FAULT_SIGSEGV != 0) == (found is None)
        if found is not None and found[3]:
            self.model.notify(at, 1)

    @rule(page=st.sampled_from((0, 1, 500, 512)), pages=st.sampled_from((1, 20, 512)))
    def dontneed(self, page: int, pages: int) -> None:
        assert self.process.madvise_dontneed((model.ANON + page) * PAGE, pages * PAGE).status == 0
        self.model.dontneed(model.ANON + page, pages)

    @rule(block=st.integers(0, 2))
    def dontneed_huge(self, block: int) -> None:
        assert self.process.madvise_dontneed((model.HUGE + 512 * block) * PAGE, L.PAGE_2M).status == 0
        self.model.dontneed(model.HUGE + 512 * block, 512)

    @rule(block=st.integers(0, 1), writable=st.booleans())
    def protects(self, block: int, writable: bool) -> None:
        prot = READ_WRITE if writable else READ
        assert self.process.protect((model.ANON + 512 * block) * PAGE, L.PAGE_2M, prot).status == 0
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
        tree = self.vm.stage2()
        leaves = by_key(tree.leaves)
        flags = {key: entry & ~FRAME for key, entry in leaves.items()}
        assert flags == {key: leaf_flags(self.bits, key[0], leaf) for key, leaf in self.model.leaves.items()}
        tables = {(level - 1, gfn): entry & ~FRAME for (level, gfn), entry in by_key(tree.tables).items()}
        assert tables == dict.fromkeys(self.model.tables, self.bits.table)
        mmio = {gfn: self.bits.mmio | gfn << 12 | (generation & 255) << 3 | generation >> 8 << 52
                for gfn, generation in self.model.mmio.items()}  # fmt: skip
        assert {gfn: entry for (_, gfn), entry in by_key(tree.others).items()} == mmio
        self.frames_are_equal({key: (entry & FRAME) >> 12 for key, entry in leaves.items()})
        self.steps += 1
        if self.steps % 8 == 0:
            assert self.machine.check() == 0, self.machine.broken

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
