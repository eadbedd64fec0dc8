"""I/O page tables of captured checkpoints, and a replay of the maps and unmaps that made them.

What VFIO type1 and iommufd ask of a domain is worked out here from the operations: which ranges, with which rights,
in runs of frames that follow one another. Frames are those of the captured leaves, or, where a range is gone by the
next checkpoint, of the process's pagemap. The tables are pgemu's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oracle.capture import DATA, VARIABLE, Capture, Checkpoint, Operation
from oracle.operations import number, returned
from pgemu.objects.machine import Config, Machine
from pgemu.tables.page_table import PageTable
from pgemu_kernels.formats.iommu import attributes_for
from pgemu_kernels.formats.page_format import PageFormat, amd_iommu_v1, vtd_second_stage

PAGE = 4096
SHIPPED = DATA / "oracle-iommu"
ADDRESS = 0x000F_FFFF_FFFF_F000
PRESENT = 1 << 63  # of a pagemap word
QEMU_AMD_LEVELS = 4  # EFR.HATS of the captured unit
TRIAL = ("6.1", "6.12")  # vfio_test_domain_fgsp() maps and unmaps two pages in each new domain

Entries = dict[tuple[int, int], int]  # (address, level): entry


def iommu_captures() -> list[Path]:
    """Captures of I/O page tables: those shipped, or those of the folders that the variable names."""
    named = [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    found = [path for folder in named or [SHIPPED] for path in sorted(folder.glob("*.json.xz"))]
    return [path for path in found if path.parent.name == SHIPPED.name] if named else found


class Captured(NamedTuple):
    """The domain of one device at a checkpoint."""

    device: str
    kind: str
    root: int
    levels: int
    tables: Entries
    leaves: Entries


def translated(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows of devices that are translated, as they stand in the file."""
    return [row for row in checkpoint.raw.get("iommu", []) if row["state"] == "translated"]


_last: list[tuple[Checkpoint, dict[str, Captured]]] = []


def domains(checkpoint: Checkpoint) -> dict[str, Captured]:
    """Those of devices that are translated, by device; of the last checkpoint asked for they are kept."""
    if not _last or _last[0][0] is not checkpoint:
        _last[:] = [(checkpoint, _domains(checkpoint))]
    return _last[0][1]


def _domains(checkpoint: Checkpoint) -> dict[str, Captured]:
    return {
        row["device"]: Captured(
            row["device"], row["kind"], int(row["root"], 16), row["levels"],
            {(int(va, 16), level): int(entry, 16) for va, level, entry in row["tables"]},
            dict(_leaves(row["leaves"])),
        )
        for row in translated(checkpoint)
    }  # fmt: skip


def _leaves(rows: list[list[Any]]) -> Iterator[tuple[tuple[int, int], int]]:
    for va, level, entry, count, step in rows:
        size = PAGE << 9 * (level - 1)
        for i in range(count):
            yield (int(va, 16) + i * size, level), int(entry, 16) + i * step


def format_of(capture: Capture, kind: str, levels: int) -> PageFormat:
    """The format that a captured unit's tables have."""
    if kind == "vtd":
        return vtd_second_stage(levels, kernel=capture.kernel)
    most = QEMU_AMD_LEVELS if capture.kernel == "7.3" else 6
    return amd_iommu_v1(levels, kernel=capture.kernel, most_levels=max(levels, most))


def frames_at(leaves: Entries, fmt: PageFormat, address: int, length: int) -> list[int | None]:
    """Physical address of each page of a range, None where none is mapped. A reader of its own."""
    found: list[int | None] = []
    for at in range(address, address + length, PAGE):
        physical = None
        for level in (1, 2, 3):
            size = PAGE << 9 * (level - 1)
            entry = leaves.get((at & -size, level))
            if entry is not None:
                whole = size
                if fmt.sized_leaf and entry >> 9 & 7 == 7:
                    whole = PAGE
                    while entry & whole:
                        whole <<= 1
                    whole <<= 1
                physical = entry & ADDRESS & -whole | at & whole - 1
        found.append(physical)
    return found


