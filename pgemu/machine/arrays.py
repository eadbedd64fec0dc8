"""Arrays that public calls take and give back, by what is in them.

What is given back is exactly of its dtype. Parameters take any integers that fit: a list, a range, an array of any
integer dtype, contiguous or not; what does not fit is refused (pgemu.machine.arguments).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ("I64", "U8", "U64", "Bools", "Integers")

U8: TypeAlias = npt.NDArray[np.uint8]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
"""A column of integers that a caller has: one dimension, each from 0 to 2**64 - 1 where nothing else is said."""
