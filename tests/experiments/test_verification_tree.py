"""What an operation changed in a tree, as KVM prints it; how a tree is taken apart."""

from __future__ import annotations

from collections import Counter

import pytest

from pgemu.experiments.verification.tree import Change, Format, Tree
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

HVA = 0x7F00_0000_0000
TABLE, LEAF_4K, LEAF_2M = 0x827, 0xE67, 0xEE7


def scene(thp: bool = False) -> tuple[Machine, Vm, Tree]:
    """A VM with 4 MiB at guest physical 0."""
    fields = {"thp": "always", "buddy": 64 << 20} if thp else {}
    machine = Machine(Config("restructure", **fields))
    process = machine.create_process()
    process.mmap_anonymous(HVA, 4 << 20)
    vm = machine.create_vm(process)
    assert vm.set_memory_region(0, 0, 4 << 20, HVA).status == 0
    return machine, vm, Tree(machine, Format.of(machine), 0, {})


def flags(changes: list[Change]) -> list[tuple[int, int, int, int]]:
    """Level, first gfn and flags of both entries."""
    kept = (1 << 63) | 0xFFF
    return [(change.key[1], change.key[2], change.old & kept, change.new & kept) for change in changes]


EMPTY, FROZEN = 1 << 63, 1 << 63 | 0x1A0


def test_a_fault_links_tables_and_makes_a_leaf() -> None:
    _, vm, tree = scene()
    assert tree.changes(vm.root, 0, 512) == []
    vm.touch(0x5000, write=True)
    made = flags(tree.changes(vm.root, 0, 512))
    assert made == [(4, 0, EMPTY, TABLE), (3, 0, EMPTY, TABLE), (2, 0, EMPTY, TABLE), (1, 5, EMPTY, LEAF_4K)]
    assert tree.changes(vm.root, 0, 1024) == []


def test_a_page_that_was_copied_is_dropped_and_mapped() -> None:
    _, vm, tree = scene()
    vm.touch(0x5000)
    tree.changes(vm.root, 0, 512)
    vm.touch(0x5000, write=True)
    assert flags(tree.changes(vm.root, 5, 6)) == [(1, 5, 0x825, EMPTY), (1, 5, EMPTY, LEAF_4K)]


def test_a_split_prints_its_table_and_what_is_write_protected() -> None:
    _, vm, tree = scene(thp=True)
    vm.touch(0, write=True)
    assert flags(tree.changes(vm.root, 0, 512))[-1] == (2, 0, EMPTY, LEAF_2M)
    assert vm.set_memory_region(0, 0, 4 << 20, HVA, log_dirty_pages=True).status == 0
    split, *protected = flags(tree.changes(vm.root, 0, 1024))
    assert split == (2, 0, LEAF_2M, TABLE)
    assert protected == [(1, gfn, LEAF_4K, LEAF_4K & ~2) for gfn in range(512)]


@pytest.mark.parametrize(("shared", "prove"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_tree_that_goes(shared: bool, prove: bool) -> None:
    """Leaves become empty first with CONFIG_KVM_PROVE_MMU, else they are frozen with their table; of a table that is
    taken apart for reading every entry is printed."""
    _, vm, tree = scene()
    vm.touch(0x5000, write=True)
    tree.changes(vm.root, 0, 512)
    gone = flags(tree.drop(shared=shared, prove=prove))
    counts = Counter((level, new) for level, _, _, new in gone)
    assert not tree.stands
    frozen = 512 if shared else 0
    if prove:
        assert counts == +Counter(
            {
                (1, EMPTY): 1,
                (2, EMPTY): 1,
                (3, EMPTY): 1,
                (4, EMPTY): 1,
                **{(level, FROZEN): frozen for level in (1, 2, 3)},
            }
        )
    else:
        below = frozen or 1  # what is present is printed in any case
        assert counts == +Counter(
            {(1, FROZEN): below, (2, FROZEN): below, (3, FROZEN): frozen, (3, EMPTY): 1, (4, EMPTY): 1}
        )
    leaf = next(one for one in gone if one[:2] == (1, 5) and one[2] == LEAF_4K)
    assert leaf[3] == (EMPTY if prove else FROZEN)


def test_what_the_processor_sets_is_no_change() -> None:
    machine, vm, tree = scene()
    vm.prefault(0x5000, W.PAGE_4K)
    tree.changes(vm.root, 0, 512)
    before = tree.entry(1, 5)
    vm.touch(0x5000)
    assert tree.changes(vm.root, 0, 512) == []
    assert before is not None
    assert (tree.entry(1, 5) or 0) ^ before == Format.of(machine).accessed
