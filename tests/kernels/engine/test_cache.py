"""Machine code from process to process: where it is kept, and what becomes of it when something goes wrong."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgemu_kernels.engine import ahead, machine_code
from pgemu_kernels.engine.progress import Progress, progress
from small_package import COMPILES, INTO_MEMORY, WARM, Outcome, Package, outcome, whole

pytestmark = pytest.mark.same_with_checks


@pytest.fixture
def package(tmp_path: Path) -> Package:
    tmp_path.chmod(0o755)
    return Package(tmp_path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Package:
    package = Package(tmp_path_factory.mktemp("compiled"))
    package.run()
    return package


@pytest.fixture
def warm(package: Package, compiled: Package) -> Package:
    """With machine code in its cache, from another place: it is valid by contents."""
    shutil.copytree(compiled.cache, package.cache)
    return package


@pytest.mark.parametrize("arguments", [(), ("needed",)], ids=["alone", "with another process"])
def test_the_second_process_loads_what_the_first_compiled(package: Package, arguments: tuple[str, ...]) -> None:
    assert package.run("", *arguments) == Outcome(4, True, COMPILES)
    assert package.is_whole()
    assert package.run("", *arguments) == WARM


def test_machine_code_is_valid_by_contents_and_for_checked_kernels_lies_beside(warm: Package) -> None:
    assert warm.run() == WARM
    assert warm.run(NUMBA_BOUNDSCHECK="1").compiled
    assert warm.is_whole(files=4)
    assert warm.run() == WARM
    edited = (warm.package / "two.py").read_text().replace("np.uint64(1)", "np.uint64(2)")
    (warm.package / "two.py").write_text(edited)
    assert warm.run() == Outcome(6, True, COMPILES)


def test_the_users_choice_comes_before_numbas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("PGEMU_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("PGEMU_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        machine_code.write("a" * 64, "run", b"code")
        found += [path.parent for path in tmp_path.rglob("a" * 64)]
        assert machine_code.read("a" * 64, "run") == b"code"
        shutil.rmtree(found[-1])
        monkeypatch.delenv(name)
    places = ["PGEMU_CACHE_DIR", "NUMBA_CACHE_DIR/pgemu", "XDG_CACHE_HOME/pgemu", "home/.cache/pgemu"]
    assert found == [tmp_path / place for place in places]


# Somebody who may write nowhere: root gives up its capabilities, with which no folder is locked to it.
NOBODY = """
import ctypes
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""


@pytest.fixture
def no_home(package: Package) -> dict[str, str]:
    home = package.folder / "locked"
    home.mkdir(mode=0o555)
    return {"PGEMU_CACHE_DIR": "", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


def test_who_may_write_nowhere_uses_what_is_installed(warm: Package, no_home: dict[str, str]) -> None:
    package = warm
    package.package.chmod(0o555)
    assert package.run(NOBODY, **no_home) == Outcome(4, True, INTO_MEMORY)
    package.package.chmod(0o755)
    shutil.copytree(package.cache, package.package / "machine_code")
    package.package.chmod(0o555)
    assert package.run(NOBODY, **no_home) == WARM


def test_without_any_home_it_compiles_into_memory(package: Package) -> None:
    found = package.run(PGEMU_CACHE_DIR="/proc/none", HOME="/proc/none")
    assert found == Outcome(4, True, INTO_MEMORY)


@pytest.mark.parametrize("executable", ["/bin/false", "/bin/true", "/none", ""])
def test_without_a_process_that_helps_it_compiles_all_itself(package: Package, executable: str) -> None:
    assert package.run(f"sys.executable = {executable!r}", "needed") == Outcome(4, True, COMPILES)
    assert package.is_whole()


def test_two_processes_at_once(package: Package) -> None:
    both = [package.start("", "needed") for _ in range(2)]
    assert [outcome(process).value for process in both] == [4, 4]
    assert package.is_whole()


KILLED = """
import os, signal
replace = os.replace
def kill(*paths):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
"""


def test_a_kill_before_a_file_has_its_name_leaves_none(package: Package) -> None:
    process = package.start(KILLED)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in package.files())
    assert package.run() == Outcome(4, True, COMPILES)
    assert all(whole(path) for path in package.files() if path.name[0] != ".")


