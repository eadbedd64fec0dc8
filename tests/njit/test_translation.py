"""Walks from a caller's compiled function are those of Python's batches."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from numba import njit, prange

from pgemu import Access, Config, Kind, Machine, kernels, translate_nested
from pgemu.tables import walk as compilerless
from pgemu.tables.page_table import PageTable
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import HOST_X86_64

Array = np.ndarray[Any, Any]
KINDS = (*Kind, None)
BASE = 0x4000_0000
SIZES = {1: W.PAGE_4K, 2: W.PAGE_2M, 3: W.PAGE_1G}


@njit(nogil=True)
def found_of(handle: Any, tree: Array, addresses: Array, kind: int, out: Array) -> None:
    """out: int64[n, 4]."""
    for i in range(addresses.size):
        found = kernels.translate(handle, tree, addresses[i], kind)
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = found.status, found.physical, found.level, found.error


@njit(nogil=True)
def walked_of(handle: Any, tree: Array, addresses: Array, kind: int, out: Array, reads: Array, writes: Array) -> None:
    """out: int64[n, 6]; reads, writes: uint64[n, 6]."""
    for i in range(addresses.size):
        found = kernels.walk(handle, tree, addresses[i], kind, reads[i], writes[i])
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = found.status, found.physical, found.level, found.error
        out[i, 4], out[i, 5] = found.read_count, found.write_count


@njit
def many_of(
    handle: Any, tree: Array, addresses: Array, kind: int, physical: Array, status: Array, levels: Array, error: Array
) -> int:
    return kernels.translate_many(handle, tree, addresses, kind, physical, status, levels, error)  # type: ignore[no-any-return]


@njit(nogil=True)
def nested_of(handle: Any, tree: Array, root: int, address: int, kind: int, reads: Array, writes: Array) -> Any:
    return kernels.translate_nested(handle, tree, root, address, kind, reads, writes)


@njit(parallel=True)
def sum_of(handle: Any, tree: Array, addresses: Array) -> int:
    total = 0
    for i in prange(addresses.size):
        total += kernels.translate(handle, tree, addresses[i], kernels.PLAIN).physical >> np.uint64(12)
    return total


def random_table(name: str, random: Random, **parameters: Any) -> tuple[PageTable, Array]:
    """A table with leaves of every size and right, and addresses within and beside them."""
    table = Machine(Config(pool=W.PAGE_1G)).create_page_table(name, **parameters)
    fmt = table.format
    addresses = [0, (1 << 64) - 1, 1 << 47, 1 << fmt.input_bits - 1, (1 << 63) - 1]
    for _ in range(60):
        level = random.choice((1, 1, 1, 2, 2, 3))
        size = SIZES[level]
        address = random.choice((0, BASE, 1 << 38)) + random.randrange(8) * W.PAGE_1G // random.choice(
            (1, 512, 1 << 18)
        )
        address &= ~(size - 1)
        bits = random.choice((fmt.leaf[0], fmt.leaf[0], fmt.leaf[0] & ~random.choice((fmt.accessed, fmt.dirty, 2))))
        table.map(address, random.randrange(1 << 8) * size, level=level, attributes=bits)
        addresses += [address, address + size - 1, address + size, address + random.randrange(size)]
    return table, np.array([a % (1 << 64) for a in addresses], np.uint64)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("x86-64", {}),
        ("x86-64", {"levels": 5}),
        ("ept", {}),
        ("npt", {}),
        ("arm64-s2", {}),
        ("amd-v1", {}),
        ("vtd-s2", {}),
    ],
)
def test_walks_are_those_of_batches(name: str, parameters: dict[str, Any]) -> None:
    random = Random(name)
    table, addresses = random_table(name, random, **parameters)
    twin, _ = random_table(name, Random(name), **parameters)  # accessed and dirty bits are set once in each
    access = Access(smap=False)
    handle, tree = kernels.Handle(table.machine, "translate"), kernels.tree(table, access)
    kinds = [kind for kind in KINDS if kind is None or kind < (2 if name in ("vtd-s2", "amd-v1") else 6)]
    for kind in random.sample(kinds, len(kinds)):
        code = kernels.PLAIN if kind is None else int(kind)
        expected = twin.translate(addresses, kind, access)
        out = np.zeros((addresses.size, 4), np.int64)
        found_of(handle, tree, addresses, code, out)
        for column, one in enumerate((expected.status, expected.physical, expected.level, expected.error)):
            assert out[:, column].tolist() == one.tolist(), (kind, column)
        assert np.count_nonzero(out[:, 0] == 0) > 20 or kind is not None
        again = [np.ones(addresses.size, dtype) for dtype in (np.uint64, np.uint8, np.uint8, np.uint64)]
        assert many_of(handle, tree, addresses, code, *again) == 0
        listed = np.zeros((addresses.size, 6), np.int64)
        reads, writes = (np.zeros((addresses.size, 6), np.uint64) for _ in range(2))
        walked_of(handle, tree, addresses, code, listed, reads, writes)
        assert listed[:, :4].tolist() == out.tolist() == np.stack([again[i] for i in (1, 0, 2, 3)], 1).tolist()
        references = twin.translate(addresses, kind, access, references=True).references
        assert references is not None
        assert listed[:, 4].tolist() == references.read_counts.tolist()
        for row, (count, theirs) in enumerate(zip(listed[:, 4].tolist(), references.reads, strict=True)):
            assert reads[row, :count].tolist() == theirs[:count].tolist()


def test_accessed_and_dirty_bits_are_written_and_listed() -> None:
    table = Machine(Config()).create_page_table("x86-64")
    clean = table.format.leaf[0] & ~(table.format.accessed | table.format.dirty)
    assert table.map(BASE, 0x8000, attributes=clean).status == 0
    handle, tree = kernels.Handle(table.machine, "translate"), kernels.tree(table)
    out, (reads, writes) = np.zeros((1, 6), np.int64), (np.zeros((1, 6), np.uint64) for _ in range(2))
    one = np.array([BASE], np.uint64)
    walked_of(handle, tree, one, kernels.USER_WRITE, out, reads, writes)
    steps = table.walk(BASE)
    assert out[0].tolist() == [0, 0x8000, 1, 0, 4, 1]
    assert reads[0, :4].tolist() == [at for _, at, _ in steps]
    assert writes[0, 0] == steps[-1][1]
    assert steps[-1][2] == 0x8000 | clean | table.format.accessed | table.format.dirty
    walked_of(handle, tree, one, kernels.USER_WRITE, out, reads, writes)
    assert out[0, 5] == 0


def test_plain_walks_agree_with_those_that_need_no_compiler() -> None:
    table, addresses = random_table("x86-64", Random(5))
    found = compilerless.translate(table.machine, table.format, table.root, addresses)
    out = np.zeros((addresses.size, 4), np.int64)
    found_of(kernels.Handle(table.machine, "translate"), kernels.tree(table), addresses, kernels.PLAIN, out)
    translated = found.status == compilerless.Status.MAPPED
    assert (out[:, 0] == 0).tolist() == translated.tolist()
    assert out[translated, 1].tolist() == found.physical[translated].tolist()


def test_threads_may_walk_a_machine_at_once() -> None:
    table, addresses = random_table("x86-64", Random(6))
    many = np.resize(addresses, 20_000)
    expected = int((table.translate(many).physical >> np.uint64(12)).sum())
    assert sum_of(kernels.Handle(table.machine, "translate"), kernels.tree(table), many) == expected


def test_processes_and_vms_are_walked_from_the_root_that_they_have_now() -> None:
    machine = Machine(Config("pfnmap", pool=4 * W.PAGE_2M, page_size=W.PAGE_2M))
    gmem, process = machine.create_guest_memfd(2 * W.PAGE_2M, shared=True), machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap(gmem, BASE).status == vm.bind(gmem, 0).status == 0
    process.touch(BASE)
    vm.touch(0)
    frame = (gmem.pfn(0) or 0) << 12
    handle = kernels.Handle(machine, "translate", "translate_nested")
    of_process, of_vm, nested = kernels.tree(process), kernels.tree(vm), kernels.nested_tree(vm)
    out = np.zeros((1, 4), np.int64)
    for tree, address in ((of_process, BASE + 0x123), (of_vm, 0x123)):
        found_of(handle, tree, np.array([address], np.uint64), kernels.USER_READ, out)
        assert out[0, :2].tolist() == [0, frame + 0x123]
    # The guest's top table is its page 0, and its first entry points to itself, four levels deep.
    machine.write_frame(frame >> 12, (0x67).to_bytes(8, "little"))
    reads, writes, none = np.zeros(35, np.uint64), np.zeros(60, np.uint64), np.zeros(0, np.uint64)
    machines = machine.register(W.R_STAGE2_FORMAT)
    for kind in Kind:
        expected = translate_nested(machine, int(HOST_X86_64), 0, machines, vm.root, [0x789], kind, references=True)
        found = nested_of(handle, nested, 0, 0x789, int(kind), reads, writes)
        for name in found._fields:
            assert getattr(found, name) == getattr(expected, name)[0], (kind, name)
        assert expected.references is not None
        count = int(found.read_count)
        assert (reads[:count] & ~np.uint64(7)).tolist() == expected.references.reads[0, :count].tolist()
        assert (reads[:count] & np.uint64(7)).tolist() == expected.references.read_stages[0, :count].tolist()
        assert nested_of(handle, nested, 0, 0x789, int(kind), none, none) == found
    assert nested_of(handle, nested, 0, 0x789, 0, reads[:34], writes).status == kernels.REFUSED
    assert nested_of(handle, nested, 8, 0x789, 0, none, none).status == kernels.REFUSED
    assert nested_of(handle, nested, 0, 0x789, kernels.PLAIN, none, none).status == kernels.REFUSED
    assert vm.close().status == process.exit().status == 0
    for tree in (of_process, of_vm):
        found_of(handle, tree, np.array([0], np.uint64), kernels.READ, out)
        assert out[0, 0] == kernels.CLOSED
    assert nested_of(handle, nested, 0, 0x789, 0, none, none).status == kernels.CLOSED
    other = machine.create_process()
    assert other.space == process.space
    found_of(handle, of_process, np.array([0], np.uint64), kernels.READ, out)
    assert out[0, 0] == kernels.CLOSED
