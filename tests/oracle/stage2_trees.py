"""A VM's stage-2 tree, as captured and as it is here, and which frame of the one is which of the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle.capture import FRAME, Checkpoint, Run, Table, Tree
from oracle.operations import PAGE, MismatchError
from pgemu.objects.stage2 import ENTRY, Stage2

Array = np.ndarray[Any, Any]
Sources = list[tuple[str, Array, Array]]  # kind of memory, positions in an array of pages, addresses in that memory

FRAMES = 1 << 23  # frames of either side are below
MMU_PRESENT = 1 << 11
ACCESSED = {False: 1 << 5, True: 1 << 8}  # by whether bit 63 is set, as EPT's leaves have it
OWN_MEMORY = 0x4000  # guest physical, the vCPU's code and page tables


class GuestFrames:
    """Which frame here is which frame of the capture, as long as neither is freed. Arrays are uint64[n] or int64[n]."""

    def __init__(self) -> None:
        # Frame and one more, 0: none yet. Memory of zeros costs nothing until it is used.
        self.ours = np.zeros(FRAMES, np.int64)
        self.theirs = np.zeros(FRAMES, np.int64)
        self.seen: list[tuple[str, Array, Array]] = []

    def match(self, captured: Array, here: Array, sources: Sources) -> Array:
        """Note that frames are the same pages: the positions of those known to be others.

        sources: (kind of memory, positions, addresses in it).
        """
        fresh = self.ours[captured] == 0
        self.ours[captured[fresh]] = here[fresh] + 1
        unknown = self.theirs[here] == 0
        self.theirs[here[unknown]] = captured[unknown] + 1
        for kind, positions, addresses in sources:
            chosen = fresh[positions]
            self.seen.append((kind, addresses[chosen], captured[positions[chosen]]))
        return np.flatnonzero((self.ours[captured] != here + 1) | (self.theirs[here] != captured + 1))

    def forget(self, kind: str, start: int, length: int) -> None:
        """The memory of a range is freed: its frames may come back as anything."""
        for name, addresses, captured in self.seen:
            if name == kind:
                gone = captured[(addresses >= start) & (addresses < start + length)]
                gone = gone[self.ours[gone] > 0]
                self.theirs[self.ours[gone] - 1] = 0
                self.ours[gone] = 0


def compare_tree(where: str, here: Stage2, tree: Tree, empty_value: int) -> tuple[Array, Array]:
    """MismatchError unless both are equal but for frames: the leaves, ENTRY[n], here and captured, in one order."""
    captured = entries([run_entries(run) for run in tree.leaves])
    mmio = captured["entry"] & np.uint64(MMU_PRESENT) == 0  # NPT's have bit 0
    leaves = captured[~mmio]
    others = entries([captured[mmio], plain_entries(tree.other_nonpresent)])
    same(where, "tables", without_frames(here.tables), without_frames(entries([plain_entries(tree.tables)])))
    same(where, "leaves", without_frames(here.leaves), without_frames(_as_accessed(leaves, here.leaves)))
    same(where, "MMIO entries", here.others, others)
    empty = sum(tree.nonpresent_values.values()) - len(tree.other_nonpresent)
    if here.empty != empty or tree.nonpresent_values.get(empty_value, 0) != empty:
        raise MismatchError(f"{where}: {here.empty} empty entries, captured {tree.nonpresent_values}")
    return here.leaves, leaves


def _as_accessed(leaves: Array, here: Array) -> Array:
    """Captured leaves, those of the vCPU's own pages accessed where ours are: the kernel ages pages from time to time,
    and a processor that has one in its TLB does not mark it again."""
    found = leaves.copy()
    if len(here) == len(leaves):
        own = (leaves["gpa"] < OWN_MEMORY) & (here["gpa"] == leaves["gpa"])
        found["entry"][own] |= here["entry"][own] & np.uint64(ACCESSED[bool(leaves["entry"][0] >> np.uint64(63))])
    return found


def frames_of(leaves: Array) -> Array:
    """Frame numbers of leaves, int64[n]."""
    return ((leaves["entry"] & np.uint64(FRAME)) >> np.uint64(12)).astype(np.int64)


def kvm_counters(checkpoint: Checkpoint, *names: str) -> tuple[int, ...]:
    """KVM's statistics, summed over VMs."""
    return tuple(checkpoint.raw["kvm_counters"][name] for name in names)


def run_entries(run: Run) -> Array:
    """A run of the capture as ENTRY[count]."""
    found = np.empty(run.count, ENTRY)
    i = np.arange(run.count, dtype=np.uint64)
    found["gpa"] = np.uint64(run.va) + i * np.uint64(PAGE << 9 * (run.level - 1))
    found["level"] = run.level
    found["entry"] = np.uint64(run.entry) + i * np.uint64(run.step)
    return found


def plain_entries(rows: tuple[Table, ...]) -> Array:
    return np.array(list(rows), ENTRY)


def entries(pieces: list[Array]) -> Array:
    """Pieces as one ENTRY[n], sorted as Stage2 is."""
    every = np.concatenate([np.empty(0, ENTRY), *pieces])
    return every[np.lexsort((-every["level"].astype(np.int64), every["gpa"]))]


def without_frames(rows: Array) -> Array:
    found = rows.copy()
    found["entry"] &= np.uint64(~FRAME & (1 << 64) - 1)
    return found


def same(where: str, what: str, here: Array, captured: Array) -> None:
    """MismatchError with the first few entries that differ."""
    if np.array_equal(here, captured):
        return
    ours, theirs = ({(gpa, level): entry for gpa, level, entry in rows.tolist()} for rows in (here, captured))
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    lines = [
        f"{gpa:#x} level {level}: {shown(ours.get((gpa, level)))}, captured {shown(theirs.get((gpa, level)))}"
        for gpa, level in keys[:6]
    ]
    raise MismatchError(f"{where}: {len(keys)} {what} differ: " + "; ".join(lines))


def shown(entry: int | None) -> str:
    return "none" if entry is None else f"{entry:#x}"
