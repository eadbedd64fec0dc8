"""A machine out of a file, and a copy of one, go on as the machine would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from comparisons import HVA, INODE, lowered, mixed_records
from pgemu import Config, InputError, Machine
from pgemu.machine import snapshot
from pgemu.objects.devices import Ioas, VfioContainer
from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.trace import Lowered, Records
from pgemu_kernels.engine.handle import TELL_DEVICES
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K
from random_traces import traces

DESIGNS = ("restructure", "pfnmap")
M2 = PAGE_2M


def machine_of(trace: Lowered, design: Any, **fields: Any) -> Machine:
    machine = Machine(Config(design, pool=INODE, page_size=M2, vm="sw", **fields))
    machine.create_vm(machine.create_process())
    machine.create_guest_memfd(INODE, shared=trace.init == "shared")
    return machine


def image(machine: Machine, folder: Path, name: str) -> bytes:
    machine.write_image(folder / name)
    return (folder / name).read_bytes()


def run(machine: Machine, records: Records) -> list[tuple[int, int]]:
    results = machine.run(records)
    return list(zip(results.status.tolist(), results.detail.tolist(), strict=True))


def same(one: Machine, other: Machine) -> None:
    """Every word of all arrays."""
    for first, second in zip(one.arrays, other.arrays, strict=True):
        assert np.array_equal(first, second)


# --------------------------------------------------------------------------- it goes on


@settings(max_examples=25, deadline=None)
@given(trace=traces(), design=st.sampled_from(DESIGNS), cut=st.integers(0, 26), seed=st.sampled_from([0, 7]))
def test_a_saved_machine_and_a_copy_go_on_as_the_machine_does(
    tmp_path_factory: pytest.TempPathFactory, trace: Lowered, design: Any, cut: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("machines")
    machine = machine_of(trace, design, seed=seed, hvo=seed == 0)
    cut = min(cut, len(trace.records))
    run(machine, trace.records[:cut])
    machine.save(folder / "m")
    others = [Machine.open(folder / "m"), machine.copy()]
    expected = run(machine, trace.records[cut:])
    for other in others:
        assert other.config == machine.config
        assert run(other, trace.records[cut:]) == expected
        assert other.statistics == machine.statistics
        assert image(other, folder, "other") == image(machine, folder, "machine")
        same(machine, other)
        assert other.check() == machine.check() == 0


REST = """
import json, sys
import numpy as np
from pgemu import Machine
from comparisons import mixed_records
from pgemu.trace import Records
machine = Machine.open(sys.argv[1])
results = machine.run(Records.concatenate(mixed_records())[int(sys.argv[2]):])
print(json.dumps([results.status.tolist(), results.detail.tolist(), machine.statistics.words.tolist()]))
"""


@pytest.mark.parametrize("design", DESIGNS)
def test_another_process_goes_on_with_a_saved_machine(tmp_path: Path, design: Any) -> None:
    trace = lowered(mixed_records())
    machine = machine_of(trace, design)
    run(machine, trace.records[:9])
    machine.save(tmp_path / "m")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REST, str(tmp_path / "m"), "9"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment).stdout
    results = machine.run(trace.records[9:])
    assert json.loads(told) == [
        results.status.tolist(), results.detail.tolist(), machine.statistics.words.tolist(),
    ]  # fmt: skip


def test_a_copy_and_its_machine_share_nothing() -> None:
    trace = lowered(mixed_records())
    machine = machine_of(trace, "restructure")
    other = machine.copy()
    before = [array.copy() for array in other.arrays]
    run(machine, trace.records)
    for array, kept in zip(other.arrays, before, strict=True):
        assert np.array_equal(array, kept)
    assert run(other, trace.records) == run(machine_of(trace, "restructure"), trace.records)


def test_what_a_guest_wrote_is_kept_and_all_else_reads_as_zero(tmp_path: Path) -> None:
    machine = Machine(Config("pfnmap", pool=INODE, page_size=M2))
    gmem = machine.create_guest_memfd(INODE, shared=True)
    process = machine.create_process()
    process.mmap(gmem, HVA)
    process.touch(HVA, write=True)
    pfn = gmem.pfn(0)
    assert pfn is not None
    machine.write_frame(pfn, b"written", 100)
    machine.save(tmp_path / "m")
    for other in (Machine.open(tmp_path / "m"), machine.copy()):
        assert other.read_frame(pfn)[100:107] == b"written"
        assert other.read_frame(pfn + 1) == bytes(PAGE_4K)


def test_large_arrays_are_copied_where_they_were_touched() -> None:
    """A pool of 64 GiB has arrays of tens of megabytes, of which the pages in use are few and lie apart."""
    machine = Machine(Config("restructure", pool=64 * PAGE_1G))
    gmem, vm = machine.create_guest_memfd(64 * PAGE_1G), machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    for block in (0, 17, 63):
        gmem.convert(block * PAGE_1G + 5 * PAGE_4K, PAGE_4K, shared=True)
        vm.touch_many([block * PAGE_1G, block * PAGE_1G + 5 * PAGE_4K])
    other = machine.copy()
    same(machine, other)
    assert other.check() == 0


# --------------------------------------------------------------------------- what a machine has


def test_handles_of_everything_a_machine_has(tmp_path: Path) -> None:
    machine = Machine(Config("restructure", pool=8 * M2, page_size=M2, buddy=4 * M2))
    made = [
        machine.create_guest_memfd(2 * M2, shared=True), machine.create_guest_memfd_4k(M2),
        machine.create_hugetlb_file(M2), machine.create_device(0x1000, 512), machine.create_memfd(M2),
    ]  # fmt: skip
    first, ended = machine.create_process(), machine.create_process()
    ended.exit()
    vm, gone = machine.create_vm(first), machine.create_vm()
    gone.close()
    table = machine.create_page_table("x86-64")
    table.map_range(0, 0, 2 * M2)
    machine.create_page_table("arm64-s2").destroy()
    machine.save(tmp_path / "m")
    for other in (Machine.open(tmp_path / "m"), machine.copy()):
        assert [type(one) for one in other.inodes] == [GuestMemfd, GuestMemfd4K, HugetlbFile, Device, ShmemFile]
        assert [(one.inode, one.size) for one in other.inodes] == [(one.inode, one.size) for one in made]
        assert [one.space for one in other.processes] == [first.space]
        assert [one.vm for one in other.vms] == [vm.vm]
        assert all(one.machine is other for one in (*other.inodes, *other.processes, *other.vms))
        (again,) = other.page_tables
        assert (again.root, again.format) == (table.root, table.format)
        assert again.translate([4096]).physical.tolist() == [4096]
        assert again.unmap(0, PAGE_4K).status == 0
        assert table.translate([0]).physical.tolist() == [0]
        assert other.check() == 0


def with_devices(machine: Machine) -> tuple[VfioContainer, Ioas]:
    gmem = machine.create_guest_memfd(2 * M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, HVA)
    process.mmap_anonymous(0x40_0000, M2)
    container = machine.create_vfio_container("amd")
    container.attach()
    assert container.map(0, PAGE_4K, process, 0x40_0000).status == 0
    ioas = machine.create_iommufd().create_ioas("vtd", guest_memfd="revoke")
    ioas.attach()
    assert process.touch(HVA, write=True).status >= 0
    assert ioas.map_file(0, M2, process, gmem, 0).status == 0
    return container, ioas


def test_devices_are_told_of_conversions_in_a_copy_and_in_a_file(tmp_path: Path) -> None:
    machine = Machine(Config("pfnmap", pool=4 * M2, page_size=M2))
    with_devices(machine)
    machine.save(tmp_path / "m")
    others = [Machine.open(tmp_path / "m"), machine.copy()]
    for one in (machine, *others):
        assert one.descriptor[TELL_DEVICES] != 0
        container, ioas = one.io_spaces
        assert isinstance(container, VfioContainer)
        assert isinstance(ioas, Ioas)
        assert (container.unit, ioas.unit) == ("amd", "vtd")
        (gmem,) = one.inodes
        assert isinstance(gmem, GuestMemfd)
        assert gmem.convert(0, PAGE_4K, shared=False).status == 0
        assert ioas.revocations.revoked > 0
        assert one.check() == 0
        assert container.map(PAGE_4K, PAGE_4K, one.processes[0], 0x40_1000).status == 0
    for other in others:
        assert other.statistics == machine.statistics


# --------------------------------------------------------------------------- files that are none


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m"
    trace = lowered(mixed_records())
    machine = machine_of(trace, "restructure")
    run(machine, trace.records)
    machine.save(path)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Machine.open(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, at: float, bit: int, cut: bool
) -> None:
    place = int(at * len(saved))
    damaged = bytearray(saved)
    damaged[place] ^= 1 << bit
    refused(tmp_path_factory.mktemp("damaged") / "m", saved[:place] if cut else bytes(damaged))


def test_other_files_are_refused_for_what_they_are(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m"
    assert "expected a file that Machine.save()" in refused(path, b"")
    assert "expected a file that Machine.save()" in refused(path, b"PAR1" * 100)
    assert "form 2, expected form 1" in refused(path, saved[:8] + b"\2\0\0\0" + saved[12:])
    assert "checksum" in refused(path, saved + b"x")
    with pytest.raises(InputError, match="cannot be read"):
        Machine.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"words": "0" * 16}, "expected those of pgemu"),
        ({"config": {"design": "neither"}}, "configuration cannot be used"),
        ({"config": {"field": 1}}, "configuration cannot be used"),
        ({"sizes": [1, 2, 3, 4]}, "arrays of"),
        ({"sizes": 1}, "header"),
        ({"machine": {}}, "beside its arrays"),
        ({"machine": {"frames_limit": "x", "tells_devices": 0, "formats": {}, "tables": []}}, "beside its arrays"),
    ],
)
def test_a_whole_file_of_another_version_is_refused(
    saved: bytes, tmp_path: Path, header: dict[str, Any], said: str
) -> None:
    import hashlib

    length = int.from_bytes(saved[12:16], "little")
    document = json.dumps({**json.loads(saved[16 : 16 + length]), **header}).encode()
    body = saved[:12] + len(document).to_bytes(4, "little") + document + saved[16 + length : -32]
    assert said in refused(tmp_path / "m", body + hashlib.sha256(body).digest())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"before")
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "_write_array", fails)
    with pytest.raises(OSError, match="No space left"):
        machine.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
