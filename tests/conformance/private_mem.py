"""private_mem_conversions_test, private_mem_kvm_exits_test, set_memory_region_test, pre_fault_memory_test.

Upstream the first one has private pages in a guest_memfd and shared ones elsewhere, so that a conversion changes which
of two pages the guest sees. Here both are the same page, as with conversion in place: what was written before stays.
"""

from __future__ import annotations

from conformance.harness import GPA, PAGE, Scene, case
from pgemu_kernels import words as W

M2 = W.PAGE_2M
RANGES = ((0, PAGE), (0, M2), (PAGE, PAGE), (PAGE, M2), (M2, PAGE))
DATA = M2 + PAGE  # PER_CPU_DATA_SIZE
INIT = 0xCC


def sample(offset: int, size: int) -> list[int]:
    """Pages of a range that are looked at: both ends, the middle, and both sides of a 2M boundary."""
    pages = {offset, offset + size - PAGE, offset + size // 2 // PAGE * PAGE, M2 - PAGE, M2}
    return sorted(page for page in pages if offset <= page < offset + size)


def explicit_conversion(t: Scene, base: int, punch: bool) -> None:
    """guest_test_explicit_conversion() of one vCPU, whose data begin at `base`."""
    seen = sample(0, DATA)
    for page in seen:
        t.guest_rmw(base + page, None, INIT)
        t.host_rmw(base + page, INIT, None)
    for offset, size in RANGES:
        outside = [page for page in seen if not offset <= page < offset + size]
        inside = sorted({*sample(offset, size), *seen} - {*outside})
        for page in inside:
            t.guest_rmw(base + page, None, 0x11)
        assert t.gmem.convert(base + offset, size, shared=False) == (0, 0)
        if punch:
            assert t.gmem.punch_hole(base + offset, size) == (0, 0)
        for page in inside:
            t.guest_rmw(base + page, 0 if punch else 0x11, 0x22)
            t.host_cannot(base + page)
        for page in outside:
            t.host_rmw(base + page, INIT, None)
            t.guest_rmw(base + page, INIT, None)
        # The first half becomes shared and private again: the second half stays as it is.
        half = max(PAGE, size // 2)
        assert t.gmem.convert(base + offset, half, shared=True) == (0, 0)
        for page in inside:
            if page < offset + half:
                t.host_rmw(base + page, 0x22, 0x33)
                t.guest_rmw(base + page, 0x33, 0x44)
            else:
                t.host_cannot(base + page)
                t.guest_rmw(base + page, 0x22, 0x44)
        assert t.gmem.convert(base + offset, size, shared=True) == (0, 0)
        for page in inside:
            t.host_rmw(base + page, 0x44, INIT)
            t.guest_rmw(base + page, INIT, INIT)


def conversions(t: Scene, vcpus: int, memslots: int, punch: bool) -> None:
    """Every vCPU has data of its own; the file is bound by one slot or by one for each vCPU."""
    stride = 2 * M2
    t.set_up(vcpus * stride, shared=True)
    if memslots > 1:
        assert t.vm.unbind(GPA).status == 0
        for vcpu in range(vcpus):
            assert t.vm.bind(t.gmem, GPA + vcpu * stride, offset=vcpu * stride, length=stride).status == 0
    for vcpu in range(vcpus):
        explicit_conversion(t, vcpu * stride, punch)


@case("private_mem_conversions_test")
def test_explicit_conversion(t: Scene) -> None:
    conversions(t, 1, 1, punch=False)


@case("private_mem_conversions_test")
def test_explicit_conversion_fallocate(t: Scene) -> None:
    conversions(t, 1, 1, punch=True)


@case("private_mem_conversions_test")
def test_explicit_conversion_vcpus(t: Scene) -> None:
    conversions(t, 3, 1, punch=False)


@case("private_mem_conversions_test")
def test_explicit_conversion_memslots(t: Scene) -> None:
    conversions(t, 3, 3, punch=True)


@case("private_mem_conversions_test")
def test_implicit_conversion(t: Scene) -> None:
    """guest_test_punch_hole() with implicit conversions: the access tells its kind, the exit tells the VMM."""
    t.set_up(2 * M2, shared=True)
    for offset, size in RANGES:
        for page in sample(offset, size):
            assert t.guest_fault(page, private=True).status == -W.EFAULT  # KVM_EXIT_MEMORY_FAULT
            assert t.gmem.convert(page, PAGE, shared=False) == (0, 0)
            assert t.guest_fault(page, private=True).status == W.RET_PF_FIXED
            assert t.guest_fault(page, private=False).status == -W.EFAULT
            assert t.gmem.convert(page, PAGE, shared=True) == (0, 0)
            assert t.guest_fault(page, private=False).status == W.RET_PF_FIXED


@case("private_mem_conversions_test")
def test_punch_hole_whole_and_parts(t: Scene) -> None:
    """PUNCH_HOLE over private ranges: what is inside reads as zero, what is outside is kept."""
    t.set_up(2 * M2, shared=False)
    for offset, size in RANGES:
        pages = sample(0, DATA)
        for page in pages:
            t.guest_rmw(page, None, INIT)
        assert t.gmem.punch_hole(offset, size) == (0, 0)
        for page in pages:
            t.guest_rmw(page, 0 if offset <= page < offset + size else INIT, None)


@case("private_mem_kvm_exits_test")
def test_private_access_memslot_deleted(t: Scene) -> None:
    """A private access where the slot went away exits to userspace: KVM_EXIT_MEMORY_FAULT."""
    t.set_up(PAGE, shared=False)
    assert t.guest_fault(0, private=True).status == W.RET_PF_FIXED
    assert t.vm.unbind(GPA).status == 0
    assert t.guest_fault(0, private=True).status == -W.EFAULT


@case("private_mem_kvm_exits_test")
def test_private_access_memslot_not_private(t: Scene) -> None:
    """A private access of shared memory exits."""
    t.set_up(PAGE, shared=True)
    assert t.guest_fault(0, private=True).status == -W.EFAULT
    assert t.guest_fault(0, private=False).status == W.RET_PF_FIXED


@case("set_memory_region_test")
def test_add_overlapping_private_memory_regions(t: Scene) -> None:
    """The same pages of a file cannot be bound twice in a VM, nor the same guest frames.

    What is bound already is found when a slot is prepared, in linux-next when it is committed.
    """
    t.set_up(4 * M2, shared=False)
    assert t.vm.unbind(GPA).status == 0
    assert t.vm.bind(t.gmem, GPA, offset=0, length=2 * M2).status == 0
    assert t.vm.bind(t.gmem, GPA + 2 * M2, offset=2 * M2, length=2 * M2).status == 0
    assert t.vm.unbind(GPA + 2 * M2).status == 0
    bound = -W.EEXIST if t.variant.form == "next" else -W.EINVAL
    assert t.vm.bind(t.gmem, GPA + 4 * M2, offset=M2, length=2 * M2).status == bound
    assert t.vm.bind(t.gmem, GPA + M2, offset=2 * M2, length=2 * M2).status == -W.EEXIST
    assert t.vm.unbind(GPA).status == 0
    assert t.vm.bind(t.gmem, GPA, offset=2 * M2, length=2 * M2).status == 0


@case("set_memory_region_test")
def test_add_private_memory_region(t: Scene) -> None:
    """Offsets and sizes must be aligned and within the file; another VM may bind the same file."""
    t.set_up(2 * M2, shared=False)
    assert t.vm.unbind(GPA).status == 0
    for offset, length in ((1, PAGE), (0, PAGE + 1), (t.size, PAGE), (t.size - PAGE, 2 * PAGE), (0, 0)):
        assert t.vm.bind(t.gmem, GPA, offset=offset, length=length).status == -W.EINVAL
    assert t.vm.bind(t.gmem, GPA + 1).status == -W.EINVAL
    other = t.machine.create_vm(protected=True)
    assert other.bind(t.gmem, GPA).status == 0
    assert t.vm.bind(t.gmem, GPA).status == 0


@case("pre_fault_memory_test")
def test_pre_fault_memory(t: Scene) -> None:
    """KVM_PRE_FAULT_MEMORY: all, a part, past the end of the slot, where nothing is."""
    t.set_up(M2 + PAGE, shared=False)
    slot = t.size
    assert t.vm.prefault(GPA, M2) == (0, M2)
    assert t.vm.prefault(GPA + M2, PAGE) == (0, PAGE)
    assert t.vm.prefault(GPA + slot - PAGE, 2 * PAGE) == (0, PAGE)
    assert t.vm.prefault(GPA + slot, PAGE).status == -W.ENOENT
    assert t.guest_fault(M2, private=True).status == W.RET_PF_SPURIOUS


@case("pre_fault_memory_test")
def test_pre_fault_memory_shared_and_private(t: Scene) -> None:
    """Each kind is mapped at the level that it may have."""
    t.set_up(2 * M2, shared=False)
    assert t.gmem.convert(PAGE, PAGE, shared=True) == (0, 0)
    assert t.vm.prefault(GPA, 2 * M2) == (0, 2 * M2)
    levels = [t.vm.touch(GPA + offset).detail for offset in (0, PAGE, M2)]
    huge = {"4K": 1, "2M": 2, "1G": t.by_design(1, 2, "the level follows shareability alone")}[t.variant.size]
    assert levels == [1, 1, huge]
