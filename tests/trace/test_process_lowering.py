"""Logs without a VM: records of ordinary memory, and what they do on a machine."""

from __future__ import annotations

import lzma
from collections import Counter
from pathlib import Path

import pytest

from fuzzing import attacked, mutated, rounds
from pgemu.errors import InputError
from pgemu.trace import Flag, Lowered, LoweringOptions, Operation, load, require_input
from pgemu.trace.readers import ftrace
from pgemu_kernels.words.operations import PAGE_4K
from processes_run import outcomes, read_or_refused, run

TRACES = Path(__file__).parents[1] / "data" / "traces"
RW = Flag.READ | Flag.WRITE
HVA = 0x7F00_0000_0000


def line(event: str, task: int = 9, time: int = 0) -> str:
    """A line of ftrace."""
    return f"            app-{task}      [000] d....    42.{time:06}: {event}\n"


def fault(address: int, code: int = 6, task: int = 9) -> str:
    """A fault from user mode, a write of a missing page."""
    return line(f"page_fault_user: address={address:#x} ip=0x401000 error_code={code:#x}", task)


def call(name: str, fields: str, result: int = 0, task: int = 9) -> str:
    """A system call and its return."""
    return line(f"sys_{name}({fields})", task) + line(f"sys_{name} -> {result:#x}", task)


def mmap(address: int, pages: int, prot: int = 3, flags: int = 0x22, task: int = 9) -> str:
    """An mmap that returned an address."""
    fields = f"addr: 0, len: {pages * PAGE_4K:#x}, prot: {prot}, flags: {flags:x}, fd: 3, off: 0"
    return call("mmap", fields, address, task)


def lowered(path: Path, text: str, **options: object) -> Lowered:
    """A log of processes."""
    path.write_text(text)
    found = load(path, LoweringOptions(**options))  # type: ignore[arg-type]
    assert found.accounting.balanced()
    found.records.check("made")
    return found


