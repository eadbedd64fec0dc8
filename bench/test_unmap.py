"""Unmapping of single pages that the host has mapped."""

from __future__ import annotations

from collections.abc import Callable

from scene import Measure, Scene


def test_zap(measure: Measure, scene: Scene) -> None:
    measure(
        "unmap",
        lambda: scene.process.zap_many(scene.addresses),
        lambda: scene.process.touch_many(scene.addresses),
    )


def test_control(measure: Measure, control: Callable[[], object]) -> None:
    measure("unmap", control, lambda: None)
