"""Repeat a comparison under the alternatives of the inferred rules, to see which of its answers rest on them.

Each rule is varied alone; pairs only among those that turned an answer, where together they could turn another. What
provably touches no record is not repeated, and only the machines concerned are: a design's run under a configuration
that it had already is that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from typing import TYPE_CHECKING

from pgemu.cost import profile as cost_profile
from pgemu.errors import InputError
from pgemu.experiments.compare import configuration, run
from pgemu.experiments.inferences import INFERENCES, Alternative, large_host_faults
from pgemu.experiments.verdict import Measure, Sensitivity, Trial, measure
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import PAGE_4K

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.machine.config import Config
    from pgemu.trace.lowered import Lowered

__all__ = ("Sensitivity", "Trial", "sensitivity")

_WORKERS = 2
_TOGETHER = 4  # times the sum of what two alternatives move an answer by: the most that they move it by together


def _done(result: DesignRun) -> Future[DesignRun]:
    future: Future[DesignRun] = Future()
    future.set_result(result)
    return future


class _Runs:
    """Runs of machines, each configuration and trace once."""

    def __init__(self, comparison: Comparison, pool: ThreadPoolExecutor) -> None:
        self._comparison = comparison
        self._pool = pool
        self._known: dict[tuple[int, Config, bool], Future[DesignRun]] = {}
        self._traces: dict[tuple[tuple[str, float], ...], Lowered] = {(): comparison.lowered}
        for known in comparison.runs:
            self._known[id(comparison.lowered), known.config, False] = _done(known)
        self._full = any(known.config.full for known in comparison.runs)

    def trace(self, parameters: dict[str, float]) -> Lowered:
        """The trace with other parameters."""
        key = tuple(sorted(parameters.items()))
        if key not in self._traces:
            assert self._comparison.lowered.again is not None
            self._traces[key] = self._comparison.lowered.again(**parameters)
        return self._traces[key]

    def start(self, alternatives: tuple[Alternative, ...]) -> list[Future[DesignRun]]:
        """Start what alternatives ask of the first two designs."""
        comparison = self._comparison
        changed: dict[str, float] = {}
        for alternative in alternatives:
            changed |= alternative.trace
        lowered = self.trace(changed)
        return [self._start(lowered, known, alternatives) for known in comparison.runs[:2]]

    def _start(self, lowered: Lowered, known: DesignRun, alternatives: tuple[Alternative, ...]) -> Future[DesignRun]:
        comparison = self._comparison
        versions, given = comparison.versions, dict(comparison.given)
        for alternative in alternatives:
            if known.design in alternative.designs:
                versions = alternative.changed(versions)
                given |= alternative.fields
        config = configuration(lowered, known.design, versions, given)
        unseen = any(alternative.unseen for alternative in alternatives)
        key = id(lowered), config, unseen
        if key not in self._known and config.full and not self._full:
            # The first run of such a machine compiles what runs it: that is not for two threads at once.
            self._known[key] = _done(run(lowered, config, versions, unseen=unseen))
            self._full = True
        elif key not in self._known:
            self._known[key] = self._pool.submit(run, lowered, config, versions, unseen=unseen)
        return self._known[key]


def sensitivity(comparison: Comparison, progress: Callable[[str, int, int], None] | None = None) -> Sensitivity:
    """Repeat the comparison of the first two designs under every alternative that can touch it.

    :param progress: called with the rule, the alternatives tried, and all of them
    """
    if any(known.refusal for known in comparison.runs[:2]):
        return Sensitivity((), dict.fromkeys(INFERENCES, "a version refuses the memory, and nothing ran"))
    untouched = {name: rule.untouched(comparison) for name, rule in INFERENCES.items()}
    untouched = {name: why for name, why in untouched.items() if why}
    if "host-huge" not in untouched and (few := _few_large_entries(comparison)):
        untouched["host-huge"] = few
    singles = [
        (name, alternative)
        for name, rule in INFERENCES.items()
        if name not in untouched
        for alternative in rule.alternatives
    ]
    trials: list[Trial] = []
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        runs = _Runs(comparison, pool)
        trials += _tried(comparison, runs, [((name,), (one,)) for name, one in singles], progress)
        base = measure(*comparison.runs[:2])
        found = {(trial.rule, trial.label): trial.measures for trial in trials}
        pairs = [
            ((a, b), (one, other))
            for (a, one), (b, other) in combinations(_turning(base, singles, found), 2)
            if a != b and _may_turn_more(base, found[a, one.label], found[b, other.label])
        ]
        trials += _tried(comparison, runs, pairs, progress)
    except KeyboardInterrupt:
        return Sensitivity(tuple(trials), untouched, complete=False)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Sensitivity(tuple(trials), untouched)


def _few_large_entries(comparison: Comparison) -> str:
    """Whether larger entries of the host are too few to turn an answer, else "".

    They change what conversions unmap, by up to 512 entries and a flush each, and the host's tables; nothing else is
    asked for.
    """
    count = large_host_faults(comparison)
    first, second = comparison.runs[:2]
    base = measure(first, second)
    config = second.config
    prices = cost_profile(config.profile)
    cpus = min(config.vcpus, config.host_cpus)
    most = sum(prices[event].total(512, cpus)[1] for event in (Event.LEAF_CLEARED, Event.TLB_FLUSH_PAGE))
    most += prices[Event.TLB_FLUSH_MM].total(1, cpus)[1] + prices[Event.NOTIFIER_CALL].total(1)[1]
    time, memory = base["conversions"], base["memory"]
    if time.better not in (0, 1) or not isinstance(time.difference, tuple) or isinstance(memory.difference, tuple):
        return ""
    enough = min(map(abs, time.difference)) > count * most and abs(memory.difference) > count * 3 * PAGE_4K
    return f"{count} host faults could have a larger entry, too few to turn an answer" if enough else ""


_Measures = Mapping[str, Measure]


def _turning(
    base: _Measures, singles: list[tuple[str, Alternative]], found: Mapping[tuple[str, str], _Measures]
) -> list[tuple[str, Alternative]]:
    """The alternatives that turned an answer."""
    return [
        (name, one)
        for name, one in singles
        if any(now.better != base[key].better for key, now in found.get((name, one.label), {}).items())
    ]


def _ends(one: Measure) -> tuple[float, float]:
    """The difference as a band."""
    return one.difference if isinstance(one.difference, tuple) else (one.difference, one.difference)


def _may_turn_more(base: _Measures, a: _Measures, b: _Measures) -> bool:
    """Whether two alternatives together could turn an answer that neither turns alone.

    An answer that one of them turns rests on that one, whatever both do; one that is undecided stays so.
    """
    for key, known in base.items():
        if known.better is None or not known.better == a[key].better == b[key].better:
            continue
        low, high = _ends(known)
        moved = sum(max(abs(x - low), abs(y - high)) for x, y in (_ends(a[key]), _ends(b[key])))
        if moved and (known.better == -1 or min(abs(low), abs(high)) <= _TOGETHER * moved):
            return True
    return False


def _tried(
    comparison: Comparison,
    runs: _Runs,
    wanted: Sequence[tuple[tuple[str, ...], tuple[Alternative, ...]]],
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[Trial]:
    started = []
    for names, alternatives in wanted:
        with suppress(InputError):  # two alternatives that exclude each other
            started.append((names, alternatives, runs.start(alternatives)))
    base = tuple(comparison.runs[:2])
    for done, (names, alternatives, futures) in enumerate(started):
        first, second = (future.result() for future in futures)
        if progress:
            progress("alternatives", done + 1, len(started))
        unreached = any(alternative.unreached for alternative in alternatives)
        if first is not base[0] or second is not base[1] or unreached:
            label = " and ".join(alternative.label for alternative in alternatives)
            removed = _removed(base, (first, second)) if len(alternatives) == 1 else ""
            measures = measure(first, second, unreached=unreached)
            yield Trial(" and ".join(names), label, removed, measures, (first, second))


def _removed(base: tuple[DesignRun, ...], runs: tuple[DesignRun, DesignRun]) -> str:
    """The defect that a machine had and has no longer, where now both machines zero the same."""
    if runs[0].config.zero != runs[1].config.zero:
        return ""
    gone = {name for old, new in zip(base, runs, strict=True) for name in {*old.config.defects} - {*new.config.defects}}
    return ", ".join(sorted(gone))
