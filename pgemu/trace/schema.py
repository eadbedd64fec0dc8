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
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation
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

ACTOR_LIMIT = ACTORS
"""Actors are below this: vCPUs by their number, host threads and devices from FIRST_HOST_ACTOR on."""

FIRST_HOST_ACTOR = 256

SIMULATED: frozenset[Operation] = frozenset(
    {
        Operation.HOST_FAULT,
        Operation.GUEST_FAULT,
        Operation.CONVERT,
        Operation.PUNCH_HOLE,
        Operation.MMAP,
        Operation.MUNMAP,
        Operation.ZAP,
        Operation.BIND,
        Operation.UNBIND,
        Operation.GET,
        Operation.PUT,
        Operation.CLOSE,
        Operation.ALLOCATE,
        Operation.VM_EXIT,
        Operation.PROTECT,
        Operation.FORK,
        Operation.EXIT,
        Operation.MEMSLOT,
        Operation.DIRTY_LOG,
        Operation.ATTRIBUTES,
        Operation.PREFAULT,
        Operation.POPULATE,
        Operation.READ_SMAPS,
        Operation.REVOKE,
        Operation.RESTORE,
        Operation.GUARD_INSTALL,
        Operation.GUARD_REMOVE,
        Operation.REMAP,
        Operation.POOL_RESIZE,
        Operation.POOL_DEMOTE,
        Operation.FOLIO_ALLOCATE,
        Operation.FOLIO_FREE,
        Operation.VMEMMAP_OPTIMIZE,
        Operation.VMEMMAP_RESTORE,
        Operation.FOLIO_SPLIT,
        Operation.FOLIO_MERGE,
        Operation.FOLIO_REFERENCE,
        Operation.FOLIO_FREEZE,
        Operation.DISSOLVE,
        Operation.POISON,
        Operation.VMEMMAP_STORE,
        Operation.PIN,
        Operation.UNPIN,
        Operation.RELEASE,
        Operation.LRU_DRAIN,
        Operation.WORK,
        Operation.MEMORY_POLICY,
        Operation.DIRTY_LOGGING,
    }
)
"""Operations that the machine carries out; the others have a code so that traces can hold them already.

VM_EXIT and those from PROTECT to REMAP but PREFAULT and FORK are of ordinary memory: what is of neither design. Those
from POOL_RESIZE to VMEMMAP_STORE are done to huge pages themselves.
"""

_HOST_RANGE = {"space": "process", "address": "HVA, bytes", "length": "bytes"}
_FILE_PAGE = {"object": "inode", "offset": "bytes into the inode"}
_FILE_RANGE = {**_FILE_PAGE, "length": "bytes"}
_POOL = {"object": "order: 9 or 18", "space": "node + 1; 0: all nodes"}
_FOLIO = {"address": "physical address of its first page"}
_DMA_RANGE = {"space": "IOMMU domain", "address": "IOVA, bytes", "length": "bytes"}

