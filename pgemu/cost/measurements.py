"""What user space can measure of a machine: copies, stores, cache misses, system calls, faults, a shootdown.

Linux only. Loops that must not wait for the interpreter are compiled when `measure` is called, in some seconds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from math import isnan, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pgemu.cost.loops import NODE_WORDS, compile_loops, link_nodes

__all__ = ("WHAT", "Measurement", "NotMeasuredError", "duration", "footprint", "last_level_cache", "measure")

Array = np.ndarray[Any, Any]
Sampler = Callable[[], float]
"""Runs once and returns nanoseconds per unit, or nan where something else came between."""

WHAT: Mapping[str, str] = MappingProxyType(
    {
        "copy_hot": "4 KiB copied, cached",
        "copy_cold": "4 KiB copied, from and to memory",
        "zero_hot": "4 KiB zeroed, cached",
        "zero_cold": "4 KiB zeroed, in memory",
        "line_sequential": "64-byte line stored, in sequence",
        "line_random": "64-byte line stored, in random order",
        "miss": "load that depends on the last, a cache miss",
        "slot_hot": "tree slot stored, in sequence, cached",
        "slot_cold": "tree slot stored, at random, not cached",
        "atomic": "atomic add, cached",
        "system_call": "system call that does nothing (getppid)",
        "system_call_mm": "system call on an empty page (madvise)",
        "populate": "anonymous page populated in a batch",
        "touch": "anonymous page faulted in",
        "zap_anonymous": "anonymous page zapped and freed",
        "refault": "memfd page faulted in, in the page cache",
        "zap_memfd": "memfd page zapped",
        "shootdown": "TLB shootdown of another CPU",
        "shootdown_more": "TLB shootdown, each further CPU",
        "grace_period": "RCU grace period (membarrier)",
    }
)
"""What is measured, by key, in the order of measuring."""

_FEWEST, _MOST = 5, 1000  # repetitions
_MOST_THREADS = 16  # CPUs in a shootdown
_NEVER = (1 << 64) - 1  # more than anybody counts
_PATIENCE = 3.0  # seconds beyond the planned ones
_PAGE, _LINE = 4096, 64
_NODES, _SLOTS = 1 + 64 + 4096, 1 << 18  # of the page cache for the pages of 1 GiB
_MAPPED = 16 << 20  # bytes of the mappings that are faulted and zapped
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_MEMBARRIER = {"x86_64": 324}  # elsewhere the generic number
_MEMBARRIER_GENERIC = 283
_MEMBARRIER_GLOBAL = 1


class NotMeasuredError(Exception):
    """This machine or kernel does not let it be measured; the text says why."""


@dataclass(frozen=True)
class Measurement:
    """One quantity: quartiles over the repetitions, nanoseconds; or `problem`, why there are none."""

    key: str
    low: float = 0.0
    median: float = 0.0
    high: float = 0.0
    repetitions: int = 0
    problem: str = ""

    @property
    def what(self) -> str:
        """What was measured, in words."""
        return WHAT[self.key]

    def __str__(self) -> str:
        return f"{self.what} {duration(self.low)} to {duration(self.high)}"

    @classmethod
    def of(cls, key: str, samples: list[float]) -> Measurement:
        """The quartiles of samples in nanoseconds."""
        low, median, high = (float(value) for value in np.percentile(samples, (25, 50, 75)))
        return cls(key, low, median, high, len(samples))


def duration(nanoseconds: float) -> str:
    """Three digits and a unit: "7.96 ms", "120 ns"."""
    size = abs(nanoseconds)
    unit, factor = ("ms", 1e6) if size >= 999_500 else ("us", 1e3) if size >= 999.5 else ("ns", 1.0)
    return f"{nanoseconds / factor:.3g} {unit}"


def measure(seconds: float, progress: Callable[[str], None] = lambda _: None) -> dict[str, Measurement]:
    """Measure everything in WHAT, about `seconds` in all beside setting up; each at least five times.

    :param progress: called with the words of what comes next
    :raises MemoryError: no 64 MiB to measure in
    """
    progress("compiling the loops")
    bench = _Bench()
    found = {}
    for key, what in WHAT.items():
        progress(what)
        try:
            with getattr(bench, key)() as sampler:
                found[key] = Measurement.of(key, _repeat(sampler, seconds / len(WHAT)))
        except (NotMeasuredError, OSError) as error:
            found[key] = Measurement(key, problem=str(getattr(error, "strerror", None) or error))
    return found


def _repeat(sampler: Sampler, seconds: float) -> list[float]:
    sampler()  # the first run meets cold code and pages
    end = time.monotonic() + seconds
    samples: list[float] = []
    while len(samples) < _FEWEST or (time.monotonic() < end and len(samples) < _MOST):
        sample = sampler()
        if not isnan(sample):
            samples.append(sample)
        elif time.monotonic() > end + _PATIENCE:
            raise NotMeasuredError("other programs keep the CPUs busy")
    return samples


def _timed(call: Callable[[], Any], units: int) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / units


def last_level_cache() -> int:
    """Bytes of the first CPU's largest cache; 32 MiB where the kernel does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(sizes) or 32 << 20


