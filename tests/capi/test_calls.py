"""What C functions answer is what Python is told, of the same machine or one as it; and what they refuse."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from c_calls import call
from fuzzing import attacked, rounds
from machines import assert_same
from pgemu import capi
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu.tables.translation import Access, Kind, translate, translate_nested
from pgemu_kernels import words as W
from pgemu_kernels.run import c_entries
from pgemu_kernels.words.call_words import BAD_ARGUMENT, BAD_MACHINE, BAD_POINTER, MMUS, PLAIN_KIND
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation
from random_operations import chosen, operation, scene

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
HVA = 0x7F00_0000_0000
Array = np.ndarray[Any, Any]
FIELDS = ("op", "flags", "actor", "vm", "space", "object_", "address", "offset", "length")


class Scene(NamedTuple):
    machine: Machine
    process: Any
    vm: Any
    gmem: Any

    @property
    def handle(self) -> int:
        return capi.handle(self.machine)


def made(design: Any = "pfnmap", **given: Any) -> Scene:
    machine = Machine(Config(design, pool=4 * M2, page_size=M2, **given))
    gmem = machine.create_guest_memfd(4 * M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == vm.bind(gmem, 0).status == 0
    return Scene(machine, process, vm, gmem)


def words(count: int, value: int = 0) -> Array:
    return np.full(count, value, np.uint64)


def bytes_(count: int) -> Array:
    return np.zeros(count, np.uint8)


def pointers(*arrays: Array | None) -> Array:
    return np.array([0 if array is None else array.ctypes.data for array in arrays], np.uint64)


# --------------------------------------------------------------------------- walks

ADDRESSES = [HVA, HVA + PAGE + 0x123, HVA + M2, HVA + 3 * M2 + 5, 0, 1 << 47, 1 << 63, (1 << 64) - 1]


def touched(design: Any = "pfnmap") -> Scene:
    made_ = made(design)
    for address in (HVA, HVA + PAGE, HVA + 2 * M2):
        made_.process.touch(address, write=address != HVA)
        made_.vm.touch(address - HVA, write=True)
    return made_


@pytest.mark.parametrize("kind", [None, *Kind])
def test_a_walk_is_python_s(kind: Kind | None) -> None:
    one, other = touched(), touched()
    found = words(3)
    for address in ADDRESSES:
        code = PLAIN_KIND if kind is None else kind
        status = call("translate", one.handle, 0, one.process.root, code, address, found)
        expected = translate(other.machine, 0, other.process.root, [address], kind)
        assert status == expected.status[0] == found[2] & 0xFF
        assert found.tolist()[:2] == [expected.physical[0], expected.error[0]]
        assert found[2] >> 8 & 0xFF == expected.level[0]
    assert_same(one.machine, other.machine)


@pytest.mark.parametrize("lists", [False, True])
def test_a_batch_of_walks_is_python_s(lists: bool) -> None:
    one, other = touched(), touched()
    addresses = np.array(ADDRESSES * 20, np.uint64)
    count = len(addresses)
    kinds = np.resize(np.array([0, 4, 2, 1], np.uint8), count)
    physical, error, status, level = words(count, 7), words(count, 7), bytes_(count) + np.uint8(9), bytes_(count)
    reads, writes, counts = words(count * W.WALK_READS), words(count * W.WALK_READS), words(2 * count)
    to = pointers(physical, error, status, level, *((reads, writes, counts) if lists else (None,) * 3))
    assert call("translate_batch", one.handle, 0, one.process.root, 99, kinds, count, addresses, to) == 0
    expected = translate(other.machine, 0, other.process.root, addresses, kinds, references=lists)
    assert (status == expected.status).all()
    assert (physical == expected.physical).all()
    assert (level == expected.level).all()
    assert (error == expected.error).all()
    if expected.references:
        assert (counts[0::2] == expected.references.read_counts).all()
        width = expected.references.reads.shape[1]
        assert (reads.reshape(count, -1)[:, :width] == expected.references.reads).all()
        assert (counts[1::2] == expected.references.write_counts).all()
    assert_same(one.machine, other.machine)


def with_guest_tables(scene_: Scene) -> Scene:
    """Level 4 at guest address 0, level 3 at 4096 with a leaf of 1G from 0 on."""
    for offset, entry in ((0, PAGE | 0x63), (PAGE, 0xE3)):
        scene_.machine.write_frame(scene_.gmem.pfn(offset), entry.to_bytes(8, "little"))
    return scene_


@pytest.mark.parametrize("stage2", ["npt", "ept"])
def test_a_nested_walk_is_python_s(stage2: str) -> None:
    one, other = (with_guest_tables(touched()) for _ in range(2))
    row = one.machine.register(W.R_STAGE2_FORMAT)
    addresses = [0, PAGE + 5, M2, 2 * M2, 1 << 30, 1 << 47, 1 << 63]
    reads, writes = words(W.NESTED_READS), words(W.NESTED_WRITES)
    found = words(6)
    for address in addresses:
        status = call("translate_nested", one.handle, 3, 0, one.vm.root, Kind.WRITE, address, found, reads, writes)
        expected = translate_nested(other.machine, 0, 0, row, other.vm.root, [address], Kind.WRITE, references=True)
        assert status == expected.status[0]
        names = ("physical", "error", "fault_address", "read_count", "write_count")
        assert found[:5].tolist() == [getattr(expected, name)[0] for name in names]
        assert found.view(np.uint8)[40:44].tolist() == [
            *(expected.status[0], expected.stage[0], expected.guest_level[0], expected.host_level[0])
        ]
        listed = expected.references
        assert listed is not None
        count = int(found[3])
        assert (reads[:count] & ~np.uint64(7)).tolist() == listed.reads[0][:count].tolist()
        assert (reads[:count] & np.uint64(7)).tolist() == listed.read_stages[0][:count].tolist()
        count = int(found[4])
        assert (writes[:count] & ~np.uint64(7)).tolist() == listed.writes[0][:count].tolist()
    assert_same(one.machine, other.machine)


def test_a_batch_of_nested_walks_is_python_s() -> None:
    one, other = (with_guest_tables(touched()) for _ in range(2))
    addresses = np.array([0, PAGE + 5, M2, 2 * M2, 1 << 30, 1 << 47, 1 << 63] * 30, np.uint64)
    count = len(addresses)
    physical, error, fault, counts = words(count), words(count), words(count), words(2 * count)
    status, stage, levels = bytes_(count), bytes_(count), bytes_(2 * count)
    to = pointers(physical, error, fault, status, stage, levels, None, None, counts)
    assert call("translate_nested_batch", one.handle, 3, 0, one.vm.root, Kind.READ, 0, count, addresses, to) == 0
    row = one.machine.register(W.R_STAGE2_FORMAT)
    expected = translate_nested(other.machine, 0, 0, row, other.vm.root, addresses)
    for mine, theirs in (
        (physical, expected.physical), (error, expected.error), (fault, expected.fault_address),
        (status, expected.status), (stage, expected.stage), (levels[0::2], expected.guest_level),
        (levels[1::2], expected.host_level), (counts[0::2], expected.read_count),
    ):  # fmt: skip
        assert (mine == theirs).all()
    assert {0, 1, 2, 3} >= {*stage.tolist()} > {0}


def test_an_mmu_is_a_format_under_control_registers() -> None:
    one = touched()
    without_smap = capi.mmu(one.machine, 0, Access(smap=False))
    assert without_smap == 4 == capi.mmu(one.machine, 0, Access(smap=False))
    assert capi.mmu(one.machine) == 0
    assert capi.nested_mmu(one.machine) == 3
    assert capi.nested_mmu(one.machine, access=Access(smep=False)) == 5
    found = words(3)
    assert call("translate", one.handle, 0, one.process.root, Kind.READ, HVA, found) == W.WalkStatus.PERMISSION
    assert call("translate", one.handle, without_smap, one.process.root, Kind.READ, HVA, found) == 0
    with pytest.raises(ValueError, match="format_row 40: expected a row"):
        capi.mmu(one.machine, 40)
    numbers = [capi.mmu(one.machine, 0, Access(pke=True, pkru=pkru)) for pkru in range(MMUS - 6)]
    assert numbers == list(range(6, MMUS))
    with pytest.raises(ValueError, match="expected one of those"):
        capi.mmu(one.machine, 0, Access(pke=True, pkru=MMUS))


# --------------------------------------------------------------------------- operations


def run_by_c(handle: int, batch: Sequence[dict[str, int]]) -> list[tuple[int, int]]:
    found = []
    detail = words(1)
    for one in batch:
        status = call("operate", handle, np.array([one[name] for name in FIELDS], np.uint64), detail)
        found.append((status, int(detail[0])))
    return found


def test_random_operations_are_python_s() -> None:
    """One by one by C, in columns by C, and one by one by Python: all results and both machines are equal."""
    done = 0
    for number, chance in rounds("operations by C", 2, least=3):
        with attacked("operations by C", number):
            config = chosen(chance)
            machines = [scene(config) for _ in range(3)]
            if machines[0] is None:
                continue
            single, columns, python = (machine for machine in machines if machine)
            batch = [operation(chance) for _ in range(150)]
            expected = [tuple(python.operate(**one)) for one in batch]  # type: ignore[arg-type]
            assert run_by_c(capi.handle(single), batch) == expected
            assert run_columns(capi.handle(columns), batch) == expected
            assert_same(single, python)
            assert_same(columns, python)
            assert single.check() == 0
            done += len(batch)
    assert done > 0


def run_columns(handle: int, batch: Sequence[dict[str, int]]) -> list[tuple[int, int]]:
    count = len(batch)
    shifts = {"op": 0, "flags": 8, "actor": 16, "vm": 32, "space": 48}
    header = np.array([sum(one[name] << shift for name, shift in shifts.items()) for one in batch], np.uint64)
    columns = [np.array([one[name] for one in batch], np.uint64) for name in FIELDS[5:]]
    status, detail = np.zeros(count, np.int64), words(count)
    given = np.append(pointers(header, *columns), np.uint64(0))
    assert call("run", handle, given, count, status, detail) == 0
    return list(zip(status.tolist(), detail.tolist(), strict=True))


@pytest.mark.parametrize("design", DESIGNS)
def test_each_operation_has_a_function(design: Any) -> None:
    one, other = made(design), made(design)
    detail = words(1)

    def same(name: str, *arguments: int, **columns: int) -> None:
        status = call(name, one.handle, *arguments, detail)
        assert (status, detail[0]) == other.machine.operate(Operation[name.upper()], **columns), name

    containers = [scene_.machine.create_vfio_container() for scene_ in (one, other)]
    for container in containers:
        container.attach()
    domain, write = containers[0].number, int(W.Flag.WRITE)
    same("host_fault", 0, HVA, write, flags=write, address=HVA)
    same("guest_fault", 0, M2, write, flags=write, address=M2)
    same("pin", 0, 7, HVA, PAGE, write, flags=write, object_=7, address=HVA, length=PAGE)
    same("dma_map", domain, 0, M2, PAGE, int(W.NO_INODE), HVA, 129, flags=129, space=domain, object_=int(W.NO_INODE),
         address=M2, offset=HVA, length=PAGE)  # fmt: skip
    same("dma_access", domain, 3, M2, 8, 5, write, flags=write, space=domain, object_=3, address=M2, offset=5, length=8)
    same("dma_unmap", domain, M2, PAGE, space=domain, address=M2, length=PAGE)
    same("unpin", 7, object_=7)
    same("convert", 0, 0, PAGE, PAGE, int(W.Flag.PRIVATE), flags=int(W.Flag.PRIVATE), offset=PAGE, length=PAGE)
    same("zap", 0, HVA, PAGE, int(W.Flag.MADVISE), flags=int(W.Flag.MADVISE), address=HVA, length=PAGE)
    same("punch_hole", 0, 2 * M2, M2, offset=2 * M2, length=M2)
    same("munmap", 0, HVA, 4 * M2, address=HVA, length=4 * M2)
    assert_same(one.machine, other.machine)
    statistics = one.machine.statistics
    assert {event: call("event_count", one.handle, event) for event in Event} == {
        event: statistics.event(event) for event in Event
    }
    assert {gauge: call("gauge_value", one.handle, gauge) for gauge in Gauge} == {
        gauge: statistics.gauge(gauge) for gauge in Gauge
    }


def test_columns_may_be_one_for_all_or_none() -> None:
    one, other = made(), made()
    count = 20
    addresses = np.arange(count, dtype=np.uint64) * np.uint64(PAGE)
    header, status, detail = words(1, int(Operation.GUEST_FAULT)), np.zeros(count, np.int64), words(count)
    given = np.append(pointers(header, None, addresses, None, None), np.uint64(1))
    assert call("run", one.handle, given, count, status, detail) == 0
    expected = other.vm.touch_many(addresses)
    assert (status == expected.status).all()
    assert (detail == expected.detail).all()


# --------------------------------------------------------------------------- what is refused


def test_what_is_no_machine_of_c_is_refused() -> None:
    one = made()
    descriptor = one.machine.descriptor
    arguments = (0, one.process.root, 0, HVA, words(3))
    assert call("translate", 0, *arguments) == BAD_MACHINE
    assert call("translate", descriptor.ctypes.data + 4, *arguments) == BAD_MACHINE
    assert call("translate", descriptor, *arguments) == BAD_MACHINE  # nobody asked for a handle
    assert call("translate", one.handle, *arguments) == W.WalkStatus.NOT_PRESENT
    assert call("translate", descriptor.copy(), *arguments) == BAD_MACHINE
    for name in capi.functions():
        count = c_entries.FUNCTIONS[name].signature.count("uint64")
        assert call(name, *[0] * count) == BAD_MACHINE
    for wrong in (None, 5, "machine", one.process):
        with pytest.raises(TypeError, match=r"^machine .*: expected a Machine"):
            capi.handle(wrong)  # type: ignore[arg-type]


def test_a_copy_has_a_handle_of_its_own() -> None:
    one = made()
    handle = one.handle
    other = one.machine.copy()
    assert capi.handle(other) != handle
    assert call("host_fault", capi.handle(other), 0, HVA, 0, 0) >= 0
    assert one.machine.statistics.event(Event.HOST_FAULT) == 0
    assert other.statistics.event(Event.HOST_FAULT) == 1


def test_a_handle_keeps_no_machine_alive() -> None:
    gc.collect()
    before = len(capi._contexts)
    one = made()
    assert one.handle
    assert len(capi._contexts) == before + 1
    del one
    gc.collect()
    assert len(capi._contexts) == before


def test_numbers_that_cannot_be_are_refused() -> None:
    one = made()
    found, root = words(3), one.process.root
    assert call("translate", one.handle, 3, root, 0, HVA, found) == BAD_ARGUMENT  # of nested walks
    assert call("translate", one.handle, 6, root, 0, HVA, found) == BAD_ARGUMENT
    assert call("translate", one.handle, 0, root + 8, 0, HVA, found) == BAD_ARGUMENT
    assert call("translate", one.handle, 0, 1 << 52, 0, HVA, found) == BAD_ARGUMENT
    for kind in (6, 7, 9, 64, (1 << 64) - 1):
        assert call("translate", one.handle, 0, root, kind, HVA, found) == BAD_ARGUMENT
    assert call("translate", one.handle, 0, root, 0, HVA, 0) == BAD_POINTER
    assert call("translate", one.handle, 0, root, 0, HVA, found.ctypes.data + 1) == BAD_POINTER
    assert call("translate_nested", one.handle, 0, 0, 0, 0, 0, words(6), 0, 0) == BAD_ARGUMENT
    assert call("translate_nested", one.handle, 3, 0, 0, PLAIN_KIND, 0, words(6), 0, 0) == BAD_ARGUMENT
    fields = {"op": 256, "flags": 256, "actor": W.ACTORS, "vm": 1 << 16, "space": 1 << 16, "object_": 1 << 32}
    for name, limit in fields.items():
        wrong = np.array([limit if field == name else 0 for field in FIELDS], np.uint64)
        assert call("operate", one.handle, wrong, 0) == BAD_ARGUMENT, name
        assert call("operate", one.handle, wrong - np.uint64(name == "op"), 0) in (BAD_ARGUMENT, -W.EOPNOTSUPP)
    assert call("host_fault", one.handle, 1 << 16, HVA, 0, 0) == BAD_ARGUMENT
    assert call("event_count", one.handle, W.EVENTS) == BAD_ARGUMENT
    assert call("gauge_value", one.handle, 1 << 63) == BAD_ARGUMENT


def test_codes_are_those_that_the_header_names() -> None:
    one = made("restructure")
    private, shared, write = int(W.Flag.PRIVATE), int(W.Flag.SHARED), int(W.Flag.WRITE)
    detail = words(1)

    def answers(name: str, *columns: tuple[int, ...]) -> list[int]:
        return [call(name, one.handle, *arguments, detail) for arguments in columns]

    convert = [(0, 0, 0, PAGE, 0), (0, 0, 0, PAGE, private | shared), (0, 0, 1, PAGE, private), (0, 0, 0, 0, private),
               (0, 0, 4 * M2, PAGE, private), (0, 9, 0, PAGE, private), (9, 0, 0, PAGE, private)]  # fmt: skip
    assert answers("convert", *convert) == [-W.EINVAL] * 5 + [-W.EBADF, 0]
    pins = [(0, number, HVA + M2, PAGE, write) for number in (0, 0, 255, 256, 1 << 32)]
    assert answers("pin", *pins) == [0, -W.EEXIST, 0, -W.EINVAL, BAD_ARGUMENT]
    assert answers("pin", (5, 7, HVA, PAGE, write), (0, 7, PAGE, PAGE, write)) == [-W.EFAULT] * 2
    assert answers("convert", (0, 0, M2, PAGE, private)) == [-W.EAGAIN]
    assert detail[0] == M2
    assert answers("unpin", (0,), (0,), (200,), (256,)) == [0, *[-W.ENOENT] * 3]
    assert answers("host_fault", (0, PAGE, 0), (5, HVA, 0), (0, HVA, 0)) == [W.VM_FAULT_SIGSEGV] * 2 + [
        W.VM_FAULT_SIGBUS
    ]
    assert answers("guest_fault", (5, 0, 0), (0, 1 << 40, 0), (0, 0, shared)) == [
        -W.EBADF, W.RET_PF_EMULATE, -W.EFAULT
    ]  # fmt: skip
    assert answers("zap", (5, HVA, PAGE, 0), (0, HVA + 1, PAGE, 0), (0, PAGE, PAGE, 0)) == [
        -W.EINVAL, -W.EINVAL, -W.ENOMEM
    ]  # fmt: skip
    assert answers("munmap", (5, HVA, PAGE), (0, HVA + 1, PAGE), (0, PAGE, PAGE)) == [-W.EINVAL, -W.EINVAL, 0]
    assert answers("punch_hole", (9, 0, M2), (0, 0, PAGE)) == [-W.EBADF, -W.EINVAL]
    assert answers("dma_unmap", (3, 0, PAGE)) == [-W.ENODEV]
    assert call("translate", one.handle, 1, 0, PLAIN_KIND, 0, words(3)) == W.WalkStatus.NOT_PRESENT
    assert call("translate", one.handle, 1, 1 << 50, PLAIN_KIND, 0, words(3)) == W.WalkStatus.OUTSIDE_MEMORY


def test_a_device_only_reads_and_writes() -> None:
    one = made()
    table = one.machine.create_page_table("vtd-s2")
    number = capi.mmu(one.machine, table.row)
    found = words(3)
    answers = [call("translate", one.handle, number, table.root, kind, 0, found) for kind in (0, 1, 2, 3, PLAIN_KIND)]
    assert answers == [W.WalkStatus.NOT_PRESENT] * 2 + [BAD_ARGUMENT] * 2 + [W.WalkStatus.NOT_PRESENT]


def test_one_kind_of_a_batch_that_cannot_be_is_refused() -> None:
    one = made()
    addresses, kinds = words(100, HVA), bytes_(100)
    arrays = (words(100), words(100), bytes_(100), bytes_(100))
    for wrong in (6, 255):
        kinds[77] = wrong
        arguments = (one.handle, 0, one.process.root, 0, kinds, 100, addresses)
        assert call("translate_batch", *arguments, pointers(*arrays, None, None, None)) == BAD_ARGUMENT
    kinds[77] = 0
    assert call("translate_batch", *arguments, pointers(*arrays, words(1), None, None)) == BAD_POINTER
    assert call("translate_batch", *arguments, pointers(*arrays, None, None, None)) == 0


def test_code_that_cannot_be_loaded_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert c_entries.provide_address(15) == -1
    assert "KeyError: 15" in capsys.readouterr().err
