"""The trace schema: one record is one operation on the machine.

>>> from pgemu.trace.schema import Operation, Records
>>> records = Records.build(2, op=Operation.GUEST_FAULT, address=[0x1000, 0x2000])
>>> [hex(word) for word in records.header()]
['0x2', '0x2']
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.machine.arguments import guards_methods
from pgemu.machine.columns import column_of
from pgemu.machine.field_rules import shown
from pgemu.machine.short import counted
from pgemu_kernels.words.operations import PAGE_4K, Entry, Flag, Operation
from pgemu_kernels.words.rows import ACTORS

__all__ = (
    "ACTOR_LIMIT",
    "COLUMNS",
    "DTYPES",
    "FIRST_HOST_ACTOR",
    "SIMULATED",
    "Flag",
    "Operation",
    "Records",
    "columns_table",
    "once",
)

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "time": np.dtype(np.uint64),
        "op": np.dtype(np.uint8),
        "flags": np.dtype(np.uint8),
        "actor": np.dtype(np.uint16),
        "vm": np.dtype(np.uint16),
        "space": np.dtype(np.uint16),
        "object": np.dtype(np.uint32),
        "address": np.dtype(np.uint64),
        "offset": np.dtype(np.uint64),
        "length": np.dtype(np.uint64),
    }
)
"""Columns of a trace in their stored order, little endian."""

_KNOWN = np.zeros(256, dtype=bool)  # by code of an operation
_KNOWN[[int(operation) for operation in Operation]] = True

ACTOR_LIMIT = ACTORS
"""Actors are below this: vCPUs by their number, host threads and devices from FIRST_HOST_ACTOR on."""

FIRST_HOST_ACTOR = 256

SIMULATED: frozenset[Operation] = frozenset(op for op in Operation if op.entry is not Entry.NOBODY)
"""Operations that the machine carries out; the others have a code so that traces can hold them already."""

COLUMNS: Mapping[Operation, Mapping[str, str]] = MappingProxyType({op: op.columns for op in Operation})
"""What each column means for each operation; a column that is not named is not read and holds 0.

`time` (ns) and `actor` (vCPU, host thread or device) mean the same for all operations.
"""


def columns_table() -> str:
    """Return `COLUMNS` as a Markdown table, one row per operation, "-" where a column is not read."""
    names = [name for name in DTYPES if name not in ("time", "op", "actor")]
    lines = ["| " + " | ".join(["operation", "code", *names]) + " |", "|" + " --- |" * (len(names) + 2)]
    for operation, meanings in COLUMNS.items():
        cells = [operation.name.lower().replace("_", " "), str(int(operation))]
        lines.append("| " + " | ".join(cells + [meanings.get(name, "-") for name in names]) + " |")
    return "\n".join(lines) + "\n"


def once(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A column; of one that is a single value seen many times (numpy.broadcast_to) that value, as an array of one."""
    return column[:1] if column.strides == (0,) else column


# A record's header word, by where its columns lie in it.
_HEADER = np.dtype([("op", "<u1"), ("flags", "<u1"), ("actor", "<u2"), ("vm", "<u2"), ("space", "<u2")])


