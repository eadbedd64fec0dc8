"""Kinds of VM: roots, the largest private leaf, accepts, borders of a zap; by hand, on both designs."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
FORMATS = {"plain": "npt", "sw": "npt", "snp": "npt", "tdx": "ept"}
FIXED, SPURIOUS = W.RET_PF_FIXED, W.RET_PF_SPURIOUS


def make(kind: str, design: str = "restructure", *, shared: bool = False, **parameters: Any) -> tuple[Any, ...]:
    """A machine with two huge pages of 2M, mapped at VA and bound at 0: machine, inode, process, VM."""
    given: dict[str, Any] = {"pool": 2 * M2, "page_size": M2, "stage2": FORMATS[kind], "vm": kind} | parameters
    machine = Machine(Config(design, **given))  # type: ignore[arg-type]
    machine.check_each()
    gmem = machine.create_guest_memfd(given["pool"], shared=shared)
    process = machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap(gmem, VA).status == 0
    assert vm.bind(gmem, 0).status == 0
    return machine, gmem, process, vm


def sound(machine: Machine) -> None:
    assert machine.check() == 0, machine.broken


def event(machine: Machine, which: W.Event) -> int:
    return machine.statistics.event(which)


def level(vm: Any, gpa: int, *, private: bool) -> int:
    """Level of the leaf at a guest address below one of the roots, or 0."""
    found, _, value = vm.walk(gpa, private=private)[-1]
    return found if value >> 11 & 1 else 0


# --------------------------------------------------------------------------- two roots


@pytest.mark.parametrize("design", DESIGNS)
def test_private_and_shared_memory_are_mapped_below_their_own_roots(design: str) -> None:
    machine, gmem, _, vm = make("tdx", design)
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert vm.touch(0) == (FIXED, 1)
    assert vm.touch(M2) == (FIXED, 2)
    assert (level(vm, 0, private=False), level(vm, 0, private=True)) == (1, 0)
    assert (level(vm, M2, private=False), level(vm, M2, private=True)) == (0, 2)
    assert vm.leaves() == (1, 1, 0)
    # Below the shared root three tables, with entries of 1G, 2M and 4K; below the mirror two.
    assert vm.table_pages == 5
    assert [root.name for root in machine.roots()][-2:] == ["vm:0", "private:0"]
    assert machine.walk(vm.private_root, M2 // PAGE) == vm.walk(M2, private=True)
    sound(machine)


@pytest.mark.parametrize("kind", ["plain", "sw", "snp"])
def test_others_have_one_root(kind: str) -> None:
    machine, _, _, vm = make(kind)
    assert vm.private_root == vm.root
    assert vm.touch(M2) == (FIXED, 2)
    assert level(vm, M2, private=False) == level(vm, M2, private=True) == 2
    assert [root.name for root in machine.roots()][-1] == "vm:0"
    sound(machine)


@pytest.mark.parametrize(
    ("kind", "zap_filter", "left"),
    [("tdx", "both", 0), ("tdx", "target", 1), ("sw", "both", 0), ("sw", "target", 0), ("snp", "target", 0)],
)
@pytest.mark.parametrize("design", DESIGNS)
def test_which_kinds_a_conversion_zaps(design: str, kind: str, zap_filter: str, left: int) -> None:
    """Pages 4 to 8 become private, of which 7 was: kvm_gfn_range_filter_to_root_types() asks for a mirror first."""
    machine, gmem, _, vm = make(kind, design, zap_filter=zap_filter)
    assert gmem.convert(5 * PAGE, PAGE, shared=True).status == 0
    assert vm.touch(5 * PAGE) == (FIXED, 1)
    assert vm.touch(7 * PAGE) == (FIXED, 1)
    assert gmem.convert(4 * PAGE, 5 * PAGE, shared=False).status == 0
    assert vm.leaves() == (left, 0, 0)
    assert level(vm, 7 * PAGE, private=True) == left
    # What is left is found by the next zap.
    assert gmem.convert(7 * PAGE, PAGE, shared=True).status == 0
    assert vm.leaves() == (0, 0, 0)
    sound(machine)


def test_the_notifier_reaches_shared_memory_only() -> None:
    """kvm_handle_hva_range(): KVM_FILTER_SHARED."""
    for kind, left in (("tdx", 1), ("sw", 0)):
        machine, gmem, process, vm = make(kind)
        assert gmem.convert(5 * PAGE, PAGE, shared=True).status == 0
        process.touch(VA + 5 * PAGE)
        vm.touch(5 * PAGE)
        vm.touch(7 * PAGE)
        assert process.munmap(VA, M2).status == 0
        assert vm.leaves() == (left, 0, 0)
        assert level(vm, 7 * PAGE, private=True) == left
        sound(machine)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_end_of_slots_and_of_the_vm(design: str) -> None:
    machine, gmem, process, vm = make("tdx", design)
    used = machine.statistics.gauge(W.Gauge.STAGE2_TABLES)
    assert used == 2
    assert process.munmap(VA, 2 * M2).status == 0  # a mapping holds the file
    gmem.convert(0, PAGE, shared=True)
    vm.touch(0)
    vm.touch(M2)
    assert vm.leaves() == (1, 1, 0)
    assert vm.release(gmem).status == 0
    assert vm.leaves() == (0, 0, 0)
    assert vm.unbind(0).status == 0
    assert machine.statistics.gauge(W.Gauge.STAGE2_TABLES) == used + 5
    sound(machine)
    assert vm.bind(gmem, 0).status == 0
    vm.touch(0)
    vm.touch(PAGE)
    assert vm.leaves() == (2, 0, 0)
    assert vm.unbind(0).status == 0
    assert vm.leaves() == (0, 0, 0)
    assert vm.close().status == 0
    assert machine.statistics.gauge(W.Gauge.STAGE2_TABLES) == 0
    sound(machine)


def test_without_a_frame_for_the_mirror_there_is_no_vm() -> None:
    machine, _, process, _ = make("tdx")
    before = machine.statistics.gauge(W.Gauge.FRAMES_USED)
    machine.limit_frames(1)
    with pytest.raises(OSError, match="no frame for a stage-2 root"):
        machine.create_vm(process)
    assert machine.statistics.gauge(W.Gauge.FRAMES_USED) == before
    machine.limit_frames(2)
    machine.create_vm(process)
    sound(machine)


def test_a_leaf_below_the_wrong_root_is_found() -> None:
    machine, _, _, vm = make("tdx")
    vm.touch(0)
    row = int(W.STATE_VMS)
    roots = [row + int(W.V_ROOT), row + int(W.V_PRIVATE_ROOT)]
    machine.arrays.state[roots] = machine.arrays.state[roots[::-1]]
    assert machine.check() != 0
    assert machine.broken[1] == W.Broken.WRONG_ROOT


@pytest.mark.parametrize("kind", ["tdx", "snp"])
def test_a_leaf_larger_than_its_kind_maps_is_found(kind: str) -> None:
    machine, _, _, vm = make(kind)
    vm.touch(0)
    machine.arrays.state[int(W.STATE_VMS) + int(W.V_PRIVATE_LEVEL)] = 1
    assert machine.check() != 0
    assert machine.broken[1] == W.Broken.PRIVATE_LEVEL


def test_ordinary_slots_of_a_vm_with_two_roots() -> None:
    """kvm_arch_pre_set_memory_attributes(): the old kind goes. kvm_gmem_get_invalidate_filter(): the file's first."""
    machine = Machine(Config(stage2="ept", vm="tdx"))
    process = machine.create_process()
    gmem = machine.create_guest_memfd_4k(16 * PAGE, mmap=False, init_shared=False)
    vm = machine.create_vm(process)
    assert process.mmap_anonymous(VA, 16 * PAGE).status == 0
    assert vm.set_memory_region(0, 0, 16 * PAGE, VA, gmem=gmem).status == 0
    assert vm.set_attributes(0, 8 * PAGE, private=True).status == 0
    for page in range(16):
        assert vm.touch(page * PAGE, write=True) == (FIXED, 1)
    assert [level(vm, page * PAGE, private=True) for page in (0, 7, 8)] == [1, 1, 0]
    assert [level(vm, page * PAGE, private=False) for page in (0, 7, 8)] == [0, 0, 1]
    assert vm.leaves() == (16, 0, 0)
    # Private already up to 8: with one root their leaves would go, too.
    assert vm.set_attributes(6 * PAGE, 4 * PAGE, private=True).status == 0
    assert vm.leaves() == (14, 0, 0)
    assert [level(vm, page * PAGE, private=True) for page in (6, 7, 8)] == [1, 1, 0]
    assert process.munmap(VA, 16 * PAGE).status == 0
    assert vm.leaves() == (8, 0, 0)
    assert gmem.punch_hole(0, 4 * PAGE).status == 0
    assert vm.leaves() == (4, 0, 0)
    assert vm.set_memory_region(0, 0, 0).status == 0
    assert vm.leaves() == (0, 0, 0)
    sound(machine)