def footprint() -> int:
    """Bytes to measure cold memory in: eight times the last-level cache, 64 MiB to 1 GiB, a quarter of what is free."""
    wanted = min(max(8 * last_level_cache(), 64 << 20), 1 << 30)
    free = wanted
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    return max(min(wanted, free // 4), 64 << 20) & -(1 << 21)


class _Bench:
    """The memory that is measured in, and one method per key of WHAT: a context that gives a sampler."""

    def __init__(self) -> None:
        self.loops = compile_loops()
        self.size = footprint()
        self.random = np.random.default_rng(1)
        try:
            area = mmap.mmap(-1, self.size)
        except OSError as error:
            raise MemoryError(f"{self.size >> 20} MiB to measure in: {error.strerror}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # the kernel's own mapping of memory has huge pages
            area.madvise(mmap.MADV_HUGEPAGE)
        self.memory: Array = np.frombuffer(area, np.uint64)
        self.memory[:: _PAGE // 8] = 1
        self.pages = self.random.permutation(self.size // _PAGE).astype(np.uint64)

    @cached_property
    def lines(self) -> Array:
        """uint64[size / 64]: every line once, in random order."""
        return self.random.permutation(self.size // _LINE).astype(np.uint64)

    def _pieces(self, order: Array, length: int) -> Iterator[Array]:
        """Pieces of an order, round and round."""
        while True:
            yield from (order[i : i + length] for i in range(0, len(order) - length + 1, length))

    # ------------------------------------------------------------------ memory

    @contextmanager
    def zero_hot(self) -> Iterator[Sampler]:
        pages = np.tile(np.arange(16, dtype=np.uint64), 64)
        yield lambda: _timed(lambda: self.loops.zero_pages(self.memory, pages), len(pages))

    @contextmanager
    def zero_cold(self) -> Iterator[Sampler]:
        pieces = self._pieces(self.pages, 1024)

        def sample() -> float:
            pages = next(pieces)
            return _timed(lambda: self.loops.zero_pages(self.memory, pages), len(pages))

        yield sample

    @contextmanager
    def copy_hot(self) -> Iterator[Sampler]:
        sources = np.tile(np.arange(16, dtype=np.uint64), 64)
        targets = sources + np.uint64(16)
        yield lambda: _timed(lambda: self.loops.copy_pages(self.memory, sources, targets), len(targets))

    @contextmanager
    def copy_cold(self) -> Iterator[Sampler]:
        half = len(self.pages) // 2
        sources, targets = self._pieces(self.pages[:half], 1024), self._pieces(self.pages[half:], 1024)

        def sample() -> float:
            pages = next(sources), next(targets)
            return _timed(lambda: self.loops.copy_pages(self.memory, *pages), 1024)

        yield sample

    @contextmanager
    def line_sequential(self) -> Iterator[Sampler]:
        lines = (8 << 20) // _LINE
        firsts = self._pieces(np.arange(self.size // _LINE), lines)

        def sample() -> float:
            first = int(next(firsts)[0])
            return _timed(lambda: self.loops.store_lines(self.memory, first, lines), lines)

        yield sample

    @contextmanager
    def line_random(self) -> Iterator[Sampler]:
        pieces = self._pieces(self.lines, 32768)

        def sample() -> float:
            order = next(pieces)
            return _timed(lambda: self.loops.store_lines_at(self.memory, order, np.uint64(3)), len(order))

        yield sample

    @contextmanager
    def miss(self) -> Iterator[Sampler]:
        words = self.lines * np.uint64(8)
        self.memory[words] = np.roll(words, -1)  # one cycle through all lines
        at = words[0]

        def sample() -> float:
            nonlocal at
            began = time.perf_counter_ns()
            at = np.uint64(self.loops.chase(self.memory, at, 16384))
            return (time.perf_counter_ns() - began) / 16384

        yield sample

    @contextmanager
    def atomic(self) -> Iterator[Sampler]:
        yield lambda: _timed(lambda: self.loops.add(self.memory, 100_000), 100_000)

    @contextmanager
    def slot_hot(self) -> Iterator[Sampler]:
        yield self._slots(np.arange(_SLOTS, dtype=np.uint64), 1)

    @contextmanager
    def slot_cold(self) -> Iterator[Sampler]:
        trees = len(self.memory) // (_NODES * NODE_WORDS)
        yield self._slots(self.random.permutation(_SLOTS).astype(np.uint64), trees)

    def _slots(self, indices: Array, count: int) -> Sampler:
        """Entries stored, and the next time removed, in trees as the page cache keeps for the pages of 1 GiB."""
        size = _NODES * NODE_WORDS
        trees = [self.memory[i * size : (i + 1) * size] for i in range(count)]
        for tree in trees:
            tree[:] = 0
            link_nodes(tree)
        stores = ((tree, np.uint64(value)) for value in cycle((1, 0)) for tree in trees)

        def sample() -> float:
            tree, value = next(stores)
            return _timed(lambda: self.loops.store_slots(tree, indices, value), len(indices))

        return sample

    # ------------------------------------------------------------------ system calls

    @contextmanager
    def system_call(self) -> Iterator[Sampler]:
        yield lambda: _timed(lambda: self.loops.get_parent(4096), 4096)

    @contextmanager
    def system_call_mm(self) -> Iterator[Sampler]:
        with _mapping(-1, 2 * _PAGE) as (_, view):
            address = view.ctypes.data
            yield lambda: _timed(lambda: self.loops.advise(address, 2048), 2048)

    @contextmanager
    def populate(self) -> Iterator[Sampler]:
        with _mapping(-1) as (area, _):

            def sample() -> float:
                area.madvise(mmap.MADV_DONTNEED)
                return _timed(lambda: area.madvise(_POPULATE_WRITE), _MAPPED // _PAGE)

            yield sample

    @contextmanager
    def touch(self) -> Iterator[Sampler]:
        with _mapping(-1) as (area, view):

            def sample() -> float:
                area.madvise(mmap.MADV_DONTNEED)
                return _timed(lambda: _touch(view), _MAPPED // _PAGE)

            yield sample

    @contextmanager
    def zap_anonymous(self) -> Iterator[Sampler]:
        with _mapping(-1) as (area, view):
            yield lambda: _zap(area, view)

    @contextmanager
    def refault(self) -> Iterator[Sampler]:
        with _memfd() as file, _mapping(file) as (area, view):

            def sample() -> float:
                area.madvise(mmap.MADV_DONTNEED)
                return _timed(lambda: _touch(view), _MAPPED // _PAGE)

            yield sample

    @contextmanager
    def zap_memfd(self) -> Iterator[Sampler]:
        with _memfd() as file, _mapping(file) as (area, view):
            yield lambda: _zap(area, view)

    @contextmanager
    def shootdown(self) -> Iterator[Sampler]:
        """What mprotect takes longer while a thread of this process runs on another CPU; negative where it does not."""
        with self._mprotect(2) as (run, others):

            def sample() -> float:
                return run(others[:1]) - run([])

            yield sample

    @contextmanager
    def shootdown_more(self) -> Iterator[Sampler]:
        """The same with threads on as many CPUs as there are, less with one, by CPU."""
        with self._mprotect(3) as (run, others):

            def sample() -> float:
                return (run(others) - run(others[:1])) / (len(others) - 1)

            yield sample

    @contextmanager
    def _mprotect(self, cpus: int) -> Iterator[tuple[Callable[[list[int]], float], list[int]]]:
        """A function that times mprotect while threads run on the CPUs it is given, and CPUs to give it."""
        before = os.sched_getaffinity(0)
        if len(before) < cpus:
            raise NotMeasuredError(f"needs {cpus} CPUs, this process may use {len(before)}")
        here, *others = sorted(before)[:_MOST_THREADS]
        with _mapping(-1, 2 * _PAGE) as (_, view):
            words, address = view[:_PAGE].view(np.uint64), view.ctypes.data
            fastest = 0.0

            def run(others: list[int]) -> float:
                """Nanoseconds per mprotect, the median of short runs; nan if other programs had those CPUs."""
                nonlocal fastest
                found = []
                with self._counting(others) as counted:
                    for _ in range(25):
                        start = counted.copy()
                        took = _timed(lambda: self.loops.protect(words, address, 32), 32)
                        found.append((took, float((counted - start).min(initial=_NEVER)) / took))
                fastest = max(fastest, *(rate for _, rate in found)) if others else fastest
                kept = sorted(took for took, rate in found if rate > 0.75 * fastest or not others)
                return kept[len(kept) // 2] if kept else nan

            os.sched_setaffinity(0, {here})
            try:
                yield run, others
            finally:
                os.sched_setaffinity(0, before)

    @contextmanager
    def _counting(self, cpus: list[int]) -> Iterator[Array]:
        """A thread on each CPU, counting; uint64[len(cpus)]: how far each is."""
        flags = np.zeros(8 * (len(cpus) + 1), np.uint64)  # a line for each, the first to stop them
        counted = flags[8::8]

        def spin(number: int) -> None:
            with suppress(OSError):  # the CPU went away: the thread ends
                os.sched_setaffinity(0, {cpus[number]})  # of this thread
                self.loops.spin(flags, 8 * (number + 1))

        threads = [threading.Thread(target=spin, args=(number,), daemon=True) for number in range(len(cpus))]
        try:
            for thread in threads:
                thread.start()
            while not counted.all():
                if not all(thread.is_alive() for thread in threads):
                    raise NotMeasuredError("no thread can be put on another CPU")
                time.sleep(0)
            yield counted
        finally:
            flags[0] = 1
            for thread in threads:
                thread.join()

    @contextmanager
    def grace_period(self) -> Iterator[Sampler]:
        """MEMBARRIER_CMD_GLOBAL is synchronize_rcu(), asked for at random moments between two ticks."""
        libc = ctypes.CDLL(None, use_errno=True)
        number = _MEMBARRIER.get(os.uname().machine, _MEMBARRIER_GENERIC)
        delays = random.Random(1)

        def sample() -> float:
            end = time.perf_counter() + delays.random() * 0.010
            while time.perf_counter() < end:
                pass
            began = time.perf_counter_ns()
            if libc.syscall(number, _MEMBARRIER_GLOBAL, 0, 0):
                raise NotMeasuredError(f"membarrier: {os.strerror(ctypes.get_errno())}")
            took = time.perf_counter_ns() - began
            if took < 10_000:
                raise NotMeasuredError("membarrier waits for no grace period here")
            return float(took)

        yield sample


# --------------------------------------------------------------------------- mappings


@contextmanager
def _memfd() -> Iterator[int]:
    file = os.memfd_create("pgemu")
    try:
        os.ftruncate(file, _MAPPED)
        yield file
    finally:
        os.close(file)


@contextmanager
def _mapping(file: int, size: int = _MAPPED) -> Iterator[tuple[mmap.mmap, Array]]:
    """Memory mapped in 4K pages, private without a file, and its bytes."""
    area = mmap.mmap(file, size, flags=mmap.MAP_SHARED if file >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    yield area, np.frombuffer(area, np.uint8)


def _touch(view: Array) -> None:
    view[::_PAGE] = 1


def _zap(area: mmap.mmap, view: Array) -> float:
    _touch(view)
    return _timed(lambda: area.madvise(mmap.MADV_DONTNEED), _MAPPED // _PAGE)
