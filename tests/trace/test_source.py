"""Opening traces: compression by content, whole lines, and one line of text for whatever is wrong."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import source
from pgemu.trace.source import open_source

pytestmark = pytest.mark.same_with_checks

TEXT = b"".join(b"line %06d of a log\n" % number for number in range(20_000))
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "xz": lzma.compress,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
NAMES = st.sampled_from([name for name in COMPRESSORS if name != "plain"])


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
def test_compression_is_told_by_content(tmp_path: Path, compressor: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(compressor(TEXT))
    blocks = list(open_source(path).blocks())
    assert "".join(blocks).encode() == TEXT
    assert all(block.endswith("\n") for block in blocks)


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_streams_may_follow_one_another(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    padding = bytes(4) if name == "xz" else b""
    path.write_bytes(COMPRESSORS[name](TEXT) + padding + COMPRESSORS[name](b"tail\n"))
    assert "".join(open_source(path).blocks()).encode() == TEXT + b"tail\n"


@given(st.integers(0, 9), st.integers(0, 9000), st.booleans())
def test_padding_of_xz_is_a_multiple_of_four_bytes(small: int, size: int, goes_on: bool) -> None:
    """The .xz File Format, 2.2: between streams and behind the last, of any size, wherever reading is cut."""
    for padding in (small, size):
        with tempfile.NamedTemporaryFile() as file:
            file.write(lzma.compress(b"head\n") + bytes(padding) + (lzma.compress(b"tail\n") if goes_on else b""))
            file.flush()
            if padding % 4:
                text = rf"damaged xz stream \({padding} bytes of padding, expected a multiple of 4\)"
                with pytest.raises(InputError, match=text):
                    list(open_source(file.name).blocks())
            else:
                assert "".join(open_source(file.name).blocks()) == ("head\ntail\n" if goes_on else "head\n")


@pytest.mark.parametrize("low", [0x50, 0x5F])
def test_a_frame_to_be_skipped_may_come_first(tmp_path: Path, low: int) -> None:
    """As pzstd writes them: RFC 8878, 3.1.2."""
    path = tmp_path / "log"
    path.write_bytes(bytes([low]) + b"\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size" + COMPRESSORS["zstd"](TEXT))
    assert "".join(open_source(path).blocks()).encode() == TEXT


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_truncated_stream_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(COMPRESSORS[name](TEXT)[:-9])
    with pytest.raises(InputError, match=f"log: truncated: the {name} stream ends early"):
        list(open_source(path).blocks())


JUNK = (b"x", b"junk", b"\xff" * 5, b"# behind the stream\n" * 9000, b"\0\0\0\0and zeros before")


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
@pytest.mark.parametrize("junk", JUNK)
def test_what_stands_behind_a_stream_is_named(tmp_path: Path, name: str, junk: bytes) -> None:
    path = tmp_path / "log"
    for data in (TEXT, b"", b"one line\n"):
        path.write_bytes(COMPRESSORS[name](data) + junk)
        told = re.escape(f"something else stands behind the {name} stream ({junk.lstrip(bytes(1))[:16]!r}), expected")
        with pytest.raises(InputError, match=told):
            list(open_source(path).blocks())


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_a_stream_behind_one_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    for other in ("xz", "gzip", "zstd"):
        path.write_bytes(COMPRESSORS[name](TEXT) + COMPRESSORS[other](TEXT))
        if other == name:
            assert "".join(open_source(path).blocks()).encode() == TEXT + TEXT
        else:
            with pytest.raises(
                InputError, match=f"what stands behind the {name} stream is one of {other}, expected one kind"
            ):
                list(open_source(path).blocks())


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 20])
def test_a_second_stream_that_is_cut_ends_early(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(COMPRESSORS[name](TEXT) + COMPRESSORS[name](b"tail of it\n")[: min(size, 17)])
    with pytest.raises(InputError, match=f"log: truncated: the {name} stream ends early"):
        list(open_source(path).blocks())


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_damaged_stream_is_named(tmp_path: Path, name: str) -> None:
    data = bytearray(COMPRESSORS[name](TEXT))
    data[8 : len(data) - 8] = bytes(len(data) - 16)
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"log: (damaged {name} stream|truncated)"):
        list(open_source(path).blocks())


def test_last_line_without_newline_comes_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    assert list(open_source(path).blocks()) == ["one\ntwo\n", "thr"]


def test_thread_names_of_any_bytes_pass(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"caf\xc3-1\r\n")
    assert list(open_source(path).blocks()) == ["caf\udcc3-1\n"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lzma.compress(b"a\nb\n"))))
    opened = open_source("-")
    assert opened.name == "<stdin>"
    assert list(opened.blocks()) == ["a\nb\n"]


def test_missing_directory_empty_and_binary_are_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_bytes(b"")
    binary.write_bytes(b"\x7fELF\0\0\0\n")
    with pytest.raises(InputError, match="gone: no such file"):
        open_source(tmp_path / "gone")
    with pytest.raises(InputError, match="is a directory"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="empty: empty file"):
        open_source(empty)
    with pytest.raises(InputError, match="binary: binary data"):
        list(open_source(binary).blocks())


def test_messages_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "a\nb")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
def test_the_beginning_is_known_before_anything_is_read(tmp_path: Path, compressor: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(compressor(TEXT))
    opened = open_source(path)
    assert opened.head.startswith(b"line 000000 of a log\n")
    assert opened.path == (str(path) if compressor is bytes else None)
    opened.close()


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_data_that_grows_as_no_log_does_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_FREE_GROWTH", 1 << 20)
    path = tmp_path / "log"
    path.write_bytes(COMPRESSORS[name](b"the same\n" * (1 << 20)))
    seen: list[str] = []
    with pytest.raises(InputError, match="log: grows to more than 200 times its size, as no log does"):
        seen.extend(open_source(path).blocks())
    assert sum(map(len, seen)) <= max(1 << 20, source.MOST_GROWTH * path.stat().st_size)


@pytest.mark.parametrize("name", ["xz", "gzip", "zstd"])
def test_decoders_give_pieces_of_bounded_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(COMPRESSORS[name](b"the same\n" * (6 << 20)))  # 54 MiB: less than what needs no reason
    blocks = [len(block) for block in open_source(path).blocks()]
    assert sum(blocks) == 54 << 20
    assert max(blocks) <= source.LONGEST_LINE + source._BLOCK


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_line_is_1_mib_at_most(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    longest = b"a" * source.LONGEST_LINE + b"\n"
    path.write_bytes(COMPRESSORS[name](b"one\ntwo\n" + longest + longest))
    assert "".join(open_source(path).blocks()) == "one\ntwo\n" + 2 * longest.decode()
    path.write_bytes(COMPRESSORS[name](b"one\ntwo\n" + longest + b"a" + longest))
    with pytest.raises(InputError, match="log:4: a line of more than 1048576 bytes, expected a trace"):
        list(open_source(path).blocks())


def test_an_xz_stream_that_needs_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_DECODER_MEMORY", 1 << 20)  # -6 takes 9 MiB
    path = tmp_path / "log"
    path.write_bytes(lzma.compress(TEXT))
    with pytest.raises(InputError, match=r"log: damaged xz stream.*Memory usage limit"):
        list(open_source(path).blocks())


@given(pieces=st.lists(st.binary(max_size=9).map(lambda data: data.replace(b"\0", b"\n")), max_size=30), name=NAMES)
@example(pieces=[b"\r\r\n"], name="gzip")
def test_many_streams_are_one_text(pieces: list[bytes], name: str) -> None:
    data = b"".join(COMPRESSORS[name](piece) for piece in [b"x", *pieces])
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        blocks = list(open_source(file.name).blocks())
    text = b"".join([b"x", *pieces]).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    assert "".join(blocks) == text
    assert all(block.endswith("\n") for block in blocks[:-1])
