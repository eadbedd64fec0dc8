"""Pins as the machine keeps them: a radix tree of frame numbers each. pgemu_kernels.gmem.pins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.findings import note_broken
from pgemu.objects.stage2 import radix_tree
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("frames", "own_nodes", "own_pages", "pinned")

Array = np.ndarray[Any, Any]


def _root(machine: Core, pin: int) -> int:
    """Root word of a pin's tree. ValueError past words.PINS."""
    if not 0 <= pin < W.PINS:
        raise ValueError(f"pin {pin}: expected a number of a pin, 0 to {W.PINS - 1}")
    return int(machine.arrays.state[int(W.STATE_PINS) + pin * W.PIN_WORDS + int(W.PIN_FRAMES)])


def frames(machine: Core, pin: int) -> Array:
    """See Machine.pinned_frames."""
    return radix_tree(machine.arrays.ram, _root(machine, pin))[1]


def own_nodes(machine: Core, owner: Array) -> Iterator[int]:
    """The frames of all pins' trees, each marked in `owner` (uint8, one per frame) unless it was before."""
    ram = machine.arrays.ram
    for pin in range(machine.register(W.R_PINS)):
        root = _root(machine, pin)
        height = root & 7
        nodes = np.array([root & formats.ADDRESS] if height else [], np.uint64)
        for level in range(height, 0, -1):
            for node in (nodes >> np.uint64(12)).tolist():
                if not owner[node]:
                    owner[node] = 7
                    yield node
            if level > 1:
                words = ram[(nodes[:, None] >> np.uint64(3)) + np.arange(512, dtype=np.uint64)].reshape(-1)
                nodes = words[words != 0]


def pinned(machine: Core) -> tuple[Array, Array]:
    """uint64[n], uint64[n]: every frame that is pinned, ascending, and how many pins it has."""
    rows = machine.arrays.state[int(W.STATE_PINS) :][: machine.register(W.R_PINS) * W.PIN_WORDS].reshape(
        -1, W.PIN_WORDS
    )
    held = [frames(machine, pin)[: int(row[W.PIN_PAGES])] for pin, row in enumerate(rows)]
    pages, pins = np.unique(np.concatenate([np.zeros(0, np.uint64), *held]), return_counts=True)
    return pages, pins.astype(np.uint64)


def own_pages(machine: Core, pages: Array, owner: Array) -> None:
    """Mark pinned pages of ordinary memory that nothing else has in `owner`; what else is counted by frame is noted.

    pages: uint64[n], of `pinned`, whose pins are taken off the counts.
    """
    arrays = machine.arrays
    small = pages[pages < np.uint64(owner.size)]
    counts = arrays.counts[machine.register(W.R_PINNED) :][: owner.size]
    not_marked = small[(arrays.counts[small] & np.uint32(W.PAGE_PINNED)) == 0]
    zero = machine.register(W.R_ZERO_FRAME)
    for frame in [*np.flatnonzero(counts).tolist(), *not_marked[not_marked != zero].tolist()]:
        note_broken(arrays.state, W.Broken.REFERENCES, frame)
    owner[small[owner[small] == 0]] = 7
