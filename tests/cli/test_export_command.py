"""pgemu export: files that other tools read, whole or not there at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pgemu
from pgemu import Config, Machine
from pgemu.cli import main
from pgemu.trace.v2p import read_v2p

DATA = Path(__file__).parents[1] / "data" / "accesses"
TRACE = str(DATA / "drmemtrace.small.x64.trace")
VM_LOG = str(Path(pgemu.__file__).parent / "data" / "vm-convert-swprot.ftrace.txt.xz")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["export", *arguments])
        told = capsys.readouterr()
        return int(str(ended.value.code)), told.out, told.err

    return call


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_every_access_is_a_line(run: Run, design: str) -> None:
    status, out, err = run("phys-trace", TRACE, "-o", "trace", "--design", design, "--guest-memory", "64M")
    lines = Path("trace").read_text().splitlines()
    assert status == 0
    assert re.fullmatch(rf"trace: {len(lines):,} accesses, {design}\n", out)
    assert all(re.fullmatch(r"(LD|ST) 0x[0-9a-f]+", line) for line in lines)
    assert {line[:2] for line in lines} == {"LD", "ST"}
    assert "a page gets its frame at its first access" in err
    run("phys-trace", TRACE, "-o", "other", "--design", design, "--guest-memory", "64M", "--format", "ramulator")
    names = {"R": "LD", "W": "ST"}
    others = [line.split() for line in Path("other").read_text().splitlines()]
    assert [f"{names[kind]} {address}" for address, kind in others] == lines


def test_walks_come_with_the_accesses(run: Run) -> None:
    run("phys-trace", TRACE, "-o", "trace", "--design", "pfnmap", "--guest-memory", "64M")
    status, out, _ = run("phys-trace", TRACE, "-o", "w", "--design", "pfnmap", "--guest-memory", "64M", "--walks")
    accesses, walks = (Path(name).read_text().splitlines() for name in ("trace", "w"))
    found = re.fullmatch(r"w: ([\d,]+) accesses, ([\d,]+) entries of tables, pfnmap\n", out)
    assert status == 0
    assert found is not None
    told = [int(number.replace(",", "")) for number in found.groups()]
    assert told == [len(accesses), len(walks) - len(accesses)]
    rest = iter(walks)
    assert all(line in rest for line in accesses)  # in their order


def test_a_map_is_read_back(run: Run) -> None:
    status, out, _ = run("v2p", TRACE, "-o", "v2p.textproto", "--design", "pfnmap", "--guest-memory", "64M")
    table = read_v2p("v2p.textproto")
    assert (status, out) == (0, f"v2p.textproto: {len(table):,} pages, pfnmap\n")
    assert len(table) == 2


def test_a_core_holds_a_process(run: Run) -> None:
    machine = Machine(Config("pfnmap", pool=2 << 21, page_size=2 << 20))
    gmem, process = machine.create_guest_memfd(2 << 20, shared=True), machine.create_process()
    process.mmap(gmem, 1 << 30)
    process.touch_many([1 << 30, (1 << 30) + 4096])
    machine.write_frame(gmem.pfn(0) or 0, b"x")
    machine.write_image("m.elf")
    status, out, err = run("gdb", "m.elf", "--root", "process:0", "-o", "core")
    assert status == 0
    assert re.fullmatch(r"core: [\d,]+ bytes of physical memory, 4,096 mapped in 1 ranges\n", out)
    assert err == "pgemu: 4,096 bytes are mapped, but not in the image: left out\n"
    status, _, err = run("gdb", "m.elf", "-o", "core2")
    assert (status, Path("core2").exists()) == (2, False)
    assert err.startswith("pgemu: --root is missing; the image names kernel")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("phys-trace", "nowhere", "--design", "pfnmap"), "nowhere: "),
        (("phys-trace", TRACE, "--design", "pfnmap", "--guest-memory", "3M"), "guest_memory 3145728: expected a"),
        (("phys-trace", VM_LOG, "--design", "pfnmap"), "a trace of a VM or of processes, expected a"),
        (("v2p", TRACE, "--design", "pfnmap", "--space", "7", "--guest-memory", "64M"), "--space 7: expected one of 0"),
        (("gdb", TRACE, "--root", "0"), "expected a multiple of 4096"),
        (("v2p", TRACE), "Missing option '--design'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run(*arguments, "-o", "file")
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_first(run: Run) -> None:
    for command in (("phys-trace", TRACE, "--design", "pfnmap"), ("v2p", TRACE, "--design", "pfnmap"), ("gdb", "x")):
        status, _, err = run(*command, "-o", "folder/file")
        assert (status, err) == (2, "pgemu: folder/file: cannot be written: folder is no directory\n")
