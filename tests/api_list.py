"""The public API as text: every public name, what it is called with, what it gives back. `python tests/api_list.py`."""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import pgemu
from public_calls import public_classes

LIST = Path(__file__).parent / "data" / "api.txt"
CHANGED = (
    "the public API is another one. If that is meant: python tests/api_list.py > tests/data/api.txt, and a line in "
    "CHANGELOG.md, under Breaking if something went, is called otherwise or gives back something else"
)


# Attributes of Machine without an underscore that its own modules share.
NOT_PROMISED = {"fast_entry", "formats_made", "single", "tables_made"}


class _Written:
    """An annotation, shown as it is written."""

    def __init__(self, annotation: Any) -> None:
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    """As it is written, but for what stands before it."""
    found = inspect.signature(inspect.unwrap(function))
    parameters = [
        one.replace(annotation=_Written(one.annotation))
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    return str(found.replace(parameters=parameters, return_annotation=_Written(found.return_annotation)))


def members(one: type) -> Iterator[tuple[str, Any]]:
    """What a class, or one of this package that it is made of, has without being asked for an underscore."""
    names = {name for base in one.__mro__ if base.__module__.startswith("pgemu") for name in vars(base)}
    for name in sorted(names):
        if (not name.startswith("_") and name not in NOT_PROMISED) or name in ("__getitem__", "__len__"):
            yield name, inspect.getattr_static(one, name)


def fields(one: type) -> dict[str, str]:
    """Public fields of a dataclass or a named tuple, with their types."""
    found: dict[str, str] = {}
    for base in reversed(one.__mro__):
        if base.__module__.startswith("pgemu"):
            for name, kind in vars(base).get("__annotations__", {}).items():
                if not name.startswith("_") and name not in NOT_PROMISED:
                    found[name] = getattr(kind, "__forward_arg__", str(kind))
    return found


def lines_of(one: type) -> Iterator[str]:
    """A class, line by line."""
    if issubclass(one, enum.Enum):
        yield from (f"    {member.name} = {int(member.value)}" for member in one)
    else:
        yield from (f"    {name}: {kind}" for name, kind in fields(one).items())
    for name, member in members(one):
        kinds = (property, cached_property)
        if isinstance(member, kinds):
            get: Any = member.fget if isinstance(member, property) else member.func
            settable = ", settable" if isinstance(member, property) and member.fset else ""
            yield f"    {name} -> {signature(get).rpartition('-> ')[2]} (attribute{settable})"
        elif isinstance(member, classmethod | staticmethod | FunctionType):
            yield f"    {name}{signature(getattr(member, '__func__', member))}"


def api() -> str:
    """The whole list."""
    lines = []
    for group, names in pgemu.GROUPS.items():
        lines.append(f"# {group}")
        for name in names:
            one = getattr(pgemu, name)
            made = inspect.isclass(one) and not issubclass(one, tuple | enum.Enum | Exception | list)
            lines.append(f"{name}{signature(one) if not inspect.isclass(one) or made else ''}")
            if inspect.isclass(one):
                lines += lines_of(one)
        lines.append("")
    named = {getattr(pgemu, name) for names in pgemu.GROUPS.values() for name in names}
    lines.append("# what these give back, or are made of")
    for one in public_classes():
        if one not in named:
            lines += [one.__name__, *lines_of(one)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(api())
