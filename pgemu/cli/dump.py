"""`pgemu dump`: everything that page tables in a memory image map."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import rich_click as click

from pgemu.cli._lines import folded, terminal_width
from pgemu.cli._rows import hexadecimal, joined, looked_up
from pgemu.cli.walk import SIZES, c_bit_of, find_root, flag_names, level_name, rights_letters, table_options
from pgemu.tables.entries import decode as decode_entry
from pgemu.tables.ranges import Summary, range_arrays
from pgemu.tables.walk import rights_of, root_table
from pgemu_kernels.formats.page_format import PageFormat

__all__ = ("dump",)

Array = np.ndarray[Any, Any]

_AT_ONCE = 1 << 14  # lines made in one go
_UNITS = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))
_PROBLEMS = {
    "loop": "points to a table that it is below: not followed",
    "unreadable": "points out of the image",
    "repeated": "its table was gone through 512 times: not followed again",
}


def _size(number: int) -> str:
    """Bytes in the largest unit that leaves no remainder, 0 in none."""
    if number == 0:
        return "0"
    return next((f"{number // unit}{name}" for unit, name in _UNITS if number % unit == 0), str(number))


@lru_cache(maxsize=4096)
def _flags(fmt: PageFormat, level: int, flags: int) -> str:
    return flag_names(decode_entry(fmt, level, flags))


@lru_cache(maxsize=4096)
def _rights(fmt: PageFormat, rights: int) -> str:
    return rights_letters(fmt, rights_of(fmt, rights))


def _lines(fmt: PageFormat, ranges: Array) -> str:
    """Lines of ranges (as range_arrays() has them)."""
    address, length, physical, *others = ranges

    def rest(length: int, level: int, flags: int, rights: int, step: int) -> str:
        again = "" if step else f" ({length >> 9 * level + 3} times the same page)"
        return f"  {SIZES[level - 1]:>2}  {_rights(fmt, rights)}  {_flags(fmt, level, flags)}{again}\n"

    return joined(
        hexadecimal(address, 16), "-", hexadecimal(address + length - np.uint64(1), 16),
        looked_up([length], lambda length: f"  {_size(length):>6}  0x"), hexadecimal(physical, 13),
        looked_up([np.where(others[-1] == 0, length, 0), *others], rest),
    )  # fmt: skip


def _documents(fmt: PageFormat, ranges: Array) -> str:
    """JSON objects of ranges, a line each that ends in a comma."""
    address, length, physical, level, flags, rights, step = ranges

    def start(length: int) -> str:
        return f'", "length": {length}, "physical": "0x'

    def rest(level: int, flags: int, rights: int, step: int) -> str:
        about = {
            "level": level,
            "same_page": step == 0,
            "entry_bits": f"{flags:#x}",
            "flags": _flags(fmt, level, flags).split("|"),
            "rights": _rights(fmt, rights),
        }
        return f'", {json.dumps(about)[1:]},\n'

    return joined(
        '{"address": "0x', hexadecimal(address), looked_up([length], start), hexadecimal(physical),
        looked_up([level, flags, rights, step], rest),
    )  # fmt: skip


def _counts(fmt: PageFormat, counts: Counter[int]) -> str:
    """ "3 (PGD 1, PUD 2)"."""
    levels = ", ".join(f"{level_name(fmt, level)} {counts[level]}" for level in sorted(counts, reverse=True))
    return f"{sum(counts.values())}" + (f" ({levels})" if counts else "")


def _summary_lines(fmt: PageFormat, summary: Summary, mapped: int) -> Iterator[str]:
    pages = ", ".join(f"{summary.leaves[level]} of {SIZES[level - 1]}" for level in sorted(summary.leaves))
    yield f"mapped: {_size(mapped)}" + (f" in leaves: {pages}" if pages else "")
    yield f"table pages: {_counts(fmt, summary.tables)}"
    if summary.not_present:
        yield f"entries not present but not empty: {_counts(fmt, summary.not_present)}"
    if summary.reserved:
        yield f"entries with reserved bits or misconfigured: {_counts(fmt, summary.reserved)}"
    for problem in summary.problems:
        name = level_name(fmt, problem.level)
        yield f"{name} {problem.entry:#018x} of {problem.address:#x}: {_PROBLEMS[problem.what]}"
    if more := sum(summary.problem_counts.values()) - len(summary.problems):
        yield f"... and {more} more"


def _summary_document(summary: Summary, mapped: int) -> dict[str, Any]:
    def by_level(counts: Counter[int]) -> dict[str, int]:
        return {str(level): counts[level] for level in sorted(counts)}

    return {
        "mapped": mapped,
        "tables": by_level(summary.tables),
        "leaves": by_level(summary.leaves),
        "not_present": by_level(summary.not_present),
        "reserved": by_level(summary.reserved),
        "problem_counts": dict(summary.problem_counts),
        "problems": [
            {"what": p.what, "address": f"{p.address:#x}", "level": p.level, "entry": f"{p.entry:#x}"}
            for p in summary.problems
        ],
    }


class _Total:
    """Ranges some at a time, and the bytes that they have in all."""

    def __init__(self, arrays: Iterable[Array]) -> None:
        self._arrays = arrays
        self.bytes = 0

    def __iter__(self) -> Iterator[Array]:
        for ranges in self._arrays:
            self.bytes += int(ranges[1].sum())
            for first in range(0, ranges.shape[1], _AT_ONCE):
                yield ranges[:, first : first + _AT_ONCE]


def _fitted(text: str, width: int | None) -> str:
    """Lines folded to the width, if there is one and some do not fit it."""
    if width is None or not text:
        return text
    return "".join(f"{line}\n" for line in folded(text.splitlines(), width))


@click.command(short_help="List what page tables in a memory image map.")
@click.argument("image", metavar="IMAGE")
@table_options
@click.option(
    "--ignore-accessed-dirty", is_flag=True, help="Show neither accessed nor dirty bits: ranges become longer."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def dump(image: str, root: str | None, ignore_accessed_dirty: bool, as_json: bool, **parameters: Any) -> None:
    """List every range that page tables in a memory image map, then count tables and leaves by level.

    IMAGE is an ELF core of physical memory (QEMU's dump-guest-memory, an uncompressed vmcore, Machine.write_image) or
    raw memory. Each line has the first and last address, the length, the physical address, the page size, the
    rights that all levels grant (read, write, execute, user) and the flags of the leaf. Leaves of one size with
    like flags are one range if they map successive pages, or all the same page.
    """
    from pgemu.images.image import open_image

    summary = Summary()
    with open_image(image) as opened:
        where, fmt = find_root(opened, root, **parameters)
        ignore = fmt.accessed | fmt.dirty & ~fmt.write if ignore_accessed_dirty else 0
        total = _Total(range_arrays(opened, fmt, where, summary, ignore=ignore))
        write = sys.stdout.write
        if as_json:
            about = json.dumps(
                {"image": image, "root": f"{root_table(fmt, where):#x}", "format": fmt.name, "c_bit": c_bit_of(fmt)}
            )
            write(f'{about[:-1]}, "ranges": [')
            between = "\n"
            for ranges in total:
                write(between + _documents(fmt, ranges)[:-2])
                between = ",\n"
            write(f'\n], "summary": {json.dumps(_summary_document(summary, total.bytes))}}}\n')
        else:
            width = terminal_width()
            for ranges in total:
                write(_fitted(_lines(fmt, ranges), width))
            write(_fitted("".join(f"{line}\n" for line in _summary_lines(fmt, summary, total.bytes)), width))
    sys.stdout.flush()