def rows(found: Lowered) -> list[tuple[str, int, int, int, int]]:
    """Operation, flags, space, address and pages of each record."""
    records = found.records
    columns = (records.op, records.flags, records.space, records.address, records.length // PAGE_4K)
    return [(Operation(op).name, *rest) for op, *rest in zip(*(column.tolist() for column in columns), strict=True)]


@pytest.mark.same_with_checks
def test_what_is_touched_and_not_mapped_stands_before(tmp_path: Path) -> None:
    """Faults near each other are of one area, those over which the log maps something are not."""
    text = fault(0x400000, 0x14) + fault(0x402008) + fault(0x7000000, 4) + mmap(0x401000, 1) + fault(0x401010)
    found = lowered(tmp_path / "a", text)
    private = Flag.PRIVATE | Flag.READ
    assert rows(found) == [
        ("MMAP", private | Flag.EXEC, 0, 0x400000, 1),
        ("MMAP", private | Flag.WRITE, 0, 0x402000, 1),
        ("MMAP", private, 0, 0x7000000, 1),
        ("HOST_FAULT", Flag.EXEC, 0, 0x400000, 0),
        ("HOST_FAULT", Flag.WRITE, 0, 0x402008, 0),
        ("HOST_FAULT", 0, 0, 0x7000000, 0),
        ("MMAP", private | Flag.WRITE, 0, 0x401000, 1),
        ("HOST_FAULT", Flag.WRITE, 0, 0x401010, 0),
    ]
    assert (found.accounting.setup, found.kind) == (3, "process")
    near = lowered(tmp_path / "a", fault(0x400000, 4) + fault(0x403000))
    assert rows(near)[0] == ("MMAP", private | Flag.WRITE, 0, 0x400000, 4)
    assert near.notes[0].startswith("areas inferred from what is touched and no line maps, 16 KiB: 1; gaps up to 2 MiB")
    apart = lowered(tmp_path / "a", fault(0x400000, 4) + fault(0x403000), area_gap=0x1000)
    assert [row[3] for row in rows(apart)[:2]] == [0x400000, 0x403000]


def test_calls_are_operations_at_the_log_s_addresses(tmp_path: Path) -> None:
    text = (
        mmap(HVA, 16)
        + call("mprotect", f"start: {HVA:#x}, len: 0x1000, prot: 1")
        + call("madvise", f"start: {HVA:#x}, len_in: 0x2000, behavior: 4")
        + call("madvise", f"start: {HVA:#x}, len_in: 0x2000, behavior: e")
        + call("madvise", f"start: {HVA:#x}, len_in: 0x2000, behavior: 3")
        + call("mremap", f"addr: {HVA + 0x2000:#x}, old_len: 0x1000, new_len: 0x3000, flags: 1", HVA + 0x100000)
        + call("mlock", f"start: {HVA + 0x5010:#x}, len: 0x1000")
        + call("brk", "brk: 0", 0x500000)
        + call("brk", "brk: 0x502010", 0x502010)
        + call("brk", "brk: 0x501000", 0x501000)
        + call("munmap", f"addr: {HVA:#x}, len: 0xfff")
        + call("munmap", f"addr: {HVA:#x}, len: 0x1000", -22 % (1 << 64))
        + mmap(-12 % (1 << 64), 1)
    )  # fmt: skip
    found = lowered(tmp_path / "a", text)
    assert rows(found) == [
        ("MMAP", Flag.PRIVATE | RW, 0, HVA, 16),
        ("PROTECT", Flag.READ, 0, HVA, 1),
        ("ZAP", Flag.MADVISE, 0, HVA, 2),
        ("ADVISE_HUGE", Flag.WRITE, 0, HVA, 2),
        ("REMAP", 0, 0, HVA + 0x2000, 1),
        ("LOCK", Flag.LOCKED | Flag.POPULATE, 0, HVA + 0x5000, 2),
        ("MMAP", Flag.PRIVATE | RW, 0, 0x500000, 3),
        ("MUNMAP", 0, 0, 0x501000, 2),
        ("MUNMAP", 0, 0, HVA, 1),
    ]
    assert found.accounting.without_operation == {
        "madvise: madvise WILLNEED, which is not modelled or changes no entry": 1,
        "break: brk that only tells where the break is": 1,
        "munmap: the call failed": 1,
        "mmap: the call failed": 1,
    }
    _, results = run(found)
    assert set(results.status.tolist()) == {0}


@pytest.mark.same_with_checks
def test_a_mapping_over_another_unmaps_it_first(tmp_path: Path) -> None:
    found = lowered(tmp_path / "a", mmap(HVA, 4) + mmap(HVA + 0x1000, 1, prot=1, flags=0x32))
    assert rows(found)[1:] == [
        ("MUNMAP", 0, 0, HVA + 0x1000, 1),
        ("MMAP", Flag.PRIVATE | Flag.READ, 0, HVA + 0x1000, 1),
    ]
    assert found.accounting.extra_pieces == 1


def test_children_are_copies_and_programs_begin_anew(tmp_path: Path) -> None:
    """A child touches what its parent had: that stands before in the parent. Rows of ended processes are used again."""
    fork = "sched_process_fork: comm=app pid=9 child_comm=app child_pid={}"
    text = (
        fault(0x400000)
        + line(fork.format(10)) + fault(0x403000, 7, 10)
        + line("sched_process_exec: filename=/bin/x pid=10 old_pid=10", 10) + fault(0x600000, 6, 10)
        + line("sched_process_exit: comm=x pid=10 prio=120", 10)
        + line(fork.format(11)) + fault(0x400000, 7, 11)
    )  # fmt: skip
    found = lowered(tmp_path / "a", text)
    assert found.processes == 1
    assert rows(found) == [
        ("MMAP", Flag.PRIVATE | RW, 0, 0x400000, 4),
        ("HOST_FAULT", Flag.WRITE, 0, 0x400000, 0),
        ("FORK", 0, 0, 0, 0),
        ("HOST_FAULT", Flag.WRITE, 1, 0x403000, 0),
        ("MUNMAP", 0, 1, 0, (1 << 35) - 1),
        ("MMAP", Flag.PRIVATE | RW, 1, 0x600000, 1),
        ("HOST_FAULT", Flag.WRITE, 1, 0x600000, 0),
        ("EXIT", 0, 1, 0, 0),
        ("FORK", 0, 0, 0, 0),
        ("HOST_FAULT", Flag.WRITE, 1, 0x400000, 0),
    ]
    _, results = run(found)
    assert results.status.tolist() == [0, 256, 0, 256, 0, 0, 256, 0, 0, 256]


@pytest.mark.same_with_checks
def test_threads_of_a_process_that_the_log_names_share_its_memory(tmp_path: Path) -> None:
    text = "".join(
        f"            app-{tid} (  9) [000] d....    42.{tid:06}: "
        f"page_fault_user: address={0x400000 + tid * 4096:#x} ip=0x1 error_code=0x6\n"
        for tid in (9, 10, 11)
    )
    found = lowered(tmp_path / "a", text)
    assert (found.processes, set(found.records.space.tolist())) == (1, {0})


@pytest.mark.same_with_checks
def test_more_than_a_machine_has_room_for_is_left_out_and_counted(tmp_path: Path) -> None:
    found = lowered(tmp_path / "a", "".join(fault(0x400000, 6, 100 + task) for task in range(70)))
    assert (found.processes, found.accounting.without_operation) == (64, {"host fault: no room in the machine": 6})
    assert "events left out: 6; a machine has room for 64 processes at once and 1024 areas" in found.notes[-1]
    found = lowered(tmp_path / "a", "".join(mmap(HVA + at * 0x2000, 1) for at in range(1030)))
    assert found.accounting.without_operation == {"mmap: no room in the machine": 6}


def test_shared_and_huge_mappings_are_files(tmp_path: Path) -> None:
    """MAP_SHARED of shmem, MAP_HUGETLB of 2M pages; where a file has no room the mapping is left out."""
    huge = mmap(HVA, 512, flags=0x40022) + fault(HVA + 0x1000)
    found = lowered(tmp_path / "a", mmap(HVA - 0x10000, 2, flags=0x21) + fault(HVA - 0x10000) + huge)
    assert found.files == (("shmem", 8192), ("hugetlb-2M", 2 << 20))
    _, results = run(found)
    assert results.status.tolist() == [0, 0x200, 0, 256]
    found = lowered(tmp_path / "a", "".join(mmap(HVA + at * 0x2000, 1, flags=0x21) for at in range(66)))
    assert len(found.files) == 64
    assert "mappings left out as a machine has room for 64 files: 2" in found.notes


@pytest.mark.same_with_checks
def test_a_process_s_memory_is_no_guest_s(tmp_path: Path) -> None:
    """It is refused where guest memory is wanted, in one line; anything of KVM makes a log a guest's."""
    path = tmp_path / "a"
    path.write_text(fault(HVA))
    with pytest.raises(InputError, match="a process's memory, no VM's: pgemu replay runs it"):
        require_input(load(path))
    assert load(path, LoweringOptions(kind="guest")).kind == "guest"
    assert load(path, LoweringOptions(vm_processes=(9,))).kind == "guest"
    path.write_text(fault(HVA) + line("kvm_exit: vcpu 0 reason npf"))
    assert load(path).kind == "guest"
    assert load(path, LoweringOptions(kind="process")).kind == "process"


@pytest.mark.same_with_checks
def test_perf_s_own_events_say_no_kind(tmp_path: Path) -> None:
    """A page that faults twice was read first; a fetch is where the instruction is; without an address nothing is."""
    text = "".join(
        f"            true  2206/2206   1453.49995{at}:          1 page-faults:     {address:x} [unknown] {ip:x} elf\n"
        for at, (address, ip) in enumerate([(0x400000, 0x500000), (0x400000, 0x500000), (0x500000, 0x500000)])
    )
    found = lowered(tmp_path / "a", text)
    faults = [(flags, address) for op, flags, _, address, _ in rows(found) if op == "HOST_FAULT"]
    assert faults == [(0, 0x400000), (Flag.WRITE, 0x400000), (Flag.EXEC, 0x500000)]
    read = lowered(tmp_path / "a", text, fault_kind="read")
    assert [flags for op, flags, *_ in rows(read) if op == "HOST_FAULT"] == [0, 0, Flag.EXEC]
    with pytest.raises(
        InputError, match=r"584 page-faults without an address \(perf record -d, perf script -F \+addr\)"
    ):
        require_input(load(TRACES / "perf-page-faults-callchain.txt.xz"))


def again(path: Path, found: Lowered, status: list[int]) -> Counter[str]:
    """Faults of a log that find their page in the model, by whether the log's error code says that it was there."""
    log = ftrace.read(path)
    codes = [int(code) for kind, code in log.rows[:, [0, 5]].tolist() if kind == 1]
    faults = [
        result for op, result in zip(found.records.op.tolist(), status, strict=True) if op == Operation.HOST_FAULT
    ]
    return Counter("there" if code & 1 else "missing" for code, result in zip(codes, faults, strict=True) if not result)


def test_captured_faults_of_small_programs_install_pages() -> None:
    """339 of 355. Twelve find their page, which the log's code says is there, too: writes after a fork that is in no
    line of it. Four are of a page that was fetched from before, and of which no line says why it was missing again."""
    path = TRACES / "ftrace-page-faults.txt.xz"
    found = load(path)
    machine, results = run(found)
    told = outcomes(found, results)
    assert told[Operation.HOST_FAULT] == {256: 339, 0: 16}
    assert again(path, found, results.status.tolist()) == {"there": 12, "missing": 4}
    assert all(set(statuses) == {0} for op, statuses in told.items() if op is not Operation.HOST_FAULT)
    assert found.processes == 5
    assert machine.check() == 0


def test_captured_faults_of_a_program_without_kinds_install_pages() -> None:
    """All but 15 of 4103. Eight are the second of three faults of a page; the others are of pages that something
    unmapped in between (a library's parts over its whole), of which the log has no line."""
    found = load(TRACES / "perf-page-faults-numpy-import.txt.xz")
    _, results = run(found)
    assert outcomes(found, results)[Operation.HOST_FAULT] == {256: 4088, 0: 15}
    with lzma.open(TRACES / "perf-page-faults-numpy-import.txt.xz", "rt") as text:
        assert sum(" page-faults: " in one for one in text) == 4103


@pytest.mark.same_with_checks
def test_fuzz_logs_of_processes_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = line("sched_process_fork: comm=app pid=9 child_comm=app child_pid=10")
    moved = call("mremap", f"addr: {HVA:#x}, old_len: 0x1000, new_len: 0x3000, flags: 1, new_addr: 0", HVA + 0x100000)
    lines = [
        fault(HVA), fault(0x400000, 4, 10), mmap(HVA, 4), mmap(HVA, 512, flags=0x40022), moved, fork,
        call("brk", "brk: 0", 0x500000), call("brk", "brk: 0x502010", 0x502010),
        call("madvise", f"start: {HVA:#x}, len_in: 0x2000, behavior: 9"),
        call("mprotect", f"start: {HVA:#x}, len: 0x1000, prot: 1"), call("mlockall", "flags: 3"),
        line("sched_process_exec: filename=/bin/x pid=10 old_pid=10", 10),
        line("sched_process_exit: comm=x pid=10", 10),
        line("hugetlbfs_fallocate: dev 0,17 ino 9 mode 03 offset 0 len 2097152 size 2097152 ret 0"),
        line("hugetlbfs_evict_inode: dev 0,17 ino 9 mode 0100777 size 2097152 nlink 0 seals 1 blocks 0"),
    ]  # fmt: skip
    read = 0
    for number, chance in rounds("processes", 0.0, 2000):
        with attacked("processes", number):
            data = "".join(chance.choice(lines) for _ in range(chance.randint(1, 12))).encode()
            read += read_or_refused(monkeypatch, mutated(chance, data) if chance.random() < 0.7 else data) is not None
    assert read > 500
