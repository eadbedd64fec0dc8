"""Memory slots over time: what stands at each row, as a plain model has it, and work that grows with the lines."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import LoweringOptions, Operation, load
from pgemu.trace.memory_layout import RefusedSlot, Slot
from pgemu.trace.slot_history import SlotHistory, SlotLine

pytestmark = pytest.mark.same_with_checks

M = 1 << 20
VMM, VCPU = "vmm-10 [000] ..... 1.000000: ", "CPU 0/KVM-11 [000] ..... 1.000000: "
LINES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 65536]),
        st.sampled_from([0, 0, 0, 1, 2]),
        st.integers(0, 4).map(lambda page: page * 4096),
        st.sampled_from([0, 4096, 8192, 8192, 100]),
        st.integers(0, 6).map(lambda page: page * 4096),
    ),
    max_size=40,
)


@given(LINES)
def test_what_stands_is_what_the_lines_left(words: list[tuple[int, int, int, int, int]]) -> None:
    """Of each slot number the last line counts; host memory that another bound slot has is refused."""
    history = SlotHistory.build(SlotLine(10 * row, *line) for row, line in enumerate(words))
    live: dict[int, tuple[int, int, int | None]] = {}  # GPA, size and HVA; None: refused
    for row, (number, flags, gpa, size, hva) in enumerate(words):
        old = live.pop(number, None)
        if size and old and old[:2] == (gpa, size):
            live[number] = old
        elif size:
            taken = [(at, length) for _, length, at in live.values() if at is not None]
            aliased = any(at < hva + size and hva < at + length for at, length in taken)
            refused = number > 65535 or flags == 2 or size % 4096 or aliased
            live[number] = gpa, size, None if refused else hva
        for at in (10 * row, 10 * row + 9):
            standing = [one.slot for one in history.stands if one.first <= at < one.end]
            expected = [
                (number, gpa, size, hva)
                for number, (gpa, size, hva) in live.items()
            ]  # fmt: skip
            assert [
                (one.slot, one.gpa, one.size, one.hva if isinstance(one, Slot) else None) for one in standing
            ] == expected
    last = [slot for slot, _ in history.refused(last=True)]
    assert all(isinstance(slot, RefusedSlot) for slot in last)
    assert len(last) + len(history.bound(last=True)) == len(live)


def slots_log(path: Path, count: int) -> Path:
    """As many slots, each touched, faulted by the host, converted and given back."""
    with path.open("w") as file:
        for number in range(count):
            gpa, hva = number << 17, 0x7F00_0000_0000 + number * 3 * 65536
            other = number * 7919 % count
            file.write(
                f"{VMM}kvm_memslot: slot={number} flags=0x0 gpa={gpa:#x} size=0x10000 hva={hva:#x}\n"
                f"{VCPU}kvm_page_fault: vcpu 0 rip 0x0 address {other << 17:#x} error_code 0x100000006\n"
                f"{VMM}page_fault_user: address={0x7F00_0000_0000 + other * 3 * 65536:#x} ip=0x1 error_code=6\n"
                f"{VMM}kvm_vm_set_mem_attributes: {other << 5:#x} -- {(other << 5) + 2:#x} [0x8]\n"
                f"{VMM}kvm_unmap_hva_range: mmu notifier unmap range: {hva:#x} -- {hva + 4096:#x}\n"
            )
    return path


def steps(path: Path) -> int:
    """How many calls reading a log takes, in Python and out of it."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        load(path, LoweringOptions(page_size=2 * M))
    finally:
        sys.setprofile(None)
    return count


def seconds(path: Path) -> float:
    """Processor time that reading a log takes, the best of some."""
    found = []
    for _ in range(3):
        began = time.process_time()
        load(path, LoweringOptions(page_size=2 * M))
        found.append(time.process_time() - began)
    return min(found)


def test_steps_grow_with_the_number_of_slots(tmp_path: Path) -> None:
    few, twice = (slots_log(tmp_path / str(count), count) for count in (1000, 2000))
    load(few)  # what is imported once
    assert steps(twice) < 2.2 * steps(few)


def test_time_grows_with_the_number_of_slots(tmp_path: Path) -> None:
    """Eight times as many: 64 times the time would be of each slot with each other."""
    few, many = (slots_log(tmp_path / str(count), count) for count in (500, 4000))
    load(few)
    assert seconds(many) < 2.5 * 8 * seconds(few)


