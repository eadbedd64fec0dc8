"""From what a log asks to operations: which ones, where, and why some inputs have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.trace import GivenSlot, Lowered, LoweringOptions, load
from pgemu.trace.schema import Flag, Operation

M, G = 1 << 20, 1 << 30
HVA = 0x7F00_0000_0000
VMM = "vmm-10 [000] ..... 1.000000: "
VCPU = "CPU 0/KVM-11 [000] ..... 1.000000: "


def slot(number: int, gpa: int, size: int, hva: int, flags: int = 0) -> str:
    return f"{VMM}kvm_memslot: slot={number} flags={flags:#x} gpa={gpa:#x} size={size:#x} hva={hva:#x}\n"


def guest(address: int, code: int = 0x100000006, vcpu: int = 0) -> str:
    return f"{VCPU}kvm_page_fault: vcpu {vcpu} rip 0x0 address {address:#x} error_code {code:#x}\n"


def host(address: int, code: int = 6) -> str:
    return f"{VMM}page_fault_user: address={address:#x} ip=0x1 error_code={code:#x}\n"


def attributes(first: int, end: int, private: bool) -> str:
    return f"{VMM}kvm_vm_set_mem_attributes: {first:#x} -- {end:#x} [{8 * private:#x}]\n"


def madvise(start: int, length: int, advice: int = 4, result: str = "0x0") -> str:
    call = f"{VMM}sys_madvise(start: {start:#x}, len_in: {length:#x}, behavior: {advice})\n"
    return call + f"{VMM}sys_madvise -> {result}\n"


def unmap(start: int, end: int) -> str:
    return f"{VMM}kvm_unmap_hva_range: mmu notifier unmap range: {start:#x} -- {end:#x}\n"


class Case:
    """Lowers texts through a file, as users do."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log"

    def __call__(self, text: str, options: LoweringOptions | None = None) -> Lowered:
        self.path.write_text(text)
        lowered = load(self.path, options)
        assert lowered.accounting.balanced()
        return lowered


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def operations(lowered: Lowered) -> list[tuple[str, int, int, int, int]]:
    """Name, flags, address, offset and length of each record behind the setup."""
    records = lowered.records[lowered.accounting.setup :]
    columns = (records.op, records.flags, records.address, records.offset, records.length)
    return [(Operation(op).name, *rest) for op, *rest in zip(*(c.tolist() for c in columns), strict=True)]


def test_setup_maps_ram_and_slots_bind_at_their_time(case: Case) -> None:
    text = guest(0) + slot(0, 0, 16 * M, HVA) + guest(0x1234) + slot(0, 0, 0, HVA) + guest(0x1000)
    lowered = case(text, LoweringOptions(early_slots="absent"))
    assert lowered.accounting.setup == 1
    assert lowered.records.op[0] == Operation.MMAP
    assert operations(lowered) == [
        ("BIND", 0, 0, 0, 16 * M),
        ("GUEST_FAULT", Flag.WRITE, 0x1234, 0, 0),
        ("UNBIND", 0, 0, 0, 0),
    ]
    yet = "no memory slot (before the log's first slot line)"
    assert lowered.accounting.without_operation == {yet: 1, "no memory slot": 1}
    assert lowered.layout.slots == ()


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        (0x100000004, 0),
        (0x100000006, Flag.WRITE),
        (0x100000014, Flag.EXEC),
        (0x500000004, Flag.PRIVATE),  # SEV-SNP: bit 34, guest encrypted
        (0x2000000000006, Flag.WRITE | Flag.PRIVATE),  # bit 49, KVM's own
        (0x181, 0),  # EPT exit qualifications from here on: bits 0 to 2 read, write, fetch
        (0x182, Flag.WRITE),
        (0x184, Flag.EXEC),
        (0x1AA, Flag.WRITE),  # bit 3: was readable, not a device
    ],
)
def test_error_codes(case: Case, code: int, flags: int) -> None:
    assert operations(case(slot(0, 0, M, HVA) + guest(0x5000, code)))[1:] == [("GUEST_FAULT", flags, 0x5000, 0, 0)]


def test_faults_of_devices_are_no_memory(case: Case) -> None:
    lowered = case(slot(0, 0, M, HVA) + guest(0xFEE00000, 0x10000000E))
    assert lowered.accounting.without_operation == {"access to a device": 1}


def test_actors_are_vcpus_or_host_threads(case: Case) -> None:
    lowered = case(slot(0, 0, M, HVA) + guest(0, vcpu=5) + host(HVA))
    assert lowered.records.actor.tolist()[-2:] == [5, 256]


