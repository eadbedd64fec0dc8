"""Room for one operation at a time: a single call makes no array, and one packing checks all its arguments."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from pgemu.machine.results import RESULT_OF, Result
from pgemu_kernels import words as W

__all__ = ("ACTORS", "Single")

Array = np.ndarray[Any, Any]
ACTORS = int(W.ACTORS)

# op, flags, actor, vm and space are one header word: all that numba compiles for is little-endian.
_OPERATION = struct.Struct("<BBHHHL4xQQQ")
_RESULT = struct.Struct("<qQ")
_OPERATION_WORDS = _OPERATION.size // 8
_unpack, _SIZE = _RESULT.unpack_from, _OPERATION.size


class Single:
    """The columns of one operation. Each machine has its own, so that machines on several threads share none.

    Attributes:
        write: write(buffer, 0, op, flags, actor, vm, space, object, address, offset, length) writes the operation;
            struct.error where an argument is no int or does not fit; an actor's limit, ACTORS, is not checked
        buffer: what `write` writes to
        columns: what entries take: the operation's, status, detail
    """

    __slots__ = ("_words", "buffer", "columns", "write")

    def __init__(self) -> None:
        words = np.zeros(_OPERATION_WORDS + 2, np.uint64)
        status = words[_OPERATION_WORDS : _OPERATION_WORDS + 1].view(np.int64)
        self._words = words
        self.buffer = words.data.cast("B")
        self.write = _OPERATION.pack_into
        operation = tuple(words[i : i + 1] for i in range(_OPERATION_WORDS))
        self.columns: tuple[Array, ...] = (*operation, status, words[_OPERATION_WORDS + 1 :])

    def result(self, op: int) -> Result:
        """What the operation, which was `op`, returned."""
        return tuple.__new__(RESULT_OF[op], _unpack(self.buffer, _SIZE))  # sooner than by its own __new__
