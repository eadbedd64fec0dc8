"""Rules of every source file: how long functions and files may be, and that a kernel's name stands for one thing."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.same_with_checks

ROOT = Path(__file__).parents[1]
PACKAGES = {"pgemu": ROOT / "pgemu", "pgemu_kernels": ROOT / "kernels" / "pgemu_kernels"}
LONGEST_FUNCTION, LONGEST_FILE = 60, 500
# Each is one call with the bits of a format by name and level: a table, which is read top to bottom.
TABLES = {"formats.ept.ept", "formats.arm64.arm64_stage2"}
# Python's doors to the entries of the machine code have the names of their kernels.
STAND_INS = "run.entries"


def sources(package: str) -> Iterator[tuple[str, str]]:
    """Modules of a package, without its name, and their text."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        yield ".".join(path.relative_to(folder).with_suffix("").parts), path.read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_can_be_seen_at_once(package: str) -> None:
    long = {
        f"{module}.{node.name}"
        for module, text in sources(package)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    }
    assert long == (TABLES if package == "pgemu_kernels" else set())


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_about_one_thing(package: str) -> None:
    lengths = {module: len(text.splitlines()) for module, text in sources(package)}
    assert {module: lines for module, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_asserts_do_nothing_that_is_missing_without_them(package: str) -> None:
    """python -O leaves them out: they compare what is there."""
    harmless = {"isinstance", "len", "tuple", "all", "any", "set", "sorted"}
    calls = {
        f"{module}:{node.lineno} {ast.unparse(call.func)}"
        for module, text in sources(package)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert)
        for call in ast.walk(node.test)
        if isinstance(call, ast.Call) and ast.unparse(call.func) not in harmless
    }
    assert calls == set()


def functions(text: str) -> Iterator[str]:
    """Functions that a module makes, by def or by a call.

    `x = full_only(module.x, otherwise)` makes none: it is x, left out where machines have no parameters.
    """
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name, call = ast.unparse(node.targets[0]), node.value
            again = ast.unparse(call.func) == "full_only" and ast.unparse(call.args[0]).rpartition(".")[2] == name
            if name.islower() and not again:
                yield name


def test_a_kernel_s_name_stands_for_one_thing() -> None:
    found = defaultdict(list)
    for module, text in sources("pgemu_kernels"):
        if module != STAND_INS:
            for name in functions(text):
                found[name].append(module)
    assert len(found) > 1000
    assert {name: modules for name, modules in found.items() if len(modules) > 1 and name[0] != "_"} == {}


def test_a_constant_s_name_has_one_value() -> None:
    found = defaultdict(set)
    for module, text in sources("pgemu_kernels"):
        loaded = importlib.import_module(f"pgemu_kernels.{module.removesuffix('.__init__')}")
        for node in ast.parse(text).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and target.id.isupper() and target.id[0] != "_":
                value = getattr(loaded, target.id)
                if isinstance(value, int | np.integer):
                    found[target.id].add(int(value))
    assert len(found) > 500
    assert {name: values for name, values in found.items() if len(values) > 1} == {}
