"""Experiments that more than one claim rests on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.experiments.claims.claim import HVA, Scene
from pgemu.machine.statistics import Statistics
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

__all__ = ("PAGE", "Flip", "flip", "levels", "page_types", "pages")

PAGE = 0x1234 * W.PAGE_4K  # offset of the page that is made shared: in the first huge page, of 2M pages in the tenth
NODE_BYTES = 576  # struct xa_node


class Flip(NamedTuple):
    """What a machine had counted before a page was made shared, while it was, and when it was private again."""

    scene: Scene
    before: Statistics
    shared: Statistics
    after: Statistics

    def event(self, event: Event, op: Operation | None = None) -> int:
        """How often between the first and the last."""
        return self.after.event(event, op) - self.before.event(event, op)

    def cost(self, *operations: Operation) -> tuple[float, float]:
        """(low, high) nanoseconds of operations in between."""
        ends = [(self.before.cost(op), self.after.cost(op)) for op in operations]
        return sum(b[0] - a[0] for a, b in ends), sum(b[1] - a[1] for a, b in ends)


def pages(scene: Scene) -> Any:
    """uint64[n]: guest addresses of all pages."""
    return np.arange(0, scene.gmem.size, W.PAGE_4K, dtype=np.uint64)


def flip(scene: Scene, times: int = 1) -> Flip:
    """The guest touches everything; then, so many times, a page becomes shared, host and guest use it, and private."""
    scene.vm.touch_many(pages(scene))
    before = shared = scene.machine.statistics
    for _ in range(times):
        _done(scene.gmem.convert(PAGE, W.PAGE_4K, shared=True))
        scene.process.touch(HVA + PAGE, write=True)
        scene.vm.touch_many(pages(scene))
        shared = scene.machine.statistics
        _done(scene.gmem.convert(PAGE, W.PAGE_4K, shared=False))
        scene.vm.touch_many(pages(scene))
    return Flip(scene, before, shared, scene.machine.statistics)


def _done(result: Any) -> None:
    if result.status:
        raise RuntimeError(f"a conversion that nothing is in the way of: {result.name}")


def levels(scene: Scene) -> dict[int, int]:
    """4K pages that the guest reaches by leaves of each level."""
    found = np.bincount(scene.vm.touch_many(pages(scene)).detail.astype(np.int64), minlength=4)
    return {level: int(found[level]) for level in (1, 2, 3)}


def page_types(scene: Scene, first: int) -> set[int]:
    """Page types (bits 31:24 of _mapcount, include/linux/page-flags.h:enum pagetype) in the huge page at a frame."""
    words = [int(scene.machine.struct_page(first + i)[6]) for i in range(scene.machine.config.page_size // W.PAGE_4K)]
    return {kind for word in words if (kind := word >> 24 & 0xFF) not in (0x00, 0xFF)}
