"""Text of Lackey: every access in its order, what is none counted; Python and the kernel read alike."""

from __future__ import annotations

import gzip
import io
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from fuzzing import rounds
from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace import readers
from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE, AccessStream
from pgemu.trace.readers import lackey
from pgemu.trace.source import Match, Source, open_source
from streams import DATA, attack, in_pieces, rows, taken

SAMPLE = DATA / "lackey-ls.txt.xz"
FLAGS = {"I": EXEC, "L": READ, "S": WRITE}
NAMES = {"I": "fetch", "L": "read", "S": "write", "M": "modify"}
SMALL = b"==7== Lackey, an example Valgrind tool\nI  0401ab70,3\n S 1fff000768,8\n L 04032e58,8\n M 04033e06,1\n"


@pytest.fixture(autouse=True)
def paths() -> Iterator[None]:
    """Who reads is what a test says."""
    kept = lackey.wanted, lackey._BLOCK
    yield
    lackey.wanted, lackey._BLOCK = kept


def by(kernel: bool) -> None:
    lackey.wanted = lambda lines, size, name: kernel


def expected(text: bytes) -> tuple[list[tuple[int, int, int]], Counter[str]]:
    """Rows and counts of text without anything wrong in it, by cutting it at its columns."""
    found, counts = [], Counter[str]()
    for line in text.decode().splitlines():
        if line.startswith("=="):
            continue
        kind, (address, size) = line[:2].strip(), line[3:].split(",")
        counts[NAMES[kind]] += 1
        first = int(address, 16)
        pages = sorted({first >> 12, (first + int(size) - 1) >> 12})
        for flags in (READ, WRITE) if kind == "M" else (FLAGS[kind],):
            found += [(max(first, page << 12), int(flags), 0) for page in pages]
    return found, counts


@pytest.mark.parametrize("kernel", [False, True])
def test_a_real_file_is_read_whole(kernel: bool) -> None:
    """Lackey of Valgrind 3.19: counts by `cut -c1-3 | sort | uniq -c`, rows by columns."""
    by(kernel)
    got = taken(SAMPLE)
    assert got.refused == ""
    assert got.tally.inputs == {"fetch": 25107, "read": 4503, "write": 355, "modify": 29}
    assert got.tally.ignored == {"lines of Valgrind's own": 6}
    assert (got.tally.rejected, got.tally.threads, got.stream.v2p) == (0, 1, None)
    with lzma.open(SAMPLE) as file:
        found, counts = expected(file.read())
    assert rows(got.records) == found
    assert got.tally.inputs == counts
    assert got.tally.crossing == len(found) - 25107 - 4503 - 355 - 2 * 29 > 0
    assert got.tally.records == len(found)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_modify_is_a_load_and_a_store_and_what_crosses_a_page_is_two(kernel: bool) -> None:
    by(kernel)
    got = taken(b"I  00400ffe,3\n M 1fff000768,8\n S 1fffffff,2\n L 00001fff,1\n")
    assert rows(got.records) == [
        (0x400FFE, EXEC, 0),
        (0x401000, EXEC, 0),
        (0x1FFF000768, READ, 0),
        (0x1FFF000768, WRITE, 0),
        (0x1FFFFFFF, WRITE, 0),
        (0x20000000, WRITE, 0),
        (0x1FFF, READ, 0),
    ]
    assert got.records.time.tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert got.tally.inputs == {"fetch": 1, "modify": 1, "write": 1, "read": 1}
    assert got.tally.crossing == 2


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        b"ls: cannot open directory",
        b"I 0401ab70,3",  # one blank
        b"I   0401ab70,3",
        b"I  0401AG70,3",
        b"I  0x401ab70,3",
        b"I  ,3",
        b"I  0401ab70,",
        b"I  0401ab70",
        b"I  0401ab70 3",
        b"I  0401ab70,3 ",
        b"I  0401ab70,0",
        b"I  0401ab70,4097",
        b"I  0401ab70,00003",
        b"I  0401ab70,-3",
        b"I  10000000000000000,3",  # of 65 bits
        b" X 0401ab70,3",
        b"  L 0401ab70,3",
        b"L  0401ab70,3",
        b" I 0401ab70,3",
        b"oops: I  0401ab70,3",
        b" ",
        b"I",
        b" L",
        b" L ",
        b"\xff\xfe L ",
    ],
)
def test_what_is_no_access_is_counted_and_shown(kernel: bool, line: bytes) -> None:
    by(kernel)
    got = taken(SMALL + line + b"\n M 04033e06,1\n")
    assert got.tally.inputs == {"fetch": 1, "write": 1, "read": 1, "modify": 2}
    assert (got.tally.rejected, got.tally.first_rejected) == (1, [(6, line.decode("utf-8", "surrogateescape"))])


