"""Which reader a trace gets: by its content, whatever its name and its compression."""

from __future__ import annotations

import io
import lzma
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace import readers
from pgemu.trace.accesses import AccessStream
from pgemu.trace.log import Log
from pgemu.trace.readers import parquet
from pgemu.trace.source import Match, Source, open_source

LINE = b"CPU 3/KVM-61883 [078] ..... 5.25: kvm_page_fault: vcpu 3 rip 0x10 address 0x84123 error_code 0x100000006\n"


def test_every_module_of_the_folder_is_asked() -> None:
    files = Path(readers.__file__).parent.glob("[a-z]*.py")
    assert {module.__name__ for module in readers.readers()} == {f"pgemu.trace.readers.{file.stem}" for file in files}


QEMU = b"7@1.000002:kvm_convert_memory start 0x0 size 0x1000 shared_to_private\n"
DAMON = b" kdamond.0-9 [000] ..... 1.000001: damon_aggregated: target_id=1 nr_regions=1 4096-8192: 1 0\n"
DAMO = b'[{"kdamond_idx": 0, "snapshots": []}]'


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"# tracer: nop\n", {"ftrace": Match.POSSIBLE}),
        (b"PAR1....", {"ftrace": Match.POSSIBLE, "parquet": Match.SURE}),
        (b"PAR1\0", {"parquet": Match.SURE}),
        (b"\x7fELF\0", {}),
        (b"op,address\n", {"ftrace": Match.POSSIBLE, "csv_columns": Match.SURE}),
        (b'\top\t"time"\r\n1\t2\t3\r\n', {"ftrace": Match.POSSIBLE, "csv_columns": Match.SURE}),
        (b"time,address\n", {"ftrace": Match.POSSIBLE}),
        (b"op\n", {"ftrace": Match.POSSIBLE}),
        (QEMU, {"ftrace": Match.POSSIBLE, "qemu_log": Match.SURE}),
        (b"a: warning: memory fault " + QEMU[11:], {"ftrace": Match.POSSIBLE, "qemu_log": Match.SURE}),
        (LINE[:-1].replace(b"5.25:", b"5.250001:") + b"\n" + QEMU, {"ftrace": Match.POSSIBLE}),
        (b"-trace kvm_convert_memory -trace x", {"ftrace": Match.POSSIBLE}),
        (DAMON, {"ftrace": Match.POSSIBLE, "damon": Match.SURE}),
        (DAMON * 9 + LINE.replace(b"5.25:", b"5.250001:"), {"ftrace": Match.POSSIBLE}),
        (DAMON + DAMON.replace(b"damon_aggregated", b"sched_switch") * 2, {"ftrace": Match.POSSIBLE}),
        (DAMO, {"ftrace": Match.POSSIBLE, "damon": Match.SURE}),
        (b"[{}]", {"ftrace": Match.POSSIBLE}),
        (b"brk(NULL) = 0x1000\n", {"ftrace": Match.POSSIBLE, "strace": Match.SURE}),
        (b"00400000-00401000 r--p 00000000 fe:00 2195570  /opt/s\n", {"ftrace": 1, "proc_snapshot": Match.SURE}),
        (b"PK\x03\x04" + bytes(22) + b"\4\0\0\0maps", {"proc_snapshot": Match.SURE, "drmemtrace": Match.POSSIBLE}),
        (b"PK\x03\x04" + bytes(22) + b"\4\0\0\0else", {"drmemtrace": Match.POSSIBLE}),
    ],
)
def test_what_a_beginning_looks_like_to_each(head: bytes, expected: dict[str, Match]) -> None:
    found = {module.__name__.rpartition(".")[2]: module.sniff(head) for module in readers.readers()}
    assert {name: match for name, match in found.items() if match is not Match.NO} == expected


def test_the_surest_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"binary\0 log")
    read: list[Source] = []
    other = SimpleNamespace(
        FORMATS={"other": ""}, sniff=lambda head: Match.SURE, read=lambda one, form: read.append(one)
    )
    known = tuple(readers.readers())
    monkeypatch.setattr(readers, "readers", lambda: (*known, other))
    readers.read(source := open_source(path))
    assert read == [source]
    source.close()


def test_a_log_is_told_by_its_lines_and_parquet_by_its_magic(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(LINE.replace(b"5.25:", b"5.250001:"))
    found = readers.read(open_source(path))
    assert isinstance(found, Log)
    assert found.events == 1
    path.write_bytes(b"PAR1....")
    with pytest.raises(InputError, match="not a whole Parquet file"):
        trace.load(path)


def test_what_no_reader_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\x01\0\0\0\n")
    with pytest.raises(InputError, match=r"a\.txt: binary data, expected text of ftrace or trace-cmd, or Parquet"):
        trace.load(path)


def stored(folder: Path) -> list[tuple[Path, int]]:
    """Parquet of records and of a program's accesses, and how many records each has."""
    guest, accesses = folder / "guest.parquet", folder / "accesses.parquet"
    lowered = trace.load("workload:tdx-boot")
    parquet.write(lowered, guest)
    text = folder / "lackey"
    text.write_bytes(b"==7== Lackey, an example Valgrind tool\n" + b"I  0401ab70,3\n S 1fff000768,8\n" * 500)
    stream = trace.opened(text)
    assert isinstance(stream, AccessStream)
    parquet.write_accesses(stream, accesses)
    return [(guest, len(lowered.records)), (accesses, 1000)]


def records_in(path: str | Path) -> int:
    found = trace.opened(path)
    return sum(map(len, found.batches)) if isinstance(found, AccessStream) else len(found.records)


def test_parquet_is_read_compressed_and_from_what_has_no_end_to_begin_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, count in stored(tmp_path):
        packed = tmp_path / "a.xz"
        packed.write_bytes(lzma.compress(path.read_bytes()))
        assert records_in(packed) == count
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert records_in(f"/dev/fd/{process.stdout.fileno()}") == count
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        assert records_in("-") == count


def test_parquet_from_a_pipe_that_ends_early_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path)[0][0]
    with subprocess.Popen(["head", "-c", "-9", path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        with pytest.raises(InputError, match=r"/dev/fd/[0-9]+: not a whole Parquet file"):
            trace.opened(f"/dev/fd/{process.stdout.fileno()}")
