"""What a program's accesses cost a guest on several designs, as people read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pgemu.report.answers import WIDTH, wrapped
from pgemu.report.units import band, count

if TYPE_CHECKING:
    from pgemu.guest.run import GuestComparison, GuestRun

__all__ = ("text",)

_INDENT, _CELL = 2, 16
_PAGES = {
    "pages 4K": "4K pages", "pages 2M": "2M pages", "tables": "pages of tables", "fallback": "ranges without a 2M page",
}  # fmt: skip


def text(found: GuestComparison) -> str:
    """The comparison in lines of at most 80 columns, with as many designs as fit beside each other."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: GuestComparison) -> Iterator[str]:
    accesses = found.accesses
    yield f"{count(accesses.get('accesses', 0))} accesses of a guest's program, TLBs of {found.processor}"
    for name in ("no memory", "not canonical"):
        if accesses.get(name):
            yield f"  left out: {count(accesses[name])} ({name})"
    pages = [f"{count(accesses[name])} {said}" for name, said in _PAGES.items() if accesses.get(name)]
    yield from _wrapped(f"first touches: {', '.join(pages) or 'none'}", _INDENT)
    runs = list(found.runs.items())
    room = max(1, (WIDTH - 32) // _CELL)
    for first in range(0, len(runs), room):
        yield ""
        yield from _table(runs[first : first + room])
    yield ""
    for note in found.notes:
        yield from _wrapped(note, _INDENT)


def _table(runs: list[tuple[str, GuestRun]]) -> Iterator[str]:
    yield f"{'':32}" + "".join(f"{name[: _CELL - 1]:>{_CELL}}" for name, _ in runs)
    for name, cell in _ROWS:
        yield f"  {name:30}" + "".join(f"{cell(run):>{_CELL}}" for _, run in runs)
    for name, run in runs:
        for what, many in run.failed.items():
            yield from _wrapped(f"{name}: {count(many)} operations failed: {what}", _INDENT)


def _references(run: GuestRun) -> str:
    missed = run.counts.missed
    return f"{run.counts.references / missed:.2f}" if missed else "-"


def _found(run: GuestRun, where: int) -> str:
    return f"{int(run.counts.accesses[:, where].sum()) / max(run.counts.total, 1):.2%}"


def _of_accesses(size: str) -> Callable[[GuestRun], str]:
    return lambda run: f"{run.counts.share(size):.1%}"


_ROWS: tuple[tuple[str, Callable[[GuestRun], str]], ...] = (
    ("found in first-level TLBs", lambda run: _found(run, 0)),
    ("found in second-level TLBs", lambda run: _found(run, 1)),
    ("missed by all TLBs", lambda run: count(run.counts.missed)),
    ("... of all accesses", lambda run: f"{run.counts.missed / max(run.counts.total, 1):.2%}"),
    ("entries read a miss", _references),
    ("entries read an access", lambda run: f"{run.counts.references / max(run.counts.total, 1):.3f}"),
    ("through 4K entries", _of_accesses("4K")),
    ("through 2M entries", _of_accesses("2M")),
    ("through 1G entries", _of_accesses("1G")),
    ("without a translation", lambda run: count(run.counts.untranslated)),
    ("flushes of everything", lambda run: count(run.counts.flushes)),
    ("operations of the machine", lambda run: count(sum(run.operations.values()))),
    ("... kernel time (estimate)", lambda run: band(*run.cost_ns)),
)


def _wrapped(line: str, indent: int) -> Iterator[str]:
    begin, *more = wrapped(line, WIDTH - indent - 2)
    yield " " * indent + begin
    yield from (" " * (indent + 2) + one for one in more)
