"""Edits of a page table from compiled functions, and what each of them has flushed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.kernels.handle import H_EDIT
from pgemu.kernels.native import (
    HANDLE,
    NOT_LOADED,
    NUMBER,
    REFUSED,
    TRUTH,
    WORDS,
    called,
    compiled,
    descriptor_of,
    handle_word,
    no_words,
    stack_status,
    stack_words,
)
from pgemu.kernels.translation import SIZE_ONE, root_of
from pgemu.kernels.trees import (
    MAGIC_ONE,
    T_EDITS,
    T_FORMAT,
    T_INPUT_BITS,
    T_PARTIAL,
    T_SIGN_EXTENDED,
    T_UNMAP,
)
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.words import table_words as W

__all__ = ("Edited", "edit", "map", "map_range", "protect", "unmap")

U = np.uint64
_U0, _U1, _ONE = U(0), U(1), U(MAGIC_ONE)
_H_EDIT, _E_WORDS = U(H_EDIT), int(W.E_WORDS)
_EXACT, _REPLACE = U(W.EDIT_EXACT), U(W.EDIT_REPLACE)
_MAP, _UNMAP, _PROTECT = U(W.Edit.MAP), U(W.Edit.UNMAP), U(W.Edit.PROTECT)
_FIRST, _LAST = U(W.Edit.MAP), U(W.Edit.STORE)
_PAGE, _U9, _U12, _U64, _LEVELS = U(4096), U(9), U(12), U(64), U(5)


class Edited(NamedTuple):
    """What an edit did. status: int64, 0 or -errno, or one of CLOSED, ... detail: uint64, as in pgemu.EditResult.

    flush_level: uint64, the smallest level of a leaf among what must be flushed; 0: nothing must be. That is input
    addresses [flush_start, flush_end), bytes, uint64 (modulo 2**64: an end of 0 is that of all addresses).
    freed_tables: uint64, 1 if tables went, so that paging-structure caches must forget them, too.
    """

    status: Any
    detail: Any
    flush_start: Any
    flush_end: Any
    flush_level: Any
    freed_tables: Any


@called
def _extended(tree, address, last):
    """An address as programs write it: `last`, the address or the one before it, says which half it is of."""
    bits = tree[T_INPUT_BITS]
    if tree[T_SIGN_EXTENDED] != _U0 and bits < _U64 and last >> (bits - _U1) != _U0:
        return address - (_U1 << bits)
    return address


@called
def _edit(handle, tree, op, address, physical, length, level, set_bits, clear_bits, flags):
    problem, root = root_of(handle, tree, _ONE, SIZE_ONE)
    entry = handle_word(handle, _H_EDIT)
    if problem == 0 and (op < _FIRST or op > _LAST or tree[T_EDITS] == _U0 or (op == _MAP and tree[T_EDITS] != _U1)):
        problem = REFUSED
    if problem == 0 and entry == _U0:
        problem = NOT_LOADED
    if problem != 0:
        return Edited(problem, _U0, _U0, _U0, _U0, _U0)
    request = stack_words(_E_WORDS)
    for i in range(_E_WORDS):
        request[i] = _U0
    request[W.E_OP], request[W.E_FORMAT], request[W.E_ROOT] = op, tree[T_FORMAT], root
    request[W.E_LENGTH], request[W.E_LEVEL] = length, level if level <= _LEVELS else _U0
    request[W.E_SET], request[W.E_CLEAR], request[W.E_FLAGS] = set_bits, clear_bits, flags
    at, to, status, detail = stack_words(1), stack_words(1), stack_status(1), stack_words(1)
    at[0], to[0], detail[0] = address, physical, _U0
    call_address(entry, (descriptor_of(handle), request, at, to, status, detail, no_words()))
    start, end = request[W.E_FLUSH_START], request[W.E_FLUSH_END]
    if end == _U0:
        return Edited(status[0], detail[0], _U0, _U0, _U0, _U0)
    return Edited(
        status[0], detail[0], _extended(tree, start, start), _extended(tree, end, end - _U1),
        request[W.E_FLUSH_LEVEL], request[W.E_FREED],
    )  # fmt: skip


@called
def _rule(tree, word):
    """EDIT_* as the format has it; of what is no tree, which is refused, none."""
    return tree[word] if tree.size == SIZE_ONE else _U0


@called
def _size(level):
    """Bytes of a leaf of a level; of a page for what is no level, which the entry refuses."""
    return _PAGE << _U9 * (level - _U1) if level >= _U1 and level <= _LEVELS else _PAGE


@compiled(
    handle=HANDLE, tree=WORDS, op=NUMBER, address=NUMBER, physical=NUMBER, length=NUMBER, level=NUMBER,
    set_bits=NUMBER, clear_bits=NUMBER, flags=NUMBER,
)  # fmt: skip
def edit(handle, tree, op, address, physical, length, level, set_bits, clear_bits, flags):
    """edit(handle, tree, op, address, physical, length, level, set_bits, clear_bits, flags) -> Edited: any edit.

    tree: of a PageTable. op: pgemu_kernels.words.Edit from MAP on. length: bytes. level, set_bits, clear_bits and
    flags (EDIT_* there) are the request's of pgemu_kernels/words/table_words.py (E_LEVEL, ...); those below fill them
    in.
    """
    return _edit(
        handle, tree, U(op), U(address), U(physical), U(length), U(level), U(set_bits), U(clear_bits), U(flags)
    )


@compiled(handle=HANDLE, tree=WORDS, address=NUMBER, physical=NUMBER, level=NUMBER, attributes=NUMBER, replace=TRUTH)
def map(handle, tree, address, physical, level, attributes, replace):
    """map(handle, tree, address, physical, level, attributes, replace) -> Edited: one leaf, as PageTable.map().

    attributes: bits of a 4K leaf (PageTable.format.leaf[0] are the usual ones). replace: a bool. REFUSED for a table
    that maps of higher addresses make taller (AMD's I/O tables): Python maps those.
    """
    flags = _EXACT | (_REPLACE if U(replace) != _U0 else _U0)
    size = _size(U(level))
    return _edit(handle, tree, _MAP, U(address), U(physical), size, U(level), U(attributes), _U0, flags)


@compiled(
    handle=HANDLE, tree=WORDS, address=NUMBER, physical=NUMBER, length=NUMBER, max_level=NUMBER, attributes=NUMBER,
    replace=TRUTH,
)  # fmt: skip
def map_range(handle, tree, address, physical, length, max_level, attributes, replace):
    """map_range(handle, tree, address, physical, length, max_level, attributes, replace) -> Edited: leaves as large as
    the addresses allow and `max_level` says, as PageTable.map_range().
    """
    flags = _REPLACE if U(replace) != _U0 else _U0
    return _edit(handle, tree, _MAP, U(address), U(physical), U(length), U(max_level), U(attributes), _U0, flags)


@compiled(handle=HANDLE, tree=WORDS, address=NUMBER, length=NUMBER)
def unmap(handle, tree, address, length):
    """unmap(handle, tree, address, length) -> Edited: clear a range's leaves, as PageTable.unmap() does by default."""
    return _edit(handle, tree, _UNMAP, U(address), _U0, U(length), _U0, _U0, _U0, _rule(tree, T_UNMAP))


@compiled(handle=HANDLE, tree=WORDS, address=NUMBER, length=NUMBER, set_bits=NUMBER, clear_bits=NUMBER)
def protect(handle, tree, address, length, set_bits, clear_bits):
    """protect(handle, tree, address, length, set_bits, clear_bits) -> Edited: as PageTable.protect() by default."""
    return _edit(
        handle, tree, _PROTECT, U(address), _U0, U(length), _U0, U(set_bits), U(clear_bits), _rule(tree, T_PARTIAL)
    )
