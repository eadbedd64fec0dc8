"""Memory slots of a VM whose log has no slot lines: by what was mapped, and what became of that as memory was unmapped.

Guest memory is taken in blocks of 2M (1G where a leaf of 1G was made) in which a fault was mapped; neighbours are one
slot. Where userspace has it follows from unmaps: what went from stage 2 right after one lies in its range. Of a slot
that was never unmapped the address is made up. Where faults made no entry at all, there is a slot without memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pgemu.experiments.verification.host import Backing, Slot
from pgemu.trace.events import Input
from pgemu.trace.outcomes import Kept
from pgemu_kernels.formats.bits import ADDRESS, MMU_PRESENT
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

__all__ = ("Inferred", "inferred_slots")

_LEVELS = 4
_MADE_UP = 1 << 45  # where memory is put whose userspace address is not known
_BACKINGS: dict[int, Backing] = {0: "4K", 1: "4K", 2: "thp", 3: "hugetlb-1G"}
_Events = Sequence[tuple[bool, list[int]]]


class Inferred(NamedTuple):
    """The slots of a VM, by position what memory is behind each, and userspace addresses of 2M without any."""

    slots: list[Slot]
    backings: dict[int, Backing]
    holes: list[int]


def inferred_slots(events: _Events) -> Inferred:
    """The slots of a VM by its events."""
    levels: dict[tuple[int, int], int] = {}  # block: first byte and size -> largest leaf
    devices = _devices(events)
    for kept, row in events:
        if kept or row[0] != Input.GUEST_FAULT or (row[7] == 0 and row[4] >> 12 in devices):
            continue
        size = PAGE_1G if row[7] == 3 else PAGE_2M
        block = row[4] & -size, size
        levels[block] = max(levels.get(block, 0), row[7])
    runs: list[tuple[int, int, int]] = []
    for (start, size), level in sorted(levels.items()):
        if runs and start < runs[-1][1]:  # within a block of 1G
            continue
        if runs and start == runs[-1][1] and (runs[-1][2] == 3) == (level == 3):
            runs[-1] = runs[-1][0], start + size, max(runs[-1][2], level)
        else:
            runs.append((start, start + size, level))
    holes = [start for (start, _), level in sorted(levels.items()) if level == 0]
    votes = _votes(events, runs)
    found = Inferred([], {}, [])
    for number, (start, end, level) in enumerate(runs):
        delta = _best(votes.get(number, []), (PAGE_4K, PAGE_4K, PAGE_2M, PAGE_1G)[level])
        hva = _MADE_UP + start if delta is None else start + delta
        found.slots.append(Slot(number, start, end - start, hva, 0))
        found.backings[number] = _BACKINGS[level]
        found.holes.extend(hva + hole - start for hole in holes if start <= hole < end)
    return found


def _devices(events: _Events) -> set[int]:
    """Guest frames that KVM cached as a device's."""
    entries = ((row[5], row[8]) for kept, row in events if kept and row[0] == Kept.CHANGED and row[6] == 1)
    return {gfn for gfn, new in entries if not new & MMU_PRESENT and new & ADDRESS}


def _votes(events: _Events, runs: Sequence[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """By slot: lowest and highest distance from guest to userspace addresses that an unmap allows."""
    unmaps: dict[int, tuple[int, int, int]] = {}  # task -> range of its last event, and the slot it was seen to hit
    votes: dict[int, list[tuple[int, int]]] = {}
    for kept, row in events:
        task = row[2]
        if not kept:
            unmaps.pop(task, None)
            if row[0] == Input.UNMAP:
                unmaps[task] = row[4], row[5], -1
            continue
        if row[0] != Kept.CHANGED or task not in unmaps or row[8] & MMU_PRESENT or not row[7] & MMU_PRESENT:
            continue
        start, end, slot = unmaps[task]
        if not 1 <= row[6] <= _LEVELS:
            continue
        gpa, size = row[5] << 12, PAGE_4K << 9 * (row[6] - 1)
        at = next((i for i, (low, high, _) in enumerate(runs) if low <= gpa < high), -1)
        if at < 0 or slot not in (-1, at):
            unmaps.pop(task)
            continue
        unmaps[task] = start, end, at
        # Some page of the entry is in the range; of one of 4K, all of it.
        votes.setdefault(at, []).append((start - gpa - size + PAGE_4K, end - PAGE_4K - gpa))
    return votes


def _best(votes: Sequence[tuple[int, int]], unit: int) -> int | None:
    """The distance that most unmaps allow, of these the one that is aligned best."""
    candidates = {-(-low // unit) * unit for low, _ in votes} | {high // unit * unit for _, high in votes}
    allowed = Counter({one: sum(low <= one <= high for low, high in votes) for one in candidates})
    found = max(allowed, key=lambda one: (allowed[one], one & -one), default=None)
    return found if found is not None and allowed[found] else None
