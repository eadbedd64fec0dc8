"""Page tables for the benchmarks of walks, written straight into `ram` in frames that the machine counts as used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu.objects.machine import Machine
from pgemu_kernels import words as W

Array = np.ndarray[Any, Any]
U = np.uint64


def take_frames(machine: Machine, count: int) -> int:
    """The first of `count` frames never used before, one after the other; the machine's seed must be 0."""
    state = machine.arrays.state
    first = max(machine.register(W.R_FRESH), 1)
    state[W.R_FRESH] = first + count
    machine.arrays.stats[int(W.STATS_GAUGES) + 2 * int(W.Gauge.FRAMES_USED)] += count
    return first


def tables_for(pages: int) -> int:
    """Table pages of a four-level tree that maps `pages` pages from address 0 on."""
    level1 = -(-pages // 512)
    return level1 + -(-level1 // 512) + 2


def build_tree(
    first: int, frames: Array, table_bits: int, leaf_bits: int, words: Callable[[int, int], Array]
) -> tuple[int, int]:
    """Map page i to `frames[i]`, from address 0 on, by tables in the pages from number `first` on.

    words(page, count) gives the uint64 words of `count` table pages. Returns the address of the top table and the
    number of the first level-1 table.
    """
    pages = frames.size
    level1 = -(-pages // 512)
    level2 = -(-level1 // 512)
    at = (first, first + 1, first + 2, first + 2 + level2)
    words(at[0], 1)[0] = at[1] << 12 | table_bits
    words(at[1], 1)[:level2] = np.arange(at[2], at[2] + level2, dtype=U) << U(12) | U(table_bits)
    words(at[2], level2)[:level1] = np.arange(at[3], at[3] + level1, dtype=U) << U(12) | U(table_bits)
    words(at[3], level1)[:pages] = frames << U(12) | U(leaf_bits)
    return at[0] << 12, at[3]
