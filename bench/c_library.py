"""Functions in C that pgemu is set against, compiled where there is a compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

POINTER, NUMBER, SIZE, INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int


def compiled(source: str, function: str, arguments: list[Any], folder: Path, level: str) -> Any:
    """A function of a file beside this one, which returns nothing. Skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(f"no C compiler (cc) to build {source} with")
    library = folder / f"{source}.so"
    path = Path(__file__).with_name(source)
    subprocess.run([compiler, level, "-march=native", "-shared", "-fPIC", "-o", library, path], check=True)
    found = getattr(ctypes.CDLL(str(library)), function)
    found.argtypes, found.restype = arguments, None
    return found


def address(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
