"""Checking after each operation finds nothing on a sound machine, whatever memory the operations are about."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

M2, PAGE = W.PAGE_2M, W.PAGE_4K
PLACES = {"anonymous": 0x400000, "small": 0x800000, "device": 0xC00000, "huge": 0x1000000, "gmem": 0x2000000}
steps = st.tuples(
    st.sampled_from(("touch", "munmap", "protect", "dontneed", "remap", "fork", "mmap", "convert", "guest", "hole")),
    st.sampled_from(list(PLACES)),
    st.integers(0, 3).map(lambda page: page * PAGE),
    st.booleans(),
)


def mmap(machine: Machine, process: Any, place: str, files: dict[str, Any]) -> Any:
    at = PLACES[place]
    if place == "anonymous":
        return process.mmap_anonymous(at, M2)
    if place == "device":
        return process.mmap_device(files[place], at)
    return process.mmap_hugetlb(at, file=files[place]) if place == "huge" else process.mmap(files[place], at)


@pytest.mark.parametrize("design", DESIGNS)
@settings(max_examples=60)
@given(todo=st.lists(steps, max_size=30), start=st.integers(0, 5))
def test_nothing_is_found(design: Any, todo: list[Any], start: int) -> None:
    machine = Machine(Config(design, pool=6 * M2, page_size=M2))
    if start == 0:
        machine.check_each()
    files = {
        "small": machine.create_guest_memfd_4k(M2), "huge": machine.create_hugetlb_file(M2),
        "device": machine.create_device(0x1000, 512), "gmem": machine.create_guest_memfd(2 * M2, shared=True),
    }  # fmt: skip
    processes = [machine.create_process()]
    assert {mmap(machine, processes[0], place, files).status for place in PLACES} == {0}
    vm = machine.create_vm(processes[0], protected=True)
    assert vm.bind(files["gmem"], 0).status == vm.set_memory_region(1, 1 << 30, M2, PLACES["anonymous"]).status == 0
    for i, (what, place, offset, flag) in enumerate(todo):
        if i == start:
            machine.check_each()
        process, at = processes[-1], PLACES[place] + offset
        if what == "fork" and len(processes) < 3:
            processes.append(process.fork())
        else:
            do(what, machine, process, at, flag, files, vm, offset, place)
        assert machine.broken[0] == 0, (what, place, machine.broken)
    assert machine.check() == 0, machine.broken


def do(
    what: str,
    machine: Machine,
    process: Any,
    at: int,
    flag: bool,
    files: dict[str, Any],
    vm: Any,
    offset: int,
    place: str,
) -> None:
    calls = {
        "touch": lambda: process.touch(at, write=flag),
        "munmap": lambda: process.munmap(at, M2 if flag else PAGE),
        "protect": lambda: process.protect(at, PAGE, 1 if flag else 3),
        "dontneed": lambda: process.madvise_dontneed(at, PAGE),
        "remap": lambda: process.remap(at, PAGE, PAGE, 0x4000_0000 + offset),
        "mmap": lambda: mmap(machine, process, place, files),
        "convert": lambda: files["gmem"].convert(offset, PAGE, shared=flag),
        "guest": lambda: vm.touch((1 << 30) * flag + offset, write=flag),
        "hole": lambda: files["small" if flag else "gmem"].punch_hole(0, M2),
    }
    if what in calls:
        calls[what]()
