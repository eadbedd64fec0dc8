"""Every real log: nothing unknown, every event accounted for, and the counts that are known of it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pgemu.trace import Lowered, LoweringOptions, Operation, load, shipped
from pgemu.trace.events import Input
from pgemu.trace.log import Log
from pgemu.trace.lowering import lower
from pgemu.trace.readers.ftrace import read

pytestmark = pytest.mark.same_with_checks

FOLDER = Path(os.environ.get("PGEMU_TRACES", Path(__file__).parents[1] / "data" / "traces"))
FILES = sorted(path.name for pattern in ("ftrace-*.txt.xz", "vm-*.txt.xz") for path in FOLDER.glob(pattern))
PAGE_2M, PAGE_1G = 1 << 21, 1 << 30

VM_FILES = [
    "vm-boot-q35-4k.ftrace.txt.xz",
    "vm-boot-q35-thp.ftrace.txt.xz",
    "vm-boot-microvm-hugetlb.ftrace.txt.xz",
    "vm-boot-q35-migrate.ftrace.txt.xz",
    "vm-convert-swprot.ftrace.txt.xz",
]
# The table of README.md beside the logs, one column per file of VM_FILES.
TABLE = {
    "lines": (395018, 282785, 147081, 109256, 69443),
    "kvm_page_fault": (69367, 50495, 7561, 2172, 16825),
    "bit 3": (2560, 1900, 6798, 1213, 0),
    "frames of RAM": (54378, 40841, 743, 932, 11458),
    "kvm_tdp_mmu_spte_changed": (148710, 122502, 1537, 95902, 33734),
    "kvm_mmu_set_spte": (0, 48579, 758, 624, 16825),
    "fast_page_fault": (14, 0, 0, 320, 0),
    "kvm_mmu_split_huge_page": (0, 0, 0, 79, 0),
    "kvm_unmap_hva_range": (33757, 11630, 450, 1281, 246),
    "kvm_memslot": (64, 64, 10, 76, 1),
    "kvm_mmu_zap_all_fast": (26, 26, 1, 26, 0),
    "mark_mmio_spte": (16, 16, 5, 15, 0),
    "kvm_hypercall": (0, 0, 0, 0, 443),
    "kvm_vm_set_mem_attributes": (0, 0, 0, 0, 445),
    "page_fault_user": (9762, 5675, 4000, 6199, 27),
    "sys_madvise": (33436, 11222, 121, 864, 237),
    "sys_madvise WILLNEED": (32768, 10240, 65536, 0, 0),
    "sys_fallocate": (0, 0, 282, 0, 206),
    "sys_mmap": (255, 255, 242, 256, 2),
    "sys_munmap": (15, 15, 12, 15, 1),
    "sys_mprotect": (317, 299, 57, 259, 1),
}


@functools.cache
def log(name: str) -> Log:
    return read(FOLDER / name)


@functools.cache
def lowered(name: str, page_size: int) -> Lowered:
    # The captures of KVM's events are of many VMs, one after the other, and no line names a process.
    several = name.startswith("ftrace-kvm")
    return lower(log(name), LoweringOptions(page_size=page_size, vm_processes=("all",) if several else ()))


def counts(name: str) -> Counter[str]:
    seen = log(name)
    events = seen.inputs + seen.outcomes + seen.ignored
    faults = seen.rows[seen.rows[:, 0] == Input.GUEST_FAULT]
    device = (faults[:, 5] & np.uint64(8)) != 0
    events["lines"] = seen.events
    events["bit 3"] = int(device.sum())
    events["frames of RAM"] = len(np.unique(faults[~device, 4] >> np.uint64(12)))
    return events


@pytest.mark.parametrize("name", VM_FILES)
def test_counts_are_those_of_the_table(name: str) -> None:
    column = VM_FILES.index(name)
    seen = counts(name)
    assert {row: seen[row] for row in TABLE} == {row: values[column] for row, values in TABLE.items()}


@pytest.mark.parametrize("page_size", [PAGE_2M, PAGE_1G])
@pytest.mark.parametrize("name", FILES)
def test_every_event_is_accounted_for(name: str, page_size: int) -> None:
    result = lowered(name, page_size)
    accounting = result.accounting
    assert accounting.unknown == {}
    assert accounting.lost == 0
    assert accounting.balanced()
    assert accounting.operations == len(result.records)
    result.records.check(name)


@pytest.mark.parametrize("page_size", [PAGE_2M, PAGE_1G])
@pytest.mark.parametrize("name", FILES)
def test_records_stay_inside_the_layout(name: str, page_size: int) -> None:
    result = lowered(name, page_size)
    records, layout = result.records, result.layout
    assert layout.inode_size % page_size == 0
    files = np.isin(records.op, [Operation.CONVERT, Operation.PUNCH_HOLE, Operation.BIND, Operation.MMAP])
    assert int((records.offset + records.length)[files].max(initial=0)) <= layout.inode_size
    assert (records.length[files] > 0).all()
    host = records.address[np.isin(records.op, [Operation.HOST_FAULT, Operation.ZAP, Operation.MUNMAP])]
    inside = np.zeros(len(host), dtype=bool)
    for region in layout.regions:
        inside |= (host >= np.uint64(region.address)) & (host < np.uint64(region.end))
    assert inside.all()
    for slot in layout.slots:
        if slot.size >= PAGE_2M:
            assert (slot.offset - slot.gpa) % page_size == 0


def test_slots_at_the_end_are_those_of_the_table() -> None:
    slots = lowered("vm-boot-q35-4k.ftrace.txt.xz", PAGE_1G).layout.slots
    assert [(slot.gpa, slot.size, slot.hva) for slot in slots] == [
        (0x0, 0xC3000, 0x7F9C17E00000),
        (0xC3000, 0x25000, 0x7F9C17EC3000),
        (0xE8000, 0x8000, 0x7F9C17EE8000),
        (0xF0000, 0x10000, 0x7F9C17EF0000),
        (0x100000, 0x13F00000, 0x7F9C17F00000),
    ]


def test_a_slot_that_shares_its_host_memory_is_refused() -> None:
    layout = lowered("vm-boot-microvm-hugetlb.ftrace.txt.xz", PAGE_2M).layout
    assert [(slot.gpa, slot.size) for slot in layout.slots] == [
        (0, 0xE0000),
        (0xE0000, 0x20000),
        (0x100000, 0x3FF00000),
    ]
    assert layout.refused[0].reason == "memory slot whose host memory another slot has"
    assert layout.refused[0].gpa == 0xFFFE0000


def test_holes_of_the_hugetlbfs_file_land_where_their_unmaps_were() -> None:
    result = lowered("vm-boot-microvm-hugetlb.ftrace.txt.xz", PAGE_2M)
    seen = log("vm-boot-microvm-hugetlb.ftrace.txt.xz").rows
    calls = seen[seen[:, 0] == Input.FALLOCATE]
    punched = result.records.offset[result.records.op == Operation.PUNCH_HOLE]
    ram = result.layout.regions[0]
    assert punched.tolist() == [int(hva) - ram.address + ram.offset for hva in calls[:, 8]]


def test_the_converting_log_is_private_and_every_request_is_an_operation() -> None:
    result = lowered("vm-convert-swprot.ftrace.txt.xz", PAGE_1G)
    operations = Counter(Operation(op).name for op in result.records.op.tolist())
    assert operations == {
        "MMAP": 1,
        "BIND": 1,
        "GUEST_FAULT": 16825,
        "CONVERT": 445,
        "PUNCH_HOLE": 206 + 237,
        "HOST_FAULT": 1,
    }
    assert (result.init, result.converts) == ("private", True)


def test_the_others_convert_nothing() -> None:
    others = [name for name in FILES if "convert" not in name]
    assert {(lowered(name, PAGE_1G).init, lowered(name, PAGE_1G).converts) for name in others} == {("shared", False)}


def test_the_shipped_log_is_the_converting_one() -> None:
    assert shipped().read_bytes() == (FOLDER / "vm-convert-swprot.ftrace.txt.xz").read_bytes()
    assert len(load(shipped()).records) == 17716


def test_loading_a_log_needs_neither_compiler_nor_parquet() -> None:
    program = (
        "import sys; from pgemu import trace; trace.load(trace.shipped());"
        "print(sorted({'numba', 'pyarrow', 'llvmlite'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
