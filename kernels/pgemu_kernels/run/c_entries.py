"""Functions that C calls, by name (run/c_calls.py), and what they call by address.

Imported by pgemu.capi, and to compile ahead: nobody else has to wait for them.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import numpy as np

from pgemu_kernels.engine.ahead import Declared, declare
from pgemu_kernels.run.entries import declared, loops_of
from pgemu_kernels.words import call_words as W
from pgemu_kernels.words.operations import Entry

__all__ = ("FUNCTIONS", "calls", "provide_address")


def _declare(name: str, parameters: str) -> Declared:
    arguments = dict.fromkeys(("machine", *parameters.split()), "uint64")
    module = "c_walks" if name.startswith("translate") else "c_calls"
    return declare(f"pgemu_kernels.run.{module}", f"c_{name}", **arguments)


# In the order of struct pgemu_api.
FUNCTIONS = {
    name: _declare(name, parameters)
    for name, parameters in {
        "translate": "mmu root kind address found",
        "translate_batch": "mmu root kind kinds count addresses found",
        "translate_nested": "mmu guest_root stage2_root kind address found reads writes",
        "translate_nested_batch": "mmu guest_root stage2_root kind kinds count addresses found",
        "operate": "operation detail",
        "run": "columns count status detail",
        "host_fault": "space address flags detail",
        "guest_fault": "vm address flags detail",
        "convert": "vm inode offset length flags detail",
        "zap": "space address length flags detail",
        "munmap": "space address length detail",
        "punch_hole": "inode offset length detail",
        "pin": "space number address length flags detail",
        "unpin": "number detail",
        "dma_map": "domain space iova length inode offset flags detail",
        "dma_unmap": "domain iova length detail",
        "dma_access": "domain device iova length word flags detail",
        "event_count": "event",
        "gauge_value": "gauge",
    }.items()
}

_CALLED = {
    Entry.FAST: "run",
    Entry.FULL: "run_designs",
    Entry.ORDINARY: "run_ordinary",
    Entry.POOLING: "run_pooling",
    Entry.DEVICES: "run_devices",
    int(W.CALL_TRANSLATE): "translate",
    int(W.CALL_NESTED): "translate_nested",
    int(W.CALL_OPERATE): "c_operate",
}
_LOOPS = ("run_faults", "run_converts", "run_others")
_calls = np.zeros(W.CALL_WORDS, np.uint64)


def _entry(name: str) -> Declared:
    return next(entry for entry in declared if entry.name == name)


def provide_address(number: int) -> int:
    """Put the address of an entry into its word of calls(), or of a loop into loops_of(): 0, or -1 with the reason on
    stderr. Called from C, where nobody could catch an exception.
    """
    try:
        if number >= W.CALL_LOOP:
            loop = number - int(W.CALL_LOOP)
            loops_of()[loop] = _entry(_LOOPS[loop]).address()
        else:
            _calls[number] = _entry(_CALLED[number]).address()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        return -1
    return 0


def calls(loader: int) -> Any:
    """uint64[CALL_WORDS]: the process's table of entries. loader: address of a C function around provide_address()."""
    _calls[W.CALL_LOAD] = loader
    _calls[W.CALL_LOOPS] = loops_of().ctypes.data
    if not _calls[W.CALL_OPERATE]:
        _calls[W.CALL_OPERATE] = _entry("c_operate").address()
    return _calls
