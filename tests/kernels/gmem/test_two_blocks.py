"""Two gigabytes, one page converted and back: every number worked out by hand.

2 GiB of guest memory in two 1G blocks, NPT, private and shared pages under one root. X is one page of
block 0. A level-3 slot is the entry for 1 GiB in the level-3 table; "below" it are a level-2 table (512
entries of 2M) and level-1 tables (512 entries of 4K each).
"""

from __future__ import annotations

import numpy as np
import pytest

from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge

GIB = 1 << 30
PAGES_1G = 262_144  # 1 GiB / 4096
X = 0x1234_5000  # in block 0, in the 2M block 0x12200000
OTHER = 0x2000_0000  # in block 0, in another 2M block
ALL_PAGES = np.arange(2 * PAGES_1G, dtype=np.uint64) << np.uint64(12)
BLOCK_0 = ALL_PAGES[:PAGES_1G]

# Above the level-3 slots there are always two stage-2 tables: the root and one level-3 table (512 GiB).
UPPER_TABLES = 2
# The vmemmap of two optimised 1G folios on 7.3: each keeps one page, and all tails share one.
OPTIMISED = 1 + 1 + 1
# Restoring one folio takes one frame for each of its 4096 vmemmap pages but the first.
RESTORED = 4095


def make(design: str, **parameters: object) -> tuple[Machine, GuestMemfd, Vm]:
    machine = Machine(Config(design, pool=2 * GIB, stage2="npt", **parameters))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(2 * GIB, shared=False)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, gpa=0).status == 0
    return machine, gmem, vm


def leaves(machine: Machine) -> tuple[int, int, int]:
    """Stage-2 leaves of 4K, 2M, 1G."""
    statistics = machine.statistics
    kinds = (Gauge.STAGE2_LEAVES_4K, Gauge.STAGE2_LEAVES_2M, Gauge.STAGE2_LEAVES_1G)
    return tuple(statistics.gauge(kind) for kind in kinds)  # type: ignore[return-value]


def tables(machine: Machine) -> int:
    """Stage-2 table pages below the level-3 slots."""
    return machine.statistics.gauge(Gauge.STAGE2_TABLES) - UPPER_TABLES


def vmemmap(machine: Machine) -> int:
    return machine.statistics.gauge(Gauge.VMEMMAP_PAGES)


def touch_everything(machine: Machine, vm: Vm) -> None:
    """All private: the first touch of a block installs its 1G leaf, every other one finds it."""
    results = vm.touch_many(ALL_PAGES)
    assert np.count_nonzero(results.status == W.RET_PF_FIXED) == 2
    assert np.count_nonzero(results.status == W.RET_PF_SPURIOUS) == 524_288 - 2
    assert (results.detail == 3).all()
    assert leaves(machine) == (0, 0, 2)
    assert tables(machine) == 0
    assert vmemmap(machine) == OPTIMISED


def test_pfnmap() -> None:
    machine, gmem, vm = make("pfnmap")
    touch_everything(machine, vm)

    # To shared: the 1G leaf of block 0 overlaps X and goes whole; nothing else happens.
    assert gmem.convert(X, 4096, shared=True).status == 0
    assert leaves(machine) == (0, 0, 1)
    assert vmemmap(machine) == OPTIMISED

    # 511 of the 512 2M blocks are uniformly private: 2M leaves. The one with X is mixed: 512 4K leaves.
    # Below the level-3 slot: one level-2 table, one level-1 table = 2 pages = 8,192 bytes.
    results = vm.touch_many(BLOCK_0)
    assert np.count_nonzero(results.status == W.RET_PF_FIXED) == 511 + 512
    assert leaves(machine) == (512, 511, 1)
    assert tables(machine) == 2
    assert tables(machine) * 4096 == 8_192
    assert vmemmap(machine) == OPTIMISED
    assert machine.statistics.event(Event.FOLIO_SPLIT) == 0

    # To private: X's own leaf is dropped, exactly.
    assert gmem.convert(X, 4096, shared=False).status == 0
    assert leaves(machine) == (511, 511, 1)
    assert tables(machine) == 2
    # Another page of block 0 still has its leaf: nothing changes, although 1G would be possible now.
    assert vm.touch(OTHER) == (W.RET_PF_SPURIOUS, 2)
    assert leaves(machine) == (511, 511, 1)
    # X has none: the fault installs the 1G leaf over the subtree, whose 2 tables are freed.
    assert vm.touch(X) == (W.RET_PF_FIXED, 3)
    assert leaves(machine) == (0, 0, 2)
    assert tables(machine) == 0
    assert vmemmap(machine) == OPTIMISED
    assert machine.statistics.event(Event.STRUCT_PAGE_WRITTEN) == 0
    assert machine.check() == 0