@pytest.mark.parametrize("kernel", [False, True])
def test_valgrinds_own_lines_are_ignored_by_name(kernel: bool) -> None:
    by(kernel)
    own = b"==7== \n--7-- warning\n**7** client\n SB 0401ab70\n\n==7= no\n"
    got = taken(SMALL + own)
    assert got.tally.ignored == {"lines of Valgrind's own": 4, "superblocks": 1, "empty lines": 1}
    assert got.tally.first_rejected == [(11, "==7= no")]


@pytest.mark.parametrize("kernel", [False, True])
def test_only_the_first_lines_that_are_rejected_are_kept(kernel: bool) -> None:
    by(kernel)
    got = taken(SMALL + b"".join(b"message %d %s\n M 04033e06,1\n" % (i, b"x" * 500) for i in range(9)))
    assert got.tally.rejected == 9
    assert [(number, text[:9], len(text)) for number, text in got.tally.first_rejected] == [
        (6, "message 0", 80), (8, "message 1", 80), (10, "message 2", 80)
    ]  # fmt: skip


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            b"one\ntwo\n L 04032e58,8\n",
            "2 of 3 lines are not understood, the first is line 1: 'one', expected text of Valgrind's Lackey",
        ),
        (b"==7== Lackey, an example Valgrind tool\n", "no access in it, expected text of Valgrind's Lackey"),
        (b"one\n", "1 of 1 lines are not understood, the first is line 1: 'one', expected text of Valgrind's Lackey"),
        (b" L 04032e58,8\n\0", "binary data, expected text of Valgrind's Lackey"),
    ],
)
def test_a_file_of_more_other_lines_is_refused(kernel: bool, text: bytes, says: str) -> None:
    by(kernel)
    assert taken(text, "lackey").refused.endswith(f": {says}")


def test_much_that_is_foreign_is_refused_before_its_end() -> None:
    text = b"".join(b"%d\n" % line for line in range(1_000_000))
    got = taken(SMALL + text, "lackey")
    assert "are not understood, the first is line 6: '0'" in got.refused
    assert got.tally.rejected < 500_000


@pytest.mark.parametrize("kernel", [False, True])
def test_lines_may_end_as_in_windows_and_the_last_one_may_lack_its_end(kernel: bool) -> None:
    by(kernel)
    plain, other = taken(SMALL), taken(SMALL.replace(b"\n", b"\r\n"))
    assert rows(plain.records) == rows(other.records)
    assert other.tally.rejected == 0
    cut = taken(SMALL[:-1])
    assert rows(plain.records) == rows(cut.records)
    assert cut.tally.notes == [NO_TIMES, "its last line has no newline and is taken to be whole"]
    assert taken(SMALL[:-2]).tally.first_rejected == [(5, " M 04033e06,")]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress])
