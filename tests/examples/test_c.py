"""The examples in C and C++ are built by the line that stands in them, and do what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pgemu

FOLDER = Path(pgemu.get_include()).with_name("examples") / "c"
COMPILERS = {"cc": "gcc", "c++": "g++"}


def built(source: Path, folder: Path) -> Path:
    """The program that the build line of its comment makes. Skips without a compiler."""
    found = re.search(r"^ \* +(cc|c\+\+) (.*) \$\(python -m pgemu\.capi\)$", source.read_text(), re.MULTILINE)
    assert found, f"no build line in {source}"
    if shutil.which(COMPILERS[found[1]]) is None:
        pytest.skip(f"no {COMPILERS[found[1]]}")
    flags = subprocess.run([sys.executable, "-m", "pgemu.capi"], capture_output=True, text=True, check=True).stdout
    program = folder / source.stem
    words = [str(program) if word == source.stem else word for word in shlex.split(found[2])]
    command = [COMPILERS[found[1]], "-Wall", "-Wextra", "-Werror", *words, *flags.split()]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def printed(program: Path, *arguments: int) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_designs_are_called_from_c(tmp_path: Path) -> None:
    text = printed(built(FOLDER / "designs.c", tmp_path), 2048, 20000)
    designs = re.split(r"^(restructure|pfnmap)$", text, flags=re.MULTILINE)[1:]
    assert designs[0::2] == ["restructure", "pfnmap"]
    for part in designs[1::2]:
        assert re.search(r"translate, random +20000 calls", part)
        assert re.search(r"convert to private +1024 calls", part)
    splits = [re.search(r"folios split: (\d+)", part) for part in designs[1::2]]
    assert [found and found[1] for found in splits] == ["1", "0"]


def test_a_tlb_in_cpp_stands_in_front_of_nested_walks(tmp_path: Path) -> None:
    text = printed(built(FOLDER / "nested.cpp", tmp_path), 20000)
    found = re.findall(r"^(\w+) +20000 accesses, (\d+) hits, (\d+) walks, .*sum (\w+)$", text, re.MULTILINE)
    assert [design for design, *_ in found] == ["restructure", "pfnmap"]
    hits = [int(number) for _, number, _, _ in found]
    walks = [int(number) for _, _, number, _ in found]
    # Once a page of 1G is split, each 4K of it is an entry of the TLB's own; pfnmap keeps leaves of 2M elsewhere.
    assert hits[0] < hits[1]
    assert walks[0] > walks[1]
    assert found[0][3] == found[1][3]  # both map the same frames


def test_a_program_built_for_another_abi_is_told_so(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    header = (Path(pgemu.get_include()) / "pgemu.h").read_text()
    assert header.count("#define PGEMU_ABI 1\n") == 1
    (tmp_path / "pgemu.h").write_text(header.replace("#define PGEMU_ABI 1\n", "#define PGEMU_ABI 2\n"))
    (tmp_path / "other.c").write_text(OTHER_ABI)
    flags = subprocess.run([sys.executable, "-m", "pgemu.capi"], capture_output=True, text=True, check=True).stdout
    command = ["gcc", f"-I{tmp_path}", "-o", str(tmp_path / "other"), str(tmp_path / "other.c"), *flags.split()]
    subprocess.run(command, check=True)
    assert (
        printed(tmp_path / "other") == "ImportError: pgemu has C ABI 1, this program was built for 2: build it again\n"
    )


OTHER_ABI = """
#include <Python.h>
#include "pgemu.h"

int main(void)
{
    PyObject *type, *value, *trace;

    Py_Initialize();
    if (pgemu_import())
        return 1;
    PyErr_Fetch(&type, &value, &trace);
    printf("%s: %s\\n", ((PyTypeObject *)type)->tp_name, PyUnicode_AsUTF8(PyObject_Str(value)));
    return 0;
}
"""
