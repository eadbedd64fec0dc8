"""One trace on several designs: run it, check the machines, and collect what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pgemu.errors import InputError
from pgemu.experiments.configuration import assumed, configuration
from pgemu.experiments.devices import DeviceRun, arranged
from pgemu.experiments.metrics import METRICS
from pgemu.experiments.setting_up import Pace, boot, fill, refused
from pgemu.experiments.worst import WorstOperation, explain, worst_operations
from pgemu.machine.designs import DESIGNS, Design
from pgemu.machine.field_rules import shown
from pgemu.machine.findings import BrokenRule
from pgemu.machine.presets import Versions
from pgemu.machine.results import operation_name, result_name
from pgemu.machine.short import counted
from pgemu.machine.statistics import Statistics
from pgemu.trace.lowered import Lowered
from pgemu.trace.required import require_one_vm
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_4K, Operation

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.machine import Machine

__all__ = (
    "DESIGNS",
    "Comparison",
    "DesignRun",
    "EndOfLife",
    "Finding",
    "OperationRun",
    "WithoutEffect",
    "compare",
    "configuration",
    "explained",
    "run",
)

Band = tuple[float, float]
Check = Literal["end", "every"] | int
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OperationRun:
    """What one kind of operation did on one design.

    Attributes:
        operation: the kind
        count: how many there were
        outcomes: how many returned what, by name, most frequent first
        total, mean, p50, p99, worst: estimated kernel time, (low, high) nanoseconds. Percentiles come from the mix
            of operations; but for a single operation they are upper edges of buckets, at most an eighth too high.
    """

    operation: Operation
    count: int
    outcomes: dict[str, int]
    total: Band
    mean: Band
    p50: Band
    p99: Band
    worst: Band

    def __repr__(self) -> str:
        low, high = self.total
        return (
            f"OperationRun({operation_name(self.operation)}: {counted(self.outcomes)}; total={low:.0f}-{high:.0f} ns)"
        )

    @classmethod
    def of(cls, statistics: Statistics, op: Operation) -> OperationRun | None:
        """Collect one kind of operation; None if there was none."""
        results = statistics.results(op)
        count = sum(results.values())
        if not count:
            return None
        outcomes: dict[str, int] = {}
        for status, n in sorted(results.items(), key=lambda item: (-item[1], item[0])):
            outcomes[result_name(op, status)] = n
        low, high = total = statistics.cost(op)
        edges = (statistics.percentile(op, fraction) or total for fraction in (0.5, 0.99, 1.0))
        p50, p99, worst = ((min(edge[0], low), min(edge[1], high)) for edge in edges)
        return cls(op, count, outcomes, total, (low / count, high / count), p50, p99, worst)


@dataclass(frozen=True)
class Finding:
    """Broken invariants of one machine.

    Attributes:
        count: how often a rule was found broken
        rule: the first one, a name of words.Broken
        index: what the first one is about, as pgemu.machine.findings.INDEX says of each rule
        after: records that had run when it was noticed; more than the trace has: after the inode was closed
        rules: every rule that was broken, with the defects of the machine that explain it
    """

    count: int
    rule: str
    index: int
    after: int
    rules: tuple[BrokenRule, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers."""
        rules = [
            {**asdict(rule), "rule": rule.rule.name, "explained_by": list(rule.explained_by)} for rule in self.rules
        ]
        return {**asdict(self), "rules": rules}

    @property
    def explained(self) -> bool:
        """Whether defects of the machine explain all of it."""
        return all(rule.explained_by for rule in self.rules)


@dataclass(frozen=True)
class EndOfLife:
    """What remains when the VMM goes: after the trace, the inode is closed.

    Attributes:
        outcome: what closing it returned ("-EBADF": the trace had closed it)
        cost: estimated kernel time, (low, high) nanoseconds
        pool_free, pool: huge pages back in the pool, and all of them
        zombies: huge pages that references keep from the pool
        vmemmap, vmemmap_at_boot: bytes of vmemmap afterwards, and before the first record
    """

    outcome: str
    cost: Band
    pool_free: int
    pool: int
    zombies: int
    vmemmap: int
    vmemmap_at_boot: int


