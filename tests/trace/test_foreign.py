"""What files are called that are no trace, or none that a command reads: one line that says what it is and what to do.

Most beginnings are written here after the formats' own documents; ELF, zip, tar, gzip, SQLite, NumPy and Arrow files
are what Python's and the system's own writers make.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.trace.foreign import foreign
from pgemu.trace.readers import formats, readers
from pgemu.trace.source import Match

DATA = Path(__file__).parents[1] / "data"
LOG = (
    " CPU 0/KVM-9 [000] ..... 1.000001: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
)  # fmt: skip


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "abc")
    return file.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (a)")
    return connection.serialize()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"op": [1]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


def oracle_general() -> bytes:
    rows = [(1, 77, 512, 2), (1, 78, 512, -1), (2, 77, 512, 4), (3, 79, 4096, -1), (3, 77, 512, -1)]
    return b"".join(struct.pack("<IQIq", *row) for row in rows)


FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "program": (Path(sys.executable).read_bytes()[:4096], "an ELF file", "pgemu walk, dump and page read images"),
    "gem5": (b"gem5\x1a\x0a\x06system\x10\x00", "gem5's packet trace", "Parquet or CSV"),
    "zip": (zipped(), "a zip archive", "give the file in it"),
    "tar": (tar(), "a tar archive", "give the file in it"),
    "tar.gz": (gzip.compress(tar()), "a tar archive", "give the file in it"),
    "xz.gz": (gzip.compress(lzma.compress(b"a")), "compressed twice, with xz inside", "decompress it once first"),
    "gz.xz": (lzma.compress(gzip.compress(b"a")), "compressed twice, with gzip inside", "decompress it once first"),
    "bz2.gz": (gzip.compress(bz2.compress(b"a")), "compressed with bzip2", "bunzip2 first"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive", "give the file in it"),
    "bzip2": (b"BZh91AY&SY\x9a\x1b", "compressed with bzip2", "bunzip2"),
    "lz4": (b"\x04\x22\x4d\x18d@\xa7", "compressed with lz4", "lz4 -d"),
    "pcap": (b"\xd4\xc3\xb2\xa1\x02\0\x04\0", "captured packets (pcap)", "expected text of ftrace"),
    "pcapng": (b"\x0a\x0d\x0d\x0a\x1c\0\0\0", "captured packets (pcapng)", "expected text of ftrace"),
    "sqlite": (database(), "an SQLite database", "CSV"),
    "journal": (b"LPKSHHRH\0\0", "a journal of systemd", "journalctl"),
    "journal export": (b"__CURSOR=s=1\n__REALTIME_TIMESTAMP=1\nMESSAGE=a\n\n", "a journal of systemd", "journalctl"),
    "ctf": (b"\xc1\x1f\xfc\xc1\0\0", "a trace in the Common Trace Format", "ftrace, trace-cmd or perf"),
    "ctf metadata": (b"/* CTF 1.8 */\ntrace {\n", "metadata of a trace in the Common", "ftrace, trace-cmd or"),
    "qemu binary": (b"\xff" * 8 + bytes.fromhex("b429a40acb77b1f2"), "QEMU's binary trace", "simpletrace.py"),
    "numpy": (array(), "an array of NumPy", "Parquet or CSV"),
    "arrow": (arrow(), "an Arrow file", "pyarrow.parquet.write_table"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document", "expected text of ftrace"),
    "html": (b"\n<!DOCTYPE html>\n<html><head>", "a web page (HTML)", "save the text itself"),
    "xml": (b'<?xml version="1.0"?>\n<a/>\n', "an XML document", "expected text"),
    "json": (b'{"a": [1, 2]}\n', "JSON", "Parquet or CSV"),
    "json list": (json.dumps([{"op": 1}], indent=2).encode(), "JSON", "Parquet or CSV"),
    "json numbers": (b"[1, 2, 3]", "JSON", "Parquet or CSV"),
    "perf json": (b'{\n\t"linux-perf-json-version": 1,\n', "what perf data convert --to-json makes", "give perf.data"),
    "chrome": (b'{"traceEvents": [{"name": "a"}]}', "a trace of Chrome's format", "ftrace, trace-cmd or perf"),
    "perf stat": (
        b"\n Performance counter stats for 'true':\n\n              0.50 msec task-clock\n", "counts of perf stat",
        "ftrace, trace-cmd or perf",
    ),
    "perf stat -o": (b"# started on Mon Nov 30 10:00:00 2026\n\n", "counts of perf stat", "ftrace, trace-cmd or perf"),
    "perf report": (b"# To display the perf.data header info, please use --header\n#\n", "perf report", "perf script"),
    "meminfo": (b"MemTotal:       16316412 kB\nMemFree: 1 kB\n", "/proc/meminfo", "ftrace, trace-cmd or perf"),
    "ramulator": (b"LD 0x12340\nST 4096\n", "a trace of Ramulator (loads and stores)", "no VM's"),
    "ramulator dram": (b"R 0,0,1,2,345,6\nW 0,0,1,2,345,7\n", "a trace of Ramulator (reads and writes)", "no VM's"),
    "oracleGeneral": (oracle_general(), "requests of libCacheSim (oracleGeneral)", "Parquet or CSV"),
    "mtree": ((DATA / "qemu" / "mtree-q35.txt").read_bytes(), "QEMU's info mtree", "--memslots-from FILE"),
    "mtree -f": ((DATA / "qemu" / "mtree-flat-pc.txt").read_bytes(), "QEMU's info mtree", "--memslots-from FILE"),
    "patch": (b"diff --git a/mm/gup.c b/mm/gup.c\n", "a patch", "expected text"),
    "script": (b"#!/bin/sh\ntrace-cmd record\n", "a script", "expected text"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", "a picture (PNG)", "expected text"),
}  # fmt: skip

# Which of the commands reads no such file, and what they say.
DAMON = " kdamond.0-9 [000] ..... 1.000001: damon_aggregated: target_id=1 nr_regions=1 4096-8192: 1 0\n"
_STREAMS = {"damon", "damon-counted", "lackey", "pinatrace", "champsim", "drmemtrace"}
SAMPLES: dict[str, bytes] = {
    "ftrace": LOG.encode(),
    "parquet": b"PAR1....",
    "csv": b"op,flags,address\nguest fault,WRITE,0x1000\n",
    "qemu-log": b"7@1.000002:kvm_convert_memory start 0x0 size 0x1000 shared_to_private\n",
    "damon": DAMON.encode(),
    "damon-counted": zlib.compress(b'[{"snapshots": []}]'),
    "lackey": b"==7== Lackey, an example Valgrind tool\nI  0401ab70,3\n S 1fff000768,8\n",
    "strace": b"1.000001 mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n",
    "proc-snapshot": b"00400000-00401000 r--p 00000000 fe:00 2195570  /opt/s\n",
    "pinatrace": b"0x401000: R 0x7fff0010\n0x401004: W 0x7fff0018\n" * 4,
    "champsim": b"".join(
        struct.pack("<Q2B2s4s2Q4Q", 0x401000 + i, 0, 0, b"\1\2", b"\3\4\0\0", *6 * [0x7F0000]) for i in range(200)
    ),
    "drmemtrace": b"".join(
        struct.pack("<HHQ", *row) for row in ((25, 0, 6), (28, 12, 6), (22, 4, 7), (24, 4, 7), (10, 4, 1), (26, 0, 0))
    ),
}


def complaint(command: str, path: Path, *options: str) -> str:
    """The one line that a command prints before it ends with status 2."""
    found = CliRunner().invoke(main, [command, *options, str(path)])
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("pgemu: ")
    assert len(found.stderr) < 1000
    return found.stderr


@pytest.mark.parametrize("command", ["compare", "verify"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named_with_what_helps(tmp_path: Path, command: str, name: str) -> None:
    data, what, helps = FOREIGN[name]
    path = tmp_path / "a.file"
    path.write_bytes(data)
    said = complaint(command, path)
    assert said.startswith(f"pgemu: {path}: this is ")
    assert what in said
    assert helps in said


def test_there_is_a_sample_of_every_format() -> None:
    assert SAMPLES.keys() | {"cloudsuite"} == formats().keys()  # which nothing in a file tells


@pytest.mark.parametrize("name", SAMPLES)
def test_files_of_a_format_that_is_not_wanted_are_named(tmp_path: Path, name: str) -> None:
    """`verify` reads logs of the kernel alone; `compare` no accesses of a program."""
    path = tmp_path / "a.file"
    path.write_bytes(SAMPLES[name])
    module = next(module for module in readers() if name in module.FORMATS)
    title = next(iter(module.FORMATS.values()))
    if name != "ftrace":
        said = complaint("verify", path)
        assert said.startswith(f"pgemu: {path}: this is {title}, expected text of ftrace or trace-cmd")
    if name in _STREAMS:
        said = complaint("compare", path)
        assert said.startswith(f"pgemu: {path}: this is {title}, a program's addresses")


def test_the_kernel_s_log_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "dmesg"
    path.write_text("[    0.000000] Linux version 7.3.4\n[    0.000001] Command line: quiet\n")
    for command in ("compare", "verify"):
        assert f"{path}: no event in it, but 2 lines of the kernel's log, expected text" in complaint(command, path)


def test_no_trace_is_taken_for_a_foreign_file() -> None:
    """Beginnings of every sample that is read, cut anywhere in its first line."""
    found = [LOG.encode(), *SAMPLES.values(), (DATA / "qemu" / "slots-q35.log").read_bytes()]
    found += [path.read_bytes() for path in (DATA / "cases").glob("*.txt")]
    for data in found:
        for at in range(min(len(data), 120)):
            head = data[at:]
            known = max(module.sniff(head) for module in readers()) is Match.SURE
            assert known or foreign(head) is None, head[:80]
    for name in ("gem5", "ORC", "BZh", "QEVM", "GIF8"):
        assert foreign(LOG.lstrip().replace("CPU 0/KVM", name).encode()) is None
