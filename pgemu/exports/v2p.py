"""A guest program's pages as a map of DynamoRIO's drmemtrace: v2p.textproto, virtual to physical addresses.

DynamoRIO's own reader (clients/drcachesim/reader/v2p_reader.cpp) goes by lines and knows one page size; groups of
several sizes are what public traces have, and what pgemu.trace.v2p reads, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from pgemu.errors import InputError
from pgemu.exports.physical import PhysicalRun
from pgemu.tables.ranges import range_arrays
from pgemu.tables.translation import WalkStatus

__all__ = ("Pages", "Stage", "one_size", "pages_of", "text")

Array = np.ndarray[Any, Any]
Stage = Literal["host", "guest"]
_ONE = np.uint64(1)
_PIECES = np.arange(512, dtype=np.uint64)


class Pages(NamedTuple):
    """Pages of a program: virtual and physical address and bytes (uint64[n] each), by virtual address."""

    virtual: Array
    physical: Array
    size: Array


def pages_of(run: PhysicalRun, space: int = 0, stage: Stage = "host") -> tuple[Pages, int]:
    """What the guest has mapped for a program, each page as large as both stages let it be.

    stage: "host", through the design's stage 2, or "guest", guest physical addresses. Beside it how many pages stage 2
    does not map. InputError where the program's accesses are of several processes and `space` is none of them.
    """
    memory = run.program.memory
    if space not in memory.tables:
        spaces = ", ".join(map(str, sorted(memory.tables)))
        raise InputError(f"--space {space}: expected one of {spaces or 'none'}")
    table = memory.tables[space]
    guest = [_leaves(ranges) for ranges in range_arrays(memory.machine, table.format, table.root)]
    if not guest:
        return Pages(*(np.zeros(0, np.uint64) for _ in range(3))), 0
    pages = Pages(*(np.concatenate(columns) for columns in zip(*guest, strict=True)))
    if stage == "guest":
        return pages, 0
    found = run.stage2(pages.physical)
    host_size = np.uint64(1) << (np.uint64(3) + np.uint64(9) * np.maximum(found.level, 1).astype(np.uint64))
    small = (host_size < pages.size) | (found.status != WalkStatus.OK)
    pages = _cut(pages, small)
    found = run.stage2(pages.physical)
    there = found.status == WalkStatus.OK
    kept = Pages(pages.virtual[there], found.physical[there], pages.size[there])
    return kept, int((~there).sum())


def _leaves(ranges: Array) -> Pages:
    """The leaves of range_arrays()."""
    address, length, physical, level = ranges[:4]
    size = _ONE << (np.uint64(3) + np.uint64(9) * level)
    count = (length // size).astype(np.int64)
    which = np.repeat(np.arange(count.size), count)
    number = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)).astype(np.uint64)
    offset = number * size[which]
    return Pages(address[which] + offset, physical[which] + offset, size[which])


def _cut(pages: Pages, which: Array) -> Pages:
    """The pages, those of 2M that `which` names as 512 of 4K."""
    large = which & (pages.size > np.uint64(4096))
    if not large.any():
        return pages
    offset = _PIECES * np.uint64(4096)
    pieces = [(column[large][:, None] + offset).reshape(-1) for column in pages[:2]]
    pieces.append(np.full(pieces[0].size, 4096, np.uint64))
    both = [np.concatenate([column[~large], more]) for column, more in zip(pages, pieces, strict=True)]
    order = np.argsort(both[0], kind="stable")
    return Pages(*(column[order] for column in both))


def one_size(pages: Pages) -> Pages:
    """The pages cut to the smallest size that one of them has."""
    if not pages.size.size or (pages.size == pages.size.min()).all():
        return pages
    return _cut(pages, np.ones(pages.size.size, np.bool_))


def text(pages: Pages, comments: Iterable[str] = ()) -> Iterator[str]:
    """The lines of the file, a group for each page size, a field a line."""
    for comment in comments:
        yield f"# {comment}\n"
    for size, count in sorted(Counter(pages.size.tolist()).items()):
        mine = pages.size == size
        yield f"address_mapping_group {{\n  page_size: {size}\n  page_count: {count}\n"
        for virtual, physical in zip(pages.virtual[mine].tolist(), pages.physical[mine].tolist(), strict=True):
            yield (
                f"  address_mapping {{\n    virtual_address: {virtual:#x}\n    physical_address: {physical:#x}\n  }}\n"
            )
        yield "}\n"
