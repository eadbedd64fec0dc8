"""Examples in the documentation of the public API run, and there is one of each function, class and method.

Examples begin with `from pgemu import *` and `import numpy as np`. Those of a method go on from the one of its class,
anew for each.
"""

from __future__ import annotations

import doctest
import enum
import importlib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import pytest

import pgemu
from pgemu.machine.designs import DESIGNS, ROWS
from public_calls import public_classes

PARSER = doctest.DocTestParser()


def public() -> Iterator[tuple[str, Any, type | None]]:
    """(name, what it is, the class whose it is) of public functions, classes and methods."""
    for name in pgemu.__all__:
        one = getattr(pgemu, name)
        if inspect.isfunction(one):
            yield name, one, None
    for one in public_classes():
        if issubclass(one, tuple | enum.Enum | Exception | list):
            continue
        if getattr(pgemu, one.__name__, None) is one:
            yield one.__name__, one, None
        bases = [base for base in one.__mro__ if base.__module__.startswith("pgemu")]
        for name in sorted({name for base in bases for name in vars(base)}):
            member = inspect.getattr_static(one, name)
            function = getattr(member, "__func__", member)
            if isinstance(function, FunctionType) and (not name.startswith("_") or name == "__getitem__"):
                yield f"{one.__name__}.{name}", function, one


def examples(one: Any, name: str) -> doctest.DocTest:
    return PARSER.get_doctest(inspect.cleandoc(one.__doc__ or ""), {}, name, None, 0)


def run(found: doctest.DocTest, names: dict[str, Any]) -> str:
    """What went wrong, "" if nothing did. The names stay for what goes on from there."""
    said: list[str] = []
    found.globs = names
    doctest.DocTestRunner(verbose=False).run(found, out=said.append, clear_globs=False)
    return "".join(said)


MODULES = [
    "pgemu", "pgemu.cost", "pgemu.guest.program", "pgemu.guest.tlb", "pgemu.machine.presets",
    "pgemu.tables.invalidation",
    "pgemu.tables.page_table", "pgemu.tables.translation", "pgemu.trace",
]  # fmt: skip
ALL = {name: (one, owner) for name, one, owner in public()}
WITH = [name for name, (one, _) in ALL.items() if examples(one, name).examples]


@pytest.mark.parametrize("name", WITH)
def test_the_example_is_true(name: str) -> None:
    one, owner = ALL[name]
    names = {public: getattr(pgemu, public) for public in pgemu.__all__} | {"np": np, "__name__": "example"}
    try:
        if owner is not None:
            assert run(examples(owner, owner.__name__), names) == ""
        assert run(examples(one, name), names) == ""
    finally:
        for design in ROWS.keys() - {*DESIGNS}:
            del ROWS[design]


@pytest.mark.parametrize("module", MODULES)
def test_the_example_of_a_module_is_true(module: str) -> None:
    found = examples(importlib.import_module(module), module)
    assert found.examples
    assert run(found, {"__name__": "example"} | vars(importlib.import_module(module))) == ""


@pytest.mark.same_with_checks
def test_the_package_s_own_example_and_how_many_there_are() -> None:
    assert examples(pgemu, "pgemu").examples
    assert len(WITH) > 100


@pytest.mark.same_with_checks
def test_everything_public_has_an_example() -> None:
    """An example that leaves out what it prints tests nothing."""
    assert {*ALL} == {*WITH}
    for name in WITH:
        for example in examples(ALL[name][0], name).examples:
            assert doctest.ELLIPSIS not in example.options, name
            assert doctest.SKIP not in example.options, name
