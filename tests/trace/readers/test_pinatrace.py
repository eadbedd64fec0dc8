"""Text of pinatrace: by a writer of the documented line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fuzzing import rounds
from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace import readers
from pgemu.trace.accesses import NO_TIMES, READ, WRITE
from pgemu.trace.readers import pinatrace
from pgemu.trace.source import Match, Source, open_source
from streams import attack, in_pieces, rows, taken

pytestmark = pytest.mark.same_with_checks

SMALL = b"0x7f8e61d57100: W 0x7ffc5a3dcd68\n0x7f8e61d57104: R 0x7f8e61d7fe78\n0x7f8e61d57ce0: R 0x1000\n#eof\n"


@pytest.mark.parametrize("data", [SMALL, SMALL.replace(b"\n", b"\r\n"), SMALL[:-1], gzip.compress(SMALL)])
def test_reads_and_writes_are_read_in_their_order(data: bytes) -> None:
    got = taken(data)
    assert rows(got.records) == [(0x7FFC5A3DCD68, WRITE, 0), (0x7F8E61D7FE78, READ, 0), (0x1000, READ, 0)]
    assert got.records.time.tolist() == [0, 1, 2]
    assert (got.tally.inputs, got.tally.rejected, got.refused) == ({"read": 2, "write": 1}, 0, "")
    assert got.tally.notes == [
        "it has no sizes: an access is of the page that it begins in",
        "it has no fetches",
        NO_TIMES,
    ]


def test_a_missing_end_is_noted_and_what_is_foreign_is_shown() -> None:
    got = taken(SMALL.replace(b"#eof\n", b"\n0x1: X 0x2\n0x1: R 0x10000000000000000\n"), "pinatrace")
    assert got.tally.notes[3:] == ["it has no #eof: its end may be missing"]
    assert got.tally.first_rejected == [(5, "0x1: X 0x2"), (6, "0x1: R 0x10000000000000000")]
    assert (got.tally.rejected, got.tally.ignored) == (2, {"empty lines": 1})
    refused = taken(b"one\n0x1: R 0x2\ntwo\n", "pinatrace").refused
    assert "2 of 3 lines are not understood, the first is line 1: 'one', expected text of Pin's pinatrace" in refused
    assert "no access in it, expected text of Pin's pinatrace" in taken(b"#eof\n", "pinatrace").refused
    assert "binary data, expected text of Pin's pinatrace" in taken(SMALL + b"\0\n", "pinatrace").refused


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (SMALL, Match.SURE),
        (SMALL + b"0x7f8e", Match.SURE),  # which goes on behind the head
        (b"0x1: R 0x2", Match.SURE),
        (b"other\n" + SMALL, Match.NO),
        (b"#eof\n", Match.NO),
        (b"\0", Match.NO),
        (b"", Match.NO),
    ],
)
def test_every_line_tells_what_it_is(head: bytes, match: Match) -> None:
    assert pinatrace.sniff(head) is match


def test_other_commands_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(SMALL)
    with pytest.raises(InputError, match=r"this is text of Pin's pinatrace, a program's addresses, expected what"):
        trace.load(path)
    with pytest.raises(InputError, match=r"this is text of Pin's pinatrace, expected text of ftrace"):
        readers.read_log(open_source(path))


ADDRESS = st.integers(0, (1 << 64) - 1)
ONE = st.builds(lambda ip, kind, at: b"%#x: %s %#x" % (ip, kind, at), ADDRESS, st.sampled_from([b"R", b"W"]), ADDRESS)
LINES = st.lists(st.one_of(ONE, ONE, st.sampled_from([b"", b"#eof", b"0x: R 0x", b"word"])), max_size=30)


@given(LINES, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_any_pieces_give_the_same(lines: list[bytes], sizes: list[int]) -> None:
    def outcome(of: Source) -> Any:
        got = taken(of, "pinatrace")
        return rows(got.records), got.records.time.tolist(), got.tally, got.refused

    text = b"\n".join(lines) or b"\n"
    kept = pinatrace._BLOCK
    whole = outcome(in_pieces(text, [1 << 16]))
    try:
        pinatrace._BLOCK = sizes[0]
        assert outcome(in_pieces(text, sizes)) == whole
    finally:
        pinatrace._BLOCK = kept


def test_damaged_files_are_read_or_refused() -> None:
    ends = attack("pinatrace", [SMALL, SMALL * 3, gzip.compress(SMALL)], "pinatrace", rounds("pinatrace", 0, 2000))
    assert min(ends.values()) > 100
