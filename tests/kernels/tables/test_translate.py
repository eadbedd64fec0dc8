"""Translation against the model: random trees with random bits, every format, every kind of access."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from model.trees import Tree, flip, random_address, random_leaf, random_table, table_bits
from model.walks import Format, Outcome, walk
from pgemu.tables.translation import Access, Kind, Translation, translate
from pgemu_kernels import words as W
from walk_scene import FORMATS, FRAMES, Memory, random_access, small_machine


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(small_machine())


def grow(rng: random.Random, fmt: Format, memory: Memory, leaves: int) -> tuple[Tree, list[int]]:
    """A random tree in the machine, and addresses of which most are mapped."""
    tree = Tree(fmt, {}, memory.frames())
    addresses = []
    for _ in range(leaves):
        address = random_address(rng, fmt)
        level = rng.choice((1, 1, 1, 2, 2, 3))
        leaf = random_leaf(rng, fmt.kind, min(level, fmt.levels), rng.getrandbits(36))
        if len(tree.tables) < FRAMES - fmt.levels:
            tree.map(address, min(level, fmt.levels), leaf, lambda: random_table(rng, fmt.kind))
        addresses.append(address)
    flip(rng, tree, rng.choice((0, 2, 8)))
    memory.store(tree.memory)
    addresses += [rng.getrandbits(64) for _ in range(3)] + [addresses[0] ^ 1 << fmt.bits]
    return tree, addresses


def expect(memory: Memory, fmt: Format, root: int, addresses: list[int], kinds: list[int], access: Any) -> Any:
    """The model's outcomes, the writes of each, and the words of the tree afterwards."""
    words: dict[int, int] = {}

    def read(address: int) -> int | None:
        return words.get(address, memory.read(address))

    outcomes, writes = [], []
    for address, kind in zip(addresses, kinds, strict=True):
        found = walk(fmt, read, root, address, kind, access)
        written = []
        for where, bits in found.updates:
            old = read(where)
            assert old is not None
            if old | bits != old:
                words[where] = old | bits
                written.append(where)
        outcomes.append(found)
        writes.append(written)
    return outcomes, writes, words


def agree(found: Translation, outcomes: list[Outcome], plain: bool) -> None:
    for column, name in ((found.status, "status"), (found.level, "level"), (found.physical, "physical")):
        assert column.tolist() == [getattr(outcome, name) for outcome in outcomes], name
    if not plain:
        assert [hex(word) for word in found.error.tolist()] == [hex(outcome.error) for outcome in outcomes]


@settings(max_examples=90)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 1 << 32), st.booleans())
def test_translate_agrees_with_the_model(memory: Memory, name: str, seed: int, plain: bool) -> None:
    rng = random.Random(seed)
    fmt, kernel_format = FORMATS[name]
    machine = memory.machine
    tree, addresses = grow(rng, fmt, memory, rng.choice((5, 20, 60)))
    addresses = rng.choices(addresses, k=rng.choice((7, 70, 150)))
    order = rng.random()
    if order < 0.2:
        addresses.sort()
    elif order < 0.5:  # a run, most of it within one table or one large leaf
        step = rng.choice((64, 4096))
        addresses = [addresses[0] + step * n & (1 << 64) - 1 for n in range(len(addresses))]
    kinds = rng.choices(range(6), k=len(addresses)) if rng.random() < 0.5 else [rng.randrange(6)] * len(addresses)
    access = None if plain else random_access(rng)
    outcomes, writes, words = expect(memory, fmt, tree.root, addresses, kinds, access)
    row = machine.add_format(kernel_format)
    codes: Any = None if plain else kinds[:1] if len(set(kinds)) == 1 else kinds
    given_addresses = np.array(addresses, np.uint64)

    listed = translate(machine, row, tree.root, given_addresses, codes, access, references=True)
    agree(listed, outcomes, plain)
    lists = listed.references
    assert lists is not None
    for i, outcome in enumerate(outcomes):
        assert lists.reads[i, : lists.read_counts[i]].tolist() == outcome.reads
        assert lists.writes[i, : lists.write_counts[i]].tolist() == writes[i]
    assert {address: memory.read(address) for address in words} == words

    memory.store(tree.memory)
    fast = translate(machine, row, tree.root, given_addresses, codes, access)
    agree(fast, outcomes, plain)
    assert {address: memory.read(address) for address in words} == words
    assert {a: v for a, v in tree.memory.items() if a not in words and memory.read(a) != v} == {}
    agree(translate(machine, row, tree.root, given_addresses, codes, access, out=fast), outcomes, plain)


