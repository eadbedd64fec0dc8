"""Long logs, read as bytes by a kernel: every line that looks like one before, the others as ever.

Loading numba and the kernel takes about as long as Python takes for 200,000 lines, compiling it as long as for 800,000.
So a log is read by Python until it has turned out to be long (`wanted`), and short ones never load numba. Where that is
loaded anyway, and the kernel was compiled before, the kernel reads from the first line on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pgemu.trace.events import event_name
from pgemu.trace.task_calls import CALL_CODES
from pgemu_kernels.words import log_words as L
from pgemu_kernels.words.log_words import EventCode, Shape

if TYPE_CHECKING:
    from array import array

__all__ = ("FastLines", "wanted", "writable")

LEAST_BYTES = 1 << 16  # of a block: of less nobody waits
LINES_TO_LOAD = 1 << 18  # read by Python before numba and the kernel are loaded, which takes a second
LINES_TO_COMPILE = 1 << 20  # ... before the kernel is compiled, which takes three

_ROOM = 1 << 14  # rows of each kind that one call can make
_MOST_SLOW = 1 << 10  # lines that Python reads at once where the kernel read none
_MASK = (1 << 64) - 1
_WIDTH = L.SEEN_WORDS

_H, _D, _W = "H", "D", "W"  # a hexadecimal number, a decimal one, a word
_SHAPES: dict[str, tuple[EventCode, tuple[str, ...]]] = {
    "page_fault_user": (EventCode.HOST_FAULT, (" address=", _H, " ip=", _W, " error_code=", _H)),
    "kvm_page_fault": (
        EventCode.GUEST_FAULT,
        (" vcpu ", _D, " rip ", _W, " address ", _H, " error_code ", _H),
    ),
    "kvm_unmap_hva_range": (EventCode.UNMAP, (" mmu notifier unmap range: ", _H, " -- ", _H)),
    "kvm_vm_set_mem_attributes": (EventCode.ATTRIBUTES, (" ", _H, " -- ", _H, " [", _H, "]")),
    "kvm_mmu_set_spte": (EventCode.SET_SPTE, (" gfn ", _H, " spte ", _H, " ", _W, " level ", _D, " at ", _H)),
    "kvm_tdp_mmu_spte_changed": (
        EventCode.SPTE_CHANGED,
        (" as id ", _D, " gfn ", _H, " level ", _D, " old_spte ", _H, " new_spte ", _H),
    ),
}
"""Events that the kernel reads, by name: what is behind their first word, exactly as Linux prints it."""

_MADVISE: dict[str, tuple[str, ...]] = {
    "sys_madvise(start:": (" ", _H, ", len_in: ", _H, ", behavior: ", _H, ")"),
    "syscalls:sys_enter_madvise:": (" start: ", _H, ", len_in: ", _H, ", behavior: ", _H),
}
_PARTS = {_H: Shape.HEXADECIMAL, _D: Shape.DECIMAL, _W: Shape.WORD}


class Parser(Protocol):
    """What is read by Python, see readers/ftrace.py."""

    line: int
    events: int

    def feed_slow(self, piece: bytes, block: bytes, before: int) -> None:
        """Read lines of a block; `before`: the number of the line before the block."""


def wanted(lines: int, size: int, name: str = "read_lines") -> bool:
    """Whether the kernel is worth its loading, or its compilation, after so many lines, for a block of some bytes.

    :param name: the kernel's in pgemu_kernels.run.entries
    """
    if size < LEAST_BYTES or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False
    if "numba" not in sys.modules and lines < LINES_TO_LOAD:
        return False
    from pgemu_kernels.run import entries

    declared = next(entry for entry in entries.declared if entry.dispatcher is getattr(entries, name))
    return lines >= LINES_TO_COMPILE or not declared.missing()


def hash_of(name: bytes) -> int:
    """What a name is looked up by: the kernel's find_name()."""
    found = len(name)
    for i in range(L.HASH_SAMPLES):
        found = (found ^ name[(len(name) - 1) * i // (L.HASH_SAMPLES - 1)]) * L.HASH_FACTOR & _MASK
    return found ^ found >> 32


class _Table:
    """What was seen before, by its bytes: rows of SEEN_WORDS words, at most half of them used."""

    def __init__(self, names: bytearray, size: int) -> None:
        self._names = names
        self._used = 0
        self.rows = np.zeros(size * _WIDTH, np.uint64)

    def set(self, name: bytes, value: int, code: int = 0, shape: int = 0, call: int = 0) -> None:
        """Add a row, or change it."""
        if 2 * (self._used + 1) * _WIDTH > len(self.rows):
            self._grow()
        hashed = hash_of(name)
        row = self._find(name, hashed)
        if not self.rows[row + int(L.SEEN_LENGTH)]:
            self._used += 1
            self.rows[row : row + 3] = hashed, len(self._names), len(name)
            self._names += name
        self.rows[row + 3 : row + 7] = value, code, shape, call

    def _find(self, name: bytes, hashed: int) -> int:
        """Where a name's row is, or is to be."""
        size = len(self.rows) // _WIDTH
        place = hashed & size - 1
        while True:
            row = place * _WIDTH
            found, at, length = self.rows[row : row + 3].tolist()
            if not length or (found == hashed and self._names[at : at + length] == name):
                return row
            place = place + 1 & size - 1

    def _grow(self) -> None:
        old = self.rows.reshape(-1, _WIDTH)
        self.rows = np.zeros(2 * old.size, np.uint64)
        for words in old[old[:, int(L.SEEN_LENGTH)] != 0].tolist():
            at, length = words[1], words[2]
            row = self._find(bytes(self._names[at : at + length]), words[0])
            self.rows[row : row + _WIDTH] = words


class FastLines:
    """The kernel's tables of a log that is being read.

    :param parser: who reads the other lines
    :param rows, kept, tasks: its rows of inputs, of outcomes (None: not kept), and words of tasks; all grow
    """

    def __init__(self, parser: Parser, rows: array[int], kept: array[int] | None, tasks: array[int]) -> None:
        from pgemu_kernels.run.entries import read_lines

        self._read_lines = read_lines
        self._parser = parser
        self._older, self._kept, self._task_words = rows, kept, tasks
        self._names = bytearray()
        self._prefixes = _Table(self._names, 1 << 10)
        self._tokens = _Table(self._names, 1 << 10)
        self._shapes = bytearray()
        self._shape_at: dict[tuple[str, ...], int] = {}
        self._events: list[tuple[str, EventCode]] = []  # of each pair of counts: first word, what is done
        self._known: set[str] = set()
        self._counts = np.zeros(1 << 8, np.uint64)
        self._advices = np.zeros(L.ADVICES * L.ADVICE_WORDS, np.uint64)
        self._control = np.zeros(L.C_WORDS, np.uint64)
        self._control[L.C_KEEP] = kept is not None
        self._made = np.zeros(_ROOM * L.ROW_WORDS, np.uint64), np.zeros(_ROOM * L.KEPT_WORDS, np.uint64)
        self._fresh = True  # the names or shapes are other than those that the kernel was given last
        self._bytes = np.zeros(0, np.uint8), np.zeros(0, np.uint8)

    # ------------------------------------------------------------------ what was seen

    def add_prefix(self, prefix: str, task: int) -> None:
        """The text in front of a time stamp, and a blank, is a task's."""
        if prefix:
            self._prefixes.set(prefix.encode("utf-8", "surrogateescape"), task)
            self._fresh = True

    def add_token(self, token: str, is_parsed: bool) -> None:
        """The first word of an event that is parsed, or only counted."""
        code, parts, call = _meaning(token) if is_parsed else (EventCode.COUNTED, (), 0)
        if code is None or not token:
            return
        self._events.append((token, code))
        self._known.add(token)
        if 2 * len(self._events) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        name = token.encode("utf-8", "surrogateescape")
        self._tokens.set(name, len(self._events) - 1, code, self._shape(parts), call)
        self._fresh = True

    def drop_tokens(self, tokens: Iterable[str]) -> None:
        """What is done with events has changed: they are looked at once more."""
        for token in tokens:
            if token in self._known:  # from now on no line has its shape: they are Python's
                self._tokens.set(token.encode("utf-8", "surrogateescape"), 0, EventCode.UNMAP, self._shape(None))
                self._fresh = True

    def add_unmap(self, *, is_input: bool) -> None:
        """An unmap that was seen: an input of its own, or the outcome of a system call."""
        self._control[L.C_UNMAPS] |= L.UNMAP_INPUT if is_input else L.UNMAP_OUTCOME

    def add_advice(self, advice: int) -> None:
        """An advice of madvise() that was seen."""
        if advice < L.ADVICES:
            self._advices[advice * L.ADVICE_WORDS + int(L.A_KNOWN)] = 1

    def _shape(self, parts: tuple[str, ...] | None) -> int:
        """Where a shape begins among the shapes; None: one that no line has."""
        key = ("",) if parts is None else parts
        if key not in self._shape_at:
            self._shape_at[key] = len(self._shapes)
            for part in ("\n",) if parts is None else parts:
                if part in _PARTS:
                    self._shapes.append(_PARTS[part])
                else:
                    self._shapes += bytes((Shape.LITERAL, len(part))) + part.encode()
            self._shapes.append(Shape.END)
        return self._shape_at[key]

    # ------------------------------------------------------------------ reading

    def feed(self, block: bytes) -> None:
        """Read a block of whole lines."""
        text = writable(block)
        before, at, slow = self._parser.line, 0, 1
        while at < len(block):
            stopped, is_full = self._call(text, at)
            lines = int(self._control[L.C_LINE]) - self._parser.line
            self._parser.line += lines
            self._parser.events += lines
            at = stopped
            if at == len(block) or is_full:
                continue
            slow = min(2 * slow, _MOST_SLOW) if not lines else 1
            end = _end_of_lines(block, at, slow)
            self._parser.feed_slow(block[at:end], block, before)
            at = end

    def _call(self, text: Any, at: int) -> tuple[int, bool]:
        """Have the kernel read from a byte on: where it stopped, and whether there was no more room."""
        control, (rows, kept) = self._control, self._made
        if self._fresh:
            self._bytes = writable(self._names), writable(self._shapes)
            self._fresh = False
        control[[L.C_AT, L.C_END, L.C_LINE, L.C_ROWS, L.C_KEPT, L.C_OLDER]] = (
            at, len(text) - 1, self._parser.line, 0, 0, len(self._older),
        )  # fmt: skip
        control[L.C_PREFIX] = 0
        names, shapes = self._bytes
        self._read_lines(
            text, control, self._prefixes.rows, self._tokens.rows, names, shapes, self._counts, self._advices,
            _words_of(self._task_words), _words_of(self._older), rows, kept,
        )  # fmt: skip
        made, outcomes = int(control[L.C_ROWS]), int(control[L.C_KEPT])
        if made:
            self._older.frombytes(rows[: made * L.ROW_WORDS].tobytes())
        if outcomes and self._kept is not None:
            self._kept.frombytes(kept[: outcomes * L.KEPT_WORDS].tobytes())
        return int(control[L.C_AT]), max(made, outcomes) == _ROOM

    def counted(self) -> Iterable[tuple[str, EventCode, int, int]]:
        """By event: its first word, what was done, how many lines, and how many were outcomes where others were not."""
        for (token, code), (count, outcomes) in zip(self._events, self._counts.reshape(-1, 2).tolist(), strict=False):
            yield token, code, count, outcomes

    def advices(self) -> Mapping[int, int]:
        """How often an advice was given that is only counted."""
        counts = self._advices.reshape(-1, L.ADVICE_WORDS)[:, int(L.A_COUNT)].tolist()
        return {advice: count for advice, count in enumerate(counts) if count}


def _meaning(token: str) -> tuple[EventCode | None, tuple[str, ...], int]:
    """What the kernel does with an event by its first word, the shape of its fields, and which call it ends."""
    name = event_name(token)
    if name in _SHAPES and token.endswith(":") and "(" not in token:
        return (*_SHAPES[name], 0)
    if token in _MADVISE:
        return EventCode.MADVISE, _MADVISE[token], 0
    call = name.removesuffix(" return")
    if name.endswith(" return") and call in CALL_CODES:
        return EventCode.RETURN, (" ", _H) if token.endswith(":") else (" -> ", _H), CALL_CODES[call]
    return None, (), 0


def _words_of(words: array[int]) -> Any:
    """An array's words, to be read and written; it cannot grow meanwhile."""
    return np.frombuffer(words, np.uint64) if words else np.zeros(0, np.uint64)


def writable(data: bytes | bytearray) -> Any:
    """uint8[n + 1]: a copy, with a byte more so that there is one; kernels take no array that cannot be written."""
    return np.frombuffer(bytearray(data) + b"\0", np.uint8)


def _end_of_lines(block: bytes, at: int, count: int) -> int:
    """Where so many lines from a byte on end, or the block."""
    for _ in range(count):
        at = block.find(b"\n", at) + 1
        if at == len(block):
            break
    return at
