"""A process that does to its own memory what it is told and says what that cost: run by test_running_kernel.py.

Reads one JSON list of operations a line from standard input and answers with one list of [status, minor faults,
change of VmPTE in KiB] a line. Operations: ["mmap", address, length, prot], ["munmap", address, length],
["mprotect", address, length, prot], ["dontneed", address, length], ["touch", address, write]. Between the two looks
at the counters nothing but the system call happens, with buffers made beforehand. Accesses go through read() from
/dev/zero and write() to a pipe, so that one without rights ends in EFAULT and not in a signal.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys

PAGE = 4096
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x2, 0x20, 0x100000
MADV_DONTNEED, MADV_NOHUGEPAGE = 4, 15
RUSAGE_SELF = 0

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
for name in ("munmap", "mprotect", "madvise"):
    getattr(libc, name).argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)[: 2 if name == "munmap" else 3]
libc.read.argtypes = libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
libc.read.restype = libc.write.restype = ctypes.c_ssize_t
libc.strstr.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
libc.strstr.restype = ctypes.c_void_p
libc.strtol.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
libc.strtol.restype = ctypes.c_long
libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)

usage = (ctypes.c_long * 64)()  # struct rusage; min_flt is its ninth word
text = ctypes.create_string_buffer(8192)
byte = ctypes.create_string_buffer(1)
STATUS = os.open("/proc/self/status", os.O_RDONLY)
ZERO = os.open("/dev/zero", os.O_RDONLY)
PIPE_OUT, PIPE_IN = os.pipe()


def minor_faults() -> int:
    libc.getrusage(RUSAGE_SELF, usage)
    return usage[8]


def page_tables() -> int:
    """VmPTE in KiB, read without making any object of size."""
    text[libc.pread(STATUS, text, len(text) - 1, 0)] = 0
    return int(libc.strtol(libc.strstr(text, b"VmPTE:") + len("VmPTE:"), None, 10))


def outcome(result: int) -> int:
    return -ctypes.get_errno() if result == -1 else 0


def mmap(address: int, length: int, prot: int) -> int:
    found = libc.mmap(address, length, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        return -ctypes.get_errno()
    return outcome(libc.madvise(address, length, MADV_NOHUGEPAGE))


def touch(address: int, write: int) -> int:
    if write:
        return outcome(libc.read(ZERO, address, 1))
    result = outcome(libc.write(PIPE_IN, address, 1))
    if result == 0:
        libc.read(PIPE_OUT, byte, 1)
    return result


OPERATIONS = {
    "mmap": mmap,
    "munmap": lambda address, length: outcome(libc.munmap(address, length)),
    "mprotect": lambda address, length, prot: outcome(libc.mprotect(address, length, prot)),
    "dontneed": lambda address, length: outcome(libc.madvise(address, length, MADV_DONTNEED)),
    "touch": touch,
}


def run(operations: list[list[object]]) -> list[tuple[int, int, int]]:
    answers = []
    for name, *arguments in operations:
        function = OPERATIONS[str(name)]
        tables, faults = page_tables(), minor_faults()
        status = function(*arguments)
        faults = minor_faults() - faults
        answers.append((status, faults, page_tables() - tables))
    return answers


def main() -> None:
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


main()
