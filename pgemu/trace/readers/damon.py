"""DAMON's regions as accesses: text of damon:damon_aggregated (ftrace, trace-cmd, perf script), or damo's JSON.

DAMON does not record accesses: it cuts memory into regions, looks at one page of each in every sampling interval, and
tells per aggregation how often that page had been accessed. Which pages of a region were accessed nobody knows, so it
is a parameter (`pages`) without a source, with both bounds: all of them, or as many as accesses were counted.

Sources: include/trace/events/damon.h (addresses are decimal, the age came with Linux 5.17), mm/damon/core.c
(kdamond_fn()); damo's src/_damo_records.py (json_compressed: zlib, numbers as text with commas). Read were what damo
ships as its tests' data, of 2021 and 2025.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError, printable
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.events import EXPECTED, event_name
from pgemu.trace.lines import HEADER, LOST, event_start, place
from pgemu.trace.schema import DTYPES, Operation, Records
from pgemu.trace.source import Match, Source

__all__ = ("FORMATS", "Pages", "read", "sniff")

FORMATS = {
    "damon": "DAMON's regions",  # every page of those that were accessed
    "damon-counted": "DAMON's regions, a page for each access that was counted",
}

Pages = Literal["all"] | int
"""Of a region: every page, once in each aggregation in which it was accessed; or so many pages, drawn at random, for
each access that was counted."""

_EVENT = "damon_aggregated"
_REGION = re.compile(
    r"\S*damon_aggregated: target_id=(\d{1,20}) nr_regions=\d{1,10} (\d{1,20})-(\d{1,20}): (\d{1,10})(?: \d{1,10})?\s*"
)
_LINE = re.compile(rf"[^\n:]* (\d{{1,10}})\.(\d{{6}}): +{_REGION.pattern}")  # as nearly all are printed
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_KEY = re.compile(rb"\s*\[\s*\{[^{\[]*\"(?:kdamond_idx|snapshots)\"")
_HEAD = 4096  # bytes in which JSON shows what it is
_LINES = 200
_BATCH = 1 << 20  # records
_UNUSED, _MARKS = "regions without an access", "marks of an aggregation's end"
_REGIONS = frozenset({_UNUSED, _MARKS})
_MOST_JSON = 1 << 28  # bytes, all of which are in memory
_PAGE = 12
_ADDRESSES = 1 << 64
_MOST_TARGETS = int(np.iinfo(DTYPES["space"]).max) + 1
_SHOWN = 80


@dataclass(frozen=True)
class _Region:
    """What DAMON says: ns, target, bytes [start, end), how many accesses it counted."""

    time: int
    target: str
    start: int
    end: int
    count: int


def sniff(head: bytes) -> Match:
    """Regions are most of the events, and none is one that other readers read; or damo's JSON, deflated or not."""
    text = head[:_HEAD]
    if head.startswith(_ZLIB):
        try:
            text = zlib.decompressobj().decompress(head, _HEAD)
        except zlib.error:
            return Match.NO
    if _KEY.match(text):
        return Match.SURE
    if _EVENT.encode() not in head or b"\0" in head:
        return Match.NO
    regions = others = 0
    for line in head.decode("utf-8", "replace").split("\n")[:_LINES]:
        event = _event(line)[1]
        name = event_name(event.partition(" ")[0])
        if name in EXPECTED or name.startswith("kvm_"):
            return Match.NO
        regions += name == _EVENT
        others += bool(name) and name != _EVENT
    return Match.SURE if regions > others else Match.NO


def _event(line: str) -> tuple[int, str]:
    """Time (ns) and event of a line; no text where it has none."""
    try:
        found = place(line)
    except ValueError:
        return 0, ""
    if found is None:
        return 0, ""
    event = line[found.start :]
    time = found.whole + int(line[found.point : found.end]) * found.unit
    return time, event[max(event_start(event), 0) :]


