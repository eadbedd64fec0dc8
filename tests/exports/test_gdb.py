"""Cores for gdb: physical memory at the direct map, a root's tables at their virtual addresses, the same bytes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgemu import Config, InputError, Machine, open_image
from pgemu.exports import gdb as exported
from pgemu.exports.gdb import write_core
from pgemu.images.elf import DIRECT_MAP

M2, VA = 1 << 21, 0x7F00_0000_0000
BYTES = bytes(range(256)) * 16


class Scene:
    """An image of a machine: a process that maps 4 MiB, of which two pages have contents."""

    def __init__(self, folder: Path) -> None:
        machine = Machine(Config("pfnmap", pool=4 * M2, page_size=M2))
        self.gmem = machine.create_guest_memfd(2 * M2, shared=True)
        self.process = machine.create_process()
        self.process.mmap(self.gmem, VA)
        self.process.touch_many(range(VA, VA + M2, 4096))
        self.pfns = [self.gmem.pfn(offset) or 0 for offset in (0x3000, 0x5000)]
        for pfn in self.pfns:
            machine.write_frame(pfn, BYTES[pfn % 7 :] + BYTES[: pfn % 7])
        self.path = folder / "image.elf"
        machine.write_image(self.path)
        self.fmt = machine.host_format

    def write(self, path: Path, **options: Any) -> exported.Exported:
        with open_image(self.path) as image:
            return write_core(image, [(self.fmt, self.process.root)], path, **options)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def segments(path: Path) -> list[tuple[int, int, int, int]]:
    """Virtual address, physical address, bytes in the file and its offset of every PT_LOAD, read here."""
    data = path.read_bytes()
    at, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    found = []
    for i in range(count):
        kind, _, offset, virtual, physical, held = struct.unpack_from("<IIQQQQ", data, at + i * size)
        if kind == 1:
            assert offset + held <= len(data)
            found.append((virtual, physical, held, offset))
    return found


def read(path: Path, address: int, size: int) -> bytes | None:
    """Bytes at a virtual address."""
    for virtual, _, held, offset in segments(path):
        if virtual <= address and address + size <= virtual + held:
            return path.read_bytes()[offset + address - virtual :][:size]
    return None


def test_virtual_and_physical_addresses_lead_to_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    core = tmp_path / "core"
    done = scene.write(core)
    assert (done.segments, done.virtual, done.missing) == (2, 8192, M2 - 8192)
    with open_image(scene.path) as image:
        for offset, pfn in zip((0x3000, 0x5000), scene.pfns, strict=True):
            expected = image.read(pfn << 12, 4096)
            assert expected != bytes(4096)
            assert read(core, VA + offset, 4096) == read(core, DIRECT_MAP + (pfn << 12), 4096) == expected
        assert read(core, VA + 0x4000, 8) is None
        with open_image(core) as again:  # it is an image of the same memory
            assert again.roots == image.roots
            for start, end in image.ranges:
                assert again.read(start, end - start) == image.read(start, end - start)


def test_what_was_never_written_reads_as_zero_on_request(scene: Scene, tmp_path: Path) -> None:
    core = tmp_path / "core"
    done = scene.write(core, missing_as_zero=True)
    assert (done.virtual, done.missing) == (M2, M2 - 8192)
    assert read(core, VA + 0x4000, 4096) == bytes(4096)
    assert read(core, VA + M2 - 4096, 4096) == bytes(4096)
    assert read(core, VA + M2, 8) is None


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
def test_gdb_reads_both(scene: Scene, tmp_path: Path) -> None:
    core = tmp_path / "core"
    scene.write(core, missing_as_zero=True)
    places = [VA + 0x3000, DIRECT_MAP + (scene.pfns[0] << 12), VA + 0x4000, VA + M2]
    commands = [part for place in places for part in ("-ex", f"x/2gx {place:#x}")]
    done = subprocess.run(["gdb", "-batch", "-nx", "-c", core, *commands], capture_output=True, text=True, timeout=120)
    pfn = scene.pfns[0]
    words = struct.unpack("<QQ", (BYTES[pfn % 7 :] + BYTES[: pfn % 7])[:16])
    told = f"\t{words[0]:#018x}\t{words[1]:#018x}"
    assert f"{places[0]:#x}:{told}\n" in done.stdout
    assert f"{places[1]:#x}:{told}\n" in done.stdout
    assert f"{places[2]:#x}:\t{0:#018x}\t{0:#018x}\n" in done.stdout
    assert f"Cannot access memory at address {places[3]:#x}" in done.stderr


def test_more_ranges_than_a_core_can_have_are_refused(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported, "MOST_SEGMENTS", 5)
    with pytest.raises(InputError, match="2 ranges of virtual memory: expected at most 1, a segment each"):
        scene.write(tmp_path / "core")
    assert not (tmp_path / "core").exists()


def test_two_roots_at_the_same_addresses_are_refused(scene: Scene, tmp_path: Path) -> None:
    with open_image(scene.path) as image, pytest.raises(InputError, match=f"virtual address {VA + 0x3000:#x} is of"):
        write_core(image, [(scene.fmt, scene.process.root)] * 2, tmp_path / "core")