FULL = """
import os, errno
def full(*paths):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
os.replace = full
"""
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))"


@pytest.mark.parametrize(
    ("before", "number"),
    [(FULL.format(name=name), getattr(errno, name)) for name in ("ENOSPC", "EDQUOT", "EROFS")]
    + [(LIMITED, errno.EFBIG)],
    ids=["full", "quota", "read-only", "file-limit"],
)
def test_a_file_that_cannot_be_written_is_said_and_no_harm(package: Package, before: str, number: int) -> None:
    found = package.run(before, HOME="/proc/none")
    assert found.value == 4
    assert f"pgemu: compiled kernels are not kept: {os.strerror(number)}\n" in found.stderr
    assert len(found.stderr.splitlines()) == 2
    assert package.files() == []


def cut(data: bytes, *_: str) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes, *_: str) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def nothing(data: bytes, *_: str) -> bytes:
    return b""


def zeroed(data: bytes, *_: str) -> bytes:
    """A sector's part that a file system lost, in the code."""
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def no_code(data: bytes, stamp: str, name: str) -> bytes:
    """Whole, but not what was to be there."""
    return machine_code.sealed(b"\x80\x04N.", stamp, name)


@pytest.mark.parametrize(
    ("damage", "arguments"),
    [
        (cut, ()),
        (flipped, ()),
        (nothing, ()),
        (zeroed, ()),
        (no_code, ()),
        (zeroed, ("needed",)),
        (no_code, ("needed",)),
    ],
)
def test_damaged_files_are_said_once_and_replaced(
    warm: Package, damage: Callable[..., bytes], arguments: tuple[str, ...]
) -> None:
    package = warm
    first = package.files()[-1]
    for path in package.files():
        path.write_bytes(damage(path.read_bytes(), path.parent.name, path.name))
    found = package.run("", *arguments)
    assert (found.value, found.compiled) == (4, True)
    said = f"pgemu: compiled kernels are damaged, and not used: {first}\n"
    if damage is no_code:
        said = "pgemu: compiled kernels are not understood, and not used (TypeError)\n"
    assert found.stderr == said + COMPILES
    assert package.is_whole()
    assert package.run() == WARM


def test_a_file_of_another_name_is_none(warm: Package) -> None:
    """Two entries' files that were exchanged: the one would be called with the other's arguments."""
    one, other = warm.files()
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)
    assert warm.run().compiled
    assert warm.run() == WARM


def test_a_damaged_file_does_not_hide_a_whole_one_elsewhere(warm: Package) -> None:
    shutil.copytree(warm.cache, warm.package / "machine_code")
    for path in warm.files():
        path.write_bytes(zeroed(path.read_bytes()))
    found = warm.run()
    assert (found.value, found.compiled, found.stderr.count("\n")) == (4, False, 1)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_in_a_files_place_is_no_harm(warm: Package, make: Callable[[Path], None]) -> None:
    for path in warm.files():
        path.unlink()
        make(path)
    found = warm.run(HOME="/proc/none")
    assert found.value == 4
    assert "pgemu: compiled kernels cannot be read: not a regular file: " in found.stderr


def test_a_file_that_may_not_be_read_is_said_once_and_no_harm(warm: Package) -> None:
    first = warm.files()[-1]
    for path in warm.files():
        path.chmod(0)
    found = warm.run(NOBODY, HOME="/proc/none")
    assert found == Outcome(4, True, f"pgemu: compiled kernels cannot be read: Permission denied: {first}\n{COMPILES}")
    assert warm.run(NOBODY, HOME="/proc/none") == WARM


