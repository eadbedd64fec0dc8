"""Conversions that posted code would still be at, and who holds the folio that their freeze waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pgemu.objects.pins import frames, held_for_kvm
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("Spinning", "holders_of", "spinning")


class Spinning(NamedTuple):
    """What is left of a conversion: pgemu_kernels.gmem.spinning.

    Attributes:
        inode: number of the inode
        offset: bytes into it; up to here the conversion is done
        length: bytes that are left
        shared: whether they become shared
        page: offset, in bytes, of the folio that cannot be frozen
        pfn: its first frame
        holders: what holds it: "transient references", "pin 3", "page that KVM maps, 1", "LRU batch of CPU
            0", "fault of actor 2"
    """

    inode: int
    offset: int
    length: int
    shared: bool
    page: int
    pfn: int
    holders: tuple[str, ...]


def spinning(machine: Core) -> list[Spinning]:
    """See Machine.spinning."""
    rows = machine.arrays.state[int(W.STATE_SPINS) :][: W.SPINS * W.Q_WORDS].reshape(-1, W.Q_WORDS)
    found = []
    for row in rows[: machine.register(W.R_SPINS)]:
        if row[W.Q_LIVE]:
            start, end, pfn = int(row[W.Q_START]), int(row[W.Q_END]), int(row[W.Q_PFN])
            shared = not row[W.Q_TO_PRIVATE]
            page = int(row[W.Q_INDEX]) << 12
            holders = tuple(holders_of(machine, pfn))
            found.append(Spinning(int(row[W.Q_INODE]), start << 12, end - start << 12, shared, page, pfn, holders))
    return found


def holders_of(machine: Core, pfn: int) -> list[str]:
    """Who holds the folio that begins at a frame, the page cache and mappings aside."""
    state = machine.arrays.state
    place = machine.register(W.R_TRANSIENT) + pfn - machine.register(W.R_POOL_BASE)
    transient = int(machine.arrays.counts[place])
    found = ["transient references"] if transient else []
    first, last = pfn, pfn + _pages(machine, pfn)
    for pin in range(machine.register(W.R_PINS)):
        pinned = frames(machine, pin)
        if ((pinned >= np.uint64(first)) & (pinned < np.uint64(last))).any():
            found.append(f"pin {pin}")
    found += [f"page that KVM maps, {number}" for number in held_for_kvm(machine, first, last)]
    batches = state[int(W.STATE_LRU) :][: W.LRU_CPUS * W.LRU_WORDS].reshape(-1, W.LRU_WORDS)
    for cpu, batch in enumerate(batches):
        if np.uint64(pfn) in batch[1 : 1 + int(batch[0])]:
            found.append(f"LRU batch of CPU {cpu}")
    records = state[int(W.STATE_OPS) :][: W.ACTORS * W.O_WORDS].reshape(-1, W.O_WORDS)
    active = (records[:, W.O_ACTIVE] != 0) & (records[:, W.O_REFERENCED] == pfn + 1)
    found += [f"fault of actor {actor}" for actor in np.flatnonzero(active).tolist()]
    return found


def _pages(machine: Core, pfn: int) -> int:
    """Pages of the folio that begins at a frame."""
    from pgemu.images.folio import Folio

    return 1 << int(Folio.of_machine(machine, pfn).order)
