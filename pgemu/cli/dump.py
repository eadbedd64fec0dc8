"""`pgemu dump`: everything that page tables in a memory image map."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.cli.walk import SIZES, c_bit_of, find_root, flag_names, level_name, rights_letters, table_options
from pgemu.tables.entries import decode as decode_entry
from pgemu.tables.ranges import MappedRange, Summary, mapped_ranges
from pgemu.tables.walk import rights_of, root_table
from pgemu_kernels.formats.page_format import PageFormat

__all__ = ("dump",)

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


def _lines(fmt: PageFormat, ranges: Iterable[MappedRange]) -> Iterator[str]:
    for r in ranges:
        again = "" if r.step else f" ({r.length >> 9 * r.level + 3} times the same page)"
        yield (
            f"{r.address:016x}-{r.address + r.length - 1:016x}  {_size(r.length):>6}  {r.physical:#015x}  "
            f"{SIZES[r.level - 1]:>2}  {_rights(fmt, r.rights)}  {_flags(fmt, r.level, r.flags)}{again}"
        )


def _documents(fmt: PageFormat, ranges: Iterable[MappedRange]) -> Iterator[dict[str, Any]]:
    for r in ranges:
        yield {
            "address": f"{r.address:#x}",
            "length": r.length,
            "physical": f"{r.physical:#x}",
            "level": r.level,
            "same_page": r.step == 0,
            "entry_bits": f"{r.flags:#x}",
            "flags": _flags(fmt, r.level, r.flags).split("|"),
            "rights": _rights(fmt, r.rights),
        }


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
    """Passes ranges on and adds up their lengths."""

    def __init__(self, ranges: Iterable[MappedRange]) -> None:
        self._ranges = ranges
        self.bytes = 0

    def __iter__(self) -> Iterator[MappedRange]:
        for r in self._ranges:
            self.bytes += r.length
            yield r


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
        total = _Total(mapped_ranges(opened, fmt, where, summary, ignore=ignore))
        write = sys.stdout.write
        if as_json:
            about = json.dumps(
                {"image": image, "root": f"{root_table(fmt, where):#x}", "format": fmt.name, "c_bit": c_bit_of(fmt)}
            )
            write(f'{about[:-1]}, "ranges": [')
            for number, document in enumerate(_documents(fmt, total)):
                write(("," if number else "") + "\n" + json.dumps(document))
            write(f'\n], "summary": {json.dumps(_summary_document(summary, total.bytes))}}}\n')
        else:
            for line in folded(_lines(fmt, total)):
                write(line + "\n")
            for line in folded(_summary_lines(fmt, summary, total.bytes)):
                write(line + "\n")
    sys.stdout.flush()
