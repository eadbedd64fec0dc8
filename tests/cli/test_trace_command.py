"""pgemu trace: convert, info, head, cut, merge, formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pgemu import trace as traces
from pgemu.cli import main
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.readers import formats, parquet
from pgemu.trace.schema import DTYPES, Operation, Records

pytestmark = pytest.mark.same_with_checks
SHIPPED = str(traces.shipped())


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["trace", *map(str, args)])


def ok(*args: str | Path) -> str:
    found = run(*args)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_what_is_stored_is_what_the_log_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert "17,716 records" in ok("convert", SHIPPED, "-o", path)
    log, stored = traces.load(SHIPPED), traces.load(path)
    for name in DTYPES:
        assert (getattr(log.records, name) == getattr(stored.records, name)).all(), name
    assert (log.layout, log.init, log.accounting) == (stored.layout, stored.init, stored.accounting)


def test_info_says_what_is_not_understood(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        " vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000\n"
        " vmm-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
        " vmm-9 [000] ..... 1.000003: kvm_weird_event: a=1\n"
    )
    stored = tmp_path / "a.parquet"
    assert "not in it: 1 kvm_weird_event" in ok("convert", path, "-o", stored)
    for one in (path, stored):
        text = ok("info", one)
        assert "kvm_weird_event" in text
        found = json.loads(ok("info", one, "--json"))
        assert found["accounting"]["unknown"] == {"kvm_weird_event": 1}
        assert found["operations"] == {"bind": 1, "guest fault": 1, "mmap": 1}


def test_info_names_the_vms_of_a_log_of_several(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fault = "kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
    path.write_text(
        f" a\x1b-11 (10) [000] ..... 1.000001: {fault} a-12 (10) [000] ..... 1.000002: {fault}"
        f" b-21 (20) [000] ..... 1.500000: {fault} b-21 (20) [000] ..... 1.600000: kvm_weird_event: a=1\n"
    )
    assert run("head", path).exit_code == 2
    text = ok("info", path)
    assert text.startswith(f"{path}: several VMs' memory, 4 events\n")
    assert "  VMs               process 10 (a\\x1b): 2 inputs\n                    process 20 (b): 1 input\n" in text
    assert "choose with --vm-process" in text
    found = json.loads(ok("info", path, "--json"))
    assert found["vm_processes"][1] == {"number": 20, "kind": "process", "name": "b", "inputs": 1}
    assert found["accounting"]["inputs"] == {"kvm_page_fault": 3}
    assert found["accounting"]["unknown"] == {"kvm_weird_event": 1}
    assert found["time_ns"] == [1000001000, 1500000000]
    chosen = json.loads(ok("info", path, "--json", "--vm-process", "20"))
    assert chosen["vms"] == 1
    assert chosen["operations"]["guest fault"] == 1
    assert chosen["accounting"]["without_operation"] == {"of another process": 2}


def test_head_shows_the_columns_that_an_operation_reads() -> None:
    rows = json.loads(ok("head", SHIPPED, "-n", "3", "--json"))
    assert [row["op"] for row in rows] == ["mmap", "bind", "convert"]
    assert rows[2].keys() == {"op", "time", "actor", "flags", "vm", "object", "offset", "length"}
    assert len(ok("head", SHIPPED, "-n", "5").splitlines()) == 5


def test_several_traces_go_into_a_folder(tmp_path: Path) -> None:
    other = tmp_path / "b.parquet"
    ok("convert", SHIPPED, "-o", other)
    folder = tmp_path / "out"
    assert "no folder" in run("convert", SHIPPED, other, "-o", folder).stderr
    folder.mkdir()
    ok("convert", SHIPPED, other, "-o", folder)
    assert sorted(one.name for one in folder.iterdir()) == ["b.parquet", "vm-convert-swprot.parquet"]
    assert "two traces of one name" in run("convert", SHIPPED, SHIPPED, "-o", folder).stderr
    assert "is the trace itself" in run("convert", other, "-o", other).stderr


def test_cut_takes_times_of_the_log_and_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    ok("cut", SHIPPED, "-o", path, "--from", "4.5", "--to", "5.25")
    records = traces.load(path).records
    setup = traces.load(path).accounting.setup
    assert int(records.time[setup:].min()) >= 4_500_000_000
    assert int(records.time.max()) < 5_250_000_000
    ok("cut", SHIPPED, "-o", path, "--from", "+100ms")
    assert "expected --from, --to or --vm" in run("cut", SHIPPED, "-o", path).stderr
    assert "no record is left" in run("cut", SHIPPED, "-o", path, "--from", "99").stderr
    assert "expected seconds like" in run("cut", SHIPPED, "-o", path, "--from", "soon").stderr


def test_merged_traces_hold_both(tmp_path: Path) -> None:
    path = tmp_path / "both.parquet"
    assert "35,432 records" in ok("merge", SHIPPED, SHIPPED, "-o", path, "--from-zero")
    found = json.loads(ok("info", path, "--json"))
    assert found["vms"] == 2
    assert found["operations"]["guest fault"] == 2 * 16_825
    refused = CliRunner().invoke(main, ["compare", str(path)])
    assert refused.exit_code == 2
    assert "memory of 2 VMs: pgemu replay runs it" in refused.stderr


@pytest.fixture
def stored_accesses(tmp_path: Path) -> Path:
    records = Records.build(5000, op=Operation.GUEST_ACCESS, time=np.arange(5000), address=np.arange(5000) * 64)
    tally = Tally(notes=["a note"])
    tally.reject(7, "garbage")
    path = tmp_path / "accesses.parquet"
    parquet.write_accesses(AccessStream.of("a program", "text of a test", iter([records]), tally), path)
    return path


def test_accesses_are_stored_and_told(stored_accesses: Path, tmp_path: Path) -> None:
    found = json.loads(ok("info", stored_accesses, "--json"))
    assert (found["records"], found["pages"], found["rejected"]) == (5000, 79, 1)
    assert found["ranges"] == [{"start": 0, "end": 79 * 4096, "pages": 79}]
    assert found["notes"] == ["a note"]
    again = tmp_path / "again.parquet"
    assert "5,000 accesses of text of a test" in ok("convert", stored_accesses, "-o", again)
    assert json.loads(ok("info", again, "--json"))["records"] == 5000
    ok("cut", stored_accesses, "-o", again, "--from", "+100ns", "--to", "+300ns")
    assert json.loads(ok("info", again, "--json"))["records"] == 200
    ok("merge", stored_accesses, stored_accesses, "-o", again)
    assert json.loads(ok("info", again, "--json"))["processes"] == 2
    refused = CliRunner().invoke(main, ["compare", str(stored_accesses)])
    assert refused.exit_code == 2
    assert "text of a test" in refused.stderr


def test_memory_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    found = run("convert", SHIPPED, "-o", path, "--max-memory", "1M")
    assert found.exit_code == 2
    assert "reading takes more than --max-memory 1 MiB" in found.stderr
    assert not path.exists()


def test_formats_are_those_that_are_read() -> None:
    assert json.loads(ok("formats", "--json")) == formats()
    found = run("info", SHIPPED, "--input-format", "nonsense")
    assert found.exit_code == 2
    assert "expected one of" in found.stderr
    assert "parquet" in found.stderr


def test_looking_at_a_log_needs_no_compiler() -> None:
    import subprocess

    code = (
        "import sys; from pgemu.cli import main\n"
        f"try: main(['trace', 'info', {SHIPPED!r}])\n"
        "except SystemExit: pass\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=120).returncode == 0


LOG = """\
 vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000
 vmm-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x6
 vmm-9 [000] ..... 1.000003: kvm_page_fault: vcpu 0 rip 0x0 address 0x40000000 error_code 0x6
 vmm-9 [000] ..... 1.000004: kvm_weird_event: a=1
 vmm-9 [000] ..... 1.000005: tracing_mark_write: phase 1
