"""Runs a trace on one machine, record by record, and writes what each returned."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu.errors import InputError
from pgemu.experiments.compare import Check, Finding, OperationRun
from pgemu.experiments.devices import arranged, has_devices
from pgemu.experiments.replaying.checkpoints import Checkpoint
from pgemu.experiments.replaying.opened import OpenTrace, Stage
from pgemu.experiments.replaying.outcomes import OutcomeFile, Rows, RowsFile
from pgemu.experiments.replaying.threads import Ahead, Behind
from pgemu.experiments.setting_up import Pace, boot, fill, refused
from pgemu.trace.schema import ACTOR_LIMIT, Operation, Records, once
from pgemu.version import version
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.machine.presets import Versions
    from pgemu.machine.statistics import Statistics
    from pgemu.objects.machine import Machine

__all__ = ("Every", "Replayed", "Run", "replay", "resident")

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]
_LOOKED_AT = 1024  # records after which is looked whether any was found to break a rule, where each is checked


class Every(NamedTuple):
    """When a checkpoint is written: after so many records, or so many seconds; 0: not by that."""

    records: int = 0
    seconds: float = 60.0


@dataclass(frozen=True)
class Run:
    """How a trace is replayed.

    Attributes:
        config: of the machine
        versions: of the designs
        strict: what the version refuses stays refused
        check: when the machine is recounted; see compare()
        stages: what batches of records go through between decoding and running, in this order
        checkpoint: file to go on from, None for none
        every: when it is written
        resume: go on from `checkpoint`, where there is one
        max_memory: bytes that the process may have in memory, None for any number
        chosen: bool[n] of a batch's records: which of them run, the others are another process's; None: all
        numbers: write rows as numbers (outcomes.RowsFile), to be merged with those of others
    """

    config: Config
    versions: Versions
    strict: bool = False
    check: Check = "end"
    stages: tuple[Stage, ...] = ()
    checkpoint: str | None = None
    every: Every = field(default_factory=Every)
    resume: bool = False
    max_memory: int | None = None
    chosen: Callable[[Records], Array] | None = None
    numbers: bool = False


@dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    Attributes:
        source, identity: the trace's name and digest
        config: of the machine
        records: how many have run
        total: how many there are
        complete: whether all have run
        statistics: of the machine, as it was booted and after the last record
        finding: a rule of the machine that was found broken
        seconds: that it took here, without what was done before a checkpoint
        resumed: records that had run before a checkpoint from which this one went on
        refusal: why nothing has run; "" where it has
        notes: of the trace
        missing: what of the trace is in no record, by name
        used: by name, the most that was ever in use and how many there can be, of what all objects of a machine share
        position: number of the first record that has not run
        shards: on how many machines
        instead: why not on several, where that was asked for
    """

    source: str
    identity: str
    config: Config
    records: int
    total: int
    complete: bool
    booted: Statistics
    statistics: Statistics
    finding: Finding | None = None
    seconds: float = 0.0
    resumed: int = 0
    refusal: str = ""
    notes: tuple[str, ...] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    position: int = 0
    shards: int = 1
    instead: str = ""

    @property
    def operations(self) -> tuple[OperationRun, ...]:
        """What each kind of operation did."""
        found = (OperationRun.of(self.statistics, op) for op in Operation)
        return tuple(run for run in found if run)

    @property
    def broken(self) -> bool:
        """Whether a rule was found broken that no defect of the machine explains."""
        return self.finding is not None and not self.finding.explained

    def about(self) -> dict[str, Any]:
        """What the file of outcomes says of itself."""
        return {
            "pgemu": version(),
            "trace": os.path.basename(self.source),
            "identity": self.identity,
            "complete": self.complete,
            "machine": asdict(self.config),
        }


@dataclass(frozen=True, slots=True)
class _Batch:
    """Records as the machine takes them, and their numbers."""

    index: Array
    op: Array
    columns: tuple[Array, ...]


