"""`workload:assigned-boot`: the boot of `workload:tdx-boot` with an assigned device, which has all shared memory.

What is published of the boot is there, conversion by conversion. Chosen here:

- what is shared is mapped for the device as soon as it is shared for the first time and the host has touched it, at the
  guest's address, by that of the process, and stays mapped: 64 MiB of swiotlb at once, other pages one by one
- whenever the host touches a shared page the device writes to it, 4K
- `late`: the share of flips in which such a transfer is still under way when the page has become private: 1 of 100
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.dma_steady import DEVICE
from pgemu.workload.parts import checked_share
from pgemu.workload.tdx_boot import build as build_boot
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("NAME", "build")

NAME = "workload:assigned-boot"
_RIGHTS = int(Flag.READ | Flag.WRITE)
_LOW = 2 * PAGE_1G  # of memory below the hole
_HIGH = 4 * PAGE_1G  # where the rest begins
_Words = npt.NDArray[np.uint64]


def build(seed: int = 0, overlap: float = 0.0, late: float = 0.01) -> Lowered:
    """Return the boot; `seed` orders the conversions and the first touches and chooses what is late.

    :param overlap: as of tdx_boot.build()
    :param late: share of flips in which the device still writes to the page when it is private, 0 to 1
    :raises InputError: another share
    """
    share = checked_share("late", late, source=NAME)
    boot = build_boot(seed, overlap)
    records = boot.records
    to_shared = np.flatnonzero((records.op == Operation.CONVERT) & (records.flags & np.uint8(int(Flag.SHARED)) != 0))
    _, first = np.unique(records.offset[to_shared], return_index=True)
    touched = np.flatnonzero(records.op == Operation.HOST_FAULT)
    shared = np.sort(to_shared[first])
    mapped_at = touched[np.searchsorted(touched, shared)]  # the host's first touch of what has become shared
    offset = records.address[touched] - np.uint64(SYNTHETIC_HVA)
    flips = np.flatnonzero((records.op == Operation.CONVERT) & (records.flags & np.uint8(int(Flag.PRIVATE)) != 0))
    random = np.random.Generator(np.random.PCG64([seed, 1]))
    chosen = np.sort(random.permutation(flips)[: round(share * len(flips))])
    pieces = [
        (np.arange(len(records)), records),
        (mapped_at, _maps(records.take(shared))),
        (touched, _writes(offset)),
        (chosen, _writes(records.offset[chosen])),
    ]
    order = np.argsort(np.concatenate([rows for rows, _ in pieces]), kind="stable")
    made = Records.concatenate(piece for _, piece in pieces).take(order)
    made.time[:] = np.arange(len(made), dtype=np.uint64) * records.time[1]
    setup = boot.accounting.setup
    inputs = len(made) - setup
    accounting = Accounting(inputs, Counter({"record": inputs}), operations=len(made), setup=setup)
    return replace(boot, records=made, accounting=accounting, source=NAME)


def _gpa(offset: _Words) -> _Words:
    """The guest's address of RAM, which is the device's: the guest sees no IOMMU."""
    return np.where(offset < np.uint64(_LOW), offset, offset + np.uint64(_HIGH - _LOW))


def _maps(converted: Records) -> Records:
    return Records.build(
        len(converted), op=Operation.DMA_MAP, flags=_RIGHTS, actor=FIRST_HOST_ACTOR, object=int(NO_INODE),
        address=_gpa(converted.offset), offset=converted.offset + np.uint64(SYNTHETIC_HVA), length=converted.length,
    )  # fmt: skip


def _writes(offset: _Words) -> Records:
    return Records.build(
        len(offset), op=Operation.DMA_ACCESS, flags=int(Flag.WRITE), actor=DEVICE, address=_gpa(offset), length=PAGE_4K
    )
