"""Random operations over every kind of object: nothing breaks, at once or step by step, whatever the machine.

With bounds checks, as CI runs it, an index outside its array is an error at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fuzzing import Random, attacked, rounds
from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

M2, PAGE, G1 = W.PAGE_2M, W.PAGE_4K, W.PAGE_1G
ANONYMOUS, SMALL, DEVICE, HUGE, SHMEM, DESIGNS_VMA = (
    0x400000,
    0x800000,
    0xC00000,
    0x1000000,
    0x1400000,
    0x7F00_0000_0000,
)
DESIGNS_SLOT, OTHER_SLOT = G1, 3 * G1
PLACES = (ANONYMOUS, SMALL, DEVICE, HUGE, SHMEM, DESIGNS_VMA, 0, DESIGNS_SLOT, OTHER_SLOT, 0x3000_0000)
EDGES = (
    0,
    1,
    PAGE - 1,
    PAGE,
    M2 - PAGE,
    M2,
    G1,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 47,
    1 << 52,
    1 << 63,
    (1 << 64) - PAGE,
    (1 << 64) - 1,
)
# Reserving alone is the half of creating an inode: whose the reservation is nobody would know. Whoever freezes a folio
# holds its lock, for which a kernel's close would wait.
LEFT_OUT = (Operation.POOL_RESERVE, Operation.FOLIO_FREEZE)
CODES = [int(op) for op in Operation if op not in LEFT_OUT]
# As in test_one_gate.py: a VM does not wait for the conversion that has begun to invalidate it.
STEPPED = [op for op in CODES if op != Operation.VM_EXIT]
NO_CODES = sorted({0, 62, 63, 64, 100, 255} - {int(op) for op in Operation})
BATCHES, CHECKED_EVERY = 16, 4


def chosen(chance: Random) -> Config:
    """A small machine, of any kind."""
    given: dict[str, Any] = {
        "kernel": chance.choice(("6.12", "6.18", "7.3")),
        "stage2": chance.choice(("npt", "ept")),
        "hvo": chance.random() < 0.7,
        "seed": chance.choice((0, 0, 5)),
        "order": chance.choice(("rfc2", "fixup", "jan2026")),
        "split_form": chance.choice(("rfc2", "jan2026")),
        "lru_cache": chance.random() < 0.2,
        "worker": chance.choice(("immediate", "immediate", "queued")),
        "merge": chance.choice(("now", "now", "lazy")),
        "punch": chance.choice(("zero", "refuse")),
        "zap": chance.choice(("exact", "rounded")),
        "pti": chance.random() < 0.2,
        "host_huge": chance.random() < 0.2,
        "frames": chance.choice((None, None, None, 400)),
        "memory": 16 << 20,
        "other_pool": chance.choice((0, 0, G1)),
        "buddy": chance.choice((0, 0, 8 << 20)),
    }
    while given:
        try:
            return Config(chance.choice(DESIGNS), pool=6 * M2, page_size=M2, **given)
        except ValueError:  # these do not go together
            given.pop(chance.choice(sorted(given)))
    raise AssertionError("no machine at all")


def scene(config: Config) -> Machine | None:
    """One of each kind of inode, mapping and slot, as far as the machine has room; None without any."""
    try:
        machine = Machine(config)
        gmem = machine.create_guest_memfd(2 * M2, shared=True)
        process = machine.create_process()
        vm, other = machine.create_vm(process, protected=True), machine.create_vm(process)
        machine.create_process()
    except OSError:
        return None
    process.mmap_anonymous(ANONYMOUS, M2)
    process.mmap_anonymous(SHMEM, M2, shared=True)
    process.mmap(gmem, DESIGNS_VMA)
    vm.set_memory_region(0, 0, M2, ANONYMOUS)
    vm.bind(gmem, DESIGNS_SLOT)
    other.set_memory_region(0, 0, M2, SHMEM)
    for make in (
        lambda: process.mmap_hugetlb(HUGE, file=machine.create_hugetlb_file(M2)),
        lambda: process.mmap(machine.create_guest_memfd_4k(M2), SMALL),
        lambda: process.mmap_device(machine.create_device(0x1000, 512), DEVICE),
        lambda: other.bind(machine.create_guest_memfd(M2), OTHER_SLOT),
    ):
        try:
            make()
        except (OSError, ValueError):  # no room
            continue
    return machine


def value(chance: Random, mostly: tuple[int, ...]) -> int:
    """A number near what is there, at an edge, or any."""
    draw = chance.random()
    if draw < 0.75:
        return (chance.choice(mostly) + chance.choice((0, 0, PAGE, 5 * PAGE, M2, M2 - PAGE))) % (1 << 64)
    return chance.choice(EDGES) if draw < 0.92 else chance.getrandbits(chance.choice((12, 21, 33, 48, 64)))


def operation(chance: Random, codes: list[int] = CODES) -> dict[str, int]:
    """One operation's columns."""
    return {
        "op": chance.choice(codes if chance.random() < 0.98 else NO_CODES),
        "flags": chance.choice((0, 1, 4, 8, 133, 128)) if chance.random() < 0.7 else chance.randrange(256),
        "actor": chance.randrange(8) if chance.random() < 0.9 else chance.randrange(int(W.ACTORS)),
        "vm": chance.choice((0, 0, 1, 2, 7, 65535)),
        "space": chance.choice((0, 0, 0, 1, 2, 9, 18, 65535)),
        "object_": chance.choice((*range(8), 9, 512, int(W.NO_INODE), 0xFFFF_FFFE)),
        "address": value(chance, PLACES),
        "offset": value(chance, (0,)),
        "length": chance.choice((PAGE, M2, 2 * M2, 1, 2)) if chance.random() < 0.8 else value(chance, (0,)),
    }


