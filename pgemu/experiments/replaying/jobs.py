"""Runs of a replay, each by what can be sent to another process: here, in processes, or on a cluster of Dask."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pgemu.errors import InputError
from pgemu.experiments.configuration import configuration
from pgemu.experiments.replaying.opened import open_trace
from pgemu.experiments.replaying.run import Every, Replayed, Run, replay

if TYPE_CHECKING:
    from pgemu.experiments.compare import Check
    from pgemu.machine.designs import Design
    from pgemu.machine.presets import Versions
    from pgemu.trace.lowered import LoweringOptions

__all__ = ("Job", "on_cluster", "run_all", "run_job")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """One run: a trace on one design's machine.

    Attributes:
        trace: as pgemu.load() takes it
        out: the file of outcomes
        lowering, seed, parameters: how the trace is read or made
        design, versions, fields: of the machine; fields of Config that are None are as without them
        strict, check, checkpoint, every, resume, max_memory: see run.Run
        shards: on how many processes the run itself goes, where its records allow that
        label: what tells the run from others
    """

    trace: str
    out: str
    lowering: LoweringOptions
    design: Design
    versions: Versions
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parameters: Mapping[str, float] = field(default_factory=dict)
    strict: bool = False
    check: Check = "end"
    checkpoint: str | None = None
    every: Every = field(default_factory=Every)
    resume: bool = False
    max_memory: int | None = None
    shards: int = 1
    label: str = ""


def run_job(
    job: Job,
    progress: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Do a run, in this process or, of several shards, in as many. See run.replay()."""
    trace = open_trace(job.trace, job.lowering, job.seed, job.parameters)
    given = {name: value for name, value in job.fields.items() if value is not None}
    config = configuration(trace.lowered, job.design, job.versions, given, trace.survey.named.inodes)
    run = Run(
        config, job.versions, job.strict, job.check, (), job.checkpoint, job.every, job.resume, job.max_memory
    )  # fmt: skip
    return replay(trace, run, job.out, progress, stopped)


# --------------------------------------------------------------------------- side by side


def run_all(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], jobs: int, stopped: Callable[[], bool]
) -> Iterator[tuple[int, _Result | InputError]]:
    """Yield the number of each task and its result, or what it refused, as they come; `jobs` processes at a time.

    Once `stopped` says so no more begin. InputError if a process dies.
    """
    # A process that is forked would have the threads of this one, which do not run there.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        left = list(enumerate(tasks))
        running: dict[Any, int] = {}
        while left or running:
            while left and len(running) < jobs and not stopped():
                number, task = left.pop(0)
                running[pool.submit(function, task)] = number
            if not running:
                return
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                number = running.pop(future)
                try:
                    yield number, future.result()
                except InputError as error:
                    yield number, error
                except BrokenProcessPool:
                    what = "a process of the run ended before its time: out of memory, or killed"
                    raise InputError(what) from None


def on_cluster(
    scheduler: str, function: Callable[[_Task], _Result], tasks: Sequence[_Task]
) -> Iterator[tuple[int, _Result | InputError]]:
    """The same on the workers of a Dask scheduler, which see the same files under the same names.

    :raises InputError: dask[distributed] is not installed, or nobody answers there
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        what = "--scheduler: dask.distributed is not installed: pip install 'pgemu[cluster]'"
        raise InputError(what) from None
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"--scheduler {scheduler}: nobody answers ({' '.join(str(error).split())[:100]})") from None
    with client:
        numbers = {client.submit(function, task, pure=False): number for number, task in enumerate(tasks)}
        for future in as_completed(list(numbers)):
            try:
                yield numbers[future], future.result()
            except InputError as error:
                yield numbers[future], error
