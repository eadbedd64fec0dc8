"""Handles: closed, foreign and wrong ones, the life of their machine, and when numba's cache of a caller is used."""

from __future__ import annotations

import doctest
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from pgemu import Config, Machine, kernels
from pgemu_kernels import words as W

Array = np.ndarray[Any, Any]
BASE = 0x4000_0000
ROOT = Path(__file__).parents[2]


@njit(nogil=True)
def statuses(handle: Any, tree: Array, nested: Array, out: Array) -> None:
    """What each function says, in out: int64[7]."""
    none, words, levels = np.zeros(0, np.uint64), np.zeros(6, np.uint64), np.zeros(6, np.uint8)
    out[0] = kernels.translate(handle, tree, BASE, kernels.PLAIN).status
    out[1] = kernels.walk(handle, tree, BASE, kernels.PLAIN, words, words).status
    out[2] = kernels.translate_many(
        handle, tree, words, kernels.PLAIN, words.copy(), levels, levels.copy(), words.copy()
    )
    out[3] = kernels.translate_nested(handle, nested, 0, 0, kernels.READ, none, none).status
    out[4] = kernels.protect(handle, tree, BASE, 4096, 0, 2).status
    out[5] = kernels.guest_fault(handle, 0, 0, 0).status
    out[6] = kernels.event_count(handle, 0)


def build() -> tuple[Machine, Array, Array]:
    machine = Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M))
    vm = machine.create_vm(protected=True)
    assert vm.bind(machine.create_guest_memfd(W.PAGE_2M), 0).status == 0
    table = machine.create_page_table("x86-64")
    assert table.map(BASE, 0x8000).status == 0
    return machine, kernels.tree(table), kernels.nested_tree(vm)


def test_closed_foreign_and_unloaded_have_codes_of_their_own() -> None:
    machine, tree, nested = build()
    _, tree_of_other, nested_of_other = build()
    handle, out = kernels.Handle(machine), np.zeros(7, np.int64)
    statuses(handle, tree, nested, out)
    assert (out[[0, 1, 2, 4]] == 0).all()
    assert (out > -5000).all()
    statuses(handle, tree_of_other, nested_of_other, out)
    assert (out[:5] == kernels.FOREIGN).all()
    statuses(handle, nested, tree, out)
    assert (out[:5] == kernels.REFUSED).all()
    foreign_row = tree.copy()
    foreign_row[2] = machine.register(W.R_FORMATS)
    statuses(handle, foreign_row, nested, out)
    assert (out[[0, 1, 2, 4]] == kernels.FOREIGN).all()
    statuses(kernels.Handle(machine, "pooling"), tree, nested, out)
    assert out[:5].tolist() == [0, *[kernels.NOT_LOADED] * 4]
    statuses(kernels.Handle(machine, "edit"), tree, nested, out)
    assert out[[1, 2, 3, 5]].tolist() == [kernels.NOT_LOADED] * 4
    handle.close()
    assert repr(handle) == "Handle(closed)"
    statuses(handle, tree, nested, out)
    assert (out == kernels.CLOSED).all()


def test_the_example_of_the_module() -> None:
    failed, tried = doctest.testmod(kernels)
    assert tried > 7
    assert failed == 0


def test_a_handle_keeps_its_machine() -> None:
    machine, tree, nested = build()
    handle, known, out = kernels.Handle(machine), weakref.ref(machine), np.zeros(7, np.int64)
    del machine
    gc.collect()
    assert known() is not None
    statuses(handle, tree, nested, out)
    assert out[0] == 0
    del handle
    gc.collect()
    assert known() is None


def test_wrong_types_do_not_compile_and_are_named() -> None:
    machine, tree, _ = build()
    handle = kernels.Handle(machine, "translate")

    @njit
    def wrong(handle: Any, tree: Any, address: Any) -> int:
        return kernels.translate(handle, tree, address, 0).status  # type: ignore[no-any-return]

    for arguments, told in (
        ((handle, tree, 4096.0), "address is float64, expected an integer"),
        ((handle, tree, True), "address is bool, expected an integer"),
        ((handle, tree.astype(np.int64), 0), "tree is array.int64, 1d, C., expected a writable uint64 array"),
        ((handle, tree[::2], 0), "tree is array.uint64, 1d, A., expected a writable uint64 array"),
        ((machine.descriptor, tree, 0), "handle is array.int64, 1d, C., expected a pgemu.kernels.Handle"),
    ):
        with pytest.raises(TypingError, match=rf"pgemu.kernels.translate\(\): {told}"):
            wrong(*arguments)


def test_python_is_told_where_to_call_and_what_to_load() -> None:
    machine, tree, _ = build()
    with pytest.raises(TypeError, match=r"pgemu.kernels.unmap\(\) is called by functions that numba compiles"):
        kernels.unmap(kernels.Handle(machine, "edit"), tree, 0, 4096)
    with pytest.raises(ValueError, match="what 'walks': expected one of translate, translate_nested, edit, operate"):
        kernels.Handle(machine, "walks")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="machine 3"):
        kernels.Handle(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of 3"):
        kernels.tree(3)  # type: ignore[arg-type]


CALLER = """
import numpy as np
from numba import njit
from pgemu import Config, Machine, kernels

@njit(cache=True, nogil=True)
def physical(handle, tree, address):
    return kernels.translate(handle, tree, address, kernels.PLAIN).physical
"""
PROGRAM = """
import sys
import caller
import numpy as np
from pgemu import Config, Machine, kernels
from pgemu.kernels import handle

if sys.argv[1] != "same":
    handle.stamp = lambda: sys.argv[1]
padding = np.zeros(int(sys.argv[2]))
machine = Machine(Config())
table = machine.create_page_table("x86-64")
table.map(0x4000_0000, 0x8000)
found = caller.physical(kernels.Handle(machine, "translate"), kernels.tree(table), 0x4000_0000)
stats = caller.physical.stats
print(int(found), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_what_numba_has_cached_of_a_caller_is_used_with_the_same_pgemu_only(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    places = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": places, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    if "PGEMU_CACHE_DIR" not in environment and os.environ.get("NUMBA_CACHE_DIR"):
        environment["PGEMU_CACHE_DIR"] = str(Path(os.environ["NUMBA_CACHE_DIR"]) / "pgemu")
    told = []
    for stamp, padding in (("same", 0), ("same", 100_000), ("changed", 0)):
        command = [sys.executable, "-c", PROGRAM, stamp, str(padding)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split())
    assert told == [["32768", "0", "1"], ["32768", "1", "0"], ["32768", "0", "1"]]
