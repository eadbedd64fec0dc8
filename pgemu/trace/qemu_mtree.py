"""What QEMU's monitor prints of a VM's memory (info mtree, -f or not): its memory slots, as pgemu is told of them.

Sources: QEMU's system/memory.c (mtree_print_flatview(), mtree_print_mr(), render_memory_region(),
memory_region_type()), accel/kvm/kvm-all.c (kvm_align_section(), kvm_mem_flags()). Output of QEMU 7.2 was read, of q35
and pc.

The flat view says what the guest sees; " KVM" stands where KVM has a slot. The tree is rendered here as QEMU does:
what has the higher priority lies above, aliases show a part of another region, what follows is joined. It does not say
of regions of one priority at one place which one is above: the first one printed is. Of memory that is shown read-only
in places the slots are not (QEMU 7.2 was seen to make them so).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pgemu.errors import InputError
from pgemu.trace.memory_layout import GivenSlot, RefusedSlot
from pgemu.trace.slot_history import ALIASED_SLOT, READ_ONLY_SLOT
from pgemu.trace.source import Source, open_source
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("Memory", "memory_of")

_EXPECTED = "expected what QEMU's monitor prints for info mtree -f"
_HEX = r"[0-9a-f]{8,16}"
_REGION = re.compile(
    rf"(?P<indent> *)(?P<start>{_HEX})-(?P<end>{_HEX}) \(prio (?P<prio>-?\d{{1,10}}), (?P<kind>[\w/-]+)\): (?P<name>.*)"
)
_ALIAS = re.compile(rf"alias (?P<name>.*) @(?P<target>.*) (?P<first>{_HEX})-(?P<last>{_HEX})(?P<rest>.*)")
_OFFSET = re.compile(rf" @({_HEX})(?= |$)")
_OWNER = re.compile(r" (?:owner|parent):\{[^}]*\}")
_NEARLY = re.compile(rf"\s+{_HEX}-")
_VIEW, _TREE, _SPACE = "FlatView #", "memory-region: ", "address-space: "
_RAM, _ROM = ("ram", "nv-ram"), ("rom", "nv-rom")
_REASONS = {
    "rom": READ_ONLY_SLOT, "nv-rom": READ_ONLY_SLOT, "romd": "memory of a ROM device", "ramd": "memory of a device",
    "i/o": "device",
}  # fmt: skip
_NO_SLOT, _SMALL = "memory without a slot of KVM", "less than a page"
_LIMIT = 1 << 52  # physical addresses of x86-64
_DEEPEST = 32  # aliases of aliases, regions in regions
_MOST = 1 << 16  # ranges: a VM has some hundreds
_SHOWN = 100


@dataclass(frozen=True)
class Memory:
    """A VM's memory.

    Attributes:
        slots: what is memory, by guest address
        others: what is none of these, with the reason (number -1: QEMU does not print any)
    """

    slots: tuple[GivenSlot, ...]
    others: tuple[RefusedSlot, ...]

    @property
    def left_out(self) -> Counter[str]:
        """How many ranges are no slot, by reason."""
        return Counter(one.reason for one in self.others)


@dataclass
class _Region:
    """A line: bytes [start, end) of guest addresses, what lies there, and the lines that are indented below it."""

    start: int
    end: int
    priority: int
    kind: str
    name: str
    target: str | None = None
    first: int = 0  # in its block of memory, or in what it is an alias of
    has_slot: bool = False
    is_container: bool = False  # what is disabled is below, too
    below: list[_Region] = field(default_factory=list)


@dataclass(frozen=True)
class _Range:
    """What the guest sees in a range of addresses."""

    start: int
    end: int
    kind: str
    block: str
    first: int
    has_slot: bool = False


def memory_of(path: str | os.PathLike[str] | Source) -> Memory:
    """Read a VM's memory.

    :param path: text of info mtree or info mtree -f, plain or compressed, with what stands around it in a terminal
    :raises InputError: unreadable, no such text, a malformed line (with its number), or no memory in it
    """
    source = path if isinstance(path, Source) else open_source(path, _EXPECTED.removeprefix("expected "))
    sections = _Sections(source)
    ranges = sections.flat() if sections.view is not None else sections.rendered()
    slots: list[GivenSlot] = []
    others: list[RefusedSlot] = []
    taken: dict[str, list[tuple[int, int]]] = {}
    told = any(one.has_slot for one in ranges)
    blocks = {one.block for one in ranges if one.kind in _RAM}
    for one in sorted(ranges, key=lambda one: one.start):
        start, end = -(-one.start // PAGE_4K) * PAGE_4K, min(one.end, _LIMIT) // PAGE_4K * PAGE_4K
        # Whether a slot is read-only follows from its block, not from an alias of it: kvm_mem_flags().
        of_memory = one.kind in _RAM or (one.kind in _ROM and one.block in blocks)
        reason = _reason(one, start, end, of_memory, told, taken.get(one.block, ()))
        if reason is None:
            taken.setdefault(one.block, []).append((one.first, one.first + one.end - one.start))
            slots.append(GivenSlot(start, end - start))
        elif one.start < _LIMIT:
            others.append(RefusedSlot(-1, one.start, min(one.end, _LIMIT) - one.start, reason))
    if not slots:
        found = ", ".join(f"{count} {reason}" for reason, count in Memory((), tuple(others)).left_out.items())
        raise InputError(f"no memory in it, found {found or 'nothing'}: {_EXPECTED}", source.name)
    return Memory(tuple(slots), tuple(others))


def _reason(
    one: _Range, start: int, end: int, of_memory: bool, told: bool, taken: Iterable[tuple[int, int]]
) -> str | None:
    """Why a range is no slot that guest_memfd could back, None if it is one."""
    if not of_memory:
        return _REASONS.get(one.kind, f"memory of kind {one.kind}")
    if told and not one.has_slot:
        return _NO_SLOT
    if start >= end:
        return _SMALL
    last = one.first + one.end - one.start
    return ALIASED_SLOT if any(first < last and one.first < end_ for first, end_ in taken) else None


class _Sections:
    """The parts of the text that are about memory."""

    def __init__(self, source: Source) -> None:
        self._source = source.name
        self.view: list[_Region] | None = None
        self._space: _Region | None = None
        self._trees: dict[str, _Region] = {}
        self._section = ""  # what the lines belong to: a view, "memory" of address spaces, or a region's name
        self._lines: list[_Region] = []  # of a view that may turn out to be of another address space
        self._open: list[tuple[int, _Region]] = []  # by indent
        number = count = 0
        for block in source.blocks():
            for line in block.removesuffix("\n").split("\n"):
                number += 1
                count += self._read(line.rstrip("\r "), number)
                if count > _MOST:
                    raise InputError(f"more than {_MOST} regions, {_EXPECTED}", self._source, number)
        if self.view is None and self._space is None:
            raise InputError(f"no address space of memory in it, {_EXPECTED}", self._source)

    def _read(self, line: str, number: int) -> bool:
        """Take a line; whether it is a region."""
        if line.startswith(_VIEW):
            self._section, self._lines = _VIEW, []
        elif self._section == _VIEW and (line.startswith(' AS "memory"') or line == " Root memory region: system"):
            if self.view is None:
                self.view = self._lines
        elif line.startswith((_SPACE, _TREE)):
            head, name = line.split(": ", 1)
            wanted = head == "memory-region" or name == "memory" or name.endswith("/memory")
            self._section = f"{head}: {name}" if wanted else ""
            self._open = []
        elif not line.strip():
            self._section = ""
        elif self._section:
            match = _REGION.fullmatch(line)
            if match is None:
                if _NEARLY.match(line):
                    raise InputError(f"malformed region, {_EXPECTED}: {line[:_SHOWN]!r}", self._source, number)
                return False
            self._add(match, number)
            return True
        return False

    def _add(self, match: re.Match[str], number: int) -> None:
        start, end = int(match["start"], 16), int(match["end"], 16) + 1
        if end <= start:
            raise InputError(f"region that ends before it begins: {match[0][:_SHOWN]!r}", self._source, number)
        name, disabled = _OWNER.sub("", match["name"]), match["name"].endswith(" [disabled]")
        region = _Region(start, end, int(match["prio"]), match["kind"], name.removesuffix(" [disabled]"))
        if self._section == _VIEW:
            self._lines.append(region)
            region.has_slot = name.endswith(" KVM")
            bare = name.removesuffix(" KVM")
            offset = _OFFSET.search(bare)
            region.name, region.first = (bare[: offset.start()], int(offset[1], 16)) if offset else (bare, 0)
            return
        alias = _ALIAS.fullmatch(region.name)
        if alias:
            region.name, region.target, region.first = alias["name"], alias["target"], int(alias["first"], 16)
        indent = len(match["indent"])
        while self._open and self._open[-1][0] >= indent:
            self._open.pop()
        if self._open:
            self._open[-1][1].is_container = True
            if not disabled:
                self._open[-1][1].below.append(region)
        elif self._section.startswith(_SPACE):
            self._space = self._space or region
        else:
            self._trees.setdefault(self._section.removeprefix(_TREE), region)
        self._open.append((indent, region))

    def flat(self) -> list[_Range]:
        """What the flat view says."""
        lines = self.view or []
        return [_Range(one.start, one.end, one.kind, one.name, one.first, one.has_slot) for one in lines]

    def rendered(self) -> list[_Range]:
        """What the guest sees of the tree."""
        assert self._space is not None
        found = _Rendered(self._trees, self._source)
        found.add(self._space, 0, (self._space.start, self._space.end), 0)
        return _joined(found.ranges)


class _Rendered:
    """A tree while it is rendered: what was added first lies above."""

    def __init__(self, trees: dict[str, _Region], source: str) -> None:
        self.ranges: list[_Range] = []
        self._trees = trees
        self._source = source

    def add(self, region: _Region, move: int, window: tuple[int, int], depth: int) -> None:
        """Add what of a region lies in a window of guest addresses.

        :param move: bytes by which its lines are moved to guest addresses
        """
        start, end = max(region.start + move, window[0]), min(region.end + move, window[1])
        if start >= end:
            return
        if depth > _DEEPEST or len(self.ranges) > _MOST:
            raise InputError(f"regions in regions or aliases of aliases without an end, {_EXPECTED}", self._source)
        if region.target is not None:
            shown = self._trees.get(region.target)
            if shown is None:  # printed by no section: of memory its kind is enough
                self._take(region.kind, region.target, region.first - region.start - move, start, end)
                return
            self.add(shown, region.start + move - region.first - shown.start, (start, end), depth + 1)
            return
        for one in sorted(region.below, key=lambda one: -one.priority):
            self.add(one, move, (start, end), depth + 1)
        if region.kind != "i/o" or not (region.is_container or region.end - region.start >= _LIMIT):
            self._take(region.kind, region.name, -region.start - move, start, end)

    def _take(self, kind: str, block: str, first: int, start: int, end: int) -> None:
        """Add a range where there is nothing yet; `first`: what to add to its addresses to be in its block."""
        for low, high in _free(self.ranges, start, end):
            self.ranges.append(_Range(low, high, kind, block, low + first))


def _joined(ranges: Iterable[_Range]) -> list[_Range]:
    """Ranges that follow one another, in the guest and in their block, as one: flatview_simplify()."""
    found: list[_Range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        last = found[-1] if found else None
        if last and (last.end, last.kind, last.block, last.first + last.end - last.start) == (
            one.start, one.kind, one.block, one.first,
        ):  # fmt: skip
            found[-1] = _Range(last.start, one.end, last.kind, last.block, last.first)
        else:
            found.append(one)
    return found


def _free(ranges: Sequence[_Range], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that no range has."""
    for one in sorted(ranges, key=lambda one: one.start):
        if one.end <= start or one.start >= end:
            continue
        if start < one.start:
            yield start, one.start
        start = max(start, one.end)
    if start < end:
        yield start, end
