"""Unmapping of single pages and of ranges that host or guest have mapped. Mappings by devices: test_devices.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scene import HVA, Measure, Scene

EEXIST = -17


def map_host(scene: Scene) -> None:
    assert scene.process.mmap(scene.gmem, HVA).status in (0, EEXIST)
    scene.process.touch_many(scene.addresses)
    assert not scene.process.touch_many(scene.addresses).status.any()


def map_guest(scene: Scene) -> None:
    assert scene.vm.bind(scene.gmem, 0).status in (0, EEXIST)
    scene.vm.touch_many(scene.offsets)


def test_zap(measure: Measure, scene: Scene) -> None:
    measure("unmap", lambda: scene.process.zap_many(scene.addresses), lambda: map_host(scene))


def test_zap_range(measure: Measure, scene: Scene) -> None:
    measure("unmap", lambda: scene.process.zap(HVA, scene.length), lambda: map_host(scene))


def test_munmap(measure: Measure, scene: Scene) -> None:
    """With tables, by one call."""
    size = scene.machine.config.pool  # all of the file
    measure("unmap", lambda: scene.process.munmap(HVA, size), lambda: map_host(scene))
    map_host(scene)


def test_unbind(measure: Measure, scene: Scene) -> None:
    """A memory slot goes, and all that KVM has mapped."""
    measure("unmap", lambda: scene.vm.unbind(0), lambda: map_guest(scene))
    map_guest(scene)


def test_punch_hole(measure: Measure, scene: Scene) -> None:
    """Hole after hole of a huge page, which host and guest have mapped."""
    size = scene.machine.config.page_size
    offsets = np.arange(-(-scene.length // size), dtype=np.uint64) * np.uint64(size)

    def prepare() -> None:
        map_host(scene)
        map_guest(scene)

    measure("unmap", lambda: scene.gmem.punch_hole_many(offsets, size), prepare)
    assert not scene.gmem.punch_hole_many(offsets, size).status.any()
    prepare()


def test_control(measure: Measure, control: Callable[[], object]) -> None:
    measure("unmap", control)
