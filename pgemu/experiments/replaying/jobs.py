"""Runs of a replay, each by what can be sent to another process: here, in processes, or on a cluster of Dask."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pgemu.errors import InputError
from pgemu.experiments.configuration import configuration
from pgemu.experiments.replaying.opened import OpenTrace, Stage, open_trace
from pgemu.experiments.replaying.outcomes import OutcomeFile, merged, read_rows
from pgemu.experiments.replaying.run import Every, Replayed, Run, replay
from pgemu.experiments.replaying.shards import Chosen, Plan, added, found_together, joining, plan, short
from pgemu.experiments.replaying.workers import run_all

if TYPE_CHECKING:
    from pgemu.experiments.compare import Check
    from pgemu.machine.designs import Design
    from pgemu.machine.presets import Versions
    from pgemu.trace.lowered import LoweringOptions

__all__ = ("Job", "on_cluster", "run_all", "run_alone", "run_job")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """One run: a trace on one design's machine.

    Attributes:
        trace: as pgemu.load() takes it
        out: the file of outcomes
        lowering, seed, parameters, input_format: how the trace is read or made
        design, versions, fields: of the machine; fields of Config that are None are as without them
        strict, check, checkpoint, every, resume, max_memory: see run.Run
        stages: see run.Run; of a run in another process what can be sent there
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
    stages: tuple[Stage, ...] = ()
    shards: int = 1
    label: str = ""
    input_format: str | None = None


def run_job(
    job: Job,
    progress: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Do a run, in this process or, of several shards, in as many. See run.replay()."""
    trace, run = _opened(job)
    if job.shards < 2:
        return replay(trace, run, job.out, progress, stopped)
    if job.checkpoint is not None:
        raise InputError("--checkpoint: expected --jobs 1, for a checkpoint is of one machine")
    why = "which records there will be, stages say" if job.stages else joining(trace, run.config)
    found = None if why else plan(trace.columns(), job.shards)
    if found is not None:
        replayed = _sharded(job, trace, run, found, progress, stopped)
        if isinstance(replayed, Replayed):
            return replayed
        why = f"machines of their own could have been short of the same: {replayed}"
    why = f"--jobs {job.shards}: on one machine, {why or 'for records join all of its VMs, processes and inodes'}"
    return replace(replay(trace, run, job.out, progress, stopped), instead=why)


def _opened(job: Job) -> tuple[OpenTrace, Run]:
    trace = open_trace(job.trace, job.lowering, job.seed, job.parameters, job.input_format)
    given = {name: value for name, value in job.fields.items() if value is not None}
    config = configuration(trace.lowered, job.design, job.versions, given, trace.survey.named.inodes)
    run = Run(
        config, job.versions, job.strict, job.check, job.stages, job.checkpoint, job.every, job.resume, job.max_memory
    )  # fmt: skip
    return trace, run


# --------------------------------------------------------------------------- one trace on several machines


@dataclass(frozen=True)
class _Shard:
    """A shard, for a process."""

    trace: OpenTrace
    run: Run
    out: str


def _run_shard(shard: _Shard, stopped: Callable[[], bool]) -> Replayed:
    return replay(shard.trace, shard.run, shard.out, None, stopped)


def _sharded(
    job: Job, trace: OpenTrace, run: Run, found: Plan, progress: Callable[[int, int], None] | None,
    stopped: Callable[[], bool],
) -> Replayed | str:  # fmt: skip
    """Run the shards, and merge what they returned; or why that is not what one machine would have returned."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".pgemu-", dir=os.path.dirname(os.path.realpath(job.out))) as folder:
        lowered = replace(trace.lowered, again=None)  # which cannot be sent
        shards = [
            _Shard(
                replace(trace, lowered=lowered, count=count),
                replace(run, chosen=Chosen(found, number), numbers=True),
                os.path.join(folder, f"{number}.parquet"),
            )
            for number, count in enumerate(found.counts)
        ]
        done: dict[int, Replayed] = {}
        for number, result in run_all(_run_shard, shards, len(shards), stopped):
            if isinstance(result, InputError):
                raise result
            done[number] = result
            if progress:
                progress(sum(one.records for one in done.values()), trace.count)
        if len(done) < len(shards):
            raise KeyboardInterrupt
        runs = [done[number] for number in range(len(shards))]
        if why := short(runs):
            return why
        ended = all(one.complete for one in runs)
        records = trace.count if ended else min(one.position for one in runs if not one.complete)
        replayed = replace(
            runs[0], records=records, total=trace.count, complete=ended,
            statistics=added(runs[0].booted, [one.statistics for one in runs]),
            finding=found_together(runs, records),
            seconds=time.perf_counter() - began, shards=len(runs), identity=trace.identity,
        )  # fmt: skip
        with OutcomeFile(job.out) as file:
            for rows in merged((read_rows(shard.out) for shard in shards), records):
                file.add(rows)
            file.finish(replayed.about())
    return replayed


# --------------------------------------------------------------------------- side by side


def run_alone(job: Job, stopped: Callable[[], bool] = lambda: False) -> Replayed:
    """run_job() in a process that shows no progress."""
    return run_job(job, None, stopped)


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
