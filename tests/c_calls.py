"""C functions called from tests by ctypes, and C that is built for one test."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgemu import capi

__all__ = ("FLAGS", "call", "compiler", "shared_library", "table")

FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


def compiler(name: str = "gcc") -> str:
    """A compiler. Skips where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}")
    return found


def shared_library(source: Path, folder: Path) -> Any:
    """What a C file defines."""
    library = folder / f"{source.stem}.so"
    command = [compiler(), "-std=gnu11", *FLAGS, "-shared", "-fPIC", f"-I{capi.get_include()}", "-o", library, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def table() -> int:
    """Address of struct pgemu_api, as C gets it."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    found = pointer(capi._C_API, capi.CAPSULE)
    assert found is not None
    return int(found)


def call(name: str, *arguments: Any) -> int:
    """Call a function of the table; arrays are passed by their addresses."""
    words = [int(one.ctypes.data if hasattr(one, "ctypes") else one) & (1 << 64) - 1 for one in arguments]
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_uint64] * len(words))(capi.functions()[name])
    return int(function(*words))