# --------------------------------------------------------------------------- borders


@pytest.mark.parametrize("design", DESIGNS)
def test_a_mirrored_leaf_is_split_where_others_go_whole(design: str) -> None:
    for kind, leaves, splits in (("tdx", (511, 0, 0), 1), ("sw", (0, 0, 0), 0), ("snp", (0, 0, 0), 0)):
        machine, gmem, _, vm = make(kind, design)
        assert vm.touch(0) == (FIXED, 2)
        flushes = event(machine, W.Event.TLB_FLUSH_VM)
        assert gmem.convert(3 * PAGE, PAGE, shared=True).status == 0
        assert vm.leaves() == leaves
        assert event(machine, W.Event.SPTE_SPLIT) == splits
        assert event(machine, W.Event.TLB_FLUSH_VM) == flushes + 1
        sound(machine)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_leaf_inside_what_is_zapped_is_not_split(design: str) -> None:
    machine, gmem, _, vm = make("tdx", design)
    for gpa in (0, M2):
        vm.touch(gpa)
    assert gmem.convert(0, M2 + PAGE, shared=True).status == 0
    assert vm.leaves() == (511, 0, 0)
    assert event(machine, W.Event.SPTE_SPLIT) == 1
    sound(machine)


@pytest.mark.parametrize(
    ("design", "order", "waits"),
    [("pfnmap", "fixup", 0), ("restructure", "fixup", 0), ("restructure", "jan2026", 1)],
)
def test_a_split_without_memory_ends_the_conversion(design: str, order: str, waits: int) -> None:
    """1G to 2M has a frame, 2M to 4K has none: the zap comes after it, so nothing is zapped and nothing is stored."""
    machine, gmem, _, vm = make(
        "tdx", design, order=order, pool=G1, page_size=G1, private_level="1G", hvo=False, zero="page"
    )
    assert vm.touch(0) == (FIXED, 3)
    # A split of the folio takes frames for xarray nodes: 4,161 of them, 7 to a frame.
    machine.limit_frames(1 + (-(-4161 // 7) if waits else 0))
    failed = gmem.convert(5 * M2 + 3 * PAGE, PAGE, shared=True)
    assert failed == (-W.ENOMEM, 5 * M2 + 3 * PAGE)
    assert not gmem.is_shared(5 * M2 + 3 * PAGE)
    assert vm.leaves() == (0, 512, 0)
    assert machine.statistics.gauge(W.Gauge.BLOCKS_SPLIT) == waits
    sound(machine)
    machine.limit_frames(None)
    assert gmem.convert(5 * M2 + 3 * PAGE, PAGE, shared=True).status == 0
    assert vm.leaves() == (511, 511, 0)
    sound(machine)


def test_rfc2_without_memory_for_a_border() -> None:
    """It preallocates nothing, and its first item fails before anything is stored (inference)."""
    machine, gmem, _, vm = make("tdx", order="rfc2")
    vm.touch(0)
    machine.limit_frames(0)
    assert gmem.convert(3 * PAGE, PAGE, shared=True) == (-W.ENOMEM, 3 * PAGE)
    assert vm.leaves() == (0, 1, 0)
    sound(machine)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_hole_splits_first(design: str) -> None:
    """The branch of December 2025 with TDX: begin, split, zap; -ENOMEM leaves everything as it was."""
    machine, gmem, _, vm = make("tdx", design, punch="zero")
    vm.touch(0)
    machine.write_frame(gmem.pfn(3 * PAGE), b"x" * PAGE)
    machine.limit_frames(0)
    assert gmem.punch_hole(3 * PAGE, PAGE).status == -W.ENOMEM
    assert vm.leaves() == (0, 1, 0)
    assert machine.read_frame(gmem.pfn(3 * PAGE)) == b"x" * PAGE
    machine.limit_frames(None)
    assert gmem.punch_hole(3 * PAGE, PAGE).status == 0
    assert vm.leaves() == (511, 0, 0)
    assert machine.read_frame(gmem.pfn(3 * PAGE)) == bytes(PAGE)
    sound(machine)


# --------------------------------------------------------------------------- levels, and whether they come back


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("plain", None, 3), ("plain", "4K", 3), ("sw", None, 3), ("sw", "2M", 2), ("snp", None, 2), ("snp", "4K", 1),
        ("tdx", None, 2), ("tdx", "4K", 1), ("tdx", "1G", 3),
    ],
)  # fmt: skip
def test_the_largest_private_leaf(design: str, kind: str, asked: str | None, expected: int) -> None:
    machine, _, _, vm = make(kind, design, pool=G1, page_size=G1, private_level=asked, zero="page")
    assert vm.touch(3 * PAGE) == (FIXED, expected)
    sound(machine)


@pytest.mark.parametrize(("kind", "expected"), [("sw", 2), ("snp", 1), ("tdx", 1)])
@pytest.mark.parametrize("design", DESIGNS)
def test_what_comes_back_when_a_page_does(design: str, kind: str, expected: int) -> None:
    """One page is shared for a while. sw: the next fault maps 2M. snp: 511 pages are assigned by entries of 4K. tdx:
    nothing is promoted."""
    machine, gmem, _, vm = make(kind, design)
    assert vm.touch(0) == (FIXED, 2)
    assert gmem.convert(3 * PAGE, PAGE, shared=True).status == 0
    assert vm.touch(3 * PAGE) == (FIXED, 1)
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == 0
    assert vm.touch(3 * PAGE) == (FIXED, expected)
    sound(machine)


@pytest.mark.parametrize(("kind", "expected"), [("sw", 2), ("snp", 2), ("tdx", 1)])
@pytest.mark.parametrize("design", DESIGNS)
def test_what_comes_back_when_all_pages_do(design: str, kind: str, expected: int) -> None:
    """All 512 pages are shared after one of them was: no entry assigns any. In the mirror the table stays, and with it
    4K; where the leaf went whole there is no table."""
    machine, gmem, _, vm = make(kind, design)
    assert vm.touch(0) == (FIXED, 2)
    assert vm.touch(M2) == (FIXED, 2)
    for offset, length in ((0, PAGE), (0, M2), (M2, M2)):
        assert gmem.convert(offset, length, shared=True).status == 0
    assert gmem.convert(0, 2 * M2, shared=False).status == 0
    assert vm.touch(3 * PAGE) == (FIXED, expected)
    assert vm.touch(M2 + 3 * PAGE) == (FIXED, 2)
    sound(machine)


def test_shared_memory_by_kind() -> None:
    """sev_gmem_max_mapping_level() of what is not assigned: 4K. tdx_gmem_max_mapping_level() of shared: no limit."""
    for kind, expected in (("plain", 2), ("sw", 2), ("snp", 1), ("tdx", 2)):
        machine, _, _, vm = make(kind, "pfnmap", shared=True)
        assert vm.touch(0) == (FIXED, expected)
        sound(machine)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_hole_gives_pages_back_to_the_host(design: str) -> None:
    machine, gmem, _, vm = make("snp", design)
    assert gmem.convert(3 * PAGE, PAGE, shared=True).status == 0
    assert vm.touch(0) == (FIXED, 1)  # assigned by itself
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == 0
    assert vm.touch(PAGE) == (FIXED, 1)
    assert gmem.punch_hole(0, M2).status == 0
    assert vm.touch(PAGE) == (FIXED, 2)
    sound(machine)


@pytest.mark.parametrize("kind", ["snp", "tdx"])
def test_dirty_logging_splits_and_a_mirror_stays_split(kind: str) -> None:
    machine, _, _, vm = make(kind, dirty_log_guest_memfd=True)
    vm.touch(0)
    assert vm.dirty_logging(0, True).status == 0
    assert vm.leaves() == (512, 0, 0)
    assert vm.dirty_logging(0, False).status == 0
    assert vm.leaves() == ((512, 0, 0) if kind == "tdx" else (0, 1, 0))
    sound(machine)


@pytest.mark.parametrize("kind", ["sw", "snp", "tdx"])
def test_prefault_maps_as_a_fault_does(kind: str) -> None:
    machine, gmem, _, vm = make(kind, "pfnmap")
    assert gmem.convert(M2, PAGE, shared=True).status == 0
    assert vm.prefault(0, M2 + 2 * PAGE) == (0, M2 + 2 * PAGE)
    assert vm.leaves() == (2, 1, 0)
    assert (level(vm, 0, private=True), level(vm, M2, private=False)) == (2, 1)
    assert not vm.walk(0, private=True)[-1][2] & 1 << (8 if kind == "tdx" else 5)  # accessed
    sound(machine)


# --------------------------------------------------------------------------- accepts


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("kind", "expected"), [("plain", 2), ("sw", 2), ("snp", 1), ("tdx", 1)])
def test_an_accept_at_4k_maps_4k(design: str, kind: str, expected: int) -> None:
    machine, _, _, vm = make(kind, design)
    assert vm.touch(0, accept_4k=True) == (FIXED, expected)
    # Beside it, too: one entry of the RMP is split, the mirror has a table.
    assert vm.touch(PAGE) == (FIXED if expected == 1 else SPURIOUS, expected)
    assert vm.touch(M2) == (FIXED, 2)
    sound(machine)