def test_refused_slots_stay_on_other_memory_with_their_reason(case: Case) -> None:
    lowered = case(
        slot(0, 0, 16 * M, HVA)
        + slot(1, 0xFFFC0000, 0x40000, HVA + G, flags=2)
        + slot(2, 0xFEDA0000, 0x20000, HVA + 0xA0000)
        + slot(65536, 0, 16 * M, HVA)
        + guest(0xFFFFFFF0)
        + guest(0xFEDA1000)
        + slot(1, 0xFFFC0000, 0, HVA + G)
        + guest(0xFFFFFFF0)
    )
    read_only, aliased = "read-only memory slot", "memory slot whose host memory another slot has"
    assert lowered.accounting.without_operation == {
        read_only: 2,
        aliased: 1,
        "memory slot of address space 1 (SMM)": 1,
        f"not guest memory: {read_only}": 1,
        f"not guest memory: {aliased}": 1,
        "no memory slot": 1,
    }
    assert [refused.slot for refused in lowered.layout.refused] == [2, 65536]


def test_changed_flags_bind_nothing_and_a_moved_slot_is_bound_anew(case: Case) -> None:
    lowered = case(slot(0, 0, M, HVA) + slot(0, 0, M, HVA, flags=1) + slot(0, 2 * M, M, HVA))
    assert [name for name, *_ in operations(lowered)] == ["BIND", "UNBIND", "BIND"]
    assert lowered.accounting.without_operation == {"flags of a memory slot": 1}
    assert lowered.accounting.extra_pieces == 1


def test_host_faults_count_inside_ram_only(case: Case) -> None:
    lowered = case(slot(0, 0, M, HVA) + host(HVA - 1) + host(HVA + M - 1, 0x14) + host(HVA + M))
    assert operations(lowered)[1:] == [("HOST_FAULT", Flag.EXEC, HVA + M - 1, 0, 0)]
    assert lowered.accounting.without_operation == {"not guest memory": 2}


def test_host_addresses_are_ram_only_once_ram_is_mapped_there(case: Case) -> None:
    call = f"{VMM}sys_mmap(addr: 0, len: {M:#x}, prot: 3, flags: 0x22, fd: 0xffffffff, off: 0)\n"
    mmap = call + f"{VMM}sys_mmap -> {HVA:#x}\n"
    munmap = f"{VMM}sys_munmap(addr: {HVA:#x}, len: {M:#x})\n"
    lowered = case(host(HVA) + munmap + mmap + host(HVA) + slot(0, 0, M, HVA) + munmap)
    assert [name for name, *_ in operations(lowered)] == ["HOST_FAULT", "BIND", "MUNMAP"]


def test_attributes_become_conversions_of_each_slot_they_reach(case: Case) -> None:
    ram = slot(0, 0, M, HVA) + slot(1, M, M, HVA + M)
    lowered = case(ram + attributes(0xF0, 0x110, True) + attributes(0x1000, 0x1001, False))
    assert operations(lowered)[2:] == [
        ("CONVERT", Flag.PRIVATE, 0, 0xF0000, 0x10000),
        ("CONVERT", Flag.PRIVATE, 0, 0x100000, 0x10000),
    ]
    assert (lowered.accounting.extra_pieces, lowered.init, lowered.converts) == (1, "private", True)
    assert lowered.accounting.without_operation == {"no memory slot": 1}


def test_init_is_shared_where_nothing_converts_unless_given(case: Case) -> None:
    text = slot(0, 0, M, HVA) + guest(0)
    assert (case(text).init, case(text).converts) == ("shared", False)
    assert case(text, LoweringOptions(init="private")).init == "private"


@pytest.mark.parametrize(
    ("dontneed", "advised", "unmapped"),
    [
        (None, ("PUNCH_HOLE", 0, 0, 0x1000, 0x2000), ("ZAP", 0, HVA, 0, 0x1000)),
        ("punch", ("PUNCH_HOLE", 0, 0, 0x1000, 0x2000), ("PUNCH_HOLE", 0, 0, 0, 0x1000)),
        ("zap", ("ZAP", Flag.MADVISE, HVA + 0x1000, 0, 0x2000), ("ZAP", 0, HVA, 0, 0x1000)),
    ],
)
def test_what_gives_memory_back(
    case: Case, dontneed: str | None, advised: tuple[object, ...], unmapped: tuple[object, ...]
) -> None:
    text = slot(0, 0, M, HVA) + madvise(HVA + 0x1000, 0x1FFF) + unmap(HVA - M, HVA + 0x1000) + unmap(HVA + M, HVA + G)
    lowered = case(text, LoweringOptions(dontneed=dontneed))  # type: ignore[arg-type]
    assert operations(lowered)[1:] == [advised, unmapped]
    assert lowered.accounting.without_operation == {"not guest memory": 1}


def test_madv_remove_is_a_hole_and_a_failed_call_is_nothing(case: Case) -> None:
    text = slot(0, 0, M, HVA) + madvise(HVA, M, 9) + madvise(HVA, M, 4, "0xffffffffffffffea")
    lowered = case(text, LoweringOptions(dontneed="zap"))
    assert operations(lowered)[1:] == [("PUNCH_HOLE", 0, 0, 0, M)]
    assert lowered.accounting.without_operation == {"the call failed": 1}


