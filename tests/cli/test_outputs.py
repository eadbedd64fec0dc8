"""What a command writes never replaces what it reads, and nothing that is not its own is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from announcement import complaints
from comparisons import lowered, mixed_records
from pgemu.cli import main
from pgemu.trace.readers import parquet

COMMANDS = {
    "replay": ("replay", "--design", "pfnmap", "--page-size", "2M"),
    "convert": ("trace", "convert"),
    "cut": ("trace", "cut", "--from", "+0s"),
    "merge": ("trace", "merge", "{trace}"),
}
OF_2M = ("--design", "pfnmap", "--page-size", "2M")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    parquet.write(lowered(mixed_records()), path)
    return path


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pgemu")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    return result.stderr


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_trace_is_not_written_over(command: str, link: str, trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.parquet"
    if link == "same":
        output = trace
    elif link == "symbolic":
        output.symlink_to(trace)
    else:
        os.link(trace, output)
    before = trace.read_bytes()
    arguments = [part.format(trace=trace) for part in COMMANDS[command]]
    assert "is the trace itself, expected another file" in refused(*arguments, trace, "-o", output)
    assert trace.read_bytes() == before


@pytest.mark.parametrize(
    "command", [*COMMANDS.values(), ("record", "--with", "strace"), ("workload", "make")], ids=lambda one: one[0:2]
)
def test_no_file_has_the_name_of_standard_output(
    command: tuple[str, ...], trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of = {"record": "true", "workload": "random"}.get(command[0], trace)
    arguments = [part.format(trace=trace) for part in command]
    assert "-: is not written to standard output" in refused(*arguments, "-o", "-", of)
    assert sorted(tmp_path.iterdir()) == [trace]


def test_a_checkpoint_is_a_file_of_its_own(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert "is the trace itself" in refused("replay", trace, *OF_2M, "-o", out, "--checkpoint", trace)
    assert "is the file of the outcomes" in refused("replay", trace, *OF_2M, "-o", out, "--checkpoint", out)
    assert not out.exists()


def test_a_folder_beside_a_checkpoint_that_holds_other_files_is_left_alone(trace: Path, tmp_path: Path) -> None:
    rows = tmp_path / "point.rows"
    (rows / "folder").mkdir(parents=True)
    (rows / "mine.txt").write_text("precious")
    out = tmp_path / "out.parquet"
    for more in ((), ("--resume",)):
        told = refused("replay", trace, *OF_2M, "-o", out, "--checkpoint", tmp_path / "point", *more)
        assert "point.rows: holds what no checkpoint wrote (folder), expected rows, or no such folder" in told
    assert (rows / "mine.txt").read_text() == "precious"
    assert (rows / "folder").is_dir()
    assert not out.exists()


def test_what_a_killed_run_left_beside_a_checkpoint_is_taken_over(trace: Path, tmp_path: Path) -> None:
    rows = tmp_path / "point.rows"
    rows.mkdir()
    for name in ("000000.parquet", ".pgemu-123-0a1b2c3d", "point"):
        (rows / name).write_text("half")
    out = tmp_path / "out.parquet"
    result = CliRunner().invoke(
        main, ["replay", str(trace), *OF_2M, "-o", str(out), "--checkpoint", str(tmp_path / "point")]
    )
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.iterdir()) == [out, trace]


def test_two_runs_have_no_checkpoint_in_common(trace: Path, tmp_path: Path) -> None:
    import fcntl

    rows = tmp_path / "point.rows"
    rows.mkdir()
    folder = os.open(rows, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as another run does
    out = tmp_path / "out.parquet"
    told = refused("replay", trace, *OF_2M, "-o", out, "--checkpoint", tmp_path / "point")
    assert "point: another run writes this checkpoint, expected another name" in told
    os.close(folder)
    assert rows.is_dir()


def test_the_same_run_twice_is_refused(trace: Path, tmp_path: Path) -> None:
    told = refused("replay", trace, "--page-size", "2M", "--vary", "design=pfnmap,pfnmap", "-o", tmp_path / "runs")
    assert "--vary: the same run twice, expected values that differ" in told
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_leaves_nothing_beside_a_checkpoint(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pgemu.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); main(sys.argv[1:], prog_name='pgemu')"
    )
    options = ["--set", "operations=20000", *OF_2M, "--checkpoint-every", "1000"]
    files = ["-o", str(tmp_path / "out.parquet"), "--checkpoint", str(tmp_path / "point")]
    ran = subprocess.run(
        [sys.executable, "-c", code, "replay", "workload:random", *options, *files], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert complaints(ran.stderr).endswith("File too large\n")
    assert not list(tmp_path.iterdir())


def test_outcomes_are_named_where_a_trace_is_expected(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    ran = CliRunner().invoke(main, ["replay", str(trace), *OF_2M, "-o", str(out)])
    assert ran.exit_code == 0, ran.output
    assert f"{out}: this is the outcomes of pgemu replay" in refused("trace", "info", out)


def test_a_log_of_nothing_is_no_vms(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(" ls-9 [000] ..... 1.000001: kvm_weird_event: a=1\n")
    told = CliRunner().invoke(main, ["trace", "info", str(log)]).stdout
    assert told.startswith(f"{log}: nothing that concerns memory, 0 records\n")
    assert "at first" not in told