def test_old_files_that_nobody_may_touch_are_used(warm: Package, no_home: dict[str, str]) -> None:
    """A read-only installation, older than the day after which use is noted."""
    installed = warm.package / "machine_code"
    shutil.copytree(warm.cache, installed)
    for folder in installed.iterdir():
        os.utime(folder, (0, 0))
        shutil.chown(folder, 1)
    assert warm.run(NOBODY, **no_home) == WARM


OTHERS = {
    "processor": "import os; os.environ['NUMBA_CPU_NAME'] = 'generic'; os.environ['NUMBA_CPU_FEATURES'] = ''",
    "numba": "import numba; numba.__version__ = '0.68.99'",
    "llvmlite": "import numba, llvmlite; llvmlite.__version__ = '0.99'",
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_compiler_or_processor_has_machine_code_of_its_own(warm: Package, other: str) -> None:
    assert warm.run(OTHERS[other]) == Outcome(4, True, COMPILES)
    assert warm.is_whole(files=4)
    assert warm.run(OTHERS[other]) == WARM
    assert warm.run() == WARM


def test_two_processes_at_once_over_damaged_files(warm: Package) -> None:
    for path in warm.files():
        path.write_bytes(cut(path.read_bytes()))
    both = [warm.start("", "needed") for _ in range(3)]
    assert [outcome(process).value for process in both] == [4, 4, 4]
    assert warm.is_whole()


COUNTED = """
from pgemu_kernels.engine import machine_code
sealed, hashed = machine_code.sealed, []
machine_code.sealed = lambda contents, *name: hashed.append(len(contents)) or sealed(contents, *name)
import atexit
atexit.register(lambda: print("hashed:", *sorted(hashed), file=__import__("sys").stderr))
"""


def test_contents_are_checked_once_for_each_file_that_is_loaded(warm: Package) -> None:
    sizes = [path.stat().st_size - len(machine_code.sealed(b"", "", "")) for path in warm.files()]
    assert warm.run(COUNTED) == Outcome(4, False, f"hashed: {' '.join(map(str, sorted(sizes)))}\n")


def test_the_cache_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEMU_CACHE_DIR", str(tmp_path))
    stamps = [f"{number:064x}" for number in range(12)]
    for age, stamp in enumerate(stamps):
        assert machine_code.write(stamp, "run", b"code")
        os.utime(tmp_path / stamp, (age, age))
    (tmp_path / "notes").mkdir()
    assert machine_code.write("f" * 64, "run", b"code")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"notes", "f" * 64, *stamps[-5:]}
    # What was never finished goes once it is old.
    for age, name in enumerate(("old", "new")):
        (tmp_path / ("f" * 64) / f".{name}").write_bytes(b"half")
        if age == 0:
            os.utime(tmp_path / ("f" * 64) / f".{name}", (0, 0))
    machine_code.write("f" * 64, "check", b"code")
    assert {path.name for path in (tmp_path / ("f" * 64)).iterdir()} == {"run", "check", ".new"}


def test_a_reader_keeps_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEMU_CACHE_DIR", str(tmp_path))
    machine_code.write("a" * 64, "run", b"code")
    os.utime(tmp_path / ("a" * 64), (0, 0))
    assert machine_code.read("a" * 64, "run") == b"code"
    assert (tmp_path / ("a" * 64)).stat().st_mtime > 0


@pytest.mark.parametrize("home", ["", "relative"])
def test_folders_without_an_absolute_home(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("PGEMU_CACHE_DIR", raising=False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine_code.folders() == [machine_code.INSTALLED, tmp_path / ".cache" / "pgemu"]


def test_a_forked_process_waits_for_nobody_who_works_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_jobs", ahead.Jobs([], 0))
    with ahead._starting, progress._lock:
        child = os.fork()
        if child == 0:
            free = not ahead._starting.locked() and not progress._lock.locked()
            os._exit(0 if ahead._jobs is None and free else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("closed", [None, "closed"])
def test_without_stderr_nobody_is_told_and_work_goes_on(monkeypatch: pytest.MonkeyPatch, closed: str | None) -> None:
    stderr = io.StringIO() if closed else None
    if stderr:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    told = Progress()
    told.begin("run")
    told.end("run")
