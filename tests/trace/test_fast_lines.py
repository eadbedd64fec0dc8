"""The kernel that reads lines against Python that reads them: the same rows, counts and complaints."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace import fast_lines
from pgemu.trace.fast_lines import FastLines, hash_of
from pgemu.trace.log import Log
from pgemu.trace.readers import ftrace

FOLDER = Path(os.environ.get("PGEMU_TRACES", Path(__file__).parents[1] / "data" / "traces"))
LOGS = sorted(path.name for path in FOLDER.glob("*ftrace*.txt.xz"))
LINES = 30_000


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    """The kernel is ready, and reads or not as the tests say."""
    kept = ftrace.wanted
    yield
    ftrace.wanted = kept


def read(path: Path, *, fast: bool, keep: bool = True) -> Log | str:
    """The log, or what it is refused with."""
    ftrace.wanted = lambda lines, size: fast
    try:
        return ftrace.read(path, keep_outcomes=keep)
    except InputError as error:
        return str(error)


def contents(log: Log | str) -> Any:
    """Everything that a log holds, in its order."""
    if isinstance(log, str):
        return log
    counters = (log.inputs, log.outcomes, log.ignored, log.unknown, log.skipped)
    return (
        log.rows.tolist(), None if log.sptes is None else log.sptes.tolist(), log.events, log.lost, log.tasks,
        log.notes, log.nested_told, log.stage2, log.doubts, [list(counter.items()) for counter in counters],
    )  # fmt: skip


def compare(path: Path, text: bytes, keep: bool = True) -> Log | str:
    path.write_bytes(text)
    slow = read(path, fast=False, keep=keep)
    assert contents(read(path, fast=True, keep=keep)) == contents(slow)
    return slow


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", LOGS)
def test_captured_logs_are_read_alike(name: str, keep: bool, tmp_path: Path) -> None:
    with lzma.open(FOLDER / name) as file:
        text = b"".join(line for line, _ in zip(file, range(LINES), strict=False))
    log = compare(tmp_path / "log", text, keep)
    assert isinstance(log, Log)
    assert log.events > 0


def test_most_lines_are_read_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the kernel that never runs it would find nothing."""
    slow: list[int] = []
    feed = ftrace._Parser.feed_slow

    def counting(parser: Any, piece: bytes, block: bytes, before: int) -> None:
        slow.append(piece.count(b"\n"))
        feed(parser, piece, block, before)

    monkeypatch.setattr(ftrace._Parser, "feed_slow", counting)
    with lzma.open(FOLDER / "vm-convert-swprot.ftrace.txt.xz") as file:
        text = file.read()
    (tmp_path / "log").write_bytes(text)
    read(tmp_path / "log", fast=True)
    assert sum(slow) < 0.05 * text.count(b"\n")


# --------------------------------------------------------------------------- random logs

NUMBERS = st.sampled_from(
    [0, 1, 4, 7, 9, 24, 25, 0x1000, 0x7F00_0000_0000, (1 << 52) - 1, (1 << 64) - 4095, (1 << 64) - 1]
)
LEVELS = st.integers(0, 5)
HEX = NUMBERS.map(lambda number: f"{number:x}")
HEX_0X = NUMBERS.map(lambda number: f"{number:#x}")
SPTES = st.sampled_from(["8000000000000000", "114288827", "114800ee7", "11428ce67", "80000000000001a0"])
SYSTEM = st.sampled_from(["", "kvm:", "exceptions:"])


