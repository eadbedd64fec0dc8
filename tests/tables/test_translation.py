"""Formats of a machine, access rows, and the arguments of `translate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu.tables.access import rows_of
from pgemu.tables.translation import Access, Kind, WalkStatus, translate, translate_nested
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats, page_format

BASE = 0x7F00_0000_0000


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(Config("pfnmap", pool=8 * W.PAGE_2M, page_size=W.PAGE_2M))


@pytest.fixture(scope="module")
def process(machine: Machine) -> AddressSpace:
    process = machine.create_process()
    assert process.mmap(machine.create_guest_memfd(4 * W.PAGE_2M, shared=True), BASE).status == 0
    for page in range(8):
        process.touch(BASE + page * W.PAGE_4K, write=True)
    return process


def test_the_fixed_rows_know_what_a_walker_needs(machine: Machine) -> None:
    for index, fmt in enumerate((page_format.x86_64(), page_format.npt(), page_format.ept())):
        assert machine.format_row(index)[16:].tolist() == fmt.row()[16:].tolist()
    with pytest.raises(ValueError, match="index 3: expected a row"):
        Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M)).format_row(3)


def test_a_format_has_one_row_and_there_is_an_end_to_rows() -> None:
    machine = Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M))
    first = machine.add_format(page_format.arm64_stage2())
    assert first == 3
    assert machine.add_format(page_format.x86_64(5)) == 4
    assert machine.add_format(page_format.arm64_stage2()) == first
    assert machine.format_row(first).tolist() == page_format.arm64_stage2().row().tolist()
    others = [page_format.x86_64(levels, maxphyaddr=bits) for levels in (4, 5) for bits in range(36, 52)]
    for fmt in others[: W.FORMATS - 5]:
        machine.add_format(fmt)
    assert machine.add_format(others[0]) == 5
    with pytest.raises(ValueError, match="formats already"):
        machine.add_format(others[-1])


def test_a_process_is_translated(machine: Machine, process: AddressSpace) -> None:
    addresses = BASE + np.arange(8, dtype=np.uint64) * np.uint64(W.PAGE_4K) + np.uint64(5)
    plain = translate(machine, 0, process.root, addresses)
    assert plain.status.tolist() == [0] * 8
    frames = [process.walk(int(address))[-1][2] & formats.ADDRESS for address in addresses]
    assert plain.physical.tolist() == [frame + 5 for frame in frames]
    assert plain.references is None
    listed = translate(machine, 0, process.root, addresses, references=True).references
    assert listed is not None
    steps = process.walk(int(addresses[3]))
    assert listed.reads[3, : listed.read_counts[3]].tolist() == [address for _, address, _ in steps]


def test_arrays_are_filled_again(machine: Machine, process: AddressSpace) -> None:
    missing = [BASE + W.PAGE_2M, BASE]
    first = translate(machine, 0, process.root, missing, Kind.USER_READ)
    assert first.error.tolist() == [0x4, 0]
    again = translate(machine, 0, process.root, missing[::-1], [Kind.USER_READ, Kind.USER_WRITE], out=first)
    assert again.physical is first.physical
    assert (again.status.tolist(), again.error.tolist()) == ([0, W.WalkStatus.NOT_PRESENT], [0, 0x6])
    assert translate(machine, 0, process.root, np.empty(0, np.uint64)).status.size == 0


def test_addresses_of_both_halves_in_one_list(machine: Machine, process: AddressSpace) -> None:
    found = translate(machine, 0, process.root, [BASE, 0xFFFF_8000_0000_0000])  # NumPy alone makes them float64
    assert found.level.tolist() == [1, 4]
    table = machine.create_page_table("x86-64")
    addresses: Any = [0x1000, 0xFFFF_8000_0000_0000]
    assert table.map_many(addresses, [0x5000, 0x6000]).status.tolist() == [0, 0]  # type: ignore[arg-type]
    assert table.translate(addresses).physical.tolist() == [0x5000, 0x6000]
    with pytest.raises(ValueError, match="expected a sequence"):
        table.translate([1.5, 2.0**63])
    table.destroy()


def test_scattered_addresses_keep_their_order(machine: Machine, process: AddressSpace) -> None:
    steps = process.walk(BASE)
    ram = machine.arrays.ram
    other = machine.create_process().root
    for n in range(256):
        ram[other // 8 + n] = steps[0][2] if n % 5 else 0
    random = np.random.default_rng(3)
    addresses = (random.integers(0, 256, 1000).astype(np.uint64) << np.uint64(39)) + np.uint64(BASE & (1 << 39) - 1)
    addresses += random.integers(0, 10 * W.PAGE_4K, 1000).astype(np.uint64)
    present = ((addresses >> np.uint64(39)) % np.uint64(5) != 0) & (
        addresses & np.uint64(W.PAGE_2M - 1) < 8 * W.PAGE_4K
    )
    found = translate(machine, 0, other, addresses)
    assert 500 < present.sum() < 900
    assert ((found.status == 0) == present).all()
    expected = [process.walk(BASE + int(a) % W.PAGE_2M)[-1][2] & formats.ADDRESS | int(a) % 4096 for a in addresses]
    assert found.physical[present].tolist() == np.array(expected, np.uint64)[present].tolist()
    for n in range(256):
        ram[other // 8 + n] = 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 0x1001, [0]), "root"),
        ((9, 0x1000, [0]), "format_row 9: expected a row of the machine's formats, 0 to "),
        ((0, 0x1000, [-1]), r"addresses \[-1\]: expected"),
        ((0, 0x1000, [1.5]), r"addresses \[1.5\]: expected .* integers"),
        ((0, 0x1000, [0], 6), "kinds 6: expected members of Kind, 0 to 5"),
        ((0, 0x1000, [0], [1.5]), r"kinds \[1.5\]: expected"),
        ((0, 0x1000, [0, 1, 2], [0, 1]), "kinds of 2 elements: expected 3 or 1"),
    ],
)
def test_misuse_is_refused(machine: Machine, arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        translate(machine, *arguments)


def test_misuse_of_nested_walks_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match="x86-64 tables over"):
        translate_nested(machine, 1, 0, 1, 0x1000, [0])
    with pytest.raises(ValueError, match="x86-64 tables over"):
        translate_nested(machine, 0, 0, 0, 0x1000, [0])
    with pytest.raises(ValueError, match="together"):
        translate_nested(machine, 0, 0, 1, 0x1000, [0], together=65)
    small = translate(machine, 0, 0x1000, [0])
    with pytest.raises(ValueError, match="out"):
        translate(machine, 0, 0x1000, [0, 1], out=small)


def test_entries_that_pass_at_one_look_are_what_linux_writes(machine: Machine) -> None:
    """The masks of an access row take the leaves and tables of every format as they are."""
    for fmt in (page_format.x86_64(), page_format.npt(), page_format.ept(), page_format.arm64_stage2()):
        row = fmt.row()
        for kind in Kind:
            if fmt.family == page_format.Family.X86 and kind in (Kind.READ, Kind.WRITE, Kind.FETCH):
                continue  # a user page: SMAP, SMEP
            x = rows_of(row, 1 << 40, Access(), plain=False).reshape(W.ACCESS_ROWS, W.X_WORDS)[kind]
            accessed = fmt.accessed if fmt.family != page_format.Family.ARM64 else 0
            for level in range(2, fmt.levels + 1):
                mask, value = x[int(W.X_TABLE_MASK) + level], x[int(W.X_TABLE_VALUE) + level]
                assert int(mask) & (fmt.table | accessed) == int(value), (fmt.name, kind, level)
            for level in range(1, 4):
                mask, value = x[int(W.X_LEAF_MASK) + level], x[int(W.X_LEAF_VALUE) + level]
                assert int(mask) & fmt.leaf[level - 1] == int(value), (fmt.name, kind, level)
                assert int(mask) & (fmt.leaf[level - 1] ^ fmt.present) != int(value)


def test_processes_and_vms_translate_as_their_tables_do() -> None:
    machine = Machine(Config("pfnmap", pool=4 * W.PAGE_2M, page_size=W.PAGE_2M))
    gmem = machine.create_guest_memfd(2 * W.PAGE_2M, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process)
    base = 0x7F00_0000_0000
    assert process.mmap(gmem, base).status == vm.bind(gmem, 0).status == 0
    process.touch(base)
    vm.touch(0)
    frame = (gmem.pfn(0) or 0) << 12
    found = process.translate(np.array([base + 0x123, base + 0x1000], np.uint64), Kind.USER_READ)
    assert found.status.tolist() == [WalkStatus.OK, WalkStatus.NOT_PRESENT]
    assert int(found.physical[0]) == frame + 0x123
    assert int(vm.translate(np.array([0x456], np.uint64), Kind.READ).physical[0]) == frame + 0x456
    # The guest's top table is its page 0, and its first entry points to itself, four levels deep.
    machine.write_frame(frame >> 12, (0x67).to_bytes(8, "little"))
    nested = vm.translate_virtual(0, np.array([0x789], np.uint64), Kind.USER_READ)
    assert (int(nested.physical[0]), int(nested.guest_level[0])) == (frame + 0x789, 1)
