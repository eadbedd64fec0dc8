"""Traces of drmemtrace: DynamoRIO's own, and others by a writer that packs the documented record."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zstandard
from hypothesis import given, strategies as st

from fuzzing import rounds
from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace import readers, source
from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE
from pgemu.trace.readers import drmemtrace
from pgemu.trace.source import Match, Source, open_source
from streams import DATA, attack, in_pieces, rows, taken

pytestmark = pytest.mark.same_with_checks

ZIP, GZ = DATA / "drmemtrace.allasm_x86_64.trace.zip", DATA / "drmemtrace.threadsig.10510.0155.trace.gz"
PLAIN = DATA / "drmemtrace.small.x64.trace"
RECORD = struct.Struct("<HHQ")
READS, WRITES, INSTRUCTION, THREAD, EXIT, PROCESS, HEADER, FOOTER, MARKER, ENCODING = (
    0,
    1,
    10,
    22,
    23,
    24,
    25,
    26,
    28,
    47,
)
FETCHES = {10, 11, 12, 13, 14, 15, 16, 31, 48, 49}
TIME, FILE_TYPE, VERSION, PHYSICAL, NONE, VIRTUAL, PAGE = 2, 9, 12, 15, 16, 17, 18
SINCE_1601 = 11_644_473_600_000_000  # microseconds to 1970


def packed(*found: tuple[int, int, int]) -> bytes:
    return b"".join(RECORD.pack(*one) for one in found)


def made(*found: tuple[int, int, int], version: int = 6, thread: int = 70) -> bytes:
    """A whole trace with these records in it."""
    head = [(HEADER, 0, version), (MARKER, VERSION, version), (THREAD, 4, thread), (PROCESS, 4, 7)]
    return packed(*head, *found, (EXIT, 4, thread), (FOOTER, 0, 0))


def archive(chunks: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as out:
        for name, data in chunks.items():
            out.writestr(name, data)
    return file.getvalue()


SMALL = made((INSTRUCTION, 4, 0x401000), (READS, 8, 0x7FFF0008), (14, 5, 0x401004), (WRITES, 8, 0x7FFF0000))


@pytest.fixture(autouse=True)
def blocks() -> Iterator[None]:
    kept = source._RECORD_BLOCK
    yield
    source._RECORD_BLOCK = kept


def expected(data: bytes) -> list[tuple[int, int, int]]:
    """Rows by a walk over the records."""
    found: list[tuple[int, int, int]] = []
    threads: list[int] = []
    actor = 0
    for kind, size, value in RECORD.iter_unpack(data):
        if kind == THREAD:
            threads += [value] if value not in threads else []
            actor = threads.index(value)
        if kind in (READS, WRITES) or kind in FETCHES:
            flags = int({READS: READ, WRITES: WRITE}.get(kind, EXEC))
            last = min(value + max(size, 1) - 1, (1 << 64) - 1)
            found.append((value, flags, actor))
            if last >> 12 != value >> 12:
                found.append(((value | 4095) + 1, flags, actor))
    return found


def test_a_real_archive_is_read_chunk_by_chunk() -> None:
    got = taken(ZIP)
    with zipfile.ZipFile(ZIP) as file:
        data = b"".join(file.read(f"chunk.{number:04d}") for number in range(7))
    assert rows(got.records) == expected(data)
    assert (got.tally.inputs, got.tally.rejected, got.tally.notes) == ({"fetch": 133}, 0, [])
    ignored = {name: count for name, count in got.tally.ignored.items() if not name.startswith("marker")}
    assert ignored == {"encoding": 61, "header": 1, "thread": 1, "process": 1, "thread exit": 1, "footer": 1}
    markers = {name: count for name, count in got.tally.ignored.items() if name.startswith("marker")}
    assert (markers["marker: timestamp"], markers["marker: system call"], sum(markers.values())) == (40, 17, 130)
    assert sum(ignored.values()) + sum(markers.values()) + 133 == len(data) // 12 == 329
    assert got.records.time[0] == (13352268558644049 - SINCE_1601) * 1000  # of the first records, and of 2024
    assert (got.records.time[1:] >= got.records.time[:-1]).all()


@pytest.mark.parametrize(
    ("path", "counts"),
    [(PLAIN, {"fetch": 173, "read": 42, "write": 14}), (GZ, {"fetch": 1388, "read": 1156, "write": 1280})],
)
def test_real_traces_of_version_1_are_read_whole(path: Path, counts: dict[str, int]) -> None:
    got = taken(path)
    data = gzip.decompress(path.read_bytes()) if path is GZ else path.read_bytes()
    assert rows(got.records) == expected(data)
    assert (got.refused, got.tally.inputs, got.tally.rejected, got.stream.v2p) == ("", counts, 0, None)
    assert sum(got.tally.ignored.values()) + sum(counts.values()) == len(data) // 12


def test_threads_are_actors_and_timestamps_times() -> None:
    got = taken(
        made(
            (READS, 1, 0x1000),
            (MARKER, TIME, SINCE_1601 + 5),
            (READS, 1, 0x2000),
            (THREAD, 4, 99),
            (WRITES, 1, 0x3000),
            (MARKER, TIME, SINCE_1601 + 7),
            (THREAD, 4, 70),
            (READS, 1, 0x4000),
        )
    )
    assert rows(got.records) == [(0x1000, READ, 0), (0x2000, READ, 0), (0x3000, WRITE, 1), (0x4000, READ, 0)]
    assert got.records.time.tolist() == [0, 5000, 5000, 7000]
    assert got.tally.threads == 2


def test_actors_stay_below_those_of_the_host() -> None:
    found = [(THREAD, 4, thread) if i == 0 else (READS, 1, thread << 12) for thread in range(1, 301) for i in (0, 1)]
    got = taken(made(*found, thread=1))
    assert [actor for _, _, actor in rows(got.records)] == [i % 256 for i in range(300)]
    assert got.tally.threads == 300
    assert got.tally.notes == ["it has more than 256 threads, of which some are taken to be one", NO_TIMES]
    many = made(*[(THREAD, 4, thread) for thread in range(70_000)])
    assert taken(many).refused.endswith(": more than 65,536 threads")


@pytest.mark.parametrize(
    ("found", "note"),
    [
        ([(READS, 0, 0x1000)], "1 accesses whose size it does not tell are taken to have one byte"),
        ([(MARKER, TIME, 5)], "1 of its timestamps are before 1970, or past 2554: taken to be its ends"),
        ([(MARKER, TIME, (1 << 64) - 1)], "1 of its timestamps are before 1970, or past 2554: taken to be its ends"),
        ([(PROCESS, 4, 8)], "it is of several processes, whose addresses are taken to be of one"),
        ([(MARKER, FILE_TYPE, 0x140)], "it was filtered while it was recorded: accesses that hit the filter's cache "),
        ([(MARKER, FILE_TYPE, 0x44)], "it was recorded without data accesses"),
    ],
)
def test_what_is_taken_to_mean_something_is_noted(found: list[tuple[int, int, int]], note: str) -> None:
    notes = taken(made((INSTRUCTION, 4, 0x401000), *found)).tally.notes
    others = [one for one in notes if one != NO_TIMES]
    assert len(others) == 1
    assert others[0].startswith(note)


def test_a_newer_version_and_a_missing_footer_are_noted() -> None:
    notes = taken(made((INSTRUCTION, 4, 0x401000), version=9)[:-12]).tally.notes
    assert notes == [
        "it has version 9, newer than 7: what that changed is not known", NO_TIMES,
        "it has no footer: its end may be missing",
    ]  # fmt: skip


def test_records_of_unknown_types_are_counted_and_shown() -> None:
    markers = (MARKER, 99, 0), (MARKER, 200, 0)
    got = taken(made((INSTRUCTION, 4, 0x401000), (50, 1, 2), (READS, 0, 0), (0xFFFF, 3, 4), *markers))
    assert got.tally.rejected == 3
    assert got.tally.first_rejected == [
        (6, "type 50, size 1, value 0x2"), (7, "type 0, size 0, value 0x0"), (8, "type 65535, size 3, value 0x4")
    ]  # fmt: skip
    assert got.tally.inputs == {"fetch": 1}
    assert (got.tally.ignored["marker: unknown"], got.tally.ignored["marker: users'"]) == (1, 1)
    refused = taken(made(*[(77, 0, 0)] * 9)).refused
    assert "9 of 9 records are not understood, the first is record 5: 'type 77, size 0" in refused
    assert taken(made()).refused.endswith(": no access in it, expected a trace of DynamoRIO's drmemtrace")


def test_physical_addresses_are_translations() -> None:
    data = made(
        (MARKER, PAGE, 4096),
        (MARKER, PHYSICAL, 0x5123),
        (MARKER, VIRTUAL, 0x40_1123),
        (INSTRUCTION, 4, 0x40_1123),
        (MARKER, NONE, 0x7000),
        (MARKER, VIRTUAL, 0x9000),  # of no physical address
        (MARKER, PHYSICAL, 0x20_0000),
        (MARKER, VIRTUAL, 0x3000),
        (MARKER, PHYSICAL, 0x6000),
        (MARKER, VIRTUAL, 0x40_1000),
    )
    got = taken(data)
    assert got.stream.v2p is not None
    assert got.stream.v2p.tolist() == [[0x3000, 0x20_0000, 4096], [0x40_1000, 0x6000, 4096]]
    assert got.tally.notes == [NO_TIMES, "1 translations differ from that page's before: the last one stays"]


def test_the_file_of_translations_is_taken_from_beside_the_trace_or_by_its_name(tmp_path: Path) -> None:
    path, other = tmp_path / "a.trace", tmp_path / "other"
    path.write_bytes(made((INSTRUCTION, 4, 0x401000), (MARKER, PHYSICAL, 0x5000), (MARKER, VIRTUAL, 0x1000)))
    text = "address_mapping_group { page_size: 4096 address_mapping { virtual_address: 4096 physical_address: %d } }"
    (tmp_path / "v2p.textproto").write_text(text % 0x7000)
    got = taken(path)
    assert got.stream.v2p is not None
    assert got.stream.v2p.tolist() == [[0x1000, 0x7000, 4096]]  # what is beside it is there from the beginning
    assert got.tally.notes == ["its translations are those of v2p.textproto", NO_TIMES]
    other.write_text(text % 0x8000)
    stream = drmemtrace.read(open_source(path), v2p=other)
    stream.close()
    assert stream.v2p is not None
    assert stream.v2p.tolist() == [[0x1000, 0x8000, 4096]]
    other.write_text("nothing: 1")
    with pytest.raises(InputError, match="other: no translation in it"):
        drmemtrace.read(open_source(path), v2p=other)


# ---------------------------------------------------------------------- what it is packed with


def test_any_packing_gives_the_same(tmp_path: Path) -> None:
    whole = rows(taken(SMALL).records)
    assert len(whole) == 4
    chunks = {"chunk.0001": SMALL[60:], "chunk.0000": SMALL[:60], "notes.txt": b"?"}
    forms = [gzip.compress(SMALL), lzma.compress(SMALL), zstandard.ZstdCompressor().compress(SMALL)]
    forms += [archive(chunks), archive(chunks, zipfile.ZIP_STORED), archive(chunks, zipfile.ZIP_LZMA)]
    forms += [gzip.compress(archive(chunks))]
    for data in forms:
        assert rows(taken(data).records) == whole


def test_an_archive_may_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(archive({"chunk.0000": SMALL}))))
    assert len(taken(open_source("-")).records) == 4


def encrypted() -> bytes:
    data = bytearray(archive({"chunk.0000": SMALL}))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def bomb() -> bytes:
    return archive({f"chunk.{number:04d}": SMALL[:48] + bytes(12 << 20) for number in range(4)})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (archive({"a.txt": b"x"}), "an archive without chunk.0000, expected a .trace.zip of DynamoRIO"),
        (archive({}), "an archive without chunk.0000, expected a .trace.zip of DynamoRIO"),
        (archive({"chunk.0000.zip": archive({"chunk.0000": SMALL})}), "an archive without chunk.0000, expected a"),
        (archive({"chunk.0000": archive({"chunk.0000": SMALL})}), "record 1 is of type 19280, expected a header (25)"),
        (archive({"chunk.0000": SMALL, "chunk.0002": SMALL}), "an archive with chunk.0002, expected chunk.0001"),
        (archive({"chunk.0001": SMALL}), "an archive with chunk.0001, expected chunk.0000 before it"),
        (
            archive({"chunk.0000": SMALL, "chunk.0001": SMALL}).replace(b"0001", b"0000"),
            "an archive with two members called 'chunk.0000', expected one",
        ),
        (archive({"chunk.0000": SMALL, "chunk.00": SMALL}), "an archive with two chunks 0, expected one"),
        (encrypted(), "chunk.0000 is encrypted, expected an archive without a password"),
        (ZIP.read_bytes()[:-400], "damaged zip archive (File is not a zip file)"),
        (b"PK\3\4 chunk.0000", "damaged zip archive (File is not a zip file)"),
        (archive({"chunk.0000": SMALL}).replace(b"chunk", b"chank", 1), "damaged zip archive (File name in"),
        (archive({"chunk.0000": SMALL[:-5]}), "truncated: record 10 has 7 bytes, expected 12"),
        (archive({"chunk.0000": SMALL[:-24] + b"\3"}), "truncated: record 9 has 1 bytes, expected 12"),
        (SMALL[:-1], "truncated: record 10 has 11 bytes, expected 12"),
        (gzip.compress(SMALL)[:-9], "truncated: the gzip stream ends early"),
        (SMALL[:9], "truncated: record 1 has 9 bytes, expected 12"),
        (SMALL[12:], "record 1 is of type 28, expected a header (25)"),
        (packed((HEADER, 0, 1 << 31), (THREAD, 0, 0)), "record 1 is of version 2147483648, expected 1 to 7"),
        (packed((HEADER, 0, 1 << 60), (THREAD, 0, 0)), "record 1 is of version 1152921504606846976, expected 1 "),
        (struct.pack("<HHI", HEADER, 0, 6) + struct.pack("<HHI", THREAD, 4, 7) * 5, "records of a program of 32 bits"),
        (bomb(), "records are not understood, the first is record 5: 'type 0, size 0, value 0x0'"),
        (drmemtrace._SNAPPY + b"*", "packed with snappy (.sz), expected .trace.zip or .trace.gz"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(data: bytes, says: str) -> None:
    try:
        refused = taken(data, "drmemtrace").refused
    except InputError as error:
        refused = str(error)
    assert says in refused
    assert "\n" not in refused


def test_members_that_are_no_chunks_are_counted() -> None:
    found = taken(archive({"chunk.0000": SMALL, "a.txt": b"x"}))
    assert found.stream.tally.ignored["members of the archive that are no chunk"] == 1


def test_names_of_an_archive_that_are_long_are_cut() -> None:
    data = archive({"chunk.0000": SMALL})
    at = data.index(b"PK\1\2")
    size = 2000  # in the local header alone
    head = data[:26] + struct.pack("<H", size) + data[28:30] + b"x" * size + data[40:at]
    end = struct.pack("<I", len(head))
    refused = taken(head + data[at:-6] + end + data[-2:], "drmemtrace").refused
    assert "damaged zip archive (File name in directory" in refused
    assert len(refused) < 300


def test_an_archive_that_grows_beyond_all_reason_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drmemtrace, "MOST_RECORD_GROWTH", 20)
    data = archive({"chunk.0000": made(*[(INSTRUCTION, 4, 0x401000)] * 10_000)})
    assert ": chunk.0000: grows to more than 20 times the archive" in taken(data).refused


def test_without_its_library_lz4_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(InputError, match="packed with lz4, for which Python's library lz4 is needed"):
        taken(drmemtrace._LZ4 + b"xxxx", "drmemtrace")


def test_frames_of_lz4_are_read_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the interface of lz4.frame.LZ4FrameDecompressor: magic, a length, the bytes themselves."""

    class Decompressor:
        def __init__(self) -> None:
            self._data, self._out, self.eof, self.needs_input, self.unused_data = b"", b"", False, True, None

        def decompress(self, data: bytes, max_length: int = -1) -> bytes:
            self._data += data
            size = 8 + int.from_bytes(self._data[4:8], "little")
            if self._data[:4] != drmemtrace._LZ4[: len(self._data[:4])]:
                raise RuntimeError("frame type unknown")
            if len(self._data) >= size and len(self._data) >= 8 and not self.eof:
                self._out, rest = self._out + self._data[8:size], self._data[size:]
                self._data, self.unused_data = self._data[:8], rest or None
                self.eof = not self._out[max_length:]
            piece, self._out = self._out[:max_length], self._out[max_length:]
            self.eof, self.needs_input = self.eof and not self._out, not self._out and not self.eof
            return piece

    stand_in: Any = ModuleType("lz4.frame")
    stand_in.LZ4FrameDecompressor = Decompressor
    monkeypatch.setitem(sys.modules, "lz4.frame", stand_in)

    def frame(data: bytes) -> bytes:
        return drmemtrace._LZ4 + struct.pack("<I", len(data)) + data

    assert rows(taken(frame(SMALL[:50]) + frame(SMALL[50:])).records) == rows(taken(SMALL).records)
    assert drmemtrace.sniff(frame(SMALL)) is Match.SURE
    assert drmemtrace.sniff(frame(b"a log of another kind\n")) is Match.NO
    assert "truncated: the lz4 stream ends early" in taken(frame(SMALL)[:-1], "drmemtrace").refused
    assert "damaged lz4 stream (frame type unknown)" in taken(frame(SMALL) + b"other").refused


