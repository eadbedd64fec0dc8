"""Whatever the kernel, trace-cmd or perf can print of an event: it is read, or refused with what helps.

The printers below follow kernel/trace/trace_output.c (trace_print_context(), trace_print_lat_context()), trace-cmd's
tracecmd/trace-read.c (trace_show_data()) and tools/perf/builtin-script.c (perf_sample__fprintf_start()).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace.forms import is_quoted
from pgemu.trace.log import Log
from pgemu.trace.readers.ftrace import _Parser, read

pytestmark = pytest.mark.same_with_checks

FLAGS = ["....", "d..1.", ".....", "dNh1.", "D.s..", "bL.2.", "d..2..", "..Zff"]


@dataclass(frozen=True)
class Event:
    """A guest fault as the tracer has it; times in nanoseconds."""

    comm: str
    tid: int
    process: int | None
    cpu: int
    flags: str
    time: int
    vcpu: int
    address: int

    @property
    def fields(self) -> str:
        return f"vcpu {self.vcpu} rip 0x10 address {self.address:#018x} error_code 0x181"


Printer = Callable[[list[Event]], str]
_COLUMNS = re.compile(r"(?:^|[- ])\s*-?\d+(/-?\d+)?(\s+\(\s*(\d+|-+)\))?(\s+\[\d+\])?\s")


def names(most: int = 15) -> st.SearchStrategy[str]:
    """Names of threads: blanks, colons, brackets, dashes; not those that look like the columns behind them."""
    # In the latency format a line begins with the name: one with a mail's mark is taken for a quoted line.
    odd = st.sampled_from(["<...>", "<idle>", "CPU 0/KVM", "a: b", "[x] y", "--", "w-1", "#1", "k/0:1-ev", "1/2", "3"])
    drawn = st.from_regex(r"[!-~]([ -~]{0,13}[!-~])?", fullmatch=True)
    return (odd | drawn).filter(
        lambda name: len(name) <= most and not _COLUMNS.search(f"{name} ") and not is_quoted(name)
    )


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    """Faults of a few threads, each with a name and a process."""
    tids = draw(st.lists(st.integers(1, 4194304), min_size=1, max_size=3, unique=True))
    processes = {tid: draw(st.none() | st.integers(1, 4194304)) for tid in tids}
    comms = {tid: draw(names()) for tid in tids}
    found = []
    for _ in range(draw(st.integers(1, 6))):
        tid = draw(st.sampled_from(tids))
        found.append(
            Event(
                comms[tid], tid, processes[tid], draw(st.integers(0, 1023)), draw(st.sampled_from(FLAGS)),
                draw(st.integers(0, 10**15)), draw(st.integers(0, 63)), draw(st.integers(0, (1 << 46) - 1)),
            )
        )  # fmt: skip
    return found


def seconds(time: int, digits: int) -> str:
    return f"{time // 10**9}.{time % 10**9 // 10 ** (9 - digits):0{digits}}"


def check(text: str, wanted: list[Event], digits: int, *, process: bool, ticks: bool = False) -> None:
    log = parse(text)
    assert log.unknown == {}, text
    assert log.events == log.inputs["kvm_page_fault"] == len(wanted), text
    unit = 1 if ticks else 10 ** (9 - digits)
    times = [event.time // unit * unit for event in wanted]
    assert any("time goes back" in note for note in log.notes) == (times != sorted(times)), text
    for row, event in zip(log.rows.tolist(), sorted(wanted, key=lambda event: event.time // unit), strict=True):
        task = log.tasks[row[2]]
        assert row[4:7] == [event.address, 0x181, event.vcpu], text
        assert row[1] == event.time // unit * unit, text
        assert (task.tid, task.process) == (event.tid, event.process if process else None), text


def parse(text: str) -> Log:
    parser = _Parser("log")
    parser.feed(text)
    return parser.finish()


# --------------------------------------------------------------------------- ftrace


@settings(max_examples=300)
@given(found=events(), tgid=st.booleans(), irq=st.booleans(), ticks=st.booleans(), header=st.booleans())
def test_what_trace_and_trace_pipe_print(found: list[Event], tgid: bool, irq: bool, ticks: bool, header: bool) -> None:
    """With record-tgid or not, with irq-info or not, with a clock that counts time or not."""
    lines = ["# tracer: nop", "#", "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION"] if header else []
    for event in found:
        process = "" if not tgid else "(-------) " if event.process is None else f"({event.process:>7}) "
        flags = event.flags if irq else ""
        stamp = f" {event.time:12}" if ticks else f" {event.time // 10**9:5}.{event.time % 10**9 // 1000:06}"
        context = f"{event.comm:>16}-{event.tid:<7} {process}[{event.cpu:03}] {flags}{stamp}: "
        lines.append(f"{context}kvm_page_fault: {event.fields}")
    check("\n".join(lines) + "\n", found, 6, process=tgid, ticks=ticks)


@given(
    found=events(), ticks=st.booleans(), mark=st.sampled_from(" +!#*@$"),
    printk=st.sampled_from(
        ["", "[   12.345678] ", "<4>[    2.000000][  T33] ", "Nov 30 10:00:00 a kernel: [1.000000] ",
         "Nov 30 10:00:00 host kernel: ", "[Mon Nov 30 08:00:00 2026] ", "[Nov30 10:00] ", "[  +0.000012] "]
    ),
)  # fmt: skip
def test_what_the_latency_format_and_an_oops_print(found: list[Event], ticks: bool, mark: str, printk: str) -> None:
    lines = []
    for event in found:
        assume(not _COLUMNS.search(f"{event.comm[:8]} "))
        stamp = f" {event.time:4}" if ticks else f" {event.time // 1000:4}us{mark}"
        context = f"{printk}{event.comm[:8]:>8}-{event.tid:<7} {event.cpu:3}{event.flags}{stamp}"
        lines.append(f"{context}: kvm_page_fault: {event.fields}")
    check("\n".join(lines) + "\n", found, 6, process=False, ticks=ticks)


# --------------------------------------------------------------------------- trace-cmd report


@settings(max_examples=200)
@given(found=events(), nanoseconds=st.booleans(), latency=st.booleans(), diff=st.booleans(), breaks=st.booleans())
def test_what_trace_cmd_report_prints(
    found: list[Event], nanoseconds: bool, latency: bool, diff: bool, breaks: bool
) -> None:
    """With -t, -l, --ts-diff, --debug's starts of buffers."""
    lines = ["version = 7", "CPU 3 is empty", "cpus=4"]
    digits, last = 9 if nanoseconds else 6, 0
    for event in found:
        if breaks:
            lines.append(f"CPU:{event.cpu} [SUBBUFFER START]")
        if latency:
            assume(not _COLUMNS.search(f"{event.comm[:8]} "))
            context = f"{event.comm[:8]:>8}-{event.tid:<5} {event.cpu:3}{event.flags}"
        else:
            context = f"{event.comm:>16}-{event.tid:<5} [{event.cpu:03}]"
        change = f"(+{abs(event.time - last) // 1000})" if last else ""
        column = f" {change:8}" if diff else ""
        last = event.time
        lines.append(f"{context} {seconds(event.time, digits):>12}:{column} kvm_page_fault:       {event.fields}")
    check("\n".join(lines) + "\n", found, digits, process=False)


