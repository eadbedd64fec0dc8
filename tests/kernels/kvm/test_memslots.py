"""Memory slots of both kinds, and accesses outside of them, through every door: methods, records, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine, Result
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
FAR = 1 << 40  # where nothing else is
OUTSIDE = 1 << 34
MMIO = 0x8_0000_0000_0007  # svm_adjust_mmio_mask(): reserved bit 51, present, writable, user

Touch = Callable[[Vm, int, int], Result]


def touch(vm: Vm, gpa: int, flags: int) -> Result:
    return vm.machine.operate(Operation.GUEST_FAULT, flags=flags, vm=vm.vm, address=gpa)


def touch_by_record(vm: Vm, gpa: int, flags: int) -> Result:
    """The same in a batch, between two accesses of another VM that does not exist."""
    nobody = np.uint64(Operation.GUEST_FAULT | 60 << 32)
    header = np.array([nobody, Operation.GUEST_FAULT | flags << 8 | vm.vm << 32, nobody], np.uint64)
    results = vm.machine.run_columns(header, address=gpa, count=3)
    assert results.status.tolist()[::2] == [-W.EBADF] * 2
    return Result(int(results.status[1]), int(results.detail[1]))


def touch_by_steps(vm: Vm, gpa: int, flags: int) -> Result:
    vm.machine.begin(3, Operation.GUEST_FAULT, flags=flags, vm=vm.vm, address=gpa)
    while vm.machine.step(3) != W.STOP:
        pass
    return vm.machine.result(3)


DOORS: dict[str, Touch] = {"method": touch, "record": touch_by_record, "steps": touch_by_steps}


class Scene:
    """A file of two 2M pages bound at 0; `ordinary`: beside a slot that nobody uses, of a process's memory."""

    def __init__(self, design: str, *, ordinary: bool = False, protected: bool = False, **parameters: Any) -> None:
        config = {"pool": 8 * M2, "page_size": M2, **parameters}
        self.machine = Machine(Config(design, **config))  # type: ignore[arg-type]
        self.gmem = self.machine.create_guest_memfd(2 * M2, shared=True)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=protected)
        if ordinary:
            assert self.process.mmap_anonymous(VA, M2).status == 0
            assert self.vm.set_memory_region(5, FAR, M2, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0

    def count(self, event: W.Event) -> int:
        return self.machine.statistics.event(event)


scenes = pytest.mark.parametrize("ordinary", [False, True], ids=["designs only", "beside an ordinary slot"])
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


# --------------------------------------------------------------------------- outside every slot


@scenes
@doors
@pytest.mark.parametrize("design", DESIGNS)
def test_an_access_outside_every_slot_is_cached(design: str, door: Touch, ordinary: bool) -> None:
    """mmu.c:kvm_handle_noslot_fault(), spte.c:make_mmio_spte(): three tables down to a 4K entry with the slots'
    generation, which moves by two for each change."""
    s = Scene(design, ordinary=ordinary)
    generation = 4 if ordinary else 2
    for _ in range(2):
        assert door(s.vm, OUTSIDE + 5 * PAGE, Flag.WRITE) == (W.RET_PF_EMULATE, 1)
        assert s.vm.table_pages == 3
        assert s.vm.walk(OUTSIDE + 5 * PAGE)[-1][2] == MMIO | OUTSIDE + 5 * PAGE | generation << 3
    assert s.vm.leaves() == (0, 0, 0)
    assert s.vm.unbind(0).status == 0  # the tree goes, and two generations: the slot was invalid, then gone
    assert s.vm.stage2().root == 0
    assert door(s.vm, 0, 0) == (W.RET_PF_EMULATE, 1)
    assert s.vm.walk(0)[-1][2] == MMIO | generation + 4 << 3
    assert s.machine.check() == 0


@scenes
@doors
@pytest.mark.parametrize("design", DESIGNS)
def test_private_memory_is_in_slots(design: str, door: Touch, ordinary: bool) -> None:
    """mmu.c:kvm_mmu_faultin_pfn() compares the kinds before it looks at the slot: a memory fault exit."""
    s = Scene(design, ordinary=ordinary, protected=True)
    assert door(s.vm, OUTSIDE, Flag.PRIVATE) == (-W.EFAULT, 0)
    assert s.vm.table_pages == 0
    assert door(s.vm, OUTSIDE, Flag.SHARED) == (W.RET_PF_EMULATE, 1)
    assert door(s.vm, OUTSIDE, Flag.PRIVATE) == (-W.EFAULT, 0)
    # With the attribute it is the other way round; what is cached is emulated all the same, of whatever kind.
    assert s.vm.set_attributes(OUTSIDE, 2 * PAGE, private=True).status == 0
    assert touch(s.vm, OUTSIDE, Flag.SHARED) == (-W.EFAULT, 0)
    assert touch(s.vm, OUTSIDE + PAGE, 0) == (-W.EFAULT, 0)
    assert touch(s.vm, OUTSIDE, 0) == (W.RET_PF_EMULATE, 1)


@scenes
@doors
@pytest.mark.parametrize("design", DESIGNS)
def test_an_access_beyond_the_tables_or_without_memory(design: str, door: Touch, ordinary: bool) -> None:
    """Beyond kvm_mmu_max_gfn() nothing is cached; without a table the access fails, and those linked stay."""
    s = Scene(design, ordinary=ordinary)
    assert door(s.vm, 0, 0).status == W.RET_PF_FIXED
    tables = s.vm.table_pages
    for gpa in (1 << 48, (1 << 48) + 5 * PAGE, (1 << 52) - PAGE, (1 << 64) - PAGE):
        assert door(s.vm, gpa, 0) == (W.RET_PF_EMULATE, 0)
    assert s.vm.table_pages == tables
    s.machine.limit_frames(1)
    assert door(s.vm, OUTSIDE, 0) == (-W.ENOMEM, 0)
    assert s.vm.table_pages == tables + 1
    assert s.machine.check() == 0


@scenes
@doors
def test_an_access_in_a_closed_vm_and_in_none(door: Touch, ordinary: bool) -> None:
    s = Scene("pfnmap", ordinary=ordinary)
    assert door(Vm(s.machine, 7), 0, 0) == (-W.EBADF, 0)
    assert s.vm.close().status == 0
    assert door(s.vm, 0, 0) == (-W.EBADF, 0)
    assert door(s.vm, OUTSIDE, 0) == (-W.EBADF, 0)
    assert s.vm.bind(s.gmem, 0).status == s.vm.unbind(0).status == -W.EBADF
    assert Vm(s.machine, 7).bind(s.gmem, 0).status == Vm(s.machine, 7).unbind(0).status == -W.EBADF
    assert s.machine.check() == 0


@scenes
@pytest.mark.parametrize("design", DESIGNS)
def test_prefault_outside_every_slot(design: str, ordinary: bool) -> None:
    """kvm_tdp_map_page() of what is emulated is -ENOENT, once the entry is cached."""
    s = Scene(design, ordinary=ordinary)
    assert s.vm.prefault(OUTSIDE, PAGE) == (-W.ENOENT, 0)
    assert s.vm.table_pages == 3
    assert len(s.vm.stage2().others) == 1
    assert s.vm.prefault(2 * M2 - PAGE, 2 * PAGE) == (0, PAGE)
    assert len(s.vm.stage2().others) == 2
    assert s.vm.prefault(1 << 48, PAGE) == (-W.ENOENT, 0)
    assert s.machine.check() == 0


def test_an_address_that_is_an_alias_in_the_tables_is_no_leaf() -> None:
    """Bits 48 and up are not translated: what lies there is not what lies 256 TiB lower."""
    s = Scene("pfnmap", ordinary=True)
    assert s.vm.touch(FAR).status == W.RET_PF_FIXED
    assert s.vm.touch(FAR + (1 << 48)) == (W.RET_PF_EMULATE, 0)


# --------------------------------------------------------------------------- BIND


class Bind(NamedTuple):
    gpa: int
    offset: int
    length: int
    status: int


G8T = 1 << 43
BINDS = {
    "guest address": Bind(1, 0, PAGE, -W.EINVAL),
    "offset": Bind(OUTSIDE, 1, PAGE, -W.EINVAL),
    "length": Bind(OUTSIDE, 0, PAGE + 1, -W.EINVAL),
    "no length": Bind(OUTSIDE, 0, 0, -W.EINVAL),
    "guest address wraps": Bind((1 << 64) - PAGE, 0, 2 * PAGE, -W.EINVAL),
    "offset wraps": Bind(OUTSIDE, (1 << 64) - PAGE, 2 * PAGE, -W.EINVAL),
    # A slot has guest frames [0, 4M): what KVM asks before is -EINVAL, then -EEXIST, and only then comes the file.
    "unaligned over a slot": Bind(PAGE, 7, PAGE, -W.EINVAL),
    "too many pages over a slot": Bind(0, 0, G8T, -W.EINVAL),
    "over a slot": Bind(2 * M2 - PAGE, 2 * M2, PAGE, -W.EEXIST),
    "over a slot and beyond 48 bits": Bind(PAGE, 0, (1 << 43) - PAGE, -W.EEXIST),
    "past the end": Bind(OUTSIDE, 2 * M2 - PAGE, 2 * PAGE, -W.EINVAL),
    "bound already": Bind(OUTSIDE, 0, PAGE, -W.EINVAL),
    "beyond 48 bits": Bind((1 << 48) - PAGE, 0, 2 * PAGE, -W.EINVAL),
}


@scenes
@pytest.mark.parametrize("bind", BINDS.values(), ids=BINDS)
def test_binds_that_kvm_refuses(bind: Bind, ordinary: bool) -> None:
    """kvm_main.c:kvm_set_memory_region(), guest_memfd.c:kvm_gmem_bind(), in their order."""
    s = Scene("pfnmap", ordinary=ordinary)
    columns = {
        "vm": s.vm.vm,
        "object_": s.gmem.inode,
        "address": bind.gpa,
        "offset": bind.offset,
        "length": bind.length,
    }
    assert s.machine.operate(Operation.BIND, **columns).status == bind.status
    s.machine.begin(2, Operation.BIND, **columns)
    assert s.machine.step(2) == W.STOP
    assert s.machine.result(2).status == bind.status
    assert s.vm.bind(s.machine.create_guest_memfd(M2), OUTSIDE).status == 0


@scenes
def test_a_closed_file_is_found_after_the_guest_frames_and_before_the_reach_of_the_tables(ordinary: bool) -> None:
    """kvm_gmem_bind() comes before kvm_arch_prepare_memory_region()."""
    s = Scene("pfnmap", ordinary=ordinary)
    closed = s.machine.create_guest_memfd(2 * M2)
    assert closed.close().status == 0
    assert s.vm.bind(closed, PAGE, length=PAGE).status == -W.EEXIST
    assert s.vm.bind(closed, OUTSIDE + 1, length=PAGE).status == -W.EINVAL
    assert s.vm.bind(closed, OUTSIDE, offset=7, length=PAGE).status == -W.EINVAL
    assert s.vm.bind(closed, (1 << 48) - PAGE, length=2 * PAGE).status == -W.EBADF
    assert s.vm.bind(closed, OUTSIDE, length=PAGE).status == -W.EBADF


def test_a_range_that_is_bound_and_past_the_end_is_past_the_end() -> None:
    """linux-next: kvm_gmem_prepare_bind() looks at the size, the commit at the bindings."""
    machine = Machine(Config("pfnmap", pool=8 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(2 * M2, form="next")
    vm = machine.create_vm()
    assert vm.bind(gmem, 0, offset=M2).status == 0
    assert vm.bind(gmem, OUTSIDE, offset=M2, length=M2).status == -W.EEXIST
    assert vm.bind(gmem, OUTSIDE, offset=M2, length=M2 + PAGE).status == -W.EINVAL


def test_a_region_beyond_the_tables_is_found_after_its_guest_memfd() -> None:
    s = Scene("pfnmap", ordinary=True, protected=True)
    gmem = s.machine.create_guest_memfd_4k(4 * PAGE, mmap=False, init_shared=False)
    beyond = {"slot": 1, "gpa": (1 << 48) - PAGE, "size": 2 * PAGE, "userspace_addr": VA}
    assert s.vm.set_memory_region(**beyond, gmem=gmem).status == -W.EINVAL
    # The file that a call names is that call's, whatever becomes of it.
    region = {"vm": s.vm.vm, "flags": Flag.PRIVATE, "object_": 1, "address": OUTSIDE, "offset": VA, "length": PAGE}
    assert s.machine.operate(Operation.MEMSLOT, **region).status == -W.EBADF
    assert s.machine.operate(Operation.BIND, vm=s.vm.vm, object_=gmem.inode).status == 0
    assert gmem.close().status == 0
    assert s.machine.operate(Operation.MEMSLOT, **{**region, "address": 0}).status == -W.EEXIST
    assert s.machine.operate(Operation.MEMSLOT, **region).status == -W.EBADF


# --------------------------------------------------------------------------- UNBIND


@scenes
@pytest.mark.parametrize("design", DESIGNS)
def test_unbind_finds_slots_of_either_kind_by_their_first_page(design: str, ordinary: bool) -> None:
    s = Scene(design, ordinary=ordinary)
    for gpa, status in ((1, -W.EINVAL), (PAGE, -W.ENOENT), (1 << 48, -W.ENOENT), (OUTSIDE, -W.ENOENT)):
        assert s.vm.unbind(gpa).status == status
    s.machine.begin(1, Operation.UNBIND, vm=s.vm.vm, address=FAR)
    assert s.machine.step(1) == W.STOP
    assert s.machine.result(1).status == (0 if ordinary else -W.ENOENT)
    assert s.vm.unbind(FAR).status == -W.ENOENT
    assert s.vm.unbind(0).status == 0
    assert s.vm.unbind(0).status == -W.ENOENT
    assert s.gmem.close().status == 0
    assert s.machine.check() == 0


def test_a_flush_of_a_deleted_slot_is_owed_no_more() -> None:
    """kvm_arch_flush_shadow_memslot() flushes; what another VM loses later is that VM's flush alone."""
    s = Scene("pfnmap", ordinary=True, protected=True)
    other = s.machine.create_vm(protected=True)
    assert other.bind(s.gmem, 0).status == 0
    assert s.vm.touch(FAR).status == other.touch(0).status == W.RET_PF_FIXED
    flushes = s.count(W.Event.TLB_FLUSH_VM)
    assert s.vm.set_memory_region(5, 0, 0).status == 0
    assert s.count(W.Event.TLB_FLUSH_VM) == flushes + 1
    assert s.gmem.convert(0, PAGE, shared=False).status == 0
    assert s.count(W.Event.TLB_FLUSH_VM) == flushes + 2


def test_the_notifier_of_a_closed_vm_is_not_called() -> None:
    """kvm_main.c:kvm_destroy_vm() unregisters it."""
    s = Scene("pfnmap", protected=True)
    second = s.machine.create_vm(s.process, protected=True)
    assert s.process.mmap(s.gmem, VA).status == 0
    s.process.touch(VA)
    calls = s.count(W.Event.NOTIFIER_CALL)
    assert s.gmem.convert(0, PAGE, shared=False).status == 0
    assert s.count(W.Event.NOTIFIER_CALL) == calls + 2
    assert second.close().status == 0
    assert s.gmem.convert(PAGE, PAGE, shared=False).status == 0
    assert s.count(W.Event.NOTIFIER_CALL) == calls + 3


# --------------------------------------------------------------------------- step by step


def test_ordinary_slots_step_by_step() -> None:
    """An access to a process's memory is one step, as everything about the slots themselves is."""
    s = Scene("restructure", ordinary=True, protected=True)
    gmem = s.machine.create_guest_memfd_4k(4 * PAGE, mmap=False, init_shared=False)
    assert touch_by_steps(s.vm, FAR, 0) == (W.RET_PF_FIXED, 1)
    s.machine.begin(0, Operation.BIND, vm=s.vm.vm, object_=gmem.inode, offset=PAGE)
    assert s.machine.step(0) == W.STOP
    assert s.machine.result(0).status == 0
    region = {"flags": Flag.PRIVATE, "object_": 1, "address": OUTSIDE, "offset": VA, "length": PAGE}
    assert s.machine.operate(Operation.MEMSLOT, vm=s.vm.vm, **region).status == 0
    assert s.vm.set_attributes(OUTSIDE, PAGE, private=True).status == 0
    assert s.vm.touch(OUTSIDE) == (W.RET_PF_FIXED, 1)
    assert s.machine.check() == 0


# --------------------------------------------------------------------------- an unrelated slot changes nothing

GPAS = (0, PAGE, M2 - PAGE, M2, 2 * M2, 3 * M2 + 7 * PAGE, OUTSIDE, (1 << 48) - M2, 1 << 48, (1 << 64) - PAGE, 100)
OFFSETS = (0, PAGE, M2, 2 * M2, 9, (1 << 64) - PAGE)
LENGTHS = (0, PAGE, M2, M2 + PAGE, 2 * M2, 5, 1 << 44)
KINDS = (0, Flag.WRITE, Flag.PRIVATE, Flag.SHARED, Flag.PRIVATE | Flag.SHARED)
gpas, offsets, lengths = (st.sampled_from(values) for values in (GPAS, OFFSETS, LENGTHS))
CALLS = st.one_of(
    st.tuples(st.just(Operation.BIND), gpas, offsets, lengths, st.just(0)),
    st.tuples(st.just(Operation.UNBIND), gpas, st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just(Operation.GUEST_FAULT), gpas, st.just(0), st.just(0), st.sampled_from(KINDS)),
    st.tuples(st.just(Operation.GUEST_FAULT), gpas, st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just(Operation.PREFAULT), gpas, st.just(0), lengths, st.just(0)),
    st.tuples(st.just(Operation.CONVERT), st.just(0), offsets, lengths, st.sampled_from((Flag.PRIVATE, Flag.SHARED))),
)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    design=st.sampled_from(DESIGNS),
    protected=st.booleans(),
    stepped=st.booleans(),
    calls=st.lists(CALLS, min_size=4, max_size=20),
)
def test_an_unrelated_slot_changes_no_answer(
    design: str, protected: bool, stepped: bool, calls: list[tuple[Operation, int, int, int, int]]
) -> None:
    both = [Scene(design, ordinary=ordinary, protected=protected) for ordinary in (False, True)]
    for op, gpa, offset, length, flags in calls:
        columns = {"flags": flags, "vm": 0, "address": gpa, "offset": offset, "length": length}
        results = []
        for s in both:
            if stepped and op != Operation.PREFAULT:
                s.machine.begin(1, op, **columns)
                while s.machine.step(1) != W.STOP:
                    pass
                results.append(s.machine.result(1))
            else:
                results.append(s.machine.operate(op, **columns))
        assert results[0] == results[1]
        trees = [s.vm.stage2() for s in both]
        for name in ("tables", "leaves", "others"):
            one, other = (getattr(tree, name)[["gpa", "level"]] for tree in trees)
            assert np.array_equal(one, other), name
    for s in both:
        assert s.machine.check() == 0
