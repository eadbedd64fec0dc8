"""Memory that a machine's arrays lie in: pages of this process's own, or of a file that others map, too.

Kernels, descriptors and views know arrays by their addresses, so memory that is to be shared is mapped where the
array is already: nothing that points to it changes.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from typing import Any

import numpy as np

from pgemu_kernels.words.operations import ENOMEM

__all__ = ("file_runs", "map_memory", "put_over")

Array = np.ndarray[Any, Any]

# Python names it from 3.13 on; the number is that of every Linux architecture but Alpha, MIPS and PowerPC.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MAP_FIXED = 0x10  # include/uapi/asm-generic/mman-common.h, of every architecture but MIPS
_files: dict[int, tuple[int, int]] = {}  # of arrays that lie in a file, by address: descriptor, offset


def map_memory(words: int, huge: bool, sparse: slice = slice(0, 0), *, counted: bool = False) -> Array:
    """uint64[words] of zeroes; `huge` asks the host for huge pages, but for words `sparse`.

    counted: the host refuses what it can never have (vm.overcommit_memory); else most of it is never touched. OSError.
    """
    size = max(words * 8, mmap.PAGESIZE)
    if size > sys.maxsize:
        raise OSError(ENOMEM, "beyond the addresses of this computer")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if counted else _MAP_NORESERVE)
    memory = mmap.mmap(-1, size, flags=flags)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
        first, last = (word * 8 // mmap.PAGESIZE * mmap.PAGESIZE for word in (sparse.start, sparse.stop))
        if first < last:
            memory.madvise(mmap.MADV_NOHUGEPAGE, first, last - first)
    return np.frombuffer(memory, dtype=np.uint64, count=words)


def put_over(array: Array, file: int, offset: int) -> None:
    """Map bytes of a file where an array of map_memory() lies, which holds from then on what the file does.

    file: a descriptor, which is duplicated; offset: a multiple of a page. OSError where it cannot be mapped.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    place = library.mmap
    place.restype = ctypes.c_void_p
    place.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    at, size = array.ctypes.data, max(array.nbytes, 1)
    if at % mmap.PAGESIZE:
        raise OSError(errno.EINVAL, "an array that begins within a page")
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    if place(at, size, rights, mmap.MAP_SHARED | _MAP_FIXED, file, offset) != at:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _forget(at)
    _files[at] = os.dup(file), offset
    weakref.finalize(array, _forget, at).atexit = False


def _forget(address: int) -> None:
    file, _ = _files.pop(address, (-1, 0))
    if file >= 0:
        os.close(file)


def file_runs(array: Array) -> list[tuple[int, int]] | None:
    """(first, end) in bytes of what an array that lies in a file holds but for its holes; None of any other array."""
    if array.ctypes.data not in _files:
        return None
    file, offset = _files[array.ctypes.data]
    end, at, found = offset + array.nbytes, offset, []
    while at < end:
        try:
            first = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but holes
                break
            raise
        if first >= end:
            break
        at = min(os.lseek(file, first, os.SEEK_HOLE), end)
        found.append((first - offset, at - offset))
    return found
