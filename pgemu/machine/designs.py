"""Designs and orders of conversion as data. A design that combines what exists is a row here, and no more.

Its limits and sources can be said in pgemu/report; until then the report says that nobody has.

What each property means stands in pgemu_kernels/words/properties.py; the steps of each order in
pgemu_kernels/gmem/orders.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pgemu_kernels.words.operations import (
    CONVERT_FIXUP,
    CONVERT_JAN2026,
    CONVERT_NEXT4K,
    CONVERT_RFC2,
    CONVERT_SLIDES,
)
from pgemu_kernels.words.properties import Property

__all__ = ("DEFAULTS", "DESIGNS", "ORDERS", "ROWS", "SLIDES", "Design", "Order", "Row", "row_of")

Design = Literal["restructure", "pfnmap"] | str
"""One of these two, or one that was added (own_designs.py)."""


class Order(NamedTuple):
    """An order of conversion: its number for kernels, properties that it has, and those of a design that it lacks."""

    number: int
    properties: Property = Property(0)
    without: Property = Property(0)


# What fields of Config are where they are not given: those that no design has otherwise.
DEFAULTS: Mapping[str, Any] = MappingProxyType({"batch": "block", "zero": "folio"})


class Row(NamedTuple):
    """A design: its properties, its order, and which of DEFAULTS it has otherwise.

    Without an order, that is a parameter of the machine.
    """

    properties: Property
    order: Order | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})

    def default(self, name: str) -> Any:
        """What a field of Config is where it is not given."""
        return self.defaults.get(name, DEFAULTS[name])


ORDERS = {  # those that a machine may be given
    "rfc2": Order(int(CONVERT_RFC2), Property.NAMES_PAGE | Property.KEEPS_REFERENCE),
    "fixup": Order(int(CONVERT_FIXUP), Property.PREALLOCATES | Property.KEEPS_REFERENCE),
    "jan2026": Order(int(CONVERT_JAN2026), Property.PREALLOCATES),
    "next4k": Order(int(CONVERT_NEXT4K), Property.PREALLOCATES | Property.DRAINS_LRU, without=Property.ROUNDS_RANGES),
}
SLIDES = Order(int(CONVERT_SLIDES), Property.PREALLOCATES)

ROWS = {
    # Folios are 4K while any of their pages is shared, and merged afterwards.
    "restructure": Row(Property.GUP | Property.SPLITS_FOLIOS | Property.LEVEL_BY_FOLIO | Property.ROUNDS_RANGES),
    # The VMA is VM_PFNMAP and entries are inserted by PFN (slides of 2025-08-07); the order beside is inference.
    "pfnmap": Row(
        Property.SPECIAL_ENTRIES | Property.VMA_PFNMAP | Property.INSERTS_LOCKED | Property.HOLES_UNMAP,
        SLIDES,
        # Nothing is done huge page by huge page; PG_uptodate of a folio that stays whole cannot tell what is zeroed.
        MappingProxyType({"batch": "range", "zero": "page"}),
    ),
}
DESIGNS: tuple[Design, ...] = ("restructure", "pfnmap")


def row_of(design: str, order: str, invalidate: str) -> tuple[Property, int]:
    """The properties of a machine and the number of its order (R_PROPERTIES, R_CONVERT_ORDER)."""
    row = ROWS[design]
    chosen = row.order or ORDERS[order]
    without = chosen.without | (Property.ROUNDS_RANGES if invalidate == "exact" else Property(0))
    return (row.properties & ~without) | chosen.properties, chosen.number
