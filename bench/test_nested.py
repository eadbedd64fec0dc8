"""Nested walks of 24 references, 4K over 4K, random over 4 GiB.

The control walks the same way, with the same kernels, one address after the other and without prefetching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from amounts import amount
from built_tables import build_tree, tables_for, take_frames
from control import walk_one_by_one
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark
from pgemu.tables.access import rows_of
from pgemu.tables.translation import Access, Kind, translate_nested
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

PAGES = amount(1 << 20, 1 << 14)
ROUNDS = 9
Array = np.ndarray[Any, Any]


@dataclass
class Scene:
    machine: Machine
    guest_root: int
    stage2: int  # row of the format
    stage2_root: int
    addresses: Array
    physical: Array  # what they translate to


@pytest.fixture(scope="module", params=["npt", "ept"])
def guest(request: Any) -> Scene:
    """Guest pages in random order over guest memory; guest tables behind them, with contents on demand."""
    machine = Machine(Config("pfnmap", pool=6 << 30))
    base = machine.register(W.R_POOL_BASE)
    stage2 = formats.STAGE2_NPT if request.param == "npt" else formats.STAGE2_EPT
    row = machine.format_row(stage2)
    ram = machine.arrays.ram

    def words(page: int, count: int) -> Array:
        return ram[page * 512 : (page + count) * 512]

    tables = tables_for(PAGES)
    host_frames = np.arange(PAGES + tables, dtype=np.uint64) + np.uint64(base)
    first = take_frames(machine, tables_for(PAGES + tables))
    bits = int(row[W.F_TABLE]), int(row[W.F_LEAF_4K])
    stage2_root, _ = build_tree(first, host_frames, *bits, words)

    contents = take_frames(machine, tables)
    at = machine.register(W.R_CONTENTS) + PAGES
    machine.arrays.counts[at : at + tables] = np.arange(contents, contents + tables, dtype=np.uint32)
    machine.arrays.stats[int(W.STATS_GAUGES) + 2 * int(W.Gauge.CONTENT_FRAMES)] += tables
    frames = np.random.default_rng(2).permutation(PAGES).astype(np.uint64)
    guest_root, _ = build_tree(
        PAGES, frames, formats.TABLE, formats.FILE_LEAF, lambda page, count: words(contents + page - PAGES, count)
    )
    pages = np.random.default_rng(1).permutation(PAGES).astype(np.uint64)
    physical = frames[pages] + np.uint64(base) << np.uint64(12)
    return Scene(machine, guest_root, stage2, stage2_root, pages << np.uint64(12), physical)


@pytest.fixture
def timed(pgemu_benchmark: Benchmark) -> Callable[..., None]:
    def run(guest: Scene, call: Callable[[], object], role: str = "call") -> None:
        name = "ept" if guest.stage2 == formats.STAGE2_EPT else "npt"
        pgemu_benchmark(
            call, operations=PAGES, group=f"nested walk, 24 references, {name}", order="random", footprint=PAGES << 12,
            role=role, rounds=ROUNDS,
        )  # fmt: skip

    return run


def roots(guest: Scene) -> tuple[int, int, int, int]:
    return 0, guest.guest_root, guest.stage2, guest.stage2_root


def test_nested(guest: Scene, timed: Callable[..., None]) -> None:
    found = translate_nested(guest.machine, *roots(guest), guest.addresses, Kind.USER_READ)
    assert (found.read_count == 24).all()
    assert (found.physical == guest.physical).all()
    timed(guest, lambda: translate_nested(guest.machine, *roots(guest), guest.addresses, Kind.USER_READ))


def test_control(guest: Scene, timed: Callable[..., None]) -> None:
    machine = guest.machine
    rows = [rows_of(machine.format_row(0), 1 << 52, Access(), plain=False)]
    rows.append(rows_of(machine.format_row(guest.stage2), machine.arrays.ram.nbytes, Access(), plain=False))
    access = np.concatenate(rows)

    def walk() -> Array:
        words = tuple(np.uint64(word) for word in roots(guest))
        physical, error, fault = (np.empty(PAGES, np.uint64) for _ in range(3))
        status, stage, levels = (np.empty(PAGES * n, np.uint8) for n in (1, 1, 2))
        lists, counts = np.zeros(0, np.uint64), np.zeros(PAGES * 2, np.uint64)
        outputs = (physical, status, stage, levels, error, fault, lists, lists, counts)
        kind = np.uint64(Kind.USER_READ * W.X_WORDS)
        assert walk_one_by_one(machine.descriptor, *words, guest.addresses, kind, access, outputs)
        return physical

    assert (walk() == guest.physical).all()
    timed(guest, walk, "control")
