"""Images: what others made is read as it lies in the file; what a machine writes is what it holds."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import pgemu
from pgemu.errors import InputError
from pgemu.images import image as image_module
from pgemu.images.image import Root, open_image, release_of
from pgemu.objects.machine import Config, Machine
from pgemu.tables.ranges import MappedRange, Summary, mapped_ranges
from pgemu.tables.walk import Kind, walk
from pgemu_kernels import words as W
from trees import core, write

M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000


# --------------------------------------------------------------------------- reading


def test_an_image_is_opened_from_the_package(tmp_path: Path) -> None:
    path = write(tmp_path / "raw", bytes(range(256)) * 16)
    with pgemu.open_image(path) as image:
        assert isinstance(image, pgemu.Image)
        assert image.ranges == [(0, PAGE)]
        assert image.read(3, 5) == bytes([3, 4, 5, 6, 7])
        assert image.words(8, 2).tolist() == [0x0F0E0D0C0B0A0908, 0x1716151413121110]
        assert not image.words(0, 4).flags.writeable
    with pytest.raises(ValueError, match="not in"):
        image.read(0, 1)
    with pytest.raises(ValueError, match="closed"):
        image.load(np.zeros(1, np.uint64))


@st.composite
def segment_lists(draw: st.DrawFn) -> list[tuple[int, bytes, int]]:
    """Segments that may overlap, touch, be shorter than a word, and have zeroes behind what the file holds."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        address = draw(st.integers(1, 60)) * draw(st.sampled_from([1, 8]))
        data = draw(st.binary(max_size=40))
        found.append((address, data, len(data) + draw(st.sampled_from([0, 0, 1, 8, 30]))))
    return found if any(data for _, data, _ in found) else [(8, b"12345678", 8)]


def model(segments: list[tuple[int, bytes, int]]) -> dict[int, int]:
    """Bytes by address: of overlapping segments the one that begins first counts, zeroes least."""
    memory: dict[int, int] = {}
    # The file has them one after another, so of those with one address the one that ends first comes first.
    for address, data, _ in sorted(segments, key=lambda s: (s[0], s[0] + len(s[1]))):
        for i, byte in enumerate(data):
            memory.setdefault(address + i, byte)
    for address, data, size in segments:
        for i in range(len(data), size if data else 0):
            memory.setdefault(address + i, 0)
    return memory


@given(segments=segment_lists(), first=st.integers(400, 420))
@settings(max_examples=50)
def test_reads_what_the_segments_say(
    tmp_path_factory: pytest.TempPathFactory, segments: list[tuple[int, bytes, int]], first: int
) -> None:
    expected = model(segments)
    path = write(tmp_path_factory.getbasetemp() / "image", core(segments, first=first))
    try:
        with open_image(path) as image:
            covered = [address for start, end in image.ranges for address in range(start, end)]
            assert covered == sorted(expected)
            for start, end in image.ranges:
                assert image.read(start, end - start) == bytes(expected[a] for a in range(start, end))
            addresses = np.arange(0, 600, dtype=np.uint64)
            held = image.holds(addresses)
            assert held.tolist() == [all(a + i in expected for i in range(8)) for a in range(600)]
            words = [
                int.from_bytes(bytes(expected[a + i] for i in range(8)), "little") for a in addresses[held].tolist()
            ]
            assert image.load(addresses[held]).tolist() == words
            for address, word in zip(addresses[held].tolist(), words, strict=True):
                assert image.words(address, 1).tolist() == [word]
            for address in addresses[~held][:50]:
                with pytest.raises(ValueError, match="not in"):
                    image.load(address[None])
                with pytest.raises(ValueError, match="not in"):
                    image.words(int(address), 1)
    finally:
        path.unlink()


@pytest.mark.same_with_checks
def test_more_segments_than_the_header_has_room_for(tmp_path: Path) -> None:
    segments = [(i * 64, struct.pack("<Q", i), 8) for i in range(66_000)]
    with open_image(write(tmp_path / "core", core(segments, many=True))) as image:
        assert len(image.ranges) == 66_000
        addresses = np.arange(66_000, dtype=np.uint64) * np.uint64(64)
        assert np.array_equal(image.load(addresses), np.arange(66_000))
        assert image.words(65_999 * 64, 1).tolist() == [65_999]


