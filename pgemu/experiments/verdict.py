"""What a comparison answers: one line per question, which design, by how much, and on what it rests.

A line is decided by counts under rules that have a source, or it names the inferred rule that it rests on (it was
repeated under the rule's alternatives), or the defect without which it would not be, or it is undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.cost.difference import Difference, difference
from pgemu.machine.findings import explained_by
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Operation

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.trace.log import Doubt

__all__ = (
    "QUESTIONS",
    "SLOT_REACH",
    "Basis",
    "Breach",
    "Line",
    "Measure",
    "Sensitivity",
    "Trial",
    "breaches",
    "broken",
    "mapped",
    "measure",
    "middle",
    "paired",
    "refused",
    "verdict",
    "without",
)

Array = np.ndarray[Any, Any]
Band = tuple[float, float]
_Measured = Callable[["DesignRun", "DesignRun", bool], "Measure"]
Kind = Literal["captured", "fact", "inference", "defect", "undecided", "even", "untested", "doubtful"]

_XARRAY_NODE = 576
SLOT_REACH = "slot-reach"  # the rule of INFERENCES
_MOSTLY = 3  # times what is left
_ALIKE = 0.02  # shares nearer than this are the same


class Measure(NamedTuple):
    """The answer to one question on two machines.

    better: the index of the run that is better; -1: they are alike; None: the bands of the estimate overlap, or only
    one of them has something of it.
    first, second: the two values, and `difference`: second less first. Bands where `unit` is "ns"; None: a share of
    nothing, and what differs from that.
    unit: "ns", "bytes", "count" or "share".
    """

    better: int | None
    first: float | Band | None
    second: float | Band | None
    difference: float | Band | None
    unit: str


class Basis(NamedTuple):
    """On what a line rests.

    kind: see the module. rules: of "inference", the rules that turn it, each with the alternative and what it is
    then; of "defect" its name; of "untested" the names of those that may make the difference.
    """

    kind: Kind
    rules: tuple[tuple[str, str, int | None], ...] = ()


class Line(NamedTuple):
    """One question and its answer.

    with_defect: where most of a difference in time is a defect's, which counts for nobody: its name, and the answer as
    it is with the defect. `measure` is then that without it.
    without: the rule by which values and difference leave something out that the machines counted (slot-reach), or "".
    """

    question: str
    measure: Measure
    basis: Basis
    with_defect: tuple[str, Measure] | None = None
    without: str = ""


@dataclass(frozen=True, order=True)
class Breach:
    """A rule that a machine broke: how often, in what unit, and its defects that explain it (empty: none does).

    unit: "times" that a check found it broken; "pages" with stale contents that guest or host were shown, each counted
    once, when a leaf first showed it, whenever the rule is checked; "uses" by KVM of a mapping of its own that is
    stale, whether or not it is there when the rule is checked.
    """

    rule: Broken
    count: int
    unit: Literal["times", "pages", "uses"]
    explained_by: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question, how it is measured, and what captured it if a kernel was seen to answer it."""

    text: str
    measure: _Measured
    captured: Callable[[DesignRun, DesignRun], bool] = lambda _, __: False


# --------------------------------------------------------------------------- measures


def _less(first: float, second: float, unit: str) -> Measure:
    better = -1 if first == second else int(second < first)
    return Measure(better, first, second, second - first, unit)


class _Counted(NamedTuple):
    """Counts of a machine, int64[OPERATIONS, EVENTS]."""

    events: Array
    charges: Array


def _reached(run: DesignRun) -> _Counted:
    """A machine's counts without the zeroing of memory that no slot reaches."""
    statistics = run.statistics
    events = statistics.events.copy()
    left = events[:, Event.ZEROED_UNREACHED].copy()
    for event in (Event.FOLIO_ZEROED_PAGES, Event.PAGE_ZEROED):
        taken = np.minimum(left, events[:, event])
        events[:, event] -= taken
        left -= taken
    return _Counted(events, np.minimum(statistics.charges, events))