@pytest.mark.parametrize(("level", "step"), [(1, 4096), (2, 1 << 16), (3, 1 << 18), (3, 1 << 25)])
def test_a_run_goes_on_in_the_next_table_or_leaf(memory: Memory, level: int, step: int) -> None:
    """Blocks that begin in one level-1 table or large leaf and end in the next, or in a hole behind it."""
    size = 1 << (12 + 9 * (level - 1))
    tree = tree_of(memory, "x86-64")
    begin = 7 * (size << 9) - 40 * step - (40 * step) % size
    # The first table is full, so that entries at the same places in the wrong table would pass.
    first = begin - begin % size - (512 * size if level == 1 else 0)
    leaves = range(first, begin + 100 * step, size)
    for n, address in enumerate(leaves):
        assert tree.map(address, level, (5 * n + 3) * size | (0x67 if level == 1 else 0xE7))
    memory.store(tree.memory)
    addresses = np.array([begin + step * n + 9 for n in range(128)], np.uint64)
    found = translate(memory.machine, 0, tree.root, addresses)
    mapped = addresses < np.uint64(leaves[-1] + size)
    assert mapped.sum() > 64
    assert (found.status == 0).tolist() == mapped.tolist()
    frames = [(5 * ((int(a) - leaves[0]) // size) + 3) * size + int(a) % size for a in addresses[mapped]]
    assert found.physical[mapped].tolist() == frames
    assert set(found.level[mapped].tolist()) == {level}


# ------------------------------------------------------------------ exact codes, by hand


def tree_of(memory: Memory, name: str) -> Tree:
    return Tree(FORMATS[name][0], {}, memory.frames())


def ask(memory: Memory, name: str, tree: Tree, address: int, kind: Kind, access: Access) -> tuple[int, int, int]:
    memory.store(tree.memory)
    row = memory.machine.add_format(FORMATS[name][1])
    found = translate(memory.machine, row, tree.root, [address], kind, access)
    return int(found.status[0]), int(found.level[0]), int(found.error[0])


ADDRESS = 0x40_1234
S = W.WalkStatus
REGISTERS = Access()

X86_CASES = [
    # leaf, kind, registers -> status, error code (SDM volume 3, "Page-Fault Exceptions")
    (0, Kind.READ, REGISTERS, S.NOT_PRESENT, 0x0),
    (0, Kind.USER_WRITE, REGISTERS, S.NOT_PRESENT, 0x6),
    (0, Kind.USER_FETCH, REGISTERS, S.NOT_PRESENT, 0x14),
    (0x25, Kind.USER_WRITE, REGISTERS, S.PERMISSION, 0x7),
    (0x25, Kind.WRITE, Access(smap=False), S.PERMISSION, 0x3),
    (0x25, Kind.WRITE, Access(smap=False, write_protect=False), S.OK, 0),
    (0x23, Kind.USER_READ, REGISTERS, S.PERMISSION, 0x5),
    (0x27, Kind.READ, REGISTERS, S.PERMISSION, 0x1),  # SMAP
    (0x27, Kind.READ, Access(ac=True), S.OK, 0),
    (0x27, Kind.FETCH, REGISTERS, S.PERMISSION, 0x11),  # SMEP
    (0x27, Kind.FETCH, Access(smep=False), S.OK, 0),
    (1 << 63 | 0x27, Kind.USER_FETCH, REGISTERS, S.PERMISSION, 0x15),
    (1 << 59 | 0x27, Kind.USER_READ, Access(pke=True, pkru=0b0100), S.PROTECTION_KEY, 0x25),
    (1 << 59 | 0x27, Kind.USER_WRITE, Access(pke=True, pkru=0b1000), S.PROTECTION_KEY, 0x27),
    (1 << 59 | 0x25, Kind.USER_WRITE, Access(pke=True, pkru=0b1000), S.PERMISSION, 0x27),
    (1 << 59 | 0x27, Kind.USER_FETCH, Access(pke=True, pkru=0b1100), S.OK, 0),
    (2 << 59 | 0x23, Kind.WRITE, Access(pks=True, pkrs=0b10_0000), S.PROTECTION_KEY, 0x23),
    (2 << 59 | 0x23, Kind.WRITE, Access(pks=True, pkrs=0b10_0000, write_protect=False), S.OK, 0),
    (0x27, Kind.USER_READ, Access(pke=True, pkru=0b01), S.PROTECTION_KEY, 0x25),  # key 0
]


@pytest.mark.parametrize(("leaf", "kind", "access", "status", "error"), X86_CASES)
def test_page_fault_error_codes(memory: Memory, leaf: int, kind: Kind, access: Access, status: int, error: int) -> None:
    tree = tree_of(memory, "x86-64")
    tree.map(ADDRESS, 1, leaf)
    assert ask(memory, "x86-64", tree, ADDRESS, kind, access) == (status, 1, error)


def test_reserved_bits_of_x86(memory: Memory) -> None:
    tree = tree_of(memory, "x86-64 amd")
    tree.map(ADDRESS, 1, 1 << 46 | 0x67)
    assert ask(memory, "x86-64 amd", tree, ADDRESS, Kind.USER_WRITE, REGISTERS) == (S.RESERVED, 1, 0xF)
    tree = tree_of(memory, "x86-64 amd")
    tree.map(ADDRESS, 2, 1 << 13 | 0xE7)
    assert ask(memory, "x86-64 amd", tree, ADDRESS, Kind.READ, REGISTERS) == (S.RESERVED, 2, 0x9)
    tree.memory[tree.root] |= 1 << 8  # reserved above level 3 on AMD
    assert ask(memory, "x86-64 amd", tree, ADDRESS, Kind.USER_FETCH, REGISTERS) == (S.RESERVED, 4, 0x1D)
    assert ask(memory, "x86-64", tree, ADDRESS, Kind.USER_READ, REGISTERS)[:2] == (S.RESERVED, 2)


def test_addresses_that_no_table_is_asked_for(memory: Memory) -> None:
    tree = tree_of(memory, "x86-64")
    assert ask(memory, "x86-64", tree, 1 << 47, Kind.READ, REGISTERS) == (S.NOT_CANONICAL, 4, 0)
    tree = tree_of(memory, "npt")
    assert ask(memory, "npt", tree, 1 << 48, Kind.WRITE, REGISTERS) == (S.ADDRESS_SIZE, 4, 1 << 32 | 0x6)
    tree = tree_of(memory, "arm64 3 levels")
    assert ask(memory, "arm64 3 levels", tree, 1 << 40, Kind.READ, REGISTERS) == (S.ADDRESS_SIZE, 3, 0x4)


def test_entries_beyond_the_input_bits_are_not_used(memory: Memory) -> None:
    """36 bits use 64 entries of the top table; what the others hold maps nothing."""
    tree = tree_of(memory, "arm64 36 bits")
    for address in (0, 1 << 36):
        assert tree.map(address, 3, 0x7FD)
    memory.store(tree.memory)
    row = memory.machine.add_format(FORMATS["arm64 36 bits"][1])
    found = translate(memory.machine, row, tree.root, [0x5000, 1 << 36 | 0x5000] * 64)
    assert found.status.tolist() == [S.OK, S.ADDRESS_SIZE] * 64


def test_a_table_outside_memory(memory: Memory) -> None:
    tree = tree_of(memory, "x86-64")
    tree.memory[tree.root] = 1 << 44 | 0x67
    assert ask(memory, "x86-64", tree, ADDRESS, Kind.READ, REGISTERS) == (S.OUTSIDE_MEMORY, 3, 0)


EPT_CASES = [
    # the values that real kernels saw, and misconfigurations (SDM, "EPT Misconfigurations")
    (0, Kind.READ, S.NOT_PRESENT, 0x181),
    (0, Kind.WRITE, S.NOT_PRESENT, 0x182),
    (0, Kind.FETCH, S.NOT_PRESENT, 0x184),
    (0xF71, Kind.WRITE, S.PERMISSION, 0x18A),
    (0xF75, Kind.WRITE, S.PERMISSION, 0x1AA),
    (0xF73, Kind.FETCH, S.PERMISSION, 0x19C),
    (0xF72, Kind.READ, S.MISCONFIGURED, 0),
    (0xF76, Kind.READ, S.MISCONFIGURED, 0),
    (0xF57, Kind.READ, S.MISCONFIGURED, 0),  # memory type 2
    (0x8104000126, Kind.READ, S.MISCONFIGURED, 0),  # KVM's MMIO entry
    (0xF74, Kind.FETCH, S.OK, 0),
]


@pytest.mark.parametrize(("leaf", "kind", "status", "error"), EPT_CASES)
def test_exit_qualifications(memory: Memory, leaf: int, kind: Kind, status: int, error: int) -> None:
    tree = tree_of(memory, "ept")
    tree.map(ADDRESS, 1, leaf)
    assert ask(memory, "ept", tree, ADDRESS, kind, REGISTERS) == (status, 1, error)


def test_execute_only_and_mode_based_execute(memory: Memory) -> None:
    tree = tree_of(memory, "ept old")
    tree.map(ADDRESS, 1, 0x74)
    assert ask(memory, "ept old", tree, ADDRESS, Kind.FETCH, REGISTERS) == (S.MISCONFIGURED, 1, 0)
    tree = tree_of(memory, "ept mode-based")
    tree.map(ADDRESS, 1, 0x773)  # user execute alone
    assert ask(memory, "ept mode-based", tree, ADDRESS, Kind.USER_FETCH, REGISTERS) == (S.OK, 1, 0)
    assert ask(memory, "ept mode-based", tree, ADDRESS, Kind.FETCH, REGISTERS) == (S.PERMISSION, 1, 0x1DC)


NPT_CASES = [
    (0, Kind.READ, S.NOT_PRESENT, 1 << 32 | 0x4),
    (0, Kind.WRITE, S.NOT_PRESENT, 1 << 32 | 0x6),
    (0, Kind.FETCH, S.NOT_PRESENT, 1 << 32 | 0x14),
    (0xE65, Kind.WRITE, S.PERMISSION, 1 << 32 | 0x7),
    (0x8000104000027, Kind.READ, S.RESERVED, 1 << 32 | 0xD),  # KVM's MMIO entry
    (0xE63, Kind.READ, S.PERMISSION, 1 << 32 | 0x5),
]


@pytest.mark.parametrize(("leaf", "kind", "status", "error"), NPT_CASES)
def test_nested_page_fault_codes(memory: Memory, leaf: int, kind: Kind, status: int, error: int) -> None:
    tree = tree_of(memory, "npt")
    tree.map(ADDRESS, 1, leaf)
    assert ask(memory, "npt", tree, ADDRESS, kind, REGISTERS) == (status, 1, error)


ARM_CASES = [
    (0, Kind.READ, REGISTERS, S.NOT_PRESENT, 0x07),
    (0, Kind.WRITE, REGISTERS, S.NOT_PRESENT, 0x47),
    (0x7FD, Kind.READ, REGISTERS, S.RESERVED, 0x07),  # a block at the last level
    (0x3FF, Kind.READ, REGISTERS, S.ACCESS_FLAG, 0x0B),
    (0x77F, Kind.WRITE, REGISTERS, S.PERMISSION, 0x4F),
    (0x7BF, Kind.READ, REGISTERS, S.PERMISSION, 0x0F),
    (1 << 51 | 0x77F, Kind.WRITE, Access(hardware_dirty=True), S.OK, 0),
    (2 << 53 | 0x7FF, Kind.USER_FETCH, REGISTERS, S.PERMISSION, 0x0F),
    (1 << 53 | 0x7FF, Kind.FETCH, REGISTERS, S.PERMISSION, 0x0F),
    (1 << 53 | 0x7FF, Kind.USER_FETCH, REGISTERS, S.OK, 0),
    (3 << 53 | 0x7FF, Kind.FETCH, REGISTERS, S.OK, 0),
    (1 << 53 | 0x7FF, Kind.FETCH, Access(xnx=False), S.OK, 0),
]


@pytest.mark.parametrize(("leaf", "kind", "access", "status", "error"), ARM_CASES)
def test_arm_fault_status(memory: Memory, leaf: int, kind: Kind, access: Access, status: int, error: int) -> None:
    tree = tree_of(memory, "arm64 4 levels")
    tree.map(ADDRESS, 1, leaf)
    assert ask(memory, "arm64 4 levels", tree, ADDRESS, kind, access) == (status, 1, error)


def test_arm_levels_count_the_other_way_round(memory: Memory) -> None:
    tree = tree_of(memory, "arm64 4 levels")
    memory.store(tree.memory)
    for level in (4, 3, 2):
        assert ask(memory, "arm64 4 levels", tree, ADDRESS, Kind.READ, REGISTERS)[2] == 4 + 4 - level
        slot = tree.slot(tree.tables[-1], ADDRESS, level)
        tree.memory[slot] = tree.new_table() | table_bits("arm")


def test_accessed_and_dirty_bits_are_set_on_success_only(memory: Memory) -> None:
    tree = tree_of(memory, "x86-64")
    tree.map(ADDRESS, 1, 0x5005, lambda: 0x7)
    slots = [tree.slot(table, ADDRESS, level) for table, level in zip(tree.tables, (4, 3, 2, 1), strict=True)]
    assert ask(memory, "x86-64", tree, ADDRESS, Kind.USER_WRITE, REGISTERS)[0] == S.PERMISSION
    assert [(memory.read(slot) or 0) & 0x60 for slot in slots] == [0, 0, 0, 0]
    assert ask(memory, "x86-64", tree, ADDRESS, Kind.USER_READ, Access(update=False))[0] == S.OK
    assert [(memory.read(slot) or 0) & 0x60 for slot in slots] == [0, 0, 0, 0]
    found = translate(memory.machine, 0, tree.root, [ADDRESS] * 2, Kind.USER_READ, REGISTERS, references=True)
    assert [(memory.read(slot) or 0) & 0x60 for slot in slots] == [0x20, 0x20, 0x20, 0x20]
    assert found.references is not None
    assert found.references.write_counts.tolist() == [4, 0]
    assert found.references.writes[0, :4].tolist() == slots
    tree.memory[slots[3]] = 0x5007
    assert ask(memory, "x86-64", tree, ADDRESS, Kind.USER_WRITE, REGISTERS)[0] == S.OK
    assert [(memory.read(slot) or 0) & 0x60 for slot in slots] == [0x20, 0x20, 0x20, 0x60]