def test_a_large_image_with_holes(tmp_path: Path) -> None:
    """64 GiB, of which the file system stores a page."""
    path = tmp_path / "raw"
    with path.open("wb") as file:
        file.truncate(64 << 30)
        file.seek(48 << 30)
        file.write(struct.pack("<Q", 7))
    with open_image(path) as image:
        assert image.load(np.array([0, 48 << 30, (64 << 30) - 8], np.uint64)).tolist() == [0, 7, 0]
        assert not image.holds(np.array([(64 << 30) - 7], np.uint64)).any()


def note(name: bytes, kind: int, data: bytes) -> bytes:
    padded = name.ljust(len(name) + 3 & ~3, b"\0")
    return struct.pack("<III", len(name), len(data), kind) + padded + data.ljust(len(data) + 3 & ~3, b"\0")


def test_roots_of_qemu_and_of_a_crash_kernel(tmp_path: Path) -> None:
    registers = (
        struct.pack("<II18Q", 1, 432, *range(18)) + bytes(10 * 24) + struct.pack("<5Q", 0, 0, 0, 0x1AB000, 0x6F0)
    )
    five = registers[:-8] + struct.pack("<Q", 1 << 12)
    info = b"OSRELEASE=6.18\nSYMBOL(init_top_pgt)=ffffffff82a10000\nNUMBER(phys_base)=-16777216\n"
    notes = note(b"CORE\0", 1, bytes(336)) + note(b"QEMU\0", 0, registers) + note(b"QEMU\0", 0, five)
    notes += note(b"VMCOREINFO\0", 0, info) + struct.pack("<III", 5, 1 << 30, 0)  # the last one is not whole
    with open_image(write(tmp_path / "core", core([(0, bytes(8), 8)], note=notes))) as image:
        assert image.roots == [
            ("cpu:0", "x86-64", 0x1AB000),
            ("cpu:1", "x86-64-5", 0x1AB000),
            ("kernel", "x86-64", 0x1A10000),
        ]
        last = 64 + 2 * 56 + len(notes) - 12
        assert image.problems == [
            f"the note at {last:#x} ends at {last + 20 + (1 << 30):#x}, its segment at {last + 12:#x}: it and what "
            "follows are left out"
        ]
        assert (image.kernel, image.configuration) == ("6.18", "")


@pytest.mark.parametrize(
    ("release", "chosen"),
    [
        ("6.12.107+deb13-amd64", "6.12"), ("6.13.0", "6.12"), ("7.3.4", "7.3"), ("8.0", "7.3"), ("5.4.0-42", "6.1"),
        ("6", None), ("", None),
    ],
)  # fmt: skip
def test_the_kernel_is_the_last_known_one(tmp_path: Path, release: str, chosen: str | None) -> None:
    info = note(b"VMCOREINFO\0", 0, f"OSRELEASE={release}\nPAGESIZE=4096\n".encode())
    with open_image(write(tmp_path / "core", core([(0, bytes(8), 8)], note=info))) as image:
        assert image.kernel == release
        assert release_of(image, ["6.1", "6.12", "7.3"]) == chosen


@pytest.mark.parametrize("bit", [32, 47, 51])
def test_sme_of_a_crash_kernel(tmp_path: Path, bit: int) -> None:
    for text, mask in ((f"NUMBER(sme_mask)={1 << bit}\n", 1 << bit), ("NUMBER(sme_mask)=0\n", 0), ("", 0)):
        info = note(b"VMCOREINFO\0", 0, f"OSRELEASE=6.18\n{text}NUMBER(phys_base)=0\n".encode())
        with open_image(write(tmp_path / "core", core([(0, bytes(8), 8)], note=info))) as image:
            assert image.sme_mask == mask


