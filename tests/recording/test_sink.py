"""Text that is compressed by the name of its file, and is there whole or not at all."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from pgemu.errors import InputError
from pgemu.recording.sink import opened
from pgemu.trace.source import open_source

pytestmark = pytest.mark.same_with_checks

TEXT = b"one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("suffix", "decompress"),
    [
        ("", bytes),
        (".txt", bytes),
        (".xz", lzma.decompress),
        (".gz", gzip.decompress),
        (".zst", lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
    ],
)
def test_a_suffix_compresses_and_pgemu_reads_it(tmp_path: Path, suffix: str, decompress: object) -> None:
    path = tmp_path / f"a{suffix}"
    with opened(str(path)) as sink:
        sink.write(TEXT[:6])
        sink.write(TEXT[6:])
    assert sink.lines == 3
    assert callable(decompress)
    assert decompress(path.read_bytes()) == TEXT
    assert b"".join(open_source(path).raw_blocks()) == TEXT
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_what_fails_meanwhile_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"before")
    with pytest.raises(AttributeError), opened(str(path)) as sink:
        sink.write(TEXT * (len(sink.missing)))  # type: ignore[attr-defined]
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "a.xz")
    with pytest.raises(InputError, match=r"a.xz: cannot be written: No such file or directory"), opened(path):
        pass


def test_an_error_of_another_file_stays_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), opened(str(tmp_path / "a")):
        (tmp_path / "other").read_bytes()
