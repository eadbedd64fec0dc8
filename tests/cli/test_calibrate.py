"""`pgemu calibrate`: what it prints and writes, how it refuses; and `pgemu compare --profile`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgemu import cost
from pgemu.cli import main
from pgemu.cost.measurements import WHAT, Measurement
from pgemu_kernels.words.events import Event


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measurements that take no time; the seconds asked for."""
    asked: list[float] = []

    def measure(seconds: float, progress: Callable[[str], None]) -> dict[str, Measurement]:
        asked.append(seconds)
        progress("nothing")
        found = {key: Measurement(key, 90.0, 100.0, 110.0, 9) for key in WHAT}
        return found | {"grace_period": Measurement("grace_period", problem="membarrier: Operation not permitted")}

    monkeypatch.setattr("pgemu.cost.calibrate.measure", measure)
    return asked


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def refused(*args: str) -> str:
    """The complaint: one line on stderr, exit status 2, nothing on stdout."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("pgemu: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("pgemu: ").rstrip("\n")


def test_the_table_says_what_was_measured_and_what_it_prices(measured: list[float]) -> None:
    result = run("calibrate")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].endswith(f"Linux {os.uname().release}")
    assert "system call that does nothing (getppid)         90 ns   100 ns   110 ns  syscall" in lines
    where = lines.index("RCU grace period (membarrier)")
    assert lines[where + 1] == "    not measured: membarrier: Operation not permitted"
    shootdowns = [number for number, line in enumerate(lines) if line.startswith("TLB shootdown")]
    assert [lines[number + 1] for number in shootdowns] == ["    tlb_flush_mm, tlb_flush_kernel"] * 2
    kept = result.stdout[result.stdout.index("as published:") :]
    assert "rcu_synchronized" in kept
    assert "page_copied" not in kept
    assert max(map(len, lines)) <= 80
    assert "written: " not in result.stdout
    assert measured == [10.0]


def test_the_written_profile_prices_a_comparison(measured: list[float], tmp_path: Path) -> None:
    path = tmp_path / "lab-3.toml"
    result = run("calibrate", "-o", str(path), "--seconds", "0.5")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"\nwritten: {path}\n")
    assert measured == [0.5]
    assert os.listdir(tmp_path) == ["lab-3.toml"]
    profile = cost.profile(path)
    assert (profile.name, profile.host_cpus) == ("lab-3", os.cpu_count())
    assert profile[Event.PAGE_COPIED].each == (90, 110)

    found = compared("--profile", str(path), "--sources")
    assert found["machines"]["pfnmap"]["profile"] == str(path)
    assert found["machines"]["pfnmap"]["host_cpus"] == os.cpu_count()
    prices = found["sources"]["prices_ns"]
    assert prices["page_copied"]["each"] == [90, 110]
    assert prices["page_copied"]["source"].startswith("pgemu calibrate: 4 KiB copied, cached 90 ns to 110 ns")
    assert prices["rcu_synchronized"]["source"].startswith("from profile published: ")


def compared(*args: str) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    result = run("compare", "--design", "pfnmap", "--format", "json", *args)
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = json.loads(result.stdout)
    return found


def test_a_profile_brings_its_cpus() -> None:
    machine = compared("--profile", "epyc-252vcpu")["machines"]["pfnmap"]
    assert (machine["profile"], machine["host_cpus"]) == ("epyc-252vcpu", 252)
    assert compared("--profile", "epyc-252vcpu", "--host-cpus", "3")["machines"]["pfnmap"]["host_cpus"] == 3
    machine = compared()["machines"]["pfnmap"]
    assert (machine["profile"], machine["host_cpus"]) == ("published", 1)


def test_a_profile_that_is_none_is_refused_before_the_trace_is_read(tmp_path: Path) -> None:
    complaint = refused("compare", "nowhere.txt", "--profile", "mine")
    assert complaint.startswith("--profile: cost profile 'mine': expected one of published, e7-8895, ")
    path = tmp_path / "bad.toml"
    path.write_text("name = 3")
    assert refused("compare", "nowhere.txt", "--profile", str(path)).startswith(f"{path}: name = 3: expected ")


def test_a_file_that_could_not_be_written_is_refused_before_measuring(measured: list[float], tmp_path: Path) -> None:
    assert refused("calibrate", "-o", str(tmp_path)) == f"{tmp_path}: cannot be written: Is a directory"
    path = tmp_path / "none" / "x.toml"
    assert refused("calibrate", "-o", str(path)) == f"{path}: cannot be written: {path.parent} is no directory"
    assert "0.1<=x<=3600" in refused("calibrate", "--seconds", "0")
    assert measured == []


@pytest.mark.parametrize("name", ["published.toml", "e7-8895", " .toml"])
def test_a_file_may_be_called_as_a_profile_is(measured: list[float], tmp_path: Path, name: str) -> None:
    assert run("calibrate", "-o", str(tmp_path / name)).exit_code == 0
    assert cost.profile(tmp_path / name).name == "calibrated"


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise MemoryError("64 MiB to measure in: Cannot allocate memory")

    monkeypatch.setattr("pgemu.cost.calibrate.measure", measure)
    assert refused("calibrate") == "calibrate: 64 MiB to measure in: Cannot allocate memory"


def test_help_loads_no_compiler() -> None:
    code = """
import sys
from pgemu.cli import main
try:
    main(["calibrate", "--help"], prog_name="pgemu")
except SystemExit:
    print("loaded:", *sorted({"numba", "llvmlite", "pyarrow"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("loaded:\n")
    assert "--seconds" in shown