def entries_of(table: PageTable) -> tuple[Entries, Entries]:
    """Tables and leaves of a page table of ours, read word by word."""
    ram = table.machine.arrays.ram
    fmt = table.format
    tables: Entries = {}
    leaves: Entries = {}

    def read(where: int, level: int, base: int) -> None:
        words = ram[where // 8 : where // 8 + 512]
        for index in np.flatnonzero(words).tolist():
            entry, at = int(words[index]), base + (index << 12 + 9 * (level - 1))
            field = entry >> 9 & 7
            leaf = level == 1 or (field in (0, 7) if fmt.table_level_shift else bool(entry & 0x80))
            (leaves if leaf else tables)[at, level] = entry
            if not leaf:
                read(entry & ADDRESS, level - 1, at)

    read(table.root, fmt.levels, 0)
    return tables, leaves


# --------------------------------------------------------------------------- replay


class Area(NamedTuple):
    """A mapped range: where, how long, the frames of its pages, its rights."""

    start: int
    frames: tuple[int, ...]
    rights: str

    @property
    def end(self) -> int:
        return self.start + len(self.frames) * PAGE


class UnknownError(Exception):
    """An operation whose frames no checkpoint shows, or that is none of a map, an unmap and what opens and closes."""


class Space:
    """Areas of a container or an IOAS, and the domain that shows them while a device is attached."""

    def __init__(self, machine: Machine, fmt: PageFormat, trial: bool) -> None:
        self.machine = machine
        self.fmt = fmt
        self.areas: dict[int, Area] = {}
        self.devices: set[str] = set()
        self.trial = trial
        self.table: PageTable | None = None

    def attach(self, device: str) -> None:
        self.devices.add(device)
        if self.table is None:
            self.table = self.machine.create_page_table(self.fmt)
            if self.trial:
                assert self.table.map_range(0, 1 << 20, 2 * PAGE).status == 0
                gone = self.table.unmap(0, PAGE).detail
                assert gone in (PAGE, 2 * PAGE)
                if gone == PAGE:
                    assert self.table.unmap(PAGE, PAGE).detail == PAGE
            for start in sorted(self.areas):
                self._map(self.areas[start])

    def detach(self, device: str) -> None:
        self.devices.discard(device)
        if self.table and not self.devices:
            self.table.destroy()
            self.table = None

    def add(self, area: Area) -> None:
        self.areas[area.start] = area
        if self.table:
            self._map(area)

    def _runs(self, area: Area) -> Iterator[tuple[int, int, int]]:
        """(address, physical, length) of each run of frames that follow one another."""
        first = 0
        for i in range(1, len(area.frames) + 1):
            if i == len(area.frames) or area.frames[i] != area.frames[i - 1] + PAGE:
                yield area.start + first * PAGE, area.frames[first], (i - first) * PAGE
                first = i

    def _map(self, area: Area) -> None:
        assert self.table
        bits = attributes_for(self.table.format, read="r" in area.rights, write="w" in area.rights)
        for address, physical, length in self._runs(area):
            result = self.table.map_range(address, physical, length, attributes=bits)
            assert result.status == 0, (hex(address), result)

    def drop(self, areas: list[Area], *, whole: bool = False) -> int:
        """Unmap areas, a run of frames at a time as VFIO does, or `whole` as iommufd: how many bytes."""
        for area in areas:
            del self.areas[area.start]
            if self.table:
                done = area.start
                runs = [(area.start, 0, area.end - area.start)] if whole else self._runs(area)
                for address, _, length in runs:
                    # A leaf that goes whole may have reached into the next run.
                    if address + length > done:
                        gone = self.table.unmap(max(address, done), address + length - max(address, done))
                        assert gone.detail >= address + length - max(address, done), (hex(address), gone)
                        done = max(address, done) + gone.detail
        return sum(area.end - area.start for area in areas)


class Replay:
    """A scenario's operations on our tables: `checkpoint` does those of one, and says which domains there are then."""

    def __init__(self, machine: Machine, capture: Capture) -> None:
        self.machine = machine
        self.capture = capture
        self.container: Space | None = None
        self.spaces: dict[int, Space] = {}
        self.bound: dict[int, str] = {}
        self.attached: dict[int, int] = {}
        self.version_1 = False

    def close(self) -> None:
        for space in [self.container, *self.spaces.values()]:
            if space:
                for device in list(space.devices):
                    space.detach(device)
        self.container, self.spaces, self.attached, self.bound = None, {}, {}, {}

    def owners(self) -> Iterator[tuple[str, PageTable]]:
        """Each device that a user has, and its domain's tables."""
        for space in [self.container, *self.spaces.values()]:
            if space and space.table:
                for device in sorted(space.devices):
                    yield device, space.table

    def run(self, checkpoint: Checkpoint) -> None:
        """Do the operations that lead to a checkpoint. UnknownError where their frames cannot be known."""
        shown = domains(checkpoint)
        mine = {word for op in checkpoint.ops for word in op.words if word in shown}
        self._format = next(
            (format_of(self.capture, one.kind, one.levels if one.kind == "vtd" else 3) for one in shown.values()), None
        )
        assert self._format or not mine
        for place, op in enumerate(checkpoint.ops):
            self._run(op, checkpoint, checkpoint.ops[place + 1 :])

    def _run(self, op: Operation, checkpoint: Checkpoint, later: tuple[Operation, ...]) -> None:
        name, words = op.name, op.words
        method = getattr(self, f"_{name}", None)
        if method is not None and op.result and returned(op) >= 0:
            method(words[1:], returned(op), checkpoint, later)

    # ------------------------------------------------------------------ VFIO type1

    def _space(self) -> Space:
        assert self._format
        return Space(self.machine, self._format, False)

    def _vfioopen(self, words: list[str], *_: Any) -> None:
        if self.container is None:
            self.container = self._space()
            self.container.trial = self.capture.kernel in TRIAL
            self.version_1 = words[1:2] == ["1"]
        self.container.attach(words[0])

    def _vfioclose(self, *_: Any) -> None:
        self.close()

    def _dmamap(self, words: list[str], result: int, checkpoint: Checkpoint, later: tuple[Operation, ...]) -> None:
        assert self.container
        start, length, vaddr = (number(word) for word in words[:3])
        frames = self._frames(self.container, checkpoint, later, start, length, vaddr)
        self.container.add(Area(start, frames, words[3]))

    def _dmaunmap(self, words: list[str], result: int, *_: Any) -> None:
        assert self.container
        start, everything = number(words[0]), words[1] == "all"
        end = 1 << 64 if everything else start + number(words[1])
        inside = [
            area
            for area in self.container.areas.values()
            if start <= area.start < end and (area.end <= end or self.version_1)
        ]
        assert self.container.drop(inside if result else []) == result, words

    # ------------------------------------------------------------------ iommufd

    def _ioas(self, words: list[str], *_: Any) -> None:
        self.spaces[number(words[0])] = self._space()

    def _iobind(self, words: list[str], *_: Any) -> None:
        self.bound[number(words[1])] = words[0]

    def _ioattach(self, words: list[str], *_: Any) -> None:
        index, ioas = number(words[0]), number(words[1])
        if index in self.attached:
            self.spaces[self.attached[index]].detach(self.bound[index])
        self.attached[index] = ioas
        self.spaces[ioas].attach(self.bound[index])

    def _iodetach(self, words: list[str], *_: Any) -> None:
        index = number(words[0])
        self.spaces[self.attached.pop(index)].detach(self.bound[index])

    def _iodestroy(self, words: list[str], *_: Any) -> None:
        self.spaces.pop(number(words[0]))

    def _iommufdclose(self, *_: Any) -> None:
        self.close()

    def _iomap(self, words: list[str], result: int, checkpoint: Checkpoint, later: tuple[Operation, ...]) -> None:
        space = self.spaces[number(words[0])]
        length, vaddr = number(words[2]), number(words[3])
        space.add(Area(result, self._frames(space, checkpoint, later, result, length, vaddr), words[4]))

    def _iomapfile(self, words: list[str], result: int, checkpoint: Checkpoint, later: tuple[Operation, ...]) -> None:
        space = self.spaces[number(words[0])]
        space.add(Area(result, self._frames(space, checkpoint, later, result, number(words[2]), None), words[5]))

    def _iocopy(self, words: list[str], result: int, *_: Any) -> None:
        target, source = self.spaces[number(words[0])], self.spaces[number(words[3])]
        start, length = number(words[4]), number(words[2])
        area = next(area for area in source.areas.values() if area.start <= start < area.end)
        first = (start - area.start) // PAGE
        target.add(Area(result, area.frames[first : first + length // PAGE], words[5]))

    def _iounmap(self, words: list[str], result: int, *_: Any) -> None:
        space = self.spaces[number(words[0])]
        start, everything = number(words[1]), words[2] == "all"
        end = 1 << 64 if everything else start + number(words[2])
        inside = [area for area in space.areas.values() if start <= area.start and area.end <= end]
        assert space.drop(inside, whole=True) == result, words

    # ------------------------------------------------------------------ frames

    def _frames(
        self, space: Space, checkpoint: Checkpoint, later: tuple[Operation, ...], start: int, length: int,
        vaddr: int | None,
    ) -> tuple[int, ...]:  # fmt: skip
        shown = [one for one in domains(checkpoint).values() if one.device in space.devices]
        found: list[int | None] = [None] * (length // PAGE)
        if shown and not any(op.name in ("dmaunmap", "iounmap", "vfioclose", "iodetach") for op in later):
            found = frames_at(shown[0].leaves, space.fmt, start, length)
        if None in found and vaddr is not None:
            pages = self._pagemap(checkpoint, vaddr, length)
            found = [one if one is not None else pages[i] for i, one in enumerate(found)]
        if None in found:
            raise UnknownError(f"frames of {start:#x}, {length:#x} bytes")
        return tuple(frame for frame in found if frame is not None)

    @staticmethod
    def _pagemap(checkpoint: Checkpoint, vaddr: int, length: int) -> list[int | None]:
        pages: list[int | None] = [None] * (length // PAGE)
        for run in checkpoint.pagemap:
            first, last = max(run.va, vaddr), min(run.va + run.pages * PAGE, vaddr + length)
            if first < last and run.pagemap & PRESENT:
                frame = run.pagemap & (1 << 55) - 1
                for at in range(first, last, PAGE):
                    pages[(at - vaddr) // PAGE] = (frame << 12) + at - run.va
        return pages


def differences(table: PageTable, captured: Captured) -> list[str]:
    """What a captured domain and our tables do not agree on: levels, tables with their bits, leaves word by word."""
    tables, leaves = entries_of(table)
    found = []
    if table.format.levels != captured.levels:
        found.append(f"{table.format.levels} levels, captured {captured.levels}")
    kept = {key: entry & ~ADDRESS for key, entry in tables.items()}
    expected = {key: entry & ~ADDRESS for key, entry in captured.tables.items()}
    for what, ours, theirs in (("table", kept, expected), ("leaf", leaves, captured.leaves)):
        if ours != theirs:
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            some = ", ".join(f"{va:#x} L{level}: {ours.get((va, level)) or 0:#x} for {theirs.get((va, level)) or 0:#x}"
                             for va, level in keys[:3])  # fmt: skip
            found.append(f"{len(keys)} {what} entries differ: {some}")
    return found


def replay(capture: Capture) -> Iterator[tuple[Checkpoint, str, list[str]]]:
    """For each checkpoint with a domain of a user: the checkpoint, what ended the replay ("" for nothing), differences.

    After the first operation that is not known or the first difference the rest of the scenario is not compared.
    """
    machine = Machine(Config())
    for checkpoints in capture.scenarios().values():
        run = Replay(machine, capture)
        ended = ""
        for checkpoint in checkpoints:
            if not ended:
                try:
                    run.run(checkpoint)
                except UnknownError as error:
                    ended = str(error)
            shown = domains(checkpoint)
            differing = [
                f"{device}: {text}"
                for device, table in run.owners()
                if not ended and device in shown
                for text in differences(table, shown[device])
            ]
            yield checkpoint, ended, differing
            if differing:
                ended = "after a difference"
        run.close()
