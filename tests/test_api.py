"""The public API: named in one place, kept, annotated to dtypes, and each of it with an example that runs."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pgemu
from api_list import CHANGED, LIST, api, fields, members
from pgemu.machine import arrays
from public_calls import public_classes

pytestmark = pytest.mark.same_with_checks


def test_what_is_public_stays_what_it_is() -> None:
    """pgemu follows semantic versioning: nothing of the API changes without this list, and what CHANGELOG.md says."""
    kept, found = LIST.read_text().splitlines(), api().splitlines()
    changes = [line for line in difflib.unified_diff(kept, found, lineterm="", n=0) if line[:3] not in ("---", "+++")]
    assert not changes, "\n".join([CHANGED, *changes])
    assert len(found) > 800


def test_every_name_is_in_one_group_and_in_the_documentation() -> None:
    names = [name for group in pgemu.GROUPS.values() for name in group]
    assert sorted([*names, "__version__"]) == sorted(pgemu.__all__)
    assert len(names) == len({*names})
    shown = dict(re.findall(r"^(\w+): .*\n((?:    .*\n)+)", inspect.getdoc(pgemu) or "", re.MULTILINE))
    listed = {group: {*re.findall(r"\w+", text)} for group, text in shown.items()}
    assert listed == {group: {*names} for group, names in pgemu.GROUPS.items()}
    assert {*pgemu.__all__} <= {*dir(pgemu)}


def annotations() -> Iterator[tuple[str, str, Any]]:
    """(what, an annotation, the module whose names it has) of everything in the list."""
    for one in public_classes():
        where = sys.modules[one.__module__]
        for name, kind in fields(one).items():
            yield f"{one.__name__}.{name}", kind, where
        for name, member in [*members(one), ("__init__", vars(one).get("__init__"))]:
            for part in ("__func__", "fget", "func"):
                member = getattr(member, part, member)
            if inspect.isfunction(member):
                function = inspect.unwrap(member)
                for parameter, kind in function.__annotations__.items():
                    yield f"{one.__name__}.{name}({parameter})", str(kind), sys.modules[function.__module__]
    for name in pgemu.__all__:
        function = inspect.unwrap(getattr(pgemu, name)) if callable(getattr(pgemu, name)) else None
        if inspect.isfunction(function):
            for parameter, kind in function.__annotations__.items():
                yield f"{name}({parameter})", str(kind), sys.modules[function.__module__]


def of_any_dtype(kind: Any) -> bool:
    """Whether a type is an array that does not say what is in it."""
    return kind is np.ndarray or (
        getattr(kind, "__origin__", None) is np.ndarray and getattr(kind.__args__[-1], "__args__", (Any,))[0] is Any
    )


def test_every_public_array_says_its_dtype() -> None:
    bare, with_dtype = set(), set()
    for what, annotation, module in annotations():
        for node in ast.walk(ast.parse(annotation, mode="eval")):
            text = ast.unparse(node)
            if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and re.search(
                r"\b(nd)?array\b|NDArray", text
            ):
                (bare if re.search(r"ndarray|NDArray\[Any|ArrayLike", text) else with_dtype).add(what)
            if isinstance(node, ast.Name):
                kind = getattr(module, node.id, None)
                if of_any_dtype(kind):
                    bare.add(what)
                elif kind is not None and kind is getattr(arrays, node.id, None):
                    with_dtype.add(what)
    assert bare == set()
    assert len(with_dtype) > 100


def test_an_array_without_a_dtype_is_found() -> None:
    assert of_any_dtype(np.ndarray)
    assert of_any_dtype(np.ndarray[Any, Any])
    assert of_any_dtype(np.typing.NDArray[Any])
    assert not of_any_dtype(arrays.U64)
    assert not of_any_dtype(np.typing.NDArray[np.void])