def paired(first: DesignRun, second: DesignRun, op: Operation | None = None, *, unreached: bool = False) -> Difference:
    """What the second machine takes more than the first, event by event.

    unreached: with the zeroing of memory that no slot reaches.
    """
    config = first.config
    one, other = (run.statistics if unreached else _reached(run) for run in (first, second))
    return difference(one, other, config.profile, config.vcpus, config.host_cpus, op)


def _time(op: Operation) -> _Measured:
    def measured(first: DesignRun, second: DesignRun, unreached: bool) -> Measure:
        found = paired(first, second, op, unreached=unreached)  # both values as the difference counts them
        low, high = found.total
        better = -1 if low == high == 0 else 0 if low > 0 else 1 if high < 0 else None
        return Measure(better, found.first.total, found.second.total, (low, high), "ns")

    return measured


def _memory(first: DesignRun, second: DesignRun, _: bool) -> Measure:
    peaks = []
    for run in (first, second):
        pages = sum(
            run.statistics.peak(gauge) for gauge in (Gauge.VMEMMAP_PAGES, Gauge.HOST_TABLES, Gauge.STAGE2_TABLES)
        )
        peaks.append(pages * PAGE_4K + run.statistics.peak(Gauge.XARRAY_NODES) * _XARRAY_NODE)
    return _less(peaks[0], peaks[1], "bytes")


def mapped(run: DesignRun) -> tuple[int, int]:
    """Bytes that stage 2 maps at the end, in all and by leaves of 2M and 1G."""
    gauge = run.statistics.gauge
    large = gauge(Gauge.STAGE2_LEAVES_2M) * PAGE_2M + gauge(Gauge.STAGE2_LEAVES_1G) * PAGE_1G
    return gauge(Gauge.STAGE2_LEAVES_4K) * PAGE_4K + large, large


def _level(first: DesignRun, second: DesignRun, _: bool) -> Measure:
    one, other = (large / total if total else None for total, large in (mapped(run) for run in (first, second)))
    if one is None or other is None:  # of nothing no share is better
        return Measure(-1 if one is other else None, one, other, None, "share")
    better = -1 if abs(one - other) < _ALIKE else int(other > one)
    return Measure(better, one, other, other - one, "share")


def refused(run: DesignRun) -> int:
    """Operations that ended in an error; all of them where the guest_memfd was not created."""
    if run.refusal:
        return run.asked
    return sum(n for op in run.operations for name, n in op.outcomes.items() if name.startswith(("-", "VM_FAULT_SIG")))


def breaches(run: DesignRun, idle: Collection[str] = ()) -> tuple[Breach, ...]:
    """What a machine broke, in the order of the rules' numbers.

    :param idle: defects without effect on the trace (WithoutEffect), which explain nothing
    """

    def why(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in idle)

    found = [
        Breach(rule.rule, rule.count, "times", why(rule.explained_by))
        for rule in (run.finding.rules if run.finding else ())
    ]
    told: tuple[tuple[Broken, Literal["pages", "uses"], tuple[Event, ...]], ...] = (
        (Broken.STALE_CONTENTS, "pages", (Event.STALE_PAGE_SHOWN,)),
        (Broken.STALE_MAPPING, "uses", (Event.MAPPED_STALE_PRIVATE, Event.MAPPED_STALE_FREED)),
    )
    for rule, unit, events in told:  # counted as it happened
        count = sum(map(run.statistics.event, events))
        if count:
            found = [one for one in found if one.rule is not rule]
            found.append(Breach(rule, count, unit, why(explained_by(rule, run.config.defects))))
    return tuple(sorted(found))


def _spins(run: DesignRun) -> int:
    return sum(n for op in run.operations for name, n in op.outcomes.items() if name == "would spin")


def broken(run: DesignRun) -> int:
    """Rules found broken, pages shown with stale contents, uses of what is stale, pages that devices reached and should
    not have, and operations that would not have returned."""
    return _spins(run) + sum(one.count for one in breaches(run)) + _stale(run)


def _stale(run: DesignRun) -> int:
    return run.devices.stale if run.devices else 0


def _refused_zaps(first: DesignRun, second: DesignRun) -> bool:
    """Whether only MADV_DONTNEED makes the difference: -EINVAL on VM_PFNMAP was captured."""

    def others(run: DesignRun) -> int:
        return refused(run) - sum(
            n
            for op in run.operations
            if op.operation is Operation.ZAP
            for name, n in op.outcomes.items()
            if name[0] == "-"
        )

    return others(first) == others(second)