def event(*parts: str | st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map(
        lambda values: "".join(map(str, values))
    )


EVENTS = st.one_of(
    event(SYSTEM, "kvm_page_fault: vcpu ", LEVELS, " rip 0x0 address ", HEX_0X, " error_code ", HEX_0X),
    event("kvm_page_fault: address ", HEX, " error_code ", HEX),
    event(SYSTEM, "page_fault_user: address=", HEX_0X, " ip=0x41 error_code=0x6"),
    event(
        SYSTEM, "kvm_tdp_mmu_spte_changed: as id 0 gfn ", HEX, " level ", LEVELS, " old_spte ", SPTES, " new_spte ",
        SPTES,
    ),
    event("kvm_mmu_set_spte: gfn ", HEX, " spte ", SPTES, " (rwxu) level ", LEVELS, " at ", HEX),
    event("kvm_unmap_hva_range: mmu notifier unmap range: ", HEX_0X, " -- ", HEX_0X),
    event("kvm_vm_set_mem_attributes: ", HEX_0X, " -- ", HEX_0X, " [0x8]"),
    event("sys_madvise(start: ", HEX_0X, ", len_in: ", HEX_0X, ", behavior: ", HEX, ")"),
    event("syscalls:sys_enter_madvise: start: ", HEX_0X, ", len_in: ", HEX_0X, ", behavior: ", HEX_0X),
    event("sys_fallocate(fd: 5, mode: 3, offset: ", HEX_0X, ", len: ", HEX_0X, ")"),
    event("sys_mmap(addr: 0, len: ", HEX_0X, ", prot: 3, flags: 22, fd: 0, off: 0)"),
    event("sys_munmap(addr: ", HEX_0X, ", len: ", HEX_0X, ")"),
    event(st.sampled_from(["sys_madvise", "sys_mmap", "sys_munmap", "sys_fallocate", "sys_brk"]), " -> ", HEX_0X),
    event("syscalls:sys_exit_madvise: ", HEX_0X),
    event("kvm_exit: vcpu 0 reason ", st.sampled_from(["npf", "EPT_VIOLATION", "io"]), " rip 0x0"),
    st.sampled_from(["kvm_entry: vcpu 0", "kvm_nested_vmexit: vcpu 0", "kvm_nested_vmrun: rip 1"]),
    st.sampled_from(["tlb_flush: pages:1", "unheard_of: a 1", "kvm_mmu_zap_all_fast: gen 0", "nonsense", "a: b: c"]),
)  # fmt: skip
TASKS = st.sampled_from(["vmm-9", "CPU 0/KVM-12", "<...>-13", "a-b-14", "vmm: x-15", "žluť-16"])
STAMPS = st.integers(0, 10**10).map(lambda tick: f"{tick // 10**6}.{tick % 10**6:06}") | st.sampled_from(
    ["1.000000001", "7"]
)
LINE = st.tuples(TASKS, st.sampled_from(["[000] .....", "[001] d....", "[000]"]), STAMPS, EVENTS).map(
    lambda parts: f" {parts[0]} {parts[1]} {parts[2]}: {parts[3]}"
)
OTHER = st.sampled_from(
    [
        " vmm-9 [000] ..... 1.000001: ",
        " vmm-9 [000] ..... 1.000001:  x",
        "1.000001: ",
        ": ",
        "# tracer: nop",
        "",
        "CPU:0 [LOST 3 EVENTS]",
        " => do_syscall_64",
        "    ffffffff81 x+0x1 ([k])",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINE | LINE | LINE | OTHER, min_size=1, max_size=60),
    keep=st.booleans(),
    end=st.sampled_from(["\n", ""]),
)
def test_random_logs_are_read_alike(
    lines: list[str], keep: bool, end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "\n".join(lines) + end
    compare(tmp_path_factory.mktemp("random") / "log", text.encode("utf-8", "surrogateescape"), keep)


@pytest.fixture(scope="module")
def sample() -> bytes:
    with lzma.open(FOLDER / "vm-convert-swprot.ftrace.txt.xz") as file:
        return b"".join(line for line, _ in zip(file, range(400), strict=False))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), keep=st.booleans())
def test_mutated_logs_are_read_alike(
    data: st.DataObject, keep: bool, sample: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "double", "line"]))
        if kind == "byte":
            text[at] = data.draw(st.sampled_from(b"\n\r\t 09afxF:.-(),[]\xff\xc5") | st.integers(1, 255))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, 40))]
        elif kind == "double":
            text[at:at] = text[at : at + data.draw(st.integers(1, 200))]
        else:
            text[at:at] = data.draw(LINE).encode() + b"\n"
        if not text:
            text = bytearray(b"\n")
    compare(tmp_path_factory.mktemp("mutated") / "log", bytes(text), keep)


