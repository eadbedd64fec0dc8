"""Text of strace in all its forms, against an oracle of pages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fuzzing import attacked, mutated, rounds
from pgemu.errors import InputError
from pgemu.trace import Flag, Lowered, LoweringOptions, Operation, load
from pgemu.trace.events import Input
from pgemu.trace.log import Log
from pgemu.trace.readers import strace
from pgemu.trace.readers.parquet import write
from pgemu.trace.source import Match, open_source
from processes_run import outcomes, read_or_refused, run
from strace_writer import FORMS, play

TRACES = Path(__file__).parents[2] / "data" / "traces"
PAGE = 4096


def parsed(path: Path, text: str) -> Log:
    """The log of some text."""
    path.write_text(text)
    log = strace.read(open_source(path))
    total = log.inputs.total() + log.outcomes.total() + log.ignored.total() + log.unknown.total()
    assert log.events == total
    return log


def words(log: Log) -> list[tuple[Any, ...]]:
    """Kind, words and state of each row, those of processes alone behind the others."""
    rows = [row for rows in (log.rows, log.calls) for row in rows.tolist()]
    return [(Input(row[0]), *row[4:]) for row in rows]


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f1000",
            (Input.MMAP, 0x7F1000, 8192, 0xFFFFFFFF, 0, 0x22 | 3 << 32, 0),
        ),
        (
            "mmap(0x1000, 1, PROT_NONE, MAP_SHARED|MAP_FIXED, 3</a, b (c)>, 0x26000) = -1 EINVAL (Invalid "
            "argument)",
            (Input.MMAP, 0x1000, 1, 1 << 32, 0x26000, 0x11, 1),
        ),
        (
            "mmap(NULL, 4096, 0x3 /* PROT_??? */, 0x40022, 9, 0) = 0x2000 <0.000010>",
            (Input.MMAP, 0x2000, 4096, 9, 0, 0x40022 | 3 << 32, 0),
        ),
        (
            "mmap(NULL, 1, PROT_READ, MAP_PRIVATE|MAP_HUGETLB|30<<MAP_HUGE_SHIFT, -1, 0) = 0x40000000",
            (Input.MMAP, 0x40000000, 1, 0xFFFFFFFF, 0, 0x40002 | 30 << 26 | 1 << 32, 0),
        ),
        (
            "mmap(NULL, 1, PROT_READ, MAP_PRIVATE|MAP_HUGETLB|MAP_HUGE_2MB, -1, 0) = 0x40000000",
            (Input.MMAP, 0x40000000, 1, 0xFFFFFFFF, 0, 0x40002 | 21 << 26 | 1 << 32, 0),
        ),
        ("munmap(0x7f1000, 37243)     = 0", (Input.MUNMAP, 0x7F1000, 37243, 0, 0, 0, 0)),
        ("madvise(0x7f1000, 4096, MADV_DONTNEED) = 0", (Input.MADVISE, 0x7F1000, 4096, 4, 0, 0, 0)),
        ("madvise(0x7f1000, 4096, MADV_GUARD_INSTALL) = 0", (Input.MADVISE, 0x7F1000, 4096, 102, 0, 0, 0)),
        ("madvise(0x7f1000, 4096, 0x66 /* MADV_??? */) = -1 EINVAL (x)", (Input.MADVISE, 0x7F1000, 4096, 102, 0, 0, 1)),
        ("mprotect(0x1000, 4096, PROT_READ|PROT_EXEC) = 0", (Input.PROTECT, 0x1000, 4096, 5, 0, 0, 0)),
        ("pkey_mprotect(0x1000, 4096, PROT_READ, 2) = 0", (Input.PROTECT, 0x1000, 4096, 1, 0, 0, 0)),
        ("mremap(0x1000, 4096, 8192, MREMAP_MAYMOVE) = 0x9000", (Input.REMAP, 0x1000, 4096, 8192, 1, 0x9000, 0)),
        ("munlock(0x1000, 5) = ? ERESTARTSYS (To be restarted)", (Input.LOCK, 0x1000, 5, 0, 0, 0, 1)),
        ("brk(NULL)                         = 0x22ec1000", (Input.BREAK, 0, 0x22EC1000, 0, 0, 0, 0)),
        ("mlock(0x1000, 5) = 0", (Input.LOCK, 0x1000, 5, 1, 0, 0, 0)),
        ("mlock2(0x1000, 5, MLOCK_ONFAULT) = 0", (Input.LOCK, 0x1000, 5, 2, 0, 0, 0)),
        ("munlock(0x1000, 5) = 0", (Input.LOCK, 0x1000, 5, 0, 0, 0, 0)),
        ("mlockall(MCL_CURRENT|MCL_FUTURE) = 0", (Input.LOCK_ALL, 3, 0, 0, 0, 0, 0)),
        ("munlockall() = 0", (Input.LOCK_ALL, 0, 0, 0, 0, 0, 0)),
        ("fork() = 77", (Input.FORK, 77, 0, 0, 0, 0, 0)),
        ("vfork() = 77", (Input.FORK, 77, 0x4100, 0, 0, 0, 0)),
        ("clone(child_stack=0x7f0, flags=CLONE_VM|CLONE_THREAD|SIGCHLD) = 77", (Input.FORK, 77, 0x10100, 0, 0, 0, 0)),
        (
            "clone3({flags=CLONE_VM|CLONE_PIDFD, exit_signal=SIGCHLD} => {parent_tid=[77]}, 88) = 77",
            (Input.FORK, 77, 0x100, 0, 0, 0, 0),
        ),
        ('execve("/bin/a b", ["a", "(", ", "], 0x7ffc /* 35 vars */) = 0', (Input.EXEC, 0, 0, 0, 0, 0, 0)),
        ("exit_group(0) = ?", (Input.EXIT, 1, 0, 0, 0, 0, 0)),
        ("+++ killed by SIGSEGV (core dumped) +++", (Input.EXIT, 0, 0, 0, 0, 0, 0)),
        (
            "fallocate(5, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 0, 268435456) = 0",
            (Input.FALLOCATE, 5, 3, 0, 1 << 28, 0, 0),
        ),
        (
            "ioctl(4, KVM_SET_USER_MEMORY_REGION, {slot=0, flags=KVM_MEM_READONLY, guest_phys_addr=0x1000, "
            "memory_size=65536, userspace_addr=0x7facdd5c9000}) = 0",
            (Input.MEMSLOT, 0, 2, 0x1000, 65536, 0x7FACDD5C9000, 0),
        ),
        (
            "ioctl(4, KVM_SET_USER_MEMORY_REGION2, {slot=65537, flags=KVM_MEM_GUEST_MEMFD, "
            "guest_phys_addr=0, memory_size=65536, userspace_addr=0x7f0000, guest_memfd_offset=0, "
            "guest_memfd=5}) = 0",
            (Input.MEMSLOT, 65537, 4, 0, 65536, 0x7F0000, 0),
        ),
        (
            "ioctl(4, KVM_SET_MEMORY_ATTRIBUTES, {address=0x200000, size=0x1000, "
            "attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE, flags=0}) = 0",
            (Input.ATTRIBUTES, 0x200, 0x201, 8, 0, 0, 0),
        ),
    ],
)  # fmt: skip
def test_calls_are_rows(line: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    for front in ("", "123 ", "[pid 123] ", "1700000000.5000 ", "12:00:00 ", "[pid  9] 12:00:00.000001 ", "7<a b> "):
        assert words(parsed(tmp_path / "a", f"{front}{line}\n")) == [expected]


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (
            "ioctl(4, _IOC(_IOC_READ|_IOC_WRITE, 0xae, 0xd4, 0x40), 0x7ffe8be9eeb0) = 5",
            "ignored KVM_CREATE_GUEST_MEMFD",
        ),
        ("ioctl(4, KVM_CREATE_GUEST_MEMFD, {size=4096, flags=0}) = 5", "ignored KVM_CREATE_GUEST_MEMFD"),
        ("ioctl(4, _IOC(_IOC_WRITE, 0xae, 0xd2, 0x20), 0x7ffe7ae53340) = 0", "unknown KVM_SET_MEMORY_ATTRIBUTES"),
        ("ioctl(4, _IOC(_IOC_WRITE, 0xae, 0x49, 0xa0), 0x7ffe7ae53340) = 0", "unknown KVM_SET_USER_MEMORY_REGION2"),
        ("ioctl(4, KVM_SET_USER_MEMORY_REGION, 0x7ffe7ae53340) = 0", "unknown KVM_SET_USER_MEMORY_REGION"),
        ("ioctl(4, KVM_RUN, 0) = -1 EINTR (Interrupted system call)", "ignored KVM_RUN"),
        ("ioctl(2, TCGETS, 0x7ffdeb6f2960)  = -1 ENOTTY (Inappropriate ioctl for device)", "ignored sys_ioctl"),
        ("shmat(5, NULL, 0) = 0x7f0000", "unknown sys_shmat"),
        ("mmap(NULL, 4096, PROT_ODD, MAP_PRIVATE, -1, 0) = 0x1000", "unknown sys_mmap that is not understood"),
        ("munmap(0x1000) = 0", "unknown sys_munmap that is not understood"),
        ("restart_syscall(<... resuming interrupted read ...>) = 0", "ignored sys_restart_syscall"),
    ],
)  # fmt: skip
def test_what_is_no_row_is_counted_by_name(line: str, name: str, tmp_path: Path) -> None:
    log = parsed(tmp_path / "a", line + "\n")
    kind, _, name = name.partition(" ")
    counter: Counter[str] = getattr(log, kind)
    assert [count for one, count in counter.items() if name in one] == [1]
    assert (len(log.rows), len(log.calls)) == (0, 0)
    if kind == "unknown" and "KVM" in name:
        assert "only a pointer is printed of 1 KVM_SET" in log.doubts[0].text


@pytest.mark.same_with_checks
def test_lines_that_are_not_understood_are_counted_and_the_first_ones_shown(tmp_path: Path) -> None:
    text = "brk(NULL) = 0x1000\n<<<\nfoo(\n12 <... read resumed>) = 3\n\nstrace: Process 9 attached\nfoo bar\nx\n"
    log = parsed(tmp_path / "a", text)
    assert log.skipped == {"lines that are not understood": 4, "ends of calls that do not begin": 1}
    assert log.notes[-1] == "not understood: line 2: <<<; line 3: foo(; line 4: 12 <... read resumed>) = 3"


@pytest.mark.same_with_checks
def test_text_without_a_call_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("nothing\n")
    with pytest.raises(InputError, match=r"a: no system call in it, expected text of strace \(line 1: nothing\)"):
        load(tmp_path / "a", input_format="strace")


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    "name", ["ftrace-page-faults.txt.xz", "perf-page-faults-numpy-import.txt.xz", "vm-convert-swprot.ftrace.txt.xz"]
)
def test_other_logs_are_not_taken_for_straces(name: str) -> None:
    source = open_source(TRACES / name)
    assert strace.sniff(source.head) is Match.NO
    source.close()


def made(lowered: Lowered) -> list[list[Any]]:
    """Records without their times, which differ from form to form."""
    records = lowered.records
    names = ("op", "flags", "actor", "space", "object", "address", "offset", "length")
    return [getattr(records, name).tolist() for name in names]


@pytest.mark.same_with_checks
@given(seed=st.integers(0, 1 << 32), form=st.sampled_from(sorted(FORMS)))
@settings(max_examples=60, deadline=None)
def test_every_form_says_the_same(seed: int, form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    scene = play(seed, 25)
    path = tmp_path_factory.mktemp("s") / "a"
    found = []
    for one in ("-f -ttt", form):
        path.write_text(FORMS[one](scene.lines))
        lowered = load(path)
        assert lowered.accounting.balanced()
        assert not lowered.accounting.skipped
        found.append(made(lowered))
    assert found[0] == found[1]


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_random_calls_leave_what_an_oracle_of_pages_says(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every record is accepted, and a page can be touched where the oracle says, and nowhere else."""
    scene = play(seed, 40)
    path = tmp_path_factory.mktemp("s") / "a"
    path.write_text(FORMS["-f -ttt"](scene.lines))
    lowered = load(path)
    machine, results = run(lowered)
    wrong = {op: statuses for op, statuses in outcomes(lowered, results).items() if set(statuses) != {0}}
    assert not wrong
    alive = [space for space in range(64) if _root(machine, space)]
    assert len(alive) == len(scene.processes)
    # Spaces are numbered in the order of creation, and rows of ended ones are used again: match them by what they show.
    window = [0x7F00_0000_0000 // PAGE + at for at in range(130)] + [0x5000 + at for at in range(-4, 200)]
    expected = Counter(tuple(_permitted(process.pages.get(page)) for page in window) for process in scene.processes)
    shown = Counter(tuple(_touched(machine, space, page) for page in window) for space in alive)
    assert shown == expected
    assert machine.check() == 0


def _root(machine: Any, space: int) -> int:
    from pgemu_kernels import words as W

    return int(machine.arrays.state[int(W.STATE_SPACES) + space * W.S_WORDS + int(W.S_ROOT)])


def _permitted(rights: int | None) -> tuple[bool, bool, bool]:
    """Whether a page can be read, written, executed: arch/x86/mm/fault.c:access_error(), with protection keys."""
    if not rights:
        return False, False, False
    return rights != 4, bool(rights & 2), bool(rights & 4)


def _touched(machine: Any, space: int, page: int) -> tuple[bool, bool, bool]:
    found = []
    for flags in (0, Flag.WRITE, Flag.EXEC):
        result = machine.operate(Operation.HOST_FAULT, flags=int(flags), space=space, address=page * PAGE)
        found.append(result.status != 0x40)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("name", sorted(path.name for path in (TRACES / "strace-forms").glob("*.xz")))
def test_a_captured_program_is_the_same_in_every_form(name: str) -> None:
    """A thread, a child that executes, mremap, madvise, mlock, a memfd mapped twice: every call is taken."""
    lowered = load(TRACES / "strace-forms" / name)
    accounting = lowered.accounting
    assert (accounting.balanced(), lowered.kind, lowered.processes) == (True, "process", 1)
    assert (accounting.unknown, accounting.skipped, lowered.files) == ({}, {}, (("shmem", 1 << 20),))
    assert accounting.without_operation == {
        "break: brk that only tells where the break is": 3,
        "mmap: the call failed": 1,  # MAP_HUGETLB, the pool was empty
        "fork: of a thread, or of a child that is not in the log": 1,
        "exit: of a thread": 1,
        "exit: of a process that has ended": 2,
    }
    machine, results = run(lowered)
    told = outcomes(lowered, results)
    assert {op.name: count.total() for op, count in told.items()} == {
        "MMAP": 27, "MUNMAP": 16, "PROTECT": 8, "LOCK": 16, "ADVISE_HUGE": 1, "POPULATE": 1, "REMAP": 1, "ZAP": 2,
        "PUNCH_HOLE": 1, "FORK": 1, "EXIT": 2,
    }  # fmt: skip
    assert all(set(statuses) == {0} for statuses in told.values())
    assert not any(_root(machine, space) for space in range(64))  # all have ended


@pytest.mark.parametrize(
    ("name", "processes", "operations"),
    [
        ("strace-gcc.txt.xz", 5, {"MMAP": 204, "MUNMAP": 109, "PROTECT": 33, "EXIT": 5}),
        ("strace-python-numpy.txt.xz", 1, {"MMAP": 202, "MUNMAP": 133, "PROTECT": 37, "EXIT": 1, "ZAP": 1,
                                        "ADVISE_HUGE": 3}),
    ],
)  # fmt: skip
def test_captured_programs_are_accepted_whole(name: str, processes: int, operations: dict[str, int]) -> None:
    lowered = load(TRACES / name)
    assert (lowered.accounting.balanced(), lowered.processes) == (True, processes)
    _, results = run(lowered)
    told = outcomes(lowered, results)
    assert {op.name: count.total() for op, count in told.items()} == operations
    assert all(set(statuses) == {0} for statuses in told.values())


@pytest.mark.same_with_checks
def test_a_vmm_s_calls_are_a_guest_s_log(tmp_path: Path) -> None:
    """strace 6.1 prints a memory slot, and of guest_memfd pointers alone: these are counted, and a doubt."""
    lowered = load(TRACES / "strace-kvm.txt.xz")
    assert lowered.kind == "guest"
    assert [Operation(op).name for op in lowered.records.op.tolist()] == [
        "MMAP", "BIND", "PUNCH_HOLE", "PUNCH_HOLE", "UNBIND",
    ]  # fmt: skip
    assert "only a pointer is printed of 1 KVM_SET_USER_MEMORY_REGION2" in lowered.doubts[0].text
    path = tmp_path / "a"
    slot = "slot=0, flags=KVM_MEM_GUEST_MEMFD, guest_phys_addr=0, memory_size=0x800000, userspace_addr=0x7f0000000000"
    attributes = "address=0x200000, size=0x1000, attributes=0, flags=0"
    path.write_text(
        f"1 ioctl(4, KVM_SET_USER_MEMORY_REGION2, {{{slot}, guest_memfd_offset=0, guest_memfd=5}}) = 0\n"
        f"1 ioctl(4, KVM_SET_MEMORY_ATTRIBUTES, {{{attributes}}}) = 0\n"
    )
    lowered = load(path)
    assert [Operation(op).name for op in lowered.records.op.tolist()] == ["MMAP", "BIND", "CONVERT"]
    assert (lowered.init, lowered.doubts) == ("private", ())


def test_records_of_processes_are_stored_and_read_again(tmp_path: Path) -> None:
    lowered = load(TRACES / "strace-gcc.txt.xz")
    write(lowered, tmp_path / "a.parquet")
    again = load(tmp_path / "a.parquet")
    assert (again.kind, again.processes, again.files) == ("process", 5, lowered.files)
    assert again.notes == lowered.notes
    assert all(
        np.array_equal(getattr(again.records, name), getattr(lowered.records, name)) for name in ("op", "address")
    )


@pytest.mark.same_with_checks
def test_tasks_that_nothing_makes_are_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(
        "1  brk(NULL) = 0x1000\n2  mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x9000\n"
    )
    assert [load(path, LoweringOptions(new_tasks=one)).processes for one in ("auto", "thread", "process")] == [1, 1, 2]
    assert any("taken for threads" in note for note in load(path).notes)


@pytest.mark.same_with_checks
def test_a_file_is_known_by_whatever_descriptor_it_has(tmp_path: Path) -> None:
    """Through dup, threads and children; not behind close."""
    shared = "mmap(NULL, 4096, PROT_READ, MAP_SHARED, {}, 0) = {:#x}\n"
    text = (
        '1 memfd_create("m", 0) = 3\n1 dup2(3, 9) = 9\n1 ' + shared.format(3, 0x10000)
        + "1 clone(flags=CLONE_VM|CLONE_FILES|CLONE_THREAD <unfinished ...>\n"
        + "2 " + shared.format(9, 0x20000) + '2 memfd_create("n", MFD_HUGETLB) = 4\n'
        + "1 <... clone resumed>) = 2\n1 fork() = 5\n1 close(3) = 0\n"
        + "5 " + shared.format(3, 0x30000) + "5 mmap(NULL, 2097152, PROT_READ, MAP_SHARED, 4, 0) = 0x40000000\n"
        + "1 " + shared.format(3, 0x50000)
    )  # fmt: skip
    path = tmp_path / "a"
    path.write_text(text)
    found = load(path)
    maps = [
        (int(o), hex(at))
        for op, o, at in zip(found.records.op, found.records.object, found.records.address, strict=True)
        if op == Operation.MMAP
    ]
    # The thread's line comes before its clone ends: of descriptor 9 it only knows the number.
    assert maps == [(0, "0x10000"), (1, "0x20000"), (0, "0x30000"), (2, "0x40000000"), (3, "0x50000")]
    assert [file.kind for file in found.files] == ["shmem", "shmem", "hugetlb-2M", "shmem"]


@pytest.mark.same_with_checks
def test_fuzz_strace_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = play(7, 12)
    texts = [FORMS[form](scene.lines).encode() for form in sorted(FORMS)]
    slot = "slot=0, flags=0, guest_phys_addr=0, memory_size=65536, userspace_addr=0x7facdd5c9000"
    texts.append(f"1 ioctl(4, KVM_SET_USER_MEMORY_REGION, {{{slot}}}) = 0\n".encode())
    read = 0
    for number, chance in rounds("strace", 0.0, 2000):
        with attacked("strace", number):
            data = mutated(chance, chance.choice(texts), texts)
            read += read_or_refused(monkeypatch, data, "strace") is not None
    assert read > 500
