"""A guest that runs a recorded program: its page tables, its frames, and which accesses its machine has to run.

>>> from pgemu.guest import GuestOptions, GuestProgram
>>> from pgemu.trace.schema import Operation, Records
>>> program = GuestProgram(GuestOptions(guest_memory=1 << 30))
>>> batch = program.feed(Records.build(3, op=Operation.GUEST_ACCESS, address=[0x1000, 0x1008, 0x2000]))
>>> [hex(gpa) for gpa in batch.physical.tolist()], batch.at.tolist()  # four tables and the page; the second page
(['0x6000', '0x6008', '0x7000'], [0, 0, 0, 0, 0, 2])

The guest's memory is a machine of its own, of which only `ram` is used: guest physical addresses are its physical ones,
so that the tables are edited and walked as any others are. It is the same for all designs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.guest.memory import GuestMemory
from pgemu.guest.options import GuestOptions
from pgemu.machine.arguments import guards_methods
from pgemu.trace.memory_layout import SYNTHETIC_HVA, Layout, Region, Slot, align_up
from pgemu.trace.schema import FIRST_HOST_ACTOR, Operation, Records
from pgemu_kernels.words import guest_words as G
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K, Flag

__all__ = ("GuestBatch", "GuestProgram")

Array = np.ndarray[Any, Any]

_ROOM = 1 << 16  # operations written at once
_IO = {"bounce": G.IO_BOUNCE, "convert": G.IO_CONVERT, "direct": G.IO_DIRECT}


class GuestBatch(NamedTuple):
    """A batch of accesses, and what a machine has to run for it.

    accesses: those that have memory, GUEST_ACCESS. physical: uint64[accesses], guest physical addresses. records: the
    operations; at: uint64[records], each comes before that access, or behind the last one.
    """

    accesses: Records
    physical: Array
    records: Records
    at: Array


@guards_methods
class GuestProgram:
    """A guest; equal options and accesses make equal addresses and operations, however the accesses are cut.

    Of the accesses only those become operations that can change a machine of any design: the first use, write and fetch
    of each page, and of the tables that a walk to it reads, and again after a conversion in the same GiB, which is all
    that a conversion can take leaves of. All accesses come back, for TLBs.

    Attributes:
        options: what it is
        memory: its page tables and frames
        counts: see GuestMemory.counts
    """

    def __init__(self, options: GuestOptions) -> None:
        self.options = options
        self.memory = GuestMemory(options)
        self.counts = self.memory.counts
        self._pages = np.zeros(options.guest_memory // PAGE_4K, np.uint64)
        self._blocks = np.zeros(align_up(options.guest_memory, PAGE_1G) // PAGE_1G, np.uint64)
        self._memo = np.zeros(2 * int(G.MEMO), np.uint64)
        self._control = np.zeros(G.STREAM_WORDS, np.uint64)
        bounce = options.bounce
        words: dict[Any, int] = {
            G.STREAM_RATE: round(options.io_rate * (1 << 32)), G.STREAM_MODE: int(_IO[options.io]),
            G.STREAM_HVA: SYNTHETIC_HVA, G.STREAM_BOUNCE: bounce.start // PAGE_4K,
            G.STREAM_BUFFERS: len(bounce) // PAGE_4K, G.STREAM_FLAGS: int(Flag.PRIVATE) if options.private else 0,
        }  # fmt: skip
        for word, value in words.items():
            self._control[word] = value

    # ------------------------------------------------------------------ where it lies

    @property
    def layout(self) -> Layout:
        """Guest memory: one slot and one host mapping."""
        size = self.options.guest_memory
        slots = (Slot(0, 0, size, SYNTHETIC_HVA, 0),)
        return Layout(align_up(size, PAGE_1G), PAGE_1G, (Region(SYNTHETIC_HVA, 0, size),), slots, (), "workload")

    def setup(self) -> Records:
        """What comes first: the host's mapping, the memory slot, and the conversion of the bounce buffers."""
        size, bounce = self.options.guest_memory, self.options.bounce
        records = [
            Records.build(1, op=Operation.MMAP, actor=FIRST_HOST_ACTOR, address=SYNTHETIC_HVA, length=size),
            Records.build(1, op=Operation.BIND, actor=FIRST_HOST_ACTOR, length=size),
        ]
        if len(bounce):
            shared = int(Flag.SHARED)
            records.append(
                Records.build(1, op=Operation.CONVERT, flags=shared, offset=bounce.start, length=len(bounce))
            )
        return Records.concatenate(records)

    @property
    def operations(self) -> dict[str, int]:
        """What was written by now: I/O, and operations by what they are for."""
        names = {
            "io": G.STREAM_IO, "touches": G.STREAM_TOUCHES, "table touches": G.STREAM_TABLES,
            "buffer touches": G.STREAM_BUFFER, "conversions": G.STREAM_CONVERSIONS, "host touches": G.STREAM_HOST,
        }  # fmt: skip
        return {name: int(self._control[word]) for name, word in names.items()}

    # ------------------------------------------------------------------ accesses

    def feed(self, records: Records) -> GuestBatch:
        """Give pages to a batch of accesses, and tell what a machine has to run for it.

        ValueError for records of other operations.
        """
        if (records.op != Operation.GUEST_ACCESS).any():
            raise ValueError(f"records {records!r}: expected operations of GUEST_ACCESS")
        physical, has_memory = self.memory.place(records)
        if not has_memory.all():
            records, physical = records.take(np.flatnonzero(has_memory)), physical[has_memory]
        return self._collapse(records, physical)

    def _collapse(self, records: Records, physical: Array) -> GuestBatch:
        """The operations of accesses that have memory."""
        from pgemu_kernels.run.entries import collapse_accesses

        machine = self.memory.machine
        control = self._control
        control[G.STREAM_AT] = 0
        columns = [np.ascontiguousarray(getattr(records, name)) for name in ("address", "flags", "actor", "space")]
        pieces, more = [], True
        while more:
            control[G.STREAM_OUT] = 0
            out = tuple(np.zeros(_ROOM, np.uint64) for _ in range(5))
            more = collapse_accesses(
                machine.descriptor, control, self.memory.access_row, self.memory.roots, *columns, physical,
                self._pages, self._blocks, self._memo, *out,
            )  # fmt: skip
            made = int(control[G.STREAM_OUT])
            pieces.append([column[:made] for column in out])
        at, header, address, offset, length = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        return GuestBatch(records, physical, _records(records, at, header, address, offset, length), at)


def _records(accesses: Records, at: Array, header: Array, address: Array, offset: Array, length: Array) -> Records:
    """Operations of headers and columns; the time is that of the access they come before."""
    if not len(at):
        return Records.build(0)
    time = accesses.time[np.minimum(at, np.uint64(len(accesses) - 1)).astype(np.intp)]
    return Records.build(
        len(at), time=time, op=header & np.uint64(0xFF), flags=header >> np.uint64(8) & np.uint64(0xFF),
        actor=header >> np.uint64(16) & np.uint64(0xFFFF), address=address, offset=offset, length=length,
    )  # fmt: skip
