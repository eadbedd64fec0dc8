"""A command under a tool: its status, what was recorded, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.recording import tools
from pgemu.recording.run import run
from pgemu.recording.sink import opened
from pgemu.recording.tools import choose
from pgemu.trace.readers import ftrace
from recording_tools import Fakes, fakes as fakes, way_or_skip

pytestmark = pytest.mark.same_with_checks

FEW = ("page_fault_user", "sys_enter_mmap", "sys_exit_mmap")


def recorded(tool: str, command: list[str], path: Path) -> tuple[int | None, str]:
    """Record with a tool that works here; status and text."""
    way = way_or_skip(tool)
    with opened(str(path)) as sink:
        ran = run(way, command, sink)
    assert not ran.stopped
    text = path.read_text(errors="replace")
    assert sink.lines == text.count("\n")
    return ran.status, text


# --------------------------------------------------------------------------- stand-ins


@pytest.mark.parametrize("tool", ["valgrind", "strace"])
@pytest.mark.parametrize("status", [0, 3])
def test_text_goes_through_a_pipe(fakes: Fakes, tmp_path: Path, tool: str, status: int) -> None:
    fakes.tool(tool)
    fakes.add("program", f"#!/bin/sh\necho ran > {tmp_path}/ran\nexit {status}\n")
    assert recorded(tool, ["program"], tmp_path / "out") == (status, f"first {tool}\nlast {tool}\n")
    assert (tmp_path / "ran").read_text() == "ran\n"


def test_recordings_are_printed(fakes: Fakes, tmp_path: Path) -> None:
    fakes.tool("perf")
    fakes.add("program", "#!/bin/sh\nexit 7\n")
    status, text = recorded("perf", ["program", "-o", "x"], tmp_path / "out")
    assert status == 7
    assert text.startswith("printed: recorded ")
    assert fakes.calls()[-2].endswith("-- program -o x")
    assert fakes.calls()[-1].startswith("perf script --show-lost-events -i ")


def test_a_tool_that_cannot_print_is_told(fakes: Fakes, tmp_path: Path) -> None:
    fakes.tool("perf", unprintable=True)
    with pytest.raises(InputError, match=r"^perf cannot print what it recorded: bad magic$"):
        recorded("perf", ["true"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tool_that_records_nothing_is_told(fakes: Fakes, tmp_path: Path) -> None:
    fakes.tool("strace")
    way = choose("strace")
    fakes.tool("strace", fail="exit 9")
    told = r"^strace recorded nothing \(exit status 9\)$"
    with pytest.raises(InputError, match=told), opened(str(tmp_path / "out")) as sink:
        run(way, ["true"], sink)
    assert not (tmp_path / "out").exists()


def test_a_child_that_lives_on_does_not_keep_the_recording_open(fakes: Fakes, tmp_path: Path) -> None:
    fakes.tool("strace")
    way = choose("strace")
    fakes.add("program", f"#!/bin/sh\n/bin/sleep 60 &\necho $! > {tmp_path}/pid\n")
    with opened(str(tmp_path / "out")) as sink:
        assert run(way, ["program"], sink).status == 0
    assert sink.lines == 2
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("tool", "number"), [("strace", "SIGINT"), ("strace", "SIGTERM"), ("perf", "SIGINT")])
def test_ctrl_c_ends_the_command_and_keeps_what_there_is(fakes: Fakes, tmp_path: Path, tool: str, number: str) -> None:
    fakes.tool(tool)
    begun = tmp_path / "begun"
    program = f"""#!/bin/sh
        trap 'kill $! 2>/dev/null; exit 5' INT TERM
        /bin/sleep 60 >/dev/null 2>&1 &
        echo > {begun}
        wait
    """
    fakes.add("program", program)
    command = [sys.executable, "-m", "pgemu", "record", "--with", tool, "-o", str(tmp_path / "out"), "program"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        for _ in range(600):
            if begun.exists():
                break
            time.sleep(0.05)
        os.killpg(process.pid, getattr(signal, number))
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"stopped early\n")
    assert (tmp_path / "out").read_text() != ""
    assert sorted(one.name for one in tmp_path.iterdir()) == ["begun", "bin", "log", "out"]


@pytest.mark.parametrize("tool", ["strace", "perf"])
@pytest.mark.parametrize("whom", ["group", "record alone"])
def test_the_command_gets_one_sigint_whoever_else_got_it(fakes: Fakes, tmp_path: Path, tool: str, whom: str) -> None:
    fakes.tool(tool)
    begun, got = tmp_path / "begun", tmp_path / "got"
    program = f"""#!/bin/sh
        trap 'echo INT >> {got}' INT
        trap 'echo TERM >> {got}' TERM
        echo > {begun}
        for second in 1 2 3 4 5 6 7 8 9; do
            /bin/sleep 0.3
            [ -e {got} ] && break
        done
        /bin/sleep 0.5
        exit 5
    """
    fakes.add("program", program)
    command = [sys.executable, "-m", "pgemu", "record", "--with", tool, "-o", str(tmp_path / "out"), "program"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        for _ in range(600):
            if begun.exists():
                break
            time.sleep(0.05)
        if whom == "group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"stopped early\n")
    assert got.read_text() == "INT\n"


def test_sigterm_ends_what_the_command_began_too(tmp_path: Path) -> None:
    way_or_skip("strace")  # which waits for all that it traces
    pid, script = tmp_path / "pid", "sleep 60 & echo $! > {}; wait"
    arguments = ["--with", "strace", "-o", str(tmp_path / "out"), "sh", "-c", script.format(pid)]
    command = [sys.executable, "-m", "pgemu", "record", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(600):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.05)
        process.terminate()  # it alone, not its group
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"the command was ended by SIGTERM, stopped early\n")
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not state.exists() or ") Z " in state.read_text()


# --------------------------------------------------------------------------- what is installed


def test_perf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tools._tracepoints()  # each takes time to open and close
    monkeypatch.setattr(tools, "_tracepoints", lambda: tuple(one for one in here if one.name in FEW))
    status, text = recorded("perf", ["sh", "-c", "exit 3"], tmp_path / "out")
    assert status == 3
    assert "page_fault_user:" in text or "page-faults" in text
    if "page_fault_user:" in text:
        log = ftrace.read(tmp_path / "out")
        assert log.inputs["page_fault_user"] > 10
        assert not log.unknown


def test_trace_cmd(tmp_path: Path) -> None:
    status, _ = recorded("trace-cmd", ["true"], tmp_path / "out")
    assert status is None  # it does not tell
    log = ftrace.read(tmp_path / "out")
    assert log.inputs["page_fault_user"] > 10
    assert not log.unknown


def test_strace(tmp_path: Path) -> None:
    status, text = recorded("strace", ["sh", "-c", "exit 3"], tmp_path / "out")
    assert status == 3
    lines = text.splitlines()
    assert "execve(" in lines[0]
    assert lines[-1].endswith("+++ exited with 3 +++")
    assert any(" mmap(" in line for line in lines)
    assert all(line.split()[0].isdecimal() and float(line.split()[1]) > 1e9 for line in lines)


def test_valgrind(tmp_path: Path) -> None:
    status, text = recorded("valgrind", ["sh", "-c", "exit 3"], tmp_path / "out")
    assert status == 3
    kinds = {line[:2] for line in text.splitlines()}
    assert {"I ", " L", " S", " M", "=="} >= kinds >= {"I ", " L", " S"}


def test_a_command_that_is_killed(tmp_path: Path) -> None:
    status, _ = recorded("strace", ["sh", "-c", "kill -9 $$"], tmp_path / "out")
    assert status == -9