def replay(
    trace: OpenTrace,
    run: Run,
    out: str | os.PathLike[str],
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Run a trace on a fresh machine, or from a checkpoint on, and write what each record returned.

    :param out: the file of outcomes, which appears whole or not at all; of a run that was stopped it is of the records
        that have run
    :param progress: called with how many records have run, and all of them
    :param stopped: asked now and then; once it is true the run ends where it is, and a checkpoint is written
    :raises InputError: as open_trace and pgemu.compare; a checkpoint of something else; memory beyond max_memory
    """
    lowered = trace.lowered
    if has_devices(lowered):
        trace = trace.with_records(arranged(lowered, run.config)[0])
    return _Replay(trace, run, os.fspath(out), progress or (lambda *_: None), stopped).run()


class _Replay:
    """A run under way."""

    def __init__(
        self, trace: OpenTrace, run: Run, out: str, progress: Progress, stopped: Callable[[], bool]
    ) -> None:  # fmt: skip
        self.trace, self.how, self.out, self.progress, self.stopped = trace, run, out, progress, stopped
        self.checkpoint = Checkpoint(run.checkpoint) if run.checkpoint is not None else None
        self.first = self.done = 0
        self.ended = False
        self.position = 0
        self.found_after: int | None = None
        self.finding: Finding | None = None
        self.pace = Pace()
        self.memory = _Memory(run.max_memory)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint has to be of."""
        how = self.how
        found = {
            "trace": self.trace.identity, "records": self.trace.count, "machine": asdict(how.config),
            "strict": how.strict, "check": how.check, "stages": len(how.stages),
        }  # fmt: skip
        told: dict[str, Any] = json.loads(json.dumps(found))  # as a checkpoint tells it
        return told

    def _machine(self) -> tuple[Machine, Statistics, str]:
        """The machine, what it had counted before the first record, and why nothing runs."""
        from pgemu.machine.statistics import Statistics

        checkpoint, how, lowered = self.checkpoint, self.how, self.trace.lowered
        if checkpoint and how.resume and checkpoint.exists():
            machine, kept = checkpoint.resume(self.identity())
            self.first = self.done = self.position = int(kept["position"])
            self.found_after = kept["found_after"]
            return machine, Statistics(np.array(kept["booted"], np.int64)), ""
        if checkpoint and checkpoint.exists():
            what = "a checkpoint is there: expected --resume to go on from it, another name, or no such file"
            raise InputError(what, how.checkpoint)
        named = self.trace.survey.named
        machine = boot(lowered, how.config, named)
        if how.strict and (why := refused(lowered, how.config, how.versions)):
            return machine, machine.statistics, why
        if checkpoint:
            checkpoint.begin()
        if lowered.kind == "guest":
            fill(machine, lowered, named.inodes)
        booted = machine.statistics
        if how.check == "every":
            machine.check_each()
        return machine, booted, ""

    def run(self) -> Replayed:
        """Do all of it."""
        trace = self.trace
        machine, booted, refusal = self._machine()
        began = time.perf_counter()
        with ExitStack() as stack:
            file: OutcomeFile | RowsFile | None = None
            if self.checkpoint:
                stack.callback(self.checkpoint.drop)
            else:
                file = stack.enter_context(self._file())
            if not refusal:
                self._all(machine, booted, file.add if file else self._kept().add)
            total = self.done if self.ended else trace.count
            replayed = Replayed(
                trace.lowered.source, trace.identity, machine.config, self.done, total, self.ended, booted,
                machine.statistics, self.finding, time.perf_counter() - began, self.first, refusal,
                trace.lowered.notes, dict(trace.lowered.accounting.missing()), _used(machine), self.position,
            )  # fmt: skip
            if file is None:
                file = stack.enter_context(self._file())
                for rows in self._kept().rows():
                    file.add(rows)
            file.finish(replayed.about())
        if self.checkpoint and (self.ended or refusal):
            self.checkpoint.remove()
        return replayed

    def _kept(self) -> Checkpoint:
        assert self.checkpoint
        return self.checkpoint

    def _file(self) -> AbstractContextManager[OutcomeFile | RowsFile]:
        return RowsFile(self.out) if self.how.numbers else OutcomeFile(self.out)

    def _all(self, machine: Machine, booted: Statistics, take: Callable[[Rows], None]) -> None:
        """Run the records that are left, and recount the machine."""
        how = self.how
        self.memory.check(self.done, at_once=True)
        last, saved = self.done, time.monotonic()
        with Ahead(_prepared(self.trace, self.first, how)) as batches, Behind(take) as behind:
            for batch in batches:
                for _ in self._pieces(machine, batch, behind):
                    self.memory.check(self.done)
                    self.progress(self.done, self.trace.count)
                    records = how.every.records and self.done - last >= how.every.records
                    seconds = how.every.seconds and time.monotonic() - saved >= how.every.seconds
                    if self.checkpoint and (records or seconds):
                        self._save(machine, booted, behind)
                        last, saved = self.done, time.monotonic()
                    if self.stopped():
                        break
                else:
                    continue
                break
            else:
                self.ended = True
            behind.wait()
            if self.checkpoint and not self.ended:
                self._save(machine, booted, behind)
        if self.ended:  # else whoever stopped it waits
            machine.check()
            self._look(machine)

    def _save(self, machine: Machine, booted: Statistics, behind: Behind[Rows]) -> None:
        assert self.checkpoint
        behind.wait()
        position = {"position": self.done, "booted": booted.words.tolist(), "found_after": self.found_after}
        try:
            self.checkpoint.save(machine, self.identity(), **position)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror or error}", self.how.checkpoint) from None

    def _pieces(self, machine: Machine, batch: _Batch, behind: Behind[Rows]) -> Iterator[None]:
        """Run a batch, piece by piece."""
        check, begin, count = self.how.check, 0, len(batch.op)
        # Where it is looked for broken rules does not depend on the pace, for it is said where they were found.
        unit = check if isinstance(check, int) else _LOOKED_AT
        while begin < count:
            end = min(begin + self.pace.piece, count)
            if check != "end":
                end = min(end, begin + unit - self.done % unit)
            began = time.perf_counter()
            pieces = (column[begin:end] if column.size == count else column for column in batch.columns)
            results = machine.run_columns(*pieces, count=end - begin)
            self.done += end - begin
            if check != "end" and self.done % unit == 0:
                if check != "every":
                    machine.check()
                self._look(machine)
            self.pace.took(end - begin, time.perf_counter() - began)
            self.position = int(batch.index[end - 1]) + 1
            behind.put(Rows(batch.index[begin:end], batch.op[begin:end], results.status, results.detail))
            begin = end
            yield

    def _look(self, machine: Machine) -> None:
        """Note the first rule that is found broken."""
        count, rule, index = machine.broken
        if count:
            self.found_after = self.done if self.found_after is None else self.found_after
            self.finding = Finding(count, rule.name, index, self.found_after, machine.findings)


