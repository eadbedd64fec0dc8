"""Which tool records, with which options, and what is said of those that do not."""

from __future__ import annotations

import pytest

from pgemu.errors import InputError
from pgemu.recording import tools
from pgemu.recording.tools import TOOLS, check_command, choose, ways_of
from pgemu.trace.events import Event
from recording_tools import Fakes, fakes as fakes

pytestmark = pytest.mark.same_with_checks

SOME = (Event("kvm", "kvm_page_fault"), Event("exceptions", "page_fault_user"))


@pytest.fixture(autouse=True)
def tracepoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with two events."""
    monkeypatch.setattr(tools, "_tracepoints", lambda: SOME)


def test_the_first_that_works_is_taken(fakes: Fakes) -> None:
    fakes.tool("strace")
    fakes.tool("valgrind")
    assert choose(None).tool == "valgrind"
    fakes.tool("perf", fail="echo no >&2; exit 1")
    assert choose(None).tool == "valgrind"
    fakes.tool("perf")
    assert choose(None).tool == "perf"
    assert choose("strace").tool == "strace"


def test_what_is_not_installed_is_told_with_its_package(fakes: Fakes) -> None:
    for tool, package in TOOLS.items():
        with pytest.raises(InputError, match=rf"^{tool}: not installed \(Debian: apt install {package}\)$"):
            choose(tool)
    with pytest.raises(InputError) as caught:
        choose(None)
    assert [part.split(":")[0] for part in str(caught.value).split("; ")] == list(TOOLS)


@pytest.mark.parametrize(
    ("tool", "privilege"),
    [
        ("perf", "kernel.perf_event_paranoid is "),
        ("trace-cmd", "it needs root"),
        ("strace", "ptrace: kernel.yama.ptrace_scope is "),
        ("valgrind", ""),
    ],
)
def test_what_is_not_permitted_is_told_in_one_line(fakes: Fakes, tool: str, privilege: str) -> None:
    fakes.tool(tool, fail="echo 'Operation not\npermitted' >&2; exit 3")
    with pytest.raises(InputError) as caught:
        choose(tool)
    said = str(caught.value)
    assert said.startswith(f"{tool}: does not work here: Operation not permitted")
    assert privilege in said
    assert "\n" not in said


def test_a_tool_that_says_nothing_has_its_status_told(fakes: Fakes) -> None:
    fakes.tool("strace", fail="exit 3")
    with pytest.raises(InputError, match=r"^strace: does not work here: exit status 3 "):
        choose("strace")


def test_perf_without_tracepoints_records_page_faults(fakes: Fakes) -> None:
    """Unprivileged users may count page faults of their own, but see no tracepoint."""
    fakes.tool("perf", fail='case "$*" in *kvm_page_fault*) echo "Permission denied" >&2; exit 1;; esac')
    way = choose("perf")
    assert way.what == "page-faults, without calls"
    assert way.record == ("record", "-q", "-c", "1", "-o", "{file}", "-e", "page-faults", "-d", "--")
    assert way.show[-1] == "comm,pid,tid,time,event,addr,ip,sym"


def test_events_are_those_that_the_kernel_has(monkeypatch: pytest.MonkeyPatch) -> None:
    perf, *_ = ways_of("perf")
    assert "kvm:kvm_page_fault,exceptions:page_fault_user" in perf.record
    assert perf.show[-2:] == ("-F", "comm,pid,tid,cpu,time,event,trace")
    (trace_cmd,) = ways_of("trace-cmd")
    assert trace_cmd.record == (
        *("record", "-q", "-F", "-c", "-e", "kvm:kvm_page_fault", "-e", "exceptions:page_fault_user"),
        *("-o", "{file}"),
    )
    monkeypatch.setattr(tools, "_tracepoints", tuple)
    assert ways_of("trace-cmd") == ()
    assert [way.what for way in ways_of("perf")] == ["page-faults, without calls"]


def test_text_has_the_options_that_its_readers_need() -> None:
    (valgrind,) = ways_of("valgrind")
    assert valgrind.record == ("--tool=lackey", "--trace-mem=yes", "--log-fd={fd}")
    (strace,) = ways_of("strace")
    assert strace.record[:3] == ("-f", "-ttt", "-e")
    assert strace.record[3].startswith("trace=%memory,ioctl,fallocate,")


def test_a_command_that_is_not_there_is_refused() -> None:
    check_command(["sh", "-c", "true"])
    for name in ("no-such-command", "/etc", "/etc/passwd"):
        with pytest.raises(InputError, match=f"^{name}: no such command, or it cannot be executed$"):
            check_command([name])