def split_block_0(machine: Machine, gmem: GuestMemfd, vm: Vm) -> None:
    """Convert X to shared and touch block 0 again."""
    assert gmem.convert(X, 4096, shared=True).status == 0
    # The whole folio is split before anything is zapped: 262,144 order-0 folios, 4095 vmemmap pages back.
    assert gmem.is_split(X)
    assert not gmem.is_split(GIB)
    assert vmemmap(machine) == OPTIMISED + RESTORED
    assert machine.statistics.event(Event.STRUCT_PAGE_WRITTEN) == PAGES_1G - 1
    # 44 bytes in each tail, and the 28 of each of the two folios when they were taken from the pool.
    assert machine.statistics.event(Event.STRUCT_PAGE_BYTES) == 44 * (PAGES_1G - 1) + 2 * 28
    assert leaves(machine) == (0, 0, 1)

    # Order-0 folios: 4K leaves everywhere. One level-2 table and 512 level-1 tables = 513 = 2,101,248 bytes.
    results = vm.touch_many(BLOCK_0)
    assert (results.status == W.RET_PF_FIXED).all()
    assert leaves(machine) == (262_144, 0, 1)
    assert tables(machine) == 513
    assert tables(machine) * 4096 == 2_101_248


def test_restructure() -> None:
    machine, gmem, vm = make("restructure")
    touch_everything(machine, vm)
    split_block_0(machine, gmem, vm)

    # Back: merged, 4095 vmemmap pages freed. The zap is of X; the other leaves stay, smaller than the merged folio.
    assert gmem.convert(X, 4096, shared=False).status == 0
    assert not gmem.is_split(X)
    assert vmemmap(machine) == OPTIMISED
    assert machine.statistics.event(Event.FOLIO_MERGED) == 1
    assert leaves(machine) == (262_143, 0, 1)
    assert vm.touch(OTHER) == (W.RET_PF_SPURIOUS, 1)
    assert vm.touch(X) == (W.RET_PF_FIXED, 3)
    assert leaves(machine) == (0, 0, 2)
    assert tables(machine) == 0
    assert machine.check() == 0


def test_restructure_when_the_zap_is_rounded() -> None:
    machine, gmem, vm = make("restructure", zap="rounded")
    touch_everything(machine, vm)
    split_block_0(machine, gmem, vm)

    # Rounded to the 1G block, and as both kinds share the root it drops all 262,144 leaves; their tables stay.
    assert gmem.convert(X, 4096, shared=False).status == 0
    assert leaves(machine) == (0, 0, 1)
    assert tables(machine) == 513
    # So the first touch of any page gives 1G and frees the tables.
    assert vm.touch(OTHER) == (W.RET_PF_FIXED, 3)
    assert leaves(machine) == (0, 0, 2)
    assert tables(machine) == 0
    assert machine.check() == 0


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_everything_comes_back(design: str) -> None:
    machine, gmem, vm = make(design)
    touch_everything(machine, vm)
    assert gmem.convert(X, 4096, shared=True).status == 0
    vm.touch_many(BLOCK_0)
    assert gmem.close().status == 0
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 2
    assert leaves(machine) == (0, 0, 0)
    assert vmemmap(machine) == OPTIMISED
    assert machine.check() == 0
