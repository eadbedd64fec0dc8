"""Pages that KVM itself maps for an L1 hypervisor: what holds them, what takes them away, and what is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu.objects.mapped_pages import MappedPage, PfnCache
from pgemu.objects.spinning import holders_of
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

M2, GIB, PAGE, VA = W.PAGE_2M, W.PAGE_1G, W.PAGE_4K, 0x7F00_0000_0000
BIAS = 1024  # GUP_PIN_COUNTING_BIAS
GPA = 5 * PAGE


class Scene:
    """Two huge pages of an inode, all shared, that a process maps and its VM has from guest address 0 on."""

    def __init__(self, design: str = "restructure", *, size: int = M2, kind: Any = "sw", **parameters: Any) -> None:
        pool = max(2 * size, 2 * M2)
        self.machine = Machine(Config(design, pool=pool, page_size=size, **parameters))  # type: ignore[arg-type]
        self.gmem = self.machine.create_guest_memfd(2 * size, shared=True)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, kind=kind)
        assert self.process.mmap(self.gmem, VA).status == self.vm.bind(self.gmem, 0).status == 0

    def convert(self, shared: bool = False, offset: int = GPA) -> tuple[int, int]:
        return tuple(self.gmem.convert(offset, PAGE, shared=shared))  # type: ignore[return-value]

    def refused(self, gpa: int = GPA, **how: Any) -> int:
        """The errno that kvm_vcpu_map() returns."""
        with pytest.raises(OSError) as error:
            self.vm.map_page(gpa, **how)
        return error.value.errno or 0

    def extra(self, gpa: int = GPA) -> int:
        """References on the page's folio that are neither the page cache's nor a mapping's."""
        folio = self.machine.folio(self.gmem.pfn(gpa) or 0)
        return folio.refcount - folio.expected_references

    def stale(self) -> tuple[int, int]:
        statistics = self.machine.statistics
        return statistics.event(Event.MAPPED_STALE_PRIVATE), statistics.event(Event.MAPPED_STALE_FREED)

    def rules(self) -> list[W.Broken]:
        self.machine.check()
        return [finding.rule for finding in self.machine.findings]

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


# --------------------------------------------------------------------------- kvm_vcpu_map() with folios


@pytest.mark.parametrize(("kernel", "held"), [("7.3", BIAS), ("6.18", BIAS), ("6.12", 1)])
@pytest.mark.parametrize("size", [PAGE, M2, GIB])
def test_a_map_of_restructure_holds_the_page_and_the_conversion_fails(size: int, kernel: str, held: int) -> None:
    """Pinned since 6.13 (__kvm_vcpu_map()), before that one reference: either is one too many for the gate."""
    s = Scene(size=size, kernel=kernel)
    gpa = GPA if size > PAGE else PAGE
    page = s.vm.map_page(gpa)
    assert (page.pfn, page.references, page.gpa) == (s.gmem.pfn(gpa), held, gpa)
    assert s.extra(gpa) == held
    assert s.machine.statistics.gauge(Gauge.PAGES_PINNED) == (held == BIAS)
    assert s.convert(offset=gpa) == (-W.EAGAIN, gpa)
    s.sound()
    assert page.unmap() == (0, 0)
    assert (s.extra(gpa), s.machine.statistics.gauge(Gauge.PAGES_PINNED)) == (0, 0)
    assert s.convert(offset=gpa) == (0, 0)
    assert s.stale() == (0, 0)
    s.sound()


def test_it_is_the_mapping_that_is_gone_through_and_no_system_call() -> None:
    """The page is faulted in through the process's mapping, as pin_user_pages() does."""
    s = Scene()
    before = s.machine.statistics
    page = s.vm.map_page(GPA, write=False)
    after = s.machine.statistics
    assert s.process.walk(VA + GPA)[-1].entry & 1  # type: ignore[attr-defined]
    for event, count in ((Event.HOST_FAULT, 1), (Event.PAGE_PINNED, 1), (Event.SYSCALL, 0), (Event.GUEST_FAULT, 0)):
        assert after.event(event) - before.event(event) == count, event.name
    with pytest.raises(ValueError, match=r"^mapped page 0: it is mapped for reading, expected one for writing$"):
        page.write(b"x")
    s.sound()


