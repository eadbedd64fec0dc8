"""Where commands run: without docstrings and asserts, in any locale and terminal, without rights, memory or company."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from comparisons import lowered, mixed_records
from pgemu.cli import main
from pgemu.errors import InputError
from pgemu.trace import load, shipped
from pgemu.trace.readers import parquet

pytestmark = pytest.mark.same_with_checks

NO_TEXT = os.fsdecode(b"p\xc3\xa4\xff\xfe")  # a name that is text in no encoding
OUT_OF_MEMORY = "metadata of a machine: more than this computer can hold"


def pgemu(*arguments: str | Path, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "pgemu", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, env=environment)


@pytest.mark.parametrize("group", [(), ("trace",), ("workload",), ("export",)])
def test_commands_are_listed_with_what_they_do_where_python_keeps_no_docstrings(group: tuple[str, ...]) -> None:
    def commands(*python: str) -> list[str]:
        shown = pgemu(*group, "--help", python=python).stdout.splitlines()
        return shown[next(number for number, line in enumerate(shown) if "Commands" in line) :]

    assert len(commands()) > 3
    assert commands("-OO") == commands()


def test_what_is_refused_is_refused_without_asserts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for form in ("csv", "lackey", "parquet"):
        done = pgemu("trace", "info", "--input-format", form, path, python=("-OO",))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"pgemu: {path}: this is a picture (PNG), expected ")


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"TERM": "dumb"}])
def test_names_are_any_bytes_in_any_locale_and_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / NO_TEXT
    folder.mkdir()
    log, stored, cut = folder / f"{NO_TEXT}.xz", folder / NO_TEXT, folder / f"{NO_TEXT}.cut"
    shutil.copy(shipped(), log)
    assert pgemu("trace", "convert", log, "-o", stored, **environment).returncode == 0
    assert pgemu("trace", "cut", stored, "--from", "+0s", "-o", cut, **environment).returncode == 0
    shown = pgemu("trace", "info", cut, **environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "17,716 records" in shown.stdout
    assert sorted(one.name for one in folder.iterdir()) == sorted(one.name for one in (log, stored, cut))


def test_parquet_is_read_by_names_that_are_no_text_or_look_like_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = lowered(mixed_records())
    for name in (NO_TEXT, "file:a", "mock:b", "c d%20e", "-"):
        parquet.write(found, tmp_path / name)
        path = f"./{name}" if name == "-" else name
        assert sum(map(len, parquet.iterate(path))) == len(found.records)
        assert len(load(path).records) == len(found.records)


def test_what_the_library_has_no_memory_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write(lowered(mixed_records()), path := tmp_path / "a")

    def short(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 55040 failed")

    monkeypatch.setattr(pq, "ParquetFile", short)
    with pytest.raises(InputError, match=r"a: memory is short, or not a whole Parquet file \(malloc of size 55040"):
        load(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOMEM, OUT_OF_MEMORY), f"pgemu: {OUT_OF_MEMORY}\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "pgemu: standard output: No space left on device\n"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "a"), "pgemu: a: Permission denied\n"),
    ],
)
def test_what_is_short_is_named(monkeypatch: pytest.MonkeyPatch, error: OSError, said: str) -> None:
    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr("pgemu.report.traces.table_of_formats", fail)
    monkeypatch.setattr("pgemu.cli._discard_output", lambda: None)  # of the tests
    done = CliRunner().invoke(main, ["trace", "formats"])
    assert (done.exit_code, done.stderr) == (2, said)


def test_two_that_write_one_file_leave_one_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "pgemu", "trace", "convert", str(shipped()), "-o", str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    assert [one.communicate(timeout=120)[1] for one in both] == [b"", b""]
    assert [one.returncode for one in both] == [0, 0]
    assert pq.read_metadata(path).num_rows == 17716
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_a_folder_without_permission_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / "closed") and access(path, mode))
    outputs = {"trace convert": "a", "replay --design pfnmap": "a", "workload make": "a", "record": "a.txt"}
    for command, name in outputs.items():
        out = tmp_path / "closed" / name
        what = ["--", "true"] if command == "record" else ["random"] if "make" in command else [str(shipped())]
        done = CliRunner().invoke(main, [*command.split(), "-o", str(out), *what])
        told = f"pgemu: {out}: cannot be written: no permission in {tmp_path / 'closed'}\n"
        assert (done.exit_code, done.stderr) == (2, told)
