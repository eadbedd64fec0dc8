"""The tables of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

import pgemu.report.units as units
from pgemu.errors import printable
from pgemu.experiments.metrics import METRICS, Metric
from pgemu.machine.presets import LIKE, PFNMAP
from pgemu.machine.results import operation_name
from pgemu.report.limits import limits_of
from pgemu.report.screen import mixed, zeroes
from pgemu.report.sources import METRIC_SOURCES, OPERATION_SOURCES, TAGS, Source, sources_of
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.trace.lowered import Lowered

__all__ = (
    "checks",
    "limit_sources",
    "limits",
    "machine",
    "memory_slots",
    "operation_sources",
    "outcomes",
    "prices",
    "state",
    "state_sources",
    "tags",
    "times",
    "trace",
    "worst",
)


def _titled(title: str, table: Table) -> Group:
    return Group(Text(title, style="bold"), table)


def _table(*columns: str, right: Iterable[str] = (), fold: Iterable[str] = ()) -> Table:
    """An empty table; columns keep their width, but for those that `fold`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column not in fold
        )
    return table


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{units.count(n)} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))


def trace(lowered: Lowered) -> Table:
    """What was read, and how it was laid over guest_memfd."""
    accounting, layout = lowered.accounting, lowered.layout
    totals = {name: getattr(accounting, name).total() for name in ("inputs", "outcomes", "ignored", "unknown")}
    rows = [
        ("trace", printable(lowered.source)),
        (
            "events",
            f"{units.count(accounting.events)}: {', '.join(f'{units.count(n)} {k}' for k, n in totals.items())}",
        ),
    ]
    if accounting.unknown:
        rows.append(("unknown", _listing(accounting.unknown)))
    if accounting.skipped:
        rows.append(("skipped", _listing(accounting.skipped)))
    if accounting.lost:
        rows.append(("lost", f"{units.count(accounting.lost)} events, dropped by the ring buffer"))
    rows.append(("operations", f"{units.count(len(lowered.records))}, of them {accounting.setup} to set memory up"))
    if accounting.without_operation:
        rows.append(("not guest_memfd's", _listing(accounting.without_operation)))
    rows += [("note", text) for text in lowered.notes]
    private = lowered.private_because
    inferred = private or "the trace neither converts nor has private guest faults"
    why = f"inferred: {inferred}" if lowered.init == ("private" if private else "shared") else "as asked for"
    rows += [
        ("guest_memfd", f"{units.size(layout.inode_size)} in huge pages of {units.size(layout.page_size)}"),
        ("at first", f"all {lowered.init}, {why}"),
    ]
    return _facts(rows)


_ORIGINS = {
    "trace": "as the trace's slot lines leave them at the end",
    "inferred": "the trace has no slot lines: inferred from the guest addresses seen",
    "given": "as given with --memslot or --memslots-from",
    "workload": "of the workload",
}


def memory_slots(lowered: Lowered) -> Group:
    """Memory slots, where each lies in the guest_memfd, and those that it cannot back."""
    layout = lowered.layout
    origin = _ORIGINS.get(layout.origin, layout.origin)
    if lowered.table:
        origin = origin.replace("slot lines", "slot rows").replace("the trace", "the table")
    numbers = ("GPA", "size", "offset", "host address")
    table = _table(*numbers, "", right=numbers, fold=("",))
    for slot in layout.slots:
        table.add_row(f"{slot.gpa:#x}", units.size(slot.size), f"{slot.offset:#x}", f"{slot.hva:#x}", "")
    for refused in layout.refused:
        table.add_row(f"{refused.gpa:#x}", units.size(refused.size), "-", "-", Text(f"left out: {refused.reason}"))
    return _titled(f"Memory slots, {origin}", table)


def machine(comparison: Comparison) -> Table:
    """What the machines are made of, and how they were checked."""
    config = comparison.runs[0].config
    cpus = f"{config.vcpus} vCPU{'s' * (config.vcpus > 1)}, {config.host_cpus} host CPU{'s' * (config.host_cpus > 1)}"
    text = (
        f"Linux {config.kernel}, {config.stage2.upper()}, HVO {'on' if config.hvo else 'off'}, {config.vm} VM, {cpus}"
    )
    zeroing = ", ".join(f"{run.design} {zeroes(run, comparison)}" for run in comparison.runs)
    checked = {"end": "at the end", "every": "after every operation and at the end"}
    when = checked.get(str(comparison.check), f"every {comparison.check} operations and at the end")
    result = "broken, see below" if any(run.finding for run in comparison.runs) else "none broken"
    stale = [run.design for run in comparison.runs if run.statistics.event(Event.STALE_PAGE_SHOWN) and not run.finding]
    if stale:  # by leaves that are gone
        result += f" any more, stale contents were shown by {', '.join(stale)}"
    rows = [
        ("machine", text),
        ("assumed", ", ".join(comparison.assumed)),
        *_versions(comparison),
        ("zeroing", zeroing),
        ("by hand", mixed(comparison)),
        ("defects", "; ".join(f"{run.design} {', '.join(run.config.defects) or 'none'}" for run in comparison.runs)),
        ("invariants", f"checked {when}: {result}"),
    ]
    return _facts(row for row in rows if row[1])