def test_what_trace_cmd_dropped_is_counted() -> None:
    fault = "qemu-1 [000] 1.000000: kvm_page_fault:       vcpu 0 rip 0x0 address 0x1000 error_code 0x181\n"
    lost = "CPU:1 [5 EVENTS DROPPED]\nCPU:3 [EVENTS DROPPED]\nCPU:0 [LOST 12 EVENTS]\nCPU:0 [LOST EVENTS]\n"
    assert parse(fault + lost + fault).lost == 19


# --------------------------------------------------------------------------- perf script

_TAILS = (
    " ffffffff8175336a handle_ept_violation+0x28a ([kernel.kallsyms])",
    " ffffffff8175336a [unknown] ([unknown])",
    "                0",
    "               1                0 ffffffff8175336a",
    " /machine.slice/a",
    " unknown",
    " 0xffffffff8175336a/0xffffffff8175336b/P/-/-/1",
    " ABI:2    AX:0x1    BX:0x2",
    " ilen: 3 insn: 0f 01 c1",
)


@settings(max_examples=300)
@given(
    found=events(), comm=st.booleans(), ids=st.sampled_from(["tid", "pid,tid"]), cpu=st.sampled_from(["", "cpu", "-L"]),
    misc=st.sampled_from(["", "K", "KUH", "KGg", "G"]), digits=st.sampled_from([6, 9]), period=st.booleans(),
    width=st.integers(0, 40), tail=st.sampled_from(["", *_TAILS]), chain=st.booleans(), header=st.booleans(),
)  # fmt: skip
def test_what_perf_script_prints(
    found: list[Event], comm: bool, ids: str, cpu: str, misc: str, digits: int, period: bool, width: int, tail: str,
    chain: bool, header: bool,
) -> None:  # fmt: skip
    """With any of -F comm, pid, tid, cpu, misc, time, period, event, ip, sym, addr, weight, cgroup; --ns, -L, -g."""
    lines = ["# ========", "# captured on    : Mon Nov 30 08:00:00 2026", "# ========", "#"] if header else []
    for event in found:
        process = event.process if event.process is not None else -1
        name = "" if not comm and cpu != "-L" else f"{event.comm[:8]:>8} " if cpu == "-L" else f"{event.comm:>16} "
        assume(not _COLUMNS.search(f"{name.strip()} "))
        number = f"{event.tid:7} " if ids == "tid" else f"{process:7}/{event.tid:<7} "
        assume(process > 0 or ids == "tid" or cpu != "-L")
        where = {"": "", "cpu": f"[{event.cpu:03}] ", "-L": f"{event.cpu % 1000:3} "}[cpu]
        kind = f"{misc:6}" if misc and cpu == "cpu" else ""
        count = f"{1:10} " if period else ""
        lines.append(
            f"{name}{number}{where}{kind}{seconds(event.time, digits):>12}: {count}{'kvm:kvm_page_fault':>{width}}: "
            f"{event.fields}{'' if chain else tail}"
        )
        if chain:
            lines += [
                "\tffffffff8175336a handle_ept_violation+0x28a ([kernel.kallsyms])",
                "\t    7f3a1c51a94f ioctl",
                "",
            ]
    check("\n".join(lines) + "\n", found, digits, process=ids == "pid,tid")


