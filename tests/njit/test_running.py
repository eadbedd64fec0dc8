"""Operations and counters from a caller's compiled function are those of Machine.operate() and its statistics."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from machines import assert_same
from pgemu import Config, Machine, VmFault, kernels
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K, Flag, Operation

Array = np.ndarray[Any, Any]
HVA = 0x7F00_0000_0000
ORDINARY = HVA - (1 << 30)
# Of the designs, of ordinary memory, of pools, of devices, and unknown.
OPERATIONS = (
    Operation.HOST_FAULT, Operation.GUEST_FAULT, Operation.CONVERT, Operation.PUNCH_HOLE, Operation.MMAP,
    Operation.MUNMAP, Operation.ZAP, Operation.PIN, Operation.UNPIN, Operation.PROTECT, Operation.POOL_RESIZE,
    Operation.DMA_MAP, 255,
)  # fmt: skip


@njit(nogil=True)
def operated(handle: Any, columns: Array, out: Array) -> None:
    """columns: uint64[n, 8]; out: int64[n, 2]."""
    for i in range(len(columns)):
        op, flags, vm, space, object_, address, offset, length = columns[i]
        done = kernels.operate(handle, op, flags, vm, space, object_, address, offset, length)
        out[i, 0], out[i, 1] = done.status, done.detail


@njit(nogil=True)
def by_name(handle: Any, out: Array) -> None:
    """out: int64[6, 2]."""
    for i, done in enumerate((
        kernels.convert(handle, 0, PAGE_4K, PAGE_4K, 1), kernels.host_fault(handle, 0, HVA + PAGE_4K, 1),
        kernels.guest_fault(handle, 0, PAGE_4K, 0), kernels.zap(handle, 0, HVA, PAGE_2M),
        kernels.munmap(handle, 0, HVA + PAGE_2M, PAGE_2M), kernels.convert(handle, 0, PAGE_4K, PAGE_4K, 0),
    )):  # fmt: skip
        out[i, 0], out[i, 1] = done.status, done.detail


@njit
def counted(handle: Any, event: int, op: int, gauge: int) -> tuple[int, int, int]:
    return kernels.event_count(handle, event), kernels.event_count_of(handle, op, event), kernels.gauge(handle, gauge)


def build(design: Any, full: bool = False) -> Machine:
    machine = Machine(Config(design, pool=16 << 20, page_size=PAGE_2M, **({"flush": "batched"} if full else {})))
    gmem, process = machine.create_guest_memfd(16 << 20), machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == vm.bind(gmem, 0).status == 0
    return machine


def operations(count: int, seed: int) -> Array:
    """uint64[n, 8]; about half make sense, the others name what is not there, or is not aligned."""
    random = Random(seed)
    rows = []
    for _ in range(count):
        op = random.choice(OPERATIONS)
        page = random.randrange(5000) * PAGE_4K + random.choice((0, 0, 0, 1))
        base = 0 if op is Operation.GUEST_FAULT else random.choice((HVA, HVA, ORDINARY, (1 << 64) - (32 << 20)))
        flags = random.choice((0, Flag.WRITE, Flag.PRIVATE, Flag.SHARED, 255))
        vm, space = random.choice((0, 0, 0, 1, 0xFFFF)), random.choice((0, 0, 0, 1, 0xFFFF))
        length = random.choice((0, 1, PAGE_4K, PAGE_4K, PAGE_2M))
        rows.append((op, flags, vm, space, random.choice((0, 0, 0, 1, 0xFFFF_FFFF)), base + page, page, length))
    return np.array(rows, np.uint64)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_operations_are_those_of_python(design: str, full: bool) -> None:
    one, other = build(design, full), build(design, full)
    assert bool(one.register(W.R_FULL)) == full
    todo = operations(300, seed=3 + full)
    names = ("flags", "vm", "space", "object_", "address", "offset", "length")
    expected = [tuple(other.operate(op, **dict(zip(names, rest, strict=True)))) for op, *rest in todo.tolist()]
    handle = kernels.Handle(one, "operate", "full", "ordinary", "pooling", "devices")
    out = np.zeros((len(todo), 2), np.int64)
    operated(handle, todo, out)
    assert [(status, detail % (1 << 64)) for status, detail in out.tolist()] == expected
    assert len({status for status, _ in expected}) > 5
    assert_same(one, other)
    assert one.check() == 0


def test_calls_by_name_are_those_of_the_objects() -> None:
    one, other = build("restructure"), build("restructure")
    handle = kernels.Handle(one, "operate")
    out = np.zeros((6, 2), np.int64)
    by_name(handle, out)
    (gmem,), (process,), (vm,) = other.inodes, other.processes, other.vms
    expected = [
        gmem.convert(PAGE_4K, PAGE_4K, shared=True),  # type: ignore[union-attr]
        process.touch(HVA + PAGE_4K, write=True),
        vm.touch(PAGE_4K),
        process.zap(HVA, PAGE_2M),
        process.munmap(HVA + PAGE_2M, PAGE_2M),
        gmem.convert(PAGE_4K, PAGE_4K, shared=False),  # type: ignore[union-attr]
    ]
    assert out.tolist() == [[result.status, result.detail] for result in expected]
    assert_same(one, other)
    statistics = one.statistics
    for event in (Event.TLB_FLUSH_VM, Event.CONVERT_IOCTL, Event.SYSCALL):
        for gauge in (Gauge.FRAMES_USED, Gauge(0)):
            told = statistics.event(event), statistics.event(event, Operation.CONVERT), statistics.gauge(gauge)
            assert counted(handle, int(event), int(Operation.CONVERT), int(gauge)) == told


def test_what_an_operation_goes_on_to_is_loaded_when_it_is_needed() -> None:
    one, other = build("pfnmap"), build("pfnmap")
    todo = np.zeros((3, 8), np.uint64)
    todo[0] = Operation.PIN, 0, 0, 0, 0, HVA, 0, PAGE_4K
    todo[1] = Operation.POOL_RESIZE, 0, 0, 0, 0, 0, 0, 0
    todo[2] = Operation.HOST_FAULT, Flag.WRITE, 0, 0, 0, HVA, 0, 0
    out = np.zeros((3, 2), np.int64)
    operated(kernels.Handle(one, "translate"), todo, out)
    assert (out[:, 0] == kernels.NOT_LOADED).all()
    assert_same(one, other)
    operated(kernels.Handle(one, "operate"), todo, out)
    names = ("flags", "vm", "space", "object_", "address", "offset", "length")
    assert out.tolist() == [
        list(other.operate(op, **dict(zip(names, rest, strict=True)))) for op, *rest in todo.tolist()
    ]
    assert_same(one, other)


def test_numbers_that_cannot_be_are_refused() -> None:
    machine = build("pfnmap")
    handle = kernels.Handle(machine, "operate")
    out = np.zeros((3, 2), np.int64)
    operated(handle, np.array([[256, *[0] * 7], [1, 256, *[0] * 6], [1, 0, 1 << 16, *[0] * 5]], np.uint64), out)
    assert (out[:, 0] == kernels.REFUSED).all()
    assert counted(handle, W.EVENTS, 255, len(Gauge)) == (kernels.REFUSED,) * 3
    assert counted(handle, 0, 1 << 20, 0)[1] == kernels.REFUSED


@njit
def faulted(handle: Any, flags: Any, address: int) -> int:
    return kernels.guest_fault(handle, 0, address, flags).status  # type: ignore[no-any-return]


@njit
def written_and_run(handle: Any, address: int) -> Any:
    return kernels.operate(handle, Operation.GUEST_FAULT, Flag.WRITE | Flag.EXEC | 16, 0, 0, 0, address, 0, 0)


@njit
def converted(handle: Any, shared: Any) -> int:
    return kernels.convert(handle, 0, 0, PAGE_4K, shared).status  # type: ignore[no-any-return]


def test_flags_are_members_and_truth_values_are_bools() -> None:
    one, other, both = build("pfnmap"), build("pfnmap"), Flag.WRITE | Flag.EXEC
    handle = kernels.Handle(one, "operate")
    for address, flags in enumerate((0, 3, Flag.WRITE, both, Flag(0), np.uint8(1))):
        expected = other.operate(Operation.GUEST_FAULT, flags=int(flags), address=address * PAGE_4K)
        assert faulted(handle, flags, address * PAGE_4K) == expected.status
    expected = other.operate(Operation.GUEST_FAULT, flags=int(both) | 16, address=PAGE_2M)
    assert written_and_run(handle, PAGE_2M) == (expected.status, expected.detail)
    for shared in (True, False, np.True_, 1, 0, 2):
        flags = Flag.SHARED if shared else Flag.PRIVATE
        expected = other.operate(Operation.CONVERT, flags=int(flags), length=PAGE_4K)
        assert converted(handle, shared) == expected.status
    assert_same(one, other)
    with pytest.raises(TypingError, match=r"guest_fault\(\): flags is bool, expected an integer or a pgemu.Flag"):
        faulted(handle, True, 0)
    with pytest.raises(TypingError, match=r"convert\(\): shared is float64, expected a bool, or an integer that is 0"):
        converted(handle, 1.0)


@njit
def of_nothing(handle: Any, out: Array) -> None:
    out[0] = kernels.guest_fault(handle, 7, 0, 0).status
    out[1] = kernels.convert(handle, 7, 0, PAGE_4K, True).status
    out[2] = kernels.host_fault(handle, 7, 0, 0).status
    out[3] = kernels.zap(handle, 7, 0, PAGE_4K).status
    out[4] = kernels.munmap(handle, 7, 0, PAGE_4K).status


def test_what_does_not_exist_has_the_code_that_the_text_names() -> None:
    out = np.zeros(5, np.int64)
    of_nothing(kernels.Handle(build("pfnmap")), out)
    assert out.tolist() == [-W.EBADF, -W.EBADF, int(VmFault.SIGSEGV), -W.EINVAL, -W.EINVAL]