def test_what_is_no_frame_is_einval() -> None:
    """kvm_vcpu_map() returns -EINVAL for every error frame: KVM_PFN_NOSLOT, _ERR_FAULT, _ERR_RO_FAULT."""
    s = Scene()
    assert s.refused(8 * M2) == W.EINVAL  # no slot
    assert s.convert() == (0, 0)
    assert s.refused() == W.EINVAL  # private: the fault ends in SIGBUS
    assert s.process.munmap(VA + M2, M2).status == 0
    assert s.refused(M2) == W.EINVAL  # no mapping
    assert s.process.mmap(s.gmem, VA + M2, offset=M2, length=M2, read_only=True).status == 0
    assert s.refused(M2) == W.EINVAL  # not to be written
    assert s.vm.map_page(M2, write=False).read(0, 8) == bytes(8)
    alone = s.machine.create_vm()
    assert alone.bind(s.gmem, 0, length=M2).status == 0
    with pytest.raises(OSError) as error:  # a VM without a process has no userspace addresses
        alone.map_page(0)
    assert error.value.errno == W.EINVAL
    s.sound()


def test_errors_that_linux_does_not_know() -> None:
    s = Scene()
    ops = (Operation.NESTED_MAP, Operation.NESTED_UNMAP)
    for number in (256, (1 << 32) - 1):
        assert [s.machine.operate(op, object_=number).status for op in ops] == [-W.EINVAL, -W.ENOENT]
    page, cache = s.vm.map_page(GPA), s.vm.pfn_cache(GPA, 8)
    for number, flags in ((0, 0), (1, 0), (0, Flag.CACHED)):
        taken = s.machine.operate(Operation.NESTED_MAP, flags=flags, object_=number, address=GPA)
        assert taken.status == -W.EEXIST
    assert page.unmap().status == cache.deactivate().status == 0
    assert s.machine.operate(Operation.NESTED_MAP, flags=Flag.THROUGH, object_=0).status == -W.ENOENT
    closed = s.machine.create_vm(s.process)
    assert closed.close().status == 0
    with pytest.raises(OSError) as error:
        closed.map_page(0)
    assert error.value.errno == W.EBADF
    s.sound()


def test_more_than_there_is_room_for() -> None:
    s = Scene()
    for _ in range(W.MAPPED_PAGES):
        s.vm.map_page(GPA)
    assert s.extra() == BIAS * W.MAPPED_PAGES
    assert s.refused() == W.ENOSPC
    s.sound()


def test_memory_of_other_kinds_is_not_modelled() -> None:
    s = Scene()
    at = 1 << 40
    assert s.process.mmap_anonymous(at, M2).status == s.vm.set_memory_region(3, GIB, M2, at).status == 0
    assert s.refused(GIB) == W.EOPNOTSUPP
    with pytest.raises(OSError) as error:
        s.vm.pfn_cache(GIB, 8)
    assert error.value.errno == W.EOPNOTSUPP
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_slot_over_the_mapping_does_as_one_over_the_guest_memfd(design: str) -> None:
    """Both go by the userspace address: kvm_follow_pfn() looks at no guest_memfd. A read-only slot takes no writes."""
    s = Scene(design, allow_unsafe_mappings=True)
    assert s.vm.unbind(0).status == 0
    assert s.vm.set_memory_region(0, 0, M2, VA).status == 0
    assert s.vm.set_memory_region(1, GIB, M2, VA + M2, read_only=True).status == 0
    page, cache = s.vm.map_page(GPA), s.vm.pfn_cache(GPA + 8, 8)
    assert page.pfn == cache.pfn == s.gmem.pfn(GPA)
    page.write(b"abcdefgh", 8)
    assert cache.read() == b"abcdefgh"
    assert s.refused(GIB) == W.EINVAL
    assert s.vm.map_page(GIB, write=False).live
    assert not s.vm.pfn_cache(GIB, 8).check()  # always for writing
    s.sound()


