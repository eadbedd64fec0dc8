"""`pgemu record`: what it says, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main
from pgemu.recording import tracefs
from pgemu.recording.listing import WITH, shell_lines
from pgemu.trace.events import PROBE
from recording_tools import Fakes, fakes as fakes

pytestmark = pytest.mark.same_with_checks


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["record", *args])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said, in one line, with exit status 2."""
    with pytest.raises(SystemExit) as end:
        main(["record", *args], prog_name="pgemu")
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("pgemu: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("tool", "status", "told"),
    [
        ("strace", "0", "strace (calls), 2 lines; the command's exit status is 0"),
        ("valgrind", "4", "valgrind (every access), 2 lines; the command's exit status is 4"),
        ("perf", "4", "1 line; the command's exit status is 4"),
    ],
)
def test_a_command_is_recorded_whatever_its_status(
    fakes: Fakes, tmp_path: Path, tool: str, status: str, told: str
) -> None:
    fakes.tool(tool)
    fakes.add("program", f"#!/bin/sh\nexit {status}\n")
    path = tmp_path / "out"
    for arguments in (["--", "program", "-x"], ["program", "-o", "y"]):  # what follows the command is its own
        result = invoke("-o", str(path), *arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"{path}: {tool} (")
        assert result.stdout.endswith(f"{told}\n")
        assert path.exists()


def test_a_tool_that_does_not_tell_the_status(fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgemu.recording.tools._tracepoints", lambda: tracefs.RECORDED[:2])
    fakes.tool("trace-cmd")
    result = invoke("--with", "trace-cmd", "-o", str(tmp_path / "out"), "true")
    assert result.stdout.endswith("1 line; the command's exit status is not told by this tool\n")


def test_a_command_that_a_signal_ends(fakes: Fakes, tmp_path: Path) -> None:
    fakes.tool("perf")
    fakes.add("program", "#!/bin/sh\nkill -9 $PPID\n")  # as perf ends itself by its command's signal
    result = invoke("-o", str(tmp_path / "out"), "program")
    assert result.stdout.endswith("the command was ended by SIGKILL\n")
    result = invoke("-o", str(tmp_path / "out.parquet"), "program")
    assert result.stdout.endswith(
        "out.parquet: text, whatever its name says; pgemu trace convert makes a table of it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x"], "nothing to record: expected one of COMMAND, --pid, --kvm, --events (pgemu record --help)"),
        (["--pid", "1", "--events"], "--pid and --events at once: expected one of COMMAND, --pid, --kvm, --events "),
        (["true"], "-o: expected a file to write to"),
        (["--events", "-o", "x"], "-o: --events prints"),
        (["--with", "perf", "--events"], "--with: expected COMMAND with it, not --events"),
        (["--for", "perf", "-o", "x", "true"], "--for: expected --events with it, not COMMAND"),
        (["--task", "a", "-o", "x", "true"], "--task: expected --kvm with it, not COMMAND"),
        (["--buffer", "1M", "-o", "x", "--pid", "1"], "--buffer: expected --kvm with it, not --pid"),
        (["-o", "/nowhere/x", "true"], "/nowhere/x: cannot be written: /nowhere is no directory"),
        (["-o", "/", "true"], "/: cannot be written: Is a directory"),
        (["-o", "x", "no-such-command"], "no-such-command: no such command, or it cannot be executed"),
        (["-o", "x", "--kvm", "0"], "Invalid value for '--kvm': 0.0 is not in the range x>0."),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_is_not_installed(fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--with", "valgrind", "-o", str(tmp_path / "x"), "true")
    assert said == "valgrind: not installed (Debian: apt install valgrind)"
    assert not (tmp_path / "x").exists()


def test_without_a_name_lines_for_every_tool_are_printed() -> None:
    assert invoke("--events").stdout == "\n".join(map(shell_lines, WITH))
    for tool in WITH:
        assert invoke("--events", "--for", tool).stdout == shell_lines(tool)


def test_the_help_of_compare_has_the_same_probe() -> None:
    shown = " ".join(CliRunner().invoke(main, ["compare", "--help"]).stdout.split())
    assert all(field in shown for field in PROBE.split())


def test_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    result = invoke("--pid", str(os.getpid()), "-o", str(path))
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{path}: process {os.getpid()} (")
    assert " pages present" in result.stdout
    assert zipfile.is_zipfile(path)


def test_events_of_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(seconds: float, sink: object, **options: object) -> tracefs.Recorded:
        asked.append((seconds, options))
        return tracefs.Recorded(seconds, ("map", "kvm_memslot (no kprobes)"), True)

    monkeypatch.setattr(tracefs, "record", record)
    result = invoke("--kvm", "1.5", "--task", "a", "--task", "b*", "--buffer", "8M", "-o", str(tmp_path / "out"))
    assert asked == [(1.5, {"tasks": ("a", "b*"), "buffer": 8 << 20})]
    told = "1.5 s, 0 lines, stopped early; not in this kernel: map, kvm_memslot (no kprobes)"
    assert result.stdout == f"{tmp_path / 'out'}: {told}\n"


def test_help_and_lines_load_no_compiler_and_no_arrow() -> None:
    for arguments in (["record", "--help"], ["record", "--events"]):
        code = (
            f"import sys\nfrom pgemu.cli import main\ntry: main({arguments})\n"
            "except SystemExit: print(*{'numba', 'llvmlite', 'pyarrow'} & set(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not done.stderr.strip()
