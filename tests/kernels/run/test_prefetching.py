"""Batches that lie scattered are read ahead: that changes no result, also where there is nothing to be read."""

from __future__ import annotations

import numpy as np
import pytest

from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
SIZE = 24 * M2
COUNT = 200  # three batches of 64, and a few that are none


def scene(design: str, page_size: int) -> Machine:
    machine = Machine(Config(design, pool=SIZE, page_size=page_size))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(SIZE, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, VA).status == 0
    assert vm.bind(gmem, 0).status == 0
    return machine


@pytest.mark.parametrize("page_size", [PAGE, M2])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_scattered_batch_does_what_its_operations_do_one_by_one(design: str, page_size: int) -> None:
    """A tenth of the pages lies behind the file, where there is no VMA, no slot and no row of a block."""
    at_once, singly = scene(design, page_size), scene(design, page_size)
    pages = np.random.default_rng(1).permutation(SIZE // PAGE * 10 // 9)[:COUNT].astype(np.uint64)
    offsets = pages * np.uint64(PAGE)
    assert offsets[:64].max() - offsets[:64].min() > 32 << 20
    none = np.zeros(COUNT, np.uint64)
    for op, flags, addresses in (
        (Operation.HOST_FAULT, Flag.WRITE, offsets + np.uint64(VA)),
        (Operation.GUEST_FAULT, 0, offsets),
        (Operation.CONVERT, Flag.PRIVATE, none),
        (Operation.GUEST_FAULT, Flag.PRIVATE, offsets),
        (Operation.CONVERT, Flag.SHARED, none),
        (Operation.HOST_FAULT, 0, offsets + np.uint64(VA)),
        (Operation.ZAP, 0, offsets + np.uint64(VA)),
    ):
        header = np.full(COUNT, int(op) | int(flags) << 8, np.uint64)
        results = at_once.run_columns(header, none, addresses, offsets, np.uint64(PAGE), count=COUNT)
        assert len(set(results.status.tolist())) > 1
        for i in range(COUNT):
            single = singly.operate(
                op, flags=int(flags), address=int(addresses[i]), offset=int(offsets[i]), length=PAGE
            )
            assert tuple(single) == (results.status[i], results.detail[i])
    assert_same(at_once, singly)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("page_size", [PAGE, M2])
def test_a_slot_that_was_released_has_no_page_to_read_ahead(design: str, page_size: int) -> None:
    machine = Machine(Config(design, pool=SIZE, page_size=page_size))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(SIZE, shared=True)
    vm = machine.create_vm(machine.create_process(), protected=True)
    assert vm.bind(gmem, 0).status == 0
    assert vm.release(gmem).status == 0
    pages = np.random.default_rng(1).permutation(SIZE // PAGE)[:COUNT].astype(np.uint64)
    assert set(vm.touch_many(pages * np.uint64(PAGE)).status.tolist()) == {-W.EFAULT}


@pytest.mark.parametrize("page_size", [PAGE, M2])
def test_the_words_of_a_block_that_a_fault_reads_are_in_one_cache_line(page_size: int) -> None:
    machine = scene("restructure", page_size)
    row = machine.arrays.state.ctypes.data + machine.register(W.R_BLOCK_ROWS) * 8
    words = {(row + int(word) * 8) // 64 for word in (W.B_PFN, W.B_STATE, W.B_MUTEX)}
    assert (len(words), W.B_WORDS % 8) == (1, 0)
