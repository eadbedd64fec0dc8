"""Traces of DynamoRIO's drmemtrace: .trace.zip, and its records plain or compressed, in one file.

clients/drcachesim/common/trace_entry.h: _trace_entry_t, trace_type_t, trace_marker_type_t; versions 1 to 7.

Read so far: the traces of DynamoRIO's own tests, of versions 1, 4, 6 and 7; none with physical addresses, none that
was compressed with lz4.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE, AccessStream, Actors, Tally, accesses
from pgemu.trace.archives import MAGICS, opened_archive
from pgemu.trace.schema import Records
from pgemu.trace.source import MOST_RECORD_GROWTH, Match, Source, records
from pgemu.trace.v2p import beside, merged, read_v2p, table

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"drmemtrace": "a trace of DynamoRIO's drmemtrace"}


def _names(text: str) -> list[str]:
    return text.split(",")


_TYPES = _names(
    "read,write,prefetch,prefetch to L1,prefetch to L2,prefetch to L3,non-temporal prefetch,prefetch for reading,"
    "prefetch for writing,instruction prefetch,instruction,direct jump,indirect jump,conditional jump,direct call,"
    "indirect call,return,instruction bundle,instruction flush,end of an instruction flush,data flush,"
    "end of a data flush,thread,thread exit,process,header,footer,hardware prefetch,marker,instruction without a fetch,"
    "instruction that may be fetched,sysenter,read prefetch to L1 (NT),read prefetch to L2 (NT),"
    "read prefetch to L3 (NT),instruction prefetch to L1,instruction prefetch to L1 (NT),instruction prefetch to L2,"
    "instruction prefetch to L2 (NT),instruction prefetch to L3,instruction prefetch to L3 (NT),write prefetch to L1,"
    "write prefetch to L1 (NT),write prefetch to L2,write prefetch to L2 (NT),write prefetch to L3,"
    "write prefetch to L3 (NT),encoding,taken jump,untaken jump"
)
"""Types of records, trace_type_t."""
_MARKERS = _names(
    "kernel event,kernel transfer,timestamp,cpu,function,return address,argument,return value,split value,file type,"
    "cache line size,instruction count,version,rseq abort,window,physical address,no physical address,virtual address,"
    "page size,system call index,instructions of a chunk,chunk footer,record ordinal,filter endpoint,rseq entry,"
    "system call,blocking system call,system call trace,end of a system call trace,branch target,system call failed,"
    "direct thread switch,core wait,core idle,context switch,end of a context switch,vector length,unschedule,schedule,"
    "timeout,signal,uncompleted instruction,end within a block,hardware event,hardware return,raw kernel event,"
    "skipped access"
)
"""Kinds of markers, trace_marker_type_t."""
_FIRST_OF_USERS = 101  # of markers: TRACE_MARKER_TYPE_RESERVED_END

_READ, _WRITE, _THREAD, _PROCESS, _HEADER, _FOOTER, _MARKER = 0, 1, 22, 24, 25, 26, 28
_FETCHES = (10, 11, 12, 13, 14, 15, 16, 31, 48, 49)
_TIMESTAMP, _FILE_TYPE, _PHYSICAL, _VIRTUAL, _PAGE_SIZE = 2, 9, 15, 17, 18
_FILTERED, _NO_DATA = 0x1 | 0x80 | 0x100 | 0x2000, 0x4  # offline_file_type_t
_NEWEST = 7  # TRACE_ENTRY_VERSION
_MOST_VERSION = 255

_RECORD = np.dtype([("type", "<u2"), ("size", "<u2"), ("value", "<u8")])
_ACCESS = np.zeros(1 << 16, np.bool_)
_ACCESS[[_READ, _WRITE, *_FETCHES]] = True
_OF_PAGES = np.zeros(1 << 16, np.bool_)
_OF_PAGES[[_PHYSICAL, _VIRTUAL, _PAGE_SIZE]] = True
_FLAGS = np.full(len(_TYPES), EXEC)
_FLAGS[[_READ, _WRITE]] = READ, WRITE

_FIRST_TIME = np.uint64(11_644_473_600_000_000)  # 1970, microseconds from 1601
_LAST_TIME = _FIRST_TIME + np.uint64(((1 << 64) - 1) // 1000)
_SNAPPY, _LZ4 = b"\xff\x06\0\0sNaPpY", b"\x04\x22\x4d\x18"
_CHUNK = re.compile(r"chunk\.([0-9]{1,9})")
_PIECE = 1 << 18
_MOST_PAGES = 1 << 22  # whose translations are kept

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]


def sniff(head: bytes) -> Match:
    """By the first record, a header with a version; or what the records are packed with, by its magic."""
    if head.startswith(_LZ4):  # a log may be packed so, too
        inside = _begin_of_lz4(head)
        return sniff(inside) if inside else Match.POSSIBLE
    if head.startswith(_SNAPPY):
        return Match.SURE
    if head.startswith(MAGICS):
        return Match.SURE if _CHUNK.match(head[30:50].decode("latin-1")) else Match.POSSIBLE
    if len(head) < 8 or not head.startswith(struct.pack("<HH", _HEADER, 0)):
        return Match.NO
    if int.from_bytes(head[4:8], "little") > _MOST_VERSION:
        return Match.NO
    if len(head) < 12:
        return Match.POSSIBLE
    follows = int.from_bytes(head[12:14], "little") if head[8:12] == bytes(4) else int.from_bytes(head[8:10], "little")
    return Match.SURE if follows in (_THREAD, _MARKER) else Match.NO


def read(source: Source, form: str | None = None, v2p: str | os.PathLike[str] | None = None) -> AccessStream:
    """A stream of fetches, reads and writes, of all threads of the file in its order.

    Times are nanoseconds since 1970 by the last timestamp, before the first one the number of the access.

    :param v2p: a file of translations, None: v2p.textproto where it lies beside the trace
    :raises InputError: packed in a way that cannot be read, or as of read_v2p(); while batches are taken: a damaged
        archive, a record that is cut, or more records that are not understood than are
    """
    tally = Tally()
    try:
        if source.head.startswith(_SNAPPY):
            raise InputError(
                "packed with snappy (.sz), expected .trace.zip or .trace.gz, or what it unpacks to", source.name
            )
        if source.head.startswith(_LZ4):
            _lz4(source.name)
        found = v2p if v2p is not None or source.name == "<stdin>" else beside(source.name)
        known = None if found is None else read_v2p(found)
    except InputError:
        source.close()
        raise
    if known is not None:
        tally.notes.append(f"its translations are those of {os.path.basename(os.fspath(found or ''))}")
    trace = _Trace(source, tally)
    stream = AccessStream.of(source.name, FORMATS["drmemtrace"], trace.batches(), tally, known, source.close)
    trace.stream = stream
    return stream


class _Trace:
    """What is known while records are read: the thread, the time, the translations."""

    stream: AccessStream

    def __init__(self, source: Source, tally: Tally) -> None:
        self._source, self._tally = source, tally
        self._actors = Actors(tally, source.name)
        self._actor = 0
        self._time: int | None = None
        self._done = self._number = 0
        self._processes: set[int] = set()
        self._last = -1
        self._no_size = self._outside = 0
        self._page = 1 << 12
        self._physical: int | None = None
        self._pages: dict[int, int] = {}  # virtual address and logarithm of the page's size -> physical address
        self._moved = 0

    def batches(self) -> Iterator[Records]:
        name = self._source.name
        for block in records(_pieces(self._source, self._tally), _RECORD.itemsize, self._source):
            rows = np.frombuffer(block, _RECORD)
            if not self._done:
                self._check_first(block)
            yield self._read(rows)
            self._done += len(rows)
            self._tally.refuse_foreign(name, "record", self._done - self._tally.rejected, FORMATS["drmemtrace"])
        self._finish()
        understood = sum(self._tally.inputs.values())
        self._tally.refuse_foreign(name, "record", understood, FORMATS["drmemtrace"], at_end=True)

    def _check_first(self, block: bytes) -> None:
        kind, size, version = struct.unpack_from("<HHQ", block)
        if kind != _HEADER or size:
            what = f"record 1 is of type {kind}, expected a header ({_HEADER}) of {self._source.expected}"
            raise InputError(what, self._source.name)
        if version >> 32 & 0xFFFF in (_THREAD, _MARKER):  # of the second record, if this one has 8 bytes
            raise InputError("records of a program of 32 bits, expected those of 64 bits", self._source.name)
        if version > _MOST_VERSION:
            raise InputError(f"record 1 is of version {version}, expected 1 to {_NEWEST}", self._source.name)
        if version > _NEWEST:
            self._tally.notes.append(f"it has version {version}, newer than {_NEWEST}: what that changed is not known")

    def _read(self, rows: npt.NDArray[Any]) -> Records:
        """The accesses of some records."""
        types = rows["type"].astype(np.intp)
        values: Words = rows["value"]
        counts = np.bincount(types, minlength=len(_TYPES))
        where = np.flatnonzero(_ACCESS[types])
        address, size, kind = values[where], rows["size"][where], types[where]
        empty = (size == 0) & (address == 0)
        if len(counts) > len(_TYPES) or empty.any():
            self._reject(rows, np.sort(np.concatenate([np.flatnonzero(types >= len(_TYPES)), where[empty]])))
            counts = counts[: len(_TYPES)] - np.bincount(kind[empty], minlength=len(_TYPES))
            where, address, size, kind = (column[~empty] for column in (where, address, size, kind))
        self._count(counts)
        self._last = int(types[-1])
        self._no_size += int(np.count_nonzero(size == 0))
        if counts[_PROCESS] and len(self._processes) < 2:
            self._processes.update(np.unique(values[types == _PROCESS])[:2].tolist())
        actor = self._actor_of(np.flatnonzero(types == _THREAD), values, where) if counts[_THREAD] else self._actor
        time = self._time_of(rows, np.flatnonzero(types == _MARKER), where)
        self._number += len(where)
        return accesses(address, size.astype(np.uint64), _FLAGS[kind], actor, time, self._tally)

    def _count(self, counts: Places) -> None:
        """Count accesses, and by name what is none."""
        tally = self._tally
        for code in np.flatnonzero(counts).tolist():
            if _ACCESS[code]:
                tally.inputs["read" if code == _READ else "write" if code == _WRITE else "fetch"] += int(counts[code])
            elif code != _MARKER:
                tally.ignored[_TYPES[code]] += int(counts[code])

    def _reject(self, rows: npt.NDArray[Any], which: Places) -> None:
        for row in which[:4].tolist():
            kind, size, value = rows[row].tolist()
            self._tally.reject(self._done + row + 1, f"type {kind}, size {size}, value {value:#x}")
        self._tally.rejected += max(len(which) - 4, 0)

    def _actor_of(self, places: Places, values: Words, where: Places) -> npt.NDArray[np.uint16]:
        """The actors of the accesses at `where`: that of the last record of a thread."""
        actors = self._actors.of(values[places])
        found = np.repeat(np.concatenate([[np.uint16(self._actor)], actors]), _spans(places, where))
        self._actor = int(actors[-1])
        return found

    def _time_of(self, rows: npt.NDArray[Any], markers: Places, where: Places) -> Words:
        """Times of the accesses at `where`: of the last timestamp; the other markers are counted."""
        kinds, values = rows["size"][markers], rows["value"][markers]
        for kind, count in enumerate(np.bincount(kinds).tolist() if kinds.size else []):
            if count:
                known = _MARKERS[kind] if kind < len(_MARKERS) else "users'" if kind >= _FIRST_OF_USERS else "unknown"
                self._tally.ignored[f"marker: {known}"] += count
        of_pages = _OF_PAGES[kinds]
        if of_pages.any():
            self._translate(kinds[of_pages].tolist(), values[of_pages].tolist())
        for bits in values[kinds == _FILE_TYPE].tolist():
            self._note_file_type(bits)
        stamps = kinds == _TIMESTAMP
        times = self._nanoseconds(values[stamps])
        spans = _spans(markers[stamps], where)
        found = np.repeat(np.concatenate([[np.uint64(self._time or 0)], times]), spans)
        if self._time is None:
            found[: spans[0]] = np.arange(self._number, self._number + int(spans[0]), dtype=np.uint64)
        self._time = int(times[-1]) if times.size else self._time
        return found

    def _nanoseconds(self, micro: Words) -> Words:
        """Nanoseconds since 1970 of microseconds since 1601; what is outside is moved to the end, and counted."""
        since = np.clip(micro, _FIRST_TIME, _LAST_TIME)
        self._outside += int(np.count_nonzero(since != micro))
        times: Words = (since - _FIRST_TIME) * np.uint64(1000)
        return times

    def _note_file_type(self, bits: int) -> None:
        notes = self._tally.notes
        for mask, note in (
            (_FILTERED, "it was filtered while it was recorded: accesses that hit the filter's cache are not in it"),
            (_NO_DATA, "it was recorded without data accesses"),
        ):
            if bits & mask and note not in notes:
                notes.append(note)

    def _translate(self, kinds: list[int], values: list[int]) -> None:
        """A physical address, then the virtual one that it is of; the last translation of a page stays."""
        for kind, value in zip(kinds, values, strict=True):
            if kind == _PHYSICAL:
                self._physical = value
            elif kind == _VIRTUAL and self._physical is not None:
                page = value & -self._page | self._page.bit_length() - 1
                frame = self._physical & -self._page
                if len(self._pages) < _MOST_PAGES or page in self._pages:
                    self._moved += self._pages.get(page, frame) != frame
                    self._pages[page] = frame
                else:
                    self._tally.ignored[f"translations past the first {_MOST_PAGES:,} pages"] += 1
                self._physical = None
            elif kind == _PAGE_SIZE and value and not value & value - 1 and 1 << 12 <= value <= 1 << 30:
                self._page = value

    def _finish(self) -> None:
        """What can be said at the end."""
        notes = self._tally.notes
        if self._time is None:
            notes.append(NO_TIMES)
        if self._last != _FOOTER:
            notes.append("it has no footer: its end may be missing")
        if len(self._processes) > 1:
            notes.append("it is of several processes, whose addresses are taken to be of one")
        if self._no_size:
            notes.append(f"{self._no_size:,} accesses whose size it does not tell are taken to have one byte")
        if self._outside:
            notes.append(f"{self._outside:,} of its timestamps are before 1970, or past 2554: taken to be its ends")
        if self._moved:
            notes.append(f"{self._moved:,} translations differ from that page's before: the last one stays")
        if self._pages:
            rows = ((page & -(1 << 12), frame, 1 << (page & 0xFFF)) for page, frame in self._pages.items())
            self.stream.v2p = merged(self.stream.v2p, table(rows, self._source.name))


def _spans(places: Places, where: Places) -> Places:
    """How many of `where` are before the first place, between two of them, and behind the last."""
    found: Places = np.diff(np.searchsorted(where, places), prepend=0, append=len(where))
    return found


# ---------------------------------------------------------------------- what it is packed with


def _pieces(source: Source, tally: Tally) -> Iterator[bytes]:
    if source.head.startswith(MAGICS):
        return _of_archive(source, tally)
    return _unpacked(source) if source.head.startswith(_LZ4) else source.raw_blocks()


def _of_archive(source: Source, tally: Tally) -> Iterator[bytes]:
    """What the chunks of an archive hold, by their numbers."""
    with opened_archive(source) as archive:
        members = archive.infolist()
        found = [(int(match[1]), one) for one in members if (match := _CHUNK.fullmatch(one.filename))]
        chunks = sorted(found, key=lambda one: one[0])
        if not chunks:
            raise InputError("an archive without chunk.0000, expected a .trace.zip of DynamoRIO", source.name)
        if len(chunks) < len(members):
            tally.ignored["members of the archive that are no chunk"] += len(members) - len(chunks)
        for number, (found_number, chunk) in enumerate(chunks):
            if found_number < number:
                raise InputError(f"an archive with two chunks {found_number}, expected one", source.name)
            if found_number > number:
                raise InputError(
                    f"an archive with {chunk.filename}, expected chunk.{number:04d} before it", source.name
                )
        assert archive.fp is not None
        size = archive.fp.seek(0, os.SEEK_END)
        yield from _of_chunks(archive, [chunk for _, chunk in chunks], size, source.name)


def _of_chunks(archive: zipfile.ZipFile, chunks: list[zipfile.ZipInfo], size: int, name: str) -> Iterator[bytes]:
    given = 0
    for chunk in chunks:
        with archive.open(chunk) as member:
            while piece := member.read(_PIECE):
                given += len(piece)
                if given > MOST_RECORD_GROWTH * size:
                    raise InputError(
                        f"{chunk.filename}: grows to more than {MOST_RECORD_GROWTH} times the archive", name
                    )
                yield piece


def _begin_of_lz4(head: bytes) -> bytes:
    """How what frames of lz4 hold begins, b"" where the library is missing or the frame is damaged."""
    with suppress(InputError, RuntimeError, ValueError):
        return bytes(_lz4("").LZ4FrameDecompressor().decompress(head))[:64]
    return b""


def _lz4(name: str) -> Any:
    try:
        return import_module("lz4.frame")
    except ImportError:
        raise InputError(
            "packed with lz4, for which Python's library lz4 is needed (or unpack it: lz4 -d)", name
        ) from None


def _unpacked(source: Source) -> Iterator[bytes]:
    """What frames of lz4 hold."""
    frame = _lz4(source.name)
    decoder = frame.LZ4FrameDecompressor()
    try:
        for block in source.raw_blocks():
            data = block
            while data or not (decoder.eof or decoder.needs_input):
                if decoder.eof:
                    decoder = frame.LZ4FrameDecompressor()
                yield decoder.decompress(data, _PIECE)
                data = (decoder.unused_data or b"") if decoder.eof else b""
    except RuntimeError as error:
        raise InputError(f"damaged lz4 stream ({error})", source.name) from None
    if not decoder.eof:
        raise InputError("truncated: the lz4 stream ends early", source.name)