def test_a_range_over_two_mappings_gives_two_pieces(case: Case) -> None:
    ram = slot(0, 0, M, HVA) + slot(1, 2 * M, M, HVA + 2 * M)
    lowered = case(ram + madvise(HVA, 3 * M), LoweringOptions(page_size=2 * M))
    assert [record[3:] for record in operations(lowered)[2:]] == [(0, M), (M, M)]
    assert lowered.accounting.extra_pieces == 1


def fallocate(offset: int, length: int, inside: str = "", mode: int = 3) -> str:
    call = f"{VMM}sys_fallocate(fd: 0xf, mode: {mode}, offset: {offset:#x}, len: {length:#x})\n"
    return call + inside + f"{VMM}sys_fallocate -> 0x0\n"


def test_holes_are_placed_by_the_unmap_inside_or_by_size(case: Case) -> None:
    one, two = slot(0, 0, 4 * M, HVA), slot(1, 8 * M, 4 * M, HVA + 8 * M)
    assert operations(case(one + fallocate(M, 0x1000)))[1:] == [("PUNCH_HOLE", 0, 0, M, 0x1000)]
    hinted = case(one + two + fallocate(M, 0x1000, unmap(HVA + 9 * M, HVA + 9 * M + 0x1000)) + fallocate(0, 0x1000))
    second = 8 * M  # the second slot's offset is congruent to its GPA
    assert [record[3] for record in operations(hinted)[2:]] == [second + M, second]
    unplaced = case(one + two + fallocate(M, 0x1000) + fallocate(0, 0x1000, mode=0))
    assert unplaced.accounting.without_operation == {"fallocate of another file": 1, "allocate": 1}


def test_partial_pages_are_no_hole(case: Case) -> None:
    lowered = case(slot(0, 0, 4 * M, HVA) + fallocate(0x800, 0x2000) + fallocate(0x800, 0x100))
    assert operations(lowered)[1:] == [("PUNCH_HOLE", 0, 0, 0x1000, 0x1000)]


def test_hugetlbfs_holes_without_their_call_are_inputs(case: Case) -> None:
    event = "hugetlbfs_fallocate: dev 0,17 ino 98636 mode 03 offset 2097152 len 2097152 size 33554432 ret "
    lowered = case(slot(0, 0, 32 * M, HVA) + f"{VMM}{event}0\n{VMM}{event}-11\n")
    assert operations(lowered)[1:] == [("PUNCH_HOLE", 0, 0, 2 * M, 2 * M)]
    assert lowered.accounting.without_operation == {"the call failed": 1}


def test_slots_are_inferred_from_what_is_touched(case: Case) -> None:
    text = guest(0x1000) + guest(M * 900) + guest(5 * G + 3 * M) + guest(0xFEE00000, 0x10000000E) + host(HVA)
    lowered = case(text + attributes(0x200000, 0x200001, True))
    assert [(slot.gpa, slot.size) for slot in lowered.layout.slots] == [
        (0, 902 * M),
        (5 * G + 2 * M, 2 * M),
        (8 * G, 2 * M),
    ]
    assert lowered.layout.inferred
    assert lowered.accounting.setup == 6
    assert [name for name, *_ in operations(lowered)] == ["GUEST_FAULT"] * 3 + ["CONVERT"]
    reason = "not guest memory (no slot line: host addresses unknown)"
    assert lowered.accounting.without_operation == {"access to a device": 1, reason: 1}


def test_given_slots_replace_those_of_the_log(case: Case) -> None:
    text = slot(0, 0, 16 * M, HVA) + guest(2 * M) + host(HVA + 2 * M)
    lowered = case(text, LoweringOptions(page_size=2 * M, memslots=(GivenSlot(2 * M, 4 * M, 8 * M),)))
    assert (lowered.layout.slots[0].hva, lowered.layout.slots[0].offset) == (HVA + 2 * M, 8 * M)
    assert [name for name, *_ in operations(lowered)] == ["GUEST_FAULT", "HOST_FAULT"]
    assert lowered.accounting.without_operation == {"memory slots were given": 1}
    assert (lowered.accounting.setup, lowered.layout.inode_size) == (2, 12 * M)


