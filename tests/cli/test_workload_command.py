"""`pgemu workload`: the table of synthetic traces, and a stored one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgemu import workload
from pgemu.cli import main
from pgemu.trace import load

pytestmark = pytest.mark.same_with_checks


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["workload", *args])


def test_the_list_has_each_with_its_parameters_and_defaults() -> None:
    lines = invoke("list").stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(workload.WORKLOADS)
    text = " ".join(" ".join(lines).split())
    for name, row in workload.WORKLOADS.items():
        assert f"{name} what {row.what} anchors {row.anchors} parameters {workload.parameters_of(name)[0]}=" in text
    assert "convert-loop" in text
    assert "guest_memory=4G iterations=10 stride=4K" in text
    assert all(len(line) <= 80 for line in lines)


def test_a_stored_one_is_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    result = invoke("make", "balloon", "-o", str(path), "--seed", "3", "--set", "inflated=8M", "--set", "scattered=1")
    expected = workload.open("balloon", 3, inflated=8 << 20, scattered=1.0)
    # 81,920 first touches, 2048 pages that are touched, punched and used again; map and bind.
    assert result.stdout == f"{path}: workload:balloon, 88,066 operations on 320M in 0.88065 s\n"
    found = load(path)
    assert found.records.header().tolist() == expected.records.header().tolist()
    assert found.records.offset.tolist() == expected.records.offset.tolist()
    assert (found.init, found.machine, found.layout) == (expected.init, expected.machine, expected.layout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "workload:nothing: no such workload, there is workload:assigned-boot, "),
        (["balloon", "--set", "flips=1"], "workload:balloon: flips: expected some of guest_memory, "),
        (["balloon", "--set", "unit=5"], "workload:balloon: unit 5: expected a multiple of 4096 "),
        (["balloon", "--set", "unit"], "Invalid value for '--set': 'unit': expected KEY=VALUE"),
        (["balloon", "--set", "unit=big"], "Invalid value for '--set': 'unit=big': expected a number, or a size "),
    ],
)
def test_what_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["workload", "make", *arguments, "-o", str(tmp_path / "x")], prog_name="pgemu")
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"pgemu: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["workload", "make", "balloon", "-o", "/nowhere/x"], prog_name="pgemu")
    assert end.value.code == 2
    assert capsys.readouterr().err == "pgemu: /nowhere/x: cannot be written: /nowhere is no directory\n"


def test_what_a_group_s_command_prints_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x07b"
    result = invoke("make", "convert-loop", "-o", str(path), "--set", "guest_memory=4K")
    assert "a\\x07b: workload:convert-loop, " in result.stdout
    assert path.exists()


def test_the_list_loads_no_compiler_and_no_arrow() -> None:
    code = (
        "import sys\nfrom pgemu.cli import main\n"
        "try: main(['workload', 'list'])\n"
        "except SystemExit: print(*{'numba', 'llvmlite', 'pyarrow'} & set(sys.modules), file=sys.stderr)"
    )
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip()


def test_compare_takes_the_same_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--set", "late=1", "--late", "1"], "--set late=...: expected no --late beside it"),
        (["--set", "unit=4K"], "workload:dma-steady: unit: expected some of guest_memory, flips, "),
        (["--set", "seed=1"], "Invalid value for '--set': 'seed': no workload has such a parameter"),
        (["--vary", "set=flips=1"], "--vary set=flips=1: expected OPTION=A,B with one of "),
    ):
        with pytest.raises(SystemExit) as end:
            main(["compare", "workload:dma-steady", *arguments], prog_name="pgemu")
        said = capsys.readouterr().err
        assert (end.value.code, said.count("\n")) == (2, 1)
        assert message in said
