"""pgemu walk and pgemu dump: what they print of an image, and what they say of a bad one."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.cli import main, walk as walk_module
from pgemu.tables.walk import in_range, walk as walk_tables
from pgemu_kernels.formats import page_format as pf
from trees import Tree, core, write

pytestmark = pytest.mark.same_with_checks

X86 = pf.x86_64()
VA = 0x7F00_0000_0000
ALL = (1 << 64) - 1
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit status, stdout, stderr)."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(
                [hex(argument) if isinstance(argument, int) else str(argument) for argument in arguments],
                prog_name="pgemu",
            )
        return (int(end.value.code or 0), *capsys.readouterr())

    return run_it


def image(tree: Tree, path: Path, note: bytes = b"") -> Path:
    segments = [(address, words.tobytes(), 4096) for address, words in sorted(tree.memory.pages.items())]
    return write(path, core(segments, note=note))


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """4K pages, the zero page again and again, a 2M page, and entries that map nothing."""
    tree = Tree(X86)
    for i in range(3):
        tree.map(VA + i * 4096, (1 << 30) + i * 4096, 1, 0x8000_0000_0000_0867)
        tree.map(VA + (8 + i) * 4096, 5 << 12, 1, 0x8000_0000_0000_0225)
    tree.map(VA + (2 << 20), 3 << 30, 2, 0xE7)
    tree.memory.store(tree.slot(VA + (5 << 12), 1), 0x04FF_FFFF_8000_0920)  # protection-none
    tree.memory.store(tree.slot(VA + (4 << 20), 2), 0x99_9067)  # a table that is not in the image
    note = struct.pack("<III", 6, 29, 0x706765) + b"pgemu\0\0\0" + b"process:0 x86-64 0x1000000\n\n\n\n\n\n"
    return image(tree, tmp_path / "core", note)


def test_dump_of_a_table_that_maps_nothing(run: Run, tmp_path: Path) -> None:
    tree = Tree(X86)
    tree.memory.store(tree.slot(VA, 4), 0)
    assert run("dump", image(tree, tmp_path / "core"), "--root", tree.root) == (
        0,
        "mapped: 0\ntable pages: 1 (PGD 1)\n",
        "",
    )


def test_walk_prints_every_level(run: Run, process: Path) -> None:
    assert run("walk", process, "--root", "0x100009b", VA + 0x123, hex(VA + (2 << 20) + 5)) == (0, """\
0x7f0000000123
    PGD  0x00000010007f0  0x0000000001001067  table  0x0000001001000  PRESENT|RW|USER|ACCESSED|DIRTY
    PUD  0x0000001001000  0x0000000001002067  table  0x0000001002000  PRESENT|RW|USER|ACCESSED|DIRTY
    PMD  0x0000001002000  0x0000000001003067  table  0x0000001003000  PRESENT|RW|USER|ACCESSED|DIRTY
    PTE  0x0000001003000  0x8000000040000867  leaf   0x0000040000000  PRESENT|RW|USER|ACCESSED|DIRTY|SOFT_DIRTY|NX
  physical 0x40000123, page of 4K, rw-u, WB

0x7f0000200005
    PGD  0x00000010007f0  0x0000000001001067  table  0x0000001001000  PRESENT|RW|USER|ACCESSED|DIRTY
    PUD  0x0000001001000  0x0000000001002067  table  0x0000001002000  PRESENT|RW|USER|ACCESSED|DIRTY
    PMD  0x0000001002008  0x00000000c00000e7  leaf   0x00000c0000000  PRESENT|RW|USER|ACCESSED|DIRTY|PSE
  physical 0xc0000005, page of 2M, rwxu, WB
