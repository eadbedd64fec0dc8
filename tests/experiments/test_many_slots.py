"""Logs of a VM with as many memory slots as KVM has: read, replayed, and compared."""

from __future__ import annotations

import time
from pathlib import Path

from pgemu.experiments.compare import Comparison, compare
from pgemu.trace import LoweringOptions, Operation, load

VMM, VCPU = "vmm-10 [000] ..... 1.000000: ", "CPU 0/KVM-11 [000] ..... 1.000000: "
SIZE = 0x10000  # of a slot, whose host memory follows that of the slot before
HOST = 0x7F00_0000_0000


def slots_log(path: Path, count: int) -> Path:
    """A slot a time; after each the guest and the host touch one of those that stand, it is converted, and the new
    slot's first page is given back. In the end half of the slots go."""
    with path.open("w") as file:
        for number in range(count):
            gpa, hva = number * 2 * SIZE, HOST + number * SIZE
            other = number * 7919 % (number + 1)
            file.write(
                f"{VMM}kvm_memslot: slot={number} flags=0x0 gpa={gpa:#x} size={SIZE:#x} hva={hva:#x}\n"
                f"{VMM}kvm_vm_set_mem_attributes: {other << 5:#x} -- {(other << 5) + 2:#x} [0x0]\n"
                f"{VCPU}kvm_page_fault: vcpu 0 rip 0x0 address {other * 2 * SIZE:#x} error_code 0x6\n"
                f"{VMM}page_fault_user: address={HOST + other * SIZE:#x} ip=0x1 error_code=6\n"
                f"{VMM}kvm_vm_set_mem_attributes: {other << 5:#x} -- {(other << 5) + 2:#x} [0x8]\n"
                f"{VMM}kvm_unmap_hva_range: mmu notifier unmap range: {hva:#x} -- {hva + 4096:#x}\n"
            )
        for number in range(0, count, 2):
            file.write(f"{VMM}kvm_memslot: slot={number} flags=0x0 gpa=0x0 size=0x0 hva=0x0\n")
    return path


def compared(path: Path) -> Comparison:
    return compare(load(path, LoweringOptions(page_size=2 << 20)))


def seconds(path: Path) -> float:
    """Processor time to read and compare a log, the best of two."""
    found = []
    for _ in range(2):
        began = time.process_time()
        compared(path)
        found.append(time.process_time() - began)
    return min(found)


def test_as_many_slots_as_kvm_has_are_replayed(tmp_path: Path) -> None:
    count = 32764  # KVM_USER_MEM_SLOTS
    comparison = compared(slots_log(tmp_path / "log", count))
    assert comparison.lowered.notes == ()
    for run in comparison.runs:
        outcomes = {operation.operation: operation.outcomes for operation in run.operations}
        assert outcomes[Operation.BIND] == {"ok": count}
        assert outcomes[Operation.UNBIND] == {"ok": count // 2}
        assert outcomes[Operation.CONVERT] == {"ok": 2 * count}
        assert outcomes[Operation.MMAP] == {"ok": 1}
        assert sum(outcomes[Operation.GUEST_FAULT].values()) == count
        assert not any(name.startswith("-") for name in outcomes[Operation.GUEST_FAULT])


def test_work_grows_with_the_number_of_slots(tmp_path: Path) -> None:
    """Eight times as many: at most 2.5 times the work for each doubling."""
    few, many = (slots_log(tmp_path / str(count), count) for count in (1000, 8000))
    compared(few)  # what is loaded once
    assert seconds(many) < 2.5**3 * seconds(few)
