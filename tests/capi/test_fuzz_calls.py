"""Random calls of every function by C, with any numbers: all come back, with an answer or a refusal.

The 10 million of a release: PGEMU_C_CALLS=10000000, once also with bounds checks, which say an index outside an array.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from c_calls import shared_library, table
from fuzzing import attacked, rounds
from pgemu import capi
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from random_operations import PLACES, chosen, scene

CALLS = 2000
M2 = W.PAGE_2M


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Any:
    function = shared_library(Path(__file__).with_name("fuzz.c"), tmp_path_factory.mktemp("fuzz")).fuzz
    pointer, number = ctypes.c_void_p, ctypes.c_uint64
    function.argtypes = [pointer, pointer, number, number, pointer, pointer, ctypes.c_int, pointer]
    return function


def with_devices(machine: Machine | None) -> Machine | None:
    if machine is not None:
        machine.create_vfio_container().attach()
        machine.create_iommufd().create_ioas().attach()
    return machine


def attack(fuzz: Any, machine: Machine, seed: int, calls: int, walks: bool, counts: Any) -> None:
    roots = [int(machine.arrays.state[int(W.STATE_SPACES) + int(W.S_ROOT)])]
    roots += [int(machine.arrays.state[int(W.STATE_VMS) + int(W.V_ROOT)]), 0, M2]
    given = np.array(PLACES, np.uint64), np.array(roots, np.uint64)
    places, tops = (array.ctypes.data for array in given)
    assert fuzz(table(), capi.handle(machine), seed, calls, places, tops, walks, counts.ctypes.data) == 0


def test_any_numbers_are_survived(fuzz: Any, capfd: pytest.CaptureFixture[str]) -> None:
    counts = np.zeros((19, 2), np.uint64)
    most = int(os.environ.get("PGEMU_C_CALLS", "0"))
    calls = max(CALLS, most // 200)
    for number, chance in rounds("calls of C", 2, least=2 if not most else 200):
        with attacked("calls of C", number):
            walks = number % 3 == 0
            machine = with_devices(scene(chosen(chance)))
            if machine is None:
                continue
            attack(fuzz, machine, chance.getrandbits(62), calls, walks, counts)
            if not walks:
                assert machine.check() == 0, machine.broken
        said = capfd.readouterr().err
        assert "Exception ignored" not in said, said
        assert "IndexError" not in said, said
        if most and counts.sum() >= most:
            break
    assert (counts[:4].sum(axis=0) > 0).all()
    assert (counts[4:].sum(axis=0) > 0).all()
    print(f"{int(counts.sum())} calls, refused {int(counts[:, 0].sum())}")


@pytest.mark.parametrize("design", DESIGNS)
def test_each_function_has_both_answers(fuzz: Any, design: Any) -> None:
    counts = np.zeros((19, 2), np.uint64)
    for walks in (False, True):
        machine = with_devices(scene(Config(design, pool=6 * M2, page_size=M2)))
        assert machine is not None
        attack(fuzz, machine, 1, 4000, walks, counts)
    assert (counts > 0).all(), counts
