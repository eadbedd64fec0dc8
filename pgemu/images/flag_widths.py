"""How wide the fields of page->flags are: as given, or as a line that the kernel printed of a page tells.

The kernel prints a page's flags as a number and by name (mm/debug.c:__dump_page(), lib/vsprintf.c:format_page_flags()):
"flags: 0x17ffffc0000848(uptodate|active|node=0|zone=2|lastcpupid=0x1fffff)". Fields stand from bit 63 downwards in that
order (include/linux/page-flags-layout.h); a field that is not printed has no bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

from pgemu_kernels.formats.struct_page import FieldWidths, field_widths

__all__ = ("derived_widths", "given_widths")

_LINE = re.compile(r"flags:?\s*(?:0x)?([0-9a-f]{1,16})\s*\(([^()]*)\)", re.IGNORECASE)
_FIELD = re.compile(r"(section|node|zone|lastcpupid|kasantag)=(0x[0-9a-f]+|\d+)", re.IGNORECASE)
_NAMES = {"node": "node", "zone": "zone", "lastcpupid": "last_cpupid", "last_cpupid": "last_cpupid"}
# NODES_SHIFT is at most 10, there are at most 7 zones; a PID has 8 bits, and 8192 CPUs are the most that x86 has.
_WIDTHS = {"node": range(1, 11), "zone": range(1, 4), "lastcpupid": range(8, 22)}


def given_widths(text: str, configuration: str) -> FieldWidths:
    """Widths as "node=6,zone=3,lastcpupid=17", the configuration's where one is missing.

    ValueError for anything else.
    """
    widths = field_widths(configuration)._asdict()
    for part in text.split(","):
        name, equals, bits = part.strip().partition("=")
        if name not in _NAMES or not equals or not bits.isascii() or not bits.isdigit() or int(bits) > 64:
            raise ValueError(f"{part.strip()!r}: expected widths like node=6,zone=3,lastcpupid=17")
        widths[_NAMES[name]] = int(bits)
    return FieldWidths(**widths)


def derived_widths(lines: Sequence[str]) -> FieldWidths:
    """The widths with which every line means what it says; fields are doubtful where several widths do.

    Of these the widest CPU and PID counts, then the widest zone: a field that was never set is all ones, and the zone's
    highest bits are seldom in use.
    ValueError for a line that is none of these, or lines that no widths fit.
    """
    fitting: set[tuple[int, int, int]] | None = None
    for line in lines:
        word, values = _values(line)
        found = set(_fitting(word, values))
        fitting = found if fitting is None else fitting & found
        if not fitting:
            raise ValueError(f"no widths of node, zone and lastcpupid fit {line.strip()[:120]!r}")
    if fitting is None:
        raise ValueError("no line to derive widths from")
    best = max(fitting, key=lambda widths: (_all_ones(lines, widths), widths[2], widths[1]))
    names = FieldWidths._fields[:3]
    doubtful = [name for i, name in enumerate(names) if len({_place(widths, i) for widths in fitting}) > 1]
    return FieldWidths(*best, doubtful=frozenset(doubtful))


def _values(line: str) -> tuple[int, dict[str, int]]:
    """The number of a line's flags, and the values of its fields."""
    match = _LINE.search(line)
    if match is None:
        raise ValueError(f"{line.strip()[:120]!r}: expected a line like 'flags: 0x17ffff...(lru|node=0|zone=2)'")
    values = {name.lower(): int(value, 0) for name, value in _FIELD.findall(match[2])}
    if unread := {"section", "kasantag"} & values.keys():
        raise ValueError(f"{line.strip()[:120]!r}: {sorted(unread)[0]} in the flags is not read")
    if "zone" not in values:
        raise ValueError(f"{line.strip()[:120]!r}: no zone in the flags")
    return int(match[1], 16), values


def _fitting(word: int, values: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Widths with which a number has the values."""
    node, zone, cpupid = (_WIDTHS[name] if name in values else range(1) for name in _WIDTHS)
    for widths in product(node, zone, cpupid):
        end = 64
        for name, width in zip(_WIDTHS, widths, strict=True):
            end -= width
            if width and word >> end & (1 << width) - 1 != values[name]:
                break
        else:
            yield widths


def _place(widths: tuple[int, int, int], field: int) -> tuple[int, int]:
    """The bits of a field: how many, and how many above them."""
    return widths[field], sum(widths[:field])


def _all_ones(lines: Sequence[str], widths: tuple[int, int, int]) -> int:
    """In how many lines the CPU and PID are all ones, as of a page that no task has used."""
    return sum(_values(line)[1].get("lastcpupid") == (1 << widths[2]) - 1 for line in lines)
