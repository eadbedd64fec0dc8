"""Loops that must not wait for the interpreter while something is measured; compiled when they are asked for."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, NamedTuple

import numpy as np

_PAGE = 4096
_ONE, _ZERO, _WORDS = np.uint64(1), np.uint64(0), np.uint64(512)


class Loops(NamedTuple):
    """Compiled loops; uint64 arrays, counts in units."""

    zero_pages: Any  # (memory, pages)
    copy_pages: Any  # (memory, from pages, to pages)
    store_lines: Any  # (memory, first line, lines)
    store_lines_at: Any  # (memory, order of lines, value)
    chase: Any  # (links, start, steps) -> end
    store_slots: Any  # (nodes, indices, value): in the tree that link_nodes() made
    add: Any  # (memory, times)
    spin: Any  # (flags, counter): counts in flags[counter] until flags[0] is set
    get_parent: Any  # (times)
    advise: Any  # (address, times)
    protect: Any  # (memory, address, times)


def compile_loops() -> Loops:
    """Compile the loops: no cache, for they are small and seldom used."""
    from numba import njit

    plain = (
        _zero_pages,
        _copy_pages,
        _store_lines,
        _store_lines_at,
        _chase,
        _store_slots,
        *_atomic(),
        *_system_calls(),
    )
    return Loops(*(njit(nogil=True, _nrt=False)(function) for function in plain))


# --------------------------------------------------------------------------- memory


def _zero_pages(memory: Any, pages: Any) -> None:
    for number in pages:
        for word in range(number * _WORDS, number * _WORDS + _WORDS):
            memory[word] = _ZERO


def _copy_pages(memory: Any, sources: Any, targets: Any) -> None:
    for i in range(len(targets)):
        source, target = sources[i] * _WORDS, targets[i] * _WORDS
        for word in range(_WORDS):
            memory[target + word] = memory[source + word]


def _store_lines(memory: Any, first: Any, lines: Any) -> None:
    for word in range(first * 8, (first + lines) * 8):
        memory[word] = np.uint64(word)


def _store_lines_at(memory: Any, order: Any, value: Any) -> None:
    for line in order:
        for word in range(line * np.uint64(8), line * np.uint64(8) + np.uint64(8)):
            memory[word] = value


def _chase(links: Any, start: Any, steps: Any) -> Any:
    at = start
    for _ in range(steps):
        at = links[at]
    return at


# --------------------------------------------------------------------------- a tree like the page cache's

NODE_WORDS = 72  # struct xa_node: 576 bytes
_SLOTS, _COUNT, _NODE = np.uint64(5), np.uint64(0), np.uint64(NODE_WORDS)  # words: where slots begin, entries counted
_SIX, _TWELVE, _LOW6 = np.uint64(6), np.uint64(12), np.uint64(63)


def link_nodes(nodes: Any) -> None:
    """Make a tree of three levels for 2^18 indices, as one 1G folio's pages take: its root is the first node.

    nodes: uint64[4161 * NODE_WORDS]. A slot above the leaves holds the word at which the node below begins.
    """
    leaves = np.arange(4096, dtype=np.uint64)
    middle = np.arange(64, dtype=np.uint64)
    nodes[_SLOTS + middle] = (np.uint64(1) + middle) * _NODE
    above = (np.uint64(1) + (leaves >> _SIX)) * _NODE
    nodes[above + _SLOTS + (leaves & _LOW6)] = (np.uint64(65) + leaves) * _NODE


def _store_slots(nodes: Any, indices: Any, value: Any) -> None:
    """As __xa_store() for each index: down from the root, the entry there replaced, the node's count changed."""
    for index in indices:
        node = nodes[_SLOTS + (index >> _TWELVE)]
        node = nodes[node + _SLOTS + (index >> _SIX & _LOW6)]
        slot = node + _SLOTS + (index & _LOW6)
        if (nodes[slot] == _ZERO) != (value == _ZERO):
            nodes[node + _COUNT] += _ONE
        nodes[slot] = value


# --------------------------------------------------------------------------- atomic


def _atomic() -> tuple[Any, ...]:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def declare_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
            return builder.atomic_rmw("add", address, arguments[2], "seq_cst")

        return types.uint64(array, index, value), codegen

    atomic_add = intrinsic(declare_add)

    def add(memory: Any, times: Any) -> None:
        for _ in range(times):
            atomic_add(memory, 0, _ONE)

    def spin(flags: Any, counter: Any) -> None:
        while atomic_add(flags, 0, _ZERO) == _ZERO:
            atomic_add(flags, counter, _ONE)

    return add, spin


# --------------------------------------------------------------------------- system calls


def _system_calls() -> tuple[Any, ...]:
    libc = ctypes.CDLL(None)
    getppid, madvise, mprotect = libc.getppid, libc.madvise, libc.mprotect
    getppid.argtypes = []
    madvise.argtypes = mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    dontneed = int(mmap.MADV_DONTNEED)
    read, write = int(mmap.PROT_READ), int(mmap.PROT_READ | mmap.PROT_WRITE)

    def get_parent(times: Any) -> None:
        for _ in range(times):
            getppid()

    def advise(address: Any, times: Any) -> None:
        for _ in range(times):
            madvise(address, _PAGE, dontneed)

    def protect(memory: Any, address: Any, times: Any) -> None:
        # The store makes the entry writable again, so that the next mprotect has something to flush.
        for i in range(times):
            mprotect(address, _PAGE, read)
            mprotect(address, _PAGE, write)
            memory[0] = np.uint64(i)

    return get_parent, advise, protect