@pytest.mark.parametrize("design", DESIGNS)
def test_an_accept_at_4k_of_a_larger_leaf(design: str) -> None:
    """tdx_honor_guest_accept_level(): split, one exit and no flush. sev_handle_rmp_fault(): psmash, zap, fault."""
    for kind, expected, leaves, flushes in (
        ("tdx", (SPURIOUS, 1), (512, 0, 0), 0),
        ("snp", (FIXED, 1), (1, 0, 0), 1),
        ("sw", (SPURIOUS, 2), (0, 1, 0), 0),
    ):
        machine, _, _, vm = make(kind, design)
        vm.touch(0)
        before = [event(machine, which) for which in (W.Event.GUEST_FAULT, W.Event.TLB_FLUSH_VM)]
        assert vm.touch(3 * PAGE, accept_4k=True) == expected
        assert vm.leaves() == leaves
        exits, flushed = (event(machine, which) for which in (W.Event.GUEST_FAULT, W.Event.TLB_FLUSH_VM))
        assert (exits - before[0], flushed - before[1]) == (int(kind != "sw"), flushes)
        assert vm.touch(3 * PAGE, accept_4k=True) == (SPURIOUS, 2 if kind == "sw" else 1)
        sound(machine)


def test_an_accept_that_cannot_be_honored() -> None:
    machine, _, _, vm = make("tdx")
    vm.touch(0)
    machine.limit_frames(0)
    assert vm.touch(3 * PAGE, accept_4k=True).status == -W.ENOMEM
    assert vm.leaves() == (0, 1, 0)
    machine.limit_frames(None)
    assert vm.touch(3 * PAGE, accept_4k=True) == (SPURIOUS, 1)
    sound(machine)