@pytest.mark.parametrize("ending", [b"\r\n", b"\n"])
def test_other_line_endings(ending: bytes, sample: bytes, tmp_path: Path) -> None:
    assert isinstance(compare(tmp_path / "log", sample.replace(b"\n", ending)), Log)


def test_more_rows_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: bytes) -> None:
    monkeypatch.setattr(fast_lines, "_ROOM", 3)
    assert isinstance(compare(tmp_path / "log", sample), Log)


def test_many_tasks_and_events(tmp_path: Path) -> None:
    """Tables grow."""
    text = "".join(f" task-{i % 700 + 10} [000] ..... {i}.000001: event_{i % 900}: a 1\n" for i in range(5000))
    log = compare(tmp_path / "log", text.encode())
    assert isinstance(log, Log)
    assert (len(log.tasks), len(log.unknown), sum(log.unknown.values())) == (700, 900, 5000)


def test_names_that_share_a_place_in_a_table() -> None:
    """What is looked up by a few bytes is told apart by all."""
    one, other = b"kvm_abcdefghijklmnopqrstuvwxyz_0:", b"kvm_abXdefghijklmnopqrstuvwxyz_0:"
    assert hash_of(one) == hash_of(other)
    names = bytearray()
    table = fast_lines._Table(names, 4)
    for value, name in enumerate((one, other, b"x")):
        table.set(name, value)
    found = {row[3]: bytes(names[row[1] : row[1] + row[2]]) for row in table.rows.reshape(-1, 8).tolist() if row[2]}
    assert found == {0: one, 1: other, 2: b"x"}


# --------------------------------------------------------------------------- who reads


def test_a_short_text_is_read_by_python() -> None:
    assert not fast_lines.wanted(0, 1000)
    assert not fast_lines.wanted(10**9, 1000)


def test_without_a_compiler_python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not fast_lines.wanted(10**9, 1 << 18)


def test_numba_is_loaded_for_long_logs_only() -> None:
    program = (
        "import sys; from pgemu.trace.fast_lines import LINES_TO_LOAD, wanted\n"
        "short = wanted(LINES_TO_LOAD - 1, 1 << 18), 'numba' in sys.modules\n"
        "wanted(LINES_TO_LOAD, 1 << 18)\n"
        "print(short, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "(False, False) True\n"


def test_a_parser_that_is_no_reader_gets_what_is_not_known() -> None:
    class Slow:
        line = events = 0
        got = b""

        def feed_slow(self, piece: bytes, block: bytes, before: int) -> None:
            self.got += piece
            self.line += piece.count(b"\n")

    from array import array

    slow = Slow()
    text = b"".join(b"line %d\n" % i for i in range(3000))
    FastLines(slow, array("Q"), None, array("Q")).feed(text)
    assert (slow.got, slow.line) == (text, 3000)
    assert np.all(np.frombuffer(slow.got, np.uint8) > 0)


def test_the_kernel_has_the_numbers_of_the_trace() -> None:
    from pgemu.trace.events import TDX_SHARED_BITS, Input
    from pgemu.trace.outcomes import OUTCOME_WORDS, Kept
    from pgemu.trace.task_calls import CALL_CODES
    from pgemu_kernels.text import log_lines
    from pgemu_kernels.words import log_words

    rows = ("HOST_FAULT", "GUEST_FAULT", "ATTRIBUTES", "UNMAP", "MADVISE")
    assert {name: int(getattr(log_lines, f"_ROW_{name}")) for name in rows} == {name: Input[name] for name in rows}
    kept = ("CHANGED", "SET")
    assert {name: int(getattr(log_lines, f"_KEPT_{name}")) for name in kept} == {name: Kept[name] for name in kept}
    calls = ("madvise", "mmap", "fallocate")
    codes = {f"sys_{name}": int(getattr(log_lines, f"_CALL_{name.upper()}")) for name in calls}
    assert codes == {name: CALL_CODES[name] for name in codes}
    assert int(log_lines._SHARED_BITS) == sum(1 << bit for bit in TDX_SHARED_BITS)
    assert log_words.KEPT_WORDS == OUTCOME_WORDS
