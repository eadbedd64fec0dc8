"""Pins as the machine keeps them: a radix tree of frame numbers each. pgemu_kernels.gmem.pins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.objects.stage2 import radix_tree
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("frames", "held_for_kvm", "own_nodes")

Array = np.ndarray[Any, Any]


def _root(machine: Core, pin: int) -> int:
    """Root word of a pin's tree. ValueError past words.PINS."""
    if not 0 <= pin < W.PINS:
        raise ValueError(f"pin {pin}: expected a number of a pin, 0 to {W.PINS - 1}")
    return int(machine.arrays.state[int(W.STATE_PINS) + pin * W.PIN_WORDS + int(W.PIN_FRAMES)])


def frames(machine: Core, pin: int) -> Array:
    """See Machine.pinned_frames."""
    return radix_tree(machine.arrays.ram, _root(machine, pin))[1]


def held_for_kvm(machine: Core, first: int, last: int) -> list[int]:
    """Numbers of the pages that KVM itself maps (Vm.map_page) and holds, of frames [first, last)."""
    used = machine.register(W.R_MAPPED)
    rows = machine.arrays.state[int(W.STATE_MAPPED) :][: used * W.K_WORDS].reshape(-1, W.K_WORDS)
    inside = (rows[:, W.K_PFN] >= np.uint64(first)) & (rows[:, W.K_PFN] < np.uint64(last))
    return [int(number) for number in np.flatnonzero(inside & (rows[:, W.K_REFERENCES] != 0))]


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