def test_an_accept_of_shared_memory_is_an_access() -> None:
    for kind, expected in (("tdx", 2), ("sw", 2)):
        machine, _, _, vm = make(kind, "pfnmap", shared=True)
        assert vm.touch(0, accept_4k=True) == (FIXED, expected)
        assert vm.touch(PAGE, accept_4k=True) == (SPURIOUS, expected)
        sound(machine)


# --------------------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["snp", "tdx"])
def test_a_fault_meets_a_conversion_of_its_page(kind: str) -> None:
    """Its page becomes shared before the leaf is there: it comes again, below the other root."""
    machine, gmem, _, vm = make(kind, "pfnmap")
    fault = {"op": W.Operation.GUEST_FAULT, "vm": vm.vm, "address": 3 * PAGE}
    machine.begin(1, **fault)
    while not machine._record(1, W.O_PFN):
        assert machine.step(1) == W.GO
    assert gmem.convert(3 * PAGE, PAGE, shared=True).status == 0
    while machine.step(1) != W.STOP:
        pass
    assert machine.result(1).status == W.RET_PF_RETRY
    assert vm.leaves() == (0, 0, 0)
    assert vm.touch(3 * PAGE) == (FIXED, 1)
    assert level(vm, 3 * PAGE, private=False) == 1
    sound(machine)