def _prepared(trace: OpenTrace, first: int, how: Run) -> Iterator[_Batch]:
    """Batches as the machine takes them."""
    at = first
    for batch in trace.batches(first, how.stages):
        records = batch
        index = np.arange(at, at + len(records), dtype=np.uint64)
        at += len(records)
        if how.chosen is not None:
            mine = np.flatnonzero(how.chosen(records))
            records, index = records.take(mine), index[mine]
        actor = once(records.actor)
        if actor.size and int(actor.max()) >= ACTOR_LIMIT:
            raise InputError(f"actor {actor.max()}, expected less than {ACTOR_LIMIT}", trace.lowered.source)
        yield _Batch(index, np.ascontiguousarray(records.op), _columns(records))


def _columns(records: Records) -> tuple[Array, ...]:
    """What Core.run_columns takes of records, from header to length: where all of them have one value that alone."""
    alike = all(once(getattr(records, name)).size == 1 for name in ("op", "flags", "actor", "vm", "space"))
    rest = (np.array(once(getattr(records, name)), np.uint64) for name in ("object", "address", "offset", "length"))
    return ((records[:1] if alike else records).header(), *rest)


def _used(machine: Machine) -> dict[str, tuple[int, int]]:
    """What objects of a machine share: the most of it in use, and how much there is."""
    frames = machine.statistics.peak(Gauge.FRAMES_USED), machine.register(W.R_FRAMES_LIMIT)
    mappings = machine.register(W.R_VMAS), W.VMAS
    return {
        "frames": frames, "mappings": mappings, "memory slots": (machine.register(W.R_MEMSLOTS), int(W.MEMSLOTS))
    }  # fmt: skip


class _Memory:
    """What the process has in memory, and what it may have."""

    _EACH = 0.25  # seconds between two looks

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._looked = 0.0

    def check(self, done: int, at_once: bool = False) -> None:
        """InputError beyond the limit, if it is time to look."""
        now = time.monotonic()
        if self._most is None or (now - self._looked < self._EACH and not at_once):
            return
        self._looked = now
        if (used := resident()) > self._most:
            raise InputError(f"--max-memory {self._most >> 20}M: {used >> 20}M are in use after {done:,} records")


def resident() -> int:
    """Bytes that this process has in memory; 0 where the system does not tell. proc(5), statm"""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