COLUMNS: Mapping[Operation, Mapping[str, str]] = MappingProxyType(
    {
        Operation.HOST_FAULT: {"flags": "WRITE, EXEC", "space": "process", "address": "HVA, bytes"},
        Operation.GUEST_FAULT: {
            "flags": "WRITE, EXEC; PRIVATE or SHARED, neither: as the attributes say",
            "vm": "VM",
            "address": "GPA, bytes",
        },
        Operation.CONVERT: {"flags": "target: PRIVATE or SHARED", "vm": "VM that asks", **_FILE_RANGE},
        Operation.PUNCH_HOLE: dict(_FILE_RANGE),
        Operation.ALLOCATE: dict(_FILE_RANGE),
        Operation.MMAP: {
            **_HOST_RANGE,
            **_FILE_RANGE,
            "flags": "READ_ONLY; of ordinary memory PRIVATE or SHARED; READ, WRITE, EXEC; POPULATE, LOCKED, NORESERVE",
            "object": "inode; anonymous memory: 0xffffffff",
        },
        Operation.MUNMAP: dict(_HOST_RANGE),
        Operation.ZAP: {"flags": "MADVISE: asked for by madvise(MADV_DONTNEED)", **_HOST_RANGE},
        Operation.BIND: {
            "vm": "VM",
            "address": "GPA, bytes",
            **_FILE_RANGE,
        },
        Operation.UNBIND: {"vm": "VM", "address": "GPA, bytes"},
        Operation.PIN: {"flags": "WRITE, LONGTERM", "object": "pin, below 256", **_HOST_RANGE},
        Operation.UNPIN: {"object": "pin"},
        Operation.GET: dict(_FILE_PAGE),
        Operation.PUT: {**_FILE_PAGE, "address": "physical address of the page, in place of object and offset; or 0"},
        Operation.DMA_MAP: {**_DMA_RANGE, **_FILE_PAGE},
        Operation.DMA_UNMAP: dict(_DMA_RANGE),
        Operation.DMA_ACCESS: {"flags": "WRITE", **_DMA_RANGE, "object": "device"},
        Operation.NESTED_MAP: {
            "vm": "VM",
            "object": "L1 memslot",
            "address": "L2 GPA, bytes",
            "offset": "L1 GPA, bytes",
            "length": "bytes",
        },
        Operation.NESTED_UNMAP: {"vm": "VM", "object": "L1 memslot", "address": "L2 GPA, bytes", "length": "bytes"},
        Operation.MEMORY_FAILURE: dict(_FILE_PAGE),
        Operation.CLOSE: {"object": "inode"},
        Operation.VM_EXIT: {"vm": "VM"},
        Operation.GUEST_ACCESS: {
            "flags": "WRITE, EXEC",
            "vm": "VM",
            "space": "guest process",
            "address": "guest virtual, bytes",
        },
        Operation.PROTECT: {"flags": "READ, WRITE, EXEC", **_HOST_RANGE},
        Operation.FORK: {"space": "parent"},
        Operation.EXIT: {"space": "process"},
        Operation.MEMSLOT: {
            "flags": "READ_ONLY, LOG_DIRTY_PAGES; PRIVATE: with the guest_memfd that the last BIND named",
            "vm": "VM",
            "object": "slot number",
            "address": "GPA, bytes",
            "offset": "HVA, bytes",
            "length": "bytes, 0 deletes",
        },
        Operation.DIRTY_LOG: {"vm": "VM", "object": "slot number"},
        Operation.ATTRIBUTES: {"flags": "PRIVATE or SHARED", "vm": "VM", "address": "GPA, bytes", "length": "bytes"},
        Operation.PREFAULT: {"vm": "VM", "address": "GPA, bytes", "length": "bytes"},
        Operation.POPULATE: {"flags": "WRITE: MADV_POPULATE_WRITE, else _READ", **_HOST_RANGE},
        Operation.READ_SMAPS: {"space": "process"},
        Operation.REVOKE: {"object": "inode of a device"},
        Operation.RESTORE: {"object": "inode of a device"},
        Operation.GUARD_INSTALL: dict(_HOST_RANGE),
        Operation.GUARD_REMOVE: dict(_HOST_RANGE),
        Operation.REMAP: {**_HOST_RANGE, "object": "new length, pages", "offset": "new HVA, bytes; 0: in place"},
        Operation.POOL_RESIZE: {**_POOL, "length": "pages, as written to nr_hugepages"},
        Operation.POOL_DEMOTE: {**_POOL, "length": "pages"},
        Operation.FOLIO_ALLOCATE: {**_POOL, "space": "node + 1 that is preferred; 0: none"},
        Operation.FOLIO_FREE: dict(_FOLIO),
        Operation.VMEMMAP_OPTIMIZE: {**_FOLIO, "length": "bytes; all huge pages whose heads lie there, in one batch"},
        Operation.VMEMMAP_RESTORE: {**_FOLIO, "length": "bytes; all huge pages whose heads lie there, in one batch"},
        Operation.FOLIO_SPLIT: dict(_FOLIO),
        Operation.FOLIO_MERGE: {**_FOLIO, "length": "bytes of the huge page"},
        Operation.FOLIO_REFERENCE: {
            **_FOLIO,
            "flags": "SHARED: get, READ: put, WRITE|SHARED: pin, WRITE|READ: unpin",
            "length": "how many",
        },
        Operation.FOLIO_FREEZE: {**_FOLIO, "flags": "READ: unfreeze", "length": "references expected, or given back"},
        Operation.DISSOLVE: dict(_FOLIO),
        Operation.POISON: dict(_FOLIO),
        Operation.VMEMMAP_STORE: {"address": "virtual address in the vmemmap", "offset": "value, of memcg_data"},
        Operation.RELEASE: {"vm": "VM whose file of the inode it is", "object": "inode"},
        Operation.LRU_DRAIN: {},
        Operation.WORK: {},
        Operation.MEMORY_POLICY: {
            "flags": "MPOL_*: 0 default, 1 preferred, 2 bind, 3 interleave",
            **_FILE_RANGE,
            "object": "inode; 0xffffffff: the faulting tasks' own",
            "address": "nodes, a bit each",
        },
        Operation.DIRTY_LOGGING: {"flags": "LOG_DIRTY_PAGES or none", "vm": "VM", "address": "GPA of a slot"},
    }
)
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


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """A piece of a trace: ten arrays of equal length, dtypes as in `DTYPES`, column meanings as in `COLUMNS`."""

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
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != self.time.shape or column.ndim != 1:
                raise ValueError(f"column {name}: {column.dtype}{column.shape}, expected {dtype}{self.time.shape}")

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, piece: slice) -> Records:
        """Return the records of a slice; the arrays are views."""
        return Records(*(getattr(self, field.name)[piece] for field in fields(self)))

    def header(self) -> npt.NDArray[np.uint64]:
        """Return op | flags << 8 | actor << 16 | vm << 32 | space << 48 of each record, uint64."""
        word = self.op.astype(np.uint64)
        for column, shift in ((self.flags, 8), (self.actor, 16), (self.vm, 32), (self.space, 48)):
            word |= column.astype(np.uint64) << np.uint64(shift)
        return word

    @classmethod
    def build(cls, count: int, **columns: npt.ArrayLike) -> Records:
        """Make `count` records from columns or scalars; columns that are not given hold 0."""
        unknown = set(columns) - set(DTYPES)
        if unknown:
            raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
        return cls(
            *(
                np.array(np.broadcast_to(np.asarray(columns.get(name, 0), dtype=dtype), (count,)))
                for name, dtype in DTYPES.items()
            )
        )

    @classmethod
    def concatenate(cls, pieces: Iterable[Records]) -> Records:
        """Join pieces in their order; no pieces make an empty trace."""
        parts = [cls.build(0), *pieces]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in DTYPES))

    def take(self, order: npt.NDArray[np.intp]) -> Records:
        """Return the records at the given positions, in that order."""
        return Records(*(getattr(self, name)[order] for name in DTYPES))

    def check(self, source: str, first: int = 0) -> None:
        """Raise InputError with the row (`first` is added) of the first record no machine can read."""
        known = np.zeros(256, dtype=bool)
        known[[int(operation) for operation in Operation]] = True
        page = np.uint64(PAGE_4K - 1)
        rules = (
            (~known[self.op], "unknown operation code {0.op}"),
            (self.actor >= ACTOR_LIMIT, f"actor {{0.actor}}, expected less than {ACTOR_LIMIT}"),
            ((self.offset & page) != 0, "offset {0.offset:#x}, expected a multiple of 4096"),
            ((self.length & page) != 0, "length {0.length:#x}, expected a multiple of 4096"),
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
