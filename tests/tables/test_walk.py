"""Walks of tables made by hand, in every format, against a dictionary of what was mapped."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.objects.machine import Config, Machine
from pgemu.tables.entries import EntryKind, classify
from pgemu.tables.ranges import MappedRange, Problem, Summary, mapped_ranges
from pgemu.tables.walk import (
    Kind,
    Rights,
    Status,
    Step,
    granted,
    kind_of,
    kinds_of,
    leaf_address,
    rights_of,
    translate,
    walk,
)
from pgemu_kernels import words as W
from pgemu_kernels.formats import page_format as pf
from trees import Tree

FORMATS = {name: make() for name, make in pf.FORMATS.items()} | {
    "arm64-s2-42": pf.arm64_stage2(42),  # eight concatenated root tables
    "arm64-s2-6.12": pf.arm64_stage2(39, fwb=False, kernel="6.12"),
    "x86-64-small": pf.x86_64(maxphyaddr=36, nx=False, pages_1g=False, amd=True),
    "ept-modes": pf.ept(mode_based_execute=True, maxphyaddr=46, execute_only=False),
}
named_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
X86 = FORMATS["x86-64"]
ROOT = 0x100_0000


def size_of(level: int) -> int:
    return 4096 << 9 * (level - 1)


def highest(fmt: pf.PageFormat) -> int:
    return 1 << (64 if fmt.sign_extended else fmt.input_bits)


# --------------------------------------------------------------------------- kinds of entries


@pytest.mark.same_with_checks
@named_formats
@given(data=st.data())
@settings(max_examples=15)
def test_kinds_are_those_of_entries(fmt: pf.PageFormat, data: st.DataObject) -> None:
    level = data.draw(st.integers(1, fmt.levels))
    shapes = [fmt.table, *fmt.leaf, fmt.frozen, fmt.empty, fmt.mmio_value, 0]
    bit = st.integers(0, 63).map(lambda n: 1 << n)
    toggled = st.tuples(st.sampled_from(shapes), st.lists(bit, max_size=4)).map(lambda t: t[0] ^ sum(set(t[1])))
    entries = data.draw(st.lists(st.one_of(toggled, st.integers(0, (1 << 64) - 1)), min_size=1, max_size=60))
    kinds = kinds_of(fmt, level, np.array(entries, np.uint64)).tolist()
    assert kinds == [kind_of(fmt, level, entry) for entry in entries]
    hardware = {EntryKind.TABLE: Kind.TABLE, EntryKind.LEAF: Kind.LEAF}
    hardware |= {EntryKind.RESERVED: Kind.RESERVED, EntryKind.MISCONFIGURED: Kind.MISCONFIGURED}
    hardware[EntryKind.MMIO] = Kind.MISCONFIGURED if fmt.family is pf.Family.EPT else Kind.RESERVED
    for kind, entry in zip(kinds, entries, strict=True):
        known = classify(fmt, level, entry)
        # KVM's frozen value has bit 10, by which mode-based execute makes an entry present.
        if known != EntryKind.FROZEN or not entry & fmt.present:
            assert kind == hardware.get(known, Kind.ABSENT)


# --------------------------------------------------------------------------- random trees


class Leaf(NamedTuple):
    address: int
    physical: int
    level: int
    flags: int


@st.composite
def mappings(draw: st.DrawFn, fmt: pf.PageFormat) -> list[Leaf]:
    """Leaves that do not overlap, ascending: mostly neighbours, here and there in the address space."""
    found: dict[int, Leaf] = {}
    corners = [0, 3 << 30, (1 << fmt.input_bits - 1) - (2 << 30), highest(fmt) - (2 << 30)]
    for _ in range(draw(st.integers(0, 24))):
        level = draw(st.sampled_from([level for level in (1, 1, 1, 2, 2, 3) if level <= fmt.largest_leaf]))
        size = size_of(level)
        corner = draw(st.sampled_from(corners)) & -size
        address = corner + draw(st.integers(0, 5 if level < 3 else 1)) * size
        physical = (8 << 30) + draw(st.integers(0, 3)) * size
        flags = fmt.leaf[level - 1] & ~(draw(st.sampled_from([0, 0, 0, fmt.write, fmt.accessed])))
        if not any(a < address + size and address < a + size_of(leaf.level) for a, leaf in found.items()):
            found[address] = Leaf(address, physical, level, flags)
    return [found[address] for address in sorted(found)]


def runs(leaves: list[Leaf]) -> list[tuple[int, int, int, int, int, int]]:
    """Leaves one by one to (address, length, physical, level, flags, step), each as long as can be."""
    found: list[list[int]] = []
    for leaf in leaves:
        size = size_of(leaf.level)
        if found:
            address, length, physical, level, flags, step = found[-1]
            last = physical + (length - size) if step else physical
            steps = [size, 0] if length == size_of(level) else [step]
            if (address + length, level, flags) == leaf[:1] + leaf[2:] and leaf.physical - last in steps:
                found[-1][1] += size
                found[-1][5] = leaf.physical - last
                continue
        found.append([leaf.address, size, leaf.physical, leaf.level, leaf.flags, size])
    return [tuple(run) for run in found]  # type: ignore[misc]


@pytest.mark.same_with_checks
@named_formats
@given(data=st.data())
@settings(max_examples=15)
def test_random_trees(fmt: pf.PageFormat, data: st.DataObject) -> None:
    leaves = data.draw(mappings(fmt))
    tree = Tree(fmt)
    for leaf in leaves:
        tree.map(*leaf)
    root = tree.root | data.draw(st.sampled_from([0, 0x9B, 1 << 63]))  # what a CR3 or an EPTP holds besides
    summary = Summary()
    found = list(mapped_ranges(tree.memory, fmt, root, summary))
    assert [(r.address, r.length, r.physical, r.level, r.flags, r.step) for r in found] == runs(leaves)
    assert summary.leaves == Counter(leaf.level for leaf in leaves)
    assert sum(summary.tables.values()) == len(tree.memory.pages)
    assert not summary.problems
    assert not summary.reserved
    assert not summary.not_present
    offset = data.draw(st.integers(0, 4095))
    edges = [e for leaf in leaves for e in (leaf.address + offset, leaf.address + size_of(leaf.level) - 1)]
    edges += [e + d for e in edges for d in (-size_of(2), 4096, size_of(3))]
    edges += data.draw(st.lists(st.integers(0, (1 << 64) - 1), max_size=5))
    addresses = [e for e in edges if 0 <= e < 1 << 64]
    result = translate(tree.memory, fmt, root, np.array(addresses, np.uint64))
    for address, physical, level, status in zip(addresses, *(column.tolist() for column in result), strict=True):
        steps = walk(tree.memory, fmt, root, address)
        leaf = next((leaf for leaf in leaves if 0 <= address - leaf.address < size_of(leaf.level)), None)
        if leaf is not None:
            assert (physical, level, status) == (leaf.physical + address - leaf.address, leaf.level, Status.MAPPED)
            assert [step.level for step in steps] == list(range(fmt.levels, level - 1, -1))
            assert steps[-1].kind == Kind.LEAF
            assert leaf_address(fmt, level, steps[-1].entry, address) == physical
            (own,) = (r for r in found if r.address <= address < r.address + r.length)
            assert granted(fmt, steps) == own.rights
            assert rights_of(fmt, own.rights).write == bool(leaf.flags & fmt.write)
        else:
            assert physical == 0
            assert status in (Status.ABSENT, Status.OUT_OF_RANGE)
            assert (status == Status.OUT_OF_RANGE) == (steps == [])
            assert level == (steps[-1].level if steps else 0)


@given(leaves=mappings(X86), ignored=st.booleans())
@settings(max_examples=20)
def test_ignored_bits_keep_nothing_apart(leaves: list[Leaf], ignored: bool) -> None:
    tree = Tree(X86)
    for leaf in leaves:
        tree.map(*leaf)
    mask = X86.accessed if ignored else 0
    found = list(mapped_ranges(tree.memory, X86, tree.root, ignore=mask))
    expected = runs([leaf._replace(flags=leaf.flags & ~mask) for leaf in leaves])
    assert [(r.address, r.length, r.physical, r.level, r.flags, r.step) for r in found] == expected


def test_runs_reach_over_tables_and_chunks() -> None:
    """2 GiB of 4K leaves: more last-level tables than are looked at in one go."""
    tree = Tree(X86)
    frames = np.arange(512, dtype=np.uint64) << np.uint64(12)
    for table in range(1024):
        slot = tree.slot(table << 21, 1)
        tree.memory.pages[slot] = frames | np.uint64((table << 21) + (4 << 30) | X86.leaf[0])
    summary = Summary()
    (one,) = mapped_ranges(tree.memory, X86, tree.root, summary)
    assert one[:4] == (0, 2 << 30, 4 << 30, 1)
    assert summary.tables == {4: 1, 3: 1, 2: 2, 1: 1024}
    zero = tree.memory.pages[tree.slot(512 << 21, 1)]
    zero[:] = zero[0]
    again = list(mapped_ranges(tree.memory, X86, tree.root))
    assert [(r.address, r.length, r.step) for r in again] == [
        (0, (1 << 30) + 4096, 4096), ((1 << 30) + 4096, (2 << 20) - 4096, 0), (513 << 21, 511 << 21, 4096)
    ]  # fmt: skip


# --------------------------------------------------------------------------- what ends a walk


def test_addresses_that_cannot_be_walked() -> None:
    for fmt, inside, outside in (
        (X86, [0, (1 << 47) - 1, 0xFFFF_8000_0000_0000, (1 << 64) - 1], [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63]),
        (FORMATS["x86-64-5"], [1 << 47, 0xFF00_0000_0000_0000], [1 << 56, 0xFE00_0000_0000_0000]),
        (FORMATS["npt"], [0, (1 << 48) - 1], [1 << 48, (1 << 64) - 1]),
        (FORMATS["arm64-s2"], [(1 << 40) - 1], [1 << 40, (1 << 64) - 1]),
        (FORMATS["arm64-s2-42"], [(1 << 42) - 1], [1 << 42]),
    ):
        tree = Tree(fmt)
        status = translate(tree.memory, fmt, tree.root, np.array(inside + outside, np.uint64)).status
        assert status.tolist() == [Status.ABSENT] * len(inside) + [Status.OUT_OF_RANGE] * len(outside)
        assert [len(walk(tree.memory, fmt, tree.root, a)) for a in inside] == [1] * len(inside)
        assert [walk(tree.memory, fmt, tree.root, a) for a in outside] == [[]] * len(outside)


def test_concatenated_roots_are_one_table() -> None:
    fmt = FORMATS["arm64-s2-42"]
    tree = Tree(fmt)
    assert fmt.root_tables == 8
    tree.map(7 << 39 | 5 << 30, 1 << 30, 3)
    assert walk(tree.memory, fmt, tree.root, 7 << 39 | 5 << 30) == [
        (3, ROOT + 7 * 4096 + 5 * 8, fmt.leaf[2] | 1 << 30, Kind.LEAF)
    ]


@pytest.mark.parametrize(("name", "level", "entry", "kind"), [
    ("x86-64-small", 1, 1 << 36 | 0x67, Kind.RESERVED),
    ("x86-64-small", 3, 0xE7, Kind.RESERVED),  # no 1G pages
    ("x86-64", 2, 1 << 13 | 0xE7, Kind.RESERVED),
    ("x86-64", 4, 0xE7, Kind.RESERVED),
    ("x86-64", 1, 0xFFFF_FFFF_FFFF_F600, Kind.ABSENT),  # a guard page
    ("npt", 1, 0x8000104000027, Kind.RESERVED),  # KVM's MMIO
    ("ept", 1, 0xF8104000026, Kind.MISCONFIGURED),
    ("ept", 2, 0x80000000000001A0, Kind.ABSENT),  # frozen
    ("ept", 1, 0b010, Kind.MISCONFIGURED),
    ("ept", 1, 0b111 | 2 << 3, Kind.MISCONFIGURED),  # memory type 2
    ("arm64-s2", 1, 0x7D9, Kind.RESERVED),  # a block where only pages are
])  # fmt: skip
def test_entries_that_end_a_walk(name: str, level: int, entry: int, kind: Kind) -> None:
    fmt = FORMATS[name]
    tree = Tree(fmt)
    address = 5 << 30
    slot = tree.slot(address, level)
    tree.memory.store(slot, entry)
    assert walk(tree.memory, fmt, tree.root, address)[-1] == Step(level, slot, entry, kind)
    result = translate(tree.memory, fmt, tree.root, np.array([address], np.uint64))
    assert (int(result.level[0]), Status(result.status[0]).name) == (level, kind.name)
    summary = Summary()
    assert list(mapped_ranges(tree.memory, fmt, tree.root, summary)) == []
    assert (summary.not_present if kind == Kind.ABSENT else summary.reserved) == {level: 1}


def test_tables_outside_the_memory() -> None:
    tree = Tree(X86)
    tree.map(0, 1 << 30, 1)
    slot = tree.slot(1 << 30, 2)
    tree.memory.store(slot, 0x55_5000 | X86.table)
    steps = walk(tree.memory, X86, tree.root, 1 << 30)
    assert steps[-2:] == [(2, slot, 0x55_5067, Kind.TABLE), (1, 0x55_5000, 0, Kind.UNREADABLE)]
    result = translate(tree.memory, X86, tree.root, np.array([0, 1 << 30], np.uint64))
    assert result.status.tolist() == [Status.MAPPED, Status.UNREADABLE]
    assert result.level.tolist() == [1, 1]
    summary = Summary()
    assert len(list(mapped_ranges(tree.memory, X86, tree.root, summary))) == 1
    assert summary.problems == [Problem("unreadable", 1 << 30, 2, 0x55_5067)]
    nowhere = Summary()
    assert list(mapped_ranges(tree.memory, X86, 0x77_7000, nowhere)) == []
    assert nowhere.problems == [Problem("unreadable", 0, 5, 0x77_7000)]


@pytest.mark.parametrize("fmt", [X86, FORMATS["arm64-s2-42"]], ids=["x86-64", "arm64-s2-42"])
def test_loops_are_reported_and_not_followed(fmt: pf.PageFormat) -> None:
    tree = Tree(fmt)
    tree.map(0, 1 << 30, 1)
    below = 9 << 30
    at_root = tree.root + (fmt.root_tables - 1) * 4096 | fmt.table
    for address, level, entry in (
        (1 << 39, fmt.levels, tree.root | fmt.table),  # the top table is its own entry
        (below, 2, at_root),  # a level-2 entry back to the (last) top table
        (below + (1 << 21), 2, tree.slot(below, 2) & ~4095 | fmt.table),  # ... and to the table it lies in
    ):
        tree.memory.store(tree.slot(address, level), entry)
    summary = Summary()
    assert [r.address for r in mapped_ranges(tree.memory, fmt, tree.root, summary)] == [0]
    assert [(p.what, p.address, p.level) for p in summary.problems] == [
        ("loop", 1 << 39, fmt.levels), ("loop", below, 2), ("loop", below + (1 << 21), 2)
    ]  # fmt: skip
    # What the hardware does with one address is another matter: it goes around until the levels are used up.
    steps = walk(tree.memory, fmt, tree.root, 1 << 39)
    assert [step.level for step in steps] == list(range(fmt.levels, 0, -1))[: len(steps)]
    assert steps[1].address & ~4095 == tree.root


@pytest.mark.same_with_checks
def test_one_table_in_many_places_is_not_gone_through_for_ever() -> None:
    """512 entries onto the same table at every level, as KASAN's early shadow: 2^36 pages."""
    tree = Tree(X86)
    tables = [tree.root, *(tree.memory.add(0x200_0000 + level * 4096) for level in (3, 2, 1))]
    for table, below in zip(tables, [*tables[1:], 0x300_0000], strict=True):
        tree.memory.pages[table][:] = below | (X86.leaf[0] if below == 0x300_0000 else X86.table)
    summary = Summary()
    found = list(mapped_ranges(tree.memory, X86, tree.root, summary))
    assert summary.problem_counts == {"repeated": 2}  # of level 2 and of level 1; 512 times is all there is at level 3
    assert summary.tables == {4: 1, 3: 1, 2: 1, 1: 1}
    assert [(r.length, r.step) for r in found] == [(512 * 512 * 4096, 0)]


