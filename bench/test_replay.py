"""A replay of a stored trace, end to end, beside machine.run() over the same records in memory: read the ratio.

Decoding and writing go beside running, so that the ratio is one of two free cores. `mixed` is what a trace is like:
faults at random, one record of ten by the host, one of fifty a conversion. `resident` are faults in turn on what is
mapped already, the cheapest records that there are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amounts import amount
from pgemu.experiments.configuration import configuration
from pgemu.experiments.replaying.opened import OpenTrace, open_trace
from pgemu.experiments.replaying.run import Run, replay
from pgemu.experiments.setting_up import boot, fill
from pgemu.machine.presets import Versions
from pgemu.objects.machine import Machine
from pgemu.pytest_plugin import Benchmark
from pgemu.trace import Flag, Layout, Lowered, LoweringOptions, Operation, Records, Region, Slot
from pgemu.trace.lowered import Accounting
from pgemu.trace.readers import parquet
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K
from scene import HVA

RECORDS = amount(1 << 21, 1 << 15)
SIZE = 4 * PAGE_1G
ROUNDS = 3


def records_of(kind: str) -> Records:
    random = np.random.default_rng(1)
    pages = (
        random.integers(0, SIZE // PAGE_4K, RECORDS) if kind == "mixed" else np.arange(RECORDS) % (PAGE_1G // PAGE_4K)
    )
    share = random.random(RECORDS) if kind == "mixed" else np.ones(RECORDS)
    converts, host = share < 0.02, (share >= 0.02) & (share < 0.12)
    to = np.where(random.random(RECORDS) < 0.5, int(Flag.SHARED), int(Flag.PRIVATE))
    address = pages.astype(np.uint64) * np.uint64(PAGE_4K)
    op = np.where(
        converts, int(Operation.CONVERT), np.where(host, int(Operation.HOST_FAULT), int(Operation.GUEST_FAULT))
    )
    setup = [
        Records.build(1, op=Operation.MMAP, address=HVA, length=SIZE),
        Records.build(1, op=Operation.BIND, address=0, length=SIZE),
    ]
    return Records.concatenate(
        [
            *setup,
            Records.build(
                RECORDS, time=np.arange(RECORDS), op=op, flags=np.where(converts, to, host),
                address=np.where(converts, 0, address + np.where(host, HVA, 0).astype(np.uint64)),
                offset=np.where(converts, address, 0), length=np.where(converts, PAGE_4K, 0),
            ),
        ]
    )  # fmt: skip


@pytest.fixture(scope="module", params=["mixed", "resident"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = records_of(request.param)
    layout = Layout(SIZE, PAGE_1G, (Region(HVA, 0, SIZE),), (Slot(0, 0, SIZE, HVA),), (), "given")
    count = len(records)
    accounting = Accounting(events=count, inputs=Counter({"record": count}), operations=count)
    path: Path = tmp_path_factory.mktemp("replay") / f"{request.param}.parquet"
    parquet.write(Lowered(records, layout, "private", True, accounting, request.param), path)
    return path


def configured(trace: Path, design: Any) -> tuple[OpenTrace, Run]:
    opened, versions = open_trace(str(trace), LoweringOptions()), Versions()
    return opened, Run(configuration(opened.lowered, design, versions, {}), versions)


def test_replay(pgemu_benchmark: Benchmark, trace: Path, pgemu_design: Any, tmp_path: Path) -> None:
    opened, run = configured(trace, pgemu_design)
    pgemu_benchmark(
        lambda: replay(opened, run, tmp_path / "o.parquet"), operations=RECORDS, group=f"replay {trace.stem}",
        rounds=ROUNDS,
    )  # fmt: skip


def test_control(pgemu_benchmark: Benchmark, trace: Path, pgemu_design: Any) -> None:
    """The batch API: machine.run() over the same records, which are in memory."""
    opened, run = configured(trace, pgemu_design)
    records = Records.concatenate(parquet.iterate(trace))
    machines: list[Machine] = []

    def prepare() -> None:
        machines[:] = [boot(opened.lowered, run.config)]
        fill(machines[0], opened.lowered)

    pgemu_benchmark(
        lambda: machines[0].run(records), setup=prepare, operations=RECORDS, group=f"replay {trace.stem}",
        role="control", rounds=ROUNDS,
    )  # fmt: skip