# ---------------------------------------------------------------------- as a whole


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (SMALL, Match.SURE),
        (SMALL[:14], Match.SURE),
        (SMALL[:12], Match.NO),  # nothing follows
        (SMALL[:11], Match.POSSIBLE),
        (SMALL[:7], Match.NO),
        (packed((HEADER, 0, 6), (INSTRUCTION, 1, 1)), Match.NO),
        (packed((HEADER, 0, 300), (THREAD, 1, 1)), Match.NO),
        (packed((HEADER, 1, 6), (THREAD, 1, 1)), Match.NO),
        (ZIP.read_bytes(), Match.SURE),
        (archive({"a": b""}), Match.POSSIBLE),
        (archive({}), Match.POSSIBLE),
        (drmemtrace._SNAPPY, Match.SURE),
        (drmemtrace._LZ4, Match.POSSIBLE),
        (b"\x7fELF\2\1\1\0", Match.NO),
        (b"# tracer: nop\n", Match.NO),
        (b"", Match.NO),
    ],
)
def test_the_first_record_tells_what_it_is(head: bytes, match: Match) -> None:
    assert drmemtrace.sniff(head) is match


@pytest.mark.parametrize("data", [SMALL, ZIP.read_bytes()])
def test_other_commands_say_what_it_is(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"this is a trace of DynamoRIO's drmemtrace, a program's addresses, expected"):
        trace.load(path)
    with pytest.raises(InputError, match=r"this is a trace of DynamoRIO's drmemtrace, expected text of ftrace"):
        readers.read_log(open_source(path))


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)
ANY = st.integers(0, (1 << 64) - 1)
ONE = st.one_of(
    st.tuples(st.sampled_from([READS, WRITES, *FETCHES]), st.integers(1, 4096), st.integers(0, 1 << 63)),
    st.tuples(st.just(THREAD), st.just(4), st.integers(1, 5)),
    st.tuples(st.just(MARKER), st.sampled_from([TIME, FILE_TYPE, PHYSICAL, VIRTUAL, PAGE, 3, 99, 500]), ANY),
    st.tuples(st.integers(0, 60), st.integers(0, 0xFFFF), ANY),
)