@given(tail=st.sampled_from(["", *_TAILS]), value=st.sampled_from([0, 0x7F0000200000, (1 << 64) - 22]))
def test_a_call_s_return_is_read_in_front_of_perf_s_other_columns(tail: str, value: int) -> None:
    head = "qemu 1/1 [000] 1.000000: syscalls:"
    call = "sys_enter_mmap: addr: 0x00000000, len: 0x00002000, prot: 0x3, flags: 0x22, fd: 0xffffffff, off: 0x00000000"
    log = parse(f"{head}{call}{tail}\n{head}sys_exit_mmap: {value:#x}{tail}\n")
    assert log.outcomes == {"sys_mmap return": 1}
    assert (log.rows[0, 4], log.rows[0, 9]) == ((0, 1) if value > 1 << 63 else (value, 0))


@given(st.text("ghijklxyz!?=", min_size=1, max_size=20))
def test_what_no_column_of_perf_is_is_refused_behind_fields(tail: str) -> None:
    event = "kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x181"
    for head in ("qemu 1 [000] 1.000000: kvm:", "qemu-1 [000] ..... 1.000000: "):
        with pytest.raises(InputError, match="malformed kvm_page_fault"):
            parse(f"{head}{event} {tail}\n")
    with pytest.raises(InputError, match="malformed kvm_page_fault"):  # nobody but perf prints columns there
        parse(f"qemu-1 [000] ..... 1.000000: {event} ffffffff8175336a\n")


# --------------------------------------------------------------------------- what is lost, and what is in between

FAULT = "kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x181"
HEAD = "qemu-1 [000] ..... 1.000000: "


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (HEAD + "kvm_mmu_page_fault <-npf_interception", "<function>"),
        (HEAD + "kvm_unmap_hva_range <-kvm_mmu_notifier_invalidate_range_start", "<function>"),
        (HEAD + "function:             kvm_mmu_page_fault <-- npf_interception", "function"),
        (HEAD + "kernel_stack:         <stack trace >\n=> kvm_mmu_page_fault (ffffffffc0a2b3c4)", "kernel_stack"),
        (HEAD + "tracing_mark_write: kvm_page_fault: not one", "tracing_mark_write"),
        (HEAD + "bprint:               do_work: kvm_page_fault: not one", "bprint"),
        ("qemu 1 [000] 1.000000: PERF_RECORD_COMM exec: qemu:1/1", "PERF_RECORD_COMM"),
        ("qemu 1 [000] 1.000000: PERF_RECORD_SWITCH OUT preempt", "PERF_RECORD_SWITCH"),
    ],
)
def test_what_is_no_event_of_the_kernel_s_subsystems_is_named(line: str, name: str) -> None:
    log = parse(f"{HEAD}{FAULT}\n{line}\n{HEAD}{FAULT}\n")
    assert (log.ignored, log.unknown, log.inputs) == ({name: 1}, {}, {"kvm_page_fault": 2})