def read(source: Source, form: str | None = None, *, pages: Pages | None = None, seed: int = 0) -> AccessStream:
    """Read regions as accesses.

    :param pages: which pages of a region are accessed; None: as `form` says, "all" (an upper bound), or one for each
        counted access (damon-counted, a lower bound)
    :param seed: of the pages that are drawn
    :raises InputError: unreadable, or JSON of another shape; what is no region is counted in the tally
    """
    chosen: Pages = pages if pages is not None else 1 if form == "damon-counted" else "all"
    tally = Tally()
    if chosen == "all":
        text = "every page of an accessed region, once in each aggregation: an upper bound (damon-counted: a lower one)"
    else:
        many = "a page" if chosen == 1 else f"{chosen} pages"
        text = f"{many} of a region for each access that was counted, drawn at random: a lower bound (damon: an upper)"
    tally.notes += [f"assumed, DAMON does not say it: accessed is {text}", "its accesses are taken for reads"]
    is_text = not source.head.startswith(_ZLIB) and not _KEY.match(source.head[:_HEAD])
    regions = _regions_of_text(source, tally) if is_text else _regions_of_json(source, tally)
    batches = _Accesses(source.name, tally, chosen, seed).batches(regions)
    return AccessStream.of(source.name, "DAMON's regions", batches, tally, close=source.close)


class _Accesses:
    """Regions made accesses."""

    def __init__(self, source: str, tally: Tally, pages: Pages, seed: int) -> None:
        self._source = source
        self._tally = tally
        self._pages = pages
        self._chance = np.random.default_rng(seed)
        self._targets: dict[str, int] = {}

    def batches(self, regions: Iterator[_Region]) -> Iterator[Records]:
        """Records of accesses, at most _BATCH at a time."""
        waiting: list[tuple[npt.NDArray[np.uint64], int, int]] = []
        size = 0
        for region in regions:
            space = self._space(region.target)
            for found in self._pages_of(region):
                waiting.append((found, region.time, space))
                size += len(found)
                if size >= _BATCH:
                    yield from self._records(waiting, size)
                    waiting, size = [], 0
        if size:
            yield from self._records(waiting, size)
        if not self._tally.inputs and not _REGIONS.intersection(self._tally.ignored):
            others = ", ".join(f"{count} {name}" for name, count in self._tally.ignored.most_common(3))
            raise InputError(f"no region of DAMON in it{others and f', found {others}'}", self._source)

    def _space(self, target: str) -> int:
        space = self._targets.setdefault(target, len(self._targets))
        if space >= _MOST_TARGETS:
            raise InputError(f"more than {_MOST_TARGETS} targets", self._source)
        if space == 1 and len(self._targets) == 2:
            self._tally.notes.append("each of its targets is taken for a process of the guest")
        return space

    def _pages_of(self, region: _Region) -> Iterator[npt.NDArray[np.uint64]]:
        """Numbers of the pages that are taken to be accessed, ascending."""
        first, end = region.start >> _PAGE, ((region.end - 1) >> _PAGE) + 1
        many = end - first if self._pages == "all" else min(end - first, region.count * self._pages)
        if many == end - first:
            for low in range(first, end, _BATCH):
                yield np.uint64(low) + np.arange(min(_BATCH, end - low), dtype=np.uint64)
            return
        drawn = self._chance.choice(end - first, many, replace=False, shuffle=False)
        drawn.sort()
        for low in range(0, many, _BATCH):
            yield np.uint64(first) + drawn[low : low + _BATCH].astype(np.uint64)

    def _records(self, waiting: list[tuple[npt.NDArray[np.uint64], int, int]], size: int) -> Iterator[Records]:
        self._tally.inputs["read"] += size
        counts = [len(found) for found, _, _ in waiting]
        records = Records.build(
            size,
            op=Operation.GUEST_ACCESS,
            time=np.repeat(np.array([time for _, time, _ in waiting], np.uint64), counts),
            space=np.repeat(np.array([space for _, _, space in waiting], np.uint16), counts),
            address=np.concatenate([found for found, _, _ in waiting]) << np.uint64(_PAGE),
        )
        for first in range(0, size, _BATCH):
            yield records[first : first + _BATCH]


def _wanted(region: _Region, tally: Tally) -> bool:
    """Whether a region was accessed; one that was not is counted."""
    if region.count <= 0:
        tally.ignored[_UNUSED] += 1
    return region.count > 0


def _regions_of_text(source: Source, tally: Tally) -> Iterator[_Region]:
    number = 0
    for block in source.blocks():
        for line in block.split("\n"):
            number += 1
            fields = _fields(line)
            region = None if fields is None else _region(*fields)
            if region is not None:
                if _wanted(region, tally):
                    yield region
            elif fields is not None or not _is_other(line, tally):
                tally.reject(number, line)
        number -= block.endswith("\n")


