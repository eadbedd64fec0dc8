"""Many VMs over one inode: whoever takes pages from its guests takes them from all, and from nobody else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
PAGES = 4 * 512
VMS = 4
# (guest frame, first page, pages): congruent, not congruent, halves of one 2M in two slots, the end of the file.
SLOTS = ((0, 0, PAGES), (512, 512, 512), (1 << 18, 3, 700), (7, 300, 100), (1 << 20, 400, 624), (1536, 1536, 512))

Slot = tuple[int, int, int]


def spans(vm: Vm) -> set[tuple[int, int]]:
    """Guest frames of a VM's leaves: (first, behind the last)."""
    return {(int(gpa) >> 12, (int(gpa) >> 12) + 512 ** (int(level) - 1)) for gpa, level, _ in vm.stage2().leaves}


def shown(slots: list[Slot], first: int, last: int) -> list[tuple[int, int]]:
    """Guest frames at which slots show pages [first, last)."""
    found = []
    for gfn, page, pages in slots:
        low, high = max(first, page), min(last, page + pages)
        if low < high:
            found.append((gfn + low - page, gfn + high - page))
    return found


def meets(span: tuple[int, int], ranges: list[tuple[int, int]]) -> bool:
    return any(span[0] < last and first < span[1] for first, last in ranges)


pages = st.one_of(st.integers(0, PAGES - 1), st.sampled_from((0, 299, 399, 400, 511, 512, 1023, 1535, 1536, PAGES - 1)))
STEPS = st.one_of(
    st.tuples(st.just("bind"), st.integers(0, VMS - 1), st.sampled_from(SLOTS), st.just(0)),
    st.tuples(st.just("unbind"), st.integers(0, VMS - 1), st.sampled_from(SLOTS), st.just(0)),
    st.tuples(st.just("touch"), st.integers(0, VMS - 1), pages, st.integers(0, 1)),
    st.tuples(st.just("touch"), st.integers(0, VMS - 1), pages, st.integers(0, 1)),
    st.tuples(st.just("convert"), pages, st.sampled_from((1, 2, 64, 512, 513, PAGES)), st.integers(0, 1)),
    st.tuples(st.just("punch"), pages, st.sampled_from((1, 512, 600, PAGES)), st.just(0)),
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    design=st.sampled_from(DESIGNS),
    protected=st.booleans(),
    zap=st.sampled_from(("exact", "exact", "rounded")),
    steps=st.lists(STEPS, min_size=8, max_size=40),
)
def test_pages_leave_every_vm_that_has_them(design: str, protected: bool, zap: str, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    machine = Machine(Config(design, pool=8 * M2, page_size=M2, zap_filter="both", zap=zap, punch="zero"))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(PAGES * PAGE, shared=True)
    vms = [machine.create_vm(protected=protected) for _ in range(VMS)]
    slots: list[list[Slot]] = [[] for _ in vms]
    for what, a, b, c in steps:
        if what == "bind":
            gfn, page, count = b
            if vms[a].bind(gmem, gfn * PAGE, offset=page * PAGE, length=count * PAGE).status == 0:
                slots[a].append(b)
        elif what == "unbind":
            if vms[a].unbind(b[0] * PAGE).status == 0:
                slots[a] = [slot for slot in slots[a] if slot[0] != b[0]]
        elif what == "touch":
            for first, _ in shown(slots[a], b, b + 1):
                assert vms[a].touch(first * PAGE).status in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS)
        else:
            count = min(b, PAGES - a)
            leave(machine, gmem, vms, slots, (what, a, count, c))
        # A fault looks at the 2M alone: who has a bit there has one of the 1G, too.
        state = machine.arrays.state
        regions, gigabytes = (int(state[int(W.STATE_INODES) + int(word)]) for word in (W.I_REGIONS, W.I_GIGABYTES))
        assert np.bitwise_or.reduce(state[regions : regions + PAGES // 512]) & ~state[gigabytes] == 0
    assert machine.check() == 0


def leave(
    machine: Machine, gmem: GuestMemfd, vms: list[Vm], slots: list[list[Slot]], step: tuple[str, int, int, int]
) -> None:
    """Convert or punch: what is gone from the VMs is what lies over the pages, and every leaf is counted."""
    what, first, count, shared = step
    before = [spans(vm) for vm in vms]
    cleared = machine.statistics.event(W.Event.SPTE_CLEARED)
    flushes = machine.statistics.event(W.Event.TLB_FLUSH_VM)
    bits = [gmem.is_shared(page * PAGE) for page in range(first, first + count)]
    if what == "punch":
        assert gmem.punch_hole(first * PAGE, count * PAGE).status == 0
    else:
        nobody = W.VMS - 1  # a file that no VM has bound, for plain ones convert nothing
        assert gmem.convert(first * PAGE, count * PAGE, shared=bool(shared), vm=nobody).status == 0
        if all(bit == bool(shared) for bit in bits):
            assert [spans(vm) for vm in vms] == before
            return
    last = first + count
    rounded = machine.config.zap == "rounded" and machine.config.design == "restructure"
    if rounded and what == "convert":  # out to huge pages
        first, last = first // 512 * 512, -(-last // 512) * 512
    gone = [
        {span for span in had if meets(span, shown(mine, first, last))} for had, mine in zip(before, slots, strict=True)
    ]
    assert [spans(vm) for vm in vms] == [had - left for had, left in zip(before, gone, strict=True)]
    assert machine.statistics.event(W.Event.SPTE_CLEARED) == cleared + sum(map(len, gone))
    assert machine.statistics.event(W.Event.TLB_FLUSH_VM) == flushes + sum(1 for left in gone if left)


@pytest.mark.parametrize("design", DESIGNS)
def test_every_vm_of_the_most_there_can_be(design: str) -> None:
    """64 VMs, the last of them with the highest bit of a word."""
    machine = Machine(Config(design, pool=2 * M2, page_size=M2))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    vms = [machine.create_vm(process if i % 2 else None, protected=True) for i in range(W.VMS)]
    assert process.mmap(gmem, 0x7F00_0000_0000).status == 0
    for vm in vms:
        assert vm.bind(gmem, 0).status == 0
        assert vm.touch(0).status == W.RET_PF_FIXED
    process.touch(0x7F00_0000_0000)
    cleared = machine.statistics.event(W.Event.SPTE_CLEARED)
    flushes = machine.statistics.event(W.Event.TLB_FLUSH_VM)
    calls = machine.statistics.event(W.Event.NOTIFIER_CALL)
    assert gmem.convert(0, PAGE, shared=False).status == 0
    assert machine.statistics.event(W.Event.SPTE_CLEARED) == cleared + 64
    assert machine.statistics.event(W.Event.TLB_FLUSH_VM) == flushes + 64
    assert machine.statistics.event(W.Event.NOTIFIER_CALL) == calls + 32
    assert all(vm.leaves() == (0, 0, 0) for vm in vms)
    assert machine.check() == 0


def test_a_leaf_that_nobody_noted_is_found_by_the_recount() -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2)
    vm = machine.create_vm()
    assert vm.bind(gmem, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    assert machine.check() == 0
    region = int(machine.arrays.state[int(W.STATE_INODES) + int(W.I_REGIONS)])
    assert machine.arrays.state[region] == np.uint64(1)
    machine.arrays.state[region] = 0
    assert machine.check() == 1
