"""Pins as the machine keeps them: a radix tree of frame numbers each. pgemu_kernels.gmem.pins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.findings import note_broken
from pgemu.objects.stage2 import radix_tree
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from pgemu_kernels.formats.page_format import PageFormat

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("frames", "held_for_kvm", "mapped_by_kvm", "own_nodes", "own_pages", "pinned")

Array = np.ndarray[Any, Any]


def _root(machine: Core, pin: int) -> int:
    """Root word of a pin's tree. ValueError past words.PINS."""
    if not 0 <= pin < W.PINS:
        raise ValueError(f"pin {pin}: expected a number of a pin, 0 to {W.PINS - 1}")
    return int(machine.arrays.state[int(W.STATE_PINS) + pin * W.PIN_WORDS + int(W.PIN_FRAMES)])


def frames(machine: Core, pin: int) -> Array:
    """See Machine.pinned_frames."""
    return radix_tree(machine.arrays.ram, _root(machine, pin))[1]


def mapped_by_kvm(machine: Core) -> Array:
    """uint64[n, K_WORDS]: the rows of pages that KVM itself maps."""
    words = machine.arrays.state[int(W.STATE_MAPPED) :][: machine.register(W.R_MAPPED) * W.K_WORDS]
    return words.reshape(-1, W.K_WORDS)


def held_for_kvm(machine: Core, first: int, last: int) -> list[int]:
    """Numbers of the pages that KVM itself maps (Vm.map_page) and holds, of frames [first, last)."""
    rows = mapped_by_kvm(machine)
    inside = (rows[:, W.K_PFN] >= np.uint64(first)) & (rows[:, W.K_PFN] < np.uint64(last))
    return [int(number) for number in np.flatnonzero(inside & (rows[:, W.K_REFERENCES] != 0))]


def own_nodes(machine: Core, owner: Array) -> Iterator[int]:
    """The frames of pins' and devices' trees, each marked in `owner` (uint8, one per frame) unless it was before."""
    for pin in range(machine.register(W.R_PINS)):
        yield from _own_tree(machine, _root(machine, pin), owner)
    for row in _domains(machine):
        for word in (W.D_AREAS, W.D_MEMORY):
            yield from _own_tree(machine, int(row[word]), owner)
    for register in (W.R_IO_PAGES, W.R_IO_PINNED):
        yield from _own_tree(machine, machine.register(register), owner)


def _own_tree(machine: Core, root: int, owner: Array) -> Iterator[int]:
    """The nodes of a radix tree."""
    ram = machine.arrays.ram
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


def _domains(machine: Core) -> Array:
    """uint64[n, D_WORDS]: the rows of address spaces of devices."""
    words = machine.arrays.state[int(W.STATE_DOMAINS) :][: machine.register(W.R_DOMAINS) * W.D_WORDS]
    return words.reshape(-1, W.D_WORDS)


def _of_containers(machine: Core) -> Iterator[Array]:
    """Frames of RAM that I/O page tables of VFIO containers map with a pin: nothing else tells."""
    ram = machine.arrays.ram
    for row in _domains(machine):
        if row[W.D_KIND] not in (W.DOMAIN_TYPE1, W.DOMAIN_TYPE1V2) or not row[W.D_ROOT]:
            continue
        table = next(t for t in reversed(machine.tables_made) if t.root == row[W.D_ROOT])
        starts, pages = leaves_of(ram, table.format, int(row[W.D_ROOT]))
        lasts, words = radix_tree(ram, int(row[W.D_AREAS]))
        tracked = words[np.searchsorted(lasts, starts[:, 0])] & np.uint64(W.AREA_TRACKED) != 0
        frames = starts[:, 1]
        known = (frames < np.uint64(ram.size // 512)) | machine.memory.holds(frames << np.uint64(12))
        mine = known & ~tracked
        first, count = frames[mine], pages[mine].astype(np.int64)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        yield np.repeat(first, count) + within.astype(np.uint64)


def leaves_of(ram: Array, fmt: PageFormat, root: int) -> tuple[Array, Array]:
    """uint64[n, 2], uint64[n]: I/O page and frame that each leaf begins with, and its 4K pages."""
    tables = ram.reshape(-1, 512)
    frames, bases = np.array([root >> 12], np.int64), np.zeros(1, np.uint64)
    found, counts = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint64)]
    for level in range(fmt.levels, 0, -1):
        shift = np.uint64(9 * (level - 1))
        entries = tables[frames].reshape(-1)
        pages = ((bases[:, None] << np.uint64(9)) + np.arange(512, dtype=np.uint64)).reshape(-1)
        present = entries & np.uint64(fmt.present) != 0
        leaf = present & (fmt.have_leaf_form(level, entries) if 1 < level <= fmt.largest_leaf else level == 1)
        at, words = pages[leaf] << shift, entries[leaf]
        sizes = fmt.sizes_of_leaves(level, words) >> np.uint64(12)
        inside = at & (sizes - np.uint64(1))
        first = inside == 0  # of equal entries that are one leaf
        pfns = ((words & np.uint64(fmt.address)) >> np.uint64(12)) & ~(sizes - np.uint64(1))
        found.append(np.stack([at[first], pfns[first]], axis=1))
        counts.append(sizes[first])
        below = present & ~leaf
        frames, bases = ((entries[below] & np.uint64(fmt.address)) >> np.uint64(12)).astype(np.int64), pages[below]
    return np.concatenate(found), np.concatenate(counts)


def pinned(machine: Core) -> tuple[Array, Array]:
    """uint64[n], uint64[n]: every frame that is pinned, ascending, and how many pins it has."""
    rows = machine.arrays.state[int(W.STATE_PINS) :][: machine.register(W.R_PINS) * W.PIN_WORDS].reshape(
        -1, W.PIN_WORDS
    )
    held = [frames(machine, pin)[: int(row[W.PIN_PAGES])] for pin, row in enumerate(rows)]
    held += [radix_tree(machine.arrays.ram, machine.register(W.R_IO_PINNED))[1] >> np.uint64(12)]
    held += _of_containers(machine)
    mapped = mapped_by_kvm(machine)
    held += [mapped[mapped[:, W.K_REFERENCES] == W.GUP_PIN_COUNTING_BIAS, W.K_PFN]]
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
