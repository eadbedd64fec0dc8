"""Instruction traces of ChampSim: records of 64 bytes, or of 96 with CloudSuite's, without head or magic.

inc/trace_instruction.h: input_instr, cloudsuite_instr, little endian with natural alignment. The order of an
instruction's accesses is not recorded: it is fetched, then reads, then writes. No size is recorded either.

Read so far were only files written from that layout, none of ChampSim's own tracers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE, AccessStream, Actors, Tally, accesses
from pgemu.trace.schema import Records
from pgemu.trace.source import Match, Source, records

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {
    "champsim": "an instruction trace of ChampSim",
    "cloudsuite": "an instruction trace of ChampSim with CloudSuite's records",
}


@dataclass(frozen=True)
class _Layout:
    """Where things are in a record, in words of 64 bits.

    Attributes:
        words: of a record
        reads, writes: the words of source and destination memory, 0 where a slot is unused
        asid: the word that begins with the address space, None: there is none
    """

    words: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    asid: int | None = None

    def of(self, flag: np.uint8) -> tuple[int, ...]:
        return self.writes if flag == WRITE else self.reads


_LAYOUTS = {
    "champsim": _Layout(8, reads=(4, 5, 6, 7), writes=(2, 3)),
    "cloudsuite": _Layout(12, reads=(7, 8, 9, 10), writes=(3, 4, 5, 6), asid=11),
}
_IP, _REGISTERS = 0, 1  # words; the second begins with is_branch and branch_taken
_NO_FLAGS = np.uint64(0xFEFE)  # bits that these two bytes have not
_ASID = np.uint64(0xFFFF)
_HALF, _ADDRESS_BITS = np.uint64(1 << 56), np.uint64(57)  # of addresses with five levels
_SNIFFED = 100  # records
_LEAST = 4
_NEAR = 16  # bytes; of x86-64 an instruction has 15 at most
_ONE_IN = 4  # instructions that follow the one before in memory, at least

Words = npt.NDArray[np.uint64]


def sniff(head: bytes) -> Match:
    """How plausible the first records are: nothing else tells, so that only a hundred plausible ones are sure."""
    plausible = _plausible(head, _LAYOUTS["champsim"])
    if plausible >= _SNIFFED:
        return Match.SURE
    return Match.POSSIBLE if plausible or _plausible(head, _LAYOUTS["cloudsuite"]) else Match.NO


def _plausible(head: bytes, layout: _Layout) -> int:
    """How many records the head begins with if all of them are plausible, 0 if one is not."""
    count = min(len(head) // (8 * layout.words), _SNIFFED)
    words = np.frombuffer(head, "<u8", count * layout.words).reshape(count, layout.words)
    if count < _LEAST or not _understood(words).all():
        return 0
    memory = words[:, [*layout.reads, *layout.writes]]
    ip = words[:, _IP]
    follows = np.count_nonzero(ip[1:] - ip[:-1] - np.uint64(1) < _NEAR)
    taken = words[:, _REGISTERS] & np.uint64(0x101)
    used = bool(memory.any()) and _canonical(memory).all() and not (taken == np.uint64(0x100)).any()
    return count if used and follows * _ONE_IN >= count else 0


def _canonical(address: Words) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (address + _HALF) >> _ADDRESS_BITS == 0
    return found


def _understood(words: Words) -> npt.NDArray[np.bool_]:
    """Of each record: whether its flags are none or one, and an instruction may be where it says."""
    ip = words[:, _IP]
    found: npt.NDArray[np.bool_] = (words[:, _REGISTERS] & _NO_FLAGS == 0) & (ip != 0) & _canonical(ip)
    return found


def read(source: Source, form: str | None = None) -> AccessStream:
    """A stream of fetches, reads and writes; the time is the number of the access, CloudSuite's asid the thread.

    :raises InputError: records of CloudSuite's layout that nobody named; while batches are taken: a record that is cut,
        or more records that cannot be any than can
    """
    if form is None and not _plausible(source.head, _LAYOUTS["champsim"]):
        source.close()
        what = f"this may be {FORMATS['cloudsuite']}: nothing in it says so, --input-format cloudsuite does"
        raise InputError(what, source.name)
    form = form or "champsim"
    tally = Tally()
    return AccessStream.of(source.name, FORMATS[form], _batches(source, form, tally), tally, close=source.close)


def _batches(source: Source, form: str, tally: Tally) -> Iterator[Records]:
    layout = _LAYOUTS[form]
    tally.notes += ["it has no sizes: an access is of the page that it begins in", NO_TIMES]
    actors = Actors(tally, source.name)
    done = number = 0

    def check() -> None:
        tally.refuse_mostly_foreign(source.name, "record", tally.inputs["fetch"], FORMATS[form])

    for block in records(source.raw_blocks(), 8 * layout.words, source, check):
        words = np.frombuffer(block, "<u8").reshape(-1, layout.words)
        good = _understood(words)
        if not good.all():
            _reject(words, good, done, tally)
            tally.refuse_foreign(source.name, "record", tally.inputs["fetch"], FORMATS[form])
        done += len(words)
        words = words[good] if not good.all() else words
        address, flags, first = _placed(words, layout, tally)
        actor: npt.NDArray[np.uint16] | int = 0
        if layout.asid is not None:
            own = actors.of(words[:, layout.asid] & _ASID)
            actor = np.repeat(own, np.diff(first, append=len(address)))
        time = np.arange(number, number + len(address), dtype=np.uint64)
        number += len(address)
        yield accesses(address, None, flags, actor, time, tally)
    tally.refuse_foreign(source.name, "record", tally.inputs["fetch"], FORMATS[form], at_end=True)


def _placed(words: Words, layout: _Layout, tally: Tally) -> tuple[Words, npt.NDArray[np.uint8], npt.NDArray[np.intp]]:
    """Address and flags of the accesses of some instructions in their order, and where those of each begin."""
    count = np.ones(len(words), np.intp)
    is_used = words != 0
    used = [(word, flag, np.flatnonzero(is_used[:, word])) for flag in (READ, WRITE) for word in layout.of(flag)]
    for _, _, rows in used:
        count[rows] += 1
    after = np.cumsum(count)
    first = after - count
    address = np.empty(int(after[-1]) if len(after) else 0, np.uint64)
    flags = np.empty(len(address), np.uint8)
    address[first], flags[first] = words[:, _IP], EXEC
    tally.inputs["fetch"] += len(words)
    free = first + 1
    for word, flag, rows in used:
        at = free[rows]
        address[at], flags[at] = words[:, word][rows], flag
        free[rows] = at + 1
        tally.inputs["write" if flag == WRITE else "read"] += len(rows)
    return address, flags, first


def _reject(words: Words, good: npt.NDArray[np.bool_], before: int, tally: Tally) -> None:
    """Count the records that are not understood."""
    bad = np.flatnonzero(~good)
    for row in bad[:4].tolist():
        flags = int(words[row, _REGISTERS])
        what = f"ip {int(words[row, _IP]):#x}, is_branch {flags & 0xFF}, branch_taken {flags >> 8 & 0xFF}"
        tally.reject(before + row + 1, what)
    tally.rejected += max(len(bad) - 4, 0)