def run_at_once(machine: Machine, batch: list[dict[str, int]]) -> list[tuple[int, int]]:
    shifts = {"op": 0, "flags": 8, "actor": 16, "vm": 32, "space": 48}
    header = [sum(one[name] << shift for name, shift in shifts.items()) for one in batch]
    columns = [np.array(header, np.uint64)]
    columns += [
        np.array([one[name] for one in batch], np.uint64) for name in ("object_", "address", "offset", "length")
    ]
    results = machine.run_columns(*columns, count=len(batch))
    return list(zip(results.status.tolist(), results.detail.tolist(), strict=True))


def attack_columns(chance: Random, one: Machine, other: Machine | None) -> int:
    """Batches at once on one machine, on the other one operation after the other: how many operations."""
    done = 0
    for number in range(BATCHES):
        batch = [operation(chance) for _ in range(chance.choice((1, 5, 40, 150)))]
        found = run_at_once(one, batch)
        done += len(batch)
        if other is not None:
            whole = [other.operate(**single) for single in batch]  # type: ignore[arg-type]
            assert found == [(result.status, result.detail) for result in whole]
        if number % CHECKED_EVERY == 0 or number == BATCHES - 1:
            assert [machine.check() for machine in (one, other) if machine] == [0] * (1 + (other is not None)), (
                one.broken
            )
    if other is not None:
        assert_same(one, other)
    return done


def attack_steps(chance: Random, machine: Machine) -> int:
    """Several actors begin whatever they like and go on in any order: how many steps."""
    active: set[int] = set()
    done = 0
    for _ in range(chance.choice((20, 200))):
        what, actor = chance.random(), chance.randrange(4)
        done += 1
        if what < 0.35 and actor not in active:
            machine.begin(**{**operation(chance, STEPPED), "actor": actor})  # type: ignore[arg-type]
            active.add(actor)
        elif what < 0.9 and actor in active:
            if machine.step(actor) == W.STOP:
                active.discard(actor)
        elif what > 0.97:
            run_at_once(machine, [operation(chance, STEPPED) | {"actor": 5}])
    for _ in range(300):
        active = {actor for actor in active if machine.step(actor) != W.STOP}
    if not active:  # a conversion may wait for a reference that nobody gives back
        assert machine.check() == 0, machine.broken
    return done


def test_random_operations() -> None:
    operations = steps = 0
    for number, chance in rounds("columns", 5):
        with attacked("columns", number):
            config = chosen(chance)
            machine = scene(config)
            if machine is None:
                continue
            if chance.random() < 0.5:
                operations += attack_columns(chance, machine, scene(config) if chance.random() < 0.5 else None)
            else:
                steps += attack_steps(chance, machine)
    print(f"{operations} operations, {steps} steps")
    assert operations > 0
    assert steps > 0


@pytest.mark.parametrize("design", DESIGNS)
def test_guards_in_a_shared_file_are_forked(design: Any) -> None:
    """A guard gives the mapping an anon_vma, so that its entries are copied: mm/memory.c:vma_needs_copy()."""
    machine = Machine(Config(design, pool=2 * M2, page_size=M2))
    process = machine.create_process()
    assert process.mmap(machine.create_guest_memfd_4k(M2), SMALL).status == 0
    assert process.guard_install(SMALL, PAGE).status == 0
    assert process.populate(SMALL + PAGE, PAGE).status == 0
    process.fork()
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_a_devices_large_entry_goes_where_its_mapping_is_split(kernel: str) -> None:
    """madvise(MADV_DONTFORK) of a page: mm/huge_memory.c:vma_adjust_trans_huge() clears entries that have no rmap."""
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2, kernel=kernel))
    process = machine.create_process()
    process.mmap_device(machine.create_device(0x1000, 512), DEVICE)
    assert process.touch(DEVICE).detail == 2
    assert process.madvise_dontfork(DEVICE + PAGE, PAGE).status == 0
    process.fork()
    assert machine.check() == 0, machine.broken
