"""Damaged caches of machine code: a read gives what was written or nothing, a write keeps a whole file or none."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fuzzing import Random, attacked, mutated, rounds
from pgemu_kernels.engine import machine_code

pytestmark = pytest.mark.same_with_checks

STAMP = "a" * 64
NAME = "run-0123"
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ESTALE)


def spoiled(chance: Random, path: Path, others: list[bytes]) -> None:
    """Whatever may befall a file."""
    what = chance.randrange(9)
    data = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if what < 5:
        path.write_bytes(mutated(chance, data, others, chance.choice((None, 64))))
    elif what == 5:
        path.mkdir()
    elif what == 6:
        os.mkfifo(path)
    elif what == 7:
        path.symlink_to(chance.choice((path.name, "/dev/zero", "/nowhere")))


def failing(chance: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the calls to the system fails, now and then."""
    name = chance.choice(("replace", "open", "access", "utime", "fstat"))
    plain = getattr(os, name)

    def fails(*arguments: Any, **named: Any) -> Any:
        if chance.random() < 0.5:
            number = chance.choice(ERRORS)
            raise OSError(number, os.strerror(number))
        return plain(*arguments, **named)

    monkeypatch.setattr(machine_code.os, name, fails)


def test_damaged_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("PGEMU_CACHE_DIR", str(first))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(second))
    monkeypatch.setattr(machine_code, "INSTALLED", tmp_path / "installed")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    found = {True: 0, False: 0}
    for number, chance in rounds("cache", 2):
        for folder in (first, second):
            shutil.rmtree(folder, ignore_errors=True)
        contents = chance.randbytes(chance.choice((0, 1, 100, 5000)))
        others = [machine_code.sealed(b"other", *name) for name in ((STAMP, "run-4567"), ("b" * 64, NAME))]
        with attacked("cache", number):
            assert machine_code.write(STAMP, NAME, contents)
            path = first / STAMP / NAME
            if chance.random() < 0.5:
                shutil.copytree(first, second / "pgemu", dirs_exist_ok=True)
            for _ in range(chance.randint(1, 3)):
                spoiled(chance, path, others)
            if chance.random() < 0.2:
                shutil.rmtree(path.parent)
                path.parent.write_bytes(b"no folder")
            machine_code._said.clear()
            read = machine_code.read(STAMP, NAME)
            assert read in (contents, None)
            found[read is not None] += 1
            with monkeypatch.context() as within:
                failing(chance, within)
                kept = machine_code.write(STAMP, NAME, contents)
                assert machine_code.read(STAMP, NAME) in (contents, None)
            if kept:
                assert machine_code.read(STAMP, NAME) == contents
            said = capsys.readouterr().err.splitlines()
            assert len(said) == len(set(said))
            assert all(line.startswith("pgemu: compiled kernels ") for line in said)
            left = [one for folder in (first, second) for one in folder.rglob(".*")]
            assert left == []  # nothing half written
    print("read, not read:", found[True], found[False])
    assert min(found.values()) > 0
