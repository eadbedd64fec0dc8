"""Every entry by name, and what its arguments are: whoever calls one here loads machine code, not the kernels' modules.

`needed` are those that `pgemu compare` calls, the ones that take longest to compile first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.ahead import declare, declared as declared

__all__ = (
    *(
        "arrange",
        "check",
        "check_ordinary",
        "declared",
        "edit",
        "provide",
        "run",
        "run_designs",
        "run_devices",
        "run_ordinary",
        "run_pooling",
        "tell_devices",
    ),
    *("collapse_accesses", "look_up", "loops_of", "read_accesses", "read_lines", "run_address"),
    *("translate", "translate_nested"),
)

_INTS, _WORDS, _BYTES, _HALVES = "int64[::1]", "uint64[::1]", "uint8[::1]", "uint16[::1]"
_INT, _WORD = "int64", "uint64"
_COLUMNS = {
    "header": _WORDS, "object_": _WORDS, "address": _WORDS, "offset": _WORDS, "length": _WORDS, "status": _INTS,
    "detail": _WORDS,
}  # fmt: skip
_STRETCH = {"descriptor": _INTS, **_COLUMNS, "first": _WORD, "last": _WORD}

_LOOPS = [
    declare("pgemu_kernels.run.fast", "run_faults", True, **_STRETCH),
    declare("pgemu_kernels.run.fast", "run_converts", True, **_STRETCH),
    declare("pgemu_kernels.run.fast", "run_others", True, **_STRETCH),
]
check = declare(
    "pgemu_kernels.rules.recount", "check", True, descriptor=_INTS, owner=_BYTES, leaves=_INTS, found=_INTS
).dispatcher
provide = declare(
    "pgemu_kernels.folios.boot", "provide", True, descriptor=_INTS, what=_INT, where=_WORD
).dispatcher  # fmt: skip
_run_declared = declare("pgemu_kernels.run.fast", "run", True, descriptor=_INTS, loops=_WORDS, **_COLUMNS, first=_WORD)
_run = _run_declared.dispatcher
_designs = declare(
    "pgemu_kernels.run.full", "run_designs", descriptor=_INTS, **_COLUMNS, first=_WORD, actor=_WORD, mode=_INT
)
run_designs = _designs.dispatcher
run_ordinary = declare(
    "pgemu_kernels.run.ordinary", "run_ordinary", descriptor=_INTS, **_COLUMNS, first=_WORD, actor=_WORD
).dispatcher
run_devices = declare(
    "pgemu_kernels.run.devices", "run_devices", descriptor=_INTS, **_COLUMNS, first=_WORD, actor=_WORD
).dispatcher
tell_devices = declare(
    "pgemu_kernels.run.revocations", "tell_devices", descriptor=_INTS, what=_WORD, op=_WORD, inode=_WORD, start=_WORD,
    end=_WORD,
)  # fmt: skip
run_pooling = declare(
    "pgemu_kernels.run.pooling", "run_pooling", descriptor=_INTS, **_COLUMNS, first=_WORD, actor=_WORD
).dispatcher
check_ordinary = declare(
    "pgemu_kernels.rules.ordinary", "check_ordinary", descriptor=_INTS, owner=_BYTES, found=_INTS
).dispatcher
edit = declare(
    "pgemu_kernels.tables.edits", "edit", descriptor=_INTS, request=_WORDS, addresses=_WORDS, physical=_WORDS,
    status=_INTS, detail=_WORDS, log=_WORDS,
).dispatcher  # fmt: skip
_WALKS = {"levels": _BYTES, "error": _WORDS}
_LISTS = {"reads": _WORDS, "writes": _WORDS, "counts": _WORDS, "w": _WORDS}
translate = declare(
    "pgemu_kernels.tables.translate", "translate", descriptor=_INTS, format_index=_WORD, root=_WORD, addresses=_WORDS,
    kinds=_BYTES, access=_WORDS, physical=_WORDS, status=_BYTES, **_WALKS, **_LISTS,
).dispatcher  # fmt: skip
translate_nested = declare(
    "pgemu_kernels.tables.nested", "translate_nested", descriptor=_INTS, guest_format=_WORD, guest_root=_WORD,
    stage2_format=_WORD, stage2_root=_WORD, addresses=_WORDS, kinds=_BYTES, access=_WORDS, physical=_WORDS,
    status=_BYTES, stage=_BYTES, **_WALKS, fault=_WORDS, **_LISTS, block=_WORD,
).dispatcher  # fmt: skip

read_lines = declare(
    "pgemu_kernels.text.log_lines", "read_lines", text=_BYTES, control=_WORDS, prefixes=_WORDS, tokens=_WORDS,
    names=_BYTES, shapes=_BYTES, counts=_WORDS, advices=_WORDS, tasks=_WORDS, older=_WORDS, rows=_WORDS, kept=_WORDS,
).dispatcher  # fmt: skip

read_accesses = declare(
    "pgemu_kernels.text.access_lines", "read_accesses", text=_BYTES, control=_WORDS, address=_WORDS, size=_WORDS,
    flags=_BYTES, foreign=_WORDS,
).dispatcher  # fmt: skip
collapse_accesses = declare(
    "pgemu_kernels.guest.collapse", "collapse_accesses", descriptor=_INTS, control=_WORDS, access_row=_WORDS,
    roots=_WORDS, addresses=_WORDS, flags=_BYTES, actors=_HALVES, spaces=_HALVES, physical=_WORDS, pages=_WORDS,
    blocks=_WORDS, memo=_WORDS, at=_WORDS, header=_WORDS, address=_WORDS, offset=_WORDS, length=_WORDS,
).dispatcher  # fmt: skip
look_up = declare(
    "pgemu_kernels.guest.tlb", "look_up", guest_descriptor=_INTS, descriptor=_INTS, tlb=_WORDS, control=_WORDS,
    counts=_WORDS, access_row=_WORDS, stage2_access=_WORDS, roots=_WORDS, addresses=_WORDS, flags=_BYTES,
    actors=_HALVES, spaces=_HALVES, found=_BYTES, levels=_BYTES, references=_BYTES, at=_WORDS, **_COLUMNS,
    loops=_WORDS,
).dispatcher  # fmt: skip

_addresses = np.zeros(len(_LOOPS), np.uint64)  # of the loops' machine code, as far as they were called
_LOOP_SHIFT = 60  # loops.LOOP_SHIFT


def run(descriptor: Any, *columns_and_first: Any) -> int:
    """Run operations on a default machine, see fast.run: the first one that is for another entry, or how many."""
    *columns, first = columns_and_first
    while True:
        stopped = int(_run(descriptor, _addresses, *columns, first))
        if stopped >> _LOOP_SHIFT == 0:
            return stopped
        loop = (stopped >> _LOOP_SHIFT) - 1
        _addresses[loop] = _LOOPS[loop].address()
        first = np.uint64(stopped & (1 << _LOOP_SHIFT) - 1)


def run_address(full: bool) -> int:
    """Where the entry behind run(), or run_designs() begins, for kernels that run operations between accesses."""
    return (_designs if full else _run_declared).address()


def loops_of() -> Any:
    """uint64[3]: what that entry takes as its loops, those that were called by now."""
    return _addresses
