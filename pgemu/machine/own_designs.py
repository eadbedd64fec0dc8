"""Designs that a user of the library adds: rows beside those of designs.py, for this process."""

from __future__ import annotations

import re
from typing import Literal

from pgemu.machine.arguments import guards
from pgemu.machine.designs import DEFAULTS, DESIGNS, ORDERS, ROWS, SLIDES, Row
from pgemu.machine.field_rules import shown
from pgemu_kernels.words.properties import Property

__all__ = ("add_design",)

OrderName = Literal["rfc2", "fixup", "jan2026", "next4k", "slides"]

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_OF_ORDERS = Property.PREALLOCATES | Property.NAMES_PAGE | Property.DRAINS_LRU | Property.KEEPS_REFERENCE
_OF_DESIGNS = ~_OF_ORDERS
# Two that no kernel has together, and where it says so.
_APART = (
    (Property.GUP, Property.VMA_PFNMAP, "mm/gup.c:check_vma_flags()"),
    (Property.GUP, Property.SPECIAL_ENTRIES, "mm/memory.c:vm_normal_page()"),
)


@guards()
def add_design(
    name: str,
    properties: Property,
    *,
    order: OrderName | None = None,
    batch: Literal["range", "block"] = "block",
    zero: Literal["folio", "page"] = "folio",
) -> None:
    """Add a design, which Config, compare() and `--design` then know by its name, in this process.

    >>> frames = Property.SPECIAL_ENTRIES | Property.INSERTS_LOCKED | Property.ROUNDS_RANGES
    >>> add_design("frames", frames, order="slides", batch="range", zero="page")
    >>> from pgemu import Config, Machine
    >>> Machine(Config("frames", pool=2 << 20, page_size=2 << 20)).config.design
    'frames'

    A design is a row of properties: what the steps of both designs ask for. Nothing of it is a claim about
    Linux, so that reports of it name no sources and no limits.

    :param name: lower-case letters, digits and hyphens
    :param properties: pgemu_kernels.words.properties says what each does; those of an order come from `order`
    :param order: of a conversion's steps (pgemu_kernels.gmem.orders); None: it is the machine's, Config.order
    :param batch: what Config.batch is where it is not given: how much is converted at a time
    :param zero: what Config.zero is where it is not given: how much a first touch zeroes
    :raises TypeError: an argument of another type
    :raises ValueError: a name that is none, or that another design has; properties of orders, or that exclude others
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {shown(name)}: expected lower-case letters, digits and hyphens, a letter first")
    if properties & _OF_ORDERS:
        raise ValueError(f"properties {properties!r}: expected none of {_OF_ORDERS!r}, which an order has")
    for one, other, where in _APART:
        if one in properties and other in properties:
            raise ValueError(f"properties {properties!r}: expected {one.name} or {other.name}, not both: {where}")
    given = {"batch": batch, "zero": zero}
    orders = {**ORDERS, "slides": SLIDES}
    row = Row(
        properties,
        None if order is None else orders[order],
        {field: value for field, value in given.items() if value != DEFAULTS[field]},
    )
    if name in DESIGNS or (name in ROWS and ROWS[name] != row):
        raise ValueError(f"name {shown(name)}: expected one that no other design has, known are {', '.join(ROWS)}")
    ROWS[name] = row