def test_given_slots_must_cover_the_guest_faults(case: Case) -> None:
    text = slot(0, 0, 16 * M, HVA) + guest(0xFEE00000, 0x10000000E) + guest(M) + guest(2 * M)
    with pytest.raises(InputError, match="log:4: guest fault at 0x200000 lies outside the given memory slots"):
        case(text, LoweringOptions(memslots=(GivenSlot(0, 2 * M),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoweringOptions(guest_memory=G + M), "not a multiple of the page size 1073741824"),
        (LoweringOptions(guest_memory=0), "not a multiple"),
        (LoweringOptions(page_size=2 * M, guest_memory=14 * M), "too small, the memory slots need 16777216"),
        (LoweringOptions(memslots=(GivenSlot(0, 100),)), "not made of whole 4 KiB pages"),
        (LoweringOptions(memslots=(GivenSlot(0, M), GivenSlot(M // 2, M))), "overlap in their guest addresses"),
        (LoweringOptions(memslots=(GivenSlot(0, M, 0), GivenSlot(M, M, 0))), "overlap in their offsets at 0x0"),
    ],
)
def test_options_that_do_not_fit_are_refused(case: Case, options: LoweringOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        case(slot(0, 0, 16 * M, HVA) + guest(0), options)


def test_a_log_whose_slots_are_all_refused_is_refused(case: Case) -> None:
    with pytest.raises(InputError, match=r"can back no memory slot of this log \(read-only memory slot\)"):
        case(slot(0, 0, M, HVA, flags=2) + guest(0))


def test_records_know_the_level_of_the_recorded_leaf(case: Case) -> None:
    def leaf(gfn: int, level: int) -> str:
        return f"{VCPU}kvm_mmu_set_spte: gfn {gfn:x} spte 114800ee7 (rwxu) level {level} at 1\n"

    ram = slot(0, 0, 16 * M, HVA)
    lowered = case(ram + guest(0x1000) + leaf(1, 1) + host(HVA) + guest(2 * M) + leaf(512, 2) + guest(0x5000))
    assert lowered.fault_levels is not None
    assert lowered.fault_levels.tolist() == [0] * (lowered.accounting.setup + 1) + [1, 0, 2, 0]
    assert [Operation(op).name for op in lowered.records.op[lowered.accounting.setup + 1 :]] == [
        "GUEST_FAULT",
        "HOST_FAULT",
        "GUEST_FAULT",
        "GUEST_FAULT",
    ]
    assert not lowered.accesses
    # A log that tells no level knows none, which is not the same as no leaf.
    assert case(ram + guest(0x1000)).fault_levels is None


# --------------------------------------------------------------------------- devices


def iommu(name: str, iova: int, size: int) -> str:
    rest = f"paddr=0x77000 size={size}" if name == "map" else f"size={size} unmapped_size={size}"
    return f"{VMM}{name}: IOMMU: iova={iova:#018x} - {iova + size:#018x} {rest}\n"


IOMMU = (
    slot(0, 0, 16 * M, HVA) + slot(1, G, 16 * M, HVA + G) + guest(0)
    + iommu("map", 2 * M, 2 * M) + iommu("map", G - M, 2 * M) + iommu("map", 1 << 40, M) + iommu("map", 5 * M, 100)
    + iommu("unmap", 2 * M, 2 * M)
)  # fmt: skip


def test_iommu_lines_name_no_device_and_are_not_used_unasked(case: Case) -> None:
    found = case(IOMMU)
    assert [name for name, *_ in operations(found)] == ["BIND", "BIND", "GUEST_FAULT"]
    assert found.accounting.without_operation == {"iommu:map and unmap of an unknown device": 5}
    note = (
        "left out: 5 iommu:map and unmap of an unknown device; --iova guest takes them for the VM's, at its addresses"
    )
    assert note in found.notes


def test_iommu_lines_of_the_vm_map_what_the_guest_has_at_the_address(case: Case) -> None:
    """What lies outside the slots is cut off or left out, and so are parts of pages."""
    found = case(IOMMU, LoweringOptions(iova="guest"))
    rights = int(Flag.READ | Flag.WRITE)
    assert operations(found)[3:] == [
        ("DMA_MAP", rights, 2 * M, HVA + 2 * M, 2 * M),
        ("DMA_MAP", rights, G, HVA + G, M),
        ("DMA_UNMAP", 0, 2 * M, 0, 2 * M),
    ]
    assert found.accounting.without_operation == {
        "not guest memory (IOVA outside the memory slots)": 1,
        "iommu:map and unmap of parts of pages": 1,
    }


def test_iommu_lines_of_other_processes_are_not_the_vm_s(case: Case) -> None:
    text = slot(0, 0, 16 * M, HVA) + guest(0) + iommu("map", 2 * M, M)
    vm = text.replace("vmm-10 [", "vmm-10 (10) [").replace("KVM-11 [", "KVM-11 (10) [")
    other = iommu("map", 4 * M, M).replace("vmm-10 [", "kworker-99 (99) [")
    found = case(vm + other, LoweringOptions(iova="guest"))
    assert [row[2] for row in operations(found) if row[0] == "DMA_MAP"] == [2 * M]
    assert found.accounting.without_operation == {"of another process": 1}
