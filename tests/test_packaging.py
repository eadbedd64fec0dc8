"""What a user gets: the wheel, the commands and the example of the README."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHIPPED_TRACE = "pgemu/data/vm-convert-swprot.ftrace.txt.xz"

LOOK = f"""
import importlib.metadata, importlib.resources
import pgemu, pgemu.cli, pgemu.trace
import pgemu_kernels, pgemu_kernels.words
for package in (pgemu, pgemu_kernels):
    print(package.__file__)
    print(importlib.resources.files(package).joinpath("py.typed").is_file())
print(pgemu.__version__ == importlib.metadata.version("pgemu"))
print(*(one.group + ":" + one.name for one in importlib.metadata.distribution("pgemu").entry_points))
trace = importlib.resources.files("pgemu").joinpath("{SHIPPED_TRACE.removeprefix("pgemu/")}")
print(trace)
print(len(pgemu.trace.load(pgemu.trace.shipped()).records))
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("pgemu-*-py3-none-any.whl")
    return built


def sources(package: Path) -> set[str]:
    """Names in the wheel of a package's files."""
    files = [path for path in package.rglob("*") if path.is_file()]
    kept = [
        path for path in files if path.suffix in (".py", ".typed", ".xz", ".h", ".c", ".cc", ".cpp", ".json", ".md")
    ]
    return {path.relative_to(package.parent).as_posix() for path in kept}


@pytest.mark.same_with_checks
def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert names == sources(ROOT / "pgemu") | sources(ROOT / "kernels" / "pgemu_kernels")
    assert SHIPPED_TRACE in names
    assert len(licences) == 1


@pytest.mark.same_with_checks
def test_the_installed_wheel_works_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--no-deps", "--target", target, wheel)
    # The dependencies come from this environment; an editable installation of pgemu in it comes after the target.
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package, typed, kernels, kernels_typed, version, scripts, trace, records = done.stdout.splitlines()
    assert Path(package).parent == target / "pgemu"
    assert Path(kernels).parent == target / "pgemu_kernels"
    assert [typed, kernels_typed, version] == ["True", "True", "True"]
    assert scripts.split() == ["console_scripts:pgemu", "pytest11:pgemu"]
    assert Path(trace).read_bytes() == (ROOT / SHIPPED_TRACE).read_bytes()
    assert int(records) > 16_825  # each guest fault is a record


def commands() -> list[str]:
    """The README's commands that make an environment."""
    return re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)


def test_two_commands_on_one_line_each_are_complete() -> None:
    compare, tests = commands()
    assert compare.endswith("&& .venv/bin/pgemu compare")
    assert tests.endswith("&& .venv/bin/pytest")


def test_ci_runs_the_second_command() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line.strip() for line in script.read_text().splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    wanted = commands()[1].split(" && ")
    assert [part for part in parts if part in wanted] == wanted  # each once, in this order
    assert not [part for part in parts if ("-m venv" in part or "pip install" in part) and part not in wanted]
    assert os.access(script, os.X_OK)


def test_the_example_prints_what_the_readme_says() -> None:
    example = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    output = "".join(re.findall(r"^# (.*\n)", example, re.MULTILINE))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue() == output
    assert output.count("\n") == 2


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.same_with_checks
def test_commands_that_the_readme_names_are_there() -> None:
    """Those of pgemu itself, in the text as well; their options are for tests/cli/test_names.py."""
    from pgemu.cli import main

    named = set(re.findall(r"`pgemu ([a-z]+)", README))
    assert {"compare", "replay", "guest", "verify", "audit"} <= named <= {*main.list_commands(None)}  # type: ignore[arg-type]
    assert {*re.findall(r"`pgemu trace`.*?`([a-z]+)`", README)} <= {"convert"}
