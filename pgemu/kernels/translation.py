"""Translation of one address, of many, and of a guest's, from compiled functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.kernels.handle import H_DESCRIPTOR, H_NESTED, H_TRANSLATE
from pgemu.kernels.native import (
    BYTES,
    CLOSED,
    FOREIGN,
    HANDLE,
    NOT_LOADED,
    NUMBER,
    REFUSED,
    WORDS,
    called,
    compiled,
    descriptor_of,
    handle_word,
    inlined,
    machine_of,
    no_words,
    stack_bytes,
    stack_words,
)
from pgemu.kernels.trees import (
    MAGIC_NESTED,
    MAGIC_ONE,
    PLAIN,
    T_FORMAT,
    T_GENERATION,
    T_GENERATION_AT,
    T_KINDS,
    T_MACHINE,
    T_MAGIC,
    T_ROOT,
    T_ROOT_AT,
    T_WORDS,
)
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.formats.bits import HOST_X86_64
from pgemu_kernels.tables.translate import (
    LARGE_LEAF,
    LOOK,
    can_pass,
    directory,
    find_below,
    leaf_level,
    load_masks,
    open_tree,
    passes_leaf,
)
from pgemu_kernels.words.registers import R_FORMATS
from pgemu_kernels.words.table_words import (
    ACCESS_ROWS,
    NESTED_READS,
    NESTED_SCRATCH,
    NESTED_WRITES,
    WALK_READS,
    WALK_SCRATCH,
    X_WORDS,
)

__all__ = (
    "Found", "Nested", "Walked", "root_of", "translate", "translate_many", "translate_nested", "walk",
)  # fmt: skip

U = np.uint64
_U0, _U1, _OFFSET = U(0), U(1), U(4095)
_NOWHERE = ~_U0
_T_WORDS, _X_WORDS, _PLAIN = U(T_WORDS), U(X_WORDS), U(PLAIN)
_ONE, _NESTED = U(MAGIC_ONE), U(MAGIC_NESTED)
SIZE_ONE = T_WORDS + (int(ACCESS_ROWS) + 1) * int(X_WORDS)
_SIZE_NESTED = T_WORDS + 2 * int(ACCESS_ROWS) * int(X_WORDS)
_READS, _SCRATCH = int(WALK_READS), int(WALK_SCRATCH)
_NESTED_READS, _NESTED_WRITES, _NESTED_SCRATCH = int(NESTED_READS), int(NESTED_WRITES), int(NESTED_SCRATCH)
_H_DESCRIPTOR, _H_TRANSLATE, _H_NESTED = U(H_DESCRIPTOR), U(H_TRANSLATE), U(H_NESTED)
_HOST = U(HOST_X86_64)
_LAST_ROOT = U((1 << 52) - 4096)


class Found(NamedTuple):
    """What a walk found. status: int64, a WalkStatus (0: translated), or one of CLOSED, ... physical: uint64, bytes, 0
    on failure. level: uint64, of the leaf or of the entry at fault. error: uint64, as in pgemu.Translation.
    """

    status: Any
    physical: Any
    level: Any
    error: Any


class Walked(NamedTuple):
    """The same, with how many entries were read and written (uint64)."""

    status: Any
    physical: Any
    level: Any
    error: Any
    read_count: Any
    write_count: Any


class Nested(NamedTuple):
    """What a nested walk found: status int64, the others uint64, as the columns of pgemu's NestedTranslation."""

    status: Any
    stage: Any
    physical: Any
    guest_level: Any
    host_level: Any
    error: Any
    fault_address: Any
    read_count: Any
    write_count: Any


@inlined
def root_of(handle, tree, magic, size):
    """(0, the root of a tree), or (what is wrong, 0)."""
    machine = handle_word(handle, _H_DESCRIPTOR)
    if machine == _U0:
        return CLOSED, _U0
    if tree.size != size or tree[T_MAGIC] != magic:
        return REFUSED, _U0
    m = machine_of(handle)
    if tree[T_MACHINE] != machine or tree[T_FORMAT] >= m.state[R_FORMATS]:
        return FOREIGN, _U0
    root = tree[T_ROOT]
    at = tree[T_ROOT_AT]
    if at != _NOWHERE:
        root = m.state[at]
        generation_at = tree[T_GENERATION_AT]
        if generation_at != _NOWHERE and m.state[generation_at] != tree[T_GENERATION]:
            return CLOSED, _U0
    if root == _U0:
        return CLOSED, _U0
    return 0, root


