"""Shapes of lines: what stands in front of an event, forms of output that are read, and those that are named."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import load
from pgemu.trace.events import IGNORED, OUTCOMES, event_name
from pgemu.trace.lines import event_start, is_name
from pgemu.trace.log import Log, Task
from pgemu.trace.readers.ftrace import _Parser

pytestmark = pytest.mark.same_with_checks

FAULT = "kvm_page_fault: vcpu 3 rip 0x10 address 0x0000000000084123 error_code 0x100000006"
PERF = " CPU 3/KVM 27004 [003] 12481.879123:"
WORDS = [0x84123, 0x100000006, 3]

# perf pads an event's name to the longest one; period, weight and differences of time stand in front of it.
_COLUMNS = st.lists(
    st.one_of(
        st.integers(0, 2**64 - 1).map(str),
        st.integers(0, 2**40).map(hex),
        st.integers(0, 10**9).map(lambda n: f"(+{n})"),
        st.floats(0, 1e6).map(lambda x: f"{x:.6f}"),
    ),
    max_size=4,
)


def parse(text: str) -> Log:
    parser = _Parser("log")
    *whole, last = text.split("\n")
    parser.feed("\n".join([*whole, last] if last else [*whole, ""]))
    return parser.finish()


@given(
    columns=_COLUMNS, pads=st.lists(st.integers(1, 40), min_size=5, max_size=5), system=st.sampled_from(["", "kvm:"])
)
def test_an_event_is_found_behind_padding_and_other_columns(columns: list[str], pads: list[int], system: str) -> None:
    front = "".join(" " * pad + column for pad, column in zip(pads, columns, strict=False))
    line = f"{PERF}{front}{' ' * pads[4]}{system}{FAULT}\n"
    log = parse(line * 2)
    assert (log.events, log.unknown, log.inputs) == (2, {}, {"kvm_page_fault": 2})
    assert [row[4:7] for row in log.rows.tolist()] == [WORDS, WORDS]


@given(
    name=st.sampled_from(sorted(OUTCOMES | IGNORED)).filter(lambda name: name[0] != "<" and name[:4] != "sys_"),
    pad=st.integers(0, 60),
)
def test_padding_changes_no_name(name: str, pad: int) -> None:
    text = f"{' ' * pad}kvm:{name}: x"
    assert event_name(text[event_start(text) :].partition(" ")[0]) == name
    assert is_name(f"{name}:")


@given(
    st.lists(
        st.sampled_from(["", "1", "0x12", "ffffffff8175336a", "12.5", "(+100)", "7f7bd575ab70:", "vcpu", "hello"]),
        max_size=4,
    )
)
def test_a_line_without_an_event_s_name_is_counted_and_said(tokens: list[str]) -> None:
    log = parse(f"{PERF} {FAULT}\n{PERF} {' '.join(tokens)}\n{PERF} {FAULT}\n")
    assert (log.events, log.unknown) == (3, {"(no event name)": 1})
    assert log.notes == ("1 line has no event name, the first is line 2 (perf script -F +event prints it)",)


@given(
    tid=st.integers(1, 4194304),
    pid=st.integers(1, 4194304),
    micros=st.integers(0, 10**12),
    mark=st.sampled_from(" +!#*@$"),
    flags=st.sampled_from(["d...", ".....", "d..2.", "dNh1.", "bl..."]),
    printk=st.sampled_from(["", "[   12.345678] ", "<4>[   12.345678] ", "[ 2.345678][ T3] ", "a kernel: [1.000000] "]),
)
def test_every_form_says_task_time_and_event(
    tid: int, pid: int, micros: int, mark: str, flags: str, printk: str
) -> None:
    seconds = f"{micros // 10**6}.{micros % 10**6:06}"
    row = [2, micros * 1000, 0, 1, *WORDS, 0, 0, 0]
    for line, process in (
        (f" CPU 3/KVM-{tid} [003] {flags} {seconds}: {FAULT}", None),
        (f" CPU 3/KVM-{tid} ({pid:>7}) [003] {flags} {seconds}: {FAULT}", pid),
        (f" CPU 3/KVM-{tid} (-------) [003] {flags} {seconds}000: {FAULT}", None),
        (f" CPU 3/KVM-{tid} [003] {seconds}: {FAULT}", None),
        (f" CPU 3/KVM {pid}/{tid} [003] {seconds}: kvm:{FAULT}", pid),
        (f" CPU 3/KVM {pid}/{tid} {seconds}: kvm:{FAULT}", pid),  # perf script -F without cpu
        (f" CPU 3/KVM {tid} [003] KH {seconds}: {FAULT}", None),  # -F +misc
        (f"{printk} CPU 3/KVM-{tid:<7} {3:3}{flags} {micros:4}us{mark}: {FAULT}", None),  # latency format, oops dump
        (f" CPU 3/KVM-{tid:<7} {3:3}{flags} {seconds}: {FAULT}", None),  # trace-cmd report -l
    ):
        log = parse(line + "\n")
        assert log.rows.tolist() == [row], line
        assert log.tasks == (Task(tid, process, "CPU 3/KVM"),), line
        assert log.notes == ()


@given(ticks=st.lists(st.integers(0, 2**63), min_size=1, max_size=9))
def test_ticks_of_a_clock_keep_their_order_and_are_said(ticks: list[int]) -> None:
    log = parse("".join(f"vm-1 [000] ..... {tick}: {FAULT}\n" for tick in ticks))
    assert log.rows[:, 1].tolist() == sorted(ticks)
    assert "its time stamps are ticks of a clock, only their order counts" in log.notes


def test_what_stands_behind_something_later_is_taken_by_time_and_said() -> None:
    """As `cat per_cpu/cpu*/trace` prints; equal times keep the order of the lines."""
    times = [5, 7, 7, 2, 6, 1]
    lines = [f"vm-1 [000] ..... 1.00000{time}: {FAULT.replace('vcpu 3', f'vcpu {i}')}" for i, time in enumerate(times)]
    log = parse("\n".join(lines) + "\n")
    assert log.rows[:, 6].tolist() == [5, 3, 0, 4, 1, 2]
    (note,) = log.notes
    assert note.startswith("its time goes back 2 times, first at line 4: inputs are taken by time")


def test_what_tasks_are_called_is_learned_from_later_lines() -> None:
    log = parse(
        f"<...>-7 (-------) [000] ..... 1.000000: {FAULT}\nqemu-7 (     70) [000] ..... 1.000001: {FAULT}\n"
        f"CPU 0/KVM-7 (     70) [000] ..... 1.000001: {FAULT}\n"
    )
    assert log.tasks == (Task(7, 70, "qemu"),)


@pytest.mark.parametrize(
    "line",
    [
        "\tffffffffc0b1c2a1 handle_ept_violation+0x91 ([kernel.kallsyms])",
        "\t    7f3a1c51a94f __GI___ioctl+0x3f (/usr/lib/libc.so.6)",
        "\t    7f3a1c51a94f [unknown] ([unknown])",
        "        ffffffffc0b1c2a1",
        "\tvmx_handle_exit+0x1b1 (/lib/modules/kvm-intel.ko)",
        "  arch/x86/kvm/vmx/vmx.c:5312",
        "\tkvm_arch_vcpu_ioctl_run (inlined)",
        " => do_syscall_64",
        "=> do_syscall_64",
    ],
)
def test_call_chains_are_skipped_and_counted(line: str) -> None:
    log = parse(f"{PERF} {FAULT}\n{line}\n{line}\n\n{PERF} {FAULT}\n")
    assert (log.events, log.skipped) == (2, {"lines of call chains": 2})


@pytest.mark.parametrize(
    "stamp",
    [
        "[   12.000000] ",
        "[Mon Nov 30 08:00:00 2026] ",
        "[  +0.000012] ",
        "Nov 30 10:00:00 host kernel: ",
        "[Nov30 10:00] ",
    ],
)
def test_lines_of_the_kernel_s_log_around_a_dump_are_skipped_and_counted(stamp: str) -> None:
    log = parse(
        f"{stamp}BUG: kernel NULL pointer dereference, address: 0000000000000000\n"
        f"{stamp}Dumping ftrace buffer:\n{stamp}---------------------------------\n"
        f"{stamp}CPU 3/KV-4145       2..... 346278084us : {FAULT}\n"
    )
    assert (log.events, log.skipped) == (1, {"lines of the kernel's log": 3})


@given(count=st.integers(0, 10**6))
def test_what_perf_lost_is_counted(count: int) -> None:
    log = parse(f"{PERF} {FAULT}\n{PERF} PERF_RECORD_LOST lost {count}\n")
    assert (log.lost, log.ignored) == (count, {"PERF_RECORD_LOST": 1})


@pytest.mark.parametrize(
    ("line", "name", "help_"),
    [
        (" 0)               |  handle_ept_violation() {", "function_graph", "nop > current_tracer"),
        (" 1)   0.652 us    |  /* kvm_page_fault: vcpu 0 */", "function_graph", "nop > current_tracer"),
        ("  123.456789 |   1)   0.652 us    |  }", "function_graph", "nop > current_tracer"),
        (" ------------------------------------------", "function_graph", "nop > current_tracer"),
        ("     0.000 ( 0.004 ms): qemu/27004 ioctl(fd: 12, cmd: 1) = 0", "perf trace", "perf script"),
        ("         ? (         ): qemu/27004  ... [continued]: ioctl()) = 0", "perf trace", "perf script"),
        ("     0.015 qemu/27004 kvm:kvm_page_fault(vcpu_id: 0, fault_address: 33554432)", "perf trace", "perf script"),
        (f" [003] 12481.879123: kvm:{FAULT}", "without its task", "-F comm,pid,tid,cpu,time,event,trace"),
        (f"12481.879123:   kvm:{FAULT}", "without its task", "-F comm,pid,tid,cpu,time,event,trace"),
        (f"CPU 3/KVM 27004 [003]   kvm:{FAULT}", "without its time stamps", "-F comm,pid,tid,cpu,time,event,trace"),
        (f"kvm_page_fault{FAULT[14:]}", "without task and time", "context-info > trace_options"),
        (
            f"       CPU 3/KVM    4145   2 0 00000001 00000000 [0000000014a3b2c4] 346278.084ms (+0.012ms): {FAULT}",
            "verbose latency format",
            "noverbose",
        ),
        ("[pid 27004] ioctl(12, KVM_RUN, 0) = 0", "strace", "a file of its own"),
        ("27004 mmap(NULL, 8192, PROT_READ, 0x2, -1, 0) = 0x7ff16b0f6000", "strace", "a file of its own"),
        (f"{PERF} kvm_page_fault: vcpu_id=3 guest_rip=0x10 fault_address=541 error_code=6", "raw fields", "without -R"),
        (f"{PERF} kvm:kvm_page_fault: ", "without its fields", "-F +trace"),
    ],
)
def test_forms_that_are_not_read_are_named_with_what_helps(line: str, name: str, help_: str) -> None:
    with pytest.raises(InputError, match=rf"^log:2: .*{re.escape(name)}.*{re.escape(help_)}"):
        parse(f"{PERF} {FAULT}\n{line}\n")


@given(cut=st.integers(1, 200))
def test_a_last_line_without_newline_is_whole_or_refused(cut: int) -> None:
    event = "kvm_userspace_exit: reason KVM_EXIT_INTERNAL_ERROR (17)"
    line = f"{PERF} {event}"[:cut]
    whole = cut >= len(PERF) + 1 + len("kvm_userspace_exit:")
    text = f"{PERF} {FAULT}\n{line}"
    if not whole and line.strip():
        with pytest.raises(InputError, match=r"^log:2: "):
            parse(text)
        return
    log = parse(text)
    assert log.events == 1 + whole
    assert log.notes == ("its last line has no newline and is taken to be whole",) * whole


@pytest.mark.parametrize("filler", [" ", "1", "1 ", "(+1) ", "a=", "a=1 ", "-1", "x", "0x1 ", "=> "])
@pytest.mark.parametrize("front", ["", f"{PERF} ", f"{PERF} kvm_page_fault: ", " 0) ", "     0.000 ", "vm-1 [000] "])
def test_a_long_line_is_looked_at_as_fast_as_a_short_one(front: str, filler: str) -> None:
    """None of these ends, where shapes can be tried in as many ways as the line is long."""
    text = f"{PERF} {FAULT}\n{front}{filler * 100_000}!\n"
    with suppress(InputError):
        assert parse(text).events <= 2


def complaint(path: Path) -> str:
    """What reading a log complains of; nothing if it is read."""
    try:
        load(path)
    except InputError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("at", range(1, 120))
def test_a_line_that_was_cut_off_is_told_how_to_leave_out(tmp_path: Path, at: int) -> None:
    whole = f"vm-1 [000] ..... 1.000000: {FAULT}\n"
    path = tmp_path / "log"
    hints = "; if it is the rest of one: cut it off (tail -n +2)", "; if it is cut off: leave it out (head -n -1)"
    texts = whole[at:] + whole, whole + whole[at:] + whole, whole + whole[:at]
    for text, number, hint in zip(texts, (1, 2, 2), (hints[0], "", hints[1]), strict=True):
        path.write_text(text)
        said = complaint(path)
        assert said or at not in (20, 70)
        if said:
            assert said.startswith(f"{path}:{number}: ")
            assert [other for other in hints if said.endswith(other)] == [hint] * bool(hint)
