"""Every trace that is here goes all the way: read, stored as Parquet, read again; and one that the test records."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main

DATA = Path(__file__).parents[1] / "data"
FOLDER = Path(os.environ.get("PGEMU_TRACES", DATA / "traces"))
LONG = 1 << 17  # bytes; longer ones are read by tests/trace/test_captures.py, and with PGEMU_TRACES here
FILES = sorted(
    path
    for path in [*FOLDER.glob("*.xz"), *FOLDER.glob("*.txt"), *FOLDER.glob("*.zip"), *(DATA / "accesses").glob("*.*")]
    if path.suffix not in (".md", ".dynamorio", ".textproto")
    and (path.stat().st_size < LONG or "PGEMU_TRACES" in os.environ)
)

LOGS = [path for path in FILES if path.name.startswith(("ftrace", "vm-"))]
COMPARED = ("kvm_page_fault", "page_fault_user", "kvm_unmap_hva_range", "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, args)))


def lines(path: Path) -> list[str]:
    data = path.read_bytes()
    data = lzma.decompress(data) if path.suffix == ".xz" else data
    return data.decode("utf-8", "replace").splitlines()


def options(path: Path) -> list[str]:
    """Logs of many small VMs are taken as one, which has to be asked for."""
    return ["--vm-process", "all"] if path.name.startswith("ftrace-kvm") else []


@pytest.mark.same_with_checks
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_trace_is_stored_and_read_again(path: Path, tmp_path: Path) -> None:
    stored, again = tmp_path / "a.parquet", tmp_path / "b.parquet"
    found = run("trace", "convert", path, "-o", stored, *options(path))
    if "callchain" in path.name:  # perf prints no addresses there
        assert found.exit_code == 2
        assert "584 page-faults without an address" in found.stderr
        assert not stored.exists()
        return
    assert found.exit_code == 0, found.output
    assert run("trace", "convert", stored, "-o", again).exit_code == 0
    first, second = (json.loads(run("trace", "info", one, "--json").stdout) for one in (stored, again))
    assert first.pop("source") != second.pop("source")
    assert first == second
    assert first["records"] > 0


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith(("ftrace", "vm-"))], ids=lambda path: path.name
)
def test_every_event_is_counted_once(path: Path) -> None:
    """Against names and numbers that a regular expression of the test's own finds."""
    found = run("trace", "info", path, "--json", *options(path))
    accounting = json.loads(found.stdout)["accounting"]
    counted: Counter[str] = Counter()
    for kind in ("inputs", "outcomes", "ignored", "unknown"):
        for name, count in accounting[kind].items():
            counted[re.split(r"[ (]", name)[0]] += count
    expected: Counter[str] = Counter()
    for line in lines(path):
        match = re.match(r"^.{0,20}-\d+ +\[\d+\] \S+ +\d+\.\d+: (\w+)", line)
        if match:
            expected[match[1]] += 1
    assert sum(counted.values()) == sum(expected.values())
    for name in (
        "kvm_page_fault",
        "page_fault_user",
        "kvm_unmap_hva_range",
        "kvm_mmu_set_spte",
        "kvm_tdp_mmu_spte_changed",
    ):
        assert counted[name] == expected[name], name


TOOLS = {"strace": "strace", "valgrind": "valgrind", "perf": "perf"}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_recording_is_stored_and_run(tool: str, tmp_path: Path) -> None:
    """A program's memory, recorded, stored, and replayed (accesses: in a guest)."""
    if shutil.which(TOOLS[tool]) is None:
        pytest.skip(f"{tool} is not installed")
    recording, stored, outcomes = tmp_path / "a.txt.gz", tmp_path / "a.parquet", tmp_path / "o.parquet"
    found = run("record", "--with", tool, "-o", recording, "--", "true")
    if found.exit_code == 2:
        pytest.skip(found.stderr)
    assert gzip.decompress(recording.read_bytes())
    made = run("trace", "convert", recording, "-o", stored)
    assert made.exit_code == 0, made.output
    if tool == "valgrind":
        ran = run("guest", stored, "--format", "json", "--guest-memory", "1G")
        assert ran.exit_code == 0, ran.output
        document = json.loads(ran.stdout)
        accesses = json.loads(run("trace", "info", stored, "--json").stdout)["records"]
        assert document["accesses"]["accesses"] == accesses > 10_000
        return
    ran = run("replay", stored, "--design", "pfnmap", "-o", outcomes, "--progress", "none", "--format", "json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["records"] > 5


@pytest.mark.parametrize("name", ["strace-gcc.txt.xz", "ftrace-page-faults.txt.xz", "proc-snapshot.zip"])
def test_processes_are_replayed(name: str, tmp_path: Path) -> None:
    """From the log and from Parquet, with the same outcomes."""
    found = []
    stored = tmp_path / "a.parquet"
    assert run("trace", "convert", DATA / "traces" / name, "-o", stored).exit_code == 0
    for trace in (DATA / "traces" / name, stored):
        out = tmp_path / "o.parquet"
        ran = run("replay", trace, "--design", "pfnmap", "-o", out, "--progress", "none", "--format", "json")
        assert ran.exit_code == 0, ran.output
        found.append((json.loads(ran.stdout)["operations"], parquet.read_table(out).to_pydict()))
    assert found[0] == found[1]


def test_merged_vms_are_replayed_as_each_alone(tmp_path: Path) -> None:
    one, both, out = tmp_path / "one.parquet", tmp_path / "both.parquet", tmp_path / "o.parquet"
    made = run("workload", "make", "random", "-o", one, "--set", "operations=2000", "--set", "guest_memory=64M")
    assert made.exit_code == 0, made.output
    assert run("trace", "merge", one, one, "-o", both).exit_code == 0
    counts = []
    for trace, jobs in ((one, 1), (both, 1), (both, 2)):
        ran = run(
            "replay", trace, "--design", "restructure", "-o", out, "--progress", "none", "--format", "json",
            "--jobs", jobs,
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        operations = json.loads(ran.stdout)["operations"]
        counts.append({name: operation["outcomes"] for name, operation in operations.items()})
    twice = {name: {key: 2 * n for key, n in outcomes.items()} for name, outcomes in counts[0].items()}
    assert counts[1] == counts[2] == twice


def test_a_program_in_a_guest_says_what_it_assumes(tmp_path: Path) -> None:
    path = DATA / "accesses" / "lackey-ls.txt.xz"
    found = run("guest", path, "--guest-memory", "1G", "--io-rate", "0.001", "--io", "convert", "--allocation", "thp")
    assert found.exit_code == 0, found.output
    for words in ("missed by all TLBs", "entries read a miss", "TLBs, assumed", "I/O converts the page itself"):
        assert words in " ".join(found.stdout.split())
    for wrong, said in (
        (["--processor", "i486"], "skylake-sp"),
        (["--guest-memory", "3M"], "expected a multiple of 2097152"),
        (["--shared", "--io-rate", "0.5"], "direct"),
    ):
        refused = run("guest", path, *wrong)
        assert refused.exit_code == 2, wrong
        assert said in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    log = run("guest", DATA / "traces" / "vm-convert-swprot.ftrace.txt.xz")
    assert log.exit_code == 2
    assert "expected a program's addresses: pgemu record --with valgrind" in log.stderr
