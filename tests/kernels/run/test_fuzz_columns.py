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
from random_operations import DEVICE, M2, PAGE, SMALL, STEPPED, chosen, operation, scene

BATCHES, CHECKED_EVERY = 16, 4


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