def _fields(line: str) -> tuple[int, str, str, str, str] | None:
    """Time (ns) and what stands in a region's line; None for another line."""
    match = _LINE.fullmatch(line)
    if match is not None:
        return int(match[1]) * 10**9 + int(match[2]) * 1000, match[3], match[4], match[5], match[6]
    time, event = _event(line)
    match = _REGION.fullmatch(event)
    return None if match is None else (time, match[1], match[2], match[3], match[4])


def _is_other(line: str, tally: Tally) -> bool:
    """Count what is no region: whether it is known to be none."""
    name = event_name(_event(line)[1].partition(" ")[0])
    if name == _EVENT:
        return False
    if name:
        tally.ignored[printable(name)[:_SHOWN]] += 1
    elif lost := LOST.fullmatch(line):
        tally.ignored["events lost"] += int(lost[1] or lost[2] or 1)
    else:
        return HEADER.fullmatch(line) is not None
    return True


def _region(time: int, target: str, start: Any, end: Any, count: Any) -> _Region | None:
    """A region of numbers, or of text with commas; None for what is none."""
    try:
        low, high, many = (_number(value) for value in (start, end, count))
    except (ValueError, TypeError):
        return None
    return _Region(time, target, low, high, many) if 0 <= low < high <= _ADDRESSES and time < _ADDRESSES else None


def _number(value: Any) -> int:
    """A number as damo writes it. ValueError or TypeError for anything else."""
    if isinstance(value, str) and len(value) <= _SHOWN:
        return int(value.replace(",", ""))
    if type(value) is not int:
        raise TypeError
    return value


def _regions_of_json(source: Source, tally: Tally) -> Iterator[_Region]:
    """Regions of all targets by the end of their aggregations."""
    number = 0
    for time, target, regions in sorted(_snapshots(_json(source), source.name), key=lambda one: one[0]):
        for one in regions:
            number += 1
            region = _region(time, target, one.get("start"), one.get("end"), _count(one)) if _is_dict(one) else None
            if region is None and _is_dict(one) and _is_mark(one):
                tally.ignored[_MARKS] += 1
            elif region is None:
                tally.reject(number, str(one)[:_SHOWN])
            elif _wanted(region, tally):
                yield region


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_mark(one: dict[str, Any]) -> bool:
    """Whether a region is none, which damo puts behind a lone aggregation."""
    return (str(one.get("start")), str(one.get("end"))) == ("0", "0")


def _count(one: dict[str, Any]) -> Any:
    """How many accesses a region has; a share that is not 0 is at least one."""
    count = one.get("nr_accesses")
    if not isinstance(count, dict):
        return count
    if count.get("samples") is not None or count.get("percent") is None:
        return count.get("samples")
    try:
        return int(float(str(count["percent"]).rstrip("% ")) > 0)
    except ValueError:
        return None


def _snapshots(data: Any, source: str) -> Iterator[tuple[int, str, list[Any]]]:
    """Time (ns), target and regions of each aggregation. InputError for other JSON."""
    for at, record in enumerate(data if isinstance(data, list) else [data]):
        snapshots = record.get("snapshots") if isinstance(record, dict) else None
        if not isinstance(snapshots, list):
            raise InputError(f"record {at}: expected snapshots, as damo's json_compressed has them", source)
        for number, one in enumerate(snapshots):
            try:
                time, regions = _number(one["end_time"]), one["regions"]
                if not isinstance(regions, list) or not 0 <= time < _ADDRESSES:
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                text = f"record {at}, snapshot {number}: expected end_time (ns) and regions"
                raise InputError(text, source) from None
            yield time, f"{at} {record.get('target_id')}", regions


def _json(source: Source) -> Any:
    """The document, decompressed."""
    decoder = zlib.decompressobj() if source.head.startswith(_ZLIB) else None
    text = bytearray()
    try:
        for block in source.raw_blocks():
            data = block
            while True:
                if decoder is None:
                    text += data
                else:
                    text += decoder.decompress(data, _HEAD << 8)
                    data = decoder.unconsumed_tail
                if len(text) > _MOST_JSON:
                    raise InputError(f"more than {_MOST_JSON >> 20} MiB of JSON, give text of perf script", source.name)
                if decoder is None or not data:
                    break
        if decoder is not None and (not decoder.eof or decoder.unused_data):
            raise InputError("truncated, or something stands behind the deflated JSON of damo", source.name)
        return json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except zlib.error as error:
        raise InputError(f"damaged zlib stream ({error})", source.name) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON as damo writes it ({str(error)[:_SHOWN]})", source.name) from None
