"""Text of Valgrind's Lackey, `valgrind --tool=lackey --trace-mem=yes PROGRAM`: what a program fetches, loads, stores.

Valgrind writes it where the program writes its own messages, so that lines of both are mixed: those are counted and
the first ones kept. lackey/lk_main.c: trace_instr(), trace_load(), trace_store(), trace_modify().
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE, AccessStream, Tally, accesses
from pgemu.trace.fast_lines import wanted, writable
from pgemu.trace.schema import Records
from pgemu.trace.source import Match, Source, gathered, text_of
from pgemu_kernels.words import access_words as W

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"lackey": "text of Valgrind's Lackey"}

_LINE = re.compile(rb"(?:(I)  | ([LSM]) )([0-9A-Fa-f]{1,16}),([0-9]{1,4})")
_CHATTER = re.compile(rb"(==|--|\*\*)[0-9]+\1")
_SUPERBLOCK = re.compile(rb" SB [0-9A-Fa-f]{1,16}")
_BEGINS = re.compile(rb"==[0-9]+== Lackey,")
_KINDS = {b"I": "fetch", b"L": "read", b"S": "write", b"M": "modify"}
_FLAGS = {b"I": EXEC, b"L": READ, b"S": WRITE}
_COUNTS = {"read": W.Y_READS, "write": W.Y_WRITES, "modify": W.Y_MODIFIES, "fetch": W.Y_FETCHES}

_SNIFFED = 1 << 14  # bytes
_ONE_IN = 8  # lines of what is Lackey's beside the program's own
_BLOCK = 1 << 19  # bytes read at once
_ROOM = 1 << 16  # accesses and lines that are none that one call of the kernel makes
_PACE = 4  # how much faster than a log's Python reads these lines

Piece = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]


def sniff(head: bytes) -> Match:
    """Whether Lackey says so itself, or lines are accesses as it writes them, mixed with the program's or not."""
    if b"\0" in head:
        return Match.NO
    if _BEGINS.match(head):
        return Match.SURE
    lines = [line.removesuffix(b"\r") for line in head[:_SNIFFED].split(b"\n")]
    whole = lines[:-1] or lines
    found = sum(_LINE.fullmatch(line) is not None for line in whole)
    others = sum(_CHATTER.match(line) is None for line in whole) - found
    return Match.SURE if found and others <= _ONE_IN * found else Match.NO


def read(source: Source, form: str | None = None) -> AccessStream:
    """A stream of the accesses; a modify is a load and a store, the time is the number of the access.

    :raises InputError: while batches are taken: no text, or more lines that are no accesses than lines that are
    """
    tally = Tally(notes=[NO_TIMES])
    return AccessStream.of(source.name, FORMATS["lackey"], _batches(source, tally), tally, close=source.close)


def _batches(source: Source, tally: Tally) -> Iterator[Records]:
    reader: _Reader = _PythonLines(tally)
    number = 0
    for block in gathered(source.byte_blocks(), _BLOCK):
        text = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        if not text.endswith(b"\n"):
            tally.notes.append("its last line has no newline and is taken to be whole")
            text += b"\n"
        if isinstance(reader, _PythonLines) and wanted(reader.line // _PACE, len(text), "read_accesses"):
            reader = _KernelLines(tally, reader.line)
        for address, size, flags in reader.read(text):
            time = np.arange(number, number + len(address), dtype=np.uint64)
            number += len(address)
            yield accesses(address, size, flags, 0, time, tally)
        tally.refuse_foreign(source.name, "line", sum(tally.inputs.values()), FORMATS["lackey"])
    tally.refuse_foreign(source.name, "line", sum(tally.inputs.values()), FORMATS["lackey"], at_end=True)


class _Reader(Protocol):
    line: int  # number of the last one that was read

    def read(self, text: bytes) -> Iterator[Piece]:
        """Yield address, size and flags of the accesses of whole lines."""


class _PythonLines:
    """Lines by Python."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.line = 0

    def read(self, text: bytes) -> Iterator[Piece]:
        where: list[int] = []
        length: list[int] = []
        flags: list[np.uint8] = []
        kinds = dict.fromkeys(_KINDS, 0)
        for number, line in enumerate(text[:-1].split(b"\n"), self.line + 1):
            found = _LINE.fullmatch(line)
            size = int(found[4]) if found else 0
            if found is None or not 0 < size <= W.MOST_BYTES:
                _foreign(line, number, self._tally)
                continue
            kind, address = found[1] or found[2], int(found[3], 16)
            kinds[kind] += 1
            for flag in (READ, WRITE) if kind == b"M" else (_FLAGS[kind],):
                where.append(address)
                length.append(size)
                flags.append(flag)
        self.line = number
        self._tally.inputs.update({_KINDS[kind]: count for kind, count in kinds.items() if count})
        yield np.array(where, np.uint64), np.array(length, np.uint64), np.array(flags, np.uint8)


class _KernelLines:
    """Lines by a kernel."""

    def __init__(self, tally: Tally, line: int) -> None:
        from pgemu_kernels.run.entries import read_accesses

        self._read: Any = read_accesses
        self._tally = tally
        self.line = line
        self._made = np.zeros(_ROOM, np.uint64), np.zeros(_ROOM, np.uint64), np.zeros(_ROOM, np.uint8)
        self._foreign = np.zeros(_ROOM * W.FOREIGN_WORDS, np.uint64)

    def read(self, text: bytes) -> Iterator[Piece]:
        data = writable(text)
        control = np.zeros(W.Y_WORDS, np.uint64)
        control[W.Y_END], control[W.Y_LINE] = len(text), self.line
        while control[W.Y_AT] < len(text):
            control[[W.Y_ROWS, W.Y_FOREIGN, *_COUNTS.values()]] = 0
            self._read(data, control, *self._made, self._foreign)
            for name, count in _COUNTS.items():
                if control[count]:
                    self._tally.inputs[name] += int(control[count])
            for at, number in self._foreign[: int(control[W.Y_FOREIGN])].reshape(-1, W.FOREIGN_WORDS).tolist():
                _foreign(text[at : text.index(b"\n", at)], number, self._tally)
            rows = int(control[W.Y_ROWS])
            address, size, flags = self._made
            self.line = int(control[W.Y_LINE])
            yield address[:rows].copy(), size[:rows], flags[:rows].copy()


def _foreign(line: bytes, number: int, tally: Tally) -> None:
    """A line that is no access: Valgrind's, or not understood."""
    if _CHATTER.match(line):
        tally.ignored["lines of Valgrind's own"] += 1
    elif _SUPERBLOCK.fullmatch(line):
        tally.ignored["superblocks"] += 1
    elif not line:
        tally.ignored["empty lines"] += 1
    else:
        tally.reject(number, text_of(line[:200]))
