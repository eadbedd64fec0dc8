"""C and C++ programs of tests, compiled where there is a compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import pgemu

PACKAGE = Path(pgemu.__file__).parent
INCLUDE = PACKAGE / "include"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-O2")


def compiled(source: Path, program: Path, *options: str, compiler: str = "gcc") -> Path:
    """The program of a source file; the test is skipped where there is no compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    command = [compiler, *STRICT, *options, "-I", str(INCLUDE), str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return program