@inlined
def _is_kind(tree, kind):
    return kind < tree[T_KINDS] or kind == _PLAIN


@called
def _walk_exactly(handle, tree, root, address, kind, reads, writes, counts):
    """One address by the entry: Found."""
    entry = handle_word(handle, _H_TRANSLATE)
    if entry == _U0:
        return Found(NOT_LOADED, _U0, _U0, _U0)
    addresses, physical, error = stack_words(1), stack_words(1), stack_words(1)
    kinds, status, levels = stack_bytes(1), stack_bytes(1), stack_bytes(1)
    addresses[0], error[0], kinds[0], status[0] = address, _U0, kind, 0
    call_address(
        entry,
        (
            descriptor_of(handle), tree[T_FORMAT], root, addresses, kinds, tree[T_WORDS:], physical, status, levels,
            error, reads, writes, counts, stack_words(_SCRATCH),
        ),
    )  # fmt: skip
    return Found(np.int64(status[0]), physical[0], U(levels[0]), error[0])


@compiled(True, handle=HANDLE, tree=WORDS, address=NUMBER, kind=NUMBER)
def translate(handle, tree, address, kind):
    """translate(handle, tree, address, kind) -> Found: translate one address.

    tree: of kernels.tree(). address: bytes. kind: READ, WRITE, FETCH, USER_READ, USER_WRITE, USER_FETCH, judged under
    the tree's Access, the hardware's accessed and dirty bits set; or PLAIN. See PageTable.translate(). What passes
    without a second look is walked in the caller's code, all else by the entry `translate`.
    """
    at, what = U(address), U(kind)
    problem, root = root_of(handle, tree, _ONE, SIZE_ONE)
    if problem != 0:
        return Found(problem, _U0, _U0, _U0)
    if not _is_kind(tree, what):
        return Found(REFUSED, _U0, _U0, _U0)
    m = machine_of(handle)
    top = open_tree(m, tree[T_FORMAT], root)
    if can_pass(m, top):
        x = _T_WORDS + what * _X_WORDS
        table = directory(m.ram, tree, x, top, at)
        found = find_below(m.ram, tree, x, load_masks(tree, x), top.address_bits, table, at)
        if found & LARGE_LEAF == _U0:
            entry = m.ram[found]
            if passes_leaf(tree, x, _U1, entry):
                return Found(0, entry & top.address_bits | at & _OFFSET, _U1, _U0)
        elif found != LOOK:
            level = leaf_level(found)
            inside = size_of(level) - _U1
            physical = m.ram[found & ~LARGE_LEAF] & top.address_bits & ~inside | at & inside
            return Found(0, physical, level, _U0)
    return _walk_exactly(handle, tree, root, at, what, no_words(), no_words(), no_words())


@compiled(handle=HANDLE, tree=WORDS, address=NUMBER, kind=NUMBER, reads=WORDS, writes=WORDS)
def walk(handle, tree, address, kind, reads, writes):
    """walk(handle, tree, address, kind, reads, writes) -> Walked: translate one address, with its references.

    reads, writes: uint64[6] or longer; the first read_count and write_count elements are set to the physical addresses
    of the entries read and written, in order. The rest as of translate().
    """
    what = U(kind)
    problem, root = root_of(handle, tree, _ONE, SIZE_ONE)
    if problem == 0 and (not _is_kind(tree, what) or min(reads.size, writes.size) < _READS):
        problem = REFUSED
    if problem != 0:
        return Walked(problem, _U0, _U0, _U0, _U0, _U0)
    counts = stack_words(2)
    counts[0], counts[1] = _U0, _U0
    found = _walk_exactly(handle, tree, root, U(address), what, reads, writes, counts)
    return Walked(found.status, found.physical, found.level, found.error, counts[0], counts[1])


