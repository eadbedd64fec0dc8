"""The first screen of a comparison: who is better at what, by how much, why, and on what that rests.

Of one design alone: what it has, what breaks and what is refused. At most 24 lines of 80 columns, plain text that can
go into a mail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pgemu.report.units as units
from pgemu.cost import profile
from pgemu.cost.difference import estimate
from pgemu.errors import printable
from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.verdict import QUESTIONS, Line, breaches, mapped, measure, middle, paired, without
from pgemu.machine.config import PARAMETERS
from pgemu.machine.presets import LIKE, PFNMAP
from pgemu.machine.results import operation_name
from pgemu.report.answers import WIDTH, answers_of, heads, left_out, measured, points, row, value, wrapped
from pgemu.report.devices import both_ways, did, how
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_4K, Operation
from pgemu_kernels.words.rows import SPINS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.trace.lowered import Accounting, Lowered

__all__ = ("HEIGHT", "WIDTH", "about", "causes", "mixed", "screen", "zeroes")

HEIGHT = 24
_LEVELS = "recorded-levels"
_MOST_DEFECTS = 3  # lines
_UNLIKE = 0.1  # of all of a kind, refused more often
_MOVED = 3  # times a difference that is worth a line
_NAMES, _VALUES = 18, 14  # widths of the columns for one design


def screen(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> str:
    """Return the first screen."""
    table, foot = list(_table(comparison, lines)), list(_foot(comparison, lines, sensitivity))
    head = _cut([line for text in about(comparison) for line in wrapped(text)], HEIGHT - len(table) - len(foot) - 2)
    found = [*head, "", *table, ""]
    room = HEIGHT - len(found) - len(foot)
    rests, why = list(_rests(comparison, lines, sensitivity)), causes(comparison, sensitivity)
    kept = []
    first = [*did(comparison), *both_ways(comparison, sensitivity)]
    first += [*_unlike(comparison), *_broken(comparison), *_splits(comparison), *_waits(comparison)]
    for text in dict.fromkeys((*first, *rests, *_refusals(comparison), *why)):  # where room ends, the last ones go
        needed = len(points(text))
        if needed <= room:
            kept.append(text)
            room -= needed
    for text in (*why, *rests):
        found += points(text) if text in kept else []
    found += foot
    return "\n".join(found) + "\n"


# --------------------------------------------------------------------------- what was compared


def _cut(lines: list[str], most: int) -> list[str]:
    """Lines, or as many as there is room for and a word that there are more."""
    return lines if len(lines) <= most else [*lines[: most - 1], "  ... more of what was run: --details"]


def about(comparison: Comparison) -> Iterator[str]:
    """What was compared: the trace, the versions, the machine, and what was taken to be so; a sentence each."""
    lowered, versions = comparison.lowered, comparison.versions
    config = comparison.runs[0].config
    source = printable(lowered.source.rsplit("/", 1)[-1])
    size, page = units.size(lowered.layout.inode_size), units.size(lowered.layout.page_size)
    yield f"{source}: {units.count(len(lowered.records))} operations, {size} in pages of {page}"
    yield from (f"doubtful: {doubt.text}" for doubt in lowered.doubts)
    names = {
        "restructure": f"restructure like {versions.like} ({LIKE[versions.like].text})",
        "pfnmap": f"pfnmap {versions.pfnmap} ({PFNMAP[versions.pfnmap].text})",
    }
    yield "; ".join(names.get(run.design, run.design) for run in comparison.runs[:2])
    yield from _rules_of_like(comparison)
    vm = {"stage2": config.stage2.upper(), "vcpus": f"{config.vcpus} vCPU{'s' * (config.vcpus > 1)}"}
    told = "".join(f", {text}" for name, text in vm.items() if name not in comparison.assumed)
    both = "both: " if len(comparison.runs) > 1 else ""
    guessed = f" (assumed: {', '.join(vm[name] for name in comparison.assumed)})" if comparison.assumed else ""
    yield f"{both}{config.vm} VM, memory {lowered.init} at first{told}, Linux {config.kernel}{guessed}"
    yield from how(comparison)
    yield from _defects(comparison)
    if parts := list(_left_out(lowered.accounting, lowered.notes)):
        yield f"left out: {', '.join(parts)} (--details)"
    if not len(lowered.records) - lowered.accounting.setup:
        yield "nothing to replay: no event of this log concerns guest memory (see --details)"
    if lowered.layout.origin == "inferred":
        yield f"{_recording(lowered)} has no memory slots: inferred from the addresses seen (--memslot)"
    yield from lowered.notes
    if by_hand := mixed(comparison, defects=False):  # those are in the line above
        yield f"mixed by hand: {by_hand}"
    if idle := comparison.without_effect.options:
        yield f"without effect here: {', '.join('--' + name.replace('_', '-') for name in idle)}"
    yield from comparison.instead


def _recording(lowered: Lowered) -> str:
    return "the table" if lowered.table else "the log"


def _left_out(accounting: Accounting, notes: Sequence[str]) -> Iterator[str]:
    """What the log lost, what of it is not known, and inputs that no note says why they ask nothing of guest memory."""
    if accounting.lost:
        yield f"{units.count(accounting.lost)} event{'s' * (accounting.lost > 1)} lost by the ring buffer"
    if unknown := accounting.unknown.most_common(2):
        names = ", ".join(f"{units.count(n)} {printable(name)}" for name, n in unknown)
        more = f", {len(accounting.unknown) - 2} more names" if len(accounting.unknown) > 2 else ""
        yield f"not known {names}{more}"
    said = " ".join(notes)
    others = sum(n for reason, n in accounting.without_operation.items() if reason not in said)
    if others:
        yield f"{units.count(others)} input{'s' * (others > 1)} not of guest memory"


def _rules_of_like(comparison: Comparison) -> Iterator[str]:
    """What a design has of a version of restructure that is not there to be seen."""
    versions = comparison.versions
    if any(run.design == "restructure" for run in comparison.runs[:2]):
        return
    rules = [f"{name} {value}" for name, value in LIKE[versions.like].common.items() if name not in comparison.given]
    if rules:
        yield f"as {versions.like} has it (--like): {', '.join(rules)}"


def _defects(comparison: Comparison) -> Iterator[str]:
    """The mistakes that the machines have, and those that change nothing here."""
    active, idle = [], []
    for run in comparison.runs[:2]:
        without = comparison.without_effect.defects.get(run.design, ())
        if names := [name for name in run.config.defects if name not in without]:
            active.append(f"{run.design} {', '.join(names)}")
        if without:
            idle.append(f"{run.design} {', '.join(without)}")
    parts = [*active, f"without effect here: {'; '.join(idle)}"] if idle else active
    text = f"defects: {'; '.join(parts)}"
    if len(wrapped(text)) > _MOST_DEFECTS:
        counts = ", ".join(f"{run.design} {len(run.config.defects)}" for run in comparison.runs[:2])
        text = f"defects: {counts}; their names: --details"
    if parts:
        yield text


def mixed(comparison: Comparison, *, defects: bool = True) -> str:
    """What was given by hand and is otherwise in the versions, as the command line has it."""
    names = [*PARAMETERS, "zero", "kernel", "split_form", "zap_filter"]
    if not defects:
        names.remove("defects")
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


def _designs(comparison: Comparison) -> list[str]:
    return [run.design for run in comparison.runs[:2]]


def _table(comparison: Comparison, lines: dict[str, Line]) -> Iterator[str]:
    if len(comparison.runs) == 1:
        yield from _values(comparison.runs[0])
        return
    designs = _designs(comparison)
    yield from heads(designs)
    for answer in answers_of(lines, designs).values():
        yield row(answer.question, *answer.cells)


def _values(run: DesignRun) -> Iterator[str]:
    """What one design has: no verdict without another one."""
    yield f"{'':{_NAMES}} {run.design:>{_VALUES}}"
    yield "-" * (_NAMES + _VALUES + 1)
    for key, found in measure(run, run).items():
        yield f"{QUESTIONS[key].text:{_NAMES}} {value(found.first, found.unit):>{_VALUES}}"


# --------------------------------------------------------------------------- why


def causes(comparison: Comparison, sensitivity: Sensitivity | None = None) -> list[str]:
    """One sentence per cause of what differs, or of what one design has, and what is refused or breaks."""
    if all(run.refusal for run in comparison.runs[:2]):  # nothing ran
        return list(_refusals(comparison))
    return [
        *did(comparison),
        *both_ways(comparison, sensitivity),
        *_unlike(comparison),
        *_broken(comparison),
        *_splits(comparison),
        *_waits(comparison),
        *_zeroing(comparison),
        *_levels(comparison, sensitivity),
        *_refusals(comparison),
        *_interrupts_off(comparison),
    ]


def _unlike(comparison: Comparison) -> Iterator[str]:
    """Kinds of which one design refuses many more: then times are of refusals on one side, of work on the other."""
    if len(comparison.runs) < 2:
        return
    runs = comparison.runs[:2]
    for op, what in ((Operation.CONVERT, "conversions"), (Operation.GUEST_FAULT, "guest faults")):
        found = [run.operation(op) for run in runs]
        counts = [one.count if one else 0 for one in found]
        failed = [_failed(one.outcomes) if one else 0 for one in found]
        shares = [part / whole if whole else 0.0 for part, whole in zip(failed, counts, strict=True)]
        if abs(shares[0] - shares[1]) >= _UNLIKE:
            each = [f"{units.count(part)} of {units.count(whole)}" for part, whole in zip(failed, counts, strict=True)]
            yield f"times of {what} are of unlike work, refused are: {_each(runs, each)}"


def _failed(outcomes: Mapping[str, int]) -> int:
    return sum(n for name, n in outcomes.items() if name.startswith("-") or name == "would spin")


def _splits(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        event = run.statistics.event
        splits, merges = event(Event.FOLIO_SPLIT), event(Event.FOLIO_MERGED)
        if splits:
            merged = f", merges {units.count(merges)}" if merges else ""
            restored = units.size(event(Event.VMEMMAP_PAGE_RESTORED) * PAGE_4K)
            folios = f"{units.count(splits)} folio{'s' * (splits != 1)}"
            yield f"{run.design} splits {folios}{merged}: {restored} of vmemmap restored"


def _waits(comparison: Comparison) -> Iterator[str]:
    """Waits for RCU where they make most of a difference in time: HVO waits before it restores or frees a vmemmap."""
    if len(comparison.runs) < 2:
        return
    first, second = comparison.runs[:2]
    found: dict[str, list[str]] = {}
    for op, what in ((Operation.CONVERT, "conversions"), (Operation.GUEST_FAULT, "guest faults")):
        events = paired(first, second, op).events
        waited = next((one for one in events if one.event is Event.RCU_SYNCHRONIZED), None)
        if waited and 2 * waited.size >= sum(one.size for one in events):
            run = second if waited.units > 0 else first
            times = units.count(run.statistics.event(Event.RCU_SYNCHRONIZED, op))
            found.setdefault(run.design, []).append(f"{times} time{'s' * (times != '1')} in {what}")
    for design, counts in found.items():
        yield f"most of the difference: {design} waits for RCU (HVO) {', '.join(counts)}"


def _interrupts_off(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        stores = run.statistics.peak(Gauge.STORES_IRQ_OFF)
        taken = units.band(*profile(run.config.profile)[Event.PAGE_CACHE_STORED].total(stores))
        if stores > 1:
            yield f"{run.design} has interrupts off for {units.count(stores)} stores at once, {taken} (estimate)"


def zeroes(run: DesignRun, comparison: Comparison) -> str:
    """How a first use zeroes; a defect that changes nothing on this trace is not what makes it do so."""
    config = run.config
    defects = {*config.defects} - {*comparison.without_effect.defects.get(run.design, ())}
    if "uptodate-unzeroed" in defects and config.zero == "folio":
        return "first 4K of each folio: uptodate-unzeroed"
    return {"page": "by page", "folio": "by folio"}[config.zero]


def _zeroed(run: DesignRun) -> int:
    return (run.statistics.event(Event.PAGE_ZEROED) + run.statistics.event(Event.FOLIO_ZEROED_PAGES)) * PAGE_4K


def _zeroing(comparison: Comparison) -> Iterator[str]:
    runs = comparison.runs[:2]
    zeroed = [_zeroed(run) for run in runs]
    if _tells(zeroed):
        parts = [
            f"{run.design} {units.size(n)} ({zeroes(run, comparison)})" for run, n in zip(runs, zeroed, strict=True)
        ]
        yield f"zeroed: {', '.join(parts)}"


def _tells(values: list[Any]) -> bool:
    """Whether values of the designs are worth a line: they differ, or there is one design alone."""
    return len(values) == 1 or values[0] != values[1]


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
    bounds = f" (upper: all was used that {_recording(comparison.lowered)} had mapped)" if upper is not runs else ""
    if _tells(faults):
        yield f"guest faults that map: {_each(runs, faults)}{bounds}"
    if _tells(ends):
        yield f"mapped in the guest at the end: {_each(runs, ends)}"
    beyond = [run.statistics.event(Event.SPTE_PAGES_BEYOND, Operation.CONVERT) * PAGE_4K for run in runs]
    if any(beyond):
        yield f"zapped beyond what was converted: {_each(runs, list(map(units.size, beyond)))}"


def _each(runs: Sequence[DesignRun], values: list[str]) -> str:
    return ", ".join(f"{run.design} {text}" for run, text in zip(runs, values, strict=True))


def _broken(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs[:2]:
        for one in breaches(run, comparison.without_effect.defects.get(run.design, ())):
            why = " or ".join(one.explained_by) if one.explained_by else "no defect explains it"
            name = one.rule.name.lower().replace("_", " ")
            often = f"{units.count(one.count)} {one.unit[:-1]}{'s' * (one.count != 1)}"
            if one.unit == "uses":
                why = "allow_unsafe_mappings" if run.config.allow_unsafe_mappings else why
                yield f"pages that KVM maps: {run.design} makes {often} of a {name} ({why})"
            elif one.unit == "pages":
                yield f"{run.design} shows {name} of {often} ({why})"
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
        runs = comparison.runs[:2]
        counts = [found.outcomes.get(name, 0) if (found := run.operation(op)) else 0 for run in runs]
        small = op is Operation.PUNCH_HOLE and name == "-EINVAL" and runs[0].config.punch == "refuse"
        why = ": smaller than a huge page" if small else ""
        if len(set(counts)) == 1:
            who = "both refuse" if len(runs) > 1 else f"{runs[0].design} refuses"
            yield f"{who} {units.count(counts[0])} times {operation_name(op)} ({name}{why})"
        else:
            yield f"{operation_name(op)} is {name}: {_each(runs, list(map(units.count, counts)))}{why}"


# --------------------------------------------------------------------------- on what it rests


def _rests(comparison: Comparison, lines: dict[str, Line], sensitivity: Sensitivity | None) -> Iterator[str]:
    by_rule: dict[tuple[str, str], list[str]] = {}
    alike = [line for line in lines.values() if line.measure.better == -1]
    for line in lines.values():
        if line.with_defect:
            name, whole = line.with_defect
            then = measured(whole, _designs(comparison))
            second = name in comparison.runs[1].config.defects
            has = value(whole.second if second else whole.first, whole.unit)
            yield f"{_short(line)} with {name}: {has}, {then.said} by {then.by}"
    moves = list(_moves(comparison, lines, sensitivity))
    yield from moves[:1]
    for key, line in lines.items():
        if line.basis.kind == "untested" and line.basis.rules:
            names = [rule for rule, *_ in line.basis.rules]
            on = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} on"
            yield f"{_short(line)} untested: {on} and may make the difference"
            continue
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
                otherwise_found = measured(then, _designs(comparison))
                moved.append(f"{_short(line)}: {otherwise_found.said} by {otherwise_found.by}")
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
    if len(comparison.runs) == 1:
        run = comparison.runs[0]
        config = run.config
        shares = estimate(run.statistics, config.profile, config.vcpus, config.host_cpus).shares
        share = units.share(shares["assumption"])
        yield from left_out(without(run, run).values())
        yield from wrapped(f"one design, no verdict; times: estimates, {share} by assumed prices; more: --details")
        return
    shares = paired(comparison.runs[0], comparison.runs[1]).shares
    tried = f"{len(sensitivity.trials)} alternatives tried" if sensitivity else "no alternatives tried"
    if sensitivity and not sensitivity.complete:
        tried += ", interrupted"
    yield from left_out(line.without for line in lines.values())
    if any(line.basis.kind == "fact" for line in lines.values()):
        yield "fact: who is better holds under all inferred rules; by: priced event by event"
    share = units.share(shares["assumption"])
    yield from wrapped(f'times: estimates; of "by" {share} is assumed; {tried}; more: --details')
