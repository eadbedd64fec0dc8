"""One operation a call is what the same operation is in columns."""

from __future__ import annotations

import threading
from random import Random
from typing import Any

import numpy as np
import pytest

from pgemu.machine.columns import check_fields
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K, Flag, Operation

HVA = 0x7F00_0000_0000
ORDINARY = HVA - (1 << 30)
FIELDS = ("op", "flags", "actor", "vm", "space", "object_", "address", "offset", "length")
LIMITS = dict(zip(FIELDS, (256, 256, W.ACTORS, 1 << 16, 1 << 16, 1 << 32, 1 << 64, 1 << 64, 1 << 64), strict=True))
# Of the designs, of ordinary memory (of which there is none here: it is refused, or founds it), of pools, and unknown.
OPERATIONS = (
    Operation.HOST_FAULT, Operation.GUEST_FAULT, Operation.CONVERT, Operation.PUNCH_HOLE, Operation.MMAP,
    Operation.MUNMAP, Operation.ZAP, Operation.GET, Operation.PUT, Operation.PROTECT, Operation.POOL_RESIZE, 255,
)  # fmt: skip


def build(design: Any) -> Machine:
    machine = Machine(Config(design, pool=16 << 20, page_size=PAGE_2M))
    gmem = machine.create_guest_memfd(16 << 20)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == vm.bind(gmem, 0).status == 0
    return machine


def operations(count: int, seed: int) -> list[dict[str, int]]:
    """Operations of which about half make sense; the others name what is not there, or is not aligned."""
    random = Random(seed)
    found = []
    for _ in range(count):
        op = random.choice(OPERATIONS)
        page = random.randrange(5000) * PAGE_4K + random.choice((0, 0, 0, 1))
        base = 0 if op is Operation.GUEST_FAULT else random.choice((HVA, HVA, ORDINARY, (1 << 64) - (32 << 20)))
        found.append({
            "op": int(op), "flags": random.choice((0, Flag.WRITE, Flag.PRIVATE, Flag.SHARED, 255)),
            "actor": random.choice((0, 1, W.ACTORS - 1)), "vm": random.choice((0, 0, 0, 1, 0xFFFF)),
            "space": random.choice((0, 0, 0, 1, 0xFFFF)), "object_": random.choice((0, 0, 0, 1, 0xFFFF_FFFF)),
            "address": base + page, "offset": page, "length": random.choice((0, 1, PAGE_4K, PAGE_4K, PAGE_2M)),
        })  # fmt: skip
    return found


def in_columns(machine: Machine, todo: list[dict[str, int]]) -> list[tuple[int, int]]:
    column = {name: np.array([one[name] for one in todo], np.uint64) for name in FIELDS}
    header = column["op"]
    for name, shift in (("flags", 8), ("actor", 16), ("vm", 32), ("space", 48)):
        header = header | column[name] << np.uint64(shift)
    columns = (column[name] for name in FIELDS[5:])
    results = machine.run_columns(header, *columns, count=len(todo))
    return list(zip(results.status.tolist(), results.detail.tolist(), strict=True))


def one_by_one(machine: Machine, todo: list[dict[str, int]]) -> list[tuple[int, int]]:
    return [machine.operate(**one) for one in todo]  # type: ignore[arg-type]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_calls_and_columns_do_the_same(design: str, full: bool) -> None:
    calls, columns = build(design), build(design)
    if full:
        for machine in (calls, columns):
            assert machine.work().status == 0
    todo = operations(400, seed=7 + full)
    expected = in_columns(columns, todo)
    assert len({status for status, _ in expected}) > 5
    assert one_by_one(calls, todo) == expected
    assert (calls.arrays.stats == columns.arrays.stats).all()
    assert (calls.arrays.ram == columns.arrays.ram).all()
    assert bool(calls.register(W.R_FULL)) == bool(columns.register(W.R_FULL))
    assert calls.check() == columns.check() == 0


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("far", [False, True])
def test_what_does_not_fit_is_refused_by_name(name: str, far: bool) -> None:
    machine = build("pfnmap")
    before = machine.arrays.stats.copy()
    for value in (-1 - (1 << 70) * far, LIMITS[name] + (1 << 70) * far):
        fields = dict.fromkeys(FIELDS, 0) | {name: value}
        with pytest.raises(ValueError, match=f"{value}: expected 0 to {LIMITS[name] - 1}$") as told:
            machine.operate(**fields)  # type: ignore[arg-type]
        with pytest.raises(ValueError) as expected:
            check_fields(*fields.values())
        assert str(told.value) == str(expected.value)
    assert (machine.arrays.stats == before).all()


def test_arguments_may_be_numbers_of_numpy() -> None:
    calls, columns = build("pfnmap"), build("pfnmap")
    for kind in (np.uint64, np.int64, np.uint32):
        given = calls.operate(Operation.GUEST_FAULT, address=kind(PAGE_2M))
        assert given == columns.operate(Operation.GUEST_FAULT, address=PAGE_2M)
    for wrong in ("0", 4096.0, np.float64(4096), True, None, np.zeros(1, np.uint64)):
        with pytest.raises(TypeError, match=r"^address .*: expected 0 to "):
            calls.operate(Operation.GUEST_FAULT, address=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("value", "error"),
    [("0", TypeError), (None, TypeError), (b"0", TypeError), (1.5, TypeError), (float("nan"), TypeError)],
)
def test_what_is_no_integer_is_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    machine = build("pfnmap")
    fields = dict.fromkeys(FIELDS, 0) | {name: value}
    called = {"op": "operation", "object_": "object"}.get(name, name)
    with pytest.raises(error, match=rf"^{called} .*: expected (an integer from )?0 to {LIMITS[name] - 1}$"):
        machine.operate(**fields)


def test_what_is_no_configuration_or_kind_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"config 5 \(int\): expected a Config"):
        Machine(5)  # type: ignore[arg-type]
    for kind in (b"x", [], 5):
        with pytest.raises(ValueError, match="expected one of plain, sw, snp, tdx"):
            build("pfnmap").create_vm(kind=kind)  # type: ignore[arg-type]


def test_two_machines_on_two_threads_do_not_meet() -> None:
    designs = ("restructure", "pfnmap")
    todo = operations(400, seed=3) * 3
    expected = [one_by_one(build(design), todo) for design in designs]
    machines = [build(design) for design in designs]
    found: list[Any] = [None, None]

    def run(i: int) -> None:
        found[i] = one_by_one(machines[i], todo)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
