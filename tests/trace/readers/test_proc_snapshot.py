"""A process as /proc shows it: what its records make is what was there."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import pytest

from fuzzing import attacked, mutated, rounds
from pgemu.errors import InputError
from pgemu.experiments.process_machine import machine_of_processes
from pgemu.trace import Flag, Lowered, Operation, load
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from processes_run import outcomes, read_or_refused, run

CAPTURE = Path(__file__).parents[2] / "data" / "traces" / "proc-snapshot.zip"
MAPS = (
    "00400000-00402000 rw-p 00000000 00:00 0 \n7f0000000000-7f0000001000 r--p 00003000 fe:00 26723   /a b (deleted)\n"
)
PRESENT, SWAPPED, FILE, GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58


def packed(**members: str | bytes) -> bytes:
    """A zip file; "_" stands for "." in names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return file.getvalue()


def loaded(path: Path, data: str | bytes) -> Lowered:
    """A snapshot as a trace."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    found = load(path)
    assert found.kind == "process"
    assert found.accounting.balanced()
    found.records.check("made")
    return found


def rows(found: Lowered) -> list[tuple[Operation, int, int, int]]:
    """Operation, flags, address and length of each record."""
    records = found.records
    columns = (records.op, records.flags, records.address, records.length)
    return [(Operation(op), *rest) for op, *rest in zip(*(column.tolist() for column in columns), strict=True)]


@pytest.mark.same_with_checks
def test_maps_alone_are_areas_without_pages(tmp_path: Path) -> None:
    found = loaded(tmp_path / "maps", MAPS)
    assert rows(found) == [
        (Operation.MMAP, Flag.PRIVATE | Flag.READ | Flag.WRITE, 0x400000, 2 * PAGE_4K),
        (Operation.MMAP, Flag.PRIVATE | Flag.READ, 0x7F0000000000, PAGE_4K),
    ]
    assert "which pages are present is not in it" in found.notes


@pytest.mark.same_with_checks
def test_flags_of_smaps_are_advice_locks_and_kinds(tmp_path: Path) -> None:
    smaps = (
        "00400000-00600000 rw-p 00000000 00:00 0\nRss:  8 kB\nKernelPageSize:  4 kB\nVmFlags: rd wr hg lo dc nr \n"
        "00600000-00a00000 rw-s 00000000 00:0f 9 /dev/hugepages/x\nKernelPageSize: 2048 kB\nVmFlags: rd wr sh ht \n"
        "00a00000-00a01000 rw-s 00000000 00:01 7 /dev/mem\nVmFlags: rd wr sh pf io \n"
        "7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0                          [vdso]\nVmFlags: rd ex \n"
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    )
    found = loaded(tmp_path / "smaps", smaps)
    assert [(op, flags) for op, flags, _, _ in rows(found)] == [
        (Operation.MMAP, Flag.PRIVATE | Flag.READ | Flag.WRITE | Flag.NORESERVE),
        (Operation.ADVISE_HUGE, Flag.WRITE),
        (Operation.LOCK, Flag.LOCKED),
        (Operation.DONTFORK, 0),
        (Operation.MMAP, Flag.SHARED | Flag.READ | Flag.WRITE),
    ]
    assert found.files == (("hugetlb-2M", 4 << 20),)
    assert found.accounting.without_operation == {
        "areas of VM_PFNMAP, whose device is not known": 1,
        "areas of the kernel's own pages ([vdso], [vvar])": 1,
        "areas beyond user space": 1,
    }
    assert "which pages are present is not in it: 8 KiB are" in found.notes


@pytest.mark.same_with_checks
def test_what_pages_are_is_what_touches_them(tmp_path: Path) -> None:
    entries = [PRESENT | FILE, PRESENT, SWAPPED | 5, 0, GUARD, GUARD, PRESENT]
    data = packed(
        maps="00400000-00407000 r--p 00000000 fe:00 3 /x\n",
        pagemap_ranges="400000 407000\n",
        pagemap_u64=struct.pack("<7Q", *entries),
        about_json=json.dumps({"pid": 3, "comm": "x\n", "page_size": 4096}),
    )
    found = loaded(tmp_path / "z", data)
    assert [(op, flags, (address - 0x400000) // PAGE_4K) for op, flags, address, _ in rows(found)] == [
        (Operation.MMAP, Flag.PRIVATE | Flag.READ | Flag.WRITE, 0),  # pages were written that cannot be written now
        (Operation.GUARD_INSTALL, 0, 4),
        (Operation.HOST_FAULT, 0, 0),
        (Operation.HOST_FAULT, Flag.WRITE, 1),
        (Operation.HOST_FAULT, Flag.WRITE, 6),
        (Operation.PROTECT, Flag.READ, 0),
    ]
    assert found.accounting.without_operation["pages that are swapped out"] == 1
    assert "a snapshot of pid 3, comm x\\n" in found.notes


@pytest.mark.same_with_checks
def test_members_that_are_not_read_are_named(tmp_path: Path) -> None:
    found = loaded(tmp_path / "z", packed(maps=MAPS, a="", b="", c="", d=""))
    assert "not read: a, b, c and 1 more" in found.notes


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (packed(maps=MAPS, pagemap_u64=b""), "one of them is missing"),
        (packed(maps=MAPS, pagemap_ranges="400000 402000\n", pagemap_u64=bytes(8)), "ends at the page 0x401000"),
        (packed(maps=MAPS, pagemap_ranges="400000 401000\n", pagemap_u64=bytes(9)), "more entries than the ranges"),
        (packed(maps=MAPS, pagemap_ranges="x\n", pagemap_u64=b""), "expected START END in hexadecimal"),
        (packed(maps=MAPS, about_json="{"), "expected JSON"),
        (packed(maps=MAPS, about_json='{"page_size": 65536}'), "page_size '65536', expected 4096"),
        (packed(maps=MAPS + MAPS), "areas overlap at 0x400000"),
        (packed(maps="nothing\n"), "no mapping in it"),
        (packed(maps=MAPS)[:-30], "damaged zip archive"),
        (
            packed(maps=MAPS, mapz=MAPS).replace(b"mapz", b"maps"),
            "an archive with two members called 'maps', expected one",
        ),
        (packed(maps=MAPS, x="", y="").replace(b"y", b"x"), "an archive with two members called 'x'"),
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_line(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "z"
    path.write_bytes(data)
    with pytest.raises(InputError, match=complaint) as refused:
        load(path)
    assert str(refused.value).isprintable()


def test_a_captured_process_is_made_page_for_page() -> None:
    """Huge pages, guards, the zero page and Rss are those that the kernel told."""
    found = load(CAPTURE)
    machine, results = run(found, thp="madvise", buddy=64 << 20)
    told = outcomes(found, results)
    assert all(set(statuses) == {0} for op, statuses in told.items() if op is not Operation.HOST_FAULT)
    assert set(told[Operation.HOST_FAULT]) <= {256, 512}  # each page comes by a fault of its own
    with zipfile.ZipFile(CAPTURE) as archive:
        smaps = archive.read("smaps").decode()
        pagemap = struct.unpack(f"<{archive.getinfo('pagemap.u64').file_size // 8}Q", archive.read("pagemap.u64"))
    anonymous = sum(1 for entry in pagemap if entry & PRESENT and not entry & FILE)
    files = sum(1 for entry in pagemap if entry & PRESENT and entry & FILE)
    rss = sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Rss:")) // 4
    private_files = int(next(note for note in found.notes if "as the zero page" in note).split()[-1])
    # Of the pages that are not a file's one is the zero page; vDSO pages are in Rss and left out.
    vdso = found.accounting.without_operation["pages of areas of the kernel's own pages ([vdso], [vvar])"]
    assert (anonymous + files - 1, vdso, machine.check()) == (rss, 1, 0)
    from pgemu.objects.address_space import AddressSpace

    process = AddressSpace(machine, 0)
    assert process.rss == anonymous - 1 + files - vdso - private_files
    huge = sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("AnonHugePages:"))
    assert huge == 2 * 2048
    blocks = [address for op, _, address, _ in rows(found) if op is Operation.POPULATE]
    assert [process.walk(address)[-1].level for address in blocks] == [2, 2]
    assert all(address % PAGE_2M == 0 for address in blocks)


def test_without_room_for_huge_pages_the_same_pages_are_small() -> None:
    found = load(CAPTURE)
    machine = machine_of_processes(found)
    machine.run(found.records)
    from pgemu.objects.address_space import AddressSpace

    assert AddressSpace(machine, 0).rss > 1024


SMAPS = (
    MAPS.replace("\n", "\nRss: 8 kB\nVmFlags: rd wr lo \n") + "7f0000200000-7f0000400000 rw-s 0 00:0f 9\nVmFlags: ht \n"
)


@pytest.mark.same_with_checks
def test_fuzz_snapshots_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "maps": SMAPS.encode(),
        "pagemap_ranges": b"400000 402000\n7f0000000000 7f0000001000\n",
        "pagemap_u64": struct.pack("<3Q", PRESENT | 5, GUARD, PRESENT | FILE),
        "about_json": b'{"pid": 3, "page_size": 4096}',
    }
    read = 0
    for number, chance in rounds("snapshot", 0.0, 2000):
        with attacked("snapshot", number):
            which = chance.choice(("text", "file", *parts))
            if which == "text":
                data = mutated(chance, SMAPS.encode())
            elif which == "file":
                data = mutated(chance, packed(**parts))
            else:
                data = packed(**{**parts, which: mutated(chance, parts[which])})
            read += read_or_refused(monkeypatch, data, "proc-snapshot") is not None
    assert read > 300
