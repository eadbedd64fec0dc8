"""`pgemu decode`: what it prints, in text and JSON, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["decode", *args])


def test_every_bit_is_on_a_line_of_its_own() -> None:
    result = run("--format", "ept", "--level", "2", "80a0000123400bf3", "0x8000000000000000")
    assert result.exit_code == 0
    assert (
        result.output
        == """\
0x80a0000123400bf3  ept level 2 (2M): leaf, page 0x123400000
  read, write, user, accessed, dirty, WB
     63  SUPPRESS_VE
     55  MMU_WRITABLE
     53  HOST_WRITABLE
  51:21  PFN              0x123400
     11  MMU_PRESENT
      9  DIRTY
      8  ACCESSED
      7  LARGE
      6  IPAT
    5:3  MEMTYPE          0x6
      1  W
      0  R

0x8000000000000000  ept level 2 (2M): absent
     63  NONPRESENT
"""
    )


def test_parameters_reach_the_format() -> None:
    mmio = run("--format", "ept", "--l1tf-cache-bits", "44", "0xf8104000026").output
    assert "mmio, guest physical 0x104000000\n  generation 4\n" in mmio
    assert (
        run("--maxphyaddr", "36", "0x1000000025").output
        == """\
0x0000001000000025  x86-64 level 1 (4K): reserved
  reserved bits 0x1000000000
  62:59  PKEY             0x0
     36  (reserved)
  35:12  PFN              0x0
      5  ACCESSED
      2  USER
      0  PRESENT
"""
    )
    assert "SAVED_DIRTY" in run("0x8400000000000825").output
    assert "SOFTW5" in run("--kernel", "6.1", "0x8400000000000825").output
    assert "ENC" in run("--format", "npt", "--c-bit", "47", "0x800000000e67").output
    assert (
        "user, execute, execute user, accessed, dirty, WB\n" in run("--format", "arm64-s2", "--no-fwb", "0x7ff").output
    )
    assert "NEXT_LEVEL       0x2\n" in run("--format", "amd-v1", "--level", "3", "0x6000000000000401").output
    assert "  55  (no name)\n" in run("0x80000000000025").output


def test_json_has_every_field() -> None:
    result = run("--json", "0xfffffffffffff600", "0x8000000001234867")
    assert result.exit_code == 0
    guard, leaf = json.loads(result.output)
    assert (guard["kind"], guard["swap_type"], guard["swap_offset"]) == ("guard", 31, "0x4")
    assert guard["address"] is None
    assert (leaf["kind"], leaf["address"], leaf["write"], leaf["execute"]) == ("leaf", "0x1234000", True, False)
    assert leaf["fields"][0] == {"bits": "63", "name": "NX", "value": "0x1"}
    assert {"bits": "51:12", "name": "PFN", "value": "0x1234"} in leaf["fields"]
    assert leaf["software"] == "0x800"


@pytest.mark.parametrize(("args", "complaint"), [
    (["12345678xyz"], "'12345678xyz': expected a number of 64 bits, in hexadecimal with or without 0x"),
    (["0x10000000000000000"], "'0x10000000000000000': expected a number of 64 bits"),
    (["--", "-1"], "'-1': expected a number of 64 bits"),
    (["0x_"], "'0x_': expected a number of 64 bits"),
    (["0x"], "'0x': expected a number of 64 bits"),
    (["__"], "'__': expected a number of 64 bits"),
    (["\u0663"], "expected a number of 64 bits"),
    ([], "Missing argument 'VALUE...'"),
    (["--level", "5", "1"], "--level 5: x86-64 has levels 1 to 4"),
    (["--level", "0", "1"], "'--level': 0 is not in the range 1<=x<=6"),
    (["--format", "ia32", "1"], "'ia32' is not one of 'x86-64'"),
    (["--kernel", "5.10", "1"], "'5.10' is not one of '6.1'"),
    (["--maxphyaddr", "60", "1"], "60 bits of physical address: expected 13 to 52"),
    (["--format", "ept", "--c-bit", "47", "1"], "--c-bit: ept has no such parameter"),
    (["--format", "vtd-s2", "--fwb", "1"], "--fwb: vtd-s2 has no such parameter"),
    (["--format", "ept", "--l1tf-cache-bits", "3", "1"], "3 bits of L1 cache address"),
])  # fmt: skip
def test_bad_input_is_one_line(args: list[str], complaint: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert complaint in result.stderr
    assert result.stderr.startswith("pgemu: ")
    assert result.stderr.count("\n") == 1


def test_neither_help_nor_decoding_loads_a_compiler() -> None:
    code = "\n".join([
        "import sys",
        "from pgemu.cli import main",
        "try: main(['decode', *sys.argv[1:]])",
        "except SystemExit as end: print(end.code, *sorted({'numba', 'llvmlite', 'pyarrow'} & set(sys.modules)))",
    ])  # fmt: skip
    for args in (["--help"], ["0x867"]):
        shown = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines()[-1] == "0", shown.stderr
