"""mmap with rights is mmap and mprotect to them: entry for entry, before and after accesses, for each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu.objects.mappings import PROT_READ, PROT_WRITE
from pgemu_kernels import words as W

M2, PAGE, VA = W.PAGE_2M, W.PAGE_4K, 0x4000_0000
ALL = PROT_READ | PROT_WRITE

Maps = Callable[[Machine, AddressSpace, int], Any]
KINDS: dict[str, Maps] = {
    "anonymous": lambda _, process, prot: process.mmap_anonymous(VA, M2, prot),
    "shmem": lambda _, process, prot: process.mmap_anonymous(VA, M2, prot, shared=True),
    "hugetlb": lambda machine, process, prot: process.mmap_hugetlb(
        VA, prot=prot, file=machine.create_hugetlb_file(2 * M2)
    ),
    "hugetlb, private": lambda machine, process, prot: process.mmap_hugetlb(VA, M2, prot, shared=False),
    "hugetlb, anonymous": lambda machine, process, prot: process.mmap_hugetlb(VA, M2, prot),
    "device": lambda machine, process, prot: process.mmap_device(machine.create_device(0x1234, 512), VA, prot=prot),
    "device of 2M": lambda machine, process, prot: process.mmap_device(
        machine.create_device(0x1200, 1024), VA, prot=prot
    ),
    "device at once": lambda machine, process, prot: process.mmap_device(
        machine.create_device(0x1234, 512, remap=True), VA, prot=prot
    ),
    "device of 2M at once": lambda machine, process, prot: process.mmap_device(
        machine.create_device(0x1200, 1024, remap=True, memory_type="write-back"), VA, prot=prot
    ),
}
# What people map read-only by a flag of its own.
FILES: dict[str, Callable[[Machine], Any]] = {
    "guest_memfd of 4K": lambda machine: machine.create_guest_memfd_4k(M2),
    "guest_memfd": lambda machine: machine.create_guest_memfd(2 * M2, shared=True),
}


def machine_of(kernel: Any, design: Any, pti: bool) -> tuple[Machine, AddressSpace]:
    machine = Machine(Config(design, pool=8 * M2, page_size=M2, kernel=kernel, pti=pti))
    return machine, machine.create_process()


def entries(process: AddressSpace) -> list[list[tuple[int, int, int]]]:
    return [process.walk(address) for address in (VA, VA + PAGE, VA + M2 - PAGE, VA + M2)]


accesses = st.lists(st.tuples(st.sampled_from((0, PAGE, M2 - 1, M2)), st.booleans(), st.booleans()), max_size=6)


def assert_alike(one: tuple[Machine, AddressSpace], other: tuple[Machine, AddressSpace], todo: list[Any]) -> None:
    assert entries(one[1]) == entries(other[1])
    for at, write, execute in todo:
        given = {"write": write, "execute": execute}
        assert one[1].touch(VA + at, **given) == other[1].touch(VA + at, **given)
        assert entries(one[1]) == entries(other[1])
    assert one[0].check() == other[0].check() == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(prot=st.integers(0, 7), todo=accesses, kernel=st.sampled_from(("6.12", "6.18", "7.3")), pti=st.booleans())
def test_of_what_takes_rights(kind: str, prot: int, todo: list[Any], kernel: str, pti: bool) -> None:
    at_once, later = (machine_of(kernel, "restructure", pti) for _ in range(2))
    assert KINDS[kind](*at_once, prot).status == KINDS[kind](*later, ALL).status == 0
    assert later[1].protect(VA, M2, prot).status == 0
    if "1024" in kind or "of 2M" in kind or kind == "hugetlb":
        assert later[1].protect(VA + M2, M2, prot).status == 0
    assert_alike(at_once, later, todo)


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=25)
@given(todo=accesses, kernel=st.sampled_from(("6.18", "7.3")), pti=st.booleans())
def test_of_what_is_mapped_read_only(kind: str, design: str, todo: list[Any], kernel: str, pti: bool) -> None:
    at_once, later = (machine_of(kernel, design, pti) for _ in range(2))
    files = [FILES[kind](machine) for machine, _ in (at_once, later)]
    assert at_once[1].mmap(files[0], VA, read_only=True).status == later[1].mmap(files[1], VA).status == 0
    assert later[1].protect(VA, files[1].size, PROT_READ).status == 0
    assert_alike(at_once, later, todo)