# --------------------------------------------------------------------------- rights


@pytest.mark.parametrize(("name", "clear", "add", "rights"), [
    ("x86-64", 0, 0, Rights(True, True, True, True, True)),
    ("x86-64", 0b010, 0, Rights(True, False, True, True, True)),
    ("x86-64", 0b100, 0, Rights(True, True, False, True, True)),
    ("x86-64", 0, 1 << 63, Rights(True, True, True, False, False)),
    ("ept", 0b010, 0, Rights(True, False, True, True, True)),
    ("ept", 0b100, 0, Rights(True, True, True, False, False)),
    ("ept-modes", 1 << 10, 0, Rights(True, True, True, True, False)),
    ("ept-modes", 0b100, 1 << 10, Rights(True, True, True, False, True)),
])  # fmt: skip
@pytest.mark.parametrize("level", [1, 2, 4])
def test_rights_are_those_that_every_level_grants(name: str, clear: int, add: int, rights: Rights, level: int) -> None:
    fmt = FORMATS[name]
    tree = Tree(fmt)
    everything = fmt.leaf[0] | fmt.execute.mask & ~fmt.invert
    tree.map(0, 1 << 30, 1, everything)
    for at in (4, 3, 2):
        slot = tree.slot(0, at)
        tree.memory.store(slot, tree.memory.word(slot) | fmt.execute.mask & ~fmt.invert)
    slot = tree.slot(0, level)
    tree.memory.store(slot, tree.memory.word(slot) & ~clear | add)
    (found,) = mapped_ranges(tree.memory, fmt, tree.root)
    assert rights_of(fmt, found.rights) == rights
    assert granted(fmt, walk(tree.memory, fmt, tree.root, 0)) == found.rights