@pytest.mark.parametrize("text", ["3", "-1", "4096", str(1 << 52), "0x800000000000", "none"])
def test_an_sme_mask_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    info = note(b"VMCOREINFO\0", 0, f"NUMBER(sme_mask)={text}\n".encode())
    path = write(tmp_path / "core", core([(0, bytes(8), 8)], note=info))
    with pytest.raises(InputError, match=f"sme_mask is '{text}': expected one of bits 32 to 51"):
        open_image(path)


@pytest.mark.parametrize(
    ("notes", "complaint"),
    [
        (note(b"pgemu", 1, b"kernel x86-64 0x1x00\n"), "pgemu's note has 'kernel x86-64 0x1x00': expected a name, a"),
        (note(b"pgemu", 1, b"\x1b[2J x86-64 0x1000\n"), r"pgemu's note has '\x1b[2J x86-64 0x1000': expected a name"),
        (note(b"pgemu", 1, b"kernel x86-64 0x" + b"1" * 17), "pgemu's note has 'kernel x86-64 0x11111111111111111'"),
        (
            note(b"VMCOREINFO", 0, b"NUMBER(sme_mask)=" + b"9" * 9999),
            f"VMCOREINFO's sme_mask is '{'9' * 80}': expected",
        ),
        (note(b"VMCOREINFO", 0, bytes((1 << 20) + 1)), "VMCOREINFO's note of 1048577 bytes: expected at most 1048576"),
        (note(b"pgemu", 0, bytes((1 << 20) + 1)), "pgemu's note of 1048577 bytes: expected at most 1048576"),
        (bytes((16 << 20) + 1), "notes of 16777217 bytes: expected at most 16777216"),
    ],
    ids=["address", "escape", "wide", "digits", "long", "long of pgemu", "many"],
)
def test_notes_that_cannot_be_are_refused(tmp_path: Path, notes: bytes, complaint: str) -> None:
    path = write(tmp_path / "core", core([(0, bytes(8), 8)], note=notes))
    with pytest.raises(InputError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: {complaint}")
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("info", "left_out"),
    [
        (b"SYMBOL(init_top_pgt)=g\nNUMBER(phys_base)=0\n", "init_top_pgt 'g' and phys_base '0'"),
        (b"SYMBOL(swapper_pg_dir)=ffffffff82a10000\nNUMBER(phys_base)=1e9\n", "phys_base '1e9'"),
        (b"SYMBOL(init_top_pgt)=0\nNUMBER(phys_base)=0\n", "init_top_pgt '0' and phys_base '0'"),
        (b"SYMBOL(init_top_pgt)=ffffffff82a10000\nNUMBER(phys_base)=" + b"7" * 5000, f"phys_base '{'7' * 80}'"),
    ],
)
def test_what_of_notes_is_not_understood_is_said(tmp_path: Path, info: bytes, left_out: str) -> None:
    notes = note(b"VMCOREINFO\0", 0, info) + note(b"QEMU\0", 0, bytes(8)) + b"rest"
    with open_image(write(tmp_path / "core", core([(0, bytes(8), 8)], note=notes))) as image:
        assert image.roots == []
        rest, kernel, cpu = image.problems
    assert kernel.startswith("VMCOREINFO's init_top_pgt ")
    assert kernel.endswith(f"{left_out} are no physical address: the kernel's root is left out")
    assert cpu == "QEMU's note of 8 bytes has no CR3: it is left out"
    assert rest == f"4 bytes at {64 + 2 * 56 + len(notes) - 4:#x}, behind the last note, are left out"


def test_of_roots_with_one_name_the_first_counts_and_the_other_is_named(tmp_path: Path) -> None:
    notes = note(b"pgemu\0", 1, b"vm:0 ept 0x1000\nvm:0 ept 0x1000\nvm:0 npt 0x2000\n")
    segments = [(0, bytes(PAGE), PAGE), ((1 << 64) - 8, b"12345678", 64)]
    with open_image(write(tmp_path / "core", core(segments, note=notes))) as image:
        assert image.problems == [
            "root vm:0 0x2000: another of its name is 0x1000",
            "1 PT_LOAD without a physical address: left out",
        ]


