"""Lines of many numbers at once: columns of characters side by side, without a loop over lines.

A column is uint8[n, width], a row for each line; NUL stands for no character, wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ("hexadecimal", "joined", "looked_up")

Array = np.ndarray[Any, Any]

_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


def hexadecimal(numbers: Array, width: int = 0) -> Array:
    """Numbers (uint64[n]) in hexadecimal, with zeroes before them up to `width` digits."""
    shifts = np.arange(60, -4, -4, dtype=np.uint64)
    nibbles = (numbers[:, None] >> shifts & np.uint64(15)).astype(np.uint8)
    digits = _DIGITS[nibbles]
    shown = np.maximum.accumulate(nibbles != 0, axis=1)
    shown[:, 16 - max(width, 1) :] = True
    digits[~shown] = 0
    return digits


def looked_up(keys: Iterable[Array], text: Callable[..., str]) -> Array:
    """`text` of each row's keys (uint64[n] each), asked once for all rows with the same."""
    columns = list(keys)
    rows = np.zeros(columns[0].size, np.intp)
    firsts = np.zeros(min(1, rows.size), np.intp)
    for column in columns:  # number the combinations so far, column by column
        distinct, numbers = np.unique(column, return_inverse=True)
        _, firsts, rows = np.unique(rows * distinct.size + numbers.ravel(), return_index=True, return_inverse=True)
        rows = rows.ravel()
    texts = [text(*values).encode() for values in zip(*(column[firsts].tolist() for column in columns), strict=True)]
    width = max(map(len, texts), default=0)
    table = np.frombuffer(b"".join(one.ljust(width, b"\0") for one in texts), np.uint8).reshape(len(texts), width)
    return table[rows]


def joined(*parts: Array | str) -> str:
    """The lines that columns and texts between them make."""
    rows = next(part.shape[0] for part in parts if not isinstance(part, str))
    columns = [
        np.broadcast_to(np.frombuffer(part.encode(), np.uint8), (rows, len(part.encode())))
        if isinstance(part, str)
        else part
        for part in parts
    ]
    characters = np.concatenate(columns, axis=1)
    return str(characters[characters != 0].tobytes(), "utf-8")
