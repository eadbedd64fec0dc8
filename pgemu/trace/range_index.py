"""Ranges of addresses by place and by row: which of many ranges meet each of many others, without trying each pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ("ALWAYS", "RangeIndex", "alike", "covered", "pieces")

ALWAYS = (0, 1 << 62)
"""First row, and the row behind the last, of what stands all the time."""

_Words = npt.NDArray[np.uint64]
_Rows = npt.NDArray[np.intp]


class RangeIndex:
    """Ranges, each at a row, as words of 64 bits: the last address is one of the range's own, so that none overflows.

    :param rows: intp[n], ascending
    :param first, last: uint64[n]; a range whose last address lies before its first meets nothing
    """

    def __init__(self, rows: _Rows, first: _Words, last: _Words) -> None:
        self._rows, self._first, self._last = rows, first, last
        some = np.flatnonzero(last >= first)
        # By how many bits the length has: what meets an address begins at most such a length before it.
        bits = np.frexp((last[some] - first[some]).astype(np.float64))[1]
        self._classes: list[tuple[int, _Rows, _Words]] = []
        for width in np.unique(bits).tolist():
            members = some[bits == width]
            order = members[np.argsort(first[members], kind="stable")]
            self._classes.append(((1 << width) - 1, order, first[order]))

    def meetings(
        self, ranges: Sequence[tuple[int, int]], stand: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, _Rows]]:
        """Yield, in the order of `ranges`, each that meets some, with the positions of those, ascending.

        :param ranges: first and last address of each, the last not before the first
        :param stand: of each the first row, and the row behind the last, that it can meet; None: all
        """
        low, high = (np.array(side, np.uint64) for side in zip(*ranges, strict=True)) if ranges else (np.zeros(0),) * 2
        begin, end = np.array(stand or [ALWAYS] * len(ranges), np.int64).reshape(-1, 2).T
        windows = np.stack([np.searchsorted(self._rows, side) for side in (begin, end)])
        spans = []
        for reach, _, first in self._classes:
            floor = np.where(
                low > np.uint64(min(reach, (1 << 64) - 1)), low - np.uint64(reach % (1 << 64)), np.uint64(0)
            )
            spans.append((np.searchsorted(first, floor), np.searchsorted(first, high, "right")))
        near = sum((after - before for before, after in spans), np.zeros(len(ranges), np.intp))
        for number in np.flatnonzero(np.minimum(near, windows[1] - windows[0]) > 0).tolist():
            since, until = windows[:, number].tolist()
            if until - since <= near[number]:
                found = np.arange(since, until)
            else:
                parts = [
                    order[before[number] : after[number]]
                    for (_, order, _), (before, after) in zip(self._classes, spans, strict=True)
                ]
                found = np.sort(np.concatenate(parts))
                found = found[(found >= since) & (found < until)]
            first, last = self._first[found], self._last[found]
            found = found[(first <= high[number]) & (last >= low[number]) & (last >= first)]
            if len(found):
                yield number, found


def covered(address: _Words, ranges: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """bool[n]: which addresses lie in one of the ranges, first and last address of each."""
    if not ranges:
        return np.zeros(len(address), dtype=bool)
    first, last = np.array(sorted(ranges), np.uint64).T
    place = np.searchsorted(first, address, "right")
    result: npt.NDArray[np.bool_] = (place > 0) & (np.maximum.accumulate(last)[place - 1] >= address)
    return result


def alike(words: _Words) -> Iterator[_Rows]:
    """Positions of words, those of each value together."""
    order = np.argsort(words, kind="stable")
    breaks = np.flatnonzero(words[order][1:] != words[order][:-1]) + 1
    return (piece for piece in np.split(order, breaks) if len(piece))


def pieces(
    rows: _Rows, start: _Words, end: _Words, ranges: Sequence[tuple[int, int]], stand: Sequence[tuple[int, int]]
) -> tuple[_Rows, _Words, _Words, _Rows]:
    """Intersect what is asked for, from `start` to before `end`, with each of `ranges` at the rows where it stands.

    :param ranges: first and last address of each
    :returns: of each piece the position in `rows`, its first address, its length, the number of the range
    """
    some = np.flatnonzero(end > start)
    index = RangeIndex(rows[some], start[some], end[some] - np.uint64(1))
    found = list(index.meetings(ranges, stand))
    at = some[np.concatenate([np.zeros(0, np.intp), *(places for _, places in found)])]
    number = np.repeat([number for number, _ in found], [len(places) for _, places in found]).astype(np.intp)
    first, last = np.array(ranges, np.uint64).reshape(-1, 2)[number].T
    low = np.maximum(start[at], first)
    return at, low, np.minimum(end[at] - np.uint64(1), last) - low + np.uint64(1), number
