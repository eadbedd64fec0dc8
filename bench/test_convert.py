"""Conversions of single pages inside blocks that are split already (restructure)."""

from __future__ import annotations

from collections.abc import Callable

from scene import Measure, Scene


def test_to_private(measure: Measure, scene: Scene) -> None:
    measure(
        "convert",
        lambda: scene.gmem.convert_many(scene.offsets, shared=False),
        lambda: scene.gmem.convert_many(scene.offsets, shared=True),
    )


def test_mapped_to_private(measure: Measure, scene: Scene) -> None:
    """Host and guest have every page mapped."""

    def prepare() -> None:
        scene.gmem.convert_many(scene.offsets, shared=True)
        scene.process.touch_many(scene.addresses)
        scene.vm.touch_many(scene.offsets)

    measure("convert", lambda: scene.gmem.convert_many(scene.offsets, shared=False), prepare)


def test_to_shared(measure: Measure, scene: Scene) -> None:
    measure(
        "convert",
        lambda: scene.gmem.convert_many(scene.offsets, shared=True),
        lambda: scene.gmem.convert_many(scene.offsets, shared=False),
    )


def test_control(measure: Measure, control: Callable[[], object]) -> None:
    measure("convert", control)