def test_notes_and_headers_that_overlap_do_not_multiply(tmp_path: Path) -> None:
    """A thousand segments of notes that are the same 64 KiB; more program headers than a core can need."""
    notes = note(b"x", 0, bytes(1 << 16))
    at = 64 + 1000 * 56
    headers = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), 0, 4) * 1000
    path = write(tmp_path / "core", core([(0, bytes(8), 8)] * 1000)[:64] + headers + notes)
    with pytest.raises(InputError, match=f"notes of {1000 * len(notes)} bytes: expected at most 16777216"):
        open_image(path)
    count = (1 << 20) + 1
    many = bytearray(core([(0, bytes(8), 8)], many=True))
    struct.pack_into("<I", many, 64 + 56 + 44, count)
    write(path, bytes(many))
    with path.open("r+b") as file:
        file.truncate(64 + count * 56)
    with pytest.raises(InputError, match=f"{count} program headers: expected at most 1048576"):
        open_image(path)


GOOD = core([(0x1000, bytes(PAGE), PAGE), (0x8000, bytes(PAGE), PAGE)])
BAD = {
    "short header": (GOOD[:40], "40 bytes: expected an ELF header of 64"),
    "32 bits": (GOOD[:4] + b"\1" + GOOD[5:], "ELF class 1: expected 64-bit (2)"),
    "big-endian": (GOOD[:5] + b"\2" + GOOD[6:], "ELF byte order 2: expected little-endian (1)"),
    "a program": (core([(0, bytes(8), 8)], kind=2), "ELF type 2: expected a core (4)"),
    "no segments": (core([]), "no PT_LOAD with memory: expected a core of physical memory"),
    "headers cut off": (GOOD[:100], "program headers end at 0xb0, the file at 0x64: file truncated?"),
    "memory cut off": (
        GOOD[:-1], "PT_LOAD of physical address 0x8000 ends at 0x20b0, the file at 0x20af: file truncated?"
    ),
    "many headers, no section": (
        core([(0, bytes(8), 8)], count=0xFFFF),
        "no section header for the number of program headers: expected one, file truncated?",
    ),
    "notes cut off": (
        core([(0, bytes(8), 8)], note=b"notes")[:180],
        "PT_NOTE ends at 0xb5, the file at 0xb4: file truncated?",
    ),
    "a process": (
        core([(0, bytes(8), 8), (0, bytes(16), 16)]),
        "every PT_LOAD is at physical address 0: expected a core of physical memory, not of a process",
    ),
    "text": (b"not an image\n", "neither an ELF core nor raw memory: 13 bytes, expected a multiple of 4096"),
    "compressed": (b"KDUMP   " + bytes(PAGE), "a compressed kdump: expected an uncompressed ELF core or raw memory"),
    "empty": (b"", "empty: expected an ELF core or raw memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_image(what: str, tmp_path: Path) -> None:
    data, complaint = BAD[what]
    path = write(tmp_path / "image", data)
    with pytest.raises(InputError) as error:
        open_image(path)
    assert str(error.value) == f"{path}: {complaint}"


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, complaint in (
        (tmp_path / "nothing", "cannot be opened: No such file or directory"),
        (tmp_path, "not a regular file: expected an ELF core or raw memory"),
        (pipe, "not a regular file: expected an ELF core or raw memory"),
    ):
        with pytest.raises(InputError) as error:
            open_image(path)
        assert str(error.value) == f"{path}: {complaint}"


def test_a_given_format_is_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "image", GOOD.ljust(4 * PAGE, b"\0"))
    assert open_image(path, "raw").ranges == [(0, 4 * PAGE)]
    with pytest.raises(InputError, match="no ELF header"):
        open_image(write(tmp_path / "zeroes", bytes(PAGE)), "elf")
    with pytest.raises(ValueError, match=r"expected (None or )?one of elf, raw"):
        open_image(path, "lime")  # type: ignore[arg-type]


@given(data=st.binary(max_size=300))
@settings(max_examples=60)
def test_damage_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Any bytes in place of a core's end or beginning: an image or an InputError, nothing else."""
    path = tmp_path_factory.getbasetemp() / "image"
    for damaged in (GOOD[:64] + data, GOOD[: 176 - len(data) % 120] + data, GOOD[:16] + data + GOOD[16 + len(data) :]):
        write(path, damaged)
        complaint = ""
        try:
            with open_image(path) as image:
                assert all(start < end for start, end in image.ranges)
                assert len(image.read(image.ranges[0].start, 1)) == 1
        except InputError as error:
            complaint = str(error)
        finally:
            path.unlink()
        assert "\n" not in complaint


# --------------------------------------------------------------------------- writing


def everything(memory: Any, machine: Machine) -> list[tuple[str, list[MappedRange], Summary]]:
    """What every root of a machine maps, as found in some memory."""
    found = []
    for root in machine.roots():
        fmt = machine.stage2_format if root.name.startswith("vm") else machine.host_format
        summary = Summary()
        ranges = list(mapped_ranges(memory, fmt, root.address, summary))
        assert not summary.problem_counts
        found.append((root.name, ranges, summary))
    return found


@pytest.fixture(params=["elf", "raw"])
def form(request: pytest.FixtureRequest) -> Iterator[Any]:
    return request.param


small = st.integers(0, 1023)


@given(
    design=st.sampled_from(["restructure", "pfnmap"]),
    kernel=st.sampled_from(["6.12", "7.3"]),
    stage2=st.sampled_from(["npt", "ept"]),
    hvo=st.booleans(),
    seed=st.integers(0, 5),
    shared=st.lists(small, max_size=6),
    host=st.lists(small, max_size=12),
    guest=st.lists(small, max_size=12),
    contents=st.dictionaries(small, st.binary(min_size=1, max_size=8), max_size=3),
    form=st.sampled_from(["elf", "raw"]),
)
@settings(max_examples=12)
def test_an_image_holds_what_the_machine_holds(
    tmp_path_factory: pytest.TempPathFactory, design: Any, kernel: str, stage2: Any, hvo: bool, seed: int,
    shared: list[int], host: list[int], guest: list[int], contents: dict[int, bytes], form: Any,
) -> None:  # fmt: skip
    machine = Machine(Config(design, pool=2 * M2, page_size=M2, kernel=kernel, stage2=stage2, hvo=hvo, seed=seed))
    gmem = machine.create_guest_memfd(2 * M2)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    vm.bind(gmem, 0)
    process.mmap(gmem, VA)
    for page in shared:
        gmem.convert(page * PAGE, PAGE, shared=True)
    for page in host:
        process.touch(VA + page * PAGE)
    for page in guest:
        vm.touch(page * PAGE)
    for page, data in contents.items():
        machine.write_frame(machine.register(W.R_POOL_BASE) + page, data)
    path = tmp_path_factory.getbasetemp() / "image"
    machine.write_image(path, form)
    try:
        with open_image(path) as image:
            assert everything(image, machine) == everything(machine, machine)
            assert (
                sum(r.length for name, ranges, _ in everything(image, machine) if name == "kernel" for r in ranges) > 0
            )
            for page, data in contents.items():
                address = machine.register(W.R_POOL_BASE) + page << 12
                assert image.read(address, PAGE) == data.ljust(PAGE, b"\0")
            used = np.flatnonzero(machine.arrays.ram.reshape(-1, 512).any(axis=1)).astype(np.uint64) << np.uint64(12)
            assert image.holds(used).all()
            for address in used.tolist():
                assert np.array_equal(image.words(address, 512), machine.words(address, 512))
            if form == "elf":
                assert image.roots == machine.roots()
    finally:
        path.unlink()


def test_frames_used_here_and_there_become_few_ranges(tmp_path: Path) -> None:
    """With a seed, frames are scattered: ranges are joined over the narrowest gaps until there are 1024."""
    machine = Machine(Config("restructure", pool=64 * M2, page_size=M2, seed=9, hvo=True))
    gmem = machine.create_guest_memfd(64 * M2, shared=True)
    process = machine.create_process()
    process.mmap(gmem, VA)
    process.touch_many(np.arange(VA, VA + 64 * M2, M2, dtype=np.uint64))
    for page in range(0, 64 * 512, 512):
        machine.write_frame(machine.register(W.R_POOL_BASE) + page, b"x")
    machine.write_image(tmp_path / "core")
    with open_image(tmp_path / "core") as image:
        assert len(image.ranges) <= 1024
        assert everything(image, machine) == everything(machine, machine)
        assert image.read(machine.register(W.R_POOL_BASE) + 512 << 12, 2) == b"x\0"
        held = image.ranges[-1].start
        assert held >= machine.register(W.R_POOL_BASE) << 12  # no range spans both zones


def test_an_image_is_sparse(tmp_path: Path) -> None:
    machine = Machine(Config("pfnmap", pool=2 << 30))
    machine.write_frame(machine.register(W.R_POOL_BASE) + 1000, b"contents")
    machine.write_image(tmp_path / "raw", "raw")
    about = (tmp_path / "raw").stat()
    assert about.st_size == (machine.register(W.R_POOL_BASE) + 1001) * PAGE
    assert about.st_blocks * 512 < 8 << 20


def test_nothing_is_left_of_an_image_that_could_not_be_written(tmp_path: Path, form: Any) -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    path = write(tmp_path / "image", b"as it was")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            machine.write_image(path, form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"as it was"


def test_nothing_is_left_of_an_image_when_interrupted(
    tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    written: list[int] = []

    def interrupted(*_: Any) -> None:
        written.append(len(list(tmp_path.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(image_module, "_write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.write_image(tmp_path / "image", form)
    assert written == [1]
    assert list(tmp_path.iterdir()) == []


def test_an_image_replaces_a_file_and_keeps_its_mode(tmp_path: Path) -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    path = write(tmp_path / "image", b"old")
    path.chmod(0o604)
    machine.write_image(path)
    assert path.stat().st_mode & 0o777 == 0o604  # the umask's, of a new file: test_whole_file.py
    assert open_image(path).roots == machine.roots()
    with pytest.raises(OSError, match="No such file"):
        machine.write_image(tmp_path / "nowhere" / "image")
    with pytest.raises(ValueError, match=r"expected (None or )?one of elf, raw"):
        machine.write_image(path, "lime")  # type: ignore[arg-type]


def test_the_machine_is_memory(tmp_path: Path) -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    base = machine.register(W.R_POOL_BASE) << 12
    machine.write_frame(base >> 12, struct.pack("<QQ", 5, 6))
    assert machine.words(base, 3).tolist() == [5, 6, 0]
    assert machine.load(np.array([base + 8, base + PAGE], np.uint64)).tolist() == [6, 0]
    assert machine.holds(np.array([0, base, base + 2 * M2, 1 << 60], np.uint64)).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="read-only"):
        machine.words(PAGE, 1)[0] = 1
    for address, count in ((4, 1), (base + 2 * M2, 1), (-8, 1), (0, -1)):
        with pytest.raises(ValueError, match="expected"):
            machine.words(address, count)
    with pytest.raises(ValueError, match="expected"):
        machine.load(np.array([base + 2 * M2], np.uint64))


def test_reading_an_image_loads_no_compiler(tmp_path: Path) -> None:
    write(tmp_path / "core", GOOD)
    code = (
        "import sys, pgemu, pgemu.tables.walk; "
        "pgemu.open_image(sys.argv[1]); print(*{'numba', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "core"], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_page_tables_and_their_roots_are_in_the_image(tmp_path: Path) -> None:
    machine = Machine(Config(seed=3))
    # A root of two tables in a row, and one of a single table.
    tables = [machine.create_page_table(name) for name in ("arm64-s2", "ept")]
    for table in tables:
        assert table.map_range(0x80_4000_0000, 0x1000, 1 << 22).status == 0
    machine.write_image(tmp_path / "image")
    with open_image(tmp_path / "image") as image:
        named = {root.name: root for root in image.roots}
        for i, table in enumerate(tables):
            assert named[f"table:{i}"] == Root(f"table:{i}", table.format.name, table.root)
            steps = walk(image, table.format, table.root, 0x80_4000_5000)
            assert [tuple(step[:3]) for step in steps] == table.walk(0x80_4000_5000)
            assert steps[-1].kind == Kind.LEAF