def _captured_defects(first: DesignRun, second: DesignRun) -> bool:
    """Whether all that is broken is what was captured of the slides' change: entries that a hole left."""
    rules = [rule for run in (first, second) for rule in breaches(run)]
    return bool(rules) and all(rule.explained_by == ("punch-keeps-entries",) for rule in rules)


QUESTIONS: dict[str, Question] = {
    "conversions": Question("conversions, time", _time(Operation.CONVERT)),
    "guest_faults": Question("guest faults, time", _time(Operation.GUEST_FAULT)),
    "memory": Question("metadata, peak", _memory),
    "level": Question("leaves >= 2M, end", _level),
    "refused": Question("refused", lambda a, b, _: _less(refused(a), refused(b), "count"), _refused_zaps),
    "broken": Question("broken", lambda a, b, _: _less(broken(a), broken(b), "count"), _captured_defects),
}
"""In the order of the screen."""


def measure(first: DesignRun, second: DesignRun, *, unreached: bool = False) -> dict[str, Measure]:
    """Answer every question for two machines after the same trace; `unreached`: see paired().

    Where a version refused the memory nothing ran: that is the one answer, and no other is decided.
    """
    found = {key: question.measure(first, second, unreached) for key, question in QUESTIONS.items()}
    refusing = [run.refusal is not None for run in (first, second)]
    if any(refusing):
        found = {key: one._replace(better=None) for key, one in found.items()}
        if not all(refusing):
            found["refused"] = found["refused"]._replace(better=refusing.index(False))
    return found


def without(first: DesignRun, second: DesignRun) -> dict[str, str]:
    """By question: the rule by which measure() leaves something out that a machine counted, or ""."""
    found, whole = measure(first, second), measure(first, second, unreached=True)
    return {key: SLOT_REACH if found[key][1:] != whole[key][1:] else "" for key in found}


# --------------------------------------------------------------------------- what it rests on


class Trial(NamedTuple):
    """What a comparison answers under an alternative.

    Attributes:
        rule: the inferred rule, or several joined by " and "
        label: the alternative
        removes: the defect that the machines do not have under it while both zero the same, or ""; "" for several
        measures: the answers, by question
        runs: the machines
    """

    rule: str
    label: str
    removes: str
    measures: dict[str, Measure]
    runs: tuple[DesignRun, DesignRun]

    def __repr__(self) -> str:
        removes = f", removes={self.removes!r}" if self.removes else ""
        return f"Trial({self.rule!r}, {self.label!r}{removes})"


@dataclass(frozen=True)
class Sensitivity:
    """Every alternative that was tried.

    Attributes:
        trials: in the order of the rules
        untouched: why a rule was not varied, by its name
        complete: False where it was interrupted
    """

    trials: tuple[Trial, ...]
    untouched: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def __repr__(self) -> str:
        tried = f"{len(self.trials)} alternatives tried, {len(self.untouched)} rules untouched"
        return f"Sensitivity({tried}{'' if self.complete else ', interrupted'})"


def verdict(comparison: Comparison, sensitivity: Sensitivity | None = None) -> dict[str, Line]:
    """Answer every question for the first two designs, each with what the answer rests on.

    Without a sensitivity nothing is known of inferred rules: the basis is "untested" where the counts differ.
    """
    first, second = comparison.runs[:2]
    trials = sensitivity.trials if sensitivity else None
    lines = {}
    rules = without(first, second)
    for key, found in measure(first, second).items():
        captured = QUESTIONS[key].captured(first, second)
        pair = ((first, second), (second, first))[found.better] if found.better in (0, 1) else None
        if key == "broken" and not captured and pair and _unexplained(pair[1]) <= _unexplained(pair[0]):
            worse = pair[1]
            idle = comparison.without_effect.defects.get(worse.design, ())
            names = {name for rule in breaches(worse, idle) for name in rule.explained_by}
            rests = ((" or ".join(sorted(names)), "without", -1),)
            lines[key] = Line(QUESTIONS[key].text, found, Basis("defect", rests))
        else:
            basis = _basis(key, found, trials, captured)
            if basis.kind == "fact" and sensitivity and not sensitivity.complete:  # what was not reached may turn it
                basis = Basis("untested")
            if basis.kind in ("fact", "captured") and _in_doubt(key, comparison.lowered.doubts):
                basis = Basis("doubtful")
            line = Line(QUESTIONS[key].text, found, basis)
            line = _untried(key, _less_a_defect(key, line, trials or ()), comparison)
            lines[key] = line._replace(without=rules[key])
    return lines


