"""The first screen of a comparison: who is better at what, by how much, why, and on what that rests.

At most 24 lines of 80 columns, plain text that can go into a mail.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pgemu.report.units as units
from pgemu.cost import profile
from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.verdict import Line, Measure, breaches, mapped, middle, paired
from pgemu.machine.config import PARAMETERS
from pgemu.machine.presets import LIKE, PFNMAP
from pgemu.machine.results import operation_name
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_4K, Operation
from pgemu_kernels.words.rows import SPINS

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
_COLUMNS = (18, 12, 12, 11, 12)


def screen(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> str:
    """Return the first screen."""
    found = [*_head(comparison), "", *_table(comparison, lines), ""]
    foot = list(_foot(comparison, lines, sensitivity))
    room = HEIGHT - len(found) - len(foot)
    rests, why = list(_rests(comparison, lines, sensitivity)), causes(comparison, sensitivity)
    kept = []
    first = [*_broken(comparison), *_splits(comparison)]
    for text in dict.fromkeys((*first, *rests, *_refusals(comparison), *why)):  # where room ends, the last ones go
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
    source = lowered.source.rsplit("/", 1)[-1]
    size, page = units.size(lowered.layout.inode_size), units.size(lowered.layout.page_size)
    yield from _wrapped(f"{source}: {units.count(len(lowered.records))} operations, {size} in pages of {page}")
    names = {
        "restructure": f"restructure like {versions.like} ({LIKE[versions.like].text})",
        "pfnmap": f"pfnmap {versions.pfnmap} ({PFNMAP[versions.pfnmap].text})",
    }
    yield from _wrapped("; ".join(names.get(run.design, run.design) for run in comparison.runs[:2]))
    cpus = f"{config.vcpus} vCPU{'s' * (config.vcpus > 1)}"
    yield from _wrapped(
        f"both: {config.vm} VM, memory {lowered.init} at first, {config.stage2.upper()}, {cpus}, Linux {config.kernel}"
    )
    if not len(lowered.records) - lowered.accounting.setup:
        yield from _wrapped("nothing to replay: no event of this log concerns guest memory (see --details)")
    if lowered.layout.origin == "inferred":
        yield from _wrapped("the log has no memory slots: inferred from the addresses seen (--memslot)")
    if by_hand := mixed(comparison):
        yield from _wrapped(f"mixed by hand: {by_hand}")
    for text in comparison.instead:
        yield from _wrapped(text)


def _point(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def mixed(comparison: Comparison) -> str:
    """What was given by hand and is otherwise in the versions, as the command line has it."""
    names = (*PARAMETERS, "zero", "kernel", "split_form", "zap_filter")
    changed: dict[str, str] = {}
    for run in comparison.runs:
        plain = comparison.versions.configuration(run.design, pool=run.config.pool, page_size=run.config.page_size)
        for name in names:
            value = getattr(run.config, name)
            if name == "defects" and not comparison.given.get("defects"):  # zeroing by hand takes one's place
                continue
            if name in comparison.given and value != getattr(plain, name):
                text = " ".join(value) if isinstance(value, tuple) else str(value)
                changed[name] = f"{name.replace('_', '-')} {text}"
    return ", ".join(changed.values())


# --------------------------------------------------------------------------- the answers


def value(found: float | tuple[float, float], unit: str) -> str:
    """A value or a difference as people read it."""
    if isinstance(found, tuple):
        return units.band(*found) if any(found) else "none"
    if unit == "bytes":
        return units.size(int(found))
    return f"{found:.0%}" if unit == "share" else units.count(int(found))


def answer(comparison: Comparison, found: Measure) -> str:
    """Which design is better, and by how much."""
    return " ".join(part for part in (_better(comparison, found), _by(found)) if part)


def _better(comparison: Comparison, found: Measure) -> str:
    return {None: "undecided", -1: "alike"}.get(found.better) or comparison.runs[found.better or 0].design


def _by(found: Measure) -> str:
    """By how much the better one is better: a time, or how many times."""
    if found.better in (None, -1):
        return ""
    if isinstance(found.difference, tuple):
        low, high = sorted(abs(end) for end in found.difference)
        return units.band(low, high)
    if isinstance(found.first, tuple) or isinstance(found.second, tuple) or found.unit == "share":
        return ""
    low, high = sorted((found.first, found.second))
    return f"{high / low:,.3g}x" if low and high < 1000 * low else f"{high / low:,.0f}x" if low else ""


def _table(comparison: Comparison, lines: dict[str, Line]) -> Iterator[str]:
    designs = [run.design for run in comparison.runs[:2]]
    yield _row("", *designs, "better", "by", "basis")
    yield "-" * WIDTH
    for line in lines.values():
        found = line.measure
        better, by = _better(comparison, found), _by(found)
        if line.basis.kind == "defect" and found.unit == "ns":  # what only a defect makes counts for nobody
            better, by = "neither", ""
        kind = line.basis.kind
        basis = "" if kind == "even" else kind
        cells = (value(found.first, found.unit), value(found.second, found.unit), better, by)
        yield _row(line.question, *cells, basis)


def _row(*cells: str) -> str:
    name, first, second, better, by, basis = cells
    widths = _COLUMNS
    left = f"{name:{widths[0]}} {first:>{widths[1]}} {second:>{widths[2]}}"
    return f"{left}  {better:{widths[3]}} {by:{widths[4]}} {basis}".rstrip()


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
                f"in all {units.size(event(Event.VMEMMAP_PAGE_RESTORED) * PAGE_4K)} of vmemmap allocated again, "
                f"{units.size(event(Event.STRUCT_PAGE_BYTES))} of struct pages written"
            )


def _interrupts_off(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        stores = run.statistics.peak(Gauge.STORES_IRQ_OFF)
        taken = units.band(*profile(run.config.profile)[Event.PAGE_CACHE_STORED].total(stores))
        if stores > 1:
            yield f"{run.design} has interrupts off for {units.count(stores)} stores at once, {taken} (estimate)"


def zeroes(config: Config) -> str:
    """How a first use zeroes."""
    if "uptodate-unzeroed" in config.defects:
        return "first 4K of each folio: uptodate-unzeroed"
    return {"page": "by page", "folio": "by folio"}[config.zero]


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
    faults, ends = [], []
    for run, more in zip(runs, upper, strict=True):
        counts = sorted({_faults(run), max(_faults(run), _faults(more))})
        sizes = sorted({mapped(run)[0], mapped(more)[0]})
        faults.append("-".join(map(units.count, counts)))
        ends.append("-".join(map(units.size, sizes)))
    names = [run.design for run in runs]
    bounds = " (upper: all was used that the log had mapped)" if upper is not runs else ""
    if faults[0] != faults[1]:
        yield f"guest faults that map: {names[0]} {faults[0]}, {names[1]} {faults[1]}{bounds}"
    if ends[0] != ends[1]:
        yield f"mapped in the guest at the end: {names[0]} {ends[0]}, {names[1]} {ends[1]}"
    beyond = [run.statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) * PAGE_4K for run in runs]
    if any(beyond):
        parts = [f"{run.design} {units.size(n)}" for run, n in zip(runs, beyond, strict=True)]
        yield f"zapped beyond what was converted: {', '.join(parts)}"


def _broken(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        for one in breaches(run):
            why = f"defect {', '.join(one.explained_by)}" if one.explained_by else "no defect explains it"
            name = one.rule.name.lower().replace("_", " ")
            often = f"{units.count(one.count)} {one.unit[:-1]}{'s' * (one.count != 1)}"
            if one.unit == "pages":
                yield f"{run.design} shows guest or host {name} of {often} ({why})"
            else:
                yield f"{run.design} breaks a rule {often}: {name} ({why})"


def _refusals(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        if run.refusal:
            yield f"{run.design}: {run.refusal}"
        if failed := run.statistics.event(Event.SPIN_FAILED):
            yield f"{run.design}: {units.count(failed)} conversions that would spin failed when they went on"
        if dropped := run.statistics.event(Event.SPIN_DROPPED):
            yield (
                f"{run.design}: {units.count(dropped)} conversions that would spin beyond {units.count(SPINS)} at a "
                "time were dropped, a limit of this model"
            )
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
        small = op is Operation.PUNCH_HOLE and name == "-EINVAL" and comparison.runs[0].config.punch == "refuse"
        why = ": smaller than a huge page" if small else ""
        if counts[0][1] == counts[1][1]:
            yield f"both refuse {units.count(counts[0][1])} times {operation_name(op)} ({name}{why})"
        else:
            parts = ", ".join(f"{who} {units.count(n)}" for who, n in counts)
            yield f"{operation_name(op)} is {name}: {parts}{why}"


# --------------------------------------------------------------------------- on what it rests


def _rests(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    by_rule: dict[tuple[str, str], list[str]] = {}
    alike = [line for line in lines.values() if line.measure.better == -1]
    for line in lines.values():
        if line.with_defect:
            name, whole = line.with_defect
            yield f"{_short(line)}: by how much is without {name}; with it {answer(comparison, whole)}"
    moves = list(_moves(comparison, lines, sensitivity))
    yield from moves[:1]
    for key, line in lines.items():
        if key == "broken" and line.basis.kind == "defect":  # a defect named above: without it nothing breaks
            continue
        alone = [one for one in line.basis.rules if " and " not in one[0]]
        for rule, label, better in alone or line.basis.rules:  # pairs only where no rule alone turns it
            turned = {None: "undecided", -1: "alike"}.get(better) or comparison.runs[better or 0].design
            by_rule.setdefault((rule, label), []).append(f"{_short(line)} {turned}")
    turns = {key: f"{', '.join(answers)} {_when(*key)} ({key[0]})" for key, answers in by_rule.items()}
    minor = {rule[:2] for line in alike for rule in line.basis.rules}  # they part what is alike
    yield from (text for key, text in turns.items() if key not in minor)
    yield from moves[1:]
    yield from (text for key, text in turns.items() if key in minor)


def _moves(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    """Alternatives under which the better design stays, and the difference in time is another one altogether, the
    largest change first."""
    found_moves: list[tuple[float, str]] = []
    for trial in sensitivity.trials if sensitivity else ():
        moved, ratio = [], 1.0
        for key, line in lines.items():
            found, then = line.measure, trial.measures[key]
            if found.unit != "ns" or found.better in (None, -1) or then.better != found.better:
                continue
            if line.with_defect and trial.removes != line.with_defect[0]:  # with the defect again
                then = then if trial.removes else found
            now, otherwise = middle(found.difference), middle(then.difference)
            if max(now, otherwise) >= _MOVED * min(now, otherwise):
                moved.append(f"{_short(line)}: {_better(comparison, then)} by {_by(then)}")
                ratio = max(ratio, max(now, otherwise) / max(min(now, otherwise), 1.0))
        if moved and " and " not in trial.rule:
            text = f"{', '.join(moved)} {_when(trial.rule, trial.label)} ({trial.rule})"
            found_moves.append((ratio, text))
    yield from (text for _, text in sorted(found_moves, key=lambda one: -one[0]))


def _short(line: Line) -> str:
    return line.question.split(",")[0]


def _when(rule: str, label: str) -> str:
    """An alternative as a condition."""
    if rule not in INFERENCES:  # several together, or without a defect
        return f"without {rule}" if " and " not in rule else f"with {label}"
    return next((one.when for one in INFERENCES[rule].alternatives if one.label == label), f"with {label}")


def _foot(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    """What the words of the basis mean here, and how sure the times are."""
    shares = paired(comparison.runs[0], comparison.runs[1]).shares
    tried = f"{len(sensitivity.trials)} alternatives tried" if sensitivity else "no alternatives tried"
    if sensitivity and not sensitivity.complete:
        tried += ", interrupted"
    if any(line.basis.kind == "fact" for line in lines.values()):
        yield "fact: who is better holds under all inferred rules; by how much is an estimate"
    yield from _wrapped(f"times: estimates, {shares['assumption']:.0%} by assumed prices; {tried}; more: --details")
