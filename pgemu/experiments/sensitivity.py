"""Repeat a comparison under the alternatives of the inferred rules, to see which of its answers rest on them.

Each rule is varied alone; pairs only among those that turned an answer, where together they could turn another that
none has turned alone until then. What provably touches no record is not repeated, and only the machines concerned are:
a design's run under a configuration that it had already is that run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pgemu.cost import profile as cost_profile
from pgemu.errors import InputError
from pgemu.experiments.compare import compare
from pgemu.experiments.inferences import INFERENCES, Alternative, large_host_faults, may_touch
from pgemu.experiments.reruns import Reruns
from pgemu.experiments.verdict import Measure, Sensitivity, Trial, measure
from pgemu.machine.designs import DESIGNS, Design
from pgemu.machine.presets import Versions
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import PAGE_4K

if TYPE_CHECKING:
    from pgemu.experiments.compare import Check, Comparison, DesignRun
    from pgemu.trace.lowered import Lowered

__all__ = ("Sensitivity", "Trial", "compare_and_vary", "sensitivity")

_Progress = Callable[[str, int, int], None]
_TOGETHER = 4  # times the sum of what two alternatives move an answer by: the most that they move it by together


def sensitivity(comparison: Comparison, progress: _Progress | None = None) -> Sensitivity:
    """Repeat the comparison of the first two designs under every alternative that can touch it.

    :param progress: called with the rule, the alternatives tried, and all of them
    """
    designs = [known.design for known in comparison.runs]
    with Reruns(comparison.lowered, designs, comparison.versions, comparison.given) as reruns:
        return _vary(comparison, reruns, progress)


def compare_and_vary(
    lowered: Lowered,
    designs: Sequence[Design] = DESIGNS,
    check: Check = "end",
    progress: _Progress | None = None,
    versions: Versions | None = None,
    *,
    strict: bool = False,
    **given: Any,
) -> tuple[Comparison, Sensitivity]:
    """compare() of two designs and its sensitivity(): what no finding can make needless runs beside the comparison.

    Parameters and errors are theirs.
    """
    versions = versions or Versions()
    kept = {name: value for name, value in given.items() if value is not None}
    wanted = [one for rule in INFERENCES.values() if rule.untouched is may_touch for one in rule.alternatives]
    with Reruns(lowered, designs, versions, kept) as reruns:
        begun = False

        def seen(design: str, done: int, count: int) -> None:
            nonlocal begun
            if not begun:
                begun = True
                reruns.begin(wanted)
            if progress:
                progress(design, done, count)

        comparison = compare(lowered, designs, check, seen, versions, strict=strict, **given)
        return comparison, _vary(comparison, reruns, progress)


def _vary(comparison: Comparison, reruns: Reruns, progress: _Progress | None) -> Sensitivity:
    if any(known.refusal for known in comparison.runs[:2]):
        return Sensitivity((), dict.fromkeys(INFERENCES, "a version refuses the memory, and nothing ran"))
    reruns.done(comparison)
    untouched = {name: rule.untouched(comparison) for name, rule in INFERENCES.items()}
    untouched = {name: why for name, why in untouched.items() if why}
    if "host-huge" not in untouched and (few := _few_large_entries(comparison)):
        untouched["host-huge"] = few
    singles = [
        ((name,), (alternative,))
        for name, rule in INFERENCES.items()
        if name not in untouched
        for alternative in rule.alternatives
    ]
    trials: list[Trial] = []
    try:
        trials.extend(_tried(comparison, reruns, singles, progress))  # one by one: an interrupt leaves what is known
    except KeyboardInterrupt:
        return Sensitivity(tuple(trials), untouched, complete=False)
    return Sensitivity(tuple(trials), untouched)


_Wanted = tuple[tuple[str, ...], tuple[Alternative, ...]]


def _tried(
    comparison: Comparison, reruns: Reruns, singles: Sequence[_Wanted], progress: _Progress | None
) -> Iterator[Trial]:
    """Every single alternative, then the pairs; a pair begins as soon as it is known to be wanted."""
    started: deque[tuple[_Wanted, list[Future[DesignRun]]]] = deque()

    def start(wanted: _Wanted) -> None:
        with suppress(InputError):  # two alternatives that exclude each other
            started.append((wanted, reruns.start(wanted[1])))

    for one in singles:
        start(one)
    first, second = comparison.runs[:2]
    base = measure(first, second)
    turning: list[tuple[_Wanted, Mapping[str, Measure]]] = []
    left = dict(base)  # the answers that no alternative alone has turned yet
    done = 0
    while started:
        (names, alternatives), futures = started.popleft()
        runs = futures[0].result(), futures[1].result()
        done += 1
        if progress:
            progress("alternatives", done, done + len(started))
        unreached = any(alternative.unreached for alternative in alternatives)
        if runs[0] is first and runs[1] is second and not unreached:
            continue
        found = measure(*runs, unreached=unreached)
        label = " and ".join(alternative.label for alternative in alternatives)
        removed = _removed((first, second), runs) if len(alternatives) == 1 else ""
        yield Trial(" and ".join(names), label, removed, found, runs)
        if len(alternatives) == 1 and any(now.better != base[key].better for key, now in found.items()):
            left = {key: known for key, known in left.items() if found[key].better == known.better}
            for ((name,), (other,)), known in turning:
                if name != names[0] and _may_turn_more(left, known, found):
                    start(((name, *names), (other, *alternatives)))
            turning.append(((names, alternatives), found))


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
    if memory.difference is None or isinstance(memory.difference, tuple):
        return ""
    if time.better not in (0, 1) or not isinstance(time.difference, tuple):
        return ""
    enough = min(map(abs, time.difference)) > count * most and abs(memory.difference) > count * 3 * PAGE_4K
    return f"{count} host faults could have a larger entry, too few to turn an answer" if enough else ""


_Measures = Mapping[str, Measure]


def _ends(one: Measure) -> tuple[float, float]:
    """The difference as a band; where there is none, that of nothing."""
    less = 0.0 if one.difference is None else one.difference
    return less if isinstance(less, tuple) else (less, less)


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


def _removed(base: tuple[DesignRun, ...], runs: tuple[DesignRun, DesignRun]) -> str:
    """The defect that a machine had and has no longer, where now both machines zero the same."""
    if runs[0].config.zero != runs[1].config.zero:
        return ""
    gone = {name for old, new in zip(base, runs, strict=True) for name in {*old.config.defects} - {*new.config.defects}}
    return ", ".join(sorted(gone))
