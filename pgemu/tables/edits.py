"""What edits of a page table return, and the log that they write on request."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgemu.machine.arrays import I64, U64
from pgemu.machine.field_rules import shown
from pgemu.machine.results import Results, status_name
from pgemu.machine.short import column, counted, html_table
from pgemu.tables.flush import Flush
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("EditResult", "EditResults", "log_words", "size_of")

_LOG = "a writable uint64 array of shape (n, 3)"
_NO_LOG = np.zeros(0, np.uint64)


class EditResult(NamedTuple):
    """What an edit returned.

    status: 0 or -errno. detail: how many leaves (or tables, where those are freed) it changed, or the entry that was
    there (`store`); after a failure the offset in bytes up to which it came. flush: None if nothing is to be flushed.
    records: how many records the log asked for; more than it has room for were not written.
    """

    status: int
    detail: int
    flush: Flush | None
    records: int

    @property
    def name(self) -> str:
        """What it returned, by name: "ok", "-EEXIST"."""
        return status_name(None, self.status)

    def __repr__(self) -> str:
        status = self.name if self.status else 0
        return f"EditResult(status={status}, detail={self.detail}, flush={self.flush}, records={self.records})"

    def _repr_html_(self) -> str:
        return html_table(("status", "detail", "flush"), [(self.name, self.detail, self.flush)])


class EditResults(NamedTuple):
    """The same of a batch: status int64[n], detail uint64[n], one flush at its end."""

    status: I64
    detail: U64
    flush: Flush | None
    records: int

    def __repr__(self) -> str:
        results = Results(self.status, self.detail)
        about = f"{self.status.size:,}: {counted(results.outcomes)}; detail={column(self.detail)}"
        return f"EditResults({about}, flush={self.flush}, records={self.records})"

    def _repr_html_(self) -> str:
        outcomes = Results(self.status, self.detail).outcomes
        return html_table(("status", "how many"), outcomes.items(), len(outcomes))


def size_of(level: int) -> int:
    """Bytes that a leaf of a level maps; one page for what is no level, which the kernel refuses."""
    return PAGE_4K << 9 * (level - 1) if 1 <= level <= 5 else PAGE_4K


def log_words(log: U64 | None) -> U64:
    if log is None:
        return _NO_LOG
    if not isinstance(log, np.ndarray):
        raise TypeError(f"log {shown(log)} ({type(log).__name__}): expected {_LOG}")
    if log.dtype != np.uint64 or log.ndim != 2 or log.shape[1] != W.LOG_WORDS or not log.flags.carray:
        raise ValueError(f"log of {log.dtype}{list(log.shape)}: expected {_LOG}")
    if log.shape[0] == 0:
        raise ValueError(f"log without room: expected {_LOG}, at least one record")
    return log.reshape(-1)
