"""What /proc tells of a process, in one file: this process tells what it should be."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from pgemu.errors import InputError
from pgemu.recording import snapshot
from pgemu.recording.snapshot import take

pytestmark = pytest.mark.same_with_checks

PAGE = os.sysconf("SC_PAGE_SIZE")
PRESENT = 1 << 63


class Stored(NamedTuple):
    maps: str
    smaps: str
    ranges: list[tuple[int, int]]
    entries: npt.NDArray[np.uint64]
    about: dict[str, Any]

    def entry(self, address: int) -> int | None:
        """The entry of an address, None where there is none."""
        before = 0
        for start, end in self.ranges:
            if start <= address < end:
                return int(self.entries[before + (address - start) // PAGE])
            before += (end - start) // PAGE
        return None


def stored(path: Path) -> Stored:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["about.json", "maps", "pagemap.ranges", "pagemap.u64", "smaps"]
        assert {one.compress_type for one in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        texts = [archive.read(name).decode() for name in ("maps", "smaps", "pagemap.ranges", "about.json")]
        entries = np.frombuffer(archive.read("pagemap.u64"), "<u8")
    ranges = [(int(start, 16), int(end, 16)) for start, end in map(str.split, texts[2].splitlines())]
    assert sum(end - start for start, end in ranges) == len(entries) * PAGE
    return Stored(texts[0], texts[1], ranges, entries, json.loads(texts[3]))


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


@pytest.fixture
def known() -> tuple[mmap.mmap, int]:
    """Eight pages of which the second and the fifth were written."""
    memory = mmap.mmap(-1, 8 * PAGE)
    memory[PAGE] = memory[4 * PAGE + 5] = 1
    return memory, address_of(memory)


def test_entries_are_those_of_the_mappings_in_their_order(tmp_path: Path, known: tuple[mmap.mmap, int]) -> None:
    _, address = known
    found = take(os.getpid(), str(tmp_path / "a.zip"))
    file = stored(tmp_path / "a.zip")
    mapped = [line.split() for line in file.maps.splitlines() if not line.endswith("[vsyscall]")]
    assert file.ranges == [tuple(int(one, 16) for one in line[0].split("-")) for line in mapped]
    present = [bool((file.entry(address + i * PAGE) or 0) & PRESENT) for i in range(8)]
    assert present == [False, True, False, False, True, False, False, False]
    assert found.about == file.about
    assert file.about["present"] == int((file.entries >> np.uint64(63)).sum())
    assert found.bytes == len(file.entries) * PAGE
    pfns = file.entries[file.entries & np.uint64(PRESENT) != 0] & np.uint64((1 << 55) - 1)
    assert file.about["pfns"] == bool(pfns.any())


def test_about_tells_whose_it_is(tmp_path: Path) -> None:
    take(os.getpid(), str(tmp_path / "a.zip"))
    about = stored(tmp_path / "a.zip").about
    assert about["pid"] == os.getpid()
    assert about["comm"] == Path("/proc/self/comm").read_text().strip()
    assert (about["kernel"], about["page_size"], about["skipped"]) == (os.uname().release, PAGE, [])
    assert about["date"].endswith("+00:00")


def test_of_a_huge_mapping_there_is_what_is_populated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, here 1 MiB: 2048 pages, of which the 1000th to 1002nd and the last are written."""
    memory = mmap.mmap(-1, 2048 * PAGE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    address = address_of(memory)
    for page in (1000, 1001, 1002, 2047):
        memory[page * PAGE] = 1
    monkeypatch.setattr(snapshot, "_MANY", 1 << 20)
    take(os.getpid(), str(tmp_path / "a.zip"))
    file = stored(tmp_path / "a.zip")
    if file.about["skipped"]:
        pytest.skip("PAGEMAP_SCAN needs Linux 6.7")
    inside = [
        ((max(start, address) - address) // PAGE, (min(end, address + 2048 * PAGE) - address) // PAGE)
        for start, end in file.ranges
        if start < address + 2048 * PAGE and end > address
    ]
    assert inside == [(1000, 1003), (2047, 2048)]
    assert (file.entry(address + 1001 * PAGE) or 0) & PRESENT


def test_where_the_kernel_cannot_scan_huge_mappings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, 2048 * PAGE)
    memory[0] = 1
    monkeypatch.setattr(snapshot, "_MANY", 1 << 20)
    monkeypatch.setattr(snapshot, "_PAGEMAP_SCAN", 0xC0606699)  # which no kernel has
    take(os.getpid(), str(tmp_path / "a.zip"))
    file = stored(tmp_path / "a.zip")
    ends = [tuple(int(end, 16) for end in one.split("-")) for one in file.about["skipped"]]
    assert any(start <= address_of(memory) < end for start, end in ends)
    assert file.entry(address_of(memory)) is None


def test_no_such_process_and_no_memory_are_told(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(InputError, match=f"^process {process.pid}: no such process$"):
        take(process.pid, str(tmp_path / "a.zip"))
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":
        with pytest.raises(InputError, match=r"^process 2: (it has no memory of its own|no permission)"):
            take(2, str(tmp_path / "a.zip"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^process 1: no permission to read its .*: run it as its user, or root$"):
        take(1, str(tmp_path / "a.zip"))


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.zip: cannot be written: No such file or directory$"):
        take(os.getpid(), str(tmp_path / "no" / "a.zip"))
