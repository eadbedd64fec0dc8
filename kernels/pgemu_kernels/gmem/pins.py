"""Pins with a number: what pin_user_pages() took for a range of a process, held until UNPIN. mm/gup.c.

A machine of the designs alone pins by a step that knows no other memory; who has others goes through run_ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import clear_words, stop
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.gmem.gup import count_pinned, pin_run_of_any, pin_run_of_designs, unpin_run
from pgemu_kernels.words.operations import EEXIST, EINVAL, ENOENT, ENOMEM
from pgemu_kernels.words.registers import R_PINS
from pgemu_kernels.words.rows import (
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_SPACE,
    PIN_ADDRESS,
    PIN_FLAGS,
    PIN_FRAMES,
    PIN_LIVE,
    PIN_PAGES,
    PIN_SPACE,
    PIN_WORDS,
    PINS,
    STATE_PINS,
)

U = np.uint64
_WORDS = U(PIN_WORDS)


@kernel
def pin_row(pin):
    return STATE_PINS + pin * _WORDS


@outlined
def _note(m, row, first, pfn, n):
    """Write the frames of a run down, from page `first` of the pin on: how many there was memory for.

    The list of frames is the machine's; in Linux it is the caller's.
    """
    for i in range(n):
        if cache_store(m, row + PIN_FRAMES, first + i, pfn + i) != 0:
            return i
    return n


def operation(pin_run: Callable[..., Any]) -> Any:
    """PIN by a step of gup.pinning()."""

    @outlined
    def operate_pin(m, op):
        """PIN: 0 with the pages pinned, fewer than asked for where a later one failed; else the first page's error.

        -EINVAL for a pin number past words.PINS, an address or length that is not aligned, no length; -EEXIST for a pin
        that is live; what gup.pinning() returns.
        """
        state = m.state
        pin = state[op + O_OBJECT]
        address = state[op + O_ADDRESS]
        length = state[op + O_LENGTH]
        if pin >= U(PINS) or (address | length) & U4095 != U0 or length == U0 or address + length < address:
            return stop(state, op, -EINVAL)
        row = pin_row(pin)
        if state[row + PIN_LIVE] != U0:
            return stop(state, op, -EEXIST)
        pages = length >> U12
        pinned = U0
        status = np.int64(0)
        while pinned < pages and status == 0:
            at = address + (pinned << U12)
            status, pfn, n = pin_run(m, state[op + O_SPACE], at, pages - pinned, state[op + O_FLAGS])
            if status == 0:
                noted = _note(m, row, pinned, pfn, n)
                pinned += noted
                if noted < n:
                    unpin_run(m, pfn + noted, n - noted, False)
                    count_pinned(m, np.int64(noted) - np.int64(n))
                    status = np.int64(-ENOMEM)
        state[op + O_DETAIL] = pinned
        if pinned == U0:
            return stop(state, op, status)
        state[row + PIN_LIVE] = U1
        state[row + PIN_PAGES] = pinned
        state[row + PIN_FLAGS] = state[op + O_FLAGS]
        state[row + PIN_SPACE] = state[op + O_SPACE]
        state[row + PIN_ADDRESS] = address
        state[R_PINS] = max(state[R_PINS], pin + U1)
        return stop(state, op, 0)

    return operate_pin


operate_pin = operation(pin_run_of_designs)
operate_pin_of_any = operation(pin_run_of_any)


@outlined
def operate_unpin(m, op):
    """UNPIN: 0 with the pages released, or -ENOENT. mm/gup.c:unpin_user_pages().

    Pages that left their inode or their mapping since are released too: the last reference sends them back.
    """
    state = m.state
    pin = state[op + O_OBJECT]
    if pin >= U(PINS) or state[pin_row(pin) + PIN_LIVE] == U0:
        return stop(state, op, -ENOENT)
    row = pin_row(pin)
    pages = state[row + PIN_PAGES]
    for index in range(pages):
        pfn = cache_find(m, state[row + PIN_FRAMES], index)
        cache_store(m, row + PIN_FRAMES, index, U0)
        count_pinned(m, np.int64(-1))
        unpin_run(m, pfn, U1, False)
    clear_words(state, row, _WORDS)
    state[op + O_DETAIL] = pages
    return stop(state, op, 0)
