"""`pgemu replay`: outcomes in a file, a summary, runs side by side, interrupts and kills."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from announcement import complaints
from comparisons import INODE, lowered, mixed_records, one, setup
from pgemu.cli import main
from pgemu.trace import Operation, Records
from pgemu.trace.readers import parquet
from pgemu_kernels.words.operations import PAGE_4K


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)], prog_name="pgemu")


def refused(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    said = complaints(result.stderr)
    assert said.count("\n") == 1
    return said.removeprefix("pgemu: ").rstrip("\n")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.parquet"
    parquet.write(lowered(mixed_records()), path)
    return path


OF_2M = ("--page-size", "2M")


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[b"pgemu.replay"])
    return found


# --------------------------------------------------------------------------- one run


def test_a_trace_is_run_and_what_each_record_returned_is_stored(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    result = invoke(small, "--design", "restructure", "-o", out, *OF_2M)
    assert (result.exit_code, complaints(result.stderr)) == (0, "")
    assert f"{small} on restructure: 18 of 18 records" in result.stdout
    assert f"outcomes in {out}" in result.stdout
    assert re.search(r"convert +4 .* 2 ok, 1 -EINVAL,\s+1\s+-EAGAIN", result.stdout)
    assert re.search(r"^  events: [0-9,]+ [a-z_]+, [0-9,]+ [a-z_]+", result.stdout, re.MULTILINE)
    assert rows_of(out)[9] == {"index": 9, "operation": "convert", "result": "-EAGAIN", "detail": 0}
    assert [row["result"] for row in rows_of(out)][:4] == ["ok", "ok", "RET_PF_FIXED", "RET_PF_SPURIOUS"]
    assert about(out)["machine"]["page_size"] == 2 << 20


def test_the_summary_as_json(small: Path, tmp_path: Path) -> None:
    result = invoke(small, "--design", "pfnmap", "-o", tmp_path / "o", "--format", "json", *OF_2M)
    said = json.loads(result.stdout)
    assert (said["records"], said["complete"], said["broken"], said["refusal"]) == (18, True, None, None)
    assert said["operations"]["convert"]["outcomes"] == {"ok": 3, "-EINVAL": 1}
    assert said["events"]["convert_ioctl"] == 4
    assert said["machine"]["design"] == "pfnmap"


def test_a_log_and_a_workload_are_loaded_first(tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = invoke("workload:tdx-boot", "--design", "pfnmap", "-o", out, "--overlap", "0.5")
    assert (result.exit_code, about(out)["trace"]) == (0, "workload:tdx-boot")
    assert len(rows_of(out)) == about(out)["records"] > 10000


def test_what_of_a_log_no_record_is_of_is_told(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "o.parquet"
    log.write_text(
        " vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000\n"
        " vmm-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x6\n"
        " vmm-9 [000] ..... 1.000003: kvm_weird_event: a=1\n"
    )
    arguments = (log, "--design", "pfnmap", *OF_2M, "-o", out)
    assert "\n  not in it: 1 kvm_weird_event\n" in invoke(*arguments).stdout
    assert json.loads(invoke(*arguments, "--format", "json").stdout)["not_in_it"] == {"kvm_weird_event": 1}


def test_what_cannot_be_asked_for(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert refused(small, "-o", out).startswith("--design: expected restructure or pfnmap, or --vary design=")
    assert refused(tmp_path / "none", "--design", "pfnmap", "-o", out).startswith(str(tmp_path / "none"))
    pfnmap = ("--design", "pfnmap", *OF_2M)
    assert refused(small, *pfnmap, "-o", tmp_path).startswith(f"{tmp_path}: is a folder")
    assert refused(small, *pfnmap, "-o", tmp_path / "no" / "o").endswith("no is no directory")
    assert refused(small, *pfnmap, "-o", out, "--resume") == "--resume: expected --checkpoint FILE to go on from"
    assert refused(small, small, *pfnmap, "-o", small).endswith("expected one for the outcomes of 2 runs")
    checkpoint = ("--checkpoint", tmp_path / "point")
    assert refused(small, small, *pfnmap, "-o", out, *checkpoint).startswith("--checkpoint: expected one run, not 2")
    assert refused(small, *pfnmap, "-o", out, "--jobs", "2", *checkpoint).startswith("--checkpoint: expected --jobs 1")
    assert "expected a number of records, or seconds" in refused(
        small, *pfnmap, "-o", out, *checkpoint, "--checkpoint-every", "soon"
    )
    assert "are in use after" in refused(small, *pfnmap, "-o", out, "--max-memory", "1M")
    assert "--vary design=a: " in refused(small, "-o", out, "--vary", "design=a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.parquet"]


def test_standard_input_is_for_one_run(small: Path, tmp_path: Path) -> None:
    several = refused("-", small, "--design", "pfnmap", "-o", tmp_path / "out")
    assert several == "-: standard input can be read by one run, here"


def test_nothing_of_a_damaged_trace_is_stored(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    content[len(content) // 3] ^= 0xFF
    small.write_bytes(bytes(content))
    result = invoke(small, "--design", "pfnmap", "-o", tmp_path / "o", *OF_2M)
    assert result.exit_code == 2
    assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------- several runs


def test_several_runs_have_files_of_their_own_in_any_number_of_processes(small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    parquet.write(lowered([*setup(), one(Operation.GUEST_FAULT)]), other)
    vary = ("--vary", "design=restructure,pfnmap", "--vary", "zap=exact,rounded", *OF_2M, "--format", "json")
    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / f"out{jobs}"
        result = invoke(small, other, "-o", folder, "--jobs", jobs, *vary)
        assert (result.exit_code, complaints(result.stderr)) == (0, "")
        said = json.loads(result.stdout)
        assert [(one["trace"], one["label"]) for one in said[:2]] == [
            ("small.parquet", "design=restructure, zap=exact"), ("small.parquet", "design=restructure, zap=rounded"),
        ]  # fmt: skip
        assert [one["output"] for one in said] == [str(folder / Path(one["output"]).name) for one in said]
        assert len(said) == 8
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert sorted(found[0])[0] == "other.design=pfnmap.zap=exact.parquet"


def test_one_run_that_is_refused_does_not_keep_the_others_from_being_done(small: Path, tmp_path: Path) -> None:
    vary = ("--vary", "vm=sw,plain", "--design", "pfnmap", *OF_2M, "--format", "json")
    result = invoke(small, "-o", tmp_path / "out", *vary)
    assert result.exit_code == 2
    assert complaints(result.stderr).startswith("pgemu: vm=plain: vm plain: it has no private memory")
    assert [one["label"] for one in json.loads(result.stdout)] == ["vm=sw"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.vm=sw.parquet"]


def test_vms_that_share_nothing_run_in_processes_of_their_own(tmp_path: Path) -> None:
    records = [*setup(), one(Operation.GUEST_FAULT, address=PAGE_4K)]
    names = [
        {name: np.full(1, vm, kind) for name, kind in (("vm", "u2"), ("space", "u2"), ("object", "u4"))}
        for vm in range(2)
    ]
    from dataclasses import replace

    trace = lowered([replace(record, **name) for record in records for name in names])
    path = tmp_path / "fleet.parquet"
    parquet.write(trace, path)
    for jobs in ("1", "2"):
        result = invoke(path, "--design", "pfnmap", "-o", tmp_path / jobs, "--jobs", jobs, *OF_2M)
        assert result.exit_code == 0
        assert ("on 2 machines" in result.stdout) == (jobs == "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_scheduler_needs_what_talks_to_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = refused(small, "--design", "pfnmap", "-o", tmp_path / "out", "--scheduler", "tcp://localhost:1", *OF_2M)
    assert said == "--scheduler: dask.distributed is not installed: pip install 'pgemu[cluster]'"


class _Cluster:
    """What a Dask client does, as far as it is asked."""

    def __init__(self, scheduler: str, timeout: str) -> None:
        if scheduler == "tcp://nobody:1":
            raise OSError("Timed out trying to connect")

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, function: Any, task: Any, pure: bool) -> Any:
        import pickle
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(task))))
        return future


def test_runs_go_to_the_workers_of_a_scheduler(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from types import SimpleNamespace

    there = SimpleNamespace(Client=_Cluster, as_completed=lambda futures: reversed(list(futures)))
    monkeypatch.setitem(sys.modules, "distributed", there)
    vary = ("--vary", "design=restructure,pfnmap", "--format", "json", *OF_2M)
    result = invoke(small, "-o", tmp_path / "out", "--scheduler", "tcp://there:8786", *vary)
    assert (result.exit_code, complaints(result.stderr)) == (0, "")
    assert [one["label"] for one in json.loads(result.stdout)] == ["design=restructure", "design=pfnmap"]
    alone = invoke(small, "-o", tmp_path / "alone", *vary)
    assert alone.exit_code == 0
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    single = invoke(small, "-o", tmp_path / "single", "--scheduler", "tcp://there:8786", "--design", "pfnmap", *OF_2M)
    assert single.exit_code == 0
    assert [path.name for path in (tmp_path / "single").iterdir()] == ["small.parquet"]
    said = refused(small, "-o", tmp_path / "out", "--scheduler", "tcp://nobody:1", *vary)
    assert said.startswith("--scheduler tcp://nobody:1: nobody answers (Timed out")


# --------------------------------------------------------------------------- interrupted

RECORDS = 400_000


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faults and conversions at random: a second or so, in which it is interrupted."""
    path = tmp_path_factory.mktemp("long") / "long.parquet"
    random_ = np.random.default_rng(3)
    pages = random_.integers(0, INODE // PAGE_4K, RECORDS).astype(np.uint64) * np.uint64(PAGE_4K)
    converts = random_.random(RECORDS) < 0.3
    flags = np.where(converts, np.where(random_.random(RECORDS) < 0.5, 4, 8), 0)
    records = Records.build(
        RECORDS, op=np.where(converts, int(Operation.CONVERT), int(Operation.GUEST_FAULT)), flags=flags,
        address=np.where(converts, 0, pages), offset=np.where(converts, pages, 0),
        length=np.where(converts, PAGE_4K, 0),
    )  # fmt: skip
    parquet.write(lowered([*setup(), records]), path)
    return path


def command(long: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pgemu",
        "replay",
        str(long),
        "--design",
        "restructure",
        "-o",
        str(out),
        *OF_2M,
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def until(there: Path, process: subprocess.Popen[str]) -> None:
    while not there.exists() and process.poll() is None:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(long: Path) -> bytes:
    out = long.parent / "whole.parquet"
    subprocess.run(command(long, out), check=True, env=environment(), timeout=300, stdout=subprocess.DEVNULL)
    return out.read_bytes()


def test_ctrl_c_leaves_what_has_run_and_what_to_go_on_from(long: Path, whole: bytes, tmp_path: Path) -> None:
    out, point = tmp_path / "o.parquet", tmp_path / "point"
    checkpoint = ("--checkpoint", str(point), "--checkpoint-every", "20000")
    process = subprocess.Popen(
        command(long, out, *checkpoint), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(point, process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    match = re.fullmatch(
        r"pgemu: interrupted after ([0-9,]+) of 400,002 records, which .* has; --resume goes on\n", said
    )
    assert match, said
    done = int(match[1].replace(",", ""))
    assert f"{done:,} of 400,002 records" in printed
    assert (about(out)["records"], about(out)["complete"]) == (done, False)
    assert pq.read_table(out).column("index").to_pylist() == list(range(done))
    result = invoke(*command(long, out, *checkpoint, "--resume")[4:])
    assert (result.exit_code, complaints(result.stderr)) == (0, "")
    assert f"from a checkpoint after {done:,}" in result.stdout
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_that_is_killed_again_and_again_goes_on(long: Path, whole: bytes, tmp_path: Path) -> None:
    out, point = tmp_path / "o.parquet", tmp_path / "point"
    run = command(long, out, "--checkpoint", str(point), "--checkpoint-every", "30000", "--resume")
    for wait in (0.0, 0.05, 0.3):
        process = subprocess.Popen(run, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(point, process)
        time.sleep(wait * random.Random(wait).random())
        process.kill()
        process.communicate(timeout=300)
        assert not out.exists() or out.read_bytes() == whole
    result = invoke(*run[4:])
    assert (result.exit_code, complaints(result.stderr)) == (0, "")
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


# --------------------------------------------------------------------------- progress


def test_progress_is_in_lines_where_that_is_asked_for(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgemu.cli._replay.PlainLines._EACH", 0.0)
    plain = invoke(small, "--design", "pfnmap", "-o", tmp_path / "o", "--progress", "plain", *OF_2M)
    assert re.search(r"^pgemu: pfnmap: 18 of 18, [0-9,]+/s$", plain.stderr, re.MULTILINE)
    for more in ((), ("--progress", "none")):
        quiet = invoke(small, "--design", "pfnmap", "-o", tmp_path / "o", *more, *OF_2M)
        assert complaints(quiet.stderr) == ""


ON_A_TERMINAL = """
from pgemu.cli import main
main(["replay", {trace!r}, "--design", "pfnmap", "-o", {out!r}, "--page-size", "2M"], prog_name="pgemu")
"""


def test_a_terminal_shows_a_rate_and_what_is_left_from_the_first_second_on(long: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    code = ON_A_TERMINAL.format(trace=str(long), out=str(tmp_path / "o"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=follower,
        env={**environment(), "TERM": "xterm", "COLUMNS": "120"},
    ) as process:  # fmt: skip
        os.close(follower)
        shown = b""
        with suppress(OSError):  # of a terminal that nobody writes to any more
            while piece := os.read(leader, 4096):
                shown += piece
    os.close(leader)
    assert process.returncode == 0
    plain = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"pfnmap +\S+ +[0-9]+% [0-9]:[0-9]{2}:[0-9]{2} [0-9,]+/s", plain)


PEAK = """
import resource, sys
from pgemu.cli import main
try:
    main(["replay", *sys.argv[1:]], prog_name="pgemu")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def test_a_longer_trace_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for groups in (1, 5):
        path, out = tmp_path / f"{groups}.parquet", tmp_path / "o"
        faults = Records.build(1 << 20, op=Operation.GUEST_FAULT, address=PAGE_4K)
        parquet.write(lowered([]), path, [Records.concatenate(setup()), *[faults] * groups])
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), "--design", "pfnmap", "-o", str(out), *OF_2M],
            capture_output=True, text=True, check=True, env=environment(), timeout=300,
        )  # fmt: skip
        assert about(out)["records"] == groups * (1 << 20) + 2
        peaks.append(int(run.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 64 << 10  # KiB