_ANY = ("conversions", "guest_faults", "memory", "level", "refused")
_MAY_MAKE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "allocation-race": ("guest_faults", "refused"),
        "hole-zeroes-from-start": (),
        "insert-unlocked": ("conversions",),
        "merge-keeps-flag": ("conversions", "guest_faults"),
        "punch-keeps-entries": ("conversions", "memory"),
        "rollback-at-zero": ("conversions", "refused"),
        "unbind-dying": ("conversions", "refused"),
        "uptodate-unzeroed": ("guest_faults",),
    }
)
"""Questions whose answer a defect may make; of those that are not named any. What it breaks is told by findings."""
_SAVES = ("uptodate-unzeroed",)  # what its machine should have done: only where that is better may it be the reason


def _untried(key: str, line: Line, comparison: Comparison) -> Line:
    """A line without a winner if that may be the work of a defect, which nobody has left out yet."""
    better = line.measure.better
    if line.basis.kind != "untested" or better not in (0, 1):
        return line
    names = [
        name
        for index, run in enumerate(comparison.runs[:2])
        for name in run.config.defects
        if key in _MAY_MAKE.get(name, _ANY)
        and name not in comparison.without_effect.defects.get(run.design, ())
        and (index == better or name not in _SAVES)
    ]
    if not names:
        return line
    rules = tuple((name, "without", None) for name in dict.fromkeys(names))
    return line._replace(measure=line.measure._replace(better=None), basis=Basis("untested", rules))


_RESTS_ON = {"host faults": ("conversions", "memory"), "unmaps and holes": ("guest_faults", "level")}
"""Questions that rest on inputs of a kind; all do on those that are not named."""


def _in_doubt(key: str, doubts: Iterable[Doubt]) -> bool:
    """Whether the answer to a question rests on input that was left out, or that is of several VMs."""
    return any(key in _RESTS_ON.get(doubt.about, (key,)) for doubt in doubts)


def _less_a_defect(key: str, line: Line, trials: Iterable[Trial]) -> Line:
    """Take out of a difference in time what only a defect makes, if that is most of it."""
    found = line.measure
    for trial in trials:
        then = trial.measures[key]
        if not trial.removes or found.unit != "ns" or found.better not in (0, 1) or then.better != found.better:
            continue
        if middle(found.difference) > _MOSTLY * middle(then.difference):
            return line._replace(measure=then, with_defect=(trial.removes, found))
    return line


def middle(difference: float | Band | None) -> float:
    """The size of a difference, of a band that of its middle."""
    if difference is None:
        return 0.0
    return abs(sum(difference)) / 2 if isinstance(difference, tuple) else abs(difference)


def _unexplained(run: DesignRun) -> int:
    """What a machine broke that no defect explains."""
    return _spins(run) + _stale(run) + sum(one.count for one in breaches(run) if not one.explained_by)


def _basis(key: str, found: Measure, trials: Iterable[Trial] | None, captured: bool) -> Basis:
    if found.better is None:
        return Basis("undecided")
    if trials is None:
        return Basis("even" if found.better == -1 else "captured" if captured else "untested")
    turned = [(trial, trial.measures[key].better) for trial in trials if trial.measures[key].better != found.better]
    defect = [trial for trial, _ in turned if trial.removes]
    if defect:
        return Basis("defect", tuple((trial.removes, trial.label, trial.measures[key].better) for trial in defect))
    if turned:
        return Basis("inference", tuple((trial.rule, trial.label, better) for trial, better in turned))
    if found.better == -1:
        return Basis("even")
    return Basis("captured" if captured else "fact")