""", "")  # fmt: skip


def test_what_of_an_image_was_left_out_is_said(run: Run, tmp_path: Path) -> None:
    """A line each, at most ten; of the roots that it names the first sixteen."""
    tree = Tree(X86)
    lines = b"".join(b"vm:0 ept 0x%x000\n" % i for i in range(20)) + b"p:0 x86-64 0x1000000\n"
    note = struct.pack("<III", 6, len(lines), 0) + b"pgemu\0\0\0" + lines.ljust(len(lines) + 3 & ~3, b"\0")
    path = image(tree, tmp_path / "core", note)
    status, _, said = run("walk", path, "--root", "p:0", VA)
    assert status == 1
    assert said.splitlines() == [
        *(f"pgemu: {path}: root vm:0 {i << 12:#x}: another of its name is 0x0" for i in range(1, 11)),
        f"pgemu: {path}: ... and 9 more like these",
    ]
    status, _, said = run("dump", path, "--root", "p:1")
    assert status == 2
    assert said.splitlines()[-1].endswith("vm:0 0xf000 (ept), ... and 5 more")


def test_walk_tells_why_nothing_is_mapped(run: Run, process: Path) -> None:
    addresses = (VA + (5 << 12), VA + (3 << 12), VA + (4 << 20), 1 << 47)
    status, shown, complaint = run("walk", process, "--root", "process:0", *addresses)
    assert (status, complaint) == (1, "")
    assert [line for line in shown.splitlines() if "not" in line] == [
        "  not mapped: the PTE is protection none",
        "  not mapped: the PTE is absent",
        "    PTE  0x0000000999000  not in the image",
        "  not mapped: the table of the PTE lies outside the image",
        "  not mapped: the address is not canonical",
    ]


def test_walk_as_json(run: Run, process: Path) -> None:
    status, shown, _ = run("walk", process, "--root", 0x100_0000, hex(VA + 8191), hex(VA + (4 << 20)), "--json")
    assert status == 1
    document = json.loads(shown)
    assert {key: document[key] for key in ("image", "root", "format")} == {
        "image": str(process), "root": "0x1000000", "format": "x86-64"
    }  # fmt: skip
    mapped, missing = document["walks"]
    assert (mapped["physical"], mapped["page_level"], mapped["not_mapped"]) == ("0x40001fff", 1, None)
    assert mapped["rights"] == {"read": True, "write": True, "user": True, "execute": False, "execute_user": False}
    assert [(e["name"], e["entry_address"], e["kind"]) for e in mapped["entries"][-2:]] == [
        ("PMD", "0x1002000", "table"), ("PTE", "0x1003008", "leaf")
    ]  # fmt: skip
    assert (missing["physical"], missing["rights"]) == (None, None)
    assert missing["entries"][-1] == {"level": 1, "name": "PTE", "entry_address": "0x999000", "value": None}


def test_dump_lists_merged_ranges_and_counts(run: Run, process: Path) -> None:
    assert run("dump", process, "--root", "process:0") == (0, """\
