"""Entries by name: their machine code is loaded without the kernels' modules, or compiled, several at once.

numba compiles under one lock, so other processes compile what else will be needed; they hand it over in the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

from numba.core import config
from numba.core.sigutils import normalize_signature

from pgemu_kernels.engine import machine_code
from pgemu_kernels.engine.compile import OPTIONS, current_stamp
from pgemu_kernels.engine.numba_internals import KernelCache, address_of, compiled_elsewhere
from pgemu_kernels.engine.progress import progress


class Declared:
    """An entry, and the argument types that it is called with; `needed`: by every machine that runs operations."""

    def __init__(self, module: str, name: str, needed: bool, arguments: dict[str, str]) -> None:
        self.module = module
        self.name = name
        self.needed = needed
        self.signature = f"({', '.join(arguments.values())},)"
        self._cache = KernelCache(name, current_stamp, progress.begin)
        self.dispatcher = compiled_elsewhere(_stand_in(name, arguments), self._obtain, **OPTIONS)
        declared.append(self)

    def ready(self) -> bool:
        """Whether it can be called at once."""
        return bool(self.dispatcher.overloads)

    def missing(self, in_cache: bool = False) -> bool:
        """Whether it is to be compiled before it can be called; `in_cache`: by the next process."""
        if self.ready() and not in_cache:
            return False
        return not self._cache.has(self.signature, self.dispatcher.targetctx)

    def make_ready(self) -> None:
        """Load it, or see to it that it is compiled."""
        self.dispatcher.compile(self.signature)

    def address(self) -> int:
        """Where its code begins, for numba_internals.call_address()."""
        self.make_ready()
        return address_of(self.dispatcher)

    def c_address(self) -> int:
        """Where C enters it, whose arguments are numbers and addresses."""
        self.make_ready()
        return address_of(self.dispatcher, for_c=True)

    def _obtain(self, arguments: Any) -> Any:
        found = self._cache.load(arguments, self.dispatcher.targetctx)
        if found is None and arguments == normalize_signature(self.signature)[0]:
            _compile_with_others(self)
            found = self._cache.load(arguments, self.dispatcher.targetctx) if not self.compiled_here() else None
        return found or self.compile_here(arguments)

    def compiled_here(self) -> bool:
        """Whether this process has compiled it, so that it is there even if it could not be kept."""
        # Another thread may be about to import the module: then it has no entry yet.
        dispatcher = getattr(sys.modules.get(self.module), self.name, None)
        return dispatcher is not None and normalize_signature(self.signature)[0] in dispatcher.overloads

    def compile_here(self, arguments: Any = None) -> Any:
        """The result of compiling it in this process."""
        arguments = arguments or normalize_signature(self.signature)[0]
        dispatcher = getattr(import_module(self.module), self.name)
        dispatcher.compile(arguments)
        progress.end(self.name)
        return dispatcher.overloads[arguments]


def _stand_in(name: str, parameters: Iterable[str]) -> Callable[..., None]:
    """A function with the entry's name and parameters, for numba to sort arguments by."""

    def function(*arguments: object) -> None: ...

    function.__name__ = function.__qualname__ = name
    kind = Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = Signature([Parameter(parameter, kind) for parameter in parameters])  # type: ignore[attr-defined]
    return function


declared: list[Declared] = []


def declare(module: str, name: str, needed: bool = False, /, **arguments: str) -> Declared:
    """Declare the entry `name` of a module, with its parameters' types: nothing is imported yet."""
    return Declared(module, name, needed, arguments)


class Jobs:
    """Entries to be compiled, by this process and by its helpers, each by whoever comes first."""

    def __init__(self, entries: list[Declared], helpers: int) -> None:
        self._lock = threading.Lock()
        self._waiting = list(entries)
        self._done = {entry: threading.Event() for entry in entries}
        self._threads = [threading.Thread(target=self._help, daemon=True) for _ in range(helpers)]
        for thread in self._threads:
            thread.start()

    def take(self, preferred: Declared | None = None) -> Declared | None:
        """An entry that nobody compiles yet."""
        with self._lock:
            if not self._waiting:
                return None
            if preferred in self._waiting:
                self._waiting.remove(preferred)
                return preferred
            return self._waiting.pop(0)

    def until(self, wanted: Declared) -> None:
        """Work until an entry is compiled. What a helper could not keep is not."""
        while not self._done[wanted].is_set():
            entry = self.take(wanted)
            if entry is None:
                self._done[wanted].wait()
                return
            try:
                entry.compile_here()
            finally:
                self._done[entry].set()

    def knows(self, entry: Declared) -> bool:
        """Whether it is one of these."""
        return entry in self._done

    def _help(self) -> None:
        """Have another process compile one entry after the other."""
        process = _helper()
        if process is None:
            return
        with suppress(OSError), process:
            while (entry := self.take()) is not None:
                progress.begin(entry.name)
                answer = _ask(process, entry)
                if answer:
                    progress.end(entry.name)
                self._done[entry].set()
                if not answer:
                    break


def _ask(process: subprocess.Popen[str], entry: Declared) -> str:
    """What a helper says when it has compiled an entry; "" if it died."""
    try:
        print(entry.module, entry.name, entry.signature, sep="\t", file=process.stdin, flush=True)
        return process.stdout.readline()  # type: ignore[union-attr]
    except OSError:
        return ""


_jobs: Jobs | None = None
_starting = threading.Lock()


def _begin_anew() -> None:
    """In a process that was forked: who compiles for its parent tells it nothing, and locks may be held by nobody."""
    global _jobs, _starting
    _jobs, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def _compile_with_others(entry: Declared) -> None:
    """Compile an entry; if every machine needs it, have others that every machine needs compiled meanwhile."""
    global _jobs
    with _starting:
        if _jobs is None or not _jobs.knows(entry):
            others = [other for other in declared if other.needed and other.missing()] if entry.needed else []
            if entry not in others or len(others) < 2 or _helpers(len(others)) == 0:
                return
            progress.expect(len(others))
            _jobs = Jobs(others, _helpers(len(others)))
    _jobs.until(entry)


def compile_ahead(entries: Iterable[Declared]) -> list[Declared]:
    """Compile those of the entries that are not in the cache: which ones."""
    missing = [entry for entry in entries if entry.missing()]
    progress.expect(len(missing))
    jobs = Jobs(missing, _helpers(len(missing)))
    for entry in missing:
        jobs.until(entry)
        if entry.missing(in_cache=True) and not entry.compiled_here():  # who was to compile it died
            entry.compile_here()
    return missing


def _helpers(count: int) -> int:
    """How many other processes are to compile so many entries: none where they could not hand them over."""
    if machine_code.writable() is None or not sys.executable:
        return 0
    return max(0, min(len(os.sched_getaffinity(0)), count) - 1)


_HELPER = "import sys; sys.path[:] = sys.argv[1:]; from pgemu_kernels.engine.ahead import serve; serve()"


def _helper() -> subprocess.Popen[str] | None:
    environment = dict(os.environ)
    if config.BOUNDSCHECK is not None:
        environment["NUMBA_BOUNDSCHECK"] = str(int(config.BOUNDSCHECK))
    command = [sys.executable, "-c", _HELPER, *(path or os.getcwd() for path in sys.path)]
    try:
        return subprocess.Popen(
            command, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return None


def serve() -> None:
    """A helper: compile what the lines of stdin name, and say so. It ends with its parent, which closes the pipe."""
    progress.quiet = True
    for line in sys.stdin:
        module, name, signature = line.rstrip("\n").split("\t")
        getattr(import_module(module), name).compile(signature)
        print("compiled", name, flush=True)
