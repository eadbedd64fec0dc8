"""The one decorator behind every kernel, and the cache that knows when any kernel source changed.

numba stamps a cached function with the file it stands in only, so an edited callee elsewhere goes
unseen, and NUMBA_BOUNDSCHECK is no part of its key. Here the stamp is a digest of every kernel
source, of the options and of BOUNDSCHECK; machine_code.py has the files. numba's global configuration is left alone.
"""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core import config

from pgemu_kernels.engine.machine_code import SOURCES
from pgemu_kernels.engine.progress import progress

# No reference counting: kernels allocate nothing, and counting costs up to 16x inside loops.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}

kernels: list[Any] = []  # every dispatcher made here, for the tests of the ground rules
entries: list[Any] = []  # those that Python calls


def source_stamp(folder: Path = SOURCES, options: dict[str, Any] | None = None) -> str:
    """Digest of all `*.py` under `folder`, of the compilers' versions, the options and BOUNDSCHECK (hex)."""
    digest = hashlib.sha256()
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    chosen = (sorted((options or OPTIONS).items()), bool(config.BOUNDSCHECK), config.OPT)
    digest.update(repr((versions, chosen)).encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _stamp(checked: bool) -> str:
    return source_stamp()


def current_stamp() -> str:
    """That of this process's kernels."""
    return _stamp(bool(config.BOUNDSCHECK))


try:  # private interfaces of numba, hence the pinned minor version
    from pgemu_kernels.engine.inner_functions import StepCompiler, inner_function
    from pgemu_kernels.engine.numba_internals import CFunctionCompiler, EntryCompiler, KernelCache

    _cache: Any = KernelCache
    _kernel: Callable[..., Any] = inner_function(forceinline=True, **OPTIONS)
    _step: Callable[..., Any] = inner_function(StepCompiler, forceinline=False, **OPTIONS)
    _outlined: Callable[..., Any] = inner_function(forceinline=False, **OPTIONS)
    _entry: Callable[..., Any] = njit(pipeline_class=EntryCompiler, forceinline=False, **OPTIONS)
    _c_function: Callable[..., Any] = njit(pipeline_class=CFunctionCompiler, forceinline=False, **OPTIONS)
except (ImportError, AttributeError):  # pragma: no cover - only with a numba that moved its internals
    _cache = None
    _kernel = njit(forceinline=True, **OPTIONS)
    _step = _outlined = _entry = _c_function = njit(forceinline=False, **OPTIONS)
    warnings.warn("this numba has unknown internals: kernels compile slowly and in every process", stacklevel=2)


def kernel(function: Callable[..., Any]) -> Any:
    """An inner function: takes the machine (handle.py), always inlined into its callers."""
    return _listed(_kernel(function))


def step(function: Callable[..., Any]) -> Any:
    """A step of an operation, the machine first: inlined where parameters are constants, called in full machines."""
    return _listed(_step(function))


def outlined(function: Callable[..., Any]) -> Any:
    """An inner function of a rare, long path: called, not inlined by force, to keep its callers small."""
    return _listed(_outlined(function))


def entry(function: Callable[..., Any]) -> Any:
    """An entry point: takes the int64 descriptor of a machine, cached on disk."""
    return _cached(_entry, function)


def c_function(function: Callable[..., Any]) -> Any:
    """An entry point for C: takes numbers and addresses, and the address of the descriptor (Declared.c_address)."""
    return _cached(_c_function, function)


def _cached(compiled: Callable[..., Any], function: Callable[..., Any]) -> Any:
    dispatcher = _listed(compiled(function))
    if _cache is not None:
        dispatcher._cache = _cache(function.__qualname__, current_stamp, progress.begin)
    entries.append(dispatcher)
    return dispatcher


def _listed(dispatcher: Any) -> Any:
    kernels.append(dispatcher)
    return dispatcher
