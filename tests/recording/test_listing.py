"""Lines for a machine where pgemu is not: a shell takes them, and they ask for the events that pgemu reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pgemu.recording.listing import WITH, shell_lines
from pgemu.trace import events
from pgemu.trace.events import CALLS, EXPECTED, IGNORED, OUTCOMES, PROBE, RECORDED, event_name

pytestmark = pytest.mark.same_with_checks


@pytest.mark.parametrize("tool", WITH)
@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_shells_parse_them(tool: str, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n"], input=shell_lines(tool), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(len(line) <= 120 for line in shell_lines(tool).splitlines())


def test_the_table_has_every_input_and_nothing_that_is_not_read() -> None:
    read = {event_name(f"{event}:") for event in RECORDED}
    assert read >= EXPECTED.keys() - {"kvm_memslot"}  # which is the probe
    returns = {f"{call} return" for call in CALLS}
    assert read - EXPECTED.keys() <= OUTCOMES | CALLS | returns
    assert read & IGNORED <= CALLS | {"kvm_hypercall"}  # others than nr 12
    assert len(set(RECORDED)) == len(RECORDED)


def test_the_probe_prints_what_is_read() -> None:
    assert re.findall(r"(\w+)=", PROBE) == ["slot", "flags", "gpa", "size", "hva"]
    printed = "kvm_memslot: (kvm_set_memory_region+0x0/0x5d0) slot=1 flags=0x4 gpa=0x0 size=0x1000 hva=0x7f0000000000"
    assert events.pattern("kvm_memslot").fullmatch(printed)


# --------------------------------------------------------------------------- run, on a stand-in for tracefs

HERE = [event for event in RECORDED if event.name not in ("kvm_vm_set_mem_attributes", "unmap")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tracefs"
    for event in HERE:
        (root / "events" / event.system / event.name).mkdir(parents=True)
    (root / "events" / "kprobes" / "kvm_memslot").mkdir(parents=True)
    (root / "trace_pipe").write_text("a line\n")
    return root


def run(tool: str, tree: Path, folder: Path) -> list[str]:
    """Run the lines with stand-ins for the tools; what these were called with."""
    bin_ = folder / "bin"
    bin_.mkdir()
    for name in ("perf", "trace-cmd"):
        script = f'#!/bin/sh\necho "$*" >> {folder}/log\ncase $1 in script|report) echo a line;; esac\n'
        (bin_ / name).write_text(script)
        (bin_ / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "T": str(tree), "S": "1"}
    done = subprocess.run(
        ["sh", "-e"], input=shell_lines(tool), capture_output=True, text=True, cwd=folder, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "trace.txt").read_text() == "a line\n"
    probe = (tree / "kprobe_events").read_text()
    assert re.fullmatch(r"p:kvm_memslot (__)?kvm_set_memory_region " + re.escape(PROBE) + r"\n", probe)
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_trace_cmd_records_what_the_kernel_has(tree: Path, tmp_path: Path) -> None:
    recorded, printed = run("trace-cmd", tree, tmp_path)
    chosen = ["kprobes:kvm_memslot", *map(str, HERE)]
    assert recorded == " ".join(["record", *(f"-e {event}" for event in chosen), "-o trace.dat sleep 1"])
    assert printed == "report -i trace.dat"


def test_perf_records_what_the_kernel_has(tree: Path, tmp_path: Path) -> None:
    recorded, printed = run("perf", tree, tmp_path)
    chosen = ",".join(["kprobes:kvm_memslot", *map(str, HERE)])
    assert recorded == f"record -a -c 1 -e {chosen} -o perf.data -- sleep 1"
    assert printed == "script --show-lost-events -i perf.data -F comm,pid,tid,cpu,time,event,trace"


def test_tracefs_alone_turns_them_on_and_off_again(tree: Path, tmp_path: Path) -> None:
    assert run("tracefs", tree, tmp_path) == []
    enabled = sorted(str(one.parent.relative_to(tree / "events")) for one in tree.rglob("enable"))
    assert enabled == sorted(["kprobes/kvm_memslot", *(f"{event.system}/{event.name}" for event in HERE)])
    assert {one.read_text() for one in tree.rglob("enable")} == {"0\n"}
    assert (tree / "buffer_size_kb").read_text() == "65536\n"
