"""Faults: a host touches shared pages, a guest touches pages whose neighbours are of the other kind."""

from __future__ import annotations

from collections.abc import Callable

from scene import HVA, Measure, Scene


def test_host_fault(measure: Measure, scene: Scene) -> None:
    measure(
        "fault",
        lambda: scene.process.touch_many(scene.addresses, write=True),
        lambda: scene.process.zap(HVA, scene.length),
    )


def test_guest_fault(measure: Measure, scene: Scene) -> None:
    measure(
        "fault",
        lambda: scene.vm.touch_many(scene.offsets, write=True),
        lambda: scene.process.zap(HVA, scene.length),
    )


def test_control(measure: Measure, control: Callable[[], object]) -> None:
    measure("fault", control)
