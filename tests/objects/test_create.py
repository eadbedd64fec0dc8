"""Creation of guest_memfd inodes, their mmap, bind, fallocate and fstat, in each posted form."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.objects.guest_memfd import CreateFlags, GuestMemfd, Rfc2Flags, Stat, check_creation
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
MMAP, SHARED, HUGE = CreateFlags.MMAP, CreateFlags.INIT_SHARED, CreateFlags.HUGETLB
SUPPORT, PRIVATE, HUGETLB = Rfc2Flags.SUPPORT_SHARED, Rfc2Flags.INIT_PRIVATE, Rfc2Flags.HUGETLB

SMALL = Config("restructure", pool=M2, page_size=PAGE)
LARGE = Config("restructure", pool=4 * M2, page_size=M2)


@pytest.mark.parametrize("form", ["main", "next"])
def test_valid_flags_of_merged_code(form: Any) -> None:
    for flags in (0, MMAP, SHARED, MMAP | SHARED):
        found = check_creation(SMALL, PAGE, flags, form)
        assert (found.mappable, found.shared) == (bool(flags & MMAP), bool(flags & SHARED))
    for bit in range(2, 64):
        with pytest.raises(OSError, match="expected some of 0x3") as refused:
            check_creation(SMALL, PAGE, 1 << bit, form)
        assert refused.value.errno == W.EINVAL


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE - 1, PAGE + 1])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(OSError, match="positive multiple") as refused:
        check_creation(SMALL, size, 0)
    assert refused.value.errno == W.EINVAL


def test_flags_of_rfc2() -> None:
    for flags, shared in ((0, False), (SUPPORT, True), (SUPPORT | PRIVATE, False)):
        found = check_creation(SMALL, PAGE, flags, "rfc2")
        assert (found.mappable, found.shared) == (bool(flags & SUPPORT), shared)
    assert check_creation(LARGE, M2, HUGETLB | Rfc2Flags.SIZE_2M, "rfc2").huge
    assert check_creation(LARGE, M2, HUGETLB | SUPPORT, "rfc2").huge  # the default size
    refused = [PRIVATE, 1 << 3, Rfc2Flags.SIZE_2M, HUGETLB | 22 << 58, HUGETLB | PRIVATE]
    for flags in refused:
        with pytest.raises(OSError, match="expected") as error:
            check_creation(LARGE, M2, flags, "rfc2")
        assert error.value.errno == W.EINVAL
    with pytest.raises(ValueError, match="order of the machine's"):
        check_creation(LARGE, M2, HUGETLB | Rfc2Flags.SIZE_1G, "rfc2")
    with pytest.raises(ValueError, match="order of the machine's"):
        check_creation(SMALL, M2, HUGETLB, "rfc2")  # the machine has no huge pages of the default size
    with pytest.raises(OSError, match="multiple of the huge page"):
        check_creation(LARGE, M2 + PAGE, HUGETLB, "rfc2")


def test_flags_and_page_order_of_december_2025() -> None:
    assert check_creation(LARGE, M2, MMAP | HUGE, "wip", 9).huge
    refused: list[tuple[int, int]] = [(MMAP, 9), (HUGE | SHARED, 9), (HUGE, 0), (HUGE, 10), (1 << 3, 0)]
    for flags, order in refused:
        with pytest.raises(OSError, match="Errno 22") as error:
            check_creation(LARGE, M2, flags, "wip", order)
        assert error.value.errno == W.EINVAL
    with pytest.raises(OSError, match="multiple of the huge page"):
        check_creation(LARGE, M2 + PAGE, HUGE, "wip", 9)


def test_misuse() -> None:
    machine = Machine(LARGE)
    with pytest.raises(ValueError, match="form"):
        machine.create_guest_memfd(M2, form="v13")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="told by the flags"):
        machine.create_guest_memfd(M2, shared=True, flags=MMAP)
    with pytest.raises(ValueError, match=r"2\*\*64 - 1"):
        machine.create_guest_memfd(M2, flags=1 << 64)
    with pytest.raises(OSError, match="HUGETLB with INIT_SHARED"):
        machine.create_guest_memfd(M2, shared=True, form="wip")
    with pytest.raises(OSError, match="cannot reserve") as refused:
        machine.create_guest_memfd(5 * M2)
    assert refused.value.errno == W.ENOMEM
    assert machine.check() == 0


@pytest.mark.parametrize(
    ("form", "shared"),
    [("main", True), ("main", False), ("next", True), ("rfc2", True), ("rfc2", False), ("wip", False)],
)
def test_defaults_of_every_form(form: Any, shared: bool) -> None:
    machine = Machine(LARGE)
    gmem = machine.create_guest_memfd(2 * M2, shared=shared, form=form)
    assert {gmem.is_shared(offset) for offset in range(0, 2 * M2, M2 // 4)} == {shared}
    process = machine.create_process()
    assert process.mmap(gmem, VA).status == 0
    assert process.touch(VA).status == (W.VM_FAULT_LOCKED if shared else W.VM_FAULT_SIGBUS)


# --------------------------------------------------------------------------- mmap


def test_mmap_of_a_file_without_the_flag() -> None:
    machine = Machine(SMALL)
    process = machine.create_process()
    cases: list[tuple[Any, int]] = [("main", 0), ("main", SHARED), ("next", 0), ("rfc2", 0), ("wip", 0)]
    for form, flags in cases:
        gmem = machine.create_guest_memfd(PAGE, flags=flags, form=form)
        assert process.mmap(gmem, VA).status == -W.ENODEV
    assert process.mmap(machine.create_guest_memfd(PAGE, flags=MMAP), VA).status == 0


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_mmap_private(config: Config) -> None:
    machine = Machine(config)
    process = machine.create_process()
    gmem = machine.create_guest_memfd(config.page_size)
    assert process.mmap(gmem, VA, private=True).status == -W.EINVAL
    assert process.mmap(gmem, VA).status == 0


def test_mmap_of_rfc2_wants_whole_huge_pages() -> None:
    machine = Machine(LARGE)
    process = machine.create_process()
    strict = machine.create_guest_memfd(2 * M2, form="rfc2")
    plain = machine.create_guest_memfd(2 * M2)
    for address, length in ((VA, PAGE), (VA, M2 + PAGE), (VA + PAGE, M2)):
        assert process.mmap(strict, address, length=length).status == -W.EINVAL
        assert process.mmap(plain, address, length=length).status == 0
        assert process.munmap(address, length).status == 0
    assert process.mmap(strict, VA, offset=M2, length=M2).status == 0


# --------------------------------------------------------------------------- bind


@pytest.mark.parametrize(("form", "status"), [("main", -W.EINVAL), ("next", -W.EEXIST), ("rfc2", -W.EINVAL)])
def test_pages_are_bound_once_by_a_vm(form: Any, status: int) -> None:
    machine = Machine(SMALL)
    gmem = machine.create_guest_memfd(8 * PAGE, form=form)
    vm, second = machine.create_vm(), machine.create_vm()
    assert vm.bind(gmem, 0, length=4 * PAGE).status == 0
    assert vm.bind(gmem, 1 << 20, offset=3 * PAGE, length=PAGE).status == status
    assert vm.bind(gmem, 2 * PAGE, offset=4 * PAGE, length=PAGE).status == -W.EEXIST  # guest frames of a slot
    assert vm.bind(gmem, 1 << 20, offset=4 * PAGE, length=5 * PAGE).status == -W.EINVAL  # past the end
    assert second.bind(gmem, 0).status == 0
    assert vm.bind(gmem, 1 << 20, offset=4 * PAGE, length=4 * PAGE).status == 0


def test_rfc2_looks_at_the_userspace_address() -> None:
    machine = Machine(SMALL)
    process = machine.create_process()
    vm = machine.create_vm(process)
    gmem, other = (machine.create_guest_memfd(8 * PAGE, form="rfc2") for _ in range(2))
    assert process.mmap(gmem, VA, offset=2 * PAGE).status == 0

    def bind(which: GuestMemfd, offset: int, address: int) -> int:
        return vm.bind(which, 0, offset=offset, length=PAGE, userspace_addr=address).status

    assert bind(gmem, 2 * PAGE, VA - PAGE) == -W.EINVAL  # nothing there
    assert bind(gmem, 3 * PAGE, VA) == -W.EINVAL  # another offset
    assert bind(other, 2 * PAGE, VA) == -W.EINVAL  # another file
    assert bind(gmem, 3 * PAGE, VA + PAGE) == 0
    main = machine.create_guest_memfd(8 * PAGE)
    assert vm.bind(main, 1 << 20, userspace_addr=VA).status == 0  # merged code does not look


# --------------------------------------------------------------------------- fallocate and fstat


def test_fallocate_modes() -> None:
    gmem = Machine(SMALL).create_guest_memfd(8 * PAGE)
    keep, punch = 1, 2
    assert gmem.fallocate(0, 0, PAGE).status == -W.EOPNOTSUPP
    assert gmem.fallocate(punch, 0, PAGE).status == -W.EOPNOTSUPP  # punch hole wants keep size
    assert gmem.fallocate(keep | 8, 0, PAGE).status == -W.EOPNOTSUPP
    assert gmem.fallocate(keep, 0, 0).status == gmem.fallocate(keep, -PAGE, PAGE).status == -W.EINVAL
    assert gmem.fallocate(keep, 0, 2 * PAGE).status == 0
    assert gmem.pfn(PAGE) is not None
    assert gmem.fallocate(keep | punch, 0, PAGE).status == 0
    assert gmem.pfn(0) is None
    assert gmem.pfn(PAGE) is not None
    assert gmem.fallocate(keep, 8 * PAGE, PAGE).status == -W.EINVAL  # at the end
    assert gmem.fallocate(keep | punch, 8 * PAGE, PAGE).status == 0
    for offset, length in ((0, 1), (0, PAGE - 1), (0, PAGE + 1), (1, 1), (1, PAGE), (PAGE, 1), (PAGE, PAGE + 1)):
        assert gmem.fallocate(keep | punch, offset, length).status == -W.EINVAL


def test_fstat() -> None:
    machine = Machine(LARGE)
    first = machine.create_guest_memfd(2 * M2, form="rfc2")
    second = machine.create_guest_memfd(M2)
    assert first.stat() == Stat(1, 2 * M2, PAGE, 0)
    assert first.allocate(0, M2).status == second.allocate(0, M2).status == 0
    assert first.stat().st_blocks == M2 // 512
    assert second.stat() == Stat(2, M2, PAGE, 0)  # merged code does not count
    assert first.punch_hole(0, M2).status == 0
    assert first.stat().st_blocks == 0


# --------------------------------------------------------------------------- what the file does not do


def test_neither_read_nor_written() -> None:
    gmem = Machine(SMALL).create_guest_memfd(PAGE)
    assert gmem.pread(1, 0).status == gmem.pwrite(b"A", 0).status == -W.EINVAL
    assert gmem.close().status == 0
    assert gmem.pread(1, 0).status == gmem.pwrite(b"A", 0).status == -W.EBADF


def test_collapse_is_refused() -> None:
    machine = Machine(SMALL)
    process, other = machine.create_process(), machine.create_process()
    gmem = machine.create_guest_memfd(M2)
    assert process.mmap(gmem, VA).status == 0
    assert process.mmap_anonymous(VA + 2 * M2, M2).status == 0
    assert process.madvise_collapse(VA, M2).status == -W.EINVAL
    assert process.madvise_collapse(VA - M2, 4 * M2).status == -W.EINVAL  # the first mapping of the range
    assert process.madvise_collapse(VA + 1, M2).status == -W.EINVAL
    assert process.madvise_collapse(VA, 0).status == 0
    assert process.madvise_collapse(VA + M2, 2 * M2).status == -W.EINVAL  # anonymous memory that nobody has written
    assert process.madvise_collapse(VA + 3 * M2, M2).status == -W.ENOMEM
    assert other.madvise_collapse(VA, M2).status == -W.ENOMEM
    small = machine.create_guest_memfd_4k(PAGE)
    assert process.mmap(small, VA + 4 * M2).status == 0
    assert process.madvise_collapse(VA + 4 * M2, PAGE).status == -W.EINVAL


def test_policy_that_a_range_has() -> None:
    machine = Machine(Config("pfnmap", pool=4 * M2, page_size=M2, nodes=2))
    gmem, other = (machine.create_guest_memfd(2 * M2) for _ in range(2))
    assert machine.set_mempolicy("bind", [1]).status == 0
    assert gmem.mempolicy(0) == ("default", ())  # not the task's
    assert gmem.mbind(PAGE, M2, "interleave", [0, 1]).status == 0
    assert gmem.mbind(2 * PAGE, PAGE, "preferred", [1]).status == 0
    assert gmem.mbind(3 * PAGE, PAGE, "preferred").status == 0
    assert gmem.mbind(4 * PAGE, PAGE, "preferred", [0, 1]).status == 0
    assert [gmem.mempolicy(page * PAGE) for page in range(6)] == [
        ("default", ()), ("interleave", (0, 1)), ("preferred", (1,)), ("local", ()), ("preferred", (0,)),
        ("interleave", (0, 1)),
    ]  # fmt: skip
    assert gmem.mempolicy(M2).mode == "interleave"
    assert gmem.mempolicy(M2 + PAGE).mode == "default"
    assert other.mempolicy(PAGE) == ("default", ())
    with pytest.raises(ValueError, match="expected to lie within"):
        gmem.mempolicy(2 * M2)