class WithoutEffect(NamedTuple):
    """What changes nothing that is counted, returned or broken on the trace.

    Attributes:
        defects: of each design's machine
        options: fields of Config given by hand
    """

    defects: Mapping[Design, tuple[str, ...]]
    options: tuple[str, ...]


@dataclass(frozen=True)
class DesignRun:
    """One design's machine after the trace.

    refusal: why the guest_memfd was not created, so that nothing of the trace ran; None where it was. worst: the
    operation of each kind that took the most. asked: records that a refusal kept from running. devices: what the
    trace's devices did, None where it has none.
    """

    design: Design
    config: Config
    statistics: Statistics
    operations: tuple[OperationRun, ...]
    end_of_life: EndOfLife
    finding: Finding | None
    refusal: str | None = None
    worst: Mapping[Operation, WorstOperation] = field(default_factory=dict)
    asked: int = 0
    devices: DeviceRun | None = None

    def __repr__(self) -> str:
        counts = {operation_name(run.operation): run.count for run in self.operations}
        broken = f", broken: {self.finding.count:,}" if self.finding else ""
        return f"DesignRun({self.config!r}, {counted(counts)}{broken})"

    def operation(self, op: Operation) -> OperationRun | None:
        """Return one kind of operation, None if the trace has none."""
        return next((run for run in self.operations if run.operation is op), None)

    @property
    def count(self) -> int:
        """Operations that ended: as many as the trace has records, and user space adds for devices."""
        return sum(run.count for run in self.operations)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers; counts are ints, times are nanoseconds."""
        statistics = self.statistics
        return {
            "count": self.count,
            "operations": {
                operation_name(run.operation): {
                    "count": run.count,
                    "outcomes": run.outcomes,
                    "estimate_ns": {
                        name: list(getattr(run, name)) for name in ("total", "mean", "p50", "p99", "worst")
                    },
                    "worst_record": self.worst[run.operation].record if run.operation in self.worst else None,
                }
                for run in self.operations
            },
            "state": {metric.key: metric.value(statistics) for metric in METRICS},
            "events": {event.name.lower(): statistics.event(event) for event in Event},
            "end_of_life": {**asdict(self.end_of_life), "cost": list(self.end_of_life.cost)},
            "broken": self.finding.to_json() if self.finding else None,
            "refusal": self.refusal,
            "devices": self.devices.to_json() if self.devices else None,
        }


@dataclass(frozen=True)
class Comparison:
    """One trace on one or more designs.

    Attributes:
        lowered: the trace
        check: when the machines were checked
        runs: one per design, in the order asked for
        versions: of the designs
        given: fields of Config by hand
        instead: what a version refuses and was done all the same, as another one does it
        without_effect: what changes nothing; empty where nobody tried (effects.py)

    >>> comparison = compare(load("workload:convert-loop", guest_memory=2 << 20, iterations=1))
    >>> [run.count for run in comparison.runs]
    [1028, 1028]
    """

    lowered: Lowered
    check: Check
    runs: tuple[DesignRun, ...]
    versions: Versions = field(default_factory=Versions)
    given: dict[str, Any] = field(default_factory=dict)
    instead: tuple[str, ...] = ()
    without_effect: WithoutEffect = field(default_factory=lambda: WithoutEffect({}, ()))

    def __repr__(self) -> str:
        designs = ", ".join(run.design for run in self.runs)
        return (
            f"Comparison({self.lowered.source!r}, {self.versions!r}, {designs}: {len(self.lowered.records):,} records)"
        )

    @property
    def assumed(self) -> tuple[str, ...]:
        """Fields of Config that are the recorded VM's, and that neither the trace tells nor anybody gave."""
        return assumed(self.lowered, self.runs[0].config, self.given)

    @property
    def broken(self) -> bool:
        """Whether any machine broke a rule that none of its defects explains."""
        return any(run.finding and not run.finding.explained for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain dicts, lists, strings and numbers; equal runs give equal documents.

        >>> sorted(comparison.to_json()["designs"])
        ['pfnmap', 'restructure']
        """
        from pgemu.version import version

        lowered = self.lowered
        machines = {run.design: asdict(run.config) for run in self.runs}
        for machine in machines.values():
            del machine["design"]
        return {
            "pgemu": version(),
            "trace": {
                "source": lowered.source,
                "records": len(lowered.records),
                "init": lowered.init,
                "converts": lowered.converts,
                "accounting": lowered.accounting.to_json(),
                "notes": list(lowered.notes),
                "doubts": [doubt.text for doubt in lowered.doubts],
                "memory": lowered.layout.to_json(),
            },
            "versions": asdict(self.versions),
            "instead": list(self.instead),
            "without_effect": {
                "defects": {design: list(names) for design, names in self.without_effect.defects.items()},
                "options": list(self.without_effect.options),
            },
            "machines": machines,
            "assumed": list(self.assumed),
            "check": self.check,
            "designs": {run.design: run.to_json() for run in self.runs},
        }


def compare(
    lowered: Lowered,
    designs: Sequence[Design] = DESIGNS,
    check: Check = "end",
    progress: Progress | None = None,
    versions: Versions | None = None,
    *,
    strict: bool = False,
    **given: Any,
) -> Comparison:
    """Run a trace on a fresh machine of each design.

    The pool is as large as the guest_memfd. The VM's kind is the trace's; one that says nothing runs in a
    KVM_X86_SW_PROTECTED_VM where it begins private or converts, else in a plain VM.

    :param designs: which, and in which order
    :param check: "end": recount everything after the trace and after closing; an int: also after every so many
        records; "every": also check after each record what it touched
    :param progress: called with the design, the records that have run, and all of them
    :param versions: of the designs; what Versions() says without it
    :param strict: what a version refuses stays refused, though the trace needs it
    :param given: fields of pgemu.Config other than design, pool and page_size; None is as without it
    :raises InputError: an option that Config refuses, a VM without private memory for a trace that begins with it, or
        guest memory that this computer cannot model
    :raises TypeError: an argument of another type, or a field that follows from the trace

    >>> comparison = compare(load("workload:convert-loop", guest_memory=2 << 20, iterations=1), ["pfnmap"])
    >>> {run.operation.name: run.outcomes for run in comparison.runs[0].operations}
    {'GUEST_FAULT': {'RET_PF_FIXED': 1024}, 'CONVERT': {'ok': 2}, 'MMAP': {'ok': 1}, 'BIND': {'ok': 1}}
    """
    versions = versions or Versions()
    _check_arguments(lowered, designs, check, versions, given)
    given = {name: value for name, value in given.items() if value is not None}
    configs = [configuration(lowered, design, versions, given) for design in designs]
    runs = tuple(run(lowered, config, versions, check, progress, strict=strict) for config in configs)
    texts = () if strict else tuple(refused(lowered, config, versions) for config in configs)
    instead = tuple(f"{text}: created as rfc2 does" for text in texts if text)
    return Comparison(lowered, check, runs, versions, given, instead)


def _check_arguments(lowered: Any, designs: Any, check: Any, versions: Any, given: Mapping[str, Any]) -> None:
    """Refuse what compare() cannot take, in a line that names it."""
    for name, value, kind in (("lowered", lowered, Lowered), ("versions", versions, Versions)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {kind.__name__}")
    if isinstance(designs, str) or not isinstance(designs, Sequence):
        raise TypeError(f"designs {shown(designs)} ({type(designs).__name__}): expected a sequence of names")
    if not designs:
        raise InputError("designs: expected at least one")
    require_one_vm(lowered)
    expected = "expected 'end', 'every' or a positive number of operations"
    if isinstance(check, bool) or not isinstance(check, int | str):
        raise TypeError(f"check {shown(check)} ({type(check).__name__}): {expected}")
    if check not in ("end", "every") and not (isinstance(check, int) and check > 0):
        raise InputError(f"check {shown(check)}: {expected}")
    for name in ("design", "pool", "page_size"):
        if name in given:
            raise TypeError(f"{name} {shown(given[name])}: expected no such argument, for it follows from the trace")


def run(
    lowered: Lowered,
    config: Config,
    versions: Versions,
    check: Check = "end",
    progress: Progress | None = None,
    *,
    strict: bool = False,
    unseen: bool = False,
) -> DesignRun:
    """Run a trace on a fresh machine; see compare().

    unseen: with accesses to whatever the recorded VM may have used without a fault (recorded.py).
    """
    lowered, added = arranged(lowered, config)
    machine = boot(lowered, config)
    booted = machine.statistics
    refusal = refused(lowered, config, versions) if strict else ""
    if refusal:
        nothing = EndOfLife("not created", (0.0, 0.0), config.pool_pages, config.pool_pages, 0, 0, 0)
        return DesignRun(config.design, config, booted, (), nothing, None, refusal, asked=len(lowered.records))
    gmem, devices = fill(machine, lowered)
    booted = machine.statistics
    if check == "every":
        machine.check_each()
    finding, before = None, 0
    for done in _replay_unseen(machine, lowered) if unseen else _replay(machine, lowered, check):
        if not finding and (finding := _finding(machine, done)) and check == "every":
            finding = replace(finding, after=_noticed(lowered, config, before, done))
        before = done
        if progress:
            progress(config.design, done, len(lowered.records))
    machine.check()
    finding = finding or _finding(machine, len(lowered.records))
    statistics = machine.statistics
    did = DeviceRun.of(machine, devices, added) if devices else None
    if devices:
        devices.close()
    end_of_life = _close(machine, gmem, booted)
    machine.check()
    finding = finding or _finding(machine, len(lowered.records) + 1)
    if finding:
        finding = Finding(machine.broken[0], finding.rule, finding.index, finding.after, machine.findings)
    collected = (OperationRun.of(statistics, op) for op in Operation)
    operations = tuple(run for run in collected if run)
    # Accesses that were added are no records of the trace.
    worst = {} if unseen else worst_operations(lowered, statistics, booted)
    return DesignRun(
        config.design, machine.config, statistics, operations, end_of_life, finding, None, worst, devices=did
    )


def explained(comparison: Comparison) -> dict[Design, Mapping[Operation, WorstOperation]]:
    """The worst operations of each design with what they are made of, for which the trace runs again up to them."""

    def filled(lowered: Lowered, config: Config) -> Machine:
        machine = boot(lowered, config)
        fill(machine, lowered)
        return machine

    traces = {run.design: arranged(comparison.lowered, run.config)[0] for run in comparison.runs}
    return {
        run.design: explain(traces[run.design], run.worst.values(), partial(filled, traces[run.design], run.config))
        for run in comparison.runs
    }


def _replay(machine: Machine, lowered: Lowered, check: Check) -> Iterator[int]:
    """Run the records piece by piece, each about a tenth of a second long, and yield how many have run."""
    records = lowered.records
    done, pace = 0, Pace()
    while done < len(records):
        last = min(done + pace.piece, len(records))
        if isinstance(check, int):
            last = min(last, (done // check + 1) * check)
        began = time.perf_counter()
        machine.run(records[done:last])
        if isinstance(check, int) and last % check == 0:
            machine.check()
        pace.took(last - done, time.perf_counter() - began)
        done = last
        yield done


def _noticed(lowered: Lowered, config: Config, before: int, after: int) -> int:
    """After which record a finding is there, of those behind the first `before`: a second machine runs one by one."""
    machine = boot(lowered, config)
    fill(machine, lowered)
    machine.check_each()
    machine.run(lowered.records[:before])
    for done in range(before + 1, after):
        machine.run(lowered.records[done - 1 : done])
        if machine.broken[0]:
            return done
    return after


def _replay_unseen(machine: Machine, lowered: Lowered) -> Iterator[int]:
    from pgemu.experiments.recorded import replay_unseen

    replay_unseen(lowered, machine)
    yield len(lowered.records)


def _finding(machine: Machine, after: int) -> Finding | None:
    count, rule, index = machine.broken
    return Finding(count, rule.name, index, after) if count else None


def _close(machine: Machine, gmem: GuestMemfd, booted: Statistics) -> EndOfLife:
    before = machine.statistics.cost(Operation.CLOSE)
    status = gmem.close().status
    statistics = machine.statistics
    after = statistics.cost(Operation.CLOSE)
    return EndOfLife(
        result_name(Operation.CLOSE, status),
        (after[0] - before[0], after[1] - before[1]),
        statistics.gauge(Gauge.POOL_FREE),
        machine.config.pool_pages,
        statistics.gauge(Gauge.BLOCKS_ZOMBIE),
        statistics.gauge(Gauge.VMEMMAP_PAGES) * PAGE_4K,
        booted.gauge(Gauge.VMEMMAP_PAGES) * PAGE_4K,
    )
