"""The kernel that runs these tests against pgemu: page tables and minor faults of anonymous memory, unprivileged.

A child process maps, touches, unmaps and protects memory far from its own; after each operation its VmPTE, its
minor faults and the result must have changed as pgemu says.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, MEGABYTE, GIGABYTE = 4096, 1 << 20, 1 << 30
WORKER = Path(__file__).parents[2] / "running_kernel.py"
# Far from program, heap, libraries and stack, and around a boundary of 1G, where tables of two levels end.
BASE = (0x2000 << 32) + GIGABYTE - 8 * MEGABYTE
PAGES = 16 * MEGABYTE // PAGE
SEQUENCES = 250

Operations = list[list[Any]]


class Child:
    """The process that is watched."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, operations: Operations) -> list[list[int]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(operations) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the child died with {self.process.wait()}"
        return list(json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def reclaims_tables(child: Child) -> bool:
    """Whether one MADV_DONTNEED over 2M frees the last-level table: CONFIG_PT_RECLAIM."""
    start = BASE + 8 * MEGABYTE
    size = 2 * MEGABYTE
    answers = child.run(
        [["mmap", start, 2 * size, 3], ["touch", start, 1], ["dontneed", start, size], ["munmap", start, 2 * size]]
    )
    assert [status for status, *_ in answers] == [0, 0, 0, 0]
    return answers[2][2] < 0


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    if not sys.platform.startswith("linux") or "VmPTE:" not in Path("/proc/self/status").read_text():
        pytest.skip("/proc is not Linux's: no VmPTE in /proc/self/status")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not x86-64: other page tables")
    watched = Child()
    warm_up = [["mmap", BASE, MEGABYTE, 3], ["touch", BASE, 0], ["touch", BASE, 1], ["munmap", BASE, MEGABYTE]]
    for _ in range(20):
        watched.run(warm_up * 10)
    yield watched
    watched.close()


@pytest.fixture(scope="module")
def machine(child: Child) -> Machine:
    kernel = "6.18" if reclaims_tables(child) else "6.12"
    return Machine(Config("restructure", pool=W.PAGE_2M, page_size=W.PAGE_2M, kernel=kernel))


# --------------------------------------------------------------------------- sequences

# Few places and lengths, all near the ends of tables, so that operations meet.
TABLES = PAGES // 512
places = st.builds(
    lambda table, page: table * 512 + page, st.integers(0, TABLES - 1), st.sampled_from([0, 0, 1, 256, 511])
)
lengths = st.sampled_from([1, 2, 256, 511, 512, 512, 513, 1024, 1536, 2048, PAGES])
rights = st.sampled_from([0, 1, 2, 3, 3, 3])


def operation(name: str, *more: st.SearchStrategy[int]) -> st.SearchStrategy[list[Any]]:
    def place(page: int, length: int, *rest: int) -> list[Any]:
        return [name, BASE + page * PAGE, min(length, PAGES - page) * PAGE, *rest]

    return st.builds(place, places, lengths, *more)


touches = st.builds(lambda page, write: ["touch", BASE + page * PAGE, write], places, st.integers(0, 1))
sequences = st.lists(
    st.one_of(
        operation("mmap", rights),
        touches,
        touches,
        touches,
        touches,
        operation("munmap"),
        operation("mprotect", rights),
        operation("dontneed"),
        operation("dontneed"),
    ),
    min_size=6,
    max_size=30,
).map(lambda chosen: [["mmap", BASE, PAGES * PAGE // 2, 3], *chosen, ["munmap", BASE, PAGES * PAGE]])


def predict(process: AddressSpace, words: list[Any]) -> tuple[int, int, int]:
    """What pgemu says an operation returns, faults and does to VmPTE."""
    name, address, *rest = words
    faults, tables = process.minor_faults, process.table_pages.kib
    if name == "mmap":
        status = process.mmap_anonymous(address, *rest).status
    elif name == "munmap":
        status = process.munmap(address, *rest).status
    elif name == "mprotect":
        status = process.protect(address, *rest).status
    elif name == "dontneed":
        status = process.madvise_dontneed(address, *rest).status
    else:
        fault = process.touch(address, write=bool(rest[0])).status
        status = -W.EFAULT if fault == W.VM_FAULT_SIGSEGV else 0
    return status, process.minor_faults - faults, process.table_pages.kib - tables


@settings(max_examples=SEQUENCES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=sequences)
def test_tables_and_faults_are_as_predicted(child: Child, machine: Machine, operations: Operations) -> None:
    process = machine.create_process()
    try:
        predicted = [predict(process, words) for words in operations]
    finally:
        process.exit()
    measured = [tuple(answer) for answer in child.run(operations)]
    if measured != predicted:
        # The interpreter's own memory may have grown just then; what the kernel does with ours, it does again.
        measured = [tuple(answer) for answer in child.run(operations)]
    for words, expected, found in zip(operations, predicted, measured, strict=True):
        assert found == expected, f"{words}: kernel {found}, pgemu {expected}"


def test_no_frame_is_lost(machine: Machine) -> None:
    before = machine.statistics.gauge(W.Gauge.FRAMES_USED)
    process = machine.create_process()
    process.mmap_anonymous(BASE, PAGES * PAGE)
    for page in range(0, PAGES, 100):
        process.touch(BASE + page * PAGE, write=page % 200 == 0)
    process.exit()
    assert machine.statistics.gauge(W.Gauge.FRAMES_USED) in (before, before + 1)  # the zero page stays
    assert machine.check() == 0