00007f0000000000-00007f0000002fff     12K  0x0000040000000  4K  rw-u  PRESENT|RW|USER|ACCESSED|DIRTY|SOFT_DIRTY|NX
00007f0000008000-00007f000000afff     12K  0x0000000005000  4K  r--u  PRESENT|USER|ACCESSED|SPECIAL|NX \
(3 times the same page)
00007f0000200000-00007f00003fffff      2M  0x00000c0000000  2M  rwxu  PRESENT|RW|USER|ACCESSED|DIRTY|PSE
mapped: 2072K in leaves: 6 of 4K, 1 of 2M
table pages: 4 (PGD 1, PUD 1, PMD 1, PTE 1)
entries not present but not empty: 1 (PTE 1)
PMD 0x0000000000999067 of 0x7f0000400000: points out of the image
""", "")  # fmt: skip


def test_dump_as_json(run: Run, process: Path) -> None:
    status, shown, _ = run("dump", process, "--root", "process:0", "--json")
    assert status == 0
    document = json.loads(shown)
    assert [(r["address"], r["length"], r["physical"], r["level"], r["same_page"]) for r in document["ranges"]] == [
        (hex(VA), 12288, "0x40000000", 1, False),
        (hex(VA + 0x8000), 12288, "0x5000", 1, True),
        (hex(VA + (2 << 20)), 2 << 20, "0xc0000000", 2, False),
    ]
    assert document["ranges"][1]["flags"] == ["PRESENT", "USER", "ACCESSED", "SPECIAL", "NX"]
    assert document["ranges"][1]["entry_bits"] == "0x8000000000000225"
    summary = document["summary"]
    assert summary["mapped"] == (2 << 20) + 6 * 4096
    assert summary["tables"] == {"1": 1, "2": 1, "3": 1, "4": 1}
    assert summary["leaves"] == {"1": 6, "2": 1}
    assert summary["problems"] == [
        {"what": "unreadable", "address": hex(VA + (4 << 20)), "level": 2, "entry": "0x999067"}
    ]


def test_dump_without_accessed_and_dirty_bits(run: Run, tmp_path: Path) -> None:
    tree = Tree(X86)
    for i, flags in enumerate((0x27, 0x67, 0x7)):
        tree.map(i << 12, (1 << 30) + (i << 12), 1, flags)
    path = image(tree, tmp_path / "core")
    assert run("dump", path, "--root", tree.root)[1].count("-0000") == 3
    (line, *_) = run("dump", path, "--root", tree.root, "--ignore-accessed-dirty")[1].splitlines()
    assert line == "0000000000000000-0000000000002fff     12K  0x0000040000000  4K  rwxu  PRESENT|RW|USER"


NAMES = {
    "x86-64-5": ["PGD", "P4D", "PUD", "PMD", "PTE"],
    "ept": ["PML4E", "PDPTE", "PDE", "PTE"],
    "npt-5": ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"],
    "arm64-s2": ["L1", "L2", "L3"],
    "arm64-s2-48": ["L0", "L1", "L2", "L3"],
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_levels(run: Run, name: str, tmp_path: Path) -> None:
    fmt = pf.FORMATS[name]()
    tree = Tree(fmt)
    tree.map(0x5000, 1 << 30, 1)
    status, shown, _ = run("walk", image(tree, tmp_path / "core"), "--root", tree.root, "--format", name, "0x5678")
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()[1:-1]] == NAMES[name]
    assert "physical 0x40000678, page of 4K, rwx" in shown


def test_parameters_of_formats(run: Run, tmp_path: Path) -> None:
    fmt = pf.arm64_stage2(42)
    tree = Tree(fmt)
    tree.map(7 << 39, 1 << 30, 3)
    path = image(tree, tmp_path / "core")
    arguments = ("walk", path, "--root", tree.root, hex(7 << 39), "--format", "arm64-s2")
    assert run(*arguments, "--ipa-bits", "42")[0] == 0
    assert run(*arguments)[0] == 1  # wider than 40 bits
    assert run(*arguments, "--ipa-bits", "42", "--no-fwb")[1] != run(*arguments, "--ipa-bits", "42", "--fwb")[1]
    tree = Tree(X86)
    tree.map(0, 1 << 40, 1)
    path = image(tree, tmp_path / "core")
    assert run("walk", path, "--root", tree.root, 0)[0] == 0
    status, shown, _ = run("walk", path, "--root", tree.root, 0, "--maxphyaddr", "36")
    assert status == 1
    assert "the PTE is reserved, reserved bits 0x10000000000" in shown


BAD: list[tuple[tuple[Any, ...], str]] = [
    (("walk", "{}", "0x1"), "--root is missing; the image names process:0 0x1000000 (x86-64)"),
    (("dump", "{}", "--root", "vm:0"), "--root 'vm:0': expected an address, or a name that the image gives; "
     "the image names process:0 0x1000000 (x86-64)"),
    (("dump", "{}", "--root", "0x5000"),
     "{}: root table 0x5000: not in the image, which covers 0x1000000 to 0x1004000 in 1 range"),
    (("walk", "{}", "--root", "0x1000000", "7g00"),
     "Invalid value for 'VA...': '7g00': expected a number of 64 bits, in hexadecimal with or without 0x"),
    (("walk", "{}", "--root", "0x1000000", hex(1 << 64)), f"Invalid value for 'VA...': '{hex(1 << 64)}': "
     "expected a number of 64 bits, in hexadecimal with or without 0x"),
    (("walk", "{}", "--root", "0x_", "0"), "--root '0x_': expected an address, or a name that the image gives; "
     "the image names process:0 0x1000000 (x86-64)"),
    (("walk", "{}", "--root", "0x1000000", "0x_"),
     "Invalid value for 'VA...': '0x_': expected a number of 64 bits, in hexadecimal with or without 0x"),
    (("walk", "{}", "--root", "0x1000000"), "Missing argument 'VA...'."),
    (("dump", "{}x", "--root", "0"), "{}x: cannot be opened: No such file or directory"),
    (("dump", "{}", "--root", "process:0", "--format", "ept", "--ipa-bits", "40"),
     "--ipa-bits: ept has no such parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "complaint"), BAD)
def test_bad_input_is_one_line(run: Run, process: Path, arguments: tuple[str, ...], complaint: str) -> None:
    given = [argument.replace("{}", str(process)) for argument in arguments]
    assert run(*given) == (2, "", f"pgemu: {complaint.replace('{}', str(process))}\n")


def test_neither_command_loads_the_compiler(process: Path) -> None:
    code = """