def test_a_write_is_in_the_dirty_log_when_the_page_is_unmapped() -> None:
    """kvm_vcpu_unmap() marks the page dirty of a map for writing, written or not; a cache's users do, at each write."""
    s = Scene()
    assert s.vm.unbind(0).status == 0
    assert s.vm.set_memory_region(0, 0, M2, VA, log_dirty_pages=True).status == 0
    page, cache, reader = s.vm.map_page(GPA), s.vm.pfn_cache(0, 8), s.vm.map_page(7 * PAGE, write=False)
    assert s.vm.dirty_log(0)[1].tolist() == []
    assert page.unmap().status == reader.unmap().status == 0
    assert s.vm.dirty_log(0)[1].tolist() == [GPA]
    cache.write(b"x")
    assert s.vm.dirty_log(0)[1].tolist() == [0]
    s.sound()


# --------------------------------------------------------------------------- VM_PFNMAP


@pytest.mark.parametrize("size", [PAGE, M2, GIB])
def test_pfnmap_refuses_a_map(size: int) -> None:
    """hva_to_pfn_remapped(): what cannot be pinned is an error before there is a fault, and nothing is held."""
    s = Scene("pfnmap", size=size)
    assert s.refused(0) == W.EINVAL
    assert s.machine.statistics.event(Event.HOST_FAULT) == 0
    assert s.process.touch(VA).status == W.VM_FAULT_NOPAGE
    assert s.refused(0) == W.EINVAL
    assert s.extra(0) == 0
    assert s.convert(offset=0) == (0, 0)
    s.sound()


def test_with_the_module_parameter_pfnmap_lends_the_frame_and_the_conversion_does_not_see_it() -> None:
    s = Scene("pfnmap", allow_unsafe_mappings=True)
    page = s.vm.map_page(GPA)
    assert (page.references, s.extra(), page.pfn) == (0, 0, s.gmem.pfn(GPA))
    page.write(b"of L1", 16)
    assert s.convert() == (0, 0)
    assert s.vm.touch(GPA).status == W.RET_PF_FIXED
    s.machine.write_frame(page.pfn, b"a secret of the guest's")
    assert page.read(0, 8) == b"a secret"  # KVM reads private memory,
    page.write(b"overwritten by vmcs12 handling")
    assert s.machine.read_frame(s.gmem.pfn(GPA) or 0).startswith(b"overwritten")  # ... and writes to it
    assert s.stale() == (2, 0)
    assert s.rules() == [W.Broken.STALE_MAPPING]
    (found,) = s.gmem.stale_mappings()
    assert (found.number, found.vm, found.gpa, found.pfn, found.why, found.owner) == (
        page.number, s.vm.vm, GPA, page.pfn, "private", s.gmem.inode
    )  # fmt: skip
    assert s.convert(shared=True) == (0, 0)
    assert s.gmem.stale_mappings() == []
    assert page.read(0, 11) == b"overwritten"
    assert s.stale() == (2, 0)
    assert page.unmap().status == 0


def test_what_left_its_inode_is_found_though_it_is_not_private() -> None:
    s = Scene("pfnmap", allow_unsafe_mappings=True)
    page = s.vm.map_page(GPA)
    assert s.gmem.punch_hole(0, M2).status == 0
    assert [one.why for one in s.gmem.stale_mappings()] == ["freed"]
    page.write(b"x")
    assert s.stale() == (0, 1)
    assert s.rules() == [W.Broken.STALE_MAPPING]


