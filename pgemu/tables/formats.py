"""Entry formats by name, with parameters that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from pgemu.machine.field_rules import shown
from pgemu_kernels.formats.iommu import taller
from pgemu_kernels.formats.page_format import FORMATS, PageFormat

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("add_formats", "format_of")


def format_of(name: str, parameters: Mapping[str, Any]) -> PageFormat:
    """A format of a name of FORMATS. ValueError for another name, for a parameter that it does not have or refuses."""
    if name not in FORMATS:
        raise ValueError(f"fmt {shown(name)}: expected one of {', '.join(FORMATS)}")
    known = [one for one in signature(FORMATS[name]).parameters if one != "name"]
    if unknown := sorted(parameters.keys() - {*known}):
        raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(known)} with {name}")
    return FORMATS[name](**parameters)


def add_formats(machine: Core, fmt: PageFormat) -> dict[int, PageFormat]:
    """The machine's rows of a format and of those that it grows to, the least first."""
    rows: dict[int, PageFormat] = {}
    above = 0
    for one in reversed([fmt, *taller(fmt)]):
        above = machine.add_format(one, above)
        rows[above] = one
    return dict(reversed(rows.items()))