CPU:0 [LOST 7 EVENTS]
 vmm-9 [000] ..... 1.000006: kvm_page_fault: vcpu 0 rip 0x0 address 0x2000 error_code 0x6
"""
MISSING = (
    "7 lost", "1 kvm_weird_event", "1 tracing_mark_write (ignored)", "1 without an operation: no memory slot"
)  # fmt: skip


def test_what_is_in_no_record_is_told_whatever_is_made_of_a_log(tmp_path: Path) -> None:
    log, stored, merged, piece = (tmp_path / name for name in ("log", "a.parquet", "m.parquet", "c.parquet"))
    log.write_text(LOG)
    told = ok("convert", log, "-o", stored)
    assert all(what in told.partition("not in it: ")[2] for what in MISSING), told
    both = ok("merge", log, stored, "-o", merged).partition("not in it: ")[2]
    assert all(what.replace("1 ", "2 ", 1).replace("7", "14") in both for what in MISSING), both
    assert traces.load(merged).accounting.balanced()
    ok("cut", log, "--from", "1.000005", "-o", piece)
    (note,) = (one for one in traces.load(piece).notes if "whole trace" in one)
    assert all(what in note for what in MISSING), note


def test_each_vm_of_a_merged_trace_has_memory_of_its_own(tmp_path: Path) -> None:
    log, private, merged = tmp_path / "log", tmp_path / "p.parquet", tmp_path / "m.parquet"
    log.write_text(LOG)
    ok("convert", log, "-o", private, "--init", "private")
    ok("merge", log, private, "-o", merged)
    text = ok("info", merged)
    assert "1 slot, shared at first, VM 0" in text
    assert "1 slot, private at first, VM 1" in text


def test_what_is_told_of_accesses_stays_told(tmp_path: Path) -> None:
    text, stored, merged = tmp_path / "l", tmp_path / "a.parquet", tmp_path / "m.parquet"
    text.write_text("==1== Lackey\nI  1000,4\n L 1ffe,4\nwhatever\n" + " S 3000,8\n" * 9)
    ok("convert", text, "-o", stored)
    ok("merge", text, stored, "-o", merged)
    first, second, both = (json.loads(ok("info", one, "--json")) for one in (text, stored, merged))
    names = ("accesses", "inputs", "crossing", "ignored", "rejected", "first_rejected")
    assert [first[name] for name in names] == [second[name] for name in names]
    assert (first["crossing"], first["rejected"], first["first_rejected"][0][0]) == (1, 1, 4)
    assert (both["crossing"], both["rejected"], both["inputs"]) == (2, 2, {"fetch": 2, "read": 2, "write": 18})
    ok("cut", text, "--from", "+0s", "-o", stored)
    assert json.loads(ok("info", stored, "--json"))["rejected"] == 1
