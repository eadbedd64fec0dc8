"""Entry formats by name, with parameters that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from pgemu.machine.field_rules import shown
from pgemu_kernels.formats.page_format import FORMATS, PageFormat

__all__ = ("format_of",)


def format_of(name: str, parameters: Mapping[str, Any]) -> PageFormat:
    """A format of a name of FORMATS. ValueError for another name, for a parameter that it does not have or refuses."""
    if name not in FORMATS:
        raise ValueError(f"fmt {shown(name)}: expected one of {', '.join(FORMATS)}")
    known = [one for one in signature(FORMATS[name]).parameters if one != "name"]
    if unknown := sorted(parameters.keys() - {*known}):
        raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(known)} with {name}")
    return FORMATS[name](**parameters)