def test_as_many_slots_as_kvm_takes(tmp_path: Path) -> None:
    count = 32764  # KVM_USER_MEM_SLOTS
    found = load(slots_log(tmp_path / "log", count), LoweringOptions(page_size=2 * M))
    assert len(found.layout.slots) == len(found.layout.regions) == count
    for operation in (Operation.BIND, Operation.MMAP, Operation.ZAP):
        assert (found.records.op == operation).sum() == count
    # A fault, host fault or conversion of a slot that comes later finds none; the n-th line asks for n * 7919 modulo n.
    there = sum(number * 7919 % count <= number for number in range(count))
    assert (found.records.op == Operation.GUEST_FAULT).sum() == there
    assert (found.records.op == Operation.CONVERT).sum() == there
    assert found.accounting.balanced()
    mappings = f"up to {count} mappings at once: a machine has room for 1024, the others are -ENOMEM"
    assert found.notes == (mappings,)


@pytest.mark.parametrize(("count", "told"), [(1024, 0), (1025, 1)])
def test_mappings_that_no_machine_has_room_for_are_told(tmp_path: Path, count: int, told: int) -> None:
    found = load(slots_log(tmp_path / "log", count), LoweringOptions(page_size=2 * M))
    assert len(found.notes) == told


def test_slots_that_kvm_has_no_number_for_are_told(tmp_path: Path) -> None:
    found = load(slots_log(tmp_path / "log", 32765), LoweringOptions(page_size=2 * M))
    assert found.notes[0] == "32765 memory slots at once: KVM has 32764 for a VM, the others are -EINVAL"


@pytest.mark.parametrize(("gpa", "size", "hva"), [(2**64 - 4096, 8192, 0), (0, 8192, 2**64 - 4096), (1, 2**64 - 1, 2)])
def test_a_slot_beyond_64_bits_is_refused(tmp_path: Path, gpa: int, size: int, hva: int) -> None:
    path = tmp_path / "log"
    line = f"{VMM}kvm_memslot: slot=0 flags=0x0 gpa={gpa:#x} size={size:#x} hva={hva:#x}\n"
    path.write_text(f"{VCPU}kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x6\n{line}")
    with pytest.raises(InputError, match=r"log:2: memory slot that ends beyond 64 bits: 'kvm_memslot: slot=0"):
        load(path)


@pytest.mark.parametrize(
    ("gpa", "size", "hva"), [(4096, 2**64 - 4096, 0), (0, 1 << 62, 0), (0, 2**64 - 4096, 4096), (1 << 63, 1 << 63, 0)]
)
def test_slots_of_more_than_there_is_are_refused(tmp_path: Path, gpa: int, size: int, hva: int) -> None:
    path = tmp_path / "log"
    path.write_text(f"{VMM}kvm_memslot: slot=0 flags=0x0 gpa={gpa:#x} size={size:#x} hva={hva:#x}\n")
    with pytest.raises(InputError, match=r"memory slots that need \d+ bytes of guest memory, expected at most"):
        load(path)


@given(st.sampled_from([0, 4096, M, 1 << 40, 2**64 - M]), st.sampled_from([0, 2**64 - 2 * M]), st.integers(0, 2))
def test_slots_at_the_end_of_64_bits_are_laid_out(gpa: int, hva: int, shift: int) -> None:
    size = M >> shift
    lines = [
        f"{VMM}kvm_memslot: slot=0 flags=0x0 gpa={gpa:#x} size={size:#x} hva={hva:#x}",
        f"{VMM}kvm_vm_set_mem_attributes: {gpa >> 12:#x} -- {(gpa + size) >> 12:#x} [0x8]",
        f"{VMM}kvm_unmap_hva_range: mmu notifier unmap range: {hva:#x} -- {min(hva + size, 2**64 - 1):#x}",
        f"{VMM}page_fault_user: address={hva + size - 1:#x} ip=0x1 error_code=6",
        f"{VCPU}kvm_page_fault: vcpu 0 rip 0x0 address {gpa:#x} error_code 0x100000006",
    ]
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("\n".join([*lines, ""]))
        file.flush()
        found = load(file.name, LoweringOptions(page_size=2 * M))
    assert found.accounting.balanced()
    assert found.layout.slots[0].size == size
    zap = found.records.length[found.records.op == Operation.ZAP]
    assert zap.tolist() == [min(hva + size, 2**64 - 1) - hva]
