"""A process's page tables, as captured and as they are here, and which frame of the one is which of the other."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracle.capture import FRAME, Checkpoint
from oracle.operations import PAGE, MismatchError, Span
from pgemu.objects.address_space import AddressSpace

PRESENT, LARGE, PROTNONE = 1, 1 << 7, 1 << 8
Entries = dict[tuple[int, int], int]  # (address, level): entry


def is_poison(entry: int) -> bool:
    """Whether an entry stands for a poisoned page: a swap entry of type SWP_HWPOISON of 7.3."""
    return entry >> 59 == 24 and not entry & (PRESENT | PROTNONE)


def frame(entry: int, level: int = 1) -> int:
    """First frame number of a leaf; its bits are inverted where it is protection-none. Of a poisoned page, its own."""
    if is_poison(entry):
        return ~entry >> 9 & (1 << 50) - 1
    word = entry if entry & PRESENT or not entry & PROTNONE else ~entry
    return (word & FRAME & -size_of(level)) >> 12


def flags(entry: int) -> int:
    """All but the frame number."""
    return entry & ~((1 << 59) - (1 << 9)) if is_poison(entry) else entry & ~FRAME


def size_of(level: int) -> int:
    return PAGE << 9 * (level - 1)


def span_at(va: int, level: int) -> Span:
    """The addresses that an entry is for."""
    return Span(va, va + size_of(level))


def within(va: int, level: int, spans: list[Span]) -> bool:
    return any(va < end and va + size_of(level) > start for start, end in spans)


def captured_entries(checkpoint: Checkpoint, ranges: list[Span]) -> tuple[Entries, Entries]:
    """Leaves and table entries of a checkpoint within address ranges."""
    leaves = {}
    for run in checkpoint.leaves:
        if any(run.va < end and run.va + run.count * size_of(run.level) > start for start, end in ranges):
            leaves.update({(va, run.level): entry for va, entry in run.entries() if within(va, run.level, ranges)})
    tables = {(va, level): entry for va, level, entry in checkpoint.tables if within(va, level, ranges)}
    return leaves, tables


def entries_here(process: AddressSpace, ranges: list[Span]) -> tuple[Entries, Entries]:
    """The same of a process of pgemu, read from its tables."""
    leaves: Entries = {}
    tables: Entries = {}
    ram = process.machine.arrays.ram

    def walk(table: int, level: int, base: int) -> None:
        words = ram[table >> 3 : (table >> 3) + 512]
        for index in words.nonzero()[0].tolist():
            va = base + index * size_of(level)
            entry = int(words[index])
            if not within(va, level, ranges):
                continue
            if level > 1 and entry & PRESENT and not entry & LARGE:
                tables[va, level] = entry
                walk(entry & FRAME, level - 1, va)
            else:
                leaves[va, level] = entry

    walk(process.root, 4, 0)
    return leaves, tables


def without(entries: Entries, spans: list[Span]) -> Entries:
    """Entries but for those that are, also, for addresses of `spans`."""
    return {key: entry for key, entry in entries.items() if not within(*key, spans)} if spans else entries


def same_flags(what: str, there: Entries, here: Entries) -> None:
    """MismatchError with the first few entries that differ outside the frame number."""
    if not there.keys() ^ here.keys() and all(flags(there[key]) == flags(here[key]) for key in there):
        return
    lines = []
    for key in sorted(there.keys() | here.keys()):
        ours, theirs = (side.get(key) for side in (here, there))
        if ours is None or theirs is None or flags(ours) != flags(theirs):
            shown = ("none" if entry is None else f"{entry:#x}" for entry in (ours, theirs))
            lines.append(f"{key[0]:#x} level {key[1]}: {', captured '.join(shown)}")
    raise MismatchError(f"{what}: {len(lines)} differ: " + "; ".join(lines[:6]))


@dataclass
class Snapshot:
    """Frames of a process at its last checkpoint, there and here, by (address, level, whether a table)."""

    there: dict[tuple[int, int, bool], int]
    here: dict[tuple[int, int, bool], int]


def snapshot(there: tuple[Entries, Entries], here: tuple[Entries, Entries]) -> Snapshot:
    """Frames of leaves and tables of both sides."""
    return Snapshot(
        *(
            {
                (va, level, table): frame(entry, 1 if table else level)
                for table in (False, True)
                for (va, level), entry in side[table].items()
            }
            for side in (there, here)
        )
    )


@dataclass
class Frames:
    """Which frame of the capture is which frame here."""

    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    huge: dict[int, int] = field(default_factory=dict)  # HugeTLB pages, which keep their partner for good

    def forget(self, process: int) -> None:
        self.snapshots.pop(process, None)

    def compare(self, where: str, process: int, snapshot: Snapshot) -> None:
        previous = self.snapshots.get(process)
        if previous is not None:
            for key in snapshot.there.keys() & previous.there.keys():
                kept = snapshot.there[key] == previous.there[key]
                table = key[2]  # one that was freed and made anew may have its old frame here and not there
                if kept != (snapshot.here[key] == previous.here[key]) and (kept or not table):
                    raise MismatchError(
                        f"{where}: {key[0]:#x} level {key[1]}: frame {'kept' if kept else 'changed'} there"
                    )
        self.snapshots[process] = snapshot
        pairs = {(other.there[key], other.here[key]) for other in self.snapshots.values() for key in other.there}
        if len({there for there, _ in pairs}) != len(pairs) or len({here for _, here in pairs}) != len(pairs):
            raise MismatchError(f"{where}: entries that share a frame there do not here, or the other way round")

    def compare_huge(self, where: str, there: int, here: int) -> None:
        if self.huge.setdefault(there, here) != here or len(set(self.huge.values())) != len(self.huge):
            raise MismatchError(f"{where}: HugeTLB frame {there:#x} was {self.huge[there]:#x} here, now {here:#x}")