def _versions(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Which version of each design, where it can be read, and which of its mistakes are mended here."""
    versions = comparison.versions
    like, pfnmap = LIKE[versions.like], PFNMAP[versions.pfnmap]
    designs = [run.design for run in comparison.runs]
    if "restructure" in designs:
        yield "restructure", f"{versions.like}: {like.text} ({like.source})"
        yield "mended", "" if versions.as_posted else ", ".join(like.fixed)
    if "pfnmap" in designs:
        yield "pfnmap", f"{versions.pfnmap}: {pfnmap.text} ({pfnmap.source})"


def outcomes(comparison: Comparison) -> Group:
    """How often each kind of operation returned what, designs side by side."""
    designs = [run.design for run in comparison.runs]
    table = _table("operation", "result", *designs, right=designs)
    for op in Operation:
        runs = [run.operation(op) for run in comparison.runs]
        names = list(dict.fromkeys(name for run in runs if run for name in run.outcomes))
        for row, name in enumerate(names):
            counts = [units.count(run.outcomes.get(name, 0)) if run else "0" for run in runs]
            table.add_row(operation_name(op) if row == 0 else "", name, *counts, end_section=row == len(names) - 1)
    total = [units.count(run.count) for run in comparison.runs]
    table.add_row("all", "", *total)
    return _titled("What every operation returned", table)


def times(comparison: Comparison) -> Group:
    """Estimated kernel time of each kind of operation, and what part of it rests on assumed prices."""
    columns = ("mean", "p99", "worst", "in all")
    table = _table("operation", "design", *columns, right=columns)
    for op in Operation:
        runs = [(run.design, run.operation(op)) for run in comparison.runs]
        name = operation_name(op)
        for design, run in runs:
            if run is None:
                continue
            bands = (units.band(*band) for band in (run.mean, run.p99, run.worst, run.total))
            table.add_row(name, design, *bands, end_section=design == runs[-1][0])
            name = ""
    name = "all"
    for design_run in comparison.runs:
        totals = [run.total for run in design_run.operations]
        whole = units.band(sum(low for low, _ in totals), sum(high for _, high in totals))
        table.add_row(name, design_run.design, "", "", "", whole)
        name = ""
    whole_table = _titled("Kernel time per operation: an estimate, from the prices of --sources", table)
    return Group(
        whole_table,
        Text(),
        _titled("What part of it is assumed prices, the rest measured or published", _assumed(comparison)),
    )


def worst(comparison: Comparison) -> Group:
    """Which operation of each kind took the most, when, and most of it for what."""
    from pgemu.experiments.compare import explained

    found = explained(comparison)
    columns = ("record", "at", "takes")
    table = _table("operation", "design", *columns, "most of it", right=columns, fold=("most of it",))
    start = int(comparison.lowered.records.time[0]) if len(comparison.lowered.records) else 0
    for op in Operation:
        name = operation_name(op)
        for run in comparison.runs:
            one = found[run.design].get(op)
            if one is None:
                continue
            cells = (units.count(one.record), units.band(one.time - start, one.time - start), units.band(*one.cost))
            largest = one.largest
            part = f"{largest.event.name.lower()} {units.band(*largest.band)}" if largest else "-"
            table.add_row(name, run.design, *cells, part)
            name = ""
    return _titled("The operation of each kind that takes the most", table)


def _assumed(comparison: Comparison) -> Table:
    from pgemu.cost.difference import estimate

    designs = [run.design for run in comparison.runs]
    table = _table("operation", *designs, right=designs)
    for op in (*Operation, None):
        if op is not None and not any(run.operation(op) for run in comparison.runs):
            continue
        cells = []
        for run in comparison.runs:
            config = run.config
            found = estimate(run.statistics, config.profile, config.vcpus, config.host_cpus, op)
            cells.append(units.share(found.shares["assumption"]))
        table.add_row("all" if op is None else operation_name(op), *cells)
    return table


def state(comparison: Comparison) -> Group:
    """Levels, memory, writes and flushes, designs side by side; then what remains when the VMM is gone."""
    runs = comparison.runs
    designs = [run.design for run in runs]
    table = _table("", *designs, right=designs)
    for group, metrics in groupby(METRICS, key=lambda metric: metric.group):
        table.add_row(Text(group, style="bold"))
        for metric in metrics:
            write = units.size if metric.unit == "bytes" else units.count
            table.add_row(f"  {metric.label}", *(write(metric.value(run.statistics)) for run in runs))
    table.add_section()
    table.add_row(Text("After the VMM is gone", style="bold"))
    rows = {
        "closing returned": [run.end_of_life.outcome for run in runs],
        "and took (estimate)": [units.band(*run.end_of_life.cost) for run in runs],
        "huge pages back in the pool": [_back(run) for run in runs],
        "vmemmap": [units.size(run.end_of_life.vmemmap) for run in runs],
    }
    for label, cells in rows.items():
        table.add_row(f"  {label}", *cells)
    return _titled("As the trace leaves the machine", table)


def _back(run: DesignRun) -> str:
    return f"{units.count(run.end_of_life.pool_free)} of {units.count(run.end_of_life.pool)}"


def limits(comparison: Comparison) -> Group:
    """What the compared designs cannot do, whatever the trace."""
    table = _table("design", "limit", fold=("limit",))
    for run in comparison.runs:
        for row, limit in enumerate(limits_of(run.design)):
            last = row == len(limits_of(run.design)) - 1
            table.add_row(run.design if row == 0 else "", Text(limit.text), end_section=last)
    return _titled("What each design cannot do", table)


# --------------------------------------------------------------------------- sources


def _breakable(function: str) -> Text:
    """file:symbol with a place to break the line."""
    return Text(function.replace(".c:", ".c: ").replace(".h:", ".h: "))


def _source_rows(table: Table, name: str, design: str, sources: Iterable[Source]) -> None:
    for source in sources:
        table.add_row(name, design, source.tag, _breakable(source.function))
        name = design = ""


def _source_table(row: str) -> Table:
    return _table(row, "design", "", "models", fold=(row, "models"))


def operation_sources(comparison: Comparison) -> Group:
    """The kernel function behind each operation of each design."""
    table = _source_table("operation")
    for op, by_design in OPERATION_SOURCES.items():
        for row, run in enumerate(comparison.runs):
            _source_rows(table, "" if row else operation_name(op), run.design, sources_of(by_design, run.design))
    return _titled("Sources: operations", table)


def state_sources(comparison: Comparison) -> Group:
    """The kernel function behind each row of the state; neighbours with the same sources share a row."""
    table = _source_table("row")
    designs = [run.design for run in comparison.runs]

    def key(metric: Metric) -> tuple[Any, ...]:
        return metric.group, *(sources_of(METRIC_SOURCES[metric.key], design) for design in designs)

    for (group, *sources), metrics in groupby(METRICS, key=key):
        name = f"{group}: {', '.join(metric.label for metric in metrics)}"
        if len(set(sources)) == 1:
            _source_rows(table, name, "all", sources[0])
            continue
        for row, design in enumerate(designs):
            _source_rows(table, "" if row else name, design, sources[row])
    return _titled("Sources: state", table)


def limit_sources(comparison: Comparison) -> Group:
    """The kernel function behind each limit."""
    table = _table("design", "limit", "", "because of", fold=("limit", "because of"))
    for run in comparison.runs:
        for row, limit in enumerate(limits_of(run.design)):
            table.add_row("" if row else run.design, Text(limit.text), limit.tag, _breakable(limit.function))
    return _titled("Sources: limits", table)


def prices(comparison: Comparison) -> Group:
    """What each event is priced at, and why."""
    from pgemu import cost

    config = comparison.runs[0].config
    table = _table("event", "fixed", "each", "source", fold=("source",))
    for event in Event:
        price = cost.profile(config.profile)[event]
        cpus = cost.flushed_cpus(event, config.vcpus, config.host_cpus)
        each = units.band(*price.each) if price.each[1] else "-"
        fixed = units.band(*price.total(0, cpus)) if price.total(0, cpus)[1] else "-"
        table.add_row(event.name.lower(), fixed, each, Text(price.source))
    return _titled(
        f"Prices: profile {config.profile}, with {config.vcpus} vCPUs and {config.host_cpus} host CPUs", table
    )


def checks(comparison: Comparison) -> Group:
    """What the prices make of whole operations, beside what is known of those."""
    from pgemu.cost.checks import cross_checks

    config = comparison.runs[0].config
    table = _table("operation", "from prices", "known", "", "source", fold=("operation", "", "source"))
    for check in cross_checks(config.profile, config.vcpus, config.host_cpus):
        known = units.band(*check.known) if check.known else "-"
        table.add_row(Text(check.what), units.band(*check.band), known, check.verdict, Text(check.source))
    return _titled("Cross-checks of prices, which are no prices", table)


def tags() -> Table:
    """What the words of the sources mean."""
    return _facts((tag, meaning) for tag, meaning in TAGS.items())
