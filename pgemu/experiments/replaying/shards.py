"""Which records of a trace need not wait for each other: those of VMs, processes and inodes that no record joins.

Each shard runs on a machine of its own that has everything the trace's machine has, so that numbers stay what they are;
frames differ, outcomes do not. Machines of one host would share its pool of huge pages, its page allocator and the
kernel's tables of objects. What asks any of these for something on its own account is not divided (joining()), and of
what is left it is proved afterwards that shards could not have been short of anything together (short()): else the
trace runs again, on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.experiments.replaying.opened import OpenTrace, columns_meaning
from pgemu.machine.results import operation_name
from pgemu.machine.statistics import Statistics
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import Entry, Operation

if TYPE_CHECKING:
    from pgemu.experiments.compare import Finding
    from pgemu.experiments.replaying.run import Replayed
    from pgemu.machine.config import Config
    from pgemu.machine.findings import BrokenRule

__all__ = ("Chosen", "Plan", "added", "found_together", "joining", "plan", "short")

Array = np.ndarray[Any, Any]
_KINDS: Mapping[str, int] = {"VM": W.VMS, "process": W.SPACES, "inode": W.INODES, "pin": W.PINS}
"""Numbers that records name, and how many of each there can be; the first that a record names tells its shard."""
_NAMES = list(_KINDS)
_FIRST = np.cumsum([0, *_KINDS.values()])  # where the nodes of each kind begin

# Operations on what all of a machine's objects share: pools, devices, per-CPU batches, work, poison, numbers of
# processes, policies of tasks.
_OF_ALL = frozenset(
    {op for op in Operation if op.entry in (Entry.POOLING, Entry.DEVICES)}
    | {
        Operation.WORK, Operation.LRU_DRAIN, Operation.MEMORY_FAILURE, Operation.UNPOISON, Operation.INJECT,
        Operation.FORK, Operation.MEMORY_POLICY, Operation.COLLAPSE, Operation.ADVISE_HUGE,
    }
)  # fmt: skip

# What takes or returns the number of a frame: on another machine it is another one.
_OF_FRAMES = (Operation.GET, Operation.PUT, Operation.NESTED_MAP, Operation.NESTED_UNMAP)


def joining(trace: OpenTrace, config: Config) -> str:
    """Why a trace is not divided, or "": what asks the host's pools for something on its own account."""
    counts = trace.survey.counts
    found = [operation_name(op) for op in sorted(_OF_ALL) if counts[op]]
    if found:
        return f"{', '.join(found[:3])}: of all VMs and processes"
    if named := [operation_name(op) for op in _OF_FRAMES if counts[op]]:
        return f"{', '.join(named)}: by numbers of frames, which are a machine's own"
    if trace.survey.anonymous:
        return "anonymous memory comes from the host's page allocator"
    for name, on in (("lru_cache", config.lru_cache), ("nodes", config.nodes > 1), ("frames", config.frames)):
        if on:
            return f"{name} {getattr(config, name)}: VMs share it"
    return ""


@dataclass(frozen=True)
class Plan:
    """Which shard each number belongs to.

    Attributes:
        shards: int64[nodes], by node: kinds of _KINDS behind one another
        counts: records of each shard
    """

    shards: Array
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """Which records of a batch are one shard's: run.Run.chosen."""

    plan: Plan
    shard: int

    def __call__(self, records: Records) -> Array:
        """bool[n]."""
        columns = {name: getattr(records, name) for name in ("op", *_COLUMNS)}
        mine: Array = self.plan.shards[nodes_of(columns)] == self.shard
        return mine


# --------------------------------------------------------------------------- what a record names


def _columns() -> dict[str, Array]:
    """By kind, int8[256]: the column in which an operation has a number of it, as an index of _COLUMNS; -1: in none."""
    found = {}
    for kind in _NAMES:
        table = np.full(256, -1, np.int8)
        for column, operations in columns_meaning(kind).items():
            table[[int(op) for op in operations]] = _COLUMNS.index(column)
        found[kind] = table
    return found


_COLUMNS = ("vm", "space", "object")
_OF_KIND = _columns()


def _numbers(columns: Mapping[str, Array], kind: str) -> tuple[Array, Array]:
    """bool[n], int64[n]: whether a record names one of the kind, and which."""
    at = _OF_KIND[kind][columns["op"]]
    number = np.zeros(at.size, np.int64)
    for index, column in enumerate(_COLUMNS):
        here = at == index
        if here.any():
            number[here] = columns[column][here]
    return (at >= 0) & (number < _KINDS[kind]), number


