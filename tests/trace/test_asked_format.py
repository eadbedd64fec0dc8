"""A format that is asked for by name: what is said of a file of something else speaks of that format."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace import opened
from pgemu.trace.accesses import AccessStream
from pgemu.trace.readers import formats

pytestmark = pytest.mark.same_with_checks

WORDS = {
    "csv": ("a table as text (CSV)", "column", "each row", "not a table", "UTF-8"),
    "damon": ("DAMON", "damo"),
    "damon-counted": ("DAMON", "damo"),
    "ftrace": ("ftrace", "text that is no log's", "expected 'task-pid [cpu] seconds: event: fields'"),
    "lackey": ("Lackey",),
    "pinatrace": ("pinatrace",),
    "parquet": ("Parquet",),
    "proc-snapshot": ("/proc",),
    "qemu-log": ("QEMU", "qemu"),
    "strace": ("strace",),
    "champsim": ("ChampSim",),
    "cloudsuite": ("CloudSuite",),
    "drmemtrace": ("drmemtrace",),
}
"""What a complaint says, at least one of it, of a file that should be of the format."""


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), file)
    return file.getvalue()


NOISE = np.random.default_rng(7).bytes(3000)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + NOISE
NAMED = {
    "picture": (PNG, "this is a picture (PNG), expected ", ()),
    "picture.gz": (gzip.compress(PNG), "this is a picture (PNG), expected ", ()),
    "parquet": (parquet(), "this is Parquet, expected ", ("parquet",)),
    "parquet.xz": (lzma.compress(parquet()), "this is Parquet, expected ", ("parquet",)),
    "json": (b'{"a": [1, 2]}\n', "this is JSON, expected ", ()),
    "xz.gz": (gzip.compress(lzma.compress(NOISE)), "this is compressed twice, with xz inside, expected ", ()),
    "perf.data": (b"PERFILE2" + NOISE, "this is a recording of perf, expected ", ("ftrace", "damon", "damon-counted")),
    "lackey": (
        b"==7== Lackey, an example Valgrind tool\nI  0401ab70,3\n S 1fff000768,8\n",
        "this is text of Valgrind's Lackey, expected ",
        ("lackey",),
    ),
    "strace": (
        b"1.000001 mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n",
        "this is text of strace, expected ",
        ("strace",),
    ),
    "csv": (b"op,flags,address\nguest fault,WRITE,0x1000\n", "this is a table as text (CSV), expected ", ("csv",)),
}
UNKNOWN = {
    "noise": NOISE,
    "noise without zeros": NOISE.replace(b"\0", b""),
    "noise.gz": gzip.compress(NOISE),
    "noise.xz": lzma.compress(NOISE),
    "nothing": b"",
    "nothing.gz": gzip.compress(b""),
    "words": b"this is text\nof no format\n" * 30,
}


def complaint(path: Path, data: bytes, form: str) -> str:
    """What is said of a file, without its name; "" where it is read."""
    path.write_bytes(data)
    try:
        found = opened(path, None, form)
        if isinstance(found, AccessStream):
            for _ in found.batches:
                pass
    except InputError as error:
        said = str(error)
        assert said.startswith(str(path))
        assert said.isprintable()
        return said.removeprefix(str(path))
    return ""


def check(said: str, form: str) -> None:
    """A complaint is of the format, and of none that was not asked for."""
    assert any(word in said for word in WORDS[form])
    assert form == "ftrace" or "ftrace" not in said


def test_every_format_has_words_of_its_own() -> None:
    assert WORDS.keys() == formats().keys()


@pytest.mark.parametrize("form", WORDS)
def test_what_a_file_is_is_said_beside_what_was_asked_for(tmp_path: Path, form: str) -> None:
    for data, says, read in NAMED.values():
        if form not in read:
            said = complaint(tmp_path / "a", data, form)
            assert says in said
            check(said.replace(says, "expected "), form)


@pytest.mark.parametrize("form", WORDS)
def test_of_what_nobody_knows_the_format_is_named(tmp_path: Path, form: str) -> None:
    for data in UNKNOWN.values():
        check(complaint(tmp_path / "a", data, form), form)


@pytest.mark.parametrize("form", [form for form in WORDS if form != "ftrace"])  # which says what is wrong with a line
@settings(max_examples=40)
@given(data=st.binary(max_size=700), packed=st.booleans())
def test_any_bytes_are_refused_by_the_name_of_the_format(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: bytes, packed: bool
) -> None:
    said = complaint(tmp_path_factory.getbasetemp() / form, gzip.compress(data) if packed else data, form)
    outer = ("stream", "zip archive", "a recording of", "UTF-16")  # what is wrong before any format is looked for
    if said and not any(one in said for one in outer):
        check(said, form)


def test_deflated_noise_is_no_region(tmp_path: Path) -> None:
    assert "no JSON as damo writes it" in complaint(tmp_path / "a", zlib.compress(NOISE), "damon")
