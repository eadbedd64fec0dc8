"""The machines that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K

HVA = 0x7F00_0000_0000
Measure = Callable[..., None]  # (path, call, prepare=None)


@dataclass
class Scene:
    """A machine whose pages are private and shared in turn, so that both designs map 4K leaves.

    `offsets` are the shared pages to work on, in the order of access. The last page of every 2M is shared
    and not among them: with restructure every block is split and stays so.
    """

    machine: Machine
    gmem: GuestMemfd
    process: AddressSpace
    vm: Vm
    length: int
    offsets: np.ndarray[Any, Any]

    @property
    def addresses(self) -> np.ndarray[Any, Any]:
        return self.offsets + np.uint64(HVA)


def build(design: Any, page_size: int, length: int, order: str) -> Scene:
    """Machine, inode, process and VM over `length` bytes."""
    machine = Machine(Config(design, pool=max(length, PAGE_1G), page_size=page_size))
    gmem = machine.create_guest_memfd(max(length, PAGE_1G))
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == 0
    assert vm.bind(gmem, 0).status == 0
    pages = np.arange(length // PAGE_4K, dtype=np.uint64)
    shared = pages[pages % np.uint64(2) == 1]
    assert (gmem.convert_many(shared * np.uint64(PAGE_4K), shared=True).status == 0).all()
    offsets = shared[shared % np.uint64(512) != 511] * np.uint64(PAGE_4K)
    if order == "random":
        offsets = np.random.default_rng(1).permutation(offsets)
    return Scene(machine, gmem, process, vm, length, offsets)
