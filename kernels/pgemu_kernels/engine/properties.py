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

# Default machines have the orders fixup and slides, which are alike in what these bits say.
_alike = parameter(R_PROPERTIES, U(Property.PREALLOCATES))


@kernel
def _own(m):
    return m.state[R_PROPERTIES]


def _has(which: Property, properties: Any = _own) -> Any:
    bit = U(which)

    @kernel
    def has_property(m):
        return properties(m) & bit != U0

    return has_property


entries_are_special = _has(Property.SPECIAL_ENTRIES)
vma_is_pfnmap = _has(Property.VMA_PFNMAP)
gup_works = _has(Property.GUP)
splits_folios = _has(Property.SPLITS_FOLIOS)
level_is_folios = _has(Property.LEVEL_BY_FOLIO)
inserts_locked = _has(Property.INSERTS_LOCKED)
holes_unmap = _has(Property.HOLES_UNMAP)
rounds_ranges = _has(Property.ROUNDS_RANGES)
preallocates = _has(Property.PREALLOCATES, _alike)
names_page = _has(Property.NAMES_PAGE, _alike)
drains_lru = _has(Property.DRAINS_LRU, _alike)
keeps_reference = _has(Property.KEEPS_REFERENCE)
