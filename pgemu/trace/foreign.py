"""Files that are no trace, or one that is not read: what they are called, and what helps, told by how they begin.

Sources: file formats as their own documentation or headers name them (elf.h, pcap-savefile(5), pkzip's APPNOTE.TXT,
systemd's journal-file-format, the Common Trace Format 1.8, QEMU's scripts/simpletrace.py, gem5's
src/proto/packet.proto, Ramulator 2's src/frontend/impl/memory_trace, Pin's pinatrace.cpp, libCacheSim's
oracleGeneral.h).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from pgemu.trace.events import PERF_FIELDS

__all__ = ("foreign",)

_READ = "expected text of ftrace, trace-cmd or perf script, or a table"
_UNPACK = "give the file in it"
_RECORD = "record the events of KVM with ftrace, trace-cmd or perf"
_CONVERT = "write its columns as Parquet or CSV (pgemu compare --help)"

_ONCE = "decompress it once first"
_ARE = "xz, gzip and zstd are"
_PACKED = (b"\xfd7zXZ\0", "xz"), (b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")

_MAGICS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x7fELF", "an ELF file: a program, a library or a memory image", "pgemu walk, dump and page read images"),
    (0, b"KDUMP   ", "a dump of kdump", "pgemu walk reads ELF and raw images (makedumpfile -E)"),
    (0, b"gem5", "gem5's packet trace, which is not read", _CONVERT),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    *((0, magic, f"compressed twice, with {name} inside", _ONCE) for magic, name in _PACKED),
    (0, b"BZh", "compressed with bzip2, which is not read", f"{_ARE}: bunzip2 first"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -d first, or --input-format drmemtrace if it is that"),
    (0, b"\x89LZO", "compressed with lzop, which is not read", f"{_ARE}: lzop -d first"),
    (0, b"\x1f\x9d", "compressed with compress, which is not read", f"{_ARE}: uncompress first"),
    (0, b"\xd4\xc3\xb2\xa1", "captured packets (pcap)", _READ),
    (0, b"\xa1\xb2\xc3\xd4", "captured packets (pcap)", _READ),
    (0, b"\x4d\x3c\xb2\xa1", "captured packets (pcap)", _READ),
    (0, b"\x0a\x0d\x0d\x0a", "captured packets (pcapng)", _READ),
    (0, b"SQLite format 3\0", "an SQLite database", "export the table as CSV"),
    (0, b"LPKSHHRH", "a journal of systemd", "print it with journalctl --file FILE -k -o short-monotonic"),
    (0, b"\xc1\x1f\xfc\xc1", "a trace in the Common Trace Format (CTF)", _RECORD),
    (0, b"\x75\xd1\x1f\xc1", "metadata of a trace in the Common Trace Format (CTF)", _RECORD),
    (0, b"\x57\x13\xa2\xa5", "metadata of a trace in the Common Trace Format (CTF)", _RECORD),
    (
        0, b"\xff" * 8 + (0xF2B177CB0AA429B4).to_bytes(8, "little"), "QEMU's binary trace",
        "print it with QEMU's scripts/simpletrace.py",
    ),
    (0, b"QEVM", "a saved VM of QEMU", _READ),
    (0, b"QFI\xfb", "a disk image (qcow2)", _READ),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (0, b"\x93NUMPY", "an array of NumPy", _CONVERT),
    (0, b"ARROW1", "an Arrow file", "write it as Parquet: pyarrow.parquet.write_table"),
    (0, b"FEA1", "a Feather file", "write it as Parquet: pandas.read_feather(FILE).to_parquet(FILE)"),
    (0, b"ORC", "an ORC file", _CONVERT),
    (0, b"Obj\x01", "an Avro file", _CONVERT),
    (0, b"\x89PNG\r\n", "a picture (PNG)", _READ),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", _READ),
    (0, b"GIF8", "a picture (GIF)", _READ),
)  # fmt: skip
"""Where something stands, what it is, what the file then is called, what helps."""

_TEXTS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(shape, re.IGNORECASE | re.MULTILINE), name, help_)
    for shape, name, help_ in (
        (r"\A\s*<(?:!doctype html|html|head|body)\b", "a web page (HTML)", "save the text itself (raw, attachment)"),
        (r"\A\s*<\?xml\b", "an XML document", _READ),
        (r"\A\s*\{\s*\"linux-perf-json-version\"", "what perf data convert --to-json makes", "give perf.data itself"),
        (r"\A\s*\{\s*\"traceEvents\"", "a trace of Chrome's format (JSON)", _RECORD),
        (r"\A\s*(?:\{\s*(?:\"|\}|\Z)|\[\s*(?:[\[{\"\]]|-?\d[\d.]*\s*,|\Z))", "JSON", _CONVERT),
        (r"\A(?:(?:#[^\n]*)?\n)*\s*Performance counter stats for ", "counts of perf stat", _RECORD),
        (r"\A# started on \w{3} \w{3} ", "counts of perf stat", _RECORD),
        (
            r"\A# To display the perf\.data header info", "what perf report prints",
            f"print the events: perf script -F {PERF_FIELDS}",
        ),
        (r"\A__CURSOR=", "a journal of systemd, exported", "print it with journalctl -k -o short-monotonic"),
        (
            r"\A(?:[^\n]*\(qemu\)[^\n]*\n+|\s*\n|QEMU [\d.]+ monitor[^\n]*\n)*"
            r"(?:address-space: |FlatView #\d|memory-region: )",
            "QEMU's info mtree, which has memory slots and no accesses",
            "give it beside a trace: --memslots-from FILE",
        ),
        (r"\AMemTotal: +\d+ kB", "/proc/meminfo", _RECORD),
        (r"\A==\d+== Lackey, an example Valgrind tool", "text of Valgrind's Lackey", "a program's addresses, no VM's"),
        (
            r"\A(?:(?:LD|ST) (?:0x[0-9a-f]+|\d+)\s*\n){2}", "a trace of Ramulator (loads and stores)",
            "a program's addresses, no VM's",
        ),
        (
            r"\A(?:[RW] \d+(?:,\d+){2,}\s*\n){2}", "a trace of Ramulator (reads and writes)",
            "places in DRAM, no VM's addresses",
        ),
        (r"\A(?:diff --git |--- [^\n]*\n\+\+\+ )", "a patch", _READ),
        (r"\A/\* CTF \d", "metadata of a trace in the Common Trace Format (CTF)", _RECORD),
        (r"\A%PDF-\d", "a PDF document", _READ),
        (r"\A%!PS", "a PostScript document", _READ),
        (r"\A#!\s*/", "a script", _READ),
        (r"\A\{\\rtf", "a document (RTF)", "save it as plain text"),
    )
)  # fmt: skip

_HEAD = 4096  # of a text, that is looked at
_LOOKED_AT = 256  # bytes in which binary data shows itself
_PRINTABLE = bytes([*range(7, 14), 27, *range(32, 127)])
_ORACLE = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


def _is_oracle_general(head: bytes) -> bool:
    """Records of libCacheSim, which have no magic: times in order, sizes, and later places of the same object."""
    count = min(len(head) // _ORACLE.itemsize, 256)
    if count < 4 or b"\0" not in head:
        return False
    records = np.frombuffer(head, _ORACLE, count)
    time, size, following = (records[name].astype(np.int64) for name in ("time", "size", "next"))
    later = (following == -1) | (following > np.arange(count)) & (following < 1 << 40)
    sizes = (size > 0) & (size < 1 << 31)
    return bool(later.all() and sizes.all() and (np.diff(time) >= 0).all() and len(set(records["object"].tolist())) > 1)


_SHAPES: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (_is_oracle_general, "requests of libCacheSim (oracleGeneral), by its looks", _CONVERT),
)


def foreign(head: bytes, expected: str | None = None) -> str | None:
    """What a file is that begins so, with what helps, as a message says it; None for no known one.

    :param head: decompressed
    :param expected: what it should be, None: any trace
    """
    found = _known(head)
    if found is None:
        return None
    name, help_ = found
    if expected is None:
        return f"this is {name}: {help_}"
    # How another format is made does not help who wants this one.
    return f"this is {name}, expected {expected}" + (f": {help_}" if help_.startswith((_UNPACK, _ONCE, _ARE)) else "")


def _known(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins so, and what helps."""
    is_text = not head[:_LOOKED_AT].translate(None, _PRINTABLE)
    for at, magic, name, help_ in _MAGICS:
        # What begins like this may be a task's name.
        if head.startswith(magic, at) and not is_text:
            return name, help_
    if b"\0" not in head[:_HEAD]:
        text = head[:_HEAD].decode("utf-8", "replace")
        for shape, name, help_ in _TEXTS:
            if shape.search(text):
                return name, help_
    for looks, name, help_ in _SHAPES:
        if looks(head):
            return name, help_
    return None
