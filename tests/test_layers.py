"""Imports point down: from wing to wing in one order, and between modules without a circle.

Every import counts, also one inside a function or for types only. A package's own module (its `__init__`) is its door:
it may stand above its wing, and importing a module of a package is not importing the door.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.same_with_checks

ROOT = Path(__file__).parent.parent

# From the ground up; what stands in one line stands beside each other and does not import each other.
KERNELS = (
    ("words",),
    ("formats",),
    ("engine",),
    ("tables", "text"),
    ("folios", "guest"),
    ("stage2",),
    ("process",),
    ("kvm",),
    ("gmem",),
    ("iommu",),
    ("rules",),
    ("run",),
)
PACKAGE = (
    ("errors", "sizes", "version", "whole_file"),
    ("cost",),
    ("machine",),
    ("tables",),
    ("images", "capi"),
    ("objects",),
    ("trace", "kernels"),
    ("guest", "workload", "recording"),
    ("trace door",),
    ("experiments", "exports", "adapters"),
    ("report",),
    ("benchmarking",),
    ("door",),
    ("cli", "examples", "pytest_plugin"),
    ("__main__",),
)


class Import(NamedTuple):
    """One import: the importing module and line, the imported one."""

    module: str
    line: int
    imported: str


PACKAGES = {"pgemu": (ROOT / "pgemu", PACKAGE), "pgemu_kernels": (ROOT / "kernels" / "pgemu_kernels", KERNELS)}


def modules(package: str) -> dict[str, Path]:
    """Files of a package by dotted name; that of `__init__.py` is the folder's."""
    folder = PACKAGES[package][0]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(*packages: str) -> tuple[Import, ...]:
    """Every import of one module of the packages by another."""
    return tuple(_imports({name: path for package in packages for name, path in modules(package).items()}))


def _imports(known: dict[str, Path]) -> Iterator[Import]:
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import, which is not looked at here"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                imported = name if name in known else name.rpartition(".")[0]
                if imported in known and imported != module:
                    yield Import(module, node.lineno, imported)


def wing(module: str) -> str:
    """pgemu.trace.ftrace is of "trace", pgemu.trace is the "trace door", where the order tells the two apart."""
    parts = module.split(".")
    if len(parts) == 1:
        return "door"
    orders = KERNELS if parts[0] == "pgemu_kernels" else PACKAGE
    door = f"{parts[1]} door"
    return door if len(parts) == 2 and any(door in line for line in orders) else parts[1]


def upward(package: str) -> list[str]:
    """Imports that do not point down, each with its place."""
    rank = {name: number for number, line in enumerate(PACKAGES[package][1]) for name in line}
    return [
        f"{found.module}:{found.line} imports {found.imported}"
        for found in imports(package)
        if wing(found.module) != wing(found.imported) and rank[wing(found.imported)] >= rank[wing(found.module)]
    ]


def circle(package: str) -> list[str]:
    """Modules that import each other in a circle, if any do."""
    graph: dict[str, set[str]] = {module: set() for module in modules(package)}
    for found in imports(package):
        graph[found.module].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    assert upward(package) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    assert circle(package) == []


def test_the_kernels_know_nothing_of_the_package() -> None:
    own = modules("pgemu_kernels")
    assert [f for f in imports("pgemu_kernels", "pgemu") if f.module in own and f.imported not in own] == []


def test_the_core_knows_no_object() -> None:
    """What pgemu/machine/core.py reaches, directly or not, is of its own wing or below."""
    reach = {"pgemu.machine.core"}
    while True:
        more = {found.imported for found in imports("pgemu") if found.module in reach} - reach
        if not more:
            break
        reach |= more
    assert {wing(module) for module in reach} <= {"machine", "cost", "errors", "version", "whole_file"}