def outcome(of: Source) -> Any:
    got = taken(of, "drmemtrace")
    v2p = None if got.stream.v2p is None else got.stream.v2p.tolist()
    return rows(got.records), got.records.time.tolist(), v2p, got.tally, got.refused


@given(st.lists(ONE, max_size=30), SIZES)
def test_any_pieces_give_the_same_and_every_record_counts(found: list[tuple[int, int, int]], sizes: list[int]) -> None:
    data = made(*found)
    whole = outcome(in_pieces(data, [1 << 16]))
    source._RECORD_BLOCK = sizes[0]
    assert outcome(in_pieces(data, sizes)) == whole
    tally = whole[3]
    counted = sum(tally.ignored.values()) - tally.ignored["pages of accesses beyond the second"]
    assert sum(tally.inputs.values()) + counted + tally.rejected == len(data) // 12
    if not tally.rejected and not tally.ignored["pages of accesses beyond the second"]:
        assert whole[0] == expected(data)


def test_damaged_files_are_read_or_refused() -> None:
    samples = [SMALL, ZIP.read_bytes(), PLAIN.read_bytes(), GZ.read_bytes(), archive({"chunk.0000": SMALL})]
    ends = attack("drmemtrace", samples, "drmemtrace", rounds("drmemtrace", 0, 2000))
    assert min(ends.values()) > 100
