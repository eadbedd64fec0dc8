"""An independent walker reads our images: volatility3's Intel layer over its own file and ELF layers.

It knows no reserved bits, takes an entry as present by bit 0 alone, and refuses a table of 512 equal entries; none of
that makes a difference in tables that pgemu writes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgemu.images.image import open_image
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu.tables.walk import Status, translate
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import PageFormat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what Python has deprecated
    from volatility3.framework import contexts, exceptions
    from volatility3.framework.layers import elf, intel, physical

Array = np.ndarray[Any, Any]
ADDRESSES = 100_000
VA = 0x7F00_0000_0000
M1 = 1 << 20
G1 = 1 << 30


@pytest.fixture(scope="module")
def scene() -> tuple[Machine, AddressSpace, Vm]:
    """Stage 2 with leaves of 4K, 2M and 1G, a process, and a kernel whose vmemmap has leaves of 4K and 2M."""
    machine = Machine(Config("pfnmap", pool=6 * G1, hvo=False, seed=11))
    gmem = machine.create_guest_memfd(6 * G1, shared=False)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert vm.bind(gmem, gpa=3 * G1).status == 0
    assert process.mmap(gmem, VA).status == 0
    random = np.random.default_rng(3)
    # Neither 2M nor 1G around a shared page can be one leaf: one page in each 2M of 128M, and others here and there.
    gmem.convert_many(np.arange(5 * 4096, 128 * M1, 2 * M1, dtype=np.uint64), shared=True)
    gmem.convert_many(random.integers(G1 >> 12, 2 * G1 >> 12, 50).astype(np.uint64) << np.uint64(12), shared=True)
    vm.touch_many(np.arange(3 * G1, 3 * G1 + 128 * M1, 3 * 4096, dtype=np.uint64))
    vm.touch_many(random.integers(3 * G1, 8 * G1, 5_000).astype(np.uint64))
    gmem.convert_many(np.arange(0, 64 * M1, 2 * M1, dtype=np.uint64), 2 * M1, shared=True)
    process.touch_many(np.arange(VA, VA + 64 * M1, 5 * 4096, dtype=np.uint64))
    return machine, process, vm


def volatility(path: Path, form: str, root: int) -> Any:
    """volatility3's translation layer for a root in an image."""
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    memory = "file"
    if form == "elf":
        context.config["elf.base_layer"] = "file"
        context.add_layer(elf.Elf64Layer(context, "elf", "elf"))
        memory = "elf"
    context.config["intel.memory_layer"] = memory
    context.config["intel.page_map_offset"] = root
    return intel.Intel32e(context, "intel", "intel")


def theirs(layer: Any, addresses: Array) -> tuple[Array, Array]:
    """Physical address, and size of the page it lies in, 0 where nothing is mapped."""
    physical_, sizes = np.zeros((2, addresses.size), np.uint64)
    for i, address in enumerate(addresses.tolist()):
        try:
            found, size, _ = layer._translate(address)
        except exceptions.PagedInvalidAddressException:
            continue
        physical_[i], sizes[i] = found, size
    return physical_, sizes


def compare(path: Path, form: str, fmt: PageFormat, root: int, addresses: Array) -> dict[int, int]:
    """How many addresses were found mapped by level, all as they find them."""
    with open_image(path) as image:
        ours = translate(image, fmt, root, addresses)
    found, sizes = theirs(volatility(path, form, root), addresses)
    mapped = ours.status == Status.MAPPED
    assert np.array_equal(np.where(mapped, np.uint64(4096) << (ours.level.astype(np.uint64) - 1) * 9, 0), sizes)
    assert np.array_equal(ours.physical, found)
    return {0: int((~mapped).sum())} | {level: int((ours.level[mapped] == level).sum()) for level in (1, 2, 3)}


def random_addresses(regions: list[tuple[int, int]], count: int) -> Array:
    random = np.random.default_rng(len(regions))
    parts = [random.integers(start, end, count // len(regions), np.uint64) for start, end in regions]
    return random.permutation(np.concatenate(parts))


@pytest.mark.parametrize("form", ["elf", "raw"])
def test_translates_as_we_do(scene: tuple[Machine, AddressSpace, Vm], form: str, tmp_path: Path) -> None:
    machine, process, vm = scene
    path = tmp_path / "image"
    machine.write_image(path, form)  # type: ignore[arg-type]
    count = ADDRESSES // 2  # of each of the two forms
    regions = [(3 * G1, 3 * G1 + 128 * M1), (3 * G1, 9 * G1), (0, 10 * G1), (0, 1 << 48)]
    stage2 = compare(path, form, machine.stage2_format, vm.root, random_addresses(regions, count // 2))
    assert min(stage2.values()) > 500, stage2
    regions = [(VA, VA + 64 * M1), (0, 1 << 47)]
    user = compare(path, form, machine.host_format, process.root, random_addresses(regions, count // 4))
    assert min(user[0], user[1]) > 500, user
    vmemmap = 0xFFFF_EA00_0000_0000 + 64 * machine.register(W.R_POOL_BASE)
    regions = [(vmemmap - 64 * M1, vmemmap + 160 * M1), (0xFFFF_8000_0000_0000, (1 << 64) - 1)]
    root = machine.register(W.R_KERNEL_ROOT)
    kernel = compare(path, form, machine.host_format, root, random_addresses(regions, count // 4))
    assert min(kernel[0], kernel[2]) > 500, kernel
    assert sum(map(sum, (stage2.values(), user.values(), kernel.values()))) == count