def test_the_parameter_came_with_6_13() -> None:
    with pytest.raises(ValueError, match=r"^allow_unsafe_mappings True with kernel '6\.12': expected one that has"):
        Config("pfnmap", kernel="6.12", allow_unsafe_mappings=True)


@pytest.mark.parametrize("size", [PAGE, M2, GIB])
def test_6_12_takes_a_reference_of_pfnmap_where_the_page_counts_any(size: int) -> None:
    """kvm_try_get_pfn(): get_page_unless_zero() of the page itself, which a tail page's zero refuses. The conversion
    has no gate, so that the reference keeps the folio, and not the page's kind."""
    s = Scene("pfnmap", size=size, kernel="6.12")
    page = s.vm.map_page(0)
    assert (page.references, s.extra(0)) == (1, 1)
    if size > PAGE:
        assert s.refused(GPA) == W.EINVAL
        assert not s.vm.pfn_cache(GPA, 8).check()
    s.sound()
    assert s.convert(offset=0) == (0, 0)
    assert s.rules() == [W.Broken.STALE_MAPPING]
    page.read()
    assert s.stale() == (1, 0)
    # The folio outlives its inode, and goes back to the pool with the reference.
    assert s.gmem.close().status == 0
    assert s.machine.statistics.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    page.read()
    assert s.stale() == (1, 0)  # held, so nobody else's
    assert page.unmap().status == 0
    assert s.machine.statistics.gauge(Gauge.BLOCKS_ZOMBIE) == 0
    assert s.rules() == [W.Broken.STALE_MAPPING]  # that of before


def test_a_large_entry_gives_the_frame_inside_it() -> None:
    s = Scene("pfnmap", host_huge=True, allow_unsafe_mappings=True)
    assert s.process.touch(VA).detail == 2
    assert [s.vm.map_page(i * PAGE).pfn for i in (0, 3, 511)] == [s.gmem.pfn(i * PAGE) for i in (0, 3, 511)]
    assert s.vm.pfn_cache(300 * PAGE, 8).pfn == s.gmem.pfn(300 * PAGE)
    s.sound()


# --------------------------------------------------------------------------- gfn_to_pfn_cache


@pytest.mark.parametrize("size", [PAGE, M2, GIB])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_cache_holds_nothing_and_the_notifier_takes_it_away(design: str, size: int) -> None:
    s = Scene(design, size=size)
    cache = s.vm.pfn_cache(0x18, 16)
    assert (cache.check(), cache.references, s.extra(0), cache.pfn) == (True, 0, 0, s.gmem.pfn(0))
    cache.write(b"of Xen's")
    assert s.machine.read_frame(cache.pfn)[0x18:0x20] == b"of Xen's"
    assert s.convert(offset=0) == (0, 0)
    assert not cache.check()
    for use in (cache.read, lambda: cache.write(b"x")):
        with pytest.raises(OSError, match="pfn cache 0: EFAULT"):
            use()
    assert cache.refresh() == (-W.EFAULT, 0)  # while it is private
    assert s.gmem.stale_mappings() == []
    assert s.convert(shared=True, offset=0) == (0, 0)
    assert not cache.check()
    assert cache.refresh() == (0, s.gmem.pfn(0))
    assert cache.check()
    assert len(cache.read()) == 16
    assert s.stale() == (0, 0)
    assert cache.deactivate().status == 0
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_what_invalidates_a_cache_is_its_address(design: str) -> None:
    s = Scene(design)
    cache = s.vm.pfn_cache(GPA, 8)
    second = VA + GIB
    assert s.process.mmap(s.gmem, second).status == 0
    assert s.process.touch(second + GPA).status > 0
    assert s.process.munmap(second, M2).status == 0  # another mapping of the page
    assert s.process.zap(VA + GPA + PAGE, PAGE).status == 0  # the page beside it
    assert cache.check()
    assert s.process.protect(VA, M2, 1).status == 0
    assert not cache.check()
    assert s.process.protect(VA, M2, 3).status == 0
    assert cache.refresh().status == 0
    assert s.process.zap(VA, M2).status == 0
    assert not cache.check()
    assert cache.refresh().status == 0
    assert s.process.munmap(VA, M2).status == 0
    assert not cache.check()
    assert cache.refresh().status == -W.EFAULT
    assert s.process.mmap(s.gmem, VA, length=M2).status == 0
    assert cache.refresh().status == 0
    s.sound()


