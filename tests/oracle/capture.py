"""Captures of real kernels: `captures()` finds the files, `load(path)` reads one.

The format is described in tests/data/oracle/README.md. PGEMU_ORACLE names other folders of such
files, separated by os.pathsep. A capture of 324 checkpoints takes half a second to load; what `load` returned last
stays in memory, so tests that go through one file at a time, one after the other, read each file once.

Addresses and entries are Python ints here, levels are 1 (4K) to 4 (512G).
"""

from __future__ import annotations

import gc
import json
import lzma
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).parents[1] / "data"
SHIPPED = DATA / "oracle", DATA / "oracle-2", DATA / "oracle-pfnmap"
VARIABLE = "PGEMU_ORACLE"
FRAME = 0x000F_FFFF_FFFF_F000


def folders() -> list[Path]:
    """The folders of captures: those that the variable names, or those shipped with the tests."""
    named = [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    return named or list(SHIPPED)


def captures() -> list[Path]:
    """Paths of all captures, folder by folder, by name. FileNotFoundError for a folder without any."""
    found = []
    for folder in folders():
        paths = sorted(folder.glob("*.json.xz"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no *.json.xz files; {VARIABLE} names folders of captures")
        found += paths
    return found


def name_of(path: Path) -> str:
    """The name of a capture: its folder and its file."""
    return f"{path.parent.name}/{path.name.removesuffix('.json.xz')}"


class Table(NamedTuple):
    """An entry that points to a table: the first address it covers, the level it lies at (2 to 5), its value."""

    va: int
    level: int
    entry: int


class Run(NamedTuple):
    """`count` leaves of `level`, from address `va` on, the i-th with the value `entry + i * step`."""

    va: int
    level: int
    entry: int
    count: int
    step: int

    def entries(self) -> Iterator[tuple[int, int]]:
        """Address and value of each leaf."""
        size = 4096 << 9 * (self.level - 1)
        for i in range(self.count):
            yield self.va + i * size, self.entry + i * self.step


class Operation(NamedTuple):
    """One operation of the list: its words, and what it returned as text ("0x0", "-22 ...", "" if nothing).

    `notes` are the comment lines before it: signals and KVM exits, without the "#".
    """

    text: str
    result: str
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return self.text.split()

    @property
    def name(self) -> str:
        return self.text.split(maxsplit=1)[0]


class Area(NamedTuple):
    """A line of /proc/self/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    name: str


class PagemapRun(NamedTuple):
    """Pages with like pagemap words: in a run of present pages the frame number grows by one a page."""

    va: int
    pages: int
    pagemap: int
    kpageflags: int
    kpagecount: int


class HugePage(NamedTuple):
    """A HugeTLB page: first frame, 4K pages, how many page-table entries map it."""

    pfn: int
    pages: int
    mapcount: int


class StructPages(NamedTuple):
    """Two pages of the vmemmap of a HugeTLB page, 512 words each: its first, and the one with its first other tails.

    vmemmap_pages: physical addresses of its first eight.
    """

    pfn: int
    pages: int
    vmemmap_pages: tuple[int, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A stage-2 tree, by guest physical address.

    tables, leaves: as those of a process. other_nonpresent: (address, level, value) of entries that are neither
    present nor the empty value. nonpresent_values: how often each not-present word occurs in the tables.
    """

    root: int
    tables: tuple[Table, ...]
    leaves: tuple[Run, ...]
    other_nonpresent: tuple[Table, ...]
    nonpresent_values: dict[int, int]


@dataclass(frozen=True)
class VirtualMachine:
    """The stage-2 trees of one VM: none before it ran. boot_hva, boot_pa: host addresses of guest physical 0."""

    number: int
    boot_hva: int
    boot_pa: int
    trees: tuple[Tree, ...]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else int(value, 0)


def _tables(rows: list[list[Any]]) -> tuple[Table, ...]:
    return tuple(Table(int(va, 16), level, int(entry, 16)) for va, level, entry in rows)


def _runs(rows: list[list[Any]]) -> tuple[Run, ...]:
    return tuple(
        Run(int(va, 16), level, int(entry, 16), count, _number(step)) for va, level, entry, count, step in rows
    )


def _words(text: str) -> tuple[int, ...]:
    return struct.unpack(f"<{len(text) // 16}Q", bytes.fromhex(text))


def _tree(row: dict[str, Any]) -> Tree:
    return Tree(
        root=int(row["root"], 16),
        tables=_tables(row["tables"]),
        leaves=_runs(row["leaves"]),
        other_nonpresent=_tables(row["other_nonpresent"]),
        nonpresent_values={int(value, 16): count for value, count in row["nonpresent_values"].items()},
    )


@dataclass(frozen=True)
class Checkpoint:
    """One moment. `raw` is the JSON object, for fields that have no property here (smaps, vmstat, trace, ...)."""

    raw: dict[str, Any]

    @property
    def scenario(self) -> str:
        return str(self.raw["scenario"])

    @property
    def name(self) -> str:
        return str(self.raw["checkpoint"])

    @cached_property
    def ops(self) -> tuple[Operation, ...]:
        """The operations since the previous checkpoint, comment lines put before the one they explain."""
        found: list[Operation] = []
        notes: list[str] = []
        for line in self.raw["ops"]:
            if line.startswith("#"):
                notes.append(line[1:].strip())
                continue
            text, _, result = line.partition(" => ")
            found.append(Operation(text, result, tuple(notes)))
            notes = []
        return tuple(found)

    @property
    def root(self) -> int:
        """Physical address of the top table; with page-table isolation the kernel's copy."""
        return int(self.raw["root"], 16)

    @cached_property
    def areas(self) -> tuple[Area, ...]:
        return tuple(
            Area(int(start, 16), int(end, 16), permissions, _number(offset), name)
            for start, end, permissions, offset, name in self.raw["vmas"]
        )

    @property
    def table_pages(self) -> dict[str, int]:
        """Table pages below the user half of the root: "pud", "pmd", "pte"."""
        return dict(self.raw["table_pages"])

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        return _tables(self.raw["tables"])

    @cached_property
    def leaves(self) -> tuple[Run, ...]:
        return _runs(self.raw["leaves"])

    @cached_property
    def pagemap(self) -> tuple[PagemapRun, ...]:
        return tuple(
            PagemapRun(int(va, 16), pages, int(word, 16), int(flags, 16), _number(count))
            for va, pages, word, flags, count in self.raw.get("pagemap", ())
        )

    @cached_property
    def pti_roots(self) -> dict[str, dict[int, int]]:
        """With page-table isolation, the entries of both top tables by index: "kernel" and "user". Else empty."""
        return {
            half: {int(index): int(entry, 16) for index, entry in words.items()}
            for half, words in self.raw.get("pti_pgd", {}).items()
        }

    @cached_property
    def stage2(self) -> tuple[VirtualMachine, ...]:
        return tuple(
            VirtualMachine(
                row["vm"],
                _number(row["boot_hva"]),
                _number(row["boot_pa"]),
                tuple(map(_tree, row["trees"])),
            )
            for row in self.raw.get("stage2", [])
        )

    @property
    def full(self) -> bool:
        """Whether vmemmap, HugeTLB folios and struct pages were captured, too."""
        return "vmemmap" in self.raw

    @cached_property
    def vmemmap_tables(self) -> tuple[Table, ...]:
        return _tables(self.raw["vmemmap"]["tables"]) if self.full else ()

    @cached_property
    def vmemmap_leaves(self) -> tuple[Run, ...]:
        return _runs(self.raw["vmemmap"]["leaves"]) if self.full else ()

    @cached_property
    def huge_pages(self) -> tuple[HugePage, ...]:
        """Every HugeTLB page, those of the pools included; empty unless `full`."""
        return tuple(HugePage(row["pfn"], row["pages"], row["mapcount"]) for row in self.raw.get("hugetlb_folios", []))

    @cached_property
    def struct_pages(self) -> tuple[StructPages, ...]:
        """Up to two HugeTLB pages of each size; empty unless `full`."""
        return tuple(
            StructPages(
                row["pfn"],
                row["pages"],
                tuple(int(address, 16) for _, address in row["vmemmap_pages"]),
                _words(row["head_page_bytes"]),
                _words(row["tail_page_bytes"]),
            )
            for row in self.raw.get("struct_pages", [])
        )

    @property
    def pools(self) -> dict[int, dict[str, int]]:
        """The files of /sys/kernel/mm/hugepages, by bytes of a page."""
        found: dict[int, dict[str, int]] = {}
        for name, value in self.raw["hugepages"].items():
            size, file = name.split("kB.")
            found.setdefault(int(size) << 10, {})[file] = value
        return found

    @property
    def check(self) -> dict[str, Any]:
        """The comparison with the kernel's own counters made when the checkpoint was taken."""
        return dict(self.raw["check"])


@dataclass(frozen=True)
class Capture:
    """One file. `kernel` is the release as pgemu names it: "6.1", "6.12", "6.18" or "7.3".

    stage2: the format of stage-2 tables, "npt" or "ept". pti: page-table isolation. haswell: the
    processor is one, which has the bugs iTLB multihit (KVM maps huge pages without execute permission) and L1TF, and no
    protection keys. maxphyaddr: physical address bits, 40 as QEMU and Bochs have them by default (the captures only
    show that there are fewer than 52: KVM marks MMIO entries with bit 51). replayed: whether this kernel is one that
    pgemu runs; the others are only decoded.
    """

    path: Path
    raw: dict[str, Any]
    kernel: str
    stage2: str
    pti: bool
    haswell: bool
    maxphyaddr: int
    checkpoints: tuple[Checkpoint, ...]

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def shipped(self) -> bool:
        """Whether it is one of those whose totals are known."""
        return self.path.resolve().parent in {folder.resolve() for folder in SHIPPED}

    @property
    def replayed(self) -> bool:
        return self.kernel != "6.1"

    def scenarios(self) -> dict[str, list[Checkpoint]]:
        """Checkpoints by scenario, both in time order."""
        found: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            found.setdefault(checkpoint.scenario, []).append(checkpoint)
        return found


def _read(path: Path) -> Any:
    """What a file says: many objects that all stay, which the collector of garbage would go through as it grows."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with lzma.open(path) as file:
            return json.load(file)
    finally:
        if collecting:
            gc.enable()


@lru_cache(maxsize=2)
def load(path: Path) -> Capture:
    """Read a capture. ValueError naming the file if it is not one."""
    try:
        raw = _read(path)
        banner = re.match(r"Linux version (\d+\.\d+)", raw["kernel"])
        if banner is None:
            raise ValueError(f"kernel {raw['kernel'][:40]!r}: expected 'Linux version ...'")
        machine = raw["machine"]
        # Bochs's Haswell has VMX; QEMU's machines are AMD ones for KVM (+svm,+npt).
        intel = "svm" not in machine["cpu"]
        return Capture(
            path=path,
            raw=raw,
            kernel=banner[1],
            stage2="ept" if intel else "npt",
            pti=bool(machine["pti"]),
            haswell=intel,
            maxphyaddr=40,
            checkpoints=tuple(map(Checkpoint, raw["checkpoints"])),
        )
    except (KeyError, TypeError, EOFError, lzma.LZMAError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a capture: {error!r}") from error
