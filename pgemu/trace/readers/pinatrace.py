"""Text of Pin's example tool pinatrace: what each instruction reads and writes, without sizes and fetches.

source/tools/ManualExamples/pinatrace.cpp: RecordMemRead(), RecordMemWrite(), Fini().

Read so far were only files written from that layout, none of Pin's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from pgemu.trace.accesses import NO_TIMES, READ, WRITE, AccessStream, Tally, accesses
from pgemu.trace.schema import Records
from pgemu.trace.source import Match, Source, gathered, text_of

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"pinatrace": "text of Pin's pinatrace"}

_LINE = re.compile(rb"0x[0-9A-Fa-f]{1,16}: ([RW]) 0x([0-9A-Fa-f]{1,16})\r?")
_END = b"#eof"
_SNIFFED = 1 << 14  # bytes
_BLOCK = 1 << 18


def sniff(head: bytes) -> Match:
    """Every whole line is an access, but for the mark of the end."""
    lines = head[:_SNIFFED].split(b"\n")
    whole = [line for line in lines[:-1] or lines if line.rstrip() not in (b"", _END)]
    return Match.SURE if whole and all(map(_LINE.fullmatch, whole)) else Match.NO


def read(source: Source, form: str | None = None) -> AccessStream:
    """A stream of the accesses; the time is the number of the access.

    :raises InputError: while batches are taken: no text, or more lines that are no accesses than lines that are
    """
    tally = Tally()
    return AccessStream.of(source.name, FORMATS["pinatrace"], _batches(source, tally), tally, close=source.close)


def _batches(source: Source, tally: Tally) -> Iterator[Records]:
    expected = FORMATS["pinatrace"]
    tally.notes += [
        "it has no sizes: an access is of the page that it begins in",
        "it has no fetches",
        NO_TIMES,
    ]
    line = number = 0
    ended = False
    for block in gathered(source.byte_blocks(), _BLOCK):
        where: list[int] = []
        flags: list[np.uint8] = []
        for text in block.removesuffix(b"\n").split(b"\n"):
            line += 1
            found = _LINE.fullmatch(text)
            if found:
                where.append(int(found[2], 16))
                flags.append(WRITE if found[1] == b"W" else READ)
            elif text.rstrip() == _END:
                ended = True
            elif text.rstrip():
                tally.reject(line, text_of(text[:200]))
            else:
                tally.ignored["empty lines"] += 1
        writes = flags.count(WRITE)
        tally.inputs.update({kind: n for kind, n in (("read", len(flags) - writes), ("write", writes)) if n})
        time = np.arange(number, number + len(where), dtype=np.uint64)
        number += len(where)
        yield accesses(np.array(where, np.uint64), None, np.array(flags, np.uint8), 0, time, tally)
        tally.refuse_foreign(source.name, "line", number, expected)
    if not ended:
        tally.notes.append("it has no #eof: its end may be missing")
    tally.refuse_foreign(source.name, "line", number, expected, at_end=True)
