"""Machines in shared memory: what stays as it was, who may have which name, what other processes read."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from c_programs import INCLUDE, PACKAGE, compiled
from pgemu import Config, Machine
from pgemu.machine.snapshot import layout_digest
from pgemu.version import version
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import FORMATS

EXAMPLE = PACKAGE / "examples" / "c" / "walk_shared.c"
FOLDER = Path("/dev/shm")
M2, G1 = 1 << 21, 1 << 30
CHILD = """
import os, sys
from pgemu import Config, Machine
shared = Machine(Config("pfnmap", pool=1 << 21, page_size=1 << 21)).share(sys.argv[1], reserve=False)
print("ready", flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody has, and what is left of it is taken away."""
    found = f"pgemu-test-{os.getpid()}"
    assert not (FOLDER / found).exists()
    yield found
    (FOLDER / found).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(EXAMPLE, tmp_path_factory.mktemp("c") / "walk_shared", "-std=c99")


def small(**fields: Any) -> Machine:
    return Machine(Config("pfnmap", pool=8 * M2, page_size=M2, **fields))


def walk(walker: Path, name: str, root: str, addresses: Any) -> list[tuple[int, int, int]]:
    """Status, level and physical address of each, as the C program says."""
    text = "".join(f"{int(address):x}\n" for address in addresses)
    done = subprocess.run([walker, f"/{name}", root], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(int(status), int(level), int(physical, 16)) for status, level, physical in lines]


def told(translation: Any) -> list[tuple[int, int, int]]:
    columns = (translation.status, translation.level, translation.physical)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def some_addresses(machine: Machine, random: np.random.Generator) -> Any:
    """Addresses that are mapped, near what is mapped, and anything."""
    near = random.integers(0, 5 * G1, 300, dtype=np.uint64)
    far = random.integers(0, 1 << 64, 50, dtype=np.uint64, endpoint=False) >> random.integers(
        0, 30, 50, dtype=np.uint64
    )
    return np.concatenate([near, far, G1 + random.integers(0, 8 * M2, 300, dtype=np.uint64)])


# --------------------------------------------------------------------------- other processes


def test_a_c_program_walks_every_root_as_translate_does(walker: Path, name: str) -> None:
    machine, random = small(frames=1 << 14), np.random.default_rng(1)
    gmem = machine.create_guest_memfd(8 * M2, shared=True)
    process, vm = machine.create_process(), machine.create_vm(protected=True)
    assert process.mmap(gmem, G1).status == vm.bind(gmem, G1).status == 0
    process.touch_many(G1 + random.integers(0, 8 * M2, 500, dtype=np.uint64), write=True)
    vm.touch_many(G1 + random.integers(0, 8 * M2, 500, dtype=np.uint64))
    tables = {}
    with machine.share(name):
        for i, form in enumerate(FORMATS):  # tables that come after it are listed, too
            tables[f"table:{i}"] = table = machine.create_page_table(form)
            table.map_range(G1, 0x7_4000_0000, 3 * M2 + 8192)
            table.map_range(2 * G1, 0x8_0000_0000, G1 + M2)
            table.map_range(4 * G1 - 4096, 4096, 4096)
            table.unmap(G1 + 4096, 4096)
        listed = subprocess.run([walker, name], capture_output=True, text=True, timeout=60).stdout
        roots = {root.name: root for root in machine.roots()}
        assert listed.splitlines() == [f"{r.name} {r.format} {r.address:#x}" for r in roots.values()]
        owners: dict[str, Any] = {**tables, "process:0": process, "vm:0": vm.stage2()}
        for root, owner in owners.items():
            addresses = some_addresses(machine, random)
            expected = (
                told(owner.translate(addresses))
                if root != "vm:0"
                else told(machine_walk(machine, roots[root].address, addresses))
            )
            assert walk(walker, name, root, addresses) == expected, root
            assert sum(status == 0 for status, _, _ in expected) > 20


def machine_walk(machine: Machine, root: int, addresses: Any) -> Any:
    from pgemu import translate
    from pgemu_kernels import words as W

    return translate(machine, machine.register(W.R_STAGE2_FORMAT), root, addresses)


@pytest.mark.parametrize("bracketed", [True, False])
def test_walks_find_what_was_there_at_one_moment_while_a_thread_edits(
    walker: Path, name: str, bracketed: bool, tmp_path: Path
) -> None:
    """Tables come and go, leaves become large and small: each walk gives nothing, or one of the two places."""
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2, frames=1 << 13))
    table, stop, rounds = machine.create_page_table("x86-64"), threading.Event(), [0]
    places = (0x10_0000_0000, 0x20_0000_0000)
    with machine.share(name, reserve=False) as shared:

        def once() -> None:
            for place in places:
                assert table.map_range(0, place, 4 * M2, max_level=1 if rounds[0] % 2 else 2).status == 0
                assert table.unmap(0, 4 * M2).status == 0

        def edit() -> None:
            while not stop.is_set():
                rounds[0] += 1
                if bracketed:
                    with shared.edit():
                        once()
                else:
                    once()

        thread = threading.Thread(target=edit)
        thread.start()
        try:
            addresses = np.random.default_rng(2).integers(0, 4 * M2, 100_000, dtype=np.uint64)
            found = walk(walker, name, "table:0", addresses)
        finally:
            stop.set()
            thread.join()
    assert len(found) == 100_000
    assert rounds[0] > 10
    for address, (status, _, physical) in zip(addresses.tolist(), found, strict=True):
        assert status in (0, 1, 100)
        assert status != 0 or physical in {place + address for place in places}, hex(address)
    if bracketed:  # at the end of an edit() nothing is mapped
        assert {status for status, _, _ in found} <= {1, 100}
    else:
        assert {status for status, _, _ in found} >= {0, 1}


def test_walks_of_shared_memory_by_the_example_count_how_they_ended(walker: Path, name: str) -> None:
    machine = small()
    machine.create_page_table("npt").map_range(0, 0, G1 // 2)
    with machine.share(name, reserve=False):
        done = subprocess.run([walker, name, "table:0", "1000", hex(G1 // 1000)], capture_output=True, text=True)
    assert done.stdout == "0 501\n1 499\n"  # 500 * 1,073,741 is below 2 ** 29, where the last mapped page ends


def test_nothing_that_a_segment_holds_leads_out_of_it(name: str, tmp_path: Path) -> None:
    source = Path(__file__).parent / "damaged_shared.c"
    program = compiled(source, tmp_path / "damaged", "-std=c99", "-g", "-fsanitize=address,undefined",
                       "-fno-sanitize-recover=all")  # fmt: skip
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    machine.create_page_table("ept").map_range(G1, 0, 4 * M2)
    machine.create_page_table("amd-v1").map_range(G1, 0, 4 * M2)
    with machine.share(name, reserve=False):
        done = subprocess.run([program, name, "20000", "7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    opened, walks, ok = map(int, done.stdout.split())
    assert opened > 5000
    assert walks > 10_000
    assert ok > 100


def test_the_header_compiles_as_cpp(tmp_path: Path) -> None:
    source = tmp_path / "walk_shared.cpp"
    source.write_text(EXAMPLE.read_text())
    compiled(source, tmp_path / "walk", "-std=c++11", compiler="g++")


def test_the_header_s_words_are_those_of_the_segment(name: str) -> None:
    text = (INCLUDE / "pgemu_shared.h").read_text()
    words = {found: int(number) for found, number in re.findall(r"PGEMU_WORD_(\w+) = (\d+),[ ]+/\*", text)}
    assert len(words) == text.count("    PGEMU_WORD_")  # each has a comment
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    tables = [machine.create_page_table("ept") for _ in range(3)]
    with machine.share(name, reserve=False) as shared:
        header = np.fromfile(FOLDER / name, np.uint64, 64)
        before = int(header[words["WRITTEN"]])
        assert header[words["MAGIC"]].tobytes() == b"pgemuSHM"
        assert header[[words["VERSION"], words["HEADER"], words["SIZE"]]].tolist() == [1, 64 * 8, shared.size]
        assert header[[words["STATE"], words["SEQUENCE"], words["ONE"]]].tolist() == [1, shared.sequence, 1]
        assert header[words["OWNER"]] == os.getpid()
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        assert header[words["BEGAN"]] == int(started)
        assert header[words["DIGEST"]] == int(layout_digest(), 16)
        arrays = header[words["ARRAYS"] :][:12].reshape(4, 3)
        assert arrays[:, 1:].tolist() == [[array.size, array.itemsize] for array in machine.arrays]
        assert header[words["GUEST"] + 1] == M2
        assert header[words["FORMATS"] + 3] == machine.register(W.R_FORMATS)
        assert header[words["SOURCES"] + 2] > 0
        assert header[words["TABLES"] + 3 :][:2].tolist() == [3, 3]
        assert header[words["TEXT"] :][:8].tobytes().rstrip(b"\0").decode() == version()
        tables.append(machine.create_page_table("ept"))
        assert np.fromfile(FOLDER / name, np.uint64, 64)[words["WRITTEN"]] == before + 1
        assert shared.sequence == header[words["SEQUENCE"]] + 2


def test_what_is_no_segment_is_told(walker: Path, name: str) -> None:
    def said(root: str = "") -> str:
        return subprocess.run([walker, name, *filter(None, [root])], capture_output=True, text=True).stderr.strip()

    assert said() == f"{name}: No such file or directory"
    (FOLDER / name).write_bytes(bytes(8192))
    assert said() == f"{name}: no pgemu machine in it, or one that is still being put there"
    (FOLDER / name).write_bytes(b"x")
    assert said() == f"{name}: no pgemu machine in it, or one that is still being put there"
    words = np.zeros(1024, np.uint64)
    words[:2] = int.from_bytes(b"pgemuSHM", "little"), 2
    (FOLDER / name).write_bytes(words.tobytes())
    assert said() == f"{name}: a machine in another version of the layout"
    words[1] = 1
    (FOLDER / name).write_bytes(words.tobytes())
    assert said() == f"{name}: damaged: its header says what cannot be"
    (FOLDER / name).unlink()
    with small().share(name, reserve=False):
        assert said("table:7") == "table:7: no such root"


# --------------------------------------------------------------------------- the machine


def test_the_machine_goes_on_as_one_that_is_not_shared(name: str, tmp_path: Path) -> None:
    """Arrays, views and objects stay what they are, and so do copies and files of it."""
    twins = [small(), small()]
    vms = []
    for machine in twins:
        gmem, vm = machine.create_guest_memfd(8 * M2), machine.create_vm(protected=True)
        vm.bind(gmem, 0)
        vm.touch_many(range(0, 4 * M2, 4096))
        machine.write_frame(gmem.pfn(0) or 0, b"before")
        vms.append((gmem, vm))
    arrays, view = twins[0].arrays, twins[0].arrays.ram[512:1024]
    shared = twins[0].share(name)
    assert twins[0].arrays is arrays
    for machine, (gmem, vm) in zip(twins, vms, strict=True):
        machine.write_frame(gmem.pfn(0) or 0, b"after", offset=10)
        gmem.convert(M2, 4096, shared=True)
        vm.touch_many(range(0, 8 * M2, 4096))
        assert machine.check() == 0
    assert twins[0].statistics == twins[1].statistics
    for one, other in zip(*(machine.arrays for machine in twins), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(view, twins[1].arrays.ram[512:1024])
    twins[0].save(tmp_path / "machine")
    for machine in (twins[0].copy(), Machine.open(tmp_path / "machine")):
        for one, other in zip(machine.arrays, arrays, strict=True):
            assert np.array_equal(one, other)
    shared.close()
    vms[0][1].touch(0)  # it goes on
    assert twins[0].check() == 0
    with twins[0].share(name, reserve=False) as again:  # as often as one likes
        assert twins[0].check() == 0
        assert not again.closed


def test_a_segment_without_a_reserve_takes_what_is_used(name: str) -> None:
    machine = small()
    with machine.share(name, reserve=False) as shared:
        assert (FOLDER / name).stat().st_blocks * 512 < shared.size // 10
        machine.create_page_table("ept").map_range(0, 0, M2)
        copy = machine.copy()
        assert (FOLDER / name).stat().st_blocks * 512 < shared.size // 10
    assert copy.page_tables[0].translate([0]).status.tolist() == [0]


def test_sequences_move_with_edits_and_with_tables(name: str) -> None:
    machine = small()
    with machine.share(name, reserve=False) as shared:
        before = shared.sequence
        assert before % 2 == 0
        with shared.edit():
            assert shared.sequence == before + 1
            with pytest.raises(ValueError, match="an edit\\(\\) of it is under way"), shared.edit():
                pass
            table = machine.create_page_table("x86-64")
            assert shared.sequence == before + 1
        assert shared.sequence == before + 2
        table.destroy()
        assert shared.sequence == before + 4


# --------------------------------------------------------------------------- names


def test_a_name_that_exists_is_refused_unless_it_is_to_be_replaced(name: str) -> None:
    one, other = small(), small()
    with one.share(f"/{name}", reserve=False) as shared:
        assert shared.name == f"/{name}"
        with pytest.raises(FileExistsError, match=f"a machine of process {os.getpid()} is shared .*replace=True"):
            other.share(name)
        assert other.check() == 0
        with other.share(name, replace=True, reserve=False):
            inode = (FOLDER / name).stat().st_ino
            shared.close()  # the name is another's by now
            assert (FOLDER / name).stat().st_ino == inode
        assert not (FOLDER / name).exists()
    (FOLDER / name).write_bytes(b"")
    with pytest.raises(FileExistsError, match="the name exists; replace=True"):
        one.share(name)


@pytest.mark.parametrize("wrong", ["", "/", "a/b", "//a", ".", "..", "a b", "a\n", "x" * 201, "\u00e4"])
def test_what_is_no_name_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"name .*: expected a name of at most 200"):
        small().share(wrong)


def test_a_pipe_under_the_name_is_no_segment(name: str) -> None:
    os.mkfifo(f"/dev/shm/{name}")
    try:
        with pytest.raises(FileExistsError):
            Machine(Config()).share(name)
    finally:
        os.unlink(f"/dev/shm/{name}")


def test_a_machine_is_shared_once(name: str) -> None:
    machine = small()
    with machine.share(name, reserve=False), pytest.raises(ValueError, match="the machine is shared as"):
        machine.share(f"{name}-other")


def test_without_room_nothing_is_left_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    machine = small()
    with pytest.raises(OSError, match="bytes of shared memory: No space left on device") as raised:
        machine.share(name)
    assert raised.value.errno == errno.ENOSPC
    assert not (FOLDER / name).exists()
    assert machine.check() == 0
    machine.share(name, reserve=False).close()


def test_the_name_goes_with_the_machine(name: str) -> None:
    machine = small()
    shared = machine.share(name, reserve=False)
    assert (FOLDER / name).exists()
    del machine, shared
    gc.collect()
    assert not (FOLDER / name).exists()


def test_the_name_goes_with_its_process_but_not_when_it_is_killed(name: str) -> None:
    command = [sys.executable, "-c", CHILD, name]
    done = subprocess.run([*command, "go"], capture_output=True, text=True, timeout=300)
    assert done.stdout == "ready\n", done.stderr
    assert not (FOLDER / name).exists()
    child = subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with pytest.raises(FileExistsError, match=f"process {child.pid} is shared under that name, which has ended"):
        small().share(name)
    small().share(name, replace=True, reserve=False).close()
    assert not (FOLDER / name).exists()