import sys
from pgemu.cli import main
for arguments in (["walk", "0x7f0000000000"], ["dump"]):
    try:
        main([arguments[0], sys.argv[1], *arguments[1:], "--root", "process:0"], prog_name="pgemu")
    except SystemExit as end:
        assert end.code == 0
print("loaded:", *{"numba", "pyarrow"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, process], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded:\n")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_reader_that_stops_reading_is_not_complained_about(tmp_path: Path, extra: list[str]) -> None:
    tree = Tree(X86)
    for i in range(0, 4096, 2):
        tree.map(i << 12, (1 << 30) + (i << 12), 1)
    path = image(tree, tmp_path / "core")
    command = [sys.executable, "-m", "pgemu", "dump", str(path), "--root", hex(tree.root), *extra]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --------------------------------------------------------------------------- many leaves


def scattered(path: Path, tables: int) -> Path:
    """An image of so many full tables, whose leaves map frames in disorder with four kinds of flags."""
    random = np.random.default_rng(tables)
    above, base = 2 + -(-tables // 512), 0x100_0000
    memory = np.zeros((above + tables, 512), np.uint64)
    memory[0, 0] = base + 4096 | 0x67
    memory[1, : above - 2] = base + 4096 * np.arange(2, above) | 0x67
    memory[2:above].reshape(-1)[:tables] = base + 4096 * np.arange(above, above + tables) | 0x67
    flags = np.array([0x67, 0x25, 1 << 63 | 0x67, 1 << 63 | 0x865], np.uint64)
    leaves = random.permutation(tables * 512).astype(np.uint64) << np.uint64(12) | random.choice(flags, tables * 512)
    memory[above:] = leaves.reshape(-1, 512)
    return write(path, core([(base, memory.tobytes(), memory.nbytes)]))


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_dump_has_no_loop_over_leaves(run: Run, tmp_path: Path, form: tuple[str, ...]) -> None:
    """Calls grow with tables and with what is made in one go; memory does not grow."""
    calls, peaks = [], []

    def count(_frame: Any, event: str, _argument: Any) -> None:
        calls[-1] += event.endswith("call")

    for tables in (128, 384, 1024):
        path = scattered(tmp_path / "core", tables)
        calls.append(0)
        sys.setprofile(count)
        try:
            status, shown, _ = run("dump", path, "--root", 0x100_0000, *form)
        finally:
            sys.setprofile(None)
        assert status == 0
        assert f"{tables * 512} of 4K" in shown or f'"leaves": {{"1": {tables * 512}}}' in shown
        tracemalloc.start()
        try:
            assert discarded(path, form) > tables * 512 * 40
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    first, second, third = calls
    assert third - second < 25 * (1024 - 384) < (1024 - 384) * 512 / 20
    assert second - first < 25 * (384 - 128)
    assert peaks[2] < 1.5 * peaks[1] < 200 << 20


def discarded(path: Path, form: tuple[str, ...]) -> int:
    """Characters that a dump writes, none of them kept."""
    written = 0

    class Nowhere:
        def write(self, text: str) -> int:
            nonlocal written
            written += len(text)
            return len(text)

        def flush(self) -> None: ...

    before, sys.stdout = sys.stdout, Nowhere()  # type: ignore[assignment]
    try:
        with pytest.raises(SystemExit):
            main(["dump", str(path), "--root", "1000000", *form], prog_name="pgemu")
    finally:
        sys.stdout = before
    return written


# --------------------------------------------------------------------------- text and JSON


WALKED = [
    *(maker() for maker in pf.FORMATS.values()),
    *(pf.FORMATS[name](**given) for name, given in (
        ("x86-64", {"c_bit": 47}), ("npt", {"c_bit": 51, "kernel": "6.1"}), ("ept", {"kernel": "6.1"}),
        ("x86-64", {"maxphyaddr": 36, "kernel": "6.12"}), ("arm64-s2", {"kernel": "6.12", "ipa_bits": 48}),
    )),
]  # fmt: skip
PLACES = (VA, 0xFFFF_8880_0000_0000, 0x40_0000)


@st.composite
def walked(draw: st.DrawFn) -> tuple[pf.PageFormat, int, int, int]:
    """A format, an address of it, the level of its last entry, and what that is: a few bits, all but a few, a leaf."""
    fmt = draw(st.sampled_from(WALKED))
    level = draw(st.integers(1, fmt.levels))
    few = st.sets(st.integers(0, 63), max_size=8).map(lambda on: sum(1 << bit for bit in on))
    entry = draw(few | few.map(lambda some: some ^ ALL) | st.integers(0, ALL))
    if level <= fmt.largest_leaf:
        entry ^= draw(st.sampled_from([0, fmt.leaf[min(level, 3) - 1]]))
    return fmt, draw(st.sampled_from([va for va in PLACES if in_range(fmt, va)])), level, entry


@given(case=walked())
@settings(max_examples=500)
def test_text_and_json_name_the_same_bits(case: tuple[pf.PageFormat, int, int, int]) -> None:
    fmt, virtual, level, entry = case
    tree = Tree(fmt)
    tree.memory.store(tree.slot(virtual, level), entry)
    steps = walk_tables(tree.memory, fmt, tree.root, virtual)
    lines, document = walk_module._show(fmt, steps, virtual), walk_module._document(fmt, steps, virtual)
    at = fmt.levels - level
    columns, as_json = re.split(r"  +", lines[1 + at].strip()), document["entries"][at]
    name, where, value, kind = columns[:4]
    kind, _, address = kind.partition(" 0x")
    rest = columns[4:]
    if not address and rest and rest[0].startswith("0x"):
        address = rest.pop(0).removeprefix("0x")
    shown = dict(flag.partition("=")[::2] for flag in rest[0].split("|")) if rest else {}
    assert (name, where, value) == (as_json["name"], f"{int(as_json['entry_address'], 16):#015x}", as_json["value"])
    assert kind == as_json["kind"].replace("_", " ")
    assert (int(address, 16) if address else None) == (as_json["address"] and int(as_json["address"], 16))
    named = {}
    for field in as_json["fields"]:
        high, _, low = field["bits"].partition(":")
        mask = (1 << int(high) + 1) - (1 << int(low or high))
        frame = field["name"] in ("PFN", "~PFN") and address and int(address, 16) == int(field["value"], 16) << 12
        if (entry & mask or int(field["value"], 16)) and not frame:
            named[field["name"]] = field["value"] if low else ""
    named |= {name.upper(): as_json[name] for name in ("reserved", "unknown") if as_json[name] != "0x0"}
    assert shown == named
    # No set bit is without a name in either.
    bits = [field["bits"].partition(":") for field in as_json["fields"]]
    covered = sum({1 << bit for high, _, low in bits for bit in range(int(low or high), int(high) + 1)})
    assert entry & ~(covered | int(as_json["reserved"], 16) | int(as_json["unknown"], 16)) == 0
