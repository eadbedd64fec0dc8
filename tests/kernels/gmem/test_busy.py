"""Conversions that pins keep from private are counted as such, those that other references keep are not."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.presets import Versions
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

HVA = 0x7F00_0000_0000
PAGE, M2 = W.PAGE_4K, W.PAGE_2M


def counted(machine: Machine) -> int:
    return machine.statistics.event(Event.CONVERT_PINNED, W.Operation.CONVERT)


@pytest.mark.parametrize(
    ("like", "page_size"),
    [("next", PAGE), *((like, size) for like in ("rfc2", "dec2025", "jan2026") for size in (M2, W.PAGE_1G))],
)
def test_a_pin_is_counted_and_a_reference_is_not(like: Any, page_size: int) -> None:
    pool = max(page_size, 2 * M2)
    machine = Machine(Versions(like).configuration("restructure", pool=pool, page_size=page_size))
    gmem, process = machine.create_guest_memfd(pool), machine.create_process()
    assert machine.create_vm(process, protected=True).bind(gmem, 0).status == 0
    assert process.mmap(gmem, HVA).status == 0
    assert gmem.convert(0, 8 * PAGE, shared=True).status == 0
    assert process.touch(HVA + 3 * PAGE, write=True).status >= 0
    assert process.pin(HVA + 3 * PAGE, PAGE, pin=1, write=True).status == 0
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == -W.EAGAIN
    assert counted(machine) == 1
    # Another page of the folio that was split is free to go.
    assert gmem.convert(5 * PAGE, PAGE, shared=False).status == 0
    assert gmem.convert(0, 5 * PAGE, shared=False).status == -W.EAGAIN
    assert counted(machine) == 2
    assert machine.unpin(1).status == 0
    machine.operate(W.Operation.GET, object_=gmem.inode, offset=3 * PAGE)
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == -W.EAGAIN
    assert counted(machine) == 2
    machine.operate(W.Operation.PUT, object_=gmem.inode, offset=3 * PAGE)
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == 0
    assert counted(machine) == 2
    assert machine.check() == 0, machine.findings


def test_pieces_of_2m_are_looked_at_as_well() -> None:
    machine = Machine(Config(pool=W.PAGE_1G, split_to="2M"))
    gmem, process = machine.create_guest_memfd(W.PAGE_1G), machine.create_process()
    assert process.mmap(gmem, HVA).status == 0
    assert gmem.convert(0, 2 * M2, shared=True).status == 0
    process.touch(HVA + M2, write=True)
    assert process.pin(HVA + M2, PAGE, pin=1, write=True).status == 0
    assert gmem.convert(M2, M2, shared=False).status == -W.EAGAIN
    assert counted(machine) == 1
