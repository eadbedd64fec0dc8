"""pgemu.h and pgemu_words.h say what is so, and compile wherever they are included."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import pgemu
from c_calls import compiler
from pgemu import capi
from pgemu.capi.__main__ import compile_flags, link_flags, main
from pgemu.machine.event_meanings import EVENTS, GAUGES
from pgemu.trace import COLUMNS
from pgemu_kernels.run.c_entries import FUNCTIONS
from pgemu_kernels.words import call_words
from pgemu_kernels.words.operations import Operation

pytestmark = pytest.mark.same_with_checks

INCLUDE = Path(pgemu.get_include())
HEADER = (INCLUDE / "pgemu.h").read_text()
WORDS = (INCLUDE / "pgemu_words.h").read_text()


def number(name: str) -> int:
    found = re.search(rf"^#define PGEMU_{name} \(?(-?\d+)\)?", HEADER, re.MULTILINE)
    assert found
    return int(found[1])


def test_the_words_are_those_of_the_kernels() -> None:
    assert capi.words_header() == WORDS, "write pgemu.capi.words_header() to pgemu/include/pgemu_words.h"
    assert f"#define PGEMU_OP_CONVERT {int(Operation.CONVERT)}\n" in WORDS


def test_each_operation_says_what_it_reads_and_each_event_and_gauge_what_it_is() -> None:
    told = re.sub(r"\n \* ", " ", WORDS)
    for op, columns in COLUMNS.items():
        found = re.search(rf"(?:/\* ([^\n]*) \*/\n)?#define PGEMU_OP_{op.name} \d+(?: /\* (.*) \*/)?\n", told)
        assert found
        said = found[2] or found[1]
        assert all(f"{name}: {meaning}" in said for name, meaning in columns.items()), op
    assert all(meaning in told for meaning in (*EVENTS.values(), *GAUGES.values()))
    assert "object: pin, below 256" in WORDS


def test_the_table_is_what_the_header_says() -> None:
    functions = re.findall(r"int64_t \(\*(\w+)\)\(pgemu_machine \*m,?\s*([^;]*)\);", HEADER)
    assert [name for name, _ in functions] == list(FUNCTIONS)
    counts = {name: len(parameters.split(",")) for name, parameters in functions}
    assert counts == {name: entry.signature.count("uint64") - 1 for name, entry in FUNCTIONS.items()}


def test_numbers_of_the_header_are_those_of_the_kernels() -> None:
    assert number("ABI") == capi.ABI
    assert f'"{capi.CAPSULE.decode()}"' in HEADER
    codes = {"MACHINE": "BAD_MACHINE", "ARGUMENT": "BAD_ARGUMENT", "POINTER": "BAD_POINTER", "CODE": "NO_CODE"}
    assert {name: number(f"ERROR_{name}") for name in codes} == {
        name: getattr(call_words, code) for name, code in codes.items()
    }


@pytest.mark.parametrize(("tool", "standard", "language"), [("gcc", "c99", "c"), ("g++", "c++11", "c++")])
@pytest.mark.parametrize("python", [True, False], ids=["with Python", "without"])
def test_the_header_compiles_without_a_warning(tool: str, standard: str, language: str, python: bool) -> None:
    source = "#include <pgemu.h>\nint main(void) { pgemu_api const *api = 0; return api != 0; }\n"
    command = [compiler(tool), f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-x{language}", "-"]
    command += compile_flags() if python else [f"-I{INCLUDE}", "-DPGEMU_NO_PYTHON", "-Wpedantic"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("tool", "standard", "language"), [("gcc", "c99", "c"), ("g++", "c++11", "c++")])
@pytest.mark.parametrize("python", [True, False], ids=["with Python", "without"])
@pytest.mark.parametrize("headers", [("pgemu.h", "pgemu_shared.h"), ("pgemu_shared.h", "pgemu.h")], ids=" ".join)
def test_both_headers_compile_together_in_any_order(
    headers: tuple[str, str], tool: str, standard: str, language: str, python: bool
) -> None:
    """What both name is the same number: another one would be a redefinition, which is a warning."""
    if python and language == "c":
        standard = "gnu99"  # Python.h says what strict C99 leaves out of system headers, and is no longer the first
    source = "".join(f"#include <{header}>\n" for header in headers)
    source += "int main(void) { return PGEMU_WALK_OK + PGEMU_WALK_PERMISSION == PGEMU_WALK_CHANGING; }\n"
    command = [compiler(tool), f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-x{language}", "-"]
    command += compile_flags() if python else [f"-I{INCLUDE}", "-DPGEMU_NO_PYTHON", "-Wpedantic"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_flags_for_a_compiler_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.split() == compile_flags() + link_flags()
    assert main(["--cflags"]) == 0
    assert capsys.readouterr().out.split() == compile_flags()
    assert main(["--libs"]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