@guards_methods
@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """A piece of a trace: ten arrays of equal length, dtypes as in `DTYPES`, column meanings as in `COLUMNS`.

    >>> records = Records.build(3, op=Operation.GUEST_FAULT, address=[0, 4096, 8192])
    >>> records
    Records(3: 3 guest fault)
    """

    time: npt.NDArray[np.uint64]
    op: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    actor: npt.NDArray[np.uint16]
    vm: npt.NDArray[np.uint16]
    space: npt.NDArray[np.uint16]
    object: npt.NDArray[np.uint32]
    address: npt.NDArray[np.uint64]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]

    def __post_init__(self) -> None:
        for name, dtype in DTYPES.items():
            column: Any = getattr(self, name)
            if not isinstance(column, np.ndarray) or isinstance(column, np.ma.MaskedArray):
                raise TypeError(f"{name} {shown(column)} ({type(column).__name__}): expected an array of {dtype}")
            if column.dtype != dtype or column.shape != self.time.shape or column.ndim != 1:
                raise ValueError(
                    f"{name} of {column.dtype}{list(column.shape)}: expected {dtype}[n], as many as of time"
                )

    def __repr__(self) -> str:
        names = {int(op): op.name.lower().replace("_", " ") for op in Operation}
        codes, counts = np.unique(self.op, return_counts=True)
        found = zip(codes.tolist(), counts.tolist(), strict=True)
        return f"Records({len(self):,}: {counted({names.get(op, f'op {op}'): n for op, n in found})})"

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, piece: slice) -> Records:
        """Return the records of a slice; the arrays are views.

        >>> records[1:].address.tolist()
        [4096, 8192]
        """
        return Records(*(getattr(self, field.name)[piece] for field in fields(self)))

    def header(self) -> npt.NDArray[np.uint64]:
        """Return op | flags << 8 | actor << 16 | vm << 32 | space << 48 of each record, uint64.

        >>> [hex(word) for word in records.header().tolist()]
        ['0x2', '0x2', '0x2']
        """
        columns = {name: once(getattr(self, name)) for name in _HEADER.names or ()}
        common = np.zeros(1, _HEADER)
        for name in [name for name, column in columns.items() if column.size == 1]:
            common[name] = columns.pop(name)
        words = np.repeat(common, len(self))
        for name, column in columns.items():
            words[name] = column
        return words.view("<u8").astype(np.uint64, copy=False)

    @classmethod
    def build(cls, count: int, **columns: npt.ArrayLike) -> Records:
        """Make `count` records from columns or scalars; columns that are not given hold 0.

        TypeError or ValueError, with the column's name, for what is none, or does not fit it.

        >>> Records.build(2, op=Operation.CONVERT, flags=Flag.SHARED, offset=[0, 4096], length=4096)
        Records(2: 2 convert)
        """
        unknown = set(columns) - set(DTYPES)
        if unknown:
            raise TypeError(f"column {', '.join(sorted(unknown))}: expected some of {', '.join(DTYPES)}")
        if count >> 60:
            raise MemoryError  # NumPy's own for less
        given = {name: column_of(columns.get(name, 0), count, name, dtype) for name, dtype in DTYPES.items()}
        return cls(**{name: np.array(np.broadcast_to(column, (count,))) for name, column in given.items()})

    @classmethod
    def concatenate(cls, pieces: Iterable[Records]) -> Records:
        """Join pieces in their order; no pieces make an empty trace.

        >>> len(Records.concatenate([records, records]))
        6
        """
        parts = [cls.build(0), *pieces]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in DTYPES))

    def take(self, order: npt.NDArray[np.intp]) -> Records:
        """Return the records at the given positions, in that order. ValueError past the last one.

        >>> records.take([2, 0]).address.tolist()
        [8192, 0]
        """
        if order.size and int(order.max()) >= len(self):
            raise ValueError(f"order {shown(order)}: expected positions below {len(self)}")
        return Records(*(getattr(self, name)[order] for name in DTYPES))

    def _unknown(self) -> npt.NDArray[np.bool_]:
        """Where there is no operation of this code; one element, if nowhere."""
        codes = once(self.op)
        if not codes.size or _KNOWN[int(codes.min()) : int(codes.max()) + 1].all():
            return np.zeros(1, bool)
        found: npt.NDArray[np.bool_] = ~_KNOWN[codes]
        return found

    def _off_pages(self, column: str) -> npt.NDArray[np.bool_]:
        """Where an operation reads bytes in a column that are no whole pages; one element, if nowhere."""
        values: npt.NDArray[np.uint64] = once(getattr(self, column))
        if not (int(np.bitwise_or.reduce(values)) if values.size else 0) & (PAGE_4K - 1):
            return np.zeros(1, bool)
        reading = np.zeros(256, bool)
        reading[[int(op) for op, means in COLUMNS.items() if means.get(column, "").startswith("bytes")]] = True
        found: npt.NDArray[np.bool_] = reading[self.op] & (values & np.uint64(PAGE_4K - 1) != 0)
        return found

    def check(self, source: str, first: int = 0) -> None:
        """Raise InputError with the row (`first` is added) of the first record no machine can read.

        >>> records.check("mine.csv")  # nothing: every record can be read
        """
        rules = (
            (self._unknown(), "unknown operation code {0.op}"),
            (once(self.actor) >= ACTOR_LIMIT, f"actor {{0.actor}}, expected less than {ACTOR_LIMIT}"),
            (self._off_pages("offset"), "offset {0.offset:#x}, expected a multiple of 4096"),
            (self._off_pages("length"), "length {0.length:#x}, expected a multiple of 4096"),
        )
        for broken, text in rules:
            if broken.any():
                row = int(np.argmax(broken))
                values = _Row(**{name: int(getattr(self, name)[row]) for name in DTYPES})
                raise InputError(f"row {first + row}: {text.format(values)}", source)


@dataclass(frozen=True, slots=True)
class _Row:
    """One record as plain ints, for messages."""

    time: int
    op: int
    flags: int
    actor: int
    vm: int
    space: int
    object: int
    address: int
    offset: int
    length: int
