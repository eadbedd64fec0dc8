"""Walks of the tables that the designs make, of a process and of stage 2, as `translate` reads them.

Every page of a process is mapped by a leaf of 4K, and as stage 2 has its neighbours of the other kind, so is the
guest's. The control gathers as many words from an array, in the same order. Page tables alone: test_translate.py.
"""

from __future__ import annotations

import numpy as np

from pgemu.pytest_plugin import Controls
from scene import Measure, Scene


def test_process(measure: Measure, scene: Scene) -> None:
    scene.process.touch_many(scene.addresses)
    found = scene.process.translate(scene.addresses)
    assert not found.status.any()
    assert set(found.level.tolist()) == {1}
    measure("walk", lambda: scene.process.translate(scene.addresses))


def test_stage_2(measure: Measure, scene: Scene) -> None:
    scene.vm.touch_many(scene.offsets)
    found = scene.vm.translate(scene.offsets)
    assert not found.status.any()
    assert set(found.level.tolist()) == {1}
    measure("walk", lambda: scene.vm.translate(scene.offsets))


def test_control(measure: Measure, scene: Scene, pgemu_control: Controls) -> None:
    pages = scene.offsets >> np.uint64(12)
    measure("walk", pgemu_control.gather(np.zeros(scene.length >> 12, np.uint64), pages))
