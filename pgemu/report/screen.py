"""The first screen of a comparison: who is better at what, by how much, why, and on what that rests.

At most 24 lines of 80 columns, plain text that can go into a mail.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from pgemu.cost import profile
from pgemu.experiments.verdict import Line, Measure, mapped, paired
from pgemu.machine.config import PARAMETERS
from pgemu.machine.presets import LIKE
from pgemu.machine.results import operation_name
from pgemu.report import units
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_4K, Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.machine.config import Config

__all__ = ("HEIGHT", "WIDTH", "answer", "causes", "mixed", "screen", "value", "zeroes")

WIDTH = 80
HEIGHT = 24
_LEVELS = "recorded-levels"
_MOVED = 3  # times a difference that is worth a line
_COLUMNS = (21, 12, 12, 22, 9)


def screen(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> str:
    """Return the first screen."""
    found = [*_head(comparison), "", *_table(comparison, lines), ""]
    foot = _wrapped(_foot(comparison, lines, sensitivity))
    room = HEIGHT - len(found) - len(foot)
    rests, why = list(_rests(comparison, lines, sensitivity)), causes(comparison, sensitivity)
    kept = []
    first = [*_broken(comparison), *_splits(comparison)]
    for text in dict.fromkeys((*first, *rests, *why)):  # where there is no room for all, the last ones go
        wrapped = _point(text)
        if len(wrapped) <= room:
            kept.append(text)
            room -= len(wrapped)
    for text in (*why, *rests):
        found += _point(text) if text in kept else []
    found += foot
    return "\n".join(found) + "\n"


# --------------------------------------------------------------------------- what was compared


def _head(comparison: Comparison) -> Iterator[str]:
    lowered, versions = comparison.lowered, comparison.versions
    config = comparison.runs[0].config
    size = units.size(lowered.layout.inode_size)
    yield from _wrapped(
        f"{lowered.source}: {units.count(len(lowered.records))} operations on {size} in pages of "
        f"{units.size(lowered.layout.page_size)}, all {lowered.init} at first"
    )
    names = [
        {"restructure": f"restructure like {versions.like}", "pfnmap": f"pfnmap {versions.pfnmap}"}.get(
            run.design, run.design
        )
        for run in comparison.runs[:2]
    ]
    cpus = f"{config.vcpus} vCPU{'s' * (config.vcpus > 1)}"
    yield from _wrapped(f"{' and '.join(names)}; Linux {config.kernel}, {config.stage2.upper()}, {cpus}")
    if versions.like == "jan2026":
        yield from _wrapped(f"{versions.like}: {LIKE[versions.like].text}")
    if by_hand := mixed(comparison):
        yield from _wrapped(f"mixed by hand: {by_hand}")
    for text in comparison.instead:
        yield from _wrapped(text)


def _point(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def mixed(comparison: Comparison) -> str:
    """What was given by hand and is otherwise in the versions, as the command line has it."""
    names = (*PARAMETERS, "zero", "kernel", "split_form", "zap_filter")
    changed: dict[str, str] = {}
    for run in comparison.runs:
        plain = comparison.versions.configuration(run.design, pool=run.config.pool, page_size=run.config.page_size)
        for name in names:
            value = getattr(run.config, name)
            if name in comparison.given and value != getattr(plain, name):
                text = " ".join(value) if isinstance(value, tuple) else str(value)
                changed[name] = f"{name.replace('_', '-')} {text}"
    return ", ".join(changed.values())


# --------------------------------------------------------------------------- the answers


def value(found: float | tuple[float, float], unit: str) -> str:
    """A value or a difference as people read it."""
    if isinstance(found, tuple):
        return units.band(*found)
    if unit == "bytes":
        return units.size(int(found))
    return f"{found:.0%}" if unit == "share" else units.count(int(found))


def answer(comparison: Comparison, found: Measure) -> str:
    """Which design is better, and by how much."""
    if found.better is None:
        return "-"
    if found.better == -1:
        return "alike"
    design = comparison.runs[found.better].design
    if isinstance(found.difference, tuple):
        low, high = sorted(abs(end) for end in found.difference)
        return f"{design} {units.band(low, high)}"
    if isinstance(found.first, tuple) or isinstance(found.second, tuple) or found.unit == "share":
        return design
    low, high = sorted((found.first, found.second))
    return f"{design} {high / low:,.3g} times" if low else design


def _answer(comparison: Comparison, line: Line) -> str:
    """The same of a line: a difference that only a defect makes counts for nobody, but for what breaks."""
    if line.basis.kind == "defect" and line.measure.unit == "ns":
        return "neither"
    return answer(comparison, line.measure)


def _table(comparison: Comparison, lines: dict[str, Line]) -> Iterator[str]:
    designs = [run.design for run in comparison.runs[:2]]
    yield _row("", *designs, "better, by", "basis")
    yield "-" * WIDTH
    for line in lines.values():
        found = line.measure
        cells = (value(found.first, found.unit), value(found.second, found.unit), _answer(comparison, line))
        yield _row(line.question, *cells, line.basis.kind)


def _row(*cells: str) -> str:
    name, first, second, by, basis = cells
    widths = _COLUMNS
    text = f"{name:{widths[0]}} {first:>{widths[1]}} {second:>{widths[2]}} {by:>{widths[3]}} {basis}"
    return text.rstrip()


# --------------------------------------------------------------------------- why


def causes(comparison: Comparison, sensitivity: Sensitivity | None = None) -> list[str]:
    """One sentence per cause of what differs, and what both refuse or break."""
    if len(comparison.runs) < 2:
        return []
    first, second = comparison.runs[:2]
    return [
        *_broken(comparison),
        *_splits(comparison),
        *_zeroing(first, second),
        *_levels(comparison, sensitivity),
        *_refusals(comparison),
        *_interrupts_off(comparison),
    ]


def _splits(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        event = run.statistics.event
        splits, merges = event(Event.FOLIO_SPLIT), event(Event.FOLIO_MERGED)
        if splits:
            merged = f" and merges {units.count(merges)}" if merges else ""
            yield (
                f"{run.design} splits {units.count(splits)} huge folio{'s' * (splits != 1)}{merged}: "
                f"{units.size(event(Event.VMEMMAP_PAGE_RESTORED) * PAGE_4K)} of vmemmap come back, "
                f"{units.size(event(Event.STRUCT_PAGE_BYTES))} of struct pages written, and the guest has 4K leaves "
                "there"
            )


def _interrupts_off(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        stores = run.statistics.peak(Gauge.STORES_IRQ_OFF)
        taken = units.band(*profile(run.config.profile)[Event.PAGE_CACHE_STORED].total(stores))
        if stores:
            yield f"{run.design} has interrupts off for {units.count(stores)} stores at once, {taken} (estimate)"


def zeroes(config: Config) -> str:
    """How a first use zeroes."""
    return "uptodate-unzeroed" if "uptodate-unzeroed" in config.defects else f"by {config.zero}"


def _zeroed(run: DesignRun) -> int:
    return (run.statistics.event(Event.PAGE_ZEROED) + run.statistics.event(Event.FOLIO_ZEROED_PAGES)) * PAGE_4K


def _zeroing(first: DesignRun, second: DesignRun) -> Iterator[str]:
    zeroed = [_zeroed(run) for run in (first, second)]
    if zeroed[0] != zeroed[1]:
        parts = [
            f"{run.design} {units.size(n)} ({zeroes(run.config)})"
            for run, n in zip((first, second), zeroed, strict=True)
        ]
        yield f"zeroed: {', '.join(parts)}"


def _faults(run: DesignRun) -> int:
    found = run.operation(Operation.GUEST_FAULT)
    return found.outcomes.get("RET_PF_FIXED", 0) if found else 0


def _levels(comparison: Comparison, sensitivity: Sensitivity | None) -> Iterator[str]:
    """Faults that map, and what is mapped at the end: of a log the lower and the upper bound, see recorded.py."""
    runs = comparison.runs[:2]
    upper = next((one.runs for one in (sensitivity.trials if sensitivity else ()) if one.rule == _LEVELS), runs)
    parts = []
    for run, more in zip(runs, upper, strict=True):
        faults = sorted({_faults(run), max(_faults(run), _faults(more))})
        ends = sorted({mapped(run)[0], mapped(more)[0]})
        parts.append(f"{run.design} {'-'.join(map(units.count, faults))}, {'-'.join(map(units.size, ends))}")
    if parts[0].removeprefix(runs[0].design) != parts[1].removeprefix(runs[1].design):
        yield f"guest faults that map, and mapped at the end: {'; '.join(parts)}"
    beyond = [run.statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) * PAGE_4K for run in runs]
    if any(beyond):
        parts = [f"{run.design} {units.size(n)}" for run, n in zip(runs, beyond, strict=True)]
        yield f"dropped from stage 2 beyond what was converted: {', '.join(parts)}"


def _broken(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        for rule in run.finding.rules if run.finding else ():
            why = f"defect {', '.join(rule.explained_by)}" if rule.explained_by else "no defect explains it"
            name = rule.rule.name.lower().replace("_", " ")
            yield f"{run.design} breaks a rule: {units.count(rule.count)} times {name} ({why})"


def _refusals(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        if run.refusal:
            yield f"{run.design}: {run.refusal}"
    names = {
        (operation.operation, name)
        for run in comparison.runs[:2]
        for operation in run.operations
        for name in operation.outcomes
        if name.startswith("-") or name == "would spin"
    }
    for op, name in sorted(names):
        counts: list[tuple[str, int]] = []
        for run in comparison.runs[:2]:
            found = run.operation(op)
            counts.append((run.design, found.outcomes.get(name, 0) if found else 0))
        if counts[0][1] == counts[1][1]:
            yield f"both: {units.count(counts[0][1])} times {operation_name(op)} is {name}"
        else:
            yield f"{operation_name(op)} is {name}: " + ", ".join(f"{who} {units.count(n)}" for who, n in counts)


# --------------------------------------------------------------------------- on what it rests


def _rests(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    by_rule: dict[tuple[str, str], list[str]] = {}
    for line in lines.values():
        alone = [one for one in line.basis.rules if " and " not in one[0]]
        for rule, label, better in alone or line.basis.rules:  # pairs only where no rule alone turns it
            turned = {None: "undecided", -1: "alike"}.get(better) or comparison.runs[better or 0].design
            by_rule.setdefault((rule, label), []).append(f"{line.question} {turned}")
    for (rule, label), answers in by_rule.items():
        yield f"rests on {rule}; with {label}: {'; '.join(answers)}"
    yield from _moves(comparison, lines, sensitivity)


def _moves(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    """Alternatives under which the better design stays, and the difference in time is another one altogether."""
    for trial in sensitivity.trials if sensitivity else ():
        moved = []
        for key, line in lines.items():
            found, then = line.measure, trial.measures[key]
            if found.unit != "ns" or found.better in (None, -1) or then.better != found.better:
                continue
            now, otherwise = _middle(found.difference), _middle(then.difference)
            if max(now, otherwise) >= _MOVED * min(now, otherwise):
                moved.append(f"{line.question} {answer(comparison, then)}")
        if moved and " and " not in trial.rule:
            yield f"with {trial.rule} {trial.label}: {'; '.join(moved)}"


def _middle(band: float | tuple[float, float]) -> float:
    return abs(sum(band)) / 2 if isinstance(band, tuple) else abs(band)


def _foot(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> str:
    shares = paired(comparison.runs[0], comparison.runs[1]).shares
    tried = f"{len(sensitivity.trials)} alternatives tried" if sensitivity else "no alternatives tried"
    if sensitivity and not sensitivity.complete:
        tried += ", interrupted"
    return f"estimates, {shares['assumption']:.0%} of prices assumed; {tried}; all numbers: --details"
