"""Designs and orders of conversion as data. A design that combines what exists is a row here, and no more.

Its limits and sources can be said in pgemu/report; until then the report says that nobody has.

What each property means stands in pgemu_kernels/words/properties.py; the steps of each order in
pgemu_kernels/gmem/orders.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pgemu_kernels.words.operations import (
    CONVERT_FIXUP,
    CONVERT_JAN2026,
    CONVERT_NEXT4K,
    CONVERT_RFC2,
    CONVERT_SLIDES,
)
from pgemu_kernels.words.properties import Property

__all__ = ("DESIGNS", "ORDERS", "PFNMAP", "ROWS", "SLIDES", "Design", "Order", "Row", "row_of")

Design = Literal["restructure", "pfnmap"]


class Order(NamedTuple):
    """An order of conversion: its number for kernels, properties that it has, and those of a design that it lacks."""

    number: int
    properties: Property = Property(0)
    without: Property = Property(0)


class Row(NamedTuple):
    """A design: its properties, and its order. Without one, the order is a parameter of the machine."""

    properties: Property
    order: Order | None = None


ORDERS = {  # those that a machine may be given
    "rfc2": Order(int(CONVERT_RFC2), Property.ZAPS_EXACTLY | Property.NAMES_PAGE | Property.KEEPS_REFERENCE),
    "fixup": Order(int(CONVERT_FIXUP), Property.ZAPS_EXACTLY | Property.PREALLOCATES | Property.KEEPS_REFERENCE),
    "jan2026": Order(int(CONVERT_JAN2026), Property.PREALLOCATES),
    "next4k": Order(int(CONVERT_NEXT4K), Property.PREALLOCATES | Property.DRAINS_LRU, without=Property.ROUNDS_RANGES),
}
SLIDES = Order(int(CONVERT_SLIDES), Property.PREALLOCATES)

ROWS = {
    # Folios are 4K while any of their pages is shared, and merged afterwards.
    "restructure": Row(Property.GUP | Property.SPLITS_FOLIOS | Property.LEVEL_BY_FOLIO | Property.ROUNDS_RANGES),
    # The VMA is VM_PFNMAP and entries are inserted by PFN (slides of 2025-08-07); the order beside is inference.
    "pfnmap": Row(
        Property.SPECIAL_ENTRIES | Property.VMA_PFNMAP | Property.INSERTS_LOCKED | Property.HOLES_UNMAP, SLIDES
    ),
}
DESIGNS: tuple[Design, ...] = ("restructure", "pfnmap")


# Presets of pfnmap, each the defects of a machine that is like it. "corrected" is the design with what it has to have:
# a hole unmaps its range first, and an entry is inserted under the invalidate_lock. "slides2025" is the smallest change
# as it was built and captured (tests/data/oracle-pfnmap): its holes leave entries alone, and its fault handler inserts
# under the folio's lock alone.
PFNMAP: dict[str, tuple[str, ...]] = {"corrected": (), "slides2025": ("punch-keeps-entries", "insert-unlocked")}


def row_of(design: str, order: str) -> tuple[Property, int]:
    """The properties of a machine and the number of its order (R_PROPERTIES, R_CONVERT_ORDER)."""
    row = ROWS[design]
    chosen = row.order or ORDERS[order]
    return (row.properties & ~chosen.without) | chosen.properties, chosen.number
