"""Orders of a conversion, its parameters and its failures; allocation by several actors; defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.address_space import AddressSpace
from pgemu.designs import DESIGNS
from pgemu.guest_memfd import GuestMemfd
from pgemu.machine import Config, Machine
from pgemu.vm import Vm
from pgemu_kernels import layout as L
from pgemu_kernels.layout import Broken, Event, Flag, Gauge, Operation

M2 = L.PAGE_2M
PAGE = L.PAGE_4K
VA = 0x7F00_0000_0000
BLOCKS = 4
A, B = 1, 2  # actors
ORDERS = ("rfc2", "fixup", "jan2026")
NEVER_ENDS = 60  # steps after which an operation is taken for one that never returns

Arguments = dict[str, Any]


class Scene:
    """Four 2M pages of one inode, mapped by two processes and bound to two VMs, one of each process."""

    def __init__(self, design: str = "restructure", *, shared: bool = False, order: str = "jan2026", **more: Any) -> None:
        config = {"pool": BLOCKS * M2, "page_size": M2, "convert_order": order} | more
        self.machine = Machine(Config(design, **config))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(BLOCKS * M2, shared=shared)
        self.processes: list[AddressSpace] = [self.machine.create_process() for _ in range(2)]
        self.vms: list[Vm] = [self.machine.create_vm(process, protected=True) for process in self.processes]
        for process, vm in zip(self.processes, self.vms, strict=True):
            assert vm.bind(self.gmem, 0).status == 0
            assert process.mmap(self.gmem, VA).status == 0

    def touch(self, *pages: int) -> None:
        """Everybody uses these pages: guests all, hosts the shared ones."""
        for page in pages:
            for vm in self.vms:
                assert vm.touch(page * PAGE).detail
            if self.gmem.is_shared(page * PAGE):
                for process in self.processes:
                    assert process.touch(VA + page * PAGE).detail

    def convert(self, first: int, pages: int, *, shared: bool) -> tuple[int, int]:
        """Status, and the failing page where it failed (else 0)."""
        result = self.gmem.convert(first * PAGE, pages * PAGE, shared=shared)
        return result.status, result.detail // PAGE

    def split(self) -> list[bool]:
        return [self.gmem.is_split(block * M2) for block in range(BLOCKS)]

    def shared(self, *pages: int) -> list[bool]:
        return [self.gmem.is_shared(page * PAGE) for page in pages]

    def level(self, page: int, vm: int = 0) -> int:
        """Level of the stage-2 leaf over a page; 0: none."""
        level, _, entry = self.vms[vm].walk(page * PAGE)[-1]
        return level if entry & 1 else 0

    def leave_frames(self, n: int | None) -> None:
        """Only `n` more frames can be taken."""
        used = self.machine.statistics.gauge(Gauge.FRAMES_USED)
        limit = self.machine.register(L.R_FRAMES) - 1 if n is None else used + n
        self.machine.arrays.state[L.R_FRAMES_LIMIT] = limit

    def begin(self, actor: int, op: Operation, **arguments: Any) -> None:
        self.machine.begin(actor, op, **arguments)

    def steps(self, actor: int, n: int) -> None:
        for _ in range(n):
            assert self.machine.step(actor) == L.GO

    def finish(self, actor: int) -> tuple[int, int]:
        for _ in range(NEVER_ENDS):
            outcome = self.machine.step(actor)
            assert outcome != L.BLOCKED
            if outcome == L.STOP:
                return tuple(self.machine.result(actor))
        return tuple(self.machine.result(actor))

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken

    def event(self, event: Event) -> int:
        return self.machine.statistics.event(event)


def host(page: int, *, space: int = 0, write: bool = False) -> Arguments:
    flags = Flag.WRITE if write else 0
    return {"op": Operation.HOST_FAULT, "flags": flags, "space": space, "address": VA + page * PAGE}


def guest(page: int, vm: int = 0) -> Arguments:
    return {"op": Operation.GUEST_FAULT, "vm": vm, "address": page * PAGE}


def converting(first: int, pages: int, *, shared: bool) -> Arguments:
    flags = Flag.SHARED if shared else Flag.PRIVATE
    return {"op": Operation.CONVERT, "flags": flags, "offset": first * PAGE, "length": pages * PAGE}


# --------------------------------------------------------------------------- straight line and steps


def mixed(scene: Scene) -> None:
    """Block 0 mixed and used, block 1 private and used, block 2 shared and used, block 3 not allocated."""
    assert scene.convert(3, 2, shared=True) == (0, 0)
    assert scene.convert(100, 1, shared=True) == (0, 0)
    assert scene.convert(1024, 512, shared=True) == (0, 0)
    scene.touch(0, 3, 100, 511, 600, 1100, 1500)


def held(scene: Scene) -> None:
    """As `mixed`; somebody holds pages 100, 700 and 1100."""
    mixed(scene)
    for page in (100, 700, 1100):
        assert scene.gmem.get_reference(page * PAGE).status == 0


def short(scene: Scene) -> None:
    """As `mixed`, and no memory for the vmemmap of a huge page: 7 pages on 7.3, of which 3 are left."""
    mixed(scene)
    scene.leave_frames(3)


def exhausted(scene: Scene) -> None:
    mixed(scene)
    scene.leave_frames(0)


CASES: dict[str, tuple[Callable[[Scene], None], Arguments]] = {
    "to shared": (mixed, converting(2, 1100, shared=True)),
    "to private": (mixed, converting(1, 1500, shared=False)),
    "to private, one page": (mixed, converting(100, 1, shared=False)),
    "all to shared": (mixed, converting(0, 2048, shared=True)),
    "all to private": (mixed, converting(0, 2048, shared=False)),
    "to shared, held": (held, converting(2, 1100, shared=True)),
    "to private, held": (held, converting(1, 1500, shared=False)),
    "to shared, short of memory": (short, converting(2, 1100, shared=True)),
    "to private, short of memory": (short, converting(1, 1500, shared=False)),
    "to shared, no memory": (exhausted, converting(2, 1100, shared=True)),
    "to private, no memory": (exhausted, converting(1, 1500, shared=False)),
    "host fault": (mixed, host(1101)),
    "host fault, first use": (mixed, host(1536)),
    "guest fault, first use": (mixed, guest(1600)),
    "guest fault, no memory": (exhausted, guest(1600)),
    "nothing to do": (mixed, converting(3, 2, shared=True)),
    "unaligned": (mixed, {"op": Operation.CONVERT, "flags": Flag.SHARED, "offset": 5, "length": PAGE}),
}

VARIANTS: dict[str, Arguments] = {
    **{order: {"order": order} for order in ORDERS},
    **{f"{order}, by block": {"order": order, "convert_batch": "block"} for order in ORDERS},
    **{f"{order}, lazily": {"order": order, "merge": "lazy"} for order in ORDERS},
    "rfc2, series rfc2": {"order": "rfc2", "series": "rfc2", "kernel": "6.12"},
    "fixup, flushes batched": {"order": "fixup", "flush": "batched", "convert_batch": "block"},
    "rfc2, flushes batched": {"order": "rfc2", "flush": "batched", "series": "rfc2"},
    "jan2026, 6.12": {"kernel": "6.12", "merge": "lazy", "convert_batch": "block"},
    "rfc2, by page": {"order": "rfc2", "zero": "page", "rounded_zap_drops_both_kinds": False, "hvo": False},
    "fixup, one kind zapped": {"order": "fixup", "rounded_zap_drops_both_kinds": False, "notifier": False},
    "slides": {"design": "pfnmap", "order": "rfc2"},
    "slides, by block": {"design": "pfnmap", "convert_batch": "block", "kernel": "6.12"},
    "slides, flushes batched": {"design": "pfnmap", "flush": "batched", "defects": ("insert-unlocked",)},
}


def arrays(machine: Machine) -> dict[str, np.ndarray[Any, Any]]:
    """The machine's arrays, less the operation records: several ways use different ones."""
    found = {name: array for name, array in machine.arrays._asdict().items()}
    state = found["state"].copy()
    state[int(L.STATE_OPS) : int(L.STATE_INODES)] = 0
    return found | {"state": state}


def assert_same(one: Machine, other: Machine) -> None:
    theirs = arrays(other)
    for name, array in arrays(one).items():
        assert np.array_equal(array, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_do_what_the_whole_conversion_does(variant: str) -> None:
    for name, (prepare, arguments) in CASES.items():
        whole, stepped = (Scene(**VARIANTS[variant]) for _ in range(2))
        prepare(whole)
        prepare(stepped)
        expected = whole.machine.operate(**arguments, object_=0, actor=A)
        stepped.begin(A, **arguments, object_=0)
        assert stepped.finish(A) == tuple(expected), name
        assert_same(whole.machine, stepped.machine)
        for scene in (whole, stepped):
            scene.leave_frames(None)
            scene.sound()
