"""`pgemu warmup`, on a package of two entries in the kernels' place."""

from __future__ import annotations

import os
import pty
import re
from pathlib import Path

import pytest

import pgemu
from small_package import WARM, Package

pytestmark = pytest.mark.same_with_checks

WARMUP = """
import sys
sys.path.append(sys.argv.pop(1))
from pgemu.cli import main
main(["warmup", *sys.argv[1:]], prog_name="pgemu")
"""
ROOT = str(Path(pgemu.__file__).parents[1])


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


def warmup(package: Package, *options: str, **environment: str) -> tuple[int, str, str]:
    process = package.start_python(WARMUP, ROOT, *options, **environment)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def test_it_compiles_what_compare_needs_or_all(package: Package) -> None:
    status, stdout, stderr = warmup(package)
    assert status == 0, stderr
    assert re.fullmatch(rf"1 of 1 entries compiled in [\d.]+ s, machine code in {package.cache}\n", stdout)
    assert len(package.files()) == 1
    status, stdout, stderr = warmup(package, "--all")
    assert status == 0, stderr
    assert stdout.startswith("1 of 2 entries compiled")
    assert package.is_whole()
    assert package.run() == WARM


def test_it_compiles_for_all_users_of_the_installation(package: Package) -> None:
    status, _, stderr = warmup(package, "--all", "--installation", PGEMU_CACHE_DIR="")
    assert status == 0, stderr
    assert package.files() == []
    assert len(package.files(package.package / "machine_code")) == 2
    assert package.run(PGEMU_CACHE_DIR="/proc/none", HOME="/proc/none") == WARM


DYING = "import sys; sys.executable = '/bin/true'"


def test_it_compiles_itself_what_others_died_over(package: Package) -> None:
    process = package.start_python(DYING + WARMUP, ROOT, "--all")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.startswith("2 of 2 entries compiled")
    assert package.is_whole()


def test_it_says_where_it_could_not_keep_anything(package: Package) -> None:
    status, stdout, stderr = warmup(package, PGEMU_CACHE_DIR="/proc/none", HOME="/proc/none")
    assert (status, stdout) == (2, "")
    message = "machine code would be lost: no cache folder can be written (set PGEMU_CACHE_DIR)"
    assert stderr == f"pgemu: {message}\n"


def test_a_terminal_shows_names_and_how_far_it_is(package: Package) -> None:
    terminal, other_end = pty.openpty()
    process = package.start_python(WARMUP, ROOT, "--all", stderr=other_end)
    process.communicate()
    os.close(other_end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert process.returncode == 0
    lines = shown.split("\r")
    assert any(re.fullmatch(r"pgemu: compiling kernels: 0 of 2 done, now \w+(, \w+)? *", line) for line in lines)
    assert any("increase" in line for line in lines)
    assert any("double" in line for line in lines)
    assert lines[-1] == ""  # nothing is left of it
