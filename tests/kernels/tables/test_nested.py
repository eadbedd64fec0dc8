"""Nested walks: reference counts of every combination of leaf sizes, faults of both stages, and the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from model.trees import Tree, flip, leaf_bits, random_address, random_leaf, random_table
from model.walks import Nested, NestedOutcome
from pgemu.tables.translation import Access, Kind, NestedTranslation, translate_nested
from pgemu_kernels import words as W
from walk_scene import FORMATS, Memory, random_access, small_machine

S = W.WalkStatus
SIZES = {1: W.PAGE_4K, 2: W.PAGE_2M, 3: W.PAGE_1G}


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(small_machine())


class Guest:
    """A guest's tables in guest memory, and the stage-2 tree below them.

    Guest frames are given out from guest physical address 0 on, and lie in the pool from its begin on.
    """

    def __init__(self, memory: Memory, guest: str, stage2: str) -> None:
        self.memory = memory
        self.names = guest, stage2
        self.words: dict[int, int] = {}
        self.stage2 = Tree(FORMATS[stage2][0], self.words, memory.frames())
        self.guest = Tree(FORMATS[guest][0], self.words, self.frames(), self.place)
        for frame in range(memory.pool >> 12, (memory.pool >> 12) + 64):
            memory.machine.write_frame(frame, bytes(4096))

    @staticmethod
    def frames() -> Iterator[int]:
        return iter(range(0, 64 * 4096, 4096))

    def place(self, gpa: int) -> int:
        return self.memory.pool + gpa

    def map_host(self, gpa: int, level: int, value: int | None = None) -> None:
        """Map guest memory to the pool; the host's frame of guest physical address 0 is the pool's first."""
        kind = self.stage2.fmt.kind
        size = SIZES[level]
        host = self.memory.pool + gpa & ~(size - 1)
        assert self.stage2.map(gpa, level, host | leaf_bits(kind, level) if value is None else value)

    def translate(self, addresses: Any, kinds: Any = Kind.USER_READ, access: Access | None = None,
                  store: bool = True, **more: Any) -> NestedTranslation:  # fmt: skip
        if store:
            self.memory.store(self.words)
        machine = self.memory.machine
        guest, stage2 = (machine.add_format(FORMATS[name][1]) for name in self.names)
        return translate_nested(
            machine, guest, self.guest.root, stage2, self.stage2.root, np.array(addresses, np.uint64), kinds,
            access, **more,
        )  # fmt: skip


# ------------------------------------------------------------------ reference counts

VIRTUAL = 0x40_0000_0000 + 5 * W.PAGE_2M + 7 * W.PAGE_4K + 0x123
DATA = 3 * W.PAGE_1G  # guest physical


def two_sizes(memory: Memory, guest: str, stage2: str, leaf: int, table_size: int, data_size: int) -> Guest:
    """One page of the guest, of size `leaf`; its tables and its data in stage-2 leaves of two sizes."""
    scene = Guest(memory, guest, stage2)
    assert scene.guest.map(VIRTUAL, leaf, DATA | leaf_bits("x86", leaf))
    offset = VIRTUAL & SIZES[leaf] - 1
    scene.map_host(DATA + offset, data_size)
    for gpa in scene.guest.tables if table_size == 1 else [0]:
        scene.map_host(gpa, table_size)
    return scene


GUEST_READS = {"x86-64": {3: 2, 2: 3, 1: 4}, "x86-64-5": {3: 3, 2: 4, 1: 5}}
STAGE2_READS = {"npt": 4, "ept": 4, "ept-5": 5, "npt-5": 5, "arm64 3 levels": 3, "arm64 4 levels": 4}
# Section 6 of the reference: guest leaf by host leaf, four levels each, then five.
TABLE = {
    ("x86-64", 3): {3: 8, 2: 11, 1: 14}, ("x86-64", 2): {3: 11, 2: 15, 1: 19}, ("x86-64", 1): {3: 14, 2: 19, 1: 24},
}  # fmt: skip


@pytest.mark.parametrize("host_leaf", [1, 2, 3])
@pytest.mark.parametrize("leaf", [1, 2, 3])
@pytest.mark.parametrize("stage2", ["npt", "ept"])
def test_references_of_four_levels_over_four(memory: Memory, stage2: str, leaf: int, host_leaf: int) -> None:
    scene = two_sizes(memory, "x86-64", stage2, leaf, host_leaf, host_leaf)
    for more in ({"references": True}, {}):
        found = scene.translate([VIRTUAL], **more)
        assert found.status.tolist() == [S.OK]
        assert found.read_count.tolist() == [TABLE["x86-64", leaf][host_leaf]]
        assert found.physical.tolist() == [memory.pool + DATA + (VIRTUAL & SIZES[leaf] - 1)]
        assert (found.guest_level[0], found.host_level[0]) == (leaf, host_leaf)


@pytest.mark.parametrize(
    ("guest", "stage2", "references"),
    [("x86-64-5", "ept", 29), ("x86-64", "ept-5", 29), ("x86-64-5", "npt-5", 35), ("x86-64", "arm64 3 levels", 19)],
)
def test_references_of_other_depths(memory: Memory, guest: str, stage2: str, references: int) -> None:
    scene = two_sizes(memory, guest, stage2, 1, 1, 1)
    assert scene.translate([VIRTUAL]).read_count.tolist() == [references]


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("table_size", [1, 2, 3])
@pytest.mark.parametrize("guest", ["x86-64", "x86-64-5"])
@pytest.mark.parametrize("stage2", sorted(STAGE2_READS))
def test_the_sum_formula(memory: Memory, guest: str, stage2: str, table_size: int, data_size: int) -> None:
    for leaf in (1, 2, 3):
        scene = two_sizes(memory, guest, stage2, leaf, table_size, data_size)
        table_reads, data_reads = (STAGE2_READS[stage2] + 1 - size for size in (table_size, data_size))
        found = scene.translate([VIRTUAL], Kind.USER_READ, references=True)
        assert found.read_count.tolist() == [GUEST_READS[guest][leaf] * (table_reads + 1) + data_reads]
        assert found.references is not None
        stages = found.references.read_stages[0, : int(found.read_count[0])].tolist()
        assert stages == ([2] * table_reads + [1]) * GUEST_READS[guest][leaf] + [2] * data_reads
        assert scene.translate([VIRTUAL]).read_count.tolist() == found.read_count.tolist()


# ------------------------------------------------------------------ faults, by hand


def small(memory: Memory, stage2: str, guest_leaf: int = 0x67) -> Guest:
    scene = Guest(memory, "x86-64", stage2)
    assert scene.guest.map(VIRTUAL, 1, DATA | guest_leaf)
    return scene


def outcome(found: NestedTranslation) -> tuple[int, int, int, int]:
    return int(found.status[0]), int(found.stage[0]), int(found.error[0]), int(found.fault_address[0])


@pytest.mark.parametrize(
    ("stage2", "error"), [("ept", 0x82), ("npt", 1 << 33 | 0x6), ("ept old", 0x81), ("arm64 4 levels", 0x84)]
)
def test_a_guest_table_that_stage_2_does_not_map(memory: Memory, stage2: str, error: int) -> None:
    scene = small(memory, stage2)
    slot = scene.guest.root + (VIRTUAL >> 39 & 511) * 8
    found = scene.translate([VIRTUAL])
    assert outcome(found) == (S.NOT_PRESENT, W.WalkStage.TABLE, error, slot)
    assert (found.guest_level[0], found.host_level[0]) == (4, 4)


def test_the_manual_also_sets_the_read_bit(memory: Memory) -> None:
    found = small(memory, "ept").translate([VIRTUAL], Kind.READ, Access(table_fault_reads=True))
    assert outcome(found)[2] == 0x83


@pytest.mark.parametrize(("stage2", "read_only", "error"), [("ept", 0xF75, 0xAA), ("npt", 0xE65, 1 << 33 | 0x7)])
def test_guest_tables_are_read_with_intent_to_write(memory: Memory, stage2: str, read_only: int, error: int) -> None:
    scene = small(memory, stage2)
    scene.map_host(0, 1, memory.pool | read_only)
    found = scene.translate([VIRTUAL])
    assert outcome(found)[:3] == (S.PERMISSION, W.WalkStage.TABLE, error)


@pytest.mark.parametrize(("stage2", "read_only", "error"), [("ept old", 0xC75, 0xAA), ("arm64 4 levels", 0x77F, 0xCF)])
def test_without_it_only_an_update_needs_write_access(memory: Memory, stage2: str, read_only: int, error: int) -> None:
    scene = small(memory, stage2)
    for table in scene.guest.tables:
        scene.map_host(table, 1, memory.pool + table | read_only)
    scene.map_host(DATA, 1)
    assert scene.translate([VIRTUAL]).status[0] == S.OK
    scene.words[scene.guest.slot(scene.guest.tables[1], VIRTUAL, 3)] &= ~0x20
    found = scene.translate([VIRTUAL])
    assert outcome(found)[:3] == (S.PERMISSION, W.WalkStage.TABLE, error)
    assert found.fault_address[0] >> 12 == scene.guest.tables[1] >> 12
    assert scene.translate([VIRTUAL], Kind.USER_READ, Access(update=False)).status[0] == S.OK


@pytest.mark.parametrize(
    ("stage2", "kind", "error"),
    [("ept", Kind.USER_READ, 0x181), ("ept", Kind.USER_WRITE, 0x182), ("ept", Kind.USER_FETCH, 0x184),
     ("npt", Kind.USER_WRITE, 1 << 32 | 0x6), ("arm64 4 levels", Kind.USER_WRITE, 0x46)],
)  # fmt: skip
def test_data_that_stage_2_does_not_map(memory: Memory, stage2: str, kind: Kind, error: int) -> None:
    scene = small(memory, stage2)
    scene.map_host(0, 2)
    if stage2 == "arm64 4 levels":  # a table at the last but one level: the fault is Arm's level 2
        scene.map_host(DATA + W.PAGE_2M, 2)
    found = scene.translate([VIRTUAL], kind)
    assert outcome(found) == (S.NOT_PRESENT, W.WalkStage.FINAL, error, DATA + (VIRTUAL & 4095))


@pytest.mark.parametrize(("stage2", "bit", "error"), [("ept", 1 << 2, 0x19C), ("npt", 1 << 63, 1 << 32 | 0x15)])
def test_rights_are_those_of_every_level_of_stage_2(memory: Memory, stage2: str, bit: int, error: int) -> None:
    """The top entry alone forbids execution; guest tables below it are read, data too."""
    scene = small(memory, stage2)
    scene.map_host(0, 2)
    scene.map_host(DATA, 1)
    scene.words[scene.stage2.root] ^= bit
    kinds = [Kind.USER_READ, Kind.USER_FETCH, Kind.USER_WRITE]
    expected = [S.OK, S.PERMISSION, S.OK]
    assert [scene.translate([VIRTUAL], kind).status[0] for kind in kinds] == expected
    assert scene.translate([VIRTUAL] * 3, kinds).status.tolist() == expected
    assert outcome(scene.translate([VIRTUAL], Kind.USER_FETCH))[1:3] == (W.WalkStage.FINAL, error)


def test_a_fault_of_the_guest(memory: Memory) -> None:
    scene = small(memory, "ept", 0x25)
    scene.map_host(0, 2)
    found = scene.translate([VIRTUAL, 1 << 47, VIRTUAL + W.PAGE_4K], Kind.USER_WRITE)
    assert found.status.tolist() == [S.PERMISSION, S.NOT_CANONICAL, S.NOT_PRESENT]
    assert found.stage.tolist() == [W.WalkStage.GUEST] * 3
    assert found.error.tolist() == [0x7, 0, 0x6]
    assert found.fault_address.tolist() == [VIRTUAL, 1 << 47, VIRTUAL + W.PAGE_4K]
    assert found.read_count.tolist() == [4 * 4, 0, 4 * 4]


def test_a_guest_table_without_contents_reads_as_zero(memory: Memory) -> None:
    scene = small(memory, "ept")
    machine = memory.machine
    scene.words[scene.guest.root + memory.pool + (VIRTUAL >> 39 & 511) * 8] = 100 * 4096 | 0x67
    scene.map_host(0, 2)
    assert not any(machine.read_frame((memory.pool >> 12) + 100))
    assert outcome(scene.translate([VIRTUAL])) == (S.NOT_PRESENT, W.WalkStage.GUEST, 0x4, VIRTUAL)


def test_dirty_bits_of_the_page_that_holds_a_guest_table(memory: Memory) -> None:
    scene = small(memory, "ept", 0x47)
    for table in scene.guest.tables:
        scene.map_host(table, 1, memory.pool + table | 0x77)
    scene.map_host(DATA, 1, memory.pool | 0x77)
    slots = [scene.stage2.slot(scene.stage2.tables[3], table, 1) for table in scene.guest.tables]
    found = scene.translate([VIRTUAL], Kind.USER_READ, references=True)
    assert found.status[0] == S.OK
    assert [(memory.read(slot) or 0) & 0x300 for slot in slots] == [0x300] * 4
    data = scene.stage2.slot(scene.stage2.tables[-1], DATA, 1)
    assert (memory.read(data) or 0) & 0x300 == 0x100
    leaf = memory.pool + scene.guest.tables[3] + (VIRTUAL >> 12 & 511) * 8
    assert memory.read(leaf) == DATA | 0x67
    lists = found.references
    assert lists is not None
    written = list(zip(lists.writes[0].tolist(), lists.write_stages[0].tolist(), strict=True))
    # Tables of stage 2 are accessed already; four leaves, the data's leaf, then the guest's own.
    assert written[: int(found.write_count[0])] == [(slot, 2) for slot in slots] + [(data, 2), (leaf, 1)]
    assert scene.translate([VIRTUAL], store=False).write_count.tolist() == [0]


# ------------------------------------------------------------------ the model


def random_guest(rng: random.Random, memory: Memory, guest: str, stage2: str) -> tuple[Guest, list[int]]:
    scene = Guest(memory, guest, stage2)
    kind = scene.stage2.fmt.kind
    targets = [rng.choice((0, W.PAGE_2M, W.PAGE_1G, 5 * W.PAGE_1G)) + rng.randrange(64) * 4096 for _ in range(12)]
    addresses = []
    for _ in range(rng.choice((4, 12))):
        address = random_address(rng, scene.guest.fmt)
        addresses.append(address)
        if len(scene.guest.tables) < 58:
            level = rng.choice((1, 1, 1, 2, 3))
            leaf = random_leaf(rng, "x86", level, 0) | rng.choice(targets) & ~(SIZES[level] - 1)
            scene.guest.map(address, level, leaf, lambda: random_table(rng, "x86"))
    flip(rng, scene.guest, rng.choice((0, 0, 3)))

    def leaf_at(gpa: int, level: int) -> int:
        host = memory.pool + (gpa if gpa < W.PAGE_2M else gpa & 0x3F_F000)
        value = random_leaf(rng, kind, level, host & ~(SIZES[level] - 1))
        return value if rng.random() < 0.3 else host & ~(SIZES[level] - 1) | leaf_bits(kind, level)

    for gpa in [*scene.guest.tables, *targets]:
        if rng.random() < 0.97 and len(scene.stage2.tables) < 100:
            level = 1 if gpa < W.PAGE_2M else rng.choice((1, 2, 3))
            scene.stage2.map(gpa, level, leaf_at(gpa, level), lambda: random_table(rng, kind))
    flip(rng, scene.stage2, rng.choice((0, 0, 0, 2)))
    return scene, rng.choices([*addresses, rng.getrandbits(64)], k=rng.choice((9, 70)))


def expect(scene: Guest, addresses: list[int], kinds: list[int], access: Access) -> tuple[list[NestedOutcome], Any]:
    words: dict[int, int] = {}

    def read(address: int) -> int | None:
        return words.get(address, scene.memory.read(address))

    model = Nested(scene.guest.fmt, scene.stage2.fmt, read, words.__setitem__)
    roots = scene.guest.root, scene.stage2.root
    return [model.translate(roots, *pair, access) for pair in zip(addresses, kinds, strict=True)], words


def agree(found: NestedTranslation, outcomes: list[NestedOutcome]) -> None:
    names = {"fault_address": "fault"}
    for name in ("status", "stage", "physical", "error", "fault_address", "guest_level", "host_level"):
        column = [int(value) for value in getattr(found, name)]
        assert column == [getattr(outcome, names.get(name, name)) for outcome in outcomes], name
    assert found.read_count.tolist() == [len(outcome.reads) for outcome in outcomes]
    assert found.write_count.tolist() == [len(outcome.updates) for outcome in outcomes]


@settings(max_examples=60)
@given(
    st.sampled_from(["x86-64", "x86-64-5", "x86-64 small"]),
    st.sampled_from(["npt", "npt-5", "ept", "ept-5", "ept old", "ept mode-based", "arm64 3 levels", "arm64 4 levels",
                     "arm64 16 roots"]),
    st.integers(0, 1 << 32),
)  # fmt: skip
def test_nested_agrees_with_the_model(memory: Memory, guest: str, stage2: str, seed: int) -> None:
    rng = random.Random(seed)
    scene, addresses = random_guest(rng, memory, guest, stage2)
    kinds = rng.choices(range(6), k=len(addresses)) if rng.random() < 0.5 else [rng.randrange(6)] * len(addresses)
    access = random_access(rng)
    scene.memory.store(scene.words)
    outcomes, words = expect(scene, addresses, kinds, access)

    listed = scene.translate(addresses, kinds, access, references=True)
    agree(listed, outcomes)
    lists = listed.references
    assert lists is not None
    for i, outcome in enumerate(outcomes):
        n, w = len(outcome.reads), len(outcome.updates)
        assert list(zip(lists.reads[i, :n], lists.read_stages[i, :n], strict=True)) == outcome.reads
        written = list(zip(lists.writes[i, :w], lists.write_stages[i, :w], strict=True))
        assert written == [(address, stage) for address, _, stage in outcome.updates]
    assert {address: memory.read(address) for address in words} == words

    for together in (64, 3):
        agree(scene.translate(addresses, kinds, access, together=together), outcomes)
        assert {address: memory.read(address) for address in words} == words
