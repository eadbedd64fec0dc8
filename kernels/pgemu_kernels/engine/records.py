"""Operations as columns, and the record that one of them runs in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import LOW8, LOW16, U0, U1, U8, U16, U32, U48
from pgemu_kernels.engine.charge import begin_operation
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.words.operations import OPERATIONS
from pgemu_kernels.words.rows import (
    ACTORS,
    O_ACTOR,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    O_SPACE,
    O_STATUS,
    O_VM,
    O_WORDS,
    STATE_OPS,
)

U = np.uint64
_O_WORDS = U(O_WORDS)
_OPERATIONS = U(OPERATIONS)
BATCH = U(64)  # operations or walks whose cache misses overlap
_NEAR = U(32 << 20)  # what lies closer is in the cache: 64 KiB of entries, 512 KiB of struct pages


class Columns(NamedTuple):
    """Operations as columns, each of n elements or of one; results always n."""

    header: np.ndarray[Any, Any]  # uint64: op | flags << 8 | actor << 16 | vm << 32 | space << 48
    object: np.ndarray[Any, Any]  # uint64
    address: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]  # int64: what the kernel returns
    detail: np.ndarray[Any, Any]  # uint64: leaf level, failing offset, or frame number


@kernel
def element(column, i):
    """Element `i`, or the one that stands for all."""
    return column[i] if U(column.size) > U1 else column[U0]


@kernel
def is_scattered(column, first, last):
    """Whether a batch's addresses lie far apart: neighbours are in the cache by themselves."""
    if last - first < BATCH or U(column.size) <= U1:
        return False
    low = min(column[first], column[last - U1])
    high = max(column[first], column[last - U1])
    return high - low > _NEAR or column[(first + last) >> U1] - low > _NEAR


@kernel
def operation_record(actor):
    """Where an actor's record begins in `state`; batches have one of their own, so that they disturb no actor."""
    return STATE_OPS + min(actor, U(ACTORS)) * _O_WORDS


@kernel
def load(m, columns, i):
    """Write operation `i` to the record of batches and begin it: where the record begins."""
    state = m.state
    header = element(columns.header, i)
    actor = header >> U16 & LOW16
    op = operation_record(U(ACTORS))
    kind = header & LOW8
    # Row 0 of every table belongs to operations that do not exist.
    state[op + O_OP] = kind if kind < _OPERATIONS else U0
    state[op + O_FLAGS] = header >> U8 & LOW8
    state[op + O_ACTOR] = actor
    state[op + O_VM] = header >> U32 & LOW16
    state[op + O_SPACE] = header >> U48
    state[op + O_OBJECT] = element(columns.object, i)
    state[op + O_ADDRESS] = element(columns.address, i)
    state[op + O_OFFSET] = element(columns.offset, i)
    state[op + O_LENGTH] = element(columns.length, i)
    begin_operation(m, op)
    return op


@kernel
def save_result(state, op, columns, i):
    """Hand out the result in a record."""
    columns.status[i] = np.int64(state[op + O_STATUS])
    columns.detail[i] = state[op + O_DETAIL]