@pytest.mark.parametrize(
    ("no_execute", "execute"), [(0, (True, True)), (1, (False, True)), (2, (False, False)), (3, (True, False))]
)
def test_rights_of_arm_are_the_leafs(no_execute: int, execute: tuple[bool, bool]) -> None:
    fmt = FORMATS["arm64-s2"]
    tree = Tree(fmt)
    tree.map(0, 1 << 30, 2, fmt.leaf[1] & ~(3 << 53) & ~(1 << 7) | no_execute << 53)
    (found,) = mapped_ranges(tree.memory, fmt, tree.root)
    assert rights_of(fmt, found.rights) == Rights(True, False, True, *execute)
    assert granted(fmt, walk(tree.memory, fmt, tree.root, 0)) == found.rights


# --------------------------------------------------------------------------- a machine


@pytest.mark.parametrize("stage2", ["npt", "ept"])
def test_a_machine_is_walked_in_its_formats(stage2: Any) -> None:
    machine = Machine(Config("pfnmap", pool=2 << 30, stage2=stage2, nx_huge_pages=True))
    gmem = machine.create_guest_memfd(2 << 30, shared=False)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    gmem.convert(0, 4096, shared=True)
    vm.touch(0x20_0000)
    vm.touch(0x4000_0000)
    found = list(mapped_ranges(machine, machine.stage2_format, vm.root))
    pool = machine.register(W.R_POOL_BASE) << 12
    assert [(r.address, r.physical, r.level) for r in found] == [
        (2 << 20, pool + (1 << 30) + (2 << 20), 2),  # 7.3's highest 1G page comes first
        (1 << 30, pool, 3),
    ]
    assert [rights_of(machine.stage2_format, r.rights).execute for r in found] == [stage2 == "npt"] * 2
    for address in (0x20_0000, 0x4000_0000, 0x60_0000):
        steps = walk(machine, machine.stage2_format, vm.root, address)
        assert [step[:3] for step in steps] == vm.walk(address)
    vmemmap = machine.register(W.R_VMEMMAP)
    kernel = list(mapped_ranges(machine, machine.host_format, machine.register(W.R_KERNEL_ROOT)))
    assert kernel[0].address == vmemmap + 64 * machine.register(W.R_POOL_BASE)
    assert MappedRange(kernel[1].address, 4095 << 12, kernel[1].physical, 1, kernel[1].flags, 0, 0) == kernel[1]