@pytest.mark.parametrize("event", ["sys_enter: NR 28 (7f31b1600000, 200000, 4, 0, 0, 0)", "sys_exit: NR 28 = 0"])
def test_raw_system_calls_are_no_returns(event: str) -> None:
    log = parse(f"{HEAD}{event}\n")
    assert (log.unknown, log.outcomes) == ({event.partition(":")[0]: 1}, {})


@pytest.mark.parametrize("prefix", ["host.dat: ", "  guest-1:   ", "log.txt:"])
def test_what_stands_in_front_of_a_task_s_name_is_refused(prefix: str) -> None:
    with pytest.raises(InputError, match=r"^log:2: something stands in front of the task's name: '.*trace-cmd report"):
        parse(f"{HEAD}{FAULT}\n{prefix}       CPU 0/KVM-2 [000] ..... 1.000000: {FAULT}\n")


def test_events_of_a_guest_s_own_kernel_are_refused() -> None:
    with pytest.raises(InputError, match=r"^log:1: an event of a guest's own kernel"):
        parse(f"VM:  312 VCPU:003 CPU 3/KVM 27004 [003] 1.000000: kvm:{FAULT}\n")


@pytest.mark.parametrize(
    ("line", "name", "help_"),
    [
        ("  host.dat: cpus=4", "several files or instances", "report one alone"),
        ("27004 3 12481879123456 type: 312", "ftrace's raw format", "noraw > trace_options"),
        ("6a7c0000 03 ffff8881 00", "ftrace's hex format", "nohex > trace_options"),
        ("0x7f8 [0x60]: PERF_RECORD_SAMPLE(IP, 0x1)", "raw dump of perf", "without -D"),
        ("[10:00:00.123456789] (+?.?????????) a kvm_page_fault: { cpu_id = 3 }", "babeltrace", "ftrace, trace-cmd"),
        ("Attaching 3 probes...", "bpftrace", "ftrace, trace-cmd or perf"),
        ("kvm_convert_memory start 0x0 size 0x1000 shared_to_private", "QEMU's -trace", "--input-format qemu-log"),
        (f"kvm:{FAULT}", "perf script with other columns", "-F comm,pid,tid,cpu,time,event,trace"),
        (f"CPU 3/KVM [003] 12481.879123: kvm:{FAULT}", "perf script without its task", "-F comm,pid,tid,cpu,time"),
        (f"qemu 1 [000] 2026-11-30 08:00:00.123456 1.0: kvm:{FAULT}", "perf script", "-F comm,pid,tid,cpu,time"),
        (HEAD + "kvm_page_fault: vcpu_id=0x3 (3) fault_address=0x84123 (540963)", "raw fields", "nofields"),
        (
            "CPU 3/KV-2704   3-0x1 12.345678: kvm_page_fault:       vcpu_id=3 fault_address=8",
            "raw fields",
            "without -R",
        ),
    ],
)
def test_other_forms_are_named_with_what_helps(line: str, name: str, help_: str) -> None:
    with pytest.raises(InputError, match=rf"^log:2: .*{re.escape(name)}.*{re.escape(help_)}"):
        parse(f"{HEAD}{FAULT}\n{line}\n")


@pytest.mark.parametrize("blank", ["\t", "\xa0", "\u2003"])
def test_other_blanks_of_a_copied_log_are_blanks(blank: str) -> None:
    for line in (f"{HEAD}{FAULT}", f"qemu 1/1 [000] 1.000000:  1 kvm:{FAULT}"):
        log = parse(f"{line.replace(' ', blank)}\n{line}\n")
        assert (log.unknown, log.inputs) == ({}, {"kvm_page_fault": 2})
        assert log.rows[0, 4:].tolist() == log.rows[1, 4:].tolist()


@given(found=events(), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), packed=st.booleans())
def test_files_of_other_systems(
    found: list[Event], end: str, bom: bool, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Line ends and the mark at the beginning that Windows writes; compressed or not."""
    text = end.join(f"{event.comm:>16}-{event.tid} [000] ..... 1.000000: {FAULT}" for event in found)
    data = b"\xef\xbb\xbf" * bom + (text + end).encode()
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(gzip.compress(data) if packed else data)
    log = read(path)
    assert [log.tasks[row[2]].tid for row in log.rows.tolist()] == [event.tid for event in found]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "log"
    path.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") + f"{HEAD}{FAULT}\n".encode(encoding))
    with pytest.raises(InputError, match="text in UTF-16, expected UTF-8: convert it with iconv"):
        read(path)