def nodes_of(columns: Mapping[str, Array]) -> Array:
    """int64[n]: the node that tells a record's shard; of what names nothing the first VM."""
    node = np.zeros(columns["op"].size, np.int64)
    known = np.zeros(node.size, bool)
    for first, kind in zip(_FIRST.tolist(), _NAMES, strict=False):
        named, number = _numbers(columns, kind)
        fresh = named & ~known
        node[fresh] = number[fresh] + first
        known |= named
    return node


class _Sets:
    """Nodes that were joined."""

    def __init__(self, count: int) -> None:
        self.above = list(range(count))

    def root(self, node: int) -> int:
        while self.above[node] != node:
            self.above[node] = self.above[self.above[node]]
            node = self.above[node]
        return node

    def join(self, one: int, other: int) -> None:
        self.above[self.root(one)] = self.root(other)


def _pairs(columns: Mapping[str, Array]) -> Iterator[Array]:
    """int64[m, 2]: nodes that the same records name."""
    named = [_numbers(columns, kind) for kind in _NAMES]
    for i in range(len(_NAMES)):
        for j in range(i + 1, len(_NAMES)):
            both = named[i][0] & named[j][0]
            if both.any():
                keys = np.unique((named[i][1][both] << 16) | named[j][1][both])
                yield np.stack([(keys >> 16) + _FIRST[i], (keys & 0xFFFF) + _FIRST[j]], axis=1)


def plan(pieces: Iterable[Mapping[str, Array]], jobs: int) -> Plan | None:
    """Divide a trace among so many shards at most, of about as many records each; None where all of it is joined.

    :param pieces: columns op, vm, space and object of the records
    """
    sets = _Sets(int(_FIRST[-1]))
    for number in range(min(W.VMS, W.SPACES)):  # VM i is of process i
        sets.join(number, int(_FIRST[1]) + number)
    counts = np.zeros(int(_FIRST[-1]), np.int64)
    for columns in pieces:
        counts += np.bincount(nodes_of(columns), minlength=counts.size)
        for pairs in _pairs(columns):
            for one, other in pairs.tolist():
                sets.join(one, other)
    roots = np.array([sets.root(node) for node in range(counts.size)])
    sizes = np.bincount(roots, weights=counts, minlength=counts.size).astype(np.int64)
    found = np.flatnonzero(sizes)
    if found.size < 2 or jobs < 2:
        return None
    full = [0] * min(jobs, found.size)
    shards = np.zeros(counts.size, np.int64)
    for root in found[np.argsort(-sizes[found], kind="stable")].tolist():
        shard = full.index(min(full))
        full[shard] += int(sizes[root])
        shards[roots == root] = shard
    return Plan(shards, tuple(full))


# --------------------------------------------------------------------------- what they came to


def short(runs: Iterable[Replayed]) -> str:
    """What the shards' machines could have been short of, had they been one, or "".

    On one machine no more can be in use at any time than the most that each shard ever had in use, taken together: what
    that leaves room for, none of them can take from another.
    """
    found = list(runs)
    for name in found[0].used:
        most = sum(run.used[name][0] for run in found)
        if most > found[0].used[name][1]:
            return f"{name}: {most:,} of {found[0].used[name][1]:,}"
    if any(run.statistics.peak(Gauge.BLOCKS_ZOMBIE) for run in found):
        return "huge pages that references keep from the pool"
    shortage = {-W.ENOMEM, -W.ENOSPC}
    for run in found:
        for op in Operation:
            outcomes = set(run.statistics.results(op))
            if outcomes & shortage or (op is Operation.HOST_FAULT and W.VM_FAULT_OOM in outcomes):
                return f"{operation_name(op)} that found no memory"
    return ""


def found_together(runs: Iterable[Replayed], records: int) -> Finding | None:
    """Rules that any of the machines found broken: how often on all of them; the first one is of any of them."""
    found = [run.finding for run in runs if run.finding]
    if not found:
        return None
    rules: dict[Any, BrokenRule] = {}
    for rule in (rule for one in found for rule in one.rules):
        known = rules.get(rule.rule)
        rules[rule.rule] = replace(rule, count=rule.count + known.count, index=known.index) if known else rule
    first = min(found, key=lambda one: (one.rule, one.index))
    return replace(first, count=sum(one.count for one in found), after=records, rules=tuple(rules.values()))


def added(booted: Statistics, runs: Iterable[Statistics]) -> Statistics:
    """What machines that began alike counted together: sums; of the worst operation of a kind the worst."""
    words = booted.words.copy()
    worst = slice(int(W.STATS_WORST), int(W.STATS_SIZE))
    most = words[worst].reshape(-1, 4).copy()
    for run in runs:
        words += run.words - booted.words
        other = run.words[worst].reshape(-1, 4)
        larger = other[:, 1] > most[:, 1]
        most[larger] = other[larger]
    words[worst] = most.reshape(-1)
    return Statistics(words)