def test_another_generation_of_memory_slots_makes_a_cache_look_again() -> None:
    """kvm_gpc_check() compares generations; kvm_gpc_refresh() keeps the frame if the userspace address is the same."""
    s = Scene()
    cache = s.vm.pfn_cache(GPA, 8)
    faults = s.machine.statistics.event(Event.HOST_FAULT)
    at = 1 << 40
    assert s.process.mmap_anonymous(at, M2).status == s.vm.set_memory_region(3, GIB, M2, at).status == 0
    assert not cache.check()
    assert cache.refresh() == (0, s.gmem.pfn(GPA))
    assert cache.check()
    assert s.machine.statistics.event(Event.HOST_FAULT) == faults
    assert s.vm.unbind(0).status == 0
    assert not cache.check()
    assert cache.refresh().status == -W.EFAULT
    s.sound()


def test_a_cache_is_activated_elsewhere_and_ends_with_its_page() -> None:
    s = Scene()
    cache = s.vm.pfn_cache(GPA + 4088, 8)
    assert cache.activate(GPA + 4089, 8) == (-W.EINVAL, 0)
    assert (cache.gpa, cache.check()) == (GPA + 4088, True)
    assert cache.activate(M2, 4096) == (0, s.gmem.pfn(M2))
    assert (cache.gpa, cache.length, cache.pfn) == (M2, 4096, s.gmem.pfn(M2))
    assert cache.activate(8 * M2, 8) == (-W.EFAULT, 0)
    assert (cache.check(), cache.live, cache.pfn) == (False, True, 0)
    for gpa, length in ((4089, 8), (0, 4097), (1, (1 << 64) - 1)):
        with pytest.raises(OSError) as error:
            s.vm.pfn_cache(gpa, length)
        assert error.value.errno == W.EINVAL
    assert s.vm.pfn_cache(8 * M2, 8).live
    s.sound()


def test_without_a_notifier_a_cache_is_left_behind() -> None:
    """Config.notifier False: what no kernel does, and the rule finds it."""
    s = Scene("pfnmap", notifier=False)
    cache = s.vm.pfn_cache(GPA, 8)
    assert s.convert() == (0, 0)
    assert cache.check()
    cache.read()
    assert s.stale() == (1, 0)
    assert s.rules() == [W.Broken.STALE_MAPPING]


# --------------------------------------------------------------------------- ends


@pytest.mark.parametrize("design", DESIGNS)
def test_what_kvm_maps_goes_with_its_vm(design: str) -> None:
    s = Scene(design, allow_unsafe_mappings=True)
    other = s.machine.create_vm(s.process, kind="sw")
    assert other.bind(s.gmem, 0).status == 0
    mine: list[MappedPage | PfnCache] = [s.vm.map_page(GPA), s.vm.pfn_cache(GPA, 8)]
    kept = other.map_page(GPA)
    held = kept.references
    assert s.extra() == 2 * held
    assert s.vm.close().status == 0
    assert not any(one.live for one in mine)
    assert (kept.live, s.extra()) == (True, held)
    s.sound()
    assert kept.unmap().status == 0
    assert s.extra() == 0
    s.sound()


def test_a_pinned_page_outlives_its_inode() -> None:
    s = Scene()
    page = s.vm.map_page(GPA)
    page.write(b"still here")
    assert s.gmem.close().status == 0
    assert s.machine.statistics.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    assert page.read(0, 10) == b"still here"
    assert s.stale() == (0, 0)  # it is held: nobody else's
    s.sound()
    assert page.unmap().status == 0
    s.machine.work()
    assert s.machine.statistics.gauge(Gauge.BLOCKS_ZOMBIE) == 0
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 2
    s.sound()