def test_compressed_text_is_read_from_a_file_and_a_pipe(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(compress(SMALL))
    assert taken(path).tally.inputs == {"fetch": 1, "write": 1, "read": 1, "modify": 1}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(compress(SMALL))))
    found = readers.read(open_source("-"))
    assert isinstance(found, AccessStream)
    assert sum(map(len, found.batches)) == 5
    path.write_bytes(compress(SMALL)[:-9])
    with pytest.raises(InputError, match=r"a: truncated: the \w+ stream ends early"):
        raise InputError(taken(path, "lackey").refused)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (SMALL, Match.SURE),
        (SMALL[:38], Match.SURE),
        (b"I  0401ab70,3\n", Match.SURE),
        (b"I  0401ab70,3", Match.SURE),
        (b"usage\n" + SMALL, Match.SURE),
        (b"usage\n" * 40 + SMALL[39:], Match.NO),
        (b"==7== Memcheck, a memory error detector\n", Match.NO),
        (b"==7== Lackey, an example\0", Match.NO),
        (b"# tracer: nop\n", Match.NO),
        (b"", Match.NO),
    ],
)
def test_lackey_is_known_by_its_name_and_its_lines(head: bytes, match: Match) -> None:
    assert lackey.sniff(head) is match


def test_other_commands_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(SMALL)
    with pytest.raises(InputError, match=r"this is text of Valgrind's Lackey, a program's addresses, expected what"):
        trace.load(path)
    with pytest.raises(InputError, match=r"this is text of Valgrind's Lackey, expected text of ftrace or trace-cmd"):
        readers.read_log(open_source(path))


def test_short_files_load_no_numba() -> None:
    code = f"""if True:
        import sys
        from pgemu.trace import readers
        from pgemu.trace.source import open_source
        assert sum(map(len, readers.read(open_source({str(SAMPLE)!r})).batches)) > 30_000
        assert "numba" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


PIECES = st.lists(st.integers(1, 30), min_size=1, max_size=5)
ADDRESSES = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(1, 1 << 30).map(lambda page: (page << 12) - 2))
ACCESS = st.builds(
    lambda kind, address, size: b"%s%08x,%d" % (kind, address, size),
    st.sampled_from([b"I  ", b" L ", b" S ", b" M "]), ADDRESSES, st.integers(1, 4096),
)  # fmt: skip
NEARLY = st.text(" ILSM,0123456789abcdefg=-*\r", max_size=24).map(str.encode)
LINES = st.lists(st.one_of(ACCESS, ACCESS, NEARLY, st.sampled_from([b"==7== x", b"", b"hello"])), max_size=60)


def outcome(source: Source) -> Any:
    got = taken(source, "lackey")
    return rows(got.records), got.records.time.tolist(), got.tally, got.refused


@settings(max_examples=150)
@given(LINES, PIECES, st.booleans())
def test_any_pieces_and_both_readers_give_the_same(lines: list[bytes], sizes: list[int], whole: bool) -> None:
    text = b"\n".join(lines) + (b"\n" if whole else b"") or b"\n"
    by(False)
    lackey._BLOCK = 1 << 20
    first = outcome(in_pieces(text, [1 << 16]))
    for kernel in (False, True):
        by(kernel)
        lackey._BLOCK = sizes[0]
        assert outcome(in_pieces(text, sizes)) == first


def test_a_kernel_without_room_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with lzma.open(SAMPLE) as file:
        text = file.read().replace(b" M ", b"foreign\n M ")
    by(False)
    first = outcome(in_pieces(text, [1 << 16]))
    by(True)
    monkeypatch.setattr(lackey, "_ROOM", 17)
    assert outcome(in_pieces(text, [1 << 16])) == first


@pytest.mark.parametrize("kernel", [False, True])
def test_damaged_text_is_read_or_refused(kernel: bool) -> None:
    by(kernel)
    with lzma.open(SAMPLE) as file:
        samples = [SMALL, file.read(3000), SMALL.replace(b"\n", b"\nword\n")]
    ends = attack("lackey", [*samples, gzip.compress(samples[0])], "lackey", rounds("lackey", 0, 1000))
    assert min(ends.values()) > 100
