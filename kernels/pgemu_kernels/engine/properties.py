"""What the machine's design is like: the only kernels that know, and they know properties, not names.

A design is a row of properties and an order of conversion (pgemu/machine/designs.py); words/properties.py tells what
each means. The names below are kernels that take the machine and say whether it has the property.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.handle import parameter
from pgemu_kernels.words.properties import Property
from pgemu_kernels.words.registers import R_PROPERTIES

U = np.uint64

# Default machines have the orders jan2026 and slides, which are alike in what these bits say.
_order_bits = parameter(R_PROPERTIES, U(Property.PREALLOCATES))


def _of_design(which: Property) -> Any:
    bit = U(which)

    @kernel
    def has_property(m):
        return m.state[R_PROPERTIES] & bit != U0

    return has_property


def _of_order(which: Property) -> Any:
    bit = U(which)

    @kernel
    def has_property(m):
        return _order_bits(m) & bit != U0

    return has_property


entries_are_special = _of_design(Property.SPECIAL_ENTRIES)
vma_is_pfnmap = _of_design(Property.VMA_PFNMAP)
gup_works = _of_design(Property.GUP)
splits_folios = _of_design(Property.SPLITS_FOLIOS)
level_is_folios = _of_design(Property.LEVEL_BY_FOLIO)
inserts_locked = _of_design(Property.INSERTS_LOCKED)
holes_unmap = _of_design(Property.HOLES_UNMAP)
rounds_ranges = _of_design(Property.ROUNDS_RANGES)
preallocates = _of_order(Property.PREALLOCATES)
names_page = _of_order(Property.NAMES_PAGE)
drains_lru = _of_order(Property.DRAINS_LRU)
keeps_reference = _of_order(Property.KEEPS_REFERENCE)