def test_a_process_that_ends_takes_its_caches_along() -> None:
    s = Scene()
    page, cache = s.vm.map_page(GPA), s.vm.pfn_cache(GPA, 8)
    assert s.process.exit().status == 0
    assert (page.live, cache.check(), cache.refresh().status) == (True, False, -W.EFAULT)
    assert s.refused() == W.EINVAL
    assert page.unmap().status == 0
    s.sound()


def test_who_holds_a_folio_is_named() -> None:
    s = Scene()
    page, _ = s.vm.map_page(GPA), s.vm.pfn_cache(GPA, 8)
    assert holders_of(s.machine, page.pfn) == [f"page that KVM maps, {page.number}"]
    assert page.unmap().status == 0
    assert holders_of(s.machine, s.gmem.pfn(GPA) or 0) == []


def test_the_recount_finds_a_reference_that_nobody_holds() -> None:
    s = Scene()
    page = s.vm.map_page(GPA)
    row = int(W.STATE_MAPPED) + page.number * W.K_WORDS
    s.machine.arrays.state[row + int(W.K_REFERENCES)] = np.uint64(BIAS - 1)
    assert W.Broken.REFERENCES in s.rules()


# --------------------------------------------------------------------------- step by step, and in columns


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_map_waits_for_a_conversion_as_the_fault_does(design: str, cached: bool) -> None:
    s = Scene(design, allow_unsafe_mappings=True)
    s.machine.begin(0, Operation.CONVERT, flags=Flag.PRIVATE, offset=GPA, length=PAGE)
    while s.machine.register(W.R_STEPPED) and not _locked(s):
        assert s.machine.step(0) == W.GO
    flags = Flag.CACHED if cached else Flag.WRITE
    s.machine.begin(1, Operation.NESTED_MAP, flags=flags, object_=7, address=GPA, length=8)
    assert s.machine.step(1) == W.BLOCKED
    while s.machine.step(0) != W.STOP:
        assert s.machine.step(1) == W.BLOCKED
    assert s.machine.result(0).status == 0
    assert s.machine.step(1) == W.STOP
    assert s.machine.result(1).status == (-W.EFAULT if cached else -W.EINVAL)  # private by now
    assert s.machine.statistics.event(Event.SYSCALL, Operation.NESTED_MAP) == 0
    s.sound()


def _locked(s: Scene) -> bool:
    row = int(W.STATE_INODES) + s.gmem.inode * W.I_WORDS
    return bool(s.machine.arrays.state[row + int(W.I_LOCK)] >= W.LOCK_WRITER)


@pytest.mark.parametrize("design", DESIGNS)
def test_columns_do_as_calls_do(design: str) -> None:
    """A batch that begins on the fast loops and goes on without them."""
    s = Scene(design, allow_unsafe_mappings=True)
    ops = [Operation.HOST_FAULT, Operation.NESTED_MAP, Operation.CONVERT, Operation.NESTED_MAP, Operation.NESTED_UNMAP]
    flags = [0, Flag.WRITE, Flag.PRIVATE, Flag.THROUGH, 0]
    header = np.array([op | flag << 8 for op, flag in zip(ops, flags, strict=True)], np.uint64)
    address = np.array([VA + GPA, GPA, 0, 0, 0], np.uint64)
    offset = np.array([0, 0, GPA, 0, 0], np.uint64)
    length = np.array([0, 0, PAGE, 0, 0], np.uint64)
    found = s.machine.run_columns(header, [0, 9, 0, 9, 9], address, offset, length, count=5)
    converted = -W.EAGAIN if design == "restructure" else 0
    assert found.status.tolist()[1:] == [0, 0 if design == "pfnmap" else converted, 0, 0]
    assert s.stale() == (int(design == "pfnmap"), 0)