@compiled(
    handle=HANDLE, tree=WORDS, addresses=WORDS, kind=NUMBER, physical=WORDS, status=BYTES, levels=BYTES, error=WORDS
)
def translate_many(handle, tree, addresses, kind, physical, status, levels, error):
    """translate_many(handle, tree, addresses, kind, physical, status, levels, error) -> int64: 0, or CLOSED, ...

    addresses: uint64[n]; of all the same kind. physical uint64[n], status uint8[n] (WalkStatus), levels uint8[n] and
    error uint64[n] are written. The batch of PageTable.translate(), which asks for entries ahead of their use.
    """
    what = U(kind)
    problem, root = root_of(handle, tree, _ONE, SIZE_ONE)
    if problem != 0:
        return problem
    count = addresses.size
    if not _is_kind(tree, what) or physical.size != count or status.size != count:
        return REFUSED
    if levels.size != count or error.size != count:
        return REFUSED
    entry = handle_word(handle, _H_TRANSLATE)
    if entry == _U0:
        return NOT_LOADED
    kinds = stack_bytes(1)
    kinds[0] = what
    for i in range(count):
        status[i], error[i] = 0, _U0
    none = no_words()
    call_address(
        entry,
        (
            descriptor_of(handle), tree[T_FORMAT], root, addresses, kinds, tree[T_WORDS:], physical, status, levels,
            error, none, none, none, stack_words(_SCRATCH),
        ),
    )  # fmt: skip
    return 0


@compiled(handle=HANDLE, tree=WORDS, guest_root=NUMBER, address=NUMBER, kind=NUMBER, reads=WORDS, writes=WORDS)
def translate_nested(handle, tree, guest_root, address, kind, reads, writes):
    """translate_nested(handle, tree, guest_root, address, kind, reads, writes) -> Nested: translate a guest's address.

    tree: of kernels.nested_tree(). guest_root: guest physical address of the guest's top table (CR3 without its low
    bits). kind: READ to USER_FETCH. reads: uint64[35] or longer, writes: uint64[60] or longer: the first read_count and
    write_count elements are set to the physical addresses of the entries, in order, with the stage in bits 2:0
    (1 an entry of the guest's, 2 one of stage 2); both of no elements: nothing is listed. See Vm.translate_virtual().
    """
    what, top = U(kind), U(guest_root)
    problem, root = root_of(handle, tree, _NESTED, _SIZE_NESTED)
    listed = reads.size != 0 or writes.size != 0
    if problem == 0 and listed and (reads.size < _NESTED_READS or writes.size < _NESTED_WRITES):
        problem = REFUSED
    if problem == 0 and (what >= tree[T_KINDS] or top & _OFFSET != _U0 or top > _LAST_ROOT):
        problem = REFUSED
    entry = handle_word(handle, _H_NESTED)
    if problem == 0 and entry == _U0:
        problem = NOT_LOADED
    if problem != 0:
        return Nested(problem, _U0, _U0, _U0, _U0, _U0, _U0, _U0, _U0)
    addresses, physical, error, fault = stack_words(1), stack_words(1), stack_words(1), stack_words(1)
    kinds, status, stage, levels = stack_bytes(1), stack_bytes(1), stack_bytes(1), stack_bytes(2)
    counts, scratch = stack_words(2), stack_words(_NESTED_SCRATCH)
    for i in range(_NESTED_SCRATCH):
        scratch[i] = _U0
    addresses[0], kinds[0], counts[0], counts[1] = U(address), what, _U0, _U0
    call_address(
        entry,
        (
            descriptor_of(handle), _HOST, top, tree[T_FORMAT], root, addresses, kinds, tree[T_WORDS:], physical, status,
            stage, levels, error, fault, reads, writes, counts, scratch, _U1,
        ),
    )  # fmt: skip
    return Nested(
        np.int64(status[0]), U(stage[0]), physical[0], U(levels[0]), U(levels[1]), error[0], fault[0], counts[0],
        counts[1],
    )  # fmt: skip
