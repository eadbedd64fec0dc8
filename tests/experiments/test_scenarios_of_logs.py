"""Two histories that are told as lines of logs: HugeTLB pages of a file, and shared memory beside private pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pgemu import Machine
from pgemu.errors import InputError
from pgemu.experiments.compare import compare
from pgemu.experiments.configuration import configuration
from pgemu.experiments.process_machine import machine_of_processes
from pgemu.machine.designs import DESIGNS, Design
from pgemu.machine.presets import Versions
from pgemu.objects.vm import Vm
from pgemu.trace import Lowered, LoweringOptions, Operation, load
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

BASE = 0x7F8B_FDE0_0000
FILE = 16 * PAGE_2M

# Sixteen pages of 2M are touched, the third one is punched out, the file is closed: 61440 blocks of 512 bytes are
# left, which are 15 pages. As Linux 6.18 prints it.
HUGETLB = "".join(
    f"              ht-3460    [001] d....  1660.5{8485 + at:05}: page_fault_user: address={BASE + at * PAGE_2M:#x} "
    "ip=0x5652ff6cd128 error_code=0x6\n"
    for at in range(16)
) + (
    "              ht-3460    [001] .....  1660.511689: hugetlbfs_fallocate: dev 0,17 ino 98636 mode 03 offset 4194304 "
    "len 2097152 size 33554432 ret 0\n"
    "              ht-3460    [001] .....  1660.511873: hugetlbfs_evict_inode: dev 0,17 ino 98636 mode 0100777 "
    "size 33554432 nlink 0 seals 1 blocks 61440\n"
)


def test_a_hugetlb_file_ends_with_the_pages_that_the_log_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(HUGETLB)
    found = load(path)
    names = [Operation(op).name for op in found.records.op.tolist()]
    assert names == ["MMAP"] + ["HOST_FAULT"] * 16 + ["PUNCH_HOLE", "MUNMAP", "CLOSE"]
    assert (found.kind, found.files, found.accounting.balanced()) == ("process", (("hugetlb-2M", FILE),), True)
    machine = machine_of_processes(found)
    pool = machine.hugetlb(PAGE_2M)
    results = machine.run(found.records[:17])
    assert results.status.tolist() == [0] + [256] * 16
    assert pool.nr_hugepages - pool.free_hugepages == 16
    assert machine.run(found.records[17:18]).status.tolist() == [0]
    assert pool.nr_hugepages - pool.free_hugepages == 61440 * 512 // PAGE_2M == 15
    assert machine.check() == 0
    assert machine.run(found.records[18:]).status.tolist() == [0, 0]
    assert (pool.nr_hugepages - pool.free_hugepages, machine.check()) == (0, 0)


def test_a_file_that_goes_with_its_process_is_closed_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lines = HUGETLB.splitlines(keepends=True)
    exit_ = lines[-2].partition("1660.")[0] + "1660.511800: sched_process_exit: comm=ht pid=3460 prio=120\n"
    path.write_text("".join((*lines[:-1], exit_, lines[-1])))
    found = load(path)
    assert [Operation(op).name for op in found.records.op[-3:].tolist()] == ["PUNCH_HOLE", "EXIT", "CLOSE"]
    machine = machine_of_processes(found)
    assert machine.run(found.records).status[-3:].tolist() == [0, 0, 0]
    pool = machine.hugetlb(PAGE_2M)
    assert (pool.nr_hugepages - pool.free_hugepages, machine.check()) == (0, 0)


def test_a_guest_s_trace_has_no_machine_of_processes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a guest's memory, expected a process's"):
        machine_of_processes(history(tmp_path))


# A guest uses frames 0x800 to 0x9ff as private memory, makes 0x84d to 0x86d shared, goes on using the others, and
# faults at 0x84d: V. Annapurve's log of June 2022, in which KVM maps 2M over the private entries of 4K.
FIRST, END, SHARED = 0x800, 0xA00, range(0x84D, 0x86E)
PRIVATE = [gfn for gfn in range(FIRST, END) if gfn not in SHARED]


def conversion() -> str:
    """Lines of that history."""
    slot = "slot=0 flags=0x4 gpa=0x0 size=0x40000000 hva=0x7f0000000000"
    touched = [f"kvm_page_fault: vcpu 0 rip 0x0 address {gfn << 12:#018x} error_code 0x500000006" for gfn in PRIVATE]
    lines = [
        f"kvm_memslot: (kvm_set_memory_region+0x0/0x560) {slot}",
        f"kvm_vm_set_mem_attributes: {FIRST:#016x} -- {END:#016x} [0x8]",
        *touched,
        f"kvm_vm_set_mem_attributes: {SHARED[0]:#016x} -- {SHARED[-1] + 1:#016x} [0x0]",
        *touched,
        "kvm_page_fault: address 84d000 error_code 4",
    ]
    front = "VCPU-0-61883   [078] ..... 72276."
    return "".join(f"{front}{at:06}: {line}\n" for at, line in enumerate(lines))


def history(tmp_path: Path) -> Lowered:
    """The lines as a trace."""
    path = tmp_path / "a"
    path.write_text(conversion())
    found = load(path, LoweringOptions(page_size=PAGE_2M))
    assert (found.kind, found.init, found.converts) == ("guest", "private", True)
    return found


def replayed(found: Lowered, design: Design, *defects: str) -> Machine:
    """A machine of one VM after all of it."""
    machine = Machine(configuration(found, design, Versions(), {"defects": defects, "zero": "page"}))
    machine.create_vm(machine.create_process())
    machine.create_guest_memfd(found.layout.inode_size, shared=False)
    machine.run(found.records)
    return machine


def leaf(machine: Machine, gfn: int) -> tuple[int, int]:
    """Level and present bit of the entry at which a walk ends."""
    level, _, entry = Vm(machine, 0).walk(gfn * PAGE_4K)[-1]
    return level, entry & 1


@pytest.mark.parametrize("design", DESIGNS)
def test_a_shared_fault_beside_private_pages_keeps_them(design: Design, tmp_path: Path) -> None:
    """No leaf of 2M covers the range, and every private frame outside what became shared still translates."""
    machine = replayed(history(tmp_path), design)
    assert {leaf(machine, gfn) for gfn in (*PRIVATE, SHARED[0])} == {(1, 1)}
    gpas = np.array(PRIVATE, np.uint64) * np.uint64(PAGE_4K)
    physical = Vm(machine, 0).translate(gpas).physical
    assert (physical - gpas == physical[0] - gpas[0]).all()  # of one 2M page
    assert physical[0] != 0
    assert machine.check() == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_the_defect_of_2022_maps_over_private_pages(design: Design, tmp_path: Path) -> None:
    machine = replayed(history(tmp_path), design, "huge-over-private")
    assert {leaf(machine, gfn) for gfn in (*PRIVATE, SHARED[0])} == {(2, 1)}
    assert machine.check() > 0
    assert machine.broken[1] in (Broken.MIXED_LEAF, Broken.LEAF_OVER_FOLIO)


def test_compare_names_it_on_both_designs(tmp_path: Path) -> None:
    """What explains a broken rule is the defect, and without it none is broken that has to do with leaves."""
    leaves = {Broken.MIXED_LEAF, Broken.LEAF_OVER_FOLIO}
    for defects in ((), ("huge-over-private",)):
        comparison = compare(history(tmp_path), defects=defects)
        broken = [{rule.rule for rule in run.finding.rules} if run.finding else set() for run in comparison.runs]
        assert [bool(rules & leaves) for rules in broken] == [bool(defects)] * 2
