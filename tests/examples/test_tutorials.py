"""Every example runs, and prints what its documentation says."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pgemu.examples
from pgemu.examples.__main__ import FOLDER, examples, main
from pgemu.machine.designs import DESIGNS, ROWS

NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


def documentation(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""


SAYING = [name for name in NAMES if "It prints:" in documentation(name)]


@pytest.mark.parametrize("name", SAYING)
def test_it_prints_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, expected = documentation(name).partition("It prints:\n\n")
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        for design in ROWS.keys() - {*DESIGNS}:
            del ROWS[design]
    assert capsys.readouterr().out == textwrap.dedent(expected).rstrip() + "\n"
    assert expected


def test_the_package_lists_them_and_so_does_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^(\w+)  +\S", pgemu.examples.__doc__ or "", re.MULTILINE)
    assert {"page_tables", "nested_walk", "both_designs", "own_trace", "tlb", "own_design"} <= {*listed} <= {*NAMES}
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[: len(NAMES)]] == NAMES
    assert all(text.endswith(".") for text in examples().values())


def test_one_is_run_by_its_name_and_no_other_one() -> None:
    command = [sys.executable, "-m", "pgemu.examples"]
    done = subprocess.run([*command, "page_tables"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("EditResult(")
    wrong = subprocess.run([*command, "page-tables"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("no example 'page-tables': expected one of ")
    assert Path(pgemu.examples.__file__).parent == FOLDER
